"""`WebGPUPartitioner`: tags the part of an edge program that the WebGPU delegate takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Literal

import torch
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.backend.utils import tag_constant_data, tag_mutated_buffer
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner, Partition
from torch.fx.passes.operator_support import OperatorSupportBase

from ..backend.passes import OPTIONAL
from ..backend.passes.bf16 import NAME as STORE_BF16
from ..backend.preprocess import DISABLED_PASSES, EXTERNAL_TAG
from ..backend.serialize import BACKEND_ID
from ..backend.translate import Translation, op_name, translate
from ..ops.base import check_node

logger = logging.getLogger(__name__)


class WebGPUPartitioner(Partitioner):
    """Chooses every node for which the WebGPU delegate has a kernel.

    Args:
        disable_passes: names of optional passes to leave out (`executorch_webgpu.backend.passes.OPTIONAL`), for
        comparison.
        external_weights: base name of a `.ptd` file for the weights, written by
            `ExecutorchProgramManager.write_tensor_data_to_file`; None keeps them in the `.pte`.
        bf16: what becomes of matrices of bfloat16 that linear layers and lookups alone read. `stored`: two bytes an
            element on the GPU, widened in registers; `f32`: four bytes, converted at load. The results are the same.

    Raises:
        ValueError: there is no such pass, or no such choice for bfloat16.

    After `partition`, `refused` maps each operator that stays outside to the reason; it is also logged once per
    operator.
    """

    def __init__(
        self,
        disable_passes: Collection[str] = (),
        external_weights: str | None = None,
        bf16: Literal["stored", "f32"] = "stored",
    ) -> None:
        super().__init__()
        unknown = set(disable_passes) - set(OPTIONAL)
        if unknown:
            raise ValueError(f"no pass named {sorted(unknown)}; there are {sorted(OPTIONAL)}")
        if bf16 not in ("stored", "f32"):
            raise ValueError(f"bf16 is {bf16!r}; it must be 'stored' or 'f32'")
        disable_passes = {*disable_passes, *((STORE_BF16,) if bf16 == "f32" else ())}
        specs = []
        if disable_passes:
            specs.append(CompileSpec(DISABLED_PASSES, ",".join(sorted(disable_passes)).encode()))
        if external_weights:
            specs.append(CompileSpec(EXTERNAL_TAG, external_weights.encode()))
        self.delegation_spec = DelegationSpec(BACKEND_ID, specs)
        self.refused: dict[str, str] = {}

    def ops_to_not_decompose(
        self, ep: ExportedProgram
    ) -> tuple[list[torch._ops.OpOverload], Callable[[torch.fx.Node], bool] | None]:
        """The composite operators of this program that are taken whole: those whose every occurrence is supported."""
        reasons = unsupported(ep)
        kept: set[torch._ops.OpOverload] = set()
        lost: set[torch._ops.OpOverload] = set()
        for node in ep.graph.nodes:
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                (lost if node in reasons else kept).add(node.target)
        preserved = [op for op in kept - lost if op.namespace == "aten" and op_name(op) in KEPT_WHOLE]
        return sorted(preserved, key=str), None

    def transform_for_pre_decomposition(self, exported_program: ExportedProgram) -> ExportedProgram:
        """Called by `to_edge_transform_and_lower` before anything else: see `separate_outputs`."""
        return separate_outputs(exported_program)

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag nodes, constants and mutated buffers. Raises nothing: what is refused stays outside."""
        reasons = unsupported(exported_program)
        partitions = propose(exported_program, reasons)
        self.refused = {}
        for node, reason in reasons.items():
            if node.op == "call_function" and self.refused.setdefault(op_name(node.target), reason) is reason:
                logger.info("not delegated to WebGPU: %s: %s", op_name(node.target), reason)
        tags = {}
        for number, part in enumerate(partitions):
            tag = f"webgpu_{number}"
            for node in part.nodes:
                node.meta["delegation_tag"] = tag
            tags[tag] = self.delegation_spec
        tag_constant_data(exported_program)
        tag_mutated_buffer(exported_program)
        return PartitionResult(tagged_exported_program=exported_program, partition_tags=tags)


def separate_outputs(program: ExportedProgram) -> ExportedProgram:
    """Give outputs that are a buffer's new value a clone of their own, in place, and return the program.

    ExecuTorch refuses to consume a buffer in a delegate whose new value is an output itself, and a partitioner may not
    change the graph that `to_backend` gives it. `to_edge_transform_and_lower` calls this by itself; before
    `to_edge(...).to_backend(...)` it is the caller's to do, for modules that return their caches. The clone costs
    nothing: inside the delegate it is a view.

    Args:
        program: what `torch.export.export` gives, before functionalisation.
    """
    signature = program.graph_signature
    graph = program.graph_module.graph
    output = next(node for node in graph.nodes if node.op == "output")
    buffers = set(signature.inputs_to_buffers) | set(signature.buffers_to_mutate)
    results = list(output.args[0])
    for position, spec in enumerate(signature.output_specs):
        result = results[position]
        if spec.kind != OutputKind.USER_OUTPUT or not isinstance(result, torch.fx.Node) or result.name not in buffers:
            continue
        with graph.inserting_before(output):
            clone = graph.call_function(torch.ops.aten.clone.default, (result,))
        clone.meta = dict(result.meta)
        results[position] = clone
        signature.output_specs[position] = OutputSpec(spec.kind, TensorArgument(clone.name), spec.target)
    output.args = (type(output.args[0])(results),)
    program.graph_module.recompile()
    return program


KEPT_WHOLE = frozenset(
    f"aten.{name}"
    for name in (
        "linear.default", "matmul.default", "scaled_dot_product_attention.default", "silu.default", "gelu.default",
        "softmax.int", "log_softmax.int", "rms_norm.default", "layer_norm.default", "embedding.default",
        "repeat_interleave.self_int", "hardswish.default", "leaky_relu.default", "mish.default",
    )
)  # fmt: skip
"""Composite operators that the exporter may leave whole. Only those with kernels of their own are worth it."""


def unsupported(program: ExportedProgram) -> dict[torch.fx.Node, str]:
    """Every node that the delegate cannot take, with the reason."""
    return _reasons(translate(program))


def _reasons(translation: Translation) -> dict[torch.fx.Node, str]:
    reasons = dict(translation.refused)
    for node, index in translation.nodes.items():
        reason = check_node(translation.graph, translation.graph.nodes[index])
        if reason is not None:
            reasons[node] = reason
    return reasons


class _Support(OperatorSupportBase):
    def __init__(self, reasons: dict[torch.fx.Node, str]) -> None:
        self.reasons = reasons

    def is_node_supported(self, submodules: object, node: torch.fx.Node) -> bool:
        return node.op == "call_function" and node not in self.reasons


def propose(program: ExportedProgram, reasons: dict[torch.fx.Node, str]) -> list[Partition]:
    """Partitions that give tensors, with mutable state either inside one of them or outside all.

    ExecuTorch cannot split a buffer's update from the readers of its new value: such a writer is refused (added to
    `reasons`) and the partitions are proposed again. So are nodes that need a symbol which the whole program's inputs
    give, but not those of their own partition.
    """
    while True:
        found = CapabilityBasedPartitioner(
            program.graph_module, _Support(reasons), allows_single_node_partition=True
        ).propose_partitions()
        found = [p for p in found if _gives_tensor(p)]
        where = {node: number for number, p in enumerate(found) for node in p.nodes}
        refused = _split_state(program, where)
        if not refused:
            for part in found:
                alone = _refused_alone(program, part)
                refused.update({node: reason for node, reason in alone.items() if node not in reasons})
        if not refused:
            return found
        reasons.update(refused)


def _refused_alone(program: ExportedProgram, part: Partition) -> dict[torch.fx.Node, str]:
    """The nodes of a partition that cannot be delegated with only what crosses its border, with the reason."""
    translation = translate(program, part.nodes)
    refused = {}
    for node, reason in _reasons(translation).items():
        # an input that cannot be one is refused through its readers
        blamed = [node] if node in part.nodes else [user for user in node.users if user in part.nodes]
        # an item is where its producer is
        blamed += [n.args[0] for n in blamed if op_name(n.target) == "getitem" and n.args[0] in part.nodes]
        refused.update(dict.fromkeys(blamed, reason))
    # what reads a refused node gets another input in the next proposal, and is judged then
    return {n: why for n, why in refused.items() if not any(source in refused for source in n.all_input_nodes)}


def _gives_tensor(part: Partition) -> bool:
    """Whether a tensor leaves a partition. ExecuTorch cannot emit a delegate whose only results are integers."""
    inside = set(part.nodes)
    leaving = [n for n in inside if any(user not in inside for user in n.users)]
    return any(isinstance(n.meta.get("val"), torch.Tensor | tuple | list) for n in leaving)


_READ_OUTSIDE = (
    "it updates a buffer whose new value is read outside the delegate; the buffer must stay outside as a whole"
)
_IS_OUTPUT = (
    "it updates a buffer whose new value is also an output, which ExecuTorch cannot delegate; give the exported "
    "program to executorch_webgpu.partitioner.separate_outputs before to_edge, or lower with "
    "to_edge_transform_and_lower"
)


def _split_state(program: ExportedProgram, where: dict[torch.fx.Node, int]) -> dict[torch.fx.Node, str]:
    """Writers of buffers that cannot be inside as a whole, with the reason."""
    signature = program.graph_signature
    names = set(signature.buffers_to_mutate)
    user_outputs = {spec.arg.name for spec in signature.output_specs if spec.kind == OutputKind.USER_OUTPUT}
    split: dict[torch.fx.Node, str] = {}
    for node in program.graph.nodes:
        if node.name not in names or node.op == "placeholder":
            continue
        writer = node.args[0] if op_name(node.target) == "getitem" else node
        place = where.get(writer)
        if place is None:
            continue
        chain = [node, *(user for user in node.users if user.op != "output")]
        is_output = node.name in user_outputs
        if is_output or any(where.get(reader) != place for reader in chain):
            split[writer] = _IS_OUTPUT if is_output else _READ_OUTSIDE
    return split
