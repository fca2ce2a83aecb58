"""Greedy decoding (K1): small Llama and GPT models in plain torch give the tokens and logits of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

from executorch_webgpu.backend.passes import OPTIONAL
from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import Generator, Program, Runtime
from tests.harness import DEVICES, device

F = torch.nn.functional
VOCAB, DIM, HEADS, HIDDEN, LAYERS = 101, 48, 4, 96, 2
HEAD = DIM // HEADS
CAPACITY, LONGEST, STEPS = 160, 16, 128
PROMPTS = ([3, 14, 15, 92, 65], [35, 89, 79, 32, 38, 46, 26])
FAMILIES = ("llama", "gpt")
KV_HEADS = {"llama": 2, "gpt": HEADS}
GAP = 1e-2
"""Least distance of the best two logits in the reference runs, far above the error allowed: ties decide nothing."""
WRITTEN = 512
"""Bytes that a decode step may write besides its inputs."""
INPUT_BYTES = 8
"""One token and one position, each 4 bytes on the device."""


class Attention(torch.nn.Module):
    """Caches [1, H, C, D] written by index, attention under a bool mask."""

    def __init__(self, kv_heads: int, bias: bool) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.q = torch.nn.Linear(DIM, DIM, bias=bias)
        self.k = torch.nn.Linear(DIM, kv_heads * HEAD, bias=bias)
        self.v = torch.nn.Linear(DIM, kv_heads * HEAD, bias=bias)
        self.out = torch.nn.Linear(DIM, DIM, bias=bias)
        self.register_buffer("k_cache", torch.zeros(1, kv_heads, CAPACITY, HEAD))
        self.register_buffer("v_cache", torch.zeros(1, kv_heads, CAPACITY, HEAD))

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [1, H, S, D] as attention sees it; Llama's turns it by its position."""
        return x

    def forward(self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        q = self.turn(self.q(x).view(1, length, HEADS, HEAD).transpose(1, 2), positions)
        k = self.turn(self.k(x).view(1, length, self.kv_heads, HEAD).transpose(1, 2), positions)
        v = self.v(x).view(1, length, self.kv_heads, HEAD).transpose(1, 2)
        self.k_cache[:, :, positions] = k
        self.v_cache[:, :, positions] = v
        group = HEADS // self.kv_heads
        keys, values = self.k_cache, self.v_cache
        if group > 1:
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(1, length, DIM))


class Rotary(Attention):
    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rates = 10000.0 ** (-torch.arange(0, HEAD, 2, dtype=torch.float32) / HEAD)
        angles = positions.float()[:, None] * rates[None]
        angles = torch.cat([angles, angles], -1)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class LlamaBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Rotary(KV_HEADS["llama"], bias=False)
        self.before, self.between = torch.nn.RMSNorm(DIM, eps=1e-5), torch.nn.RMSNorm(DIM, eps=1e-5)
        self.gate, self.up = (torch.nn.Linear(DIM, HIDDEN, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.before(x), positions, mask)
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class GPTBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(KV_HEADS["gpt"], bias=True)
        self.before, self.between = torch.nn.LayerNorm(DIM), torch.nn.LayerNorm(DIM)
        self.up, self.down = torch.nn.Linear(DIM, HIDDEN), torch.nn.Linear(HIDDEN, DIM)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.before(x), positions, mask)
        return x + self.down(F.gelu(self.up(self.between(x))))


class Decoder(torch.nn.Module):
    """(input_ids i64[1, S], cache_position i64[S]) -> logits f32[1, S, VOCAB]."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, DIM)
        self.positions = torch.nn.Embedding(CAPACITY, DIM) if family == "gpt" else None
        block = {"llama": LlamaBlock, "gpt": GPTBlock}[family]
        self.blocks = torch.nn.ModuleList(block() for _ in range(LAYERS))
        self.norm = torch.nn.RMSNorm(DIM, eps=1e-5) if family == "llama" else torch.nn.LayerNorm(DIM)
        self.head = torch.nn.Linear(DIM, VOCAB, bias=False)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.dim() == 2:
                    scale = 1.0 if "embedding" in name or "positions" in name else 2.0 * weight.shape[1] ** -0.5
                    weight.normal_(0, scale)
                else:
                    weight.add_(0.1 * torch.randn_like(weight))

    def forward(self, input_ids: torch.Tensor, cache_position: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(CAPACITY)[None, :] <= cache_position[:, None]
        x = self.embedding(input_ids)
        if self.positions is not None:
            x = x + self.positions(cache_position)
        for block in self.blocks:
            x = block(x, cache_position, mask)
        return self.head(self.norm(x))


def build(family: str) -> Decoder:
    torch.manual_seed({"llama": 17, "gpt": 39}[family])
    return Decoder(family).eval()


@cache
def reference(family: str, which: int) -> tuple[list[int], np.ndarray[Any, Any]]:
    """The greedy tokens of a prompt by eager PyTorch, and the logits [STEPS, VOCAB] that each was chosen from."""
    module, tokens, chosen = build(family), list(PROMPTS[which]), []
    position = 0
    with torch.no_grad():
        for _ in range(STEPS):
            new = tokens[position:]
            logits = module(torch.tensor([new]), torch.arange(position, len(tokens)))[0, -1]
            position = len(tokens)
            chosen.append(logits.numpy().copy())
            tokens.append(int(logits.argmax()))
    rows = np.stack(chosen)
    best = np.sort(rows, axis=1)[:, -2:]
    assert float((best[:, 1] - best[:, 0]).min()) > GAP
    assert len(set(tokens)) > 10
    return tokens[len(PROMPTS[which]) :], rows


@cache
def lowered(family: str, disabled: frozenset[str] = frozenset()) -> bytes:
    seq = torch.export.Dim("seq", min=1, max=LONGEST)
    with torch.no_grad():
        exported = torch.export.export(
            build(family),
            (torch.tensor([[1, 2, 3]]), torch.arange(3)),
            dynamic_shapes=({1: seq}, {0: seq}),
            strict=True,
        )
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[WebGPUPartitioner(disable_passes=disabled)],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods={"get_max_seq_len": CAPACITY},
    )
    return bytes(edge.to_executorch().buffer)


@pytest.fixture(params=DEVICES)
def on(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def program(family: str, on: str) -> Iterator[Program]:
    with Runtime(device(on)).load_program(lowered(family)) as loaded:
        yield loaded


def generator(program: Program) -> Generator:
    method = program.load_method("forward")
    assert len(method.delegates) == 1
    assert method.outside() == []
    return Generator(method, program)


def decode(made: Generator, prompt: Sequence[int], steps: int) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Greedy tokens and the logits that each was chosen from."""
    tokens: list[int] = []
    rows = []
    made.append_tokens(prompt)
    for _ in range(steps):
        assert made.logits is not None
        rows.append(made.logits)
        tokens.append(int(np.argmax(made.logits)))
        made.append_tokens(tokens[-1:])
    return tokens, np.stack(rows)


def assert_logits(got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-3)


def test_greedy_tokens_and_logits_are_those_of_pytorch(family: str, program: Program) -> None:
    expected, rows = reference(family, 0)
    tokens, got = decode(generator(program), PROMPTS[0], STEPS)
    assert tokens == expected
    assert_logits(got, rows)
    assert list(generator(program).generate(PROMPTS[0], STEPS, stop_ids=()).tokens) == expected


def test_interleaved_generators_do_not_disturb_each_other(family: str, program: Program) -> None:
    makers = [generator(program) for _ in PROMPTS]
    for made, prompt in zip(makers, PROMPTS, strict=True):
        made.append_tokens(prompt)
    got: list[list[int]] = [[] for _ in PROMPTS]
    for _ in range(STEPS):
        for made, tokens in zip(makers, got, strict=True):
            tokens.append(made.generate_next())
    assert got == [reference(family, which)[0] for which in range(len(PROMPTS))]
    assert got[0] != got[1]


def test_a_decode_step_creates_nothing_and_writes_little(program: Program, on: str) -> None:
    made = generator(program)
    made.append_tokens(PROMPTS[0])
    for token in (1, 2):
        made.append_tokens([token])
    for token in range(3, 30):
        before = device(on).counters.copy()
        made.append_tokens([token])
        step = device(on).counters.since(before)
        assert (step.buffers, step.pipelines, step.bind_groups, step.submits) == (0, 0, 0, 1)
        assert step.bytes_written <= WRITTEN + INPUT_BYTES


def test_without_optional_passes_the_tokens_are_the_same(family: str, on: str) -> None:
    expected, rows = reference(family, 0)
    with Runtime(device(on)).load_program(lowered(family, frozenset(OPTIONAL))) as program:
        made = generator(program)
        plain = len(made.method.delegates[0].graph.nodes)
        tokens, got = decode(made, PROMPTS[0], STEPS)
    with Runtime(device(on)).load_program(lowered(family)) as program:
        assert len(generator(program).method.delegates[0].graph.nodes) < plain
    assert tokens == expected
    assert_logits(got, rows)
