"""`executorch_webgpu::group_query_attention` as records that have kernels: norms, rotary embedding, cache writes and
attention, all by the lengths of each batch row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...ops.attention_decode import SIZES_WORDS
from ...ops.group_query_attention import NAME, NUMBERS, Sizes, described, sizes
from ...ops.packed_cache import CODES, words
from ...ops.quantize_cache import WRITTEN
from ..graph import Arg, Dim, Graph, Node, Ref, Value
from .rewrite import Editor, map_nodes

LENGTH_WORDS = 4
"""Words for each batch row of the result of `webgpu.lengths`."""


def expand_group_query(graph: Graph) -> Graph:
    """Replace each group-query attention. `webgpu.lengths` is made for each; `merge_equal_nodes` leaves one for all
    layers."""
    editor = Editor(graph)

    def change(node: Node) -> list[Node] | None:
        return _Expansion(editor, node).run() if node.op == NAME else None

    return map_nodes(graph, change, editor)


@dataclass
class _Expansion:
    """One operator on its way into several records."""

    editor: Editor
    node: Node

    def __post_init__(self) -> None:
        self.made: list[Node] = []
        self.args: Mapping[str, Arg] = self.node.args
        self.values = described(self.editor.graph, self.node)
        self.sizes: Sizes = sizes(self.values, {name: self.args[name] for name in NUMBERS})
        cache = self.values["key_cache"]
        self.bits = 0 if cache is None else CODES.get(cache.dtype, 0)

    def run(self) -> list[Node]:
        args, output = self.args, self.node.outputs[0]
        query, key, value = self._parts()
        if args["q_norm"] is not None:
            query, key = self._norm(query, "q_norm"), self._norm(key, "k_norm")
        bias, columns = self._bias()
        lengths = self._lengths(min(self.sizes.capacity, columns))
        limits: dict[str, Arg] = {
            "kv_limit": "causal" if args["is_causal"] else "prefix",
            "window": args["window"],
            "lengths": lengths,
        }
        grids: Ref | None = None
        packed: dict[str, Arg] = {}
        if self.bits:
            query, packed = self._quantize(query, key, value, lengths)
        elif args["cos"] is None:
            self._write("key_cache", key, lengths, self.node.outputs[1])
            self._write("value_cache", value, lengths, self.node.outputs[2])
        else:
            query, grids = self._rotate_and_write(query, key, value, limits)
        attend: dict[str, Arg] = {
            "query": query,
            "key": Ref(self.node.outputs[1]),
            "value": Ref(self.node.outputs[2]),
            **dict.fromkeys(("q_layout", "kv_layout", "out_layout"), "bshd"),
            "attn_mask": bias,
            "start_pos": 0,
            **{name: args[name] for name in ("scale", "softcap")},
            "sink": self._sink(),
            "sizes": grids,
            **limits,
            **packed,
        }
        s, found = self.sizes, self.editor.graph.values[output]
        shape = (s.batch, s.rows, s.heads, s.dv)
        mixed = Ref(output) if found.shape == shape else self._temp(found.dtype, shape, "heads")
        if self.bits == 4:
            turned = self._temp("f32", shape, "transformed")
            self._add("webgpu.attention", attend, turned.value)
            self._add("webgpu.hadamard", {"input": turned, "lengths": lengths}, mixed.value)
        else:
            self._add("webgpu.attention", attend, mixed.value)
        if found.shape != shape:
            self._add("aten.view_copy.default", {"self": mixed, "size": found.shape}, output)
        return self.made

    # -- tools

    def _temp(self, dtype: str, shape: tuple[Dim, ...], what: str) -> Ref:
        return self.editor.add_value(Value("temp", dtype, shape, f"{self.node.name}.{what}"))

    def _add(self, op: str, args: Mapping[str, Arg], *outputs: int) -> None:
        self.made.append(Node(op, dict(args), outputs, self.node.name))

    def _value(self, ref: Ref) -> Value:
        return self.editor.values[ref.value]

    # -- steps

    def _parts(self) -> tuple[Ref, Ref, Ref]:
        """Query, key and value as [B, S, heads, head size]."""
        s = self.sizes
        shapes = ((s.heads, s.d), (s.kv_heads, s.d), (s.kv_heads, s.dv))
        if not s.packed:
            q, k, v = (self._heads(self._ref(name), name, *shape) for name, shape in zip(_QKV, shapes, strict=True))
            return q, k, v
        packed = self._ref("query")
        parts, start = [], 0
        for name, (heads, size) in zip(_QKV, shapes, strict=True):
            piece = self._temp(self._value(packed).dtype, (s.batch, s.rows, heads * size), name)
            end = start + heads * size
            self._add(
                "aten.slice_copy.Tensor",
                {"self": packed, "dim": 2, "start": start, "end": end, "step": 1},
                piece.value,
            )
            parts.append(self._heads(piece, name, heads, size))
            start = end
        return parts[0], parts[1], parts[2]

    def _ref(self, name: str) -> Ref:
        found = self.args[name]
        if not isinstance(found, Ref):
            raise TypeError(f"{self.node.name}: {name} is {found!r}")
        return found

    def _heads(self, x: Ref, name: str, heads: int, size: int) -> Ref:
        value, shape = self._value(x), (self.sizes.batch, self.sizes.rows, heads, size)
        if value.shape == shape:
            return x
        view = self._temp(value.dtype, shape, f"{name}.heads")
        self._add("aten.view_copy.default", {"self": x, "size": shape}, view.value)
        return view

    def _norm(self, x: Ref, weight: str) -> Ref:
        value = self._value(x)
        out = self._temp(value.dtype, value.shape, weight)
        args: dict[str, Arg] = {"input": x, "weight": self._ref(weight), "eps": self.args["norm_eps"]}
        self._add("webgpu.rms_norm", args, out.value)
        return out

    def _bias(self) -> tuple[Ref | None, int]:
        """The bias with a column for each cache row, and how many cache rows the given one reaches."""
        bias, capacity = self.values["attn_bias"], self.sizes.capacity
        if bias is None:
            return None, capacity
        columns = bias.shape[-1]
        if not isinstance(columns, int):
            raise TypeError(f"{self.node.name}: attn_bias has {columns} columns")
        if columns == 1 or columns >= capacity:
            return self._ref("attn_bias"), capacity
        padded = self._temp(bias.dtype, (*bias.shape[:-1], capacity), "bias")
        args: dict[str, Arg] = {"self": self._ref("attn_bias"), "pad": (0, capacity - columns), "value": 0}
        self._add("aten.constant_pad_nd.default", args, padded.value)
        return padded, columns

    def _lengths(self, capacity: int) -> Ref:
        lengths = self._temp("i32", (self.sizes.batch, LENGTH_WORDS), "lengths")
        args: dict[str, Arg] = {
            "past": self._ref("past"),
            "q_len": self.args["q_len"],
            "rows": self.sizes.rows,
            "capacity": capacity,
        }
        self._add("webgpu.lengths", args, lengths.value)
        return lengths

    def _sink(self) -> Arg:
        if self.args["smooth_softmax"] is not True:
            return self.args["sink"]
        sink = self._temp("f32", (self.sizes.heads,), "sink")
        self._add("aten.full.default", {"size": (self.sizes.heads,), "fill_value": 0.0, "dtype": "f32"}, sink.value)
        return sink

    def _as_cache(self, x: Ref, cache: str) -> Ref:
        """x in the dtype of a cache."""
        value, dtype = self._value(x), self._value(self._ref(cache)).dtype
        if value.dtype == dtype:
            return x
        cast = self.editor.add_value(replace(value, kind="temp", dtype=dtype, name=f"{self.node.name}.{cache}"))
        self._add("aten._to_copy.default", {"self": x, "dtype": dtype}, cast.value)
        return cast

    def _write(self, cache: str, x: Ref, lengths: Ref, output: int) -> None:
        args = {"value": self._as_cache(x, cache), "cache": self._ref(cache), "lengths": lengths}
        self._add("webgpu.update_cache", args, output)

    def _quantize(self, query: Ref, key: Ref, value: Ref, lengths: Ref) -> tuple[Ref, dict[str, Arg]]:
        """The query for packed caches, and what attention needs to read them. The caches' values become words."""
        for name, new in zip(("key_cache", "value_cache"), self.node.outputs[1:3], strict=True):
            for number in (self._ref(name).value, new):
                found = self.editor.values[number]
                if found.dtype in CODES:
                    changed = replace(found, dtype="u32", shape=words(found.shape, found.dtype))
                    self.editor.values[number] = changed
        turned = self._temp("f32", self._value(query).shape, "turned")
        args: dict[str, Arg] = {
            "query": query,
            "key": key,
            "value": value,
            **{name: self.args[name] for name in (*WRITTEN, "cos", "sin", "interleaved")},
            "bits": self.bits,
            "lengths": lengths,
        }
        self._add("webgpu.quantize_cache", args, turned.value, *self.node.outputs[1:])
        scales = (Ref(output) for output in self.node.outputs[3:])
        return turned, {"bits": self.bits, **dict(zip(("key_scales", "value_scales"), scales, strict=True))}

    def _rotate_and_write(self, query: Ref, key: Ref, value: Ref, limits: Mapping[str, Arg]) -> tuple[Ref, Ref]:
        """The rotated query, and what sizes attention's grids."""
        rotated = self._temp(self._value(query).dtype, self._value(query).shape, "rotated")
        grids = self._temp("i32", (SIZES_WORDS,), "sizes")
        half = self._value(self._ref("cos")).shape[1]
        args: dict[str, Arg] = {
            "query": query,
            "key": key,
            "value": self._as_cache(value, "value_cache"),
            **{name: self.args[name] for name in ("key_cache", "value_cache", "cos", "sin", "interleaved")},
            "layout": "bshd",
            "start": 0,
            "rot": 2 * half if isinstance(half, int) else None,
            "start_pos": 0,
            **limits,
        }
        self._add("webgpu.rope_cache", args, rotated.value, *self.node.outputs[1:], grids.value)
        return rotated, grids


_QKV = ("query", "key", "value")
