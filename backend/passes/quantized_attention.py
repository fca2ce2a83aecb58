"""`llama.custom_quantized_sdpa` as `llama.custom_sdpa` of dequantised tensors."""

from __future__ import annotations

from ...ops.affine import DEQUANTIZE
from ...ops.attention import CUSTOM
from ...ops.quantized_attention import ATTENTION, PARTS
from ..graph import Arg, Graph, Node
from .rewrite import Editor, map_nodes


def expand_quantized_attention(graph: Graph) -> Graph:
    """Dequantise query, key and value in front of each quantised attention."""
    editor = Editor(graph)

    def change(node: Node) -> list[Node] | None:
        if node.op != ATTENTION:
            return None
        made: list[Node] = []
        args: dict[str, Arg] = {name: arg for name, arg in node.args.items() if name in _KEPT}
        for name, letter in PARTS.items():
            source = node.args[name]
            wide = editor.temp(source, f"{node.name}.{name}", dtype="f32")
            given: dict[str, Arg] = {
                "input": source,
                "block_size": (1, 1, 1, graph.value(source).shape[3]),
                "scale": node.args[f"{letter}_scales"],
                "zero_point": node.args[f"{letter}_zero_points"],
                "quant_min": -128,
                "quant_max": 127,
            }
            made.append(Node(DEQUANTIZE, given, (wide.value,), node.name))
            args[name] = wide
        return [*made, Node(CUSTOM, args, node.outputs, node.name)]

    return map_nodes(graph, change, editor)


_KEPT = ("start_pos", "attn_mask", "drpout_p", "is_causal", "scale")
"""Arguments that both operators have."""
