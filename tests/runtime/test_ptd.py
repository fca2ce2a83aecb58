"""The torch-free `.ptd` reader: external weights of a program, their types and layouts."""

import dataclasses

import numpy as np
import pytest

from executorch_webgpu.runtime.errors import InputError, MissingDataError, ProgramFormatError
from executorch_webgpu.runtime.files import pte


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
