"""`llama.custom_quantized_sdpa` as `webgpu.attention`.

Where its caches are written as ExecuTorch's quantised cache does it,

    scale, zero = choose_qparams_per_token_asymmetric(x)
    codes = update_cache(quantize_per_token(x, scale, zero), codes)
    scales, zero_points = update_cache(scale, scales), update_cache(zero, zero_points)

for key and value, and nobody else reads them, the codes become words of four bytes, scales and zero points one tensor
[B, C, H, 2] in the place of the scales, the six writes one `webgpu.quantize_update`, and attention reads the codes.
Everywhere else key and value are dequantised in front of attention, as is a query that the same operators did not
make; one that they made is `webgpu.fake_quantize`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...ops.affine import DEQUANTIZE, FAKE
from ...ops.attention import CUSTOM, canonical
from ...ops.packed_cache import MAX_SIZE
from ...ops.quantize_update import NAME as QUANTIZE_UPDATE
from ...ops.quantized_attention import ATTENTION, CHOOSE, EPS, PARTS, QUANTIZE
from ..graph import Arg, Graph, Node, Ref, Value
from .match import CAST, COPY
from .quantized import ORIGIN, Constants
from .rewrite import Editor, Links

UPDATE = "llama.update_cache.default"
_KEPT = ("start_pos", "attn_mask", "drpout_p", "is_causal", "scale")
"""Arguments that both operators have."""


def expand_quantized_attention(graph: Graph, constants: Constants | None = None) -> Graph:
    """The graph without `llama.custom_quantized_sdpa`.

    Args:
        constants: initial content of the caches, to which that of packed ones is added; None: only caches that start as
            zeros can be packed.
    """
    links = Links(graph)
    editor = _Expansion(graph, links, constants)
    layers = {}
    for node in graph.nodes:
        layer = _layer(links, node) if node.op == ATTENTION else None
        if layer is not None and editor.pack(layer):
            layers[node.outputs[0]] = layer
    gone = {update.outputs[0] for layer in layers.values() for side in layer.values() for update in side.updates}
    for node in graph.nodes:
        if node.op == ATTENTION:
            editor.expand(node, layers.get(node.outputs[0]))
        elif gone.isdisjoint(node.outputs):
            editor.nodes.append(node)
    mutations = tuple(pair for pair in graph.mutations if pair[0] not in editor.dropped)
    return editor.finish(mutations=mutations)


@dataclass(frozen=True)
class _Side:
    """A key or value: its tokens in floats, and the writes of codes, scales and zero points."""

    source: Ref
    updates: tuple[Node, Node, Node]


def _rows(links: Links, quantize: Node | None) -> Ref | None:
    """What is quantised, if it is so by the range of each row."""
    if quantize is None:
        return None
    scale, zero = (_uncast(links, quantize.args[name]) for name in ("scales", "zero_points"))
    choose, source = links.made_by(scale, CHOOSE), quantize.args["input"]
    if choose is None or choose.args["input"] != source or (scale, zero) != tuple(Ref(v) for v in choose.outputs):
        return None
    if (quantize.args["quant_min"], quantize.args["quant_max"]) != (-128, 127) or not isinstance(source, Ref):
        return None
    return source if links.value(source).dtype in ("f32", "f16", "bf16") else None


def _uncast(links: Links, arg: Arg) -> Arg:
    """A tensor before casts and copies."""
    while (node := links.made_by(arg, *CAST, *COPY)) is not None:
        arg = node.args["self"]
    return arg


def _layer(links: Links, node: Node) -> dict[str, _Side] | None:
    """Key and value of an attention on caches that only it reads, or None."""
    found = {name: _side(links, node, name) for name in ("key", "value")}
    sides = {name: side for name, side in found.items() if side is not None}
    if len(sides) != len(found):
        return None
    starts = {update.args["start_pos"] for side in sides.values() for update in side.updates}
    shapes = {links.value(side.source).shape for side in sides.values()}
    caches = {update.args["cache"] for side in sides.values() for update in side.updates}
    return sides if len(starts) == len(shapes) == 1 and len(caches) == 6 else None


def _side(links: Links, node: Node, name: str) -> _Side | None:
    graph, letter = links.graph, PARTS[name]
    updates = []
    for arg in (node.args[name], node.args[f"{letter}_scales"], node.args[f"{letter}_zero_points"]):
        update = links.made_by(arg, UPDATE)
        if update is None:
            return None
        cache, new = update.args["cache"], update.outputs[0]
        if not isinstance(cache, Ref) or links.value(cache).kind != "mutable":
            return None
        if links.readers[cache.value] != [links.position[new]] or (cache.value, new) not in graph.mutations:
            return None
        readers = [at for at in links.readers[new] if at != links.position[node.outputs[0]]]
        if len(readers) != 1 or any(out == Ref(new) for out in graph.outputs):  # the one is the mutation
            return None
        updates.append(update)
    codes, scales, zeros = updates
    quantize = links.made_by(codes.args["value"], QUANTIZE)
    source = _rows(links, quantize)
    if quantize is None or source is None:
        return None
    for update, wanted in ((scales, quantize.args["scales"]), (zeros, quantize.args["zero_points"])):
        if _uncast(links, update.args["value"]) != _uncast(links, wanted):
            return None
    size = links.value(source).shape[3]
    if not isinstance(size, int) or size % 4 or size > MAX_SIZE:
        return None
    return _Side(source, (codes, scales, zeros))


class _Expansion(Editor):
    """The values and nodes that take the place of quantised attention.

    Attributes:
        dropped: mutable values that are state no longer.
    """

    def __init__(self, graph: Graph, links: Links, constants: Constants | None) -> None:
        super().__init__(graph)
        self._links, self._constants = links, constants
        self.dropped: set[int] = set()

    def pack(self, layer: dict[str, _Side]) -> bool:
        """Give the caches of an attention their packed types; False: their initial content is not known."""
        caches = [[self._links.value(update.args["cache"]) for update in side.updates] for side in layer.values()]
        if self._constants is None and any(scales.data or zeros.data for _, scales, zeros in caches):
            return False
        for side in layer.values():
            codes, scales, zeros = side.updates
            for value in _both(codes):
                old = self.values[value]
                self.values[value] = replace(old, dtype="u32", shape=(*old.shape[:3], _size(old.shape[3]) // 4))
            data = self._grid(*(self._links.value(update.args["cache"]) for update in (scales, zeros)))
            for value in _both(scales):
                old = self.values[value]
                mutable = old.kind == "mutable"
                name = f"{old.name} and zero points" if mutable else old.name
                self.values[value] = replace(
                    old, shape=(*old.shape[:3], 2), name=name, data=data if mutable else old.data
                )
            for value in _both(zeros):
                self.values[value] = replace(self.values[value], kind="temp", data=None)
            self.dropped.add(_both(zeros)[0])
        return True

    def _grid(self, scales: Value, zeros: Value) -> str | None:
        """Data key of the initial scales and zero points together; None: they are zeros."""
        if self._constants is None or not (scales.data or zeros.data):
            return None
        content = []
        for value in (scales, zeros):
            shape = tuple(_size(size) for size in value.shape)
            array = np.zeros(shape) if value.data is None else self._constants[value.data][1]
            content.append(array.reshape(shape).astype(np.float32))
        key = f"{scales.data or zeros.data}{ORIGIN}{zeros.data}"
        self._constants[key] = ("f32", np.concatenate(content, -1))
        return key

    def expand(self, node: Node, layer: dict[str, _Side] | None) -> None:
        """Add the nodes that compute an attention, on packed caches where there is a `layer`."""
        args: dict[str, Arg] = {name: arg for name, arg in node.args.items() if name in _KEPT}
        args["query"] = self._query(node)
        if layer is None:
            args |= {name: self._dequantized(node, name) for name in ("key", "value")}
            self.nodes.append(Node(CUSTOM, args, node.outputs, node.name))
            return
        (key, value), written = layer.values(), dict[str, Arg]()
        new = []
        for what, place in (("cache", 0), ("scales", 1)):
            for name, side in layer.items():
                written[f"{name}_{what}"] = side.updates[place].args["cache"]
                new.append(side.updates[place].outputs[0])
        tokens: dict[str, Arg] = {"key": key.source, "value": value.source}
        start = key.updates[0].args["start_pos"]
        self.nodes.append(Node(QUANTIZE_UPDATE, {**tokens, **written, "start_pos": start}, tuple(new), node.name))
        caches = {"key": node.args["key"], "value": node.args["value"]}
        known = canonical(Node(CUSTOM, {**args, **caches}, node.outputs, node.name), self.graph)
        known |= {"bits": 8, "zeros": True, "key_scales": Ref(new[2]), "value_scales": Ref(new[3])}
        self.nodes.append(Node("webgpu.attention", known, node.outputs, node.name))

    def _query(self, node: Node) -> Ref:
        quantize = self._links.made_by(node.args["query"], QUANTIZE)
        source = _rows(self._links, quantize)
        if quantize is None or source is None:
            return self._dequantized(node, "query")
        for name in ("scales", "zero_points"):
            if _uncast(self._links, node.args[f"q_{name}"]) != _uncast(self._links, quantize.args[name]):
                return self._dequantized(node, "query")
        wide = self.temp(node.args["query"], f"{node.name}.query", dtype="f32")
        given: dict[str, Arg] = {"input": source, "quant_min": -128, "quant_max": 127, "eps": EPS}
        self.nodes.append(Node(FAKE, given, (wide.value,), node.name))
        return wide

    def _dequantized(self, node: Node, name: str) -> Ref:
        source, letter = node.args[name], PARTS[name]
        wide = self.temp(source, f"{node.name}.{name}", dtype="f32")
        given: dict[str, Arg] = {
            "input": source,
            "block_size": (1, 1, 1, self.graph.value(source).shape[3]),
            "scale": node.args[f"{letter}_scales"],
            "zero_point": node.args[f"{letter}_zero_points"],
            "quant_min": -128,
            "quant_max": 127,
        }
        self.nodes.append(Node(DEQUANTIZE, given, (wide.value,), node.name))
        return wide


def _both(update: Node) -> tuple[int, int]:
    """A cache before and after its write."""
    cache = update.args["cache"]
    assert isinstance(cache, Ref)
    return cache.value, update.outputs[0]


def _size(size: object) -> int:
    assert isinstance(size, int)
    return size
