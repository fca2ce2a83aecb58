"""`make_ragged`, eager: families, what is left of the original model, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from executorch_webgpu.llm.ragged import RaggedDecoder, export_ragged, lower_ragged, make_ragged
from tests.llm.models import int32, padded, prompts, tiny
from tests.models.hf import FAMILIES, VOCAB

REWRITTEN = (*FAMILIES, "cohere", "glm", "gpt2", "gpt_oss")
PROMPTS = prompts(21, 3, 12)


def logits_of(model: Any, row: list[int]) -> torch.Tensor:
    """The original's logits [S, V] of a sequence alone."""
    result: torch.Tensor = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
    return result


@pytest.mark.parametrize("family", REWRITTEN)
@torch.no_grad()
def test_families(family: str) -> None:
    """Unequal prompts in two parts, longer than the sliding windows: logits of every token as in a run alone."""
    model = tiny(family)
    decoder = make_ragged(model, 3, 48, logits="all")
    first, second = [row[:2] for row in PROMPTS], [row[2:] for row in PROMPTS]
    one = decoder(padded(first, 4, 7), int32([0, 0, 0]), int32([2, 2, 2]))
    two = decoder(padded(second, 20, 9), int32([2, 2, 2]), int32(map(len, second)))
    for row, prompt in enumerate(PROMPTS):
        want = logits_of(model, prompt)
        got = torch.cat([one[row, :2], two[row, : len(prompt) - 2]])
        torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-3)


@torch.no_grad()
def test_logits_of_the_last_token_and_rows_without_tokens() -> None:
    model = tiny("granite")
    every, last = (make_ragged(model, 3, 48, logits=logits) for logits in ("all", "last"))
    inputs = padded([PROMPTS[1], [], PROMPTS[2]], 12), int32([0, 0, 0]), int32([3, 0, 12])
    a, b = every(*inputs), last(*inputs)
    assert b.shape == (3, VOCAB)
    torch.testing.assert_close(b[0], a[0, 2])
    torch.testing.assert_close(b[2], a[2, 11])
    assert torch.isfinite(b).all()


@torch.no_grad()
def test_the_model_stays_as_it_was_and_shares_its_parameters() -> None:
    model = tiny("llama")
    before, state = logits_of(model, PROMPTS[1]), {name: id(p) for name, p in model.named_parameters()}
    decoder = make_ragged(model, 2, 32)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits_of(model, PROMPTS[1]), before)
    assert {id(p) for p in decoder.parameters()} == set(state.values())
    assert not any(buffer.any() for name, buffer in decoder.named_buffers() if "cache" in name)
    assert (decoder.batch, decoder.capacity, decoder.vocabulary, decoder.eos_ids) == (2, 32, VOCAB, (2,))


@pytest.mark.parametrize(
    ("dtype", "cache"), [(torch.float16, None), (torch.bfloat16, None), (torch.float32, torch.float16)]
)
@torch.no_grad()
def test_dtypes(dtype: torch.dtype, cache: torch.dtype | None) -> None:
    model = tiny("qwen3", dtype)
    decoder = make_ragged(model, 2, 32, cache_dtype=cache)
    assert decoder.get_buffer("key_cache_1").dtype == (cache or dtype)
    got = decoder(padded([PROMPTS[2], PROMPTS[1]], 12), int32([0, 0]), int32([12, 3]))
    want = torch.stack([logits_of(model, PROMPTS[2])[-1], logits_of(model, PROMPTS[1])[-1]])
    assert got.dtype == dtype
    error = (got.float() - want.float()).square().mean().sqrt() / want.float().square().mean().sqrt()
    assert error < {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float32: 2e-3}[dtype]


@torch.no_grad()
def test_bad_lengths_raise_and_leave_the_next_call_right() -> None:
    model = tiny("llama")
    decoder: RaggedDecoder = make_ragged(model, 2, 16)
    tokens = padded([PROMPTS[1], PROMPTS[1]], 3)
    with pytest.raises(ValueError, match=r"past 15 \+ q_len 3 of batch row 1 is above the 16 rows of the caches"):
        decoder(tokens, int32([0, 15]), int32([3, 3]))
    got = decoder(tokens, int32([0, 0]), int32([3, 3]))
    torch.testing.assert_close(got[1], logits_of(model, PROMPTS[1])[-1], atol=2e-4, rtol=2e-3)


_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
LONG: dict[str, Any] = {"rope_parameters": _ROPE, "original_max_position_embeddings": 32}
"""Rotary embeddings whose angles change for sequences of more than 32 tokens."""
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "convolutions": ("lfm2", {}, {}, NotImplementedError, "1 of its 2 layers have attention of a known kind"),
    "masks": ("opt", {}, {}, NotImplementedError, "a mask besides the causal one"),
    "rotation by another name": (
        "deepseek",
        {},
        {},
        NotImplementedError,
        "no layer hands them to a function apply_rot",
    ),
    "rotation of other arguments": ("gptj", {}, {}, NotImplementedError, r"it does not run \(TypeError.*'sin'"),
    "no attention": ("mamba", {}, {}, NotImplementedError, r"it does not run \(AttributeError"),
    "angles by length": ("phi3", LONG, {}, NotImplementedError, "Choose a smaller capacity"),
    "capacity": ("llama", {}, {"capacity": 129}, ValueError, "capacity 129 is above the model's 128 positions"),
    "logits": ("llama", {}, {"logits": "first"}, ValueError, "logits is 'first'; it must be 'last' or 'all'"),
    "batch": ("llama", {}, {"batch": 0}, ValueError, "batch is 0"),
    "half a batch row": ("llama", {}, {"batch": 1.5}, ValueError, "batch is 1.5; it must be a positive integer"),
    "a bool": ("llama", {}, {"batch": True}, ValueError, "batch is True"),
    "capacity as a float": ("llama", {}, {"capacity": 64.0}, ValueError, "capacity is 64.0; it must be a positive"),
    "no capacity": ("llama", {}, {"capacity": None}, ValueError, "capacity is None"),
    "a cache of long integers": (
        "llama",
        {},
        {"cache_dtype": torch.int64},
        ValueError,
        "cache_dtype is torch.int64; it",
    ),
    "a dtype as text": ("llama", {}, {"cache_dtype": "int8"}, ValueError, "cache_dtype is 'int8'; it must be one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    family, changes, arguments, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        make_ragged(tiny(family, **changes), **{"batch": 2, "capacity": 64, **arguments})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 1.5}, "batch is 1.5"),
        ({"max_tokens": 2.5}, r"max_tokens is 2.5; it must be an integer in \[1, 64\]"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"max_tokens": 65}, r"max_tokens is 65, outside \[1, 64\]"),
        ({"constant_methods": 5}, "constant_methods is 5; it must be a dict"),
        ({"constant_methods": {1: 2}}, "constant_methods is {1: 2}"),
        ({"partitioner": "webgpu"}, "partitioner is 'webgpu'; it must be a WebGPUPartitioner"),
        ({"model": None}, "expected a causal language model of transformers, got NoneType"),
        ({"model": torch.nn.Linear(1, 1)}, "expected a causal language model of transformers, got Linear"),
    ],
)
def test_arguments_of_the_export(wrong: dict[str, Any], message: str) -> None:
    given = {"model": tiny("llama"), "batch": 2, "capacity": 64, **wrong}
    with pytest.raises(ValueError, match=message):
        export_ragged(**given)


@torch.no_grad()
def test_softcaps_of_models_with_the_default_attention() -> None:
    """transformers' "sdpa" leaves out what the configuration asks for; the rewritten model does not."""
    changes = {"attn_logit_softcapping": 0.5}
    want = make_ragged(tiny("gemma2", **changes), np.int64(2), np.int32(32))
    model = tiny("gemma2", **changes)
    model.set_attn_implementation("sdpa")
    alone = model(input_ids=torch.tensor([PROMPTS[1]]), use_cache=False).logits[0, -1]
    decoder = make_ragged(model, 2, 32)
    assert model.config._attn_implementation == "sdpa"
    inputs = padded([PROMPTS[1], PROMPTS[1]], 4), int32([0, 0]), int32([3, 3])
    got = decoder(*inputs)
    torch.testing.assert_close(got, want(*inputs))
    assert not torch.allclose(got[0], alone, atol=2e-4, rtol=2e-3), "the softcap must matter here"


def test_long_rope_within_its_first_range() -> None:
    make_ragged(tiny("phi3", **LONG), 1, 32)


def test_the_check_finds_what_the_rewriting_cannot_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that scales by position behind the interface's back."""
    model = tiny("llama")
    inner = type(model.model.layers[0].self_attn.o_proj).forward

    def forward(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return inner(module, x) * (1 + x.shape[0])  # by batch rows: 1 alone, 3 in the decoder

    monkeypatch.setattr(
        model.model.layers[0].self_attn.o_proj, "forward", forward.__get__(model.model.layers[0].self_attn.o_proj)
    )
    with pytest.raises(NotImplementedError, match="after five tokens its logits are off by"):
        make_ragged(model, 3, 64)
    make_ragged(model, 3, 64, check=False)


@pytest.mark.parametrize("longest", [0, 65])
def test_most_tokens_a_call(longest: int) -> None:
    with pytest.raises(ValueError, match=rf"max_tokens is {longest}, outside \[1, 64\]"):
        lower_ragged(torch.nn.Linear(1, 1), 2, 64, VOCAB, max_tokens=longest)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("mixtral", r"torch\.export does not take this module \(Guard.*mixture of experts"),
        ("granite_moe", r"stay outside: .*aten\._local_scalar_dense"),
    ],
)
def test_what_cannot_be_lowered_whole_is_refused(family: str, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        export_ragged(tiny(family), 2, 32, max_tokens=4)
