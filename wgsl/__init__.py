"""Shaders: one plain `.wgsl` file a kernel. This module loads, reflects and composes them; it imports no GPU library.

A file is the single source of truth of its kernel: bindings, access modes, the fields of `struct Params` and the
overrides are
reflected from its text. What varies is appended by `compose` as WGSL declarations: element types (`alias`),
constants, and the
bodies of elementwise kernels. Conventions:

- one entry point, `main`; group 0 only.
- `var<uniform> params: Params;` with `struct Params { field:
u32|i32|f32|vec4<u32>|vec4<i32>|vec4<f32>|array<vec4<u32|i32>, N>, ... }`.
- `var<uniform> live: array<vec4<i32>, 16>;` where the kernel reads live scalars. A Params field (u32) holds the slot;
the function
  `live_value(slot: u32) -> i32` is appended for kernels that declare `live`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from .branches import pruned

LIVE_SLOTS = 64
"""Live scalars that one dispatch can see: the size of the `live` window (256 bytes, WebGPU's default uniform
alignment)."""

_BINDING = re.compile(r"@group\(0\)\s*@binding\((\d+)\)\s*var<(\w+)(?:\s*,\s*(\w+))?>\s*(\w+)\s*:\s*([^;]+);")
_PARAMS = re.compile(r"struct\s+Params\s*\{([^}]*)\}", re.S)
_FIELD = re.compile(r"(\w+)\s*:\s*(array<[^>]*>\s*,\s*\d+\s*>|[\w<>]+)")
_OVERRIDE = re.compile(r"override\s+(\w+)\s*:\s*(\w+)")
_UNCHECKED = re.compile(r"^// Unchecked: \S", re.M)
_PRUNED = re.compile(r"^// Pruned: \S", re.M)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)

_F16 = re.compile(r"\bf16\b")

LIVE_VALUE = "fn live_value(slot: u32) -> i32 { return live[slot >> 2u][slot & 3u]; }\n"


@dataclass(frozen=True, slots=True)
class Binding:
    """A resource of a shader. `space` is `storage` or `uniform`; `writes` is true for `read_write` access."""

    index: int
    name: str
    space: str
    writes: bool
    type: str


@dataclass(frozen=True, slots=True)
class Field:
    """A field of `struct Params`: byte offset, struct format of one element, and element count."""

    name: str
    offset: int
    code: str
    count: int


@dataclass(frozen=True)
class Interface:
    """What a shader file declares.

    Attributes:
        bindings: by name.
        params: fields of `struct Params` in order; empty without one.
        params_size: bytes of the struct, rounded up to 16.
        overrides: name -> WGSL type.
        unchecked: whether the file's head says, in a line that begins with "Unchecked:", why every index is in range,
            so that it may be compiled without bounds checks.
    """

    bindings: Mapping[str, Binding]
    params: tuple[Field, ...]
    params_size: int
    overrides: Mapping[str, str]
    unchecked: bool

    def pack(self, values: Mapping[str, object], where: str) -> bytes:
        """The bytes of `struct Params`; every field must be given, none may be left over (ValueError)."""
        names = {f.name for f in self.params}
        if names != set(values):
            raise ValueError(
                f"{where}: params differ from struct Params: missing {names - set(values)}, "
                f"unknown {set(values) - names}"
            )
        out = bytearray(self.params_size)
        for f in self.params:
            value = values[f.name]
            items = tuple(value) if isinstance(value, tuple) else (value,)
            if len(items) > f.count:
                raise ValueError(f"{where}: params.{f.name} takes {f.count} numbers, got {len(items)}")
            try:
                struct.pack_into(f"<{len(items)}{f.code}", out, f.offset, *items)
            except struct.error as error:
                raise ValueError(f"{where}: params.{f.name} = {value!r}: {error}") from None
        return bytes(out)


@cache
def source(kernel: str) -> str:
    """The text of `<kernel>.wgsl` (FileNotFoundError if there is none)."""
    return resources.files(__package__).joinpath(f"{kernel}.wgsl").read_text(encoding="utf-8")


def kernels() -> tuple[str, ...]:
    """The names of all kernels, sorted. A file without an entry point is a part that is appended to kernels as
    `body`."""
    folder = resources.files(__package__)
    names = sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".wgsl"))
    return tuple(name for name in names if "@compute" in source(name))


def _layout(body: str, kernel: str) -> tuple[tuple[Field, ...], int]:
    """Byte offsets of the fields by WGSL's uniform layout rules (vectors of four and arrays align to 16)."""
    fields: list[Field] = []
    offset = 0
    for name, kind in _FIELD.findall(body):
        kind = kind.replace(" ", "")
        array = re.fullmatch(r"array<vec4<(\w+)>,(\d+)>", kind)
        vector = re.fullmatch(r"vec4<(\w+)>", kind)
        scalar, count = (array[1], 4 * int(array[2])) if array else (vector[1], 4) if vector else (kind, 1)
        codes = {"u32": "I", "i32": "i", "f32": "f"}
        if scalar not in codes:
            raise ValueError(f"{kernel}.wgsl: Params.{name}: type {kind} is not one that the host can pack")
        align = 4 if count == 1 else 16
        offset = -(-offset // align) * align
        fields.append(Field(name, offset, codes[scalar], count))
        offset += 4 * count
    return tuple(fields), max(-(-offset // 16) * 16, 16)


@cache
def reflect(kernel: str, body: str = "") -> Interface:
    """The interface that `<kernel>.wgsl` declares, with the bindings that parts appended to it declare in `body`."""
    text = _COMMENT.sub("", source(kernel))
    bindings = {
        name: Binding(int(index), name, space, access == "read_write", kind.strip())
        for index, space, access, name, kind in _BINDING.findall(text + _COMMENT.sub("", body))
    }
    match = _PARAMS.search(text)
    fields, size = _layout(match[1], kernel) if match else ((), 0)
    unchecked = _UNCHECKED.search(source(kernel)) is not None
    return Interface(bindings, fields, size, dict(_OVERRIDE.findall(text)), unchecked)


def _literal(value: int | float | bool) -> tuple[str, str]:
    if isinstance(value, bool):
        return "bool", str(value).lower()
    if isinstance(value, int):
        return "u32", f"{value}u"
    return "f32", f"{value!r}f" if value == value and abs(value) != float("inf") else _no_literal(value)


def _no_literal(value: float) -> str:
    raise ValueError(f"{value} has no WGSL literal")


def compose(
    kernel: str,
    consts: Mapping[str, int | float | bool] | None = None,
    types: Mapping[str, str] | None = None,
    body: str = "",
    dialect: str = "naga",
) -> str:
    """The complete shader text: the file, with the declarations of a variant put after it and `enable` lines before it.

    Of a file whose head has a line that begins with "Pruned:", what the variant's constants decide is taken out.
    `dialect` is `naga` (wgpu) or `tint` (Dawn, browsers): naga refuses `enable subgroups;`, which Tint demands.
    """
    text = source(kernel)
    types = types or {}
    lines = [f"alias {name} = {kind};" for name, kind in sorted(types.items())]
    for name, value in sorted((consts or {}).items()):
        kind, literal = _literal(value)
        lines.append(f"const {name}: {kind} = {literal};")
    declared = " ".join((*types.values(), _COMMENT.sub("", body)))  # a comment may name the type where no device has it
    head = ["enable f16;"] if _F16.search(declared) else []
    if dialect == "tint" and "subgroup" in _COMMENT.sub("", text + body):
        head.append("enable subgroups;")
    tail = LIVE_VALUE if "live" in reflect(kernel).bindings else ""
    whole = "\n".join([*head, text, *lines, tail + body])
    return pruned(whole) if _PRUNED.search(text) else whole
