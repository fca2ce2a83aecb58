"""The shipped model for ragged batches: equal to each prompt alone, and its weights are those of the other exports."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from executorch_webgpu.backend.preprocess import content_key
from executorch_webgpu.runtime import BatchGenerator, Request, Runtime
from tests.harness import device
from tests.llm.models import int32, padded

sys.path.insert(0, str(Path(__file__).parents[2]))
from examples.stories.export import main
from examples.stories.llama import LlamaConfig, load_model, load_settings
from examples.stories.ragged import RaggedLlama, export_ragged

BATCH, CAPACITY, NEW, FEW = 4, 160, 128, 24


def test_C15_batched_greedy_of_the_shipped_model() -> None:
    """Tokens of four prompts, from one program; eager PyTorch, one prompt at a time, gives the same."""
    model, settings = load_model(), load_settings()
    generator = torch.Generator().manual_seed(1)
    rows = [[settings["bos_id"], *torch.randint(300, 1000, (n,), generator=generator).tolist()] for n in (2, 9, 1, 5)]
    want = [model.generate(row, FEW, set()) for row in rows]
    pte = bytes(export_ragged(BATCH, capacity=CAPACITY, max_tokens=16).buffer)
    program = Runtime(device("full")).load_program(pte)
    assert program.constants["get_eos_ids"] == settings["stop_ids"]
    assert program.constants["get_bos_id"] == settings["bos_id"]
    method = program.load_method("forward")
    [delegate] = method.delegates
    keys = {value.data for value in delegate.graph.values if value.kind == "constant"}
    assert {content_key(p.detach()) for p in model.parameters()} <= keys
    lengths = [len(row) for row in rows]
    tokens, past, q_len = padded(rows, max(lengths)), int32([0] * BATCH), int32(lengths)
    made: list[np.ndarray] = []
    for _ in range(FEW):
        [logits] = method.execute([tokens, past, q_len])
        made.append(np.asarray(logits).argmax(-1))
        tokens, past, q_len = torch.from_numpy(made[-1])[:, None], past + q_len, int32([1] * BATCH)
    assert np.stack(made, 1).tolist() == want
    method.close()


def test_the_script_writes_a_ragged_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a random model of one layer, in float16."""
    from safetensors.torch import save_file

    config = LlamaConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, hidden_dim=32, vocab_size=300)
    from examples.stories.llama import Llama

    model = Llama(config, 64)
    save_file({name: p.detach().half() for name, p in model.named_parameters()}, tmp_path / "model.safetensors")
    config.save(tmp_path / "params.json")
    (tmp_path / "config.json").write_text('{"bos_id": 0, "eos_id": 1, "stop_ids": [1], "max_context": 24}')
    out = tmp_path / "out.pte"
    arguments = ["export", str(out), "--dtype", "fp16", "--model", str(tmp_path), "--batch", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    program = Runtime(device("full")).load_program(out)
    assert (program.constants["get_max_batch_size"], program.constants["get_max_context_len"]) == (2, 24)
    method = program.load_method("forward")
    inputs = torch.tensor([[5, 6, 7], [8, 0, 0]]), int32([0, 0]), int32([3, 1])
    [got] = method.execute(list(inputs))
    assert np.asarray(got).dtype == np.float16
    with torch.no_grad():
        want = RaggedLlama(load_model(tmp_path), 2, 24).eval()(*inputs).numpy()
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=3e-2)
    method.close()


def test_logits_are_last_or_all() -> None:
    model = load_model()
    with pytest.raises(ValueError, match="logits is 'some'; it must be 'last' or 'all'"):
        RaggedLlama(model, 2, 16, "some")
    every, last = (RaggedLlama(model, 2, 16, logits).eval() for logits in ("all", "last"))
    inputs = torch.tensor([[5, 6, 7], [8, 0, 0]]), int32([0, 0]), int32([3, 1])
    with torch.no_grad():
        a, b = every(*inputs), last(*inputs)
        torch.testing.assert_close(b, torch.stack([a[0, 2], a[1, 0]]))
        torch.testing.assert_close(b[:1], model(inputs[0][:1])[:, -1], atol=1e-4, rtol=1e-3)


def test_C15_sixteen_texts_of_the_shipped_model_in_any_order() -> None:
    """128 tokens of 16 unequal prompts that share 8 rows, each the token that a solo run of eager PyTorch chooses: one
    run of a whole text gives the logits of all its tokens. In another order the texts are the same."""
    model, settings = load_model(), load_settings()
    generator = torch.Generator().manual_seed(2)
    sizes = (2, 9, 1, 5, 12, 30, 3, 7, 20, 4, 6, 15, 8, 2, 40, 11)
    prompts = [[settings["bos_id"], *torch.randint(300, 1000, (n,), generator=generator).tolist()] for n in sizes]
    pte = bytes(export_ragged(8, capacity=max(sizes) + 1 + NEW, max_tokens=16).buffer)
    with Runtime(device("full")).load_program(pte) as program, BatchGenerator(program) as batch:
        assert batch.fallback is None
        found = batch.run([Request(prompt, NEW, ()) for prompt in prompts])
        order = torch.randperm(len(prompts), generator=generator).tolist()
        again = batch.run([Request(prompts[number], 24, ()) for number in order])
    for prompt, request in zip(prompts, found, strict=True):
        assert len(request.tokens) == NEW
        with torch.no_grad():
            chosen = model(torch.tensor([[*prompt, *request.tokens[:-1]]]))[0, len(prompt) - 1 :].argmax(-1)
        assert request.tokens == chosen.tolist()
    assert [request.tokens for request in again] == [found[number].tokens[:24] for number in order]
