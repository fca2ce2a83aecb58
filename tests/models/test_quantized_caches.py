"""A tiny Llama of ExecuTorch's exporter with `quantize_kv_cache`: int8 rows with scales and zero points, six cache
writes a layer; and Hugging Face models for ragged batches with packed caches."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.exir import to_edge, to_edge_transform_and_lower
from safetensors.numpy import load_file

from executorch_webgpu.llm.ragged import export_ragged, make_ragged
from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import Generator, Method, Runtime
from tests.harness import device
from tests.llm.models import int32, padded, prompts, tiny
from tests.models import et_llama
from tests.models.config import Config

CONFIG = Config("et_llama3_2_quantized_cache", "llama3_2", "et_llama", "fp32", "dynamic", "custom")


@pytest.mark.parametrize("route", ["A", "B"])
def test_a_quantised_cache_is_one_delegate(route: str, tmp_path: Path) -> None:
    """Prompt, tokens and another prompt against the eager module, whose attention dequantises the same way."""
    from executorch.examples.models.llama.export_llama_lib import _prepare_for_llama_export
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        config = et_llama._llm_config(CONFIG, Path(folder))
        config.model.quantize_kv_cache = True
        manager = _prepare_for_llama_export(config)
    eager = copy.deepcopy(manager.model.eval())
    manager = manager.export()
    manager.run_canonical_optimizations()
    exported = manager._export(manager.pre_autograd_graph_module)
    assert sum("custom_quantized_sdpa" in str(node.target) for node in exported.graph.nodes) == 2
    settings = manager._get_edge_config()
    if route == "A":
        edge = to_edge(exported, compile_config=settings).to_backend(WebGPUPartitioner())
    else:
        edge = to_edge_transform_and_lower(exported, partitioner=[WebGPUPartitioner()], compile_config=settings)
    program = Runtime(device("full")).load_program(bytes(edge.to_executorch().buffer))
    method = program.load_method("forward")
    assert len(method.delegates) == 1
    assert method.outside() == []
    generator, position = torch.Generator().manual_seed(0), 0
    for rows in (7, 1, 1, 4):
        poison(method, position)
        tokens = torch.randint(0, et_llama.VOCAB, (1, rows), generator=generator)
        with torch.no_grad():
            want = eager(tokens, {"input_pos": torch.tensor([position])}).numpy()
        [got] = method.execute([tokens, torch.tensor([position])])
        # one code that rounds the other way moves a logit by some 1e-3
        np.testing.assert_allclose(got.numpy(), want, atol=5e-3)
        assert np.sqrt(np.mean((got.numpy() - want) ** 2)) < 1e-3
        position += rows
    # a byte an element, a scale and a zero point for each token and head; heads of 32 elements
    sizes = {name: (buffer.size, method.state.values()[name].shape) for name, buffer in method.state.buffers().items()}
    assert sorted(sizes.values()) == 4 * [(128 * 2 * 8, (1, 128, 2, 2))] + 4 * [(128 * 2 * 32, (1, 128, 2, 8))]
    other = program.load_method("forward")
    check_session(method, other, tmp_path / "session")
    other.close()
    method.close()


def poison(method: Method, length: int) -> None:
    """Rubbish in all cache rows from `length` on: codes of -1, scales and zero points that are NaN."""
    for name, buffer in method.state.buffers().items():
        shape = [int(str(size)) for size in method.state.values()[name].shape]
        rows = np.frombuffer(method.device.gpu.queue.read_buffer(buffer), np.uint32).reshape(shape).copy()
        rows[:, length:] = 0x7FC00000 if "scales" in name else 0xFFFFFFFF
        method.device.write(buffer, rows)


def check_session(method: Method, other: Method, path: Path) -> None:
    """Rewinding, a fork, and a file that another method loads go on as a fresh run does."""
    method.reset()
    with Generator(method) as made, Generator(other) as second:
        assert made.fallback is None  # tokens are chosen on the GPU
        expected = made.generate([5, 6, 7], 8, ()).tokens
        made.rewind_to(6)
        poison(method, 6)
        assert made.generate((), 5, ()).tokens == expected[3:]
        made.rewind_to(5)
        made.save(path)
        # a word is four codes
        caches = {array.shape for name, array in load_file(path).items() if name.startswith("state.")}
        assert caches == {(1, 5, 2, 8), (1, 5, 2, 2)}
        with made.fork() as twin:
            assert twin.generate((), 6, ()).tokens == expected[2:]
        second.load(path)
        assert second.generate((), 6, ()).tokens == expected[2:]


@pytest.mark.parametrize(("dtype", "error"), [(torch.int8, 0.02), (torch.uint8, 0.3)])
def test_a_ragged_decoder_with_packed_caches(dtype: torch.dtype, error: float) -> None:
    """One delegate; unequal prompts and four tokens equal the eager module's, and come near those of float caches."""
    model = tiny("qwen3", max_position_embeddings=160)
    decoder, floats = make_ragged(model, 3, 48, cache_dtype=dtype), make_ragged(model, 3, 48)
    made = export_ragged(model, 3, 48, max_tokens=16, cache_dtype=dtype)
    method = Runtime(device("full")).load_program(bytes(made.buffer)).load_method("forward")
    assert len(method.delegates) == 1
    assert method.outside() == []
    rows = prompts(9, 2, 14, seed=1)
    lengths = [len(row) for row in rows]
    tokens, past, q_len = padded(rows, max(lengths)), int32([0, 0, 0]), int32(lengths)
    for _ in range(5):
        [got] = method.execute([tokens, past, q_len])
        with torch.no_grad():
            want, exact = decoder(tokens, past, q_len), floats(tokens, past, q_len)
        np.testing.assert_allclose(got.numpy(), want.numpy(), atol=2e-3 if dtype == torch.int8 else 2e-2)
        assert float((got - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < error
        past, q_len, tokens = past + q_len, int32([1, 1, 1]), exact.argmax(-1, keepdim=True)
    method.close()


def test_a_head_size_that_has_no_transform() -> None:
    """Heads of 4 elements: the operator's own reason, before anything is exported."""
    model = tiny("qwen3", max_position_embeddings=160, head_dim=4)
    with pytest.raises(ValueError, match="the Hadamard transform needs a power of two from 8 to 256"):
        make_ragged(model, 2, 16, cache_dtype=torch.uint8)
