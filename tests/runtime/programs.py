"""Programs for the tests of the `.pte` reader, written by executorch: every value, instruction and kind of data."""

import struct

import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge, to_edge_transform_and_lower
from executorch.exir import schema as et
from executorch.exir._serialize._flatbuffer_program import _program_to_flatbuffer
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.backend.utils import tag_constant_data
from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass


class ReaderTestBackend(BackendDetails):
    """Lowers anything to a fixed blob and three pieces of named data, two of which have the same bytes."""

    @staticmethod
    def preprocess(edge_program, compile_specs):
        store = NamedDataStore()
        store.add_named_data("weight.a", bytes(range(200)), 64)
        store.add_named_data("weight.b", bytes(range(200)), 64)
        store.add_named_data("weight.c", b"third", 16)
        return PreprocessResult(
            processed_bytes=b"blob of the backend", data_store_output=store.get_named_data_store_output()
        )


class _Partition(Partitioner):
    def partition(self, exported_program):
        spec = DelegationSpec("ReaderTestBackend", [CompileSpec("size", b"\x04\x00"), CompileSpec("empty", b"")])
        for node in exported_program.graph.nodes:
            if node.op == "call_function":
                node.meta["delegation_tag"] = "all"
        tag_constant_data(exported_program)
        return PartitionResult(exported_program, {"all": spec})


class _Net(torch.nn.Module):
    """Constants of two dtypes, a buffer with initial data, one without, lists, scalars, None arguments."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(6, 4)
        self.register_buffer("table", torch.arange(12).reshape(3, 4))
        self.register_buffer("count", torch.tensor([3.0, 5.0]))
        self.register_buffer("scratch", torch.zeros(4))

    def forward(self, x):
        self.count.add_(1)
        self.scratch.copy_(x[0, :4])
        y = self.linear(x)[:, None].expand(-1, 3, -1) + self.table
        parts = torch.split(y.sum(1).permute(1, 0), 2)
        return {"a": torch.cat([parts[1], parts[0]]), "b": self.count * 2.5 + self.scratch.mean()}


class _Dynamic(torch.nn.Module):
    def forward(self, x, y):
        return torch.cat([x.reshape(-1, 2), y.reshape(-1, 2)]) * x.shape[0]


class _Cond(torch.nn.Module):
    def forward(self, flag, x):
        return torch.cond(flag, lambda t: t + 1, lambda t: t * 2.0, (x,))


def _export(module, *args, shapes=None):
    return torch.export.export(module.eval(), args, dynamic_shapes=shapes, strict=True)


def _two_methods():
    n = torch.export.Dim("n", min=2, max=9)
    methods = {
        "decode": _export(_Net(), torch.randn(2, 6)),
        "prefill": _export(_Dynamic(), torch.randn(4, 2), torch.randn(2, 2), shapes=({0: n}, None)),
    }
    constants = {
        "get_len": 128, "get_eos": [1, 2, 3], "use_kv": True, "scale": 0.5, "name": "tiny", "minus": -(2**40),
        "vector": torch.tensor([1.5, 2.5]), "infinite": float("inf"), "flags": [True, False],
    }  # fmt: skip
    return to_edge(methods, constant_methods=constants, compile_config=EdgeCompileConfig(_check_ir_validity=False))


def _save(folder, name, edge, **config):
    config.setdefault("passes", [InitializedMutableBufferPass(["count"])])
    program = edge.to_executorch(ExecutorchBackendConfig(**config))
    path = folder / f"{name}.pte"
    path.write_bytes(program.buffer)
    program.write_tensor_data_to_file(str(folder))
    return path


def _lowered():
    return to_edge_transform_and_lower(_export(torch.nn.Linear(6, 4), torch.randn(2, 6)), partitioner=[_Partition()])


def _handmade(folder):
    """What the exporter emits rarely or no longer: every value and instruction, inline constants, no header."""
    constant = et.Tensor(et.ScalarType.INT, 0, [2], [0], True, 0, 1, None, et.TensorShapeDynamism.STATIC)
    extra = et.ExtraTensorInfo(0, "name", device_type=et.DeviceType.CUDA, device_index=1)
    planned = et.Tensor(
        et.ScalarType.FLOAT, 0, [1, 2], [1, 0], False, 0, 0, et.AllocationDetails(1, 8, 0),
        et.TensorShapeDynamism.DYNAMIC_UNBOUND, extra,
    )  # fmt: skip
    values = [
        et.Null(), et.Int(-5), et.Bool(True), et.Double(1.25), constant, et.String("grün"), et.IntList([1, 1]),
        et.DoubleList([0.5, -2.0]), et.BoolList([True, False]), et.TensorList([4, 9]), et.OptionalTensorList([4, -1]),
        planned, et.IntList([]),
    ]  # fmt: skip
    calls = [
        et.KernelCall(0, [1, 4]), et.DelegateCall(0, [4]), et.MoveCall(1, 2), et.JumpFalseCall(2, 5), et.FreeCall(4)
    ]  # fmt: skip
    reference = et.BackendDelegateDataReference(et.DataLocation.INLINE, 0)
    plan = et.ExecutionPlan(
        "forward", et.ContainerMetadata("in", "out"), [et.EValue(v) for v in values], [4], [6, 9],
        [et.Chain([4], [6], [et.Instruction(call) for call in calls], None)],
        [et.Operator("aten::add", "out")], [et.BackendDelegate("Any", reference, [])], [0, 16],
    )  # fmt: skip
    buffers = [et.Buffer(b""), et.Buffer(struct.pack("<2i", 7, 8))]
    blobs = [et.BackendDelegateInlineData(b"inline")]
    program = et.Program(0, [plan], buffers, blobs, [], et.SubsegmentOffsets(0, []))
    path = folder / "handmade.pte"
    path.write_bytes(_program_to_flatbuffer(program).data)
    return path


BUILDERS = {
    "handmade": _handmade,
    "methods": lambda folder: _save(folder, "methods", _two_methods()),
    "cond": lambda folder: _save(folder, "cond", to_edge(_export(_Cond(), torch.tensor(True), torch.randn(3)))),
    "delegate": lambda folder: _save(folder, "delegate", _lowered()),
    "inline": lambda folder: _save(folder, "inline", _lowered(), extract_delegate_segments=False),
    "external": lambda folder: _save(
        folder, "external", to_edge(_export(_Net(), torch.randn(2, 6))), external_constants=True
    ),
    "bare": lambda folder: _save(folder, "bare", to_edge(_export(_Dynamic(), torch.randn(4, 2), torch.randn(2, 2)))),
}
