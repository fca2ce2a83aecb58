"""An exported program (edge dialect, torch.fx) as records. With `symbols.py` the only place that knows torch.fx.

`translate(program)` is used twice: leniently by the partitioner, to ask every operator about every node of a whole
model, and strictly
by `preprocess`, on the subgraph that a delegate got.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._export.utils import get_buffer, get_lifted_tensor_constant, get_param
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from .graph import Arg, Dim, Graph, Node, Ref, Sym, Value, make_dim
from .symbols import Symbols, Unresolved

DTYPES = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip
_DROPPED_TYPES = (torch.layout, torch.device, torch.memory_format)
_DROPPED_NAMES = ("layout", "device", "pin_memory", "memory_format", "dim_order", "non_blocking")
_ALIASES_OF_INPUT = {
    f"aten.{name}"
    for name in (
        "select_copy.int", "select.int", "slice_copy.Tensor", "slice.Tensor", "view_copy.default", "view.default",
        "reshape.default",
        "unsqueeze_copy.default", "unsqueeze.default", "squeeze_copy.dims", "squeeze_copy.dim", "squeeze_copy.default",
        "squeeze.dims", "squeeze.dim", "squeeze.default", "alias_copy.default", "alias.default", "clone.default",
        "expand_copy.default", "expand.default", "_to_copy.default", "detach.default",
    )
} | {"dim_order_ops._to_dim_order_copy.default", "dim_order_ops._clone_dim_order.default"}  # fmt: skip
"""Operators through which an `item()` is followed back to an input."""

_SKIPPED = ("aten._assert_scalar", "aten.sym_constrain_range", "aten._assert_async", "aten._assert_tensor_metadata")
"""Assertions: torch derives some from its 0/1 specialisation (they refuse legal positions), so none is enforced;
operators check."""

MUTATED_RESULTS = {
    "llama.update_cache.default": ("cache",),
    "llama.update_cache_with_indices.default": ("cache",),
    "llama.sdpa_with_kv_cache.default": (None, "key_cache", "value_cache"),
    "executorch_webgpu.group_query_attention.default": (
        None,
        "key_cache",
        "value_cache",
        "key_scales",
        "value_scales",
    ),
}
"""In-place operators of the llama library and of this project: what the record's results are (None: the operator's own
result, a name: the new value of that argument). The [1]-shaped own result of `update_cache` carries nothing and has no
record."""


NARROWED = ("quantized_decomposed.choose_qparams_per_token_asymmetric.default",)
"""Operators whose float64 results are float32 in the record, since programs cast them at once: the operator refuses
other readers."""

_PART_OF_BASE = ("_storage_offset", "_slice_dim")
"""Endings of the arguments by which `auto_functionalized_v2` says that an operator writes to a view of a buffer."""


@dataclass
class Translation:
    """A graph with the fx nodes it came from.

    Attributes:
        graph: the records.
        nodes: fx node -> index of its record.
        refused: fx node -> why it has no record.
        side: fx nodes that need no record (integers, assertions, `getitem`).
        tensors: data key -> tensor, for constants and for mutable values that do not start as zeros.
        placeholders: value index -> fx placeholder.
    """

    graph: Graph
    nodes: dict[torch.fx.Node, int] = field(default_factory=dict)
    refused: dict[torch.fx.Node, str] = field(default_factory=dict)
    side: set[torch.fx.Node] = field(default_factory=set)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    placeholders: dict[int, torch.fx.Node] = field(default_factory=dict)


def overload_of(target: Any) -> torch._ops.OpOverload | None:
    """The ATen or custom operator of an fx target; edge dialect operators wrap one."""
    if isinstance(target, torch._ops.OpOverload):
        return target
    inner = getattr(target, "_op", None)  # EdgeOpOverload
    return inner if isinstance(inner, torch._ops.OpOverload) else None


def op_name(target: Any) -> str:
    """`aten.add.Tensor` for an ATen or edge operator, else a description."""
    overload = overload_of(target)
    if overload is not None:
        name = overload._schema.name.replace("::", ".")
        return f"{name}.{overload._overloadname}"
    return str(getattr(target, "__name__", target))


def stored_tensor(program: ExportedProgram, node: torch.fx.Node) -> torch.Tensor | None:
    """The parameter, buffer or lifted constant behind a placeholder, else None."""
    for get in (get_param, get_buffer, get_lifted_tensor_constant):
        found = get(program, node)
        if found is not None:
            # a lifted Python number is a fake tensor that knows its value
            constant = getattr(found, "constant", None) if isinstance(found, FakeTensor) else None
            return found.detach() if constant is None else constant
    return None


def translate(program: ExportedProgram, part: Collection[torch.fx.Node] | None = None) -> Translation:
    """Translate every node; what cannot be translated is listed in `refused` with the reason.

    Args:
        part: only these nodes, as if they were a delegate: what they read of the others are its inputs. The graph has
            no outputs then; what leaves the part is translated for its refusals, those of inputs among them.
    """
    return _Translator(program, part).run()


class _Translator:
    def __init__(self, program: ExportedProgram, part: Collection[torch.fx.Node] | None = None) -> None:
        self.program = program
        self.part = part
        self.values: list[Value] = []
        self.nodes: list[Node] = []
        self.inputs: list[int] = []
        self.symbols = Symbols()
        self.env: dict[torch.fx.Node, Ref | tuple[Ref | None, ...]] = {}
        self.literals: dict[torch.fx.Node, int | float | bool] = {}
        self.origin: dict[torch.fx.Node, int] = {}
        self.result = Translation(Graph((), (), (), ()))

    def run(self) -> Translation:
        self._placeholders()
        for node in self.program.graph.nodes:
            if self.part is not None and node not in self.part:
                continue
            if node.op == "call_function":
                try:
                    self._call(node)
                except Unresolved as error:
                    self._refuse(node, str(error))
            elif node.op == "get_attr":
                self.result.refused[node] = "a sub-module (control flow or another delegate)"
        outputs, mutations = self._outputs() if self.part is None else self._leaving(self.part)
        ranges = self.symbols.ranges(self.program.range_constraints)
        self.result.graph = Graph(tuple(self.values), tuple(self.nodes), tuple(self.inputs), outputs, mutations, ranges)
        return self.result

    def _refuse(self, node: torch.fx.Node, reason: str) -> None:
        """Record a refusal. What the node computes would reach a delegate as an input, so its readers are judged on
        their own."""
        self.result.refused[node] = reason
        value = node.meta.get("val")
        several = isinstance(value, tuple | list)
        outputs: list[Ref | None] = []
        for item in value if several else [value]:
            try:
                outputs.append(
                    self._add(self._tensor_value("temp", node.name, item)) if isinstance(item, torch.Tensor) else None
                )
            except Unresolved:
                outputs.append(None)
            if isinstance(item, torch.SymInt):
                self.symbols.define(item.node.expr, Sym("scalar", (len(self.inputs), len(self.result.refused))))
        if several:
            self.env[node] = tuple(outputs)
        elif outputs[0] is not None:
            self.env[node] = outputs[0]

    # -- values

    def _add(self, value: Value) -> Ref:
        self.values.append(value)
        return Ref(len(self.values) - 1)

    def _placeholders(self) -> None:
        signature = self.program.graph_signature
        mutated = set(signature.buffers_to_mutate.values())
        specs = {spec.arg.name: spec for spec in signature.input_specs}
        user: list[torch.fx.Node] = []
        for node in self.program.graph.nodes:
            if not self._is_input(node):
                continue
            spec = specs.get(node.name)
            if spec is None or spec.kind == InputKind.USER_INPUT:
                user.append(node)
                continue
            tensor = stored_tensor(self.program, node)
            if tensor is None:
                self.result.refused[node] = f"{spec.target or node.name} holds no tensor"
                continue
            kind = "mutable" if spec.target in mutated else "constant"
            self._stored(node, kind, str(spec.target), tensor)
        self.symbols.define_inputs(
            (position, node.meta["val"].shape)
            for position, node in enumerate(user)
            if isinstance(node.meta.get("val"), torch.Tensor)
        )
        for position, node in enumerate(user):
            self._user_input(position, node)

    def _is_input(self, node: torch.fx.Node) -> bool:
        """Whether a node is a placeholder of what is translated."""
        if self.part is None:
            return bool(node.op == "placeholder")
        return node not in self.part and any(user in self.part for user in node.users)

    def _stored(self, node: torch.fx.Node, kind: str, name: str, tensor: torch.Tensor) -> None:
        if tensor.dtype not in DTYPES:
            self.result.refused[node] = f"{name}: dtype {tensor.dtype} is not supported"
            return
        known = not isinstance(tensor, FakeTensor)  # contents are fake before the partition is final
        if kind == "constant" and tensor.dim() == 0 and known:
            self.literals[node] = tensor.item()
        data = None if kind == "mutable" and not (known and bool(tensor.any())) else node.name
        ref = self._add(Value(kind, DTYPES[tensor.dtype], tuple(tensor.shape), name, data))
        if data is not None and known:
            self.result.tensors[data] = tensor
        self.env[node] = ref
        self.result.placeholders[ref.value] = node

    def _user_input(self, position: int, node: torch.fx.Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            try:
                ref = self._add(self._tensor_value("input", node.name, value))
            except Unresolved as error:
                self.result.refused[node] = str(error)
                ref = self._add(Value("input", "f32", (), node.name))
            self.env[node] = ref
            self.origin[node] = position
        else:  # SymInt, int or None: keeps its place among the inputs
            ref = self._add(Value("symint", "i64", (), node.name))
            if isinstance(value, torch.SymInt):
                self.symbols.define(value.node.expr, Sym("scalar", (position, 0)))
        self.inputs.append(ref.value)
        self.result.placeholders[ref.value] = node

    def _tensor_value(self, kind: str, name: str, value: torch.Tensor) -> Value:
        if value.dtype not in DTYPES:
            raise Unresolved(f"{name}: dtype {value.dtype} is not supported")
        return Value(kind, DTYPES[value.dtype], tuple(self.symbols.of(s) for s in value.shape), name)

    # -- nodes

    def _call(self, node: torch.fx.Node) -> None:
        name = op_name(node.target)
        value = node.meta.get("val")
        if name == "aten._local_scalar_dense.default" or name == "aten.item.default":
            self._item(node)
        elif name == "getitem":
            self._getitem(node)
        elif name.startswith(_SKIPPED) or _is_symbolic(value):
            self.result.side.add(node)
        elif name == "auto_functionalized_v2":
            self._functionalized(node)
        elif overload_of(node.target) is not None:
            self._operator(node, name, value)
        else:
            self._refuse(node, f"{name} is not an operator that the delegate knows")

    def _item(self, node: torch.fx.Node) -> None:
        """An integer read from a tensor: known if the tensor is an input seen through selects, slices and reshapes."""
        self.result.side.add(node)
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt):
            if not isinstance(value, int):
                self.result.side.discard(node)
                raise Unresolved("item() of a float or bool tensor: only integers can be read by the host")
            return
        try:
            source, flat = self._element(node.args[0])
        except Unresolved as error:
            self.result.side.discard(node)
            raise Unresolved(f"{node.name}: {error}") from None
        self.symbols.define(value.node.expr, Sym("scalar", (self.origin[source], flat)))

    def _element(self, node: torch.fx.Node) -> tuple[torch.fx.Node, Dim]:
        """Follow the one element of a one-element tensor back to an input; returns (placeholder, flat element
        index)."""
        offset: Dim = 0
        while node not in self.origin:
            name = op_name(node.target) if node.op == "call_function" else node.op
            if name not in _ALIASES_OF_INPUT:
                raise Unresolved(
                    f"the integer comes from {name}, which the host does not compute; "
                    "positions must come from an input tensor"
                )
            source = node.args[0]
            if not isinstance(source, torch.fx.Node):
                raise Unresolved(f"{node.name} has no tensor argument")
            shape = source.meta["val"].shape
            if name.startswith(("aten.select", "aten.slice")):
                axis = int(node.args[1] if len(node.args) > 1 else 0) % max(len(shape), 1)
                if any(s != 1 for s in shape[:axis]) or (len(node.args) > 4 and node.args[4] != 1):
                    raise Unresolved("the integer comes from a strided part of a tensor")
                start = node.args[2] if len(node.args) > 2 else 0
                first = self._dim_of(0 if start is None else start)
                if isinstance(first, int) and first < 0:
                    first = make_dim("add", self.symbols.of(shape[axis]), first)
                stride: Dim = 1
                for size in shape[axis + 1 :]:
                    stride = make_dim("mul", stride, self.symbols.of(size))
                offset = make_dim("add", offset, make_dim("mul", first, stride))
            elif name.startswith("aten.expand") and any(s != 1 for s in shape):
                raise Unresolved("the integer comes from an expanded tensor")
            node = source
        return node, offset

    def _getitem(self, node: torch.fx.Node) -> None:
        source = self.env.get(node.args[0])
        if not isinstance(source, tuple):
            raise Unresolved("an item of something that is not delegated")
        ref = source[node.args[1]]
        if ref is None:
            if node.users:
                raise Unresolved("the operator's own result is a placeholder without meaning and must not be used")
        else:
            self.env[node] = ref
        self.result.side.add(node)

    def _functionalized(self, node: torch.fx.Node) -> None:
        """`auto_functionalized_v2(op, ..., _x_base_index, _all_bases)` as a record of `op` whose results are the new
        values."""
        target = node.args[0]
        name = op_name(target)
        if name not in MUTATED_RESULTS:
            raise Unresolved(f"in-place operator {name} has no WebGPU kernel")
        bases = node.kwargs["_all_bases"]
        if any(key.startswith("_") and key.endswith(_PART_OF_BASE) for key in node.kwargs):
            raise Unresolved(f"{name} writes to a part of a buffer; give each cache a buffer of its own")
        args: dict[str, Any] = {}
        for argument in target._schema.arguments:
            base = node.kwargs.get(f"_{argument.name}_base_index")
            args[argument.name] = (
                bases[base] if base is not None else node.kwargs.get(argument.name, argument.default_value)
            )
        arg_values = node.meta["val"]
        mutated = [a.name for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        own = len(arg_values) - len(bases)
        outputs, results = [], [None] * own
        converted = self._args(args)
        given = [r for r in MUTATED_RESULTS[name] if r is None or converted.get(r) is not None]
        for result in given:
            if result is None:
                outputs.append(self._add(self._tensor_value("temp", node.name, arg_values[0])))
                results[0] = outputs[-1]  # type: ignore[call-overload]
            else:
                base_value = self.values[converted[result].value]  # type: ignore[union-attr]
                outputs.append(self._add(Value("temp", base_value.dtype, base_value.shape, f"{node.name}.{result}")))
        by_name = dict(
            zip(
                [r for r in given if r],
                [o for o, r in zip(outputs, given, strict=True) if r],
                strict=True,
            )
        )
        mutated = [n for n in mutated if node.kwargs.get(f"_{n}_base_index") is not None]
        order = sorted(mutated, key=lambda n: node.kwargs[f"_{n}_base_index"])
        self._finish(node, Node(name, converted, tuple(o.value for o in outputs), node.name))
        self.env[node] = (*results, *(by_name[n] for n in order))

    def _operator(self, node: torch.fx.Node, name: str, value: Any) -> None:
        overload = overload_of(node.target)
        assert overload is not None
        schema = overload._schema
        given: dict[str, Any] = {}
        for position, argument in enumerate(schema.arguments):
            if position < len(node.args) and not argument.kwarg_only:
                given[argument.name] = node.args[position]
            elif argument.name in node.kwargs:
                given[argument.name] = node.kwargs[argument.name]
            else:
                given[argument.name] = argument.default_value
        args = self._args(given)
        several = isinstance(value, tuple | list)
        values = list(value) if several else [value]
        if not all(isinstance(v, torch.Tensor) for v in values):
            raise Unresolved(f"a result of type {type(value).__name__}")
        outputs = [self._tensor_value("temp", node.name, v) for v in values]
        if name in NARROWED:
            outputs = [replace(o, dtype="f32") if o.dtype == "f64" else o for o in outputs]
        placed = tuple(self._add(o) for o in outputs)
        self._finish(node, Node(name, args, tuple(r.value for r in placed), node.name))
        self.env[node] = placed if several else placed[0]

    def _finish(self, fx_node: torch.fx.Node, node: Node) -> None:
        self.result.nodes[fx_node] = len(self.nodes)
        self.nodes.append(node)

    # -- arguments

    def _args(self, given: Mapping[str, Any]) -> dict[str, Arg]:
        return {
            name: self._literal_or(name, value)
            for name, value in given.items()
            if name not in _DROPPED_NAMES and not isinstance(value, _DROPPED_TYPES)
        }

    def _literal_or(self, name: str, value: Any) -> Arg:
        """A zero-dimensional constant as second operand is a number of the kernel, not a buffer (exports lift every
        `eps` so)."""
        if name == "other" and isinstance(value, torch.fx.Node) and value in self.literals:
            return self.literals[value]
        return self._arg(value)

    def _arg(self, value: Any) -> Arg:
        if isinstance(value, torch.fx.Node):
            if _is_symbolic(value.meta.get("val")):
                return self._dim_of(value)
            ref = self.env.get(value)
            if not isinstance(ref, Ref):
                raise Unresolved(f"its input {value.name} has no tensor that the delegate could take")
            return ref
        if isinstance(value, torch.SymInt):
            return self.symbols.of(value)
        if isinstance(value, torch.dtype):
            if value not in DTYPES:
                raise Unresolved(f"dtype {value} is not supported")
            return DTYPES[value]
        if isinstance(value, list | tuple):
            return tuple(self._arg(item) for item in value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise Unresolved(f"an argument of type {type(value).__name__}")

    def _dim_of(self, value: Any) -> Dim:
        """The `Dim` of an int or of an fx node that gives one."""
        if isinstance(value, torch.fx.Node):
            value = value.meta["val"]
        if isinstance(value, torch.SymBool | torch.SymFloat) or not isinstance(value, int | torch.SymInt):
            raise Unresolved(f"a symbolic {type(value).__name__} argument")
        return self.symbols.of(value)

    # -- results

    def _outputs(self) -> tuple[tuple[Ref | int | Sym, ...], tuple[tuple[int, int], ...]]:
        signature = self.program.graph_signature
        buffers = {target: name for name, target in signature.inputs_to_buffers.items()}
        by_name = {node.name: node for node in self.program.graph.nodes}
        outputs: list[Ref | int | Sym] = []
        mutations = []
        output_node = next(n for n in self.program.graph.nodes if n.op == "output")
        for spec, result in zip(signature.output_specs, output_node.args[0], strict=True):
            found = self._output(result)
            if spec.kind == OutputKind.BUFFER_MUTATION:
                target = self.env.get(by_name[buffers[spec.target]])
                if isinstance(target, Ref) and isinstance(found, Ref):
                    mutations.append((target.value, found.value))
            else:
                outputs.append(0 if found is None else found)
        return tuple(outputs), tuple(mutations)

    def _leaving(self, part: Collection[torch.fx.Node]) -> tuple[tuple[()], tuple[()]]:
        """Look whether what others read of a part can be its outputs."""
        for node in part:
            value = node.meta.get("val")
            is_output = any(user not in part for user in node.users)
            if is_output and (isinstance(value, torch.Tensor) or _is_symbolic(value)):
                self._output(node)
        return (), ()

    def _output(self, result: Any) -> Ref | int | Sym | None:
        if isinstance(result, torch.fx.Node):
            try:
                arg = self._arg(result)
            except Unresolved as error:
                self.result.refused.setdefault(result, str(error))
                return None
            return arg if isinstance(arg, Ref | int | Sym) else None
        return result if isinstance(result, int) else None


def _is_symbolic(value: Any) -> bool:
    return isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat | int | float | bool)
