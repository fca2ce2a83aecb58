"""The torch-free `.pte` and `.ptd` reader against files that executorch writes, and against damaged files."""

import dataclasses
import gzip
import io
import mmap
import random
import struct
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge, to_edge_transform_and_lower
from executorch.exir import schema as et
from executorch.exir._serialize._flatbuffer_program import _program_to_flatbuffer
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary
from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.backend.utils import tag_constant_data
from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass

from executorch_webgpu.runtime import pte
from executorch_webgpu.runtime.errors import InputError, MissingDataError, ProgramFormatError, WebGPUDelegateError
from executorch_webgpu.runtime.flatfile import FlatBuffer

_HEADER_END = 40

# ---- programs ----


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


_BUILDERS = {
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


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Paths of all test programs by name; external weights lie next to external.pte."""
    folder = tmp_path_factory.mktemp("programs")
    return {name: build(folder) for name, build in _BUILDERS.items()}


@pytest.fixture(scope="session")
def ptd_path(programs):
    (path,) = programs["external"].parent.glob("*.ptd")
    return path


# ---- comparison with executorch's own reader ----


def _plain(value):
    """executorch's value record as ours."""
    name = type(value).__name__
    if name == "Tensor":
        return _plain_tensor(value)
    if name == "Null":
        return None
    if name == "Double":
        return float(value.double_val)
    if name.endswith("List"):
        return getattr(pte, name)(tuple(value.items))
    return getattr(value, f"{name.lower()}_val")


def _plain_tensor(t):
    extra = t.extra_tensor_info or et.ExtraTensorInfo()
    info = t.allocation_info
    return pte.TensorMeta(
        scalar_type=pte.ScalarType(int(t.scalar_type)),
        sizes=tuple(t.sizes),
        dim_order=tuple(t.dim_order),
        shape_dynamism=pte.ShapeDynamism(int(t.shape_dynamism)),
        data_buffer_idx=t.data_buffer_idx,
        allocation=pte.Allocation(info.memory_id, info.memory_offset) if info else None,
        location=pte.TensorLocation(int(extra.location)),
        fully_qualified_name=extra.fully_qualified_name,
        mutable_data_segments_idx=extra.mutable_data_segments_idx,
        storage_offset=t.storage_offset,
        requires_grad=t.requires_grad,
        layout=t.layout,
        device_type=int(extra.device_type),
        device_index=extra.device_index,
    )


def _plain_instruction(instruction):
    record = instruction.instr_args
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(record).items()}
    return getattr(pte, type(record).__name__)(**fields)


def _plain_plan(plan, program):
    return pte.ExecutionPlan(
        name=plan.name,
        values=tuple(_plain(v.val) for v in plan.values),
        inputs=tuple(plan.inputs),
        outputs=tuple(plan.outputs),
        chains=tuple(
            pte.Chain(tuple(c.inputs or ()), tuple(c.outputs or ()), tuple(map(_plain_instruction, c.instructions)))
            for c in plan.chains
        ),
        operators=tuple(pte.Operator(o.name, o.overload) for o in plan.operators),
        delegates=tuple(
            pte.Delegate(
                d.id,
                memoryview(program.backend_delegate_data[d.processed.index].data),
                {s.key: bytes(s.value) for s in d.compile_specs},
            )
            for d in plan.delegates
        ),
        non_const_buffer_sizes=tuple(plan.non_const_buffer_sizes),
        non_const_buffer_devices=(),
        input_spec=plan.container_meta_type.encoded_inp_str,
        output_spec=plan.container_meta_type.encoded_out_str,
    )


def _stored_by_executorch(file: PTEFile, tensor):
    buffers = file.program.constant_buffer if tensor.allocation is None else file.mutable_data
    return bytes(buffers[tensor.data_buffer_idx].storage)[: tensor.nbytes]


@pytest.mark.parametrize("name", _BUILDERS)
def test_every_record_is_what_executorch_reads(programs, name):
    expected = deserialize_pte_binary(programs[name].read_bytes())
    with pte.Program(programs[name]) as program:
        assert program.version == expected.program.version
        assert program.method_names == tuple(plan.name for plan in expected.program.execution_plan)
        for found, wanted in zip(program.plans, expected.program.execution_plan, strict=True):
            wanted = _plain_plan(wanted, expected.program)
            for field in dataclasses.fields(pte.ExecutionPlan):
                assert getattr(found, field.name) == getattr(wanted, field.name), (found.name, field.name)


@pytest.mark.parametrize("name", _BUILDERS)
def test_every_stored_tensor_and_named_datum_has_the_bytes_executorch_reads(programs, name):
    expected = deserialize_pte_binary(programs[name].read_bytes())
    program = pte.Program(programs[name])
    for plan in program.plans:
        for tensor in plan.values:
            if isinstance(tensor, pte.TensorMeta) and not tensor.is_external:
                data = program.tensor_data(tensor)
                assert (data is None) == (tensor.data_buffer_idx == 0)
                assert data is None or data == _stored_by_executorch(expected, tensor)
    named = expected.named_data.pte_data if expected.named_data else {}
    assert set(program.keys()) == set(named)
    for key, entry in named.items():
        assert program.named_data(key) == expected.named_data.buffers[entry.buffer_index]


def test_the_programs_cover_the_format(programs):
    """Guards the comparisons above: each kind of record does occur in some program."""
    plans = [plan for path in programs.values() for plan in pte.Program(path).plans]
    kinds = {type(value) for plan in plans for value in plan.values}
    lists = {pte.IntList, pte.DoubleList, pte.BoolList, pte.TensorList, pte.OptionalTensorList}
    assert kinds == {type(None), int, bool, float, str, pte.TensorMeta} | lists
    steps = {type(step) for plan in plans for chain in plan.chains for step in chain.instructions}
    assert steps == {pte.KernelCall, pte.DelegateCall, pte.MoveCall, pte.JumpFalseCall, pte.FreeCall}
    tensors = [value for plan in plans for value in plan.values if isinstance(value, pte.TensorMeta)]
    assert {t.shape_dynamism for t in tensors} >= {pte.ShapeDynamism.STATIC, pte.ShapeDynamism.DYNAMIC_BOUND}
    assert any(t.is_constant for t in tensors)
    assert any(t.is_external for t in tensors)
    assert any(t.allocation and t.data_buffer_idx for t in tensors)
    assert any(t.scalar_type.name == "LONG" for t in tensors)


# ---- meaning ----


def test_program_without_header_has_its_data_inline(programs):
    assert programs["handmade"].read_bytes()[8:12] != b"eh00"
    program = pte.Program(programs["handmade"])
    constant = program.plan().values[4]
    assert np.frombuffer(program.constant_data(constant), "<i4").tolist() == [7, 8]
    assert program.segments == ()
    planned = program.plan().values[11]
    assert (planned.allocation, planned.device_type, planned.device_index) == (pte.Allocation(1, 8), 1, 1)
    assert not planned.is_contiguous
    assert program.plan().operators[0].full_name == "aten::add.out"


def test_constant_methods_are_readable_without_running(programs):
    program = pte.Program(programs["methods"])
    values = {plan.name: plan.output_values for plan in program.plans if plan.is_constant}
    tensor = values.pop("vector")[0]
    flags = values.pop("flags")
    assert flags == (True, False)
    assert values == {
        "get_len": (128,), "get_eos": (1, 2, 3), "use_kv": (True,), "scale": (0.5,), "name": ("tiny",),
        "minus": (-(2**40),), "infinite": (float("inf"),),
    }  # fmt: skip
    assert np.frombuffer(program.tensor_data(tensor), tensor.scalar_type.numpy_dtype).tolist() == [1.5, 2.5]


def test_mutable_tensor_with_initial_data(programs):
    program = pte.Program(programs["methods"])
    values = program.plan("decode").values
    (count,) = [v for v in values if isinstance(v, pte.TensorMeta) and v.allocation and v.data_buffer_idx]
    assert np.frombuffer(program.initial_data(count), "<f4").tolist() == [3.0, 5.0]
    with pytest.raises(InputError, match="not a constant"):
        program.constant_data(count)


def test_dynamic_sizes_are_upper_bounds(programs):
    plan = pte.Program(programs["methods"]).plan("prefill")
    x = plan.values[plan.inputs[0]]
    assert (x.sizes, x.is_dynamic, x.is_contiguous, x.rank, x.nbytes) == ((9, 2), True, True, 2, 72)


@pytest.mark.parametrize("name", ["delegate", "inline"])
def test_delegate_with_named_data(programs, name):
    program = pte.Program(programs[name])
    (delegate,) = program.plan().delegates
    assert delegate.id == "ReaderTestBackend"
    assert bytes(delegate.processed) == b"blob of the backend"
    assert delegate.compile_specs == {"size": b"\x04\x00", "empty": b""}
    assert program.named_data("weight.b") == bytes(range(200))
    assert "weight.c" in program
    assert "weight.d" not in program
    with pytest.raises(MissingDataError, match=r"no data named 'weight.d'.*3 keys: 'weight.a'"):
        program.named_data("weight.d")


def test_unknown_method_lists_the_methods(programs):
    with pytest.raises(InputError, match=r"no method 'forward'; the program has decode, "):
        pte.Program(programs["methods"]).plan()


def test_scalar_types():
    assert pte.ScalarType.BFLOAT16.numpy_dtype is None
    assert pte.ScalarType.BFLOAT16.itemsize == 2
    assert pte.ScalarType.FLOAT8E5M2.itemsize == 1
    for scalar_type in pte.ScalarType:
        dtype = scalar_type.numpy_dtype
        assert dtype is None or dtype.itemsize == scalar_type.itemsize


# ---- external weights ----


def test_external_weights(programs, ptd_path):
    data_file = pte.DataFile(ptd_path)
    program = pte.Program(programs["external"])
    external = [v for v in program.plan().values if isinstance(v, pte.TensorMeta) and v.is_external]
    assert {t.fully_qualified_name for t in external} == set(data_file.keys())
    for tensor in external:
        key = tensor.fully_qualified_name
        assert data_file.layout(key) == pte.TensorLayout(tensor.scalar_type, tensor.sizes, tensor.dim_order)
        assert program.tensor_data(tensor, [data_file]) == data_file.named_data(key)
        assert data_file.array(key).tobytes() == bytes(data_file.named_data(key))
    with pytest.raises(MissingDataError, match=r"no data named .*external\.pte; pass the \.ptd"):
        program.tensor_data(external[0])


def test_external_weights_of_another_export(programs, ptd_path):
    program = pte.Program(programs["external"])
    tensor = next(v for v in program.plan().values if isinstance(v, pte.TensorMeta) and v.is_external)
    other = dataclasses.replace(tensor, sizes=(99,), dim_order=(0,))
    with pytest.raises(ProgramFormatError, match=r"expects .* \[99\]; use the \.ptd written by the same export"):
        program.tensor_data(other, [pte.DataFile(ptd_path)])


def test_data_file_array_follows_dim_order(tmp_path):
    from executorch.exir._serialize.data_serializer import DataEntry, DataPayload
    from executorch.exir.scalar_type import ScalarType
    from executorch.exir.tensor_layout import TensorLayout
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    stored = np.arange(6, dtype="<i4").reshape(3, 2)
    layouts = {
        "t": TensorLayout(ScalarType.INT, [2, 3], [1, 0]),
        "h": TensorLayout(ScalarType.BFLOAT16, [12], [0]),
        "raw": None,
    }
    entries = {key: DataEntry(0, 16, layout) for key, layout in layouts.items()}
    data_file = pte.DataFile(bytes(FlatTensorSerializer().serialize(DataPayload([stored.tobytes()], entries))))
    assert data_file.array("t").tolist() == stored.T.tolist()
    assert data_file.layout("raw") is None
    assert data_file.named_data("raw") == stored.tobytes()
    with pytest.raises(InputError, match="BFLOAT16"):
        data_file.array("h")
    with pytest.raises(InputError, match="opaque"):
        data_file.array("raw")
    with pytest.raises(MissingDataError):
        data_file.layout("absent")


# ---- sources, sharing, closing ----


def _all_bytes(file):
    return [bytes(file.segment(i)) for i in range(len(file.segments))]


def test_all_sources_read_the_same(programs, ptd_path):
    for reader, path in ((pte.Program, programs["methods"]), (pte.DataFile, ptd_path)):
        content = path.read_bytes()
        sources = [str(path), content, bytearray(content), memoryview(content), io.BytesIO(content)]
        packed = gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(content)))
        with path.open("rb") as buffered, path.open("rb", buffering=0) as raw, tempfile.NamedTemporaryFile() as named:
            named.write(content)
            files = [reader(source) for source in [path, *sources, buffered, raw, named, packed]]
        for file in files[1:]:
            assert _all_bytes(file) == _all_bytes(files[0])
            assert file.keys() == files[0].keys()
            if reader is pte.Program:
                assert file.plans == files[0].plans


def test_gzip_file_on_disk_is_not_mapped(programs, tmp_path):
    packed = tmp_path / "p.pte.gz"
    packed.write_bytes(gzip.compress(programs["bare"].read_bytes()))
    with gzip.open(packed) as file:
        assert pte.Program(file).plans == pte.Program(programs["bare"]).plans


@pytest.mark.parametrize("source", [io.StringIO("text"), 7, np.zeros((4, 4))[:, 1].data])
def test_wrong_kinds_of_source(source):
    with pytest.raises(InputError):
        pte.Program(source)


def test_missing_file_is_the_usual_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        pte.Program(tmp_path / "none.pte")


def test_views_share_memory_with_the_map(programs):
    program = pte.Program(programs["delegate"])
    (delegate,) = program.plan().delegates
    for view in (delegate.processed, program.named_data("weight.a"), program.segment(0)):
        assert isinstance(view.obj, mmap.mmap)
        assert view.readonly
    assert program.named_data("weight.a").obj is delegate.processed.obj
    first, second = (np.frombuffer(program.named_data(key), np.uint8) for key in ("weight.a", "weight.b"))
    assert np.shares_memory(first, second)


def test_views_share_memory_with_bytes(programs):
    content = bytearray(programs["delegate"].read_bytes())
    program = pte.Program(content)
    view = program.named_data("weight.c")
    content[content.index(b"third")] = ord("T")
    assert bytes(view) == b"Third"
    assert view.readonly


def test_close_tolerates_views(programs):
    with pte.Program(programs["delegate"]) as program:
        view = program.named_data("weight.c")
    program.close()
    assert program.closed
    assert bytes(view) == b"third"
    for use in (lambda: program.named_data("weight.a"), program.plan, lambda: program.segment(0)):
        with pytest.raises(InputError, match="program is closed"):
            use()


def test_close_unmaps_when_no_view_is_left(programs):
    program = pte.Program(programs["methods"])
    mapped = program._map
    assert program.plan("get_len").output_values == (128,)
    program.close()
    assert mapped.closed
    assert program.plan("get_len").output_values == (128,)  # what was parsed stays


def test_reader_imports_neither_torch_nor_executorch():
    code = (
        "import sys, executorch_webgpu.runtime.pte\n"
        "assert not {'torch', 'executorch'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- damaged files ----


def test_foreign_files(programs, ptd_path, tmp_path):
    with pytest.raises(ProgramFormatError, match=r"wrong file identifier b'FT01', expected b'ET12'.*data file, \.ptd"):
        pte.Program(ptd_path)
    with pytest.raises(ProgramFormatError, match=r"wrong file identifier b'ET12', expected b'FT01'.*program, \.pte"):
        pte.DataFile(programs["bare"])
    with pytest.raises(ProgramFormatError, match=r"is this a \.pte\?$"):
        pte.Program(b"PK\3\4" * 10)
    empty = tmp_path / "empty.pte"
    empty.touch()
    with pytest.raises(ProgramFormatError, match=r"empty\.pte: truncated: the file has 0 bytes"):
        pte.Program(empty)


def test_truncation_names_the_segment(programs):
    content = programs["delegate"].read_bytes()
    last = len(pte.Program(content).segments) - 1
    with pytest.raises(
        ProgramFormatError, match=rf"truncated: segment {last} ends at byte {len(content)} but the file"
    ):
        pte.Program(content[:-1])


def test_segments_need_the_header(programs):
    content = bytearray(programs["delegate"].read_bytes())
    content[8:12] = b"none"
    with pytest.raises(ProgramFormatError, match="segments but no b'eh00' header"):
        pte.Program(content)


def _use_everything(reader, content):
    """Reads all there is; True if nothing complained. Only errors of this package may come out."""
    try:
        with reader(content) as file:
            _ = list(map(file.named_data, file.keys()))
            for plan in file.plans if reader is pte.Program else ():
                for value in plan.values:
                    if isinstance(value, pte.TensorMeta) and not value.is_external:
                        file.tensor_data(value)
    except ProgramFormatError:
        return False
    return True


@pytest.mark.parametrize("name", _BUILDERS)
def test_every_truncation_is_reported(programs, name):
    content = programs[name].read_bytes()
    program = pte.Program(content)
    ends = {segment.offset + cut for segment in program.segments for cut in (0, 1, segment.size - 1)}
    ends |= set(range(min(len(content), 200))) | set(range(0, len(content), max(1, len(content) // 300)))
    for end in sorted(e for e in ends if 0 <= e < len(content)):
        # A program without segments has no record of its size, so cuts behind the last table may pass.
        assert not _use_everything(pte.Program, content[:end]) or not program.segments, end


def _damage(content, rng):
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 4])):
        at = rng.randrange(len(damaged) - 8)
        if rng.random() < 0.5:
            damaged[at] ^= 1 << rng.randrange(8)
        else:
            value = rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, len(content), at, rng.getrandbits(32)])
            damaged[at : at + 4] = struct.pack("<I", value)
    return bytes(damaged)


@pytest.mark.parametrize("name", _BUILDERS)
def test_flipped_bytes_never_escape(programs, name):
    content = programs[name].read_bytes()
    rng = random.Random(name)
    outcomes = [_use_everything(pte.Program, _damage(content, rng)) for _ in range(1500)]
    assert not all(outcomes)


def test_damaged_data_file(ptd_path):
    content = ptd_path.read_bytes()
    rng = random.Random(1)
    assert not all(_use_everything(pte.DataFile, _damage(content, rng)) for _ in range(1500))
    for end in range(0, len(content), 7):
        assert not _use_everything(pte.DataFile, content[:end])


def test_each_header_byte_changed(programs):
    content = bytearray(programs["delegate"].read_bytes())
    for at in range(_HEADER_END):
        for value in (0, 0x7F, 0xFF):
            damaged = bytearray(content)
            damaged[at] = value
            _use_everything(pte.Program, damaged)


def test_tables_shared_beyond_reason_are_refused():
    """Lists of lists that all lead to the same table would cost the product of their lengths."""
    count = 3000
    # root table at 8 with one field: a list whose items all refer to the leaf table at the end
    data = bytearray(struct.pack("<I4s", 16, b"ET12") + struct.pack("<HHHH", 6, 8, 4, 0))
    data += struct.pack("<iI", 8, 4) + struct.pack("<I", count)
    start = len(data)
    leaf = start + 4 * count
    data += b"".join(struct.pack("<I", leaf - (start + 4 * i)) for i in range(count))
    data += struct.pack("<iI", leaf - 8, 0)
    root = FlatBuffer(memoryview(data), len(data), "x").root()
    assert len(root.tables(0)) == count
    with pytest.raises(ProgramFormatError, match="refer to each other more often"):
        _ = [root.tables(0) for _ in range(50)]


def test_newer_schema_version_is_refused(programs):
    content = bytearray(programs["methods"].read_bytes())
    root = struct.unpack_from("<I", content)[0]
    vtable = root - struct.unpack_from("<i", content, root)[0]
    slot = struct.unpack_from("<H", content, vtable + 4)[0]
    if not slot:  # version 0 is the default and so not stored: point it at a nonzero field (the list of methods)
        struct.pack_into("<H", content, vtable + 4, struct.unpack_from("<H", content, vtable + 6)[0])
    else:
        struct.pack_into("<I", content, root + slot, 9)
    with pytest.raises(ProgramFormatError, match="newer than this reader knows"):
        pte.Program(content)


def test_every_error_is_a_delegate_error():
    assert issubclass(ProgramFormatError, WebGPUDelegateError)
    assert issubclass(MissingDataError, WebGPUDelegateError)
    assert issubclass(InputError, ValueError)
