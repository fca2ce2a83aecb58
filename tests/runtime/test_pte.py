"""The torch-free `.pte` reader against files that executorch writes: records, data, sources, closing."""

import dataclasses
import gzip
import io
import mmap
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from executorch.exir import schema as et
from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary

from executorch_webgpu.runtime.errors import InputError, MissingDataError
from executorch_webgpu.runtime.files import pte
from tests.runtime.programs import BUILDERS

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


@pytest.mark.parametrize("name", BUILDERS)
def test_every_record_is_what_executorch_reads(programs, name):
    expected = deserialize_pte_binary(programs[name].read_bytes())
    with pte.Program(programs[name]) as program:
        assert program.version == expected.program.version
        assert program.method_names == tuple(plan.name for plan in expected.program.execution_plan)
        for found, wanted in zip(program.plans, expected.program.execution_plan, strict=True):
            wanted = _plain_plan(wanted, expected.program)
            for field in dataclasses.fields(pte.ExecutionPlan):
                assert getattr(found, field.name) == getattr(wanted, field.name), (found.name, field.name)


@pytest.mark.parametrize("name", BUILDERS)
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
        "import sys, executorch_webgpu.runtime.files.pte\n"
        "assert not {'torch', 'executorch'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
