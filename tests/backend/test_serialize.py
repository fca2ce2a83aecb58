"""The blob: round trip, format checks, corrupt bytes, and the generated code."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from executorch_webgpu.backend import schema
from executorch_webgpu.backend.graph import FORMAT_VERSION, Graph, Node, Ref, Sym, SymbolRange, Value
from executorch_webgpu.backend.schema.__main__ import GENERATED, generate
from executorch_webgpu.backend.serialize import BlobError, deserialize, serialize

SIZE = Sym("input_dim", (0, 1))
POSITION = Sym("scalar", (1, 0))


def sample() -> Graph:
    values = (
        Value("input", "f32", (1, SIZE, 8), "x"),
        Value("input", "i64", (1,), "input_pos"),
        Value("mutable", "f16", (1, 16, 8), "cache", data="k1"),
        Value("temp", "f32", (1, Sym("add", (SIZE, 1)), 8), "y"),
        Value("temp", "f16", (1, 16, 8), "cache2", alias=2),
    )
    args = {
        "a": Ref(0),
        "b": 1,
        "c": 1.0,
        "d": True,
        "e": None,
        "f": "text",
        "g": POSITION,
        "h": (Ref(1), None, 2, 2.0, (False,)),
        "i": -(2**62),
    }
    return Graph(
        values, (Node("custom.op", args, (3, 4), "n"),), (0, 1), (Ref(3), SIZE, 3), ((2, 4),),
        (SymbolRange(SIZE, 1, 31), SymbolRange(POSITION, 0, None)), "model",
    )  # fmt: skip


def test_round_trip_keeps_every_field_and_literal_type() -> None:
    graph = sample()
    again = deserialize(serialize(graph))
    assert again == graph
    for name, arg in graph.nodes[0].args.items():
        assert type(again.nodes[0].args[name]) is type(arg), name


def test_text_names_symbols_values_and_aliases() -> None:
    text = str(sample())
    for part in (
        "symbol in0.shape[1] in [1, 31]",
        "mutable %2 cache: f16[1, 16, 8]",
        "in1[0]",
        "in %2",
        "mutate %2 <- %4",
        "return %3",
    ):
        assert part in text


def test_foreign_identifier_and_newer_version_are_named() -> None:
    blob = serialize(sample())
    with pytest.raises(BlobError, match="identifier b'XXXX', expected b'EWGP'"):
        deserialize(blob[:4] + b"XXXX" + blob[8:])
    newer = Graph((), (), (), (), format_version=FORMAT_VERSION + 1)
    with pytest.raises(BlobError, match=f"format version {FORMAT_VERSION + 1}.*up to {FORMAT_VERSION}"):
        deserialize(serialize(newer))


def test_truncated_or_flipped_bytes_give_a_blob_error_or_a_graph() -> None:
    blob = serialize(sample())
    chance = random.Random(0)
    cases = [blob[:n] for n in range(0, len(blob), 7)]
    for _ in range(300):
        changed = bytearray(blob)
        changed[chance.randrange(8, len(blob))] = chance.randrange(256)
        cases.append(bytes(changed))
    refused = 0
    for case in cases:
        try:
            deserialize(case)
        except BlobError:
            refused += 1
    assert refused > len(cases) // 3


def test_generated_code_is_what_the_schema_gives() -> None:
    committed = (Path(schema.__file__).parent / GENERATED).read_text(encoding="utf-8")
    assert generate() == committed, "run `python -m executorch_webgpu.backend.schema`"
