"""Activations that are quantised for packed weights stay integers (`ops/activations.py`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...ops import activations, linear_packed, project
from ...ops.affine import FAKE, SMALLEST
from ...ops.norm import DEFAULT_EPS
from ...ops.packed import Format, format_of
from ..graph import Arg, Graph, Node, Ref, Value
from .match import NORMS
from .rewrite import END, Editor, Links, substitute


def keep_codes(graph: Graph) -> Graph:
    """Every `webgpu.fake_quantize` that products with packed weights read: they get its integers, or quantise
    themselves where they are the only reader. With it goes an RMSNorm that nothing else reads. Where something else
    reads its floats, it stays beside.
    """
    return _joined(_coded(graph))


def _coded(graph: Graph) -> Graph:
    """With `webgpu.quantize_activations`."""
    links, editor = Links(graph), Editor(graph)
    codes: dict[int, int] = {}  # result of a fake_quantize -> rows of integers
    for node in graph.nodes:
        found = _quantizer(links, node)
        if found is not None:
            ref = editor.add_value(found.value)
            codes[node.outputs[0]] = ref.value
            editor.nodes.append(replace(found.node, outputs=(ref.value,)))
            if found.floats:
                editor.nodes.append(node)
        elif codes and _takes(links, node):
            editor.nodes.append(replace(node, args={**node.args, "input": substitute(node.args["input"], codes)}))
        else:
            editor.nodes.append(node)
    return editor.finish()


def _joined(graph: Graph) -> Graph:
    """Without those that one product alone reads."""
    links, editor = Links(graph), Editor(graph)
    for node in graph.nodes:
        made = links.made_by(node.args.get("input"), activations.NAME)
        if made is None or links.only_reader(made.outputs[0]) is not node:
            editor.nodes.append(node)
            continue
        args = dict(node.args) if node.op == project.NAME else _as_project(node)
        args |= {name: made.args[name] for name in ("input", "norm_weight", "norm_eps")}
        args["quantize"] = activations.range_of(made)
        editor.nodes.append(replace(node, op=project.NAME, args=args))
    return editor.finish()


def _as_project(node: Node) -> dict[str, Arg]:
    """The arguments of a `webgpu.linear_packed` as those of a `webgpu.project`."""
    bias = node.args.get("bias")
    return {
        "weights": (node.args["weight"],), "formats": (node.args["format"],),
        "biases": None if bias is None else (bias,), "residual": None, "gated": False,
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Quantizer:
    """What stands for a fake_quantize, its result, and whether its floats are read as well."""

    node: Node
    value: Value
    floats: bool


def _quantizer(links: Links, node: Node) -> _Quantizer | None:
    if node.op != FAKE:
        return None
    result, source = links.graph.values[node.outputs[0]], links.value(node.args["input"])
    readers = links.readers.get(node.outputs[0], [])
    taking = [n for n in readers if n != END and _takes(links, links.graph.nodes[n])]
    k = result.shape[-1]
    if not taking or not isinstance(k, int):
        return None
    floats = len(taking) < len(readers)
    eps = node.args["eps"]
    args: dict[str, Arg] = {
        "input": node.args["input"], "quant_min": node.args["quant_min"], "quant_max": node.args["quant_max"],
        "eps": SMALLEST[source.dtype] if eps is None else eps, "norm_weight": None, "norm_eps": None,
        "symmetric": node.args.get("symmetric", False),
    }  # fmt: skip
    norm = None if floats else _norm(links, node)
    if norm is not None:
        given = norm.args.get("eps")
        args |= {"input": norm.args["input"], "norm_weight": norm.args.get("weight")}
        args["norm_eps"] = DEFAULT_EPS if given is None else given
    value = Value("temp", activations.CODES, (*result.shape[:-1], activations.words(k)), f"{result.name}.codes")
    made = Node(activations.NAME, args, (len(links.graph.values),), node.name)
    whole = replace(links.graph, values=(*links.graph.values, value))
    return _Quantizer(made, value, floats) if activations.supports(whole, made) is None else None


def _norm(links: Links, node: Node) -> Node | None:
    """The RMSNorm over the last axis that makes the input, if only this node reads it."""
    norm = links.made_by(node.args["input"], *NORMS)
    if norm is None:
        return None
    axes = norm.args.get("normalized_shape", (None,))
    single = isinstance(axes, tuple) and len(axes) == 1
    read = [reader for output in norm.outputs for reader in links.readers.get(output, [])]
    return norm if single and read == [links.position[node.outputs[0]]] else None


def _takes(links: Links, node: Node) -> bool:
    """Whether a node is a product that takes integers for its input, which it reads for nothing else."""
    source = node.args.get("input")
    if not isinstance(source, Ref) or list(node.inputs()).count(source.value) != 1:
        return False
    if node.op == linear_packed.NAME:
        return activations.takes(format_of(node.args["format"]))
    if node.op != project.NAME or node.args.get("norm_eps") is not None:
        return False
    forms: tuple[Format | None, ...] = project.parts(node).formats
    return all(activations.takes(form) for form in forms)
