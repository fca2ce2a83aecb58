"""Branches that constants decide are taken out of a text, and nothing else is."""

from __future__ import annotations

import re

import pytest

from executorch_webgpu import wgsl
from executorch_webgpu.wgsl.branches import constants, pruned

DECLARED = """
const SUM = LEFT + 2u * RIGHT;
const LEFT: u32 = 3u;
const RIGHT = min(7u, 0x10u) / 2u;
const EVEN = LEFT % 2u == 0u;
const CHOSEN = select(1u, 5u, !EVEN && RIGHT != 2u);
const ON: bool = true;
const ROOT = 1.5;
const SCALED = ROOT * 2.0;
const WRAPPED = 1u - LEFT;
const NOWHERE = LEFT / (RIGHT - 3u);
const lower = 4u;
"""


def test_constants() -> None:
    """In any order; without floats, numbers that would wrap, divisions by zero and names that may be shadowed."""
    expected = {"SUM": 9, "LEFT": 3, "RIGHT": 3, "EVEN": False, "CHOSEN": 5, "ON": True}
    assert constants(DECLARED) == expected


def body(text: str) -> str:
    """The body of a function of that text after pruning, spaces counted once."""
    whole = pruned(f"{DECLARED}fn f(x: u32) -> u32 {{\n{text}\n}}\nfn g() {{ }}\n")
    assert whole.startswith(DECLARED)
    assert whole.endswith("}\nfn g() { }\n")
    found = re.search(r"-> u32 \{(.*)\}\s*fn g", whole, re.S)
    assert found
    return " ".join(found[1].split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("if (ON) { a(); } b();", "{ a(); } b();"),
        ("if (!ON) { a(); } b();", "b();"),
        ("if (LEFT > RIGHT) { a(); } else { b(); } c();", "{ b(); } c();"),
        ("if (LEFT == 3u) { if (EVEN) { a(); } else { b(); } }", "{ { b(); } }"),
        ("for (var i = 0u; i < x; i++) { if (EVEN) { a(); } b(); }", "for (var i = 0u; i < x; i++) { b(); }"),
        ("if (EVEN && x > 1u) { a(); } b();", "b();"),
        ("if (EVEN || x > 1u) { a(); }", "if (x > 1u) { a(); }"),
        ("if (ON && (x > 1u || x == 0u)) { a(); }", "if ((x > 1u || x == 0u)) { a(); }"),
        ("if ((EVEN || LEFT < x) && (ON || x > 1u)) { a(); }", "if ((EVEN || LEFT < x)) { a(); }"),
        ("if (x > LEFT) { a(); } else { if (ON) { b(); } }", "if (x > LEFT) { a(); } else { { b(); } }"),
        ("if (x > 1u) { a(); } else if (ON) { b(); }", "if (x > 1u) { a(); } else if (ON) { b(); }"),
        ("if (ON) { a(); } else if (x > 1u) { b(); }", "if (ON) { a(); } else if (x > 1u) { b(); }"),
        ("if (SCALED > 1.0) { a(); }", "if (SCALED > 1.0) { a(); }"),
        ("if (lower == 4u) { a(); }", "if (lower == 4u) { a(); }"),
        ("if (WRAPPED > 1u) { a(); }", "if (WRAPPED > 1u) { a(); }"),
        ("if (x.y == vec4<u32>() || h(x, LEFT)) { a(); }", "if (x.y == vec4<u32>() || h(x, LEFT)) { a(); }"),
        ("a(); // if (ON) { b();\n/* } */ c();", "a(); c();"),
    ],
)
def test_branches(text: str, expected: str) -> None:
    assert body(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("if (ON) { return x; } a(); return 2u;", "return x;"),
        ("if (EVEN) { return x; } a(); return 2u;", "a(); return 2u;"),
        ("let y = 1u; if (ON) { let y = x; return y; } return 2u;", "let y = 1u; { let y = x; return y; }"),
        ("if (x > 1u) { if (ON) { return x; } a(); } return 2u;", "if (x > 1u) { return x; } return 2u;"),
    ],
)
def test_returns(text: str, expected: str) -> None:
    """Behind a return that is always reached nothing may stand in its block."""
    assert body(text) == expected


def test_an_open_bracket_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no '\}' for the '\{'"):
        pruned("fn f() { if (x) { a(); ")


def test_compose_prunes_where_the_head_asks() -> None:
    """The wide kernel's text has neither the branches of packed pairs nor comments; its sibling keeps both."""
    consts = {"D": 64, "DV": 64, "QROWS": 128, "CHUNK": 8, "VKEYS": 32, "SUB": 16, "KSTEP": 1, "VSTEP": 1}
    part = wgsl.source("attention_flash_loads")
    wide = wgsl.compose("attention_flash_wide", consts, {}, part)
    plain = wgsl.compose("attention_flash", consts, {}, part)
    assert "if (KSTEP == 2u)" in plain
    assert "//" in plain
    assert "KSTEP == 2u" not in wide
    assert "//" not in wide
    assert "if (PARTS > 1u)" not in wide
    assert pruned(wide) == wide
