"""Batches of unequal prompts through rewritten Hugging Face decoders, lowered as a whole, against runs of each prompt
alone: in the same program, and by transformers.

Tests with a letter and a number cover the row of that name of the attention checklist (groups C and G).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge

from executorch_webgpu.llm.ragged import export_program, export_ragged, make_ragged
from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import Method, Program, Runtime
from executorch_webgpu.runtime.errors import InputError
from tests.harness import device
from tests.llm.models import int32, padded, prompts, tiny
from tests.models.hf import VOCAB

BATCH, CAPACITY, LONGEST = 3, 48, 16
POSITIONS = 160
PROMPTS = prompts(9, 2, 14, seed=1)
NEW = 10
"""Tokens generated: two rows pass the sliding windows of 16."""
FAMILIES = ("llama", "qwen3", "gemma3")
GAP = 1e-3
"""Least distance of the best two logits in the reference runs, far above the error allowed: ties decide nothing."""


@cache
def program(family: str, capacity: int = CAPACITY, logits: str = "last") -> bytes:
    made = export_ragged(model(family), BATCH, capacity, max_tokens=LONGEST, logits=logits)
    return bytes(made.buffer)


@contextmanager
def loaded(pte: bytes) -> Iterator[tuple[Program, Method]]:
    found = Runtime(device("full")).load_program(pte)
    method = found.load_method("forward")
    assert len(method.delegates) == 1
    assert method.outside() == []
    try:
        yield found, method
    finally:
        method.close()


def model(family: str) -> Any:
    return tiny(family, max_position_embeddings=POSITIONS)


def solo(family: str, prompt: Sequence[int], count: int) -> list[int]:
    """transformers' own greedy continuation of one prompt."""
    return list(_solo(family, tuple(prompt), max(count, NEW))[:count])


@cache
@torch.no_grad()
def _solo(family: str, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    out = model(family).generate(
        torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.stack([step[0] for step in out.logits]).sort(-1).values[:, -2:]
    assert float((best[:, 1] - best[:, 0]).min()) > GAP
    return tuple(out.sequences[0, len(prompt) :].tolist())


def greedy(method: Method, rows: Sequence[Sequence[int]], count: int, pad: int = 0) -> list[list[int]]:
    """Greedy continuations of all prompts at once; an empty prompt is a row that stays idle."""
    lengths, made = [len(row) for row in rows], [list[int]() for _ in rows]
    tokens, past, q_len = padded(rows, max(lengths), pad), int32([0] * len(rows)), int32(lengths)
    active = int32([int(n > 0) for n in lengths])
    for _ in range(count):
        [logits] = method.execute([tokens, past, q_len])
        assert np.isfinite(logits).all()
        chosen = np.asarray(logits).argmax(-1)
        for row, token in enumerate(chosen):
            if active[row]:
                made[row].append(int(token))
        tokens, past, q_len = torch.from_numpy(chosen)[:, None], past + q_len, active
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_C15_batched_greedy_equals_each_prompt_alone(family: str) -> None:
    """In the same program with the other rows idle, in transformers, and with another content of the padding."""
    with loaded(program(family)) as (_, method):
        together = greedy(method, PROMPTS, NEW)
        assert greedy(method, PROMPTS, 2, pad=77) == [row[:2] for row in together]
        for row, prompt in enumerate(PROMPTS):
            alone = [prompt if place == row else [] for place in range(BATCH)]
            assert greedy(method, alone, NEW)[row] == together[row]
            assert solo(family, prompt, NEW) == together[row]


def test_C15_128_tokens_in_any_order_of_rows() -> None:
    rows = prompts(11, 4, 7, seed=2)
    with loaded(program("llama", 144)) as (_, method):
        made = greedy(method, rows, 128)
        for order in ([2, 0, 1],):
            assert greedy(method, [rows[i] for i in order], 6) == [made[i][:6] for i in order]
    assert made == [solo("llama", row, 128) for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_route_A_gives_one_delegate_too(family: str) -> None:
    exported = export_program(make_ragged(model(family), BATCH, CAPACITY, check=False), BATCH, LONGEST)
    partitioner = WebGPUPartitioner()
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    edge = to_edge(exported, compile_config=config).to_backend(partitioner)
    assert partitioner.refused == {}
    with loaded(bytes(edge.to_executorch().buffer)) as (_, method), loaded(program(family)) as (_, other):
        assert greedy(method, PROMPTS, 3) == greedy(other, PROMPTS, 3)


def test_rows_at_different_stages_share_calls() -> None:
    """One row decodes while another gets its prompt in parts and a third is idle; then a row starts again."""
    first, second, third = PROMPTS
    want = [solo("llama", row, 6) for row in PROMPTS]
    with loaded(program("llama")) as (_, method):
        call = steps(method)
        assert call([first, [], []], [0, 0, 0])[0] == want[0][0]
        assert call([[want[0][0]], second[:1], []], [len(first), 0, 0])[0] == want[0][1]
        chosen = call([[want[0][1]], second[1:], third[:5]], [len(first) + 1, 1, 0])
        assert chosen[:2] == [want[0][2], want[1][0]]
        chosen = call([[want[0][2]], [want[1][0]], third[5:]], [len(first) + 2, len(second), 5])
        assert chosen == [want[0][3], want[1][1], want[2][0]]
        # row 0 goes back two tokens, row 1 gets row 2's prompt
        chosen = call([[want[0][1]], third, [want[2][0]]], [len(first) + 1, 0, len(third)])
        assert chosen == [want[0][2], want[2][0], want[2][1]]


def steps(method: Method) -> Any:
    def call(rows: list[list[int]], past: list[int]) -> list[int]:
        lengths = [len(row) for row in rows]
        [logits] = method.execute([padded(rows, max(lengths)), int32(past), int32(lengths)])
        return [int(token) for token in np.asarray(logits).argmax(-1)]

    return call


def test_logits_of_every_token_against_eager() -> None:
    decoder = make_ragged(model("qwen3"), BATCH, CAPACITY, logits="all", check=False)
    with loaded(program("qwen3", logits="all")) as (_, method), torch.no_grad():
        past = int32([0, 0, 0])
        for lengths in ([9, 2, 14], [1, 0, 1], [3, 4, 1]):
            tokens = padded([row[:n] for row, n in zip(prompts(14, 14, 14), lengths, strict=True)], max(lengths))
            q_len = int32(lengths)
            want = decoder(tokens, past, q_len)
            [got] = method.execute([tokens, past, q_len])
            assert np.asarray(got).shape == (BATCH, max(lengths), VOCAB)
            for row, n in enumerate(lengths):
                np.testing.assert_allclose(np.asarray(got)[row, :n], want[row, :n].numpy(), atol=1e-4, rtol=1e-3)
            past = past + q_len


def test_G3_a_step_writes_its_inputs_and_nothing_else() -> None:
    """4 bytes for each token, past and q_len; no plan, pipeline or buffer is made for another length."""
    with loaded(program("llama")) as (_, method):
        greedy(method, PROMPTS, 3)
        on = device("full")
        for past in ([20, 1, 30], [33, 0, 5], [40, 40, 40]):
            before = on.counters.copy()
            method.execute([torch.ones(BATCH, 1, dtype=torch.int64), int32(past), int32([1, 1, 1])])
            done = on.counters.since(before)
            assert done.bytes_written == 3 * 4 * BATCH
            assert (done.submits, done.pipelines, done.buffers, done.bind_groups) == (1, 0, 0, 0)


def test_constant_methods() -> None:
    with loaded(program("llama")) as (found, method):
        assert {name: found.constants[name] for name in sorted(found.constants)} == {
            "get_eos_ids": 2,
            "get_max_batch_size": BATCH,
            "get_max_context_len": CAPACITY,
            "get_max_seq_len": LONGEST,
            "get_vocab_size": VOCAB,
        }
        assert [info and info.dtype for info in method.metadata.inputs] == ["i64", "i32", "i32"]


@pytest.mark.parametrize(
    ("past", "q_len"),
    [([0, 49, 0], [1, 0, 1]), ([0, 0, -1], [1, 1, 1]), ([0, 47, 0], [1, 2, 1]), ([0, 0, 0], [1, 3, 1])],
)
def test_D1_bad_lengths_of_one_row_leave_the_others_as_they_were(past: list[int], q_len: list[int]) -> None:
    tokens = torch.ones(BATCH, 2, dtype=torch.int64)
    with loaded(program("llama")) as (_, method):
        want = greedy(method, PROMPTS, 2)
        on = device("full")
        before = on.counters.copy()
        with pytest.raises(InputError, match=r"row [12]"):
            method.execute([tokens, int32(past), int32(q_len)])
        assert on.counters.since(before).submits == 0
        lengths = [len(row) for row in PROMPTS]
        chosen = steps(method)([[row[1]] for row in want], [n + 1 for n in lengths])
        assert chosen == [solo("llama", row, 3)[2] for row in PROMPTS]
