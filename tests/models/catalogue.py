"""The catalogue of export configurations that the delegate must lower to exactly one delegate.

    python -m tests.models.catalogue --list [--core]
    python -m tests.models.catalogue --dump NAME [--route A|B|AB] [--json FILE]

Build one configuration per process: repeated exports in one interpreter slow down (leaked unbacked symbols).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterable
from typing import Any

import torch

from tests.models import bare, et_llama, hf
from tests.models.config import Built, Config

CONFIGS: tuple[Config, ...] = bare.CONFIGS + et_llama.CONFIGS + hf.CONFIGS

# What route B keeps from decomposition.
PRESERVED: tuple[str, ...] = (
    "linear.default",
    "silu.default",
    "gelu.default",
    "softmax.int",
    "scaled_dot_product_attention.default",
    "repeat_interleave.self_int",
    "rms_norm.default",
    "layer_norm.default",
    "embedding.default",
    "matmul.default",
)
_SIZES = ("view_copy", "expand_copy", "full.", "reshape", "repeat.", "zeros", "empty", "split_with_sizes")
_SHORT = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "float64": "f64",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
    "bool": "bool",
}
_INT64_MAX = 9223372036854775807


def find(name: str) -> Config:
    """The configuration called `name`."""
    for config in CONFIGS:
        if config.name == name:
            return config
    raise KeyError(f"no configuration {name!r}; `python -m tests.models.catalogue --list` names all")


def build(config: Config) -> Built:
    """Exports one configuration with references; best in a process of its own."""
    started = time.perf_counter()
    built = {"bare": bare, "et_llama": et_llama, "hf": hf}[config.source].build(config)
    built.seconds = time.perf_counter() - started
    return built


def lower_a(built: Built) -> torch.export.ExportedProgram:
    """The edge program of route A: to_edge, nothing preserved."""
    from executorch.exir import to_edge

    return to_edge(built.exported, **built.to_edge_kwargs()).exported_program()


def lower_b(built: Built) -> torch.export.ExportedProgram:
    """The edge program that a partitioner sees on route B, where it keeps PRESERVED from decomposition."""
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.backend.partitioner import Partitioner, PartitionResult

    keep = [getattr(getattr(torch.ops.aten, op), overload) for op, overload in (p.split(".") for p in PRESERVED)]
    seen: list[torch.export.ExportedProgram] = []

    class Recorder(Partitioner):
        """Preserves ops until it has seen the program, then takes nothing."""

        def partition(self, exported_program: torch.export.ExportedProgram) -> PartitionResult:
            seen.append(exported_program)
            return PartitionResult(tagged_exported_program=exported_program, partition_tags={})

        def ops_to_not_decompose(self, ep: torch.export.ExportedProgram) -> tuple[list[Any], None]:
            return ([] if seen else keep), None

    to_edge_transform_and_lower(built.exported, partitioner=[Recorder()], **built.edge_kwargs)
    return seen[0]


def _symbol(value: Any) -> str:
    """A SymInt with its symbols named by kind: s (input size), u (read from a tensor)."""
    expression = value.node.expr
    names = {symbol: type(symbol)(str(symbol)[0]) for symbol in expression.free_symbols}
    return f"Sym({expression.xreplace(names)})"


def _tensor(value: torch.Tensor, shape: bool) -> str:
    dtype = _SHORT.get(str(value.dtype).split(".")[-1], str(value.dtype))
    if not shape:
        return f"{dtype}/{value.dim()}"
    sizes = [_symbol(s)[4:-1] if isinstance(s, torch.SymInt) else str(s) for s in value.shape]
    return f"{dtype}[{','.join(sizes)}]"


class Inventory:
    """Op targets of an edge program with their argument patterns."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.ops: dict[str, dict[str, Any]] = {}
        self.program = program
        self.origin = self._origins()
        for node in program.graph.nodes:
            if node.op == "call_function":
                self._add(node)
        self.placeholders = [
            f"{self.origin[node.name][1]} {node.name}: {self._value(node, True)}"
            for node in program.graph.nodes
            if node.op == "placeholder"
        ]
        output = next(iter(reversed(program.graph.nodes)))
        kinds = [spec.kind.name for spec in program.graph_signature.output_specs]
        self.outputs = [f"{kind} {self._value(arg, True)}" for kind, arg in zip(kinds, output.args[0], strict=True)]

    def _origins(self) -> dict[str, tuple[str, str]]:
        """placeholder name -> (letter, description): P parameter, B buffer, M mutated buffer, C constant, I input."""
        signature = self.program.graph_signature
        mutated = set(signature.buffers_to_mutate.values())
        out = {}
        for spec in signature.input_specs:
            kind = spec.kind.name
            letter = {"PARAMETER": "P", "BUFFER": "B", "CONSTANT_TENSOR": "C", "USER_INPUT": "I"}.get(kind, "?")
            if letter == "B" and spec.target in mutated:
                letter = "M"
            if letter in "BC":
                value = self.program.state_dict.get(spec.target, self.program.constants.get(spec.target))
                if isinstance(value, torch.Tensor) and value.numel() == 1:
                    letter = f"C={value.item():.6g}"
            out[getattr(spec.arg, "name", "?")] = (letter, kind if spec.target is None else f"{kind} {spec.target}")
        return out

    def _value(self, arg: Any, shape: bool, sizes: bool = False) -> str:
        if isinstance(arg, torch.fx.Node):
            value = arg.meta.get("val")
            origin = self.origin.get(arg.name, ("", ""))[0]
            if isinstance(value, torch.Tensor):
                return f"{origin}:{_tensor(value, shape)}" if origin else _tensor(value, shape)
            if isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat):
                return _symbol(value)
            if isinstance(value, list | tuple):
                return f"({', '.join(_tensor(v, shape) if isinstance(v, torch.Tensor) else str(v) for v in value)})"
            return f"{type(value).__name__}({value})"
        if isinstance(arg, list | tuple):
            return "[" + ", ".join(self._value(a, shape, sizes) for a in arg) + "]"
        if isinstance(arg, dict):
            return "{" + ", ".join(f"{key}={self._value(a, shape, sizes)}" for key, a in arg.items()) + "}"
        if isinstance(arg, bool) or arg is None or isinstance(arg, str):
            return repr(arg)
        if isinstance(arg, int):
            if arg == _INT64_MAX:
                return "INT64_MAX"
            return "n" if sizes and not shape and arg > 1 else str(arg)
        if isinstance(arg, float):
            return f"{arg!r}"
        return str(arg)

    def _call(self, node: torch.fx.Node, shape: bool) -> str:
        sizes = any(part in str(node.target) for part in _SIZES)
        ends = "slice_copy" in str(node.target)
        values = node.args[:1] if "_assert_scalar" in str(node.target) else node.args
        args = [self._value(arg, shape, sizes or (ends and i in (2, 3))) for i, arg in enumerate(values)]
        args += [f"{key}={self._value(arg, shape, sizes)}" for key, arg in node.kwargs.items()]
        return f"({', '.join(args)}) -> {self._value(node, shape)}"

    def _add(self, node: torch.fx.Node) -> None:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            target = f"HOP {node.target.__name__} {node.args[0] if node.args else ''}".strip()
        elif isinstance(node.target, torch._ops.OpOverload):
            target = str(node.target)
        elif hasattr(node.target, "_op"):  # EdgeOpOverload
            target = str(node.target._op)
        else:
            target = f"{getattr(node.target, '__module__', '?').lstrip('_')}.{node.target.__name__}"
        record = self.ops.setdefault(target, {"count": 0, "patterns": {}})
        record["count"] += 1
        pattern = record["patterns"].setdefault(
            self._call(node, False), {"count": 0, "example": self._call(node, True)}
        )
        pattern["count"] += 1

    def as_dict(self) -> dict[str, Any]:
        return {"ops": self.ops, "placeholders": self.placeholders, "outputs": self.outputs}

    def lines(self) -> Iterable[str]:
        for target in sorted(self.ops):
            yield f"{target}  x{self.ops[target]['count']}"
            for pattern, record in sorted(self.ops[target]["patterns"].items()):
                yield f"    x{record['count']}  {pattern}    e.g. {record['example']}"
        yield "placeholders:"
        yield from (f"    {line}" for line in self.placeholders)
        yield "outputs:"
        yield from (f"    {line}" for line in self.outputs)


def dump(config: Config, routes: str = "AB") -> dict[str, Any]:
    """Builds `config` and takes the op inventory of the edge program of each route, each in a forked process.

    Lowering one exported program twice in a process fails in torch ("Pending unbacked symbols ... not in returned
    outputs"), and building it twice takes longer.
    """
    torch.set_num_threads(1)  # so that the process may be forked
    built = build(config)
    report: dict[str, Any] = {"name": config.name, "seconds": built.seconds, "routes": {}}
    for route in routes:
        receive, send = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=_lower, args=(built, route, send))
        child.start()
        send.close()
        try:
            report["routes"][route] = receive.recv()
        except EOFError:
            report["routes"][route] = {"error": "the process that lowered it died"}
        child.join()
    return report


def _lower(built: Built, route: str, send: Any) -> None:
    """Sends the inventory of one route, or the error of its lowering."""
    try:
        inventory = Inventory(lower_a(built) if route == "A" else lower_b(built))
        send.send({**inventory.as_dict(), "lines": list(inventory.lines())})
    except Exception as error:  # a route that fails is a finding, not the end of the dump
        send.send({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name every configuration")
    parser.add_argument("--core", action="store_true", help="with --list: only the core set")
    parser.add_argument("--dump", metavar="NAME", help="print the op inventory of one configuration")
    parser.add_argument("--route", default="AB", choices=("A", "B", "AB"))
    parser.add_argument("--json", metavar="FILE", help="with --dump: also write the report there")
    args = parser.parse_args()
    if args.list:
        for config in CONFIGS:
            if config.core or not args.core:
                print(f"{config.name:48} {'core' if config.core else ''}")
    if args.dump:
        report = dump(find(args.dump), args.route)
        print(f"{report['name']}: exported in {report['seconds']:.1f} s")
        for route, result in report["routes"].items():
            print(f"--- route {route}")
            print("\n".join(result.get("lines", [result.get("error", "")])))
        if args.json:
            with open(args.json, "w") as file:
                json.dump(report, file)


if __name__ == "__main__":
    main()
