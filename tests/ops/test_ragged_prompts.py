"""Right-padded prompts of unequal lengths, and decoding after them (group C of the acceptance list)."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from tests.harness import DEVICES
from tests.ops.ragged import Array, Layer, Lengths, program

PROMPTS = {"C1": (4, 2, 6), "C2": (20, 12, 33), "C3": (20, 12, 96)}
NONE = (0, 0, 0)


def alone(lengths: Lengths, b: int) -> tuple[int, ...]:
    """The lengths with all other batch rows idle."""
    return tuple(n if i == b else 0 for i, n in enumerate(lengths))


def prompts_and_decoding(layer: Layer, on: str, lengths: Lengths, steps: int = 8) -> None:
    """A prefill, then single tokens, against the reference; every batch row also alone, bit by bit."""
    batch, longest = len(lengths), max(lengths)
    with program(layer, on) as together, program(layer, on) as solo:
        for step in range(steps + 1):
            rows = longest if step == 0 else 1
            new = tuple(lengths) if step == 0 else (1,) * batch
            past = (0,) * batch if step == 0 else tuple(n + step - 1 for n in lengths)
            given = together.tokens(rows, step)
            out = together.step(given, past, new)
            assert np.isfinite(out).all()
            for b in range(batch):
                own, _ = solo(given, past, alone(new, b))
                np.testing.assert_array_equal(own[b], out[b])
        for name in "kv":
            np.testing.assert_array_equal(solo.held(name), together.held(name))


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("name", PROMPTS)
def test_C1_C2_C3_C17_unequal_prompts_then_decoding(name: str, on: str) -> None:
    longest = max(PROMPTS[name])
    prompts_and_decoding(Layer(capacity=longest + 10), on, PROMPTS[name], 8 if name == "C1" else 3)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("name", PROMPTS)
def test_C4_smooth_softmax(name: str, on: str) -> None:
    """A sink of 0 for every head (and others)."""
    with program(Layer(capacity=max(PROMPTS[name]) + 2, sink=0.0), on) as made:
        lengths = PROMPTS[name]
        made.step(made.tokens(max(lengths), 0), NONE, lengths)
        made.step(made.tokens(1, 1), lengths, (1, 1, 1))


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("name", ["C1", "C2"])
def test_C5_the_order_of_the_batch_does_not_matter(name: str, on: str) -> None:
    lengths, longest = PROMPTS[name], max(PROMPTS[name])
    layer = Layer(capacity=longest + 2)
    with program(layer, on) as made:
        given = made.tokens(longest, 0)
        first = made.step(given, NONE, lengths)
        caches = {name: made.held(name) for name in "kv"}
        for order in permutations(range(3)):
            chosen = list(order)
            moved = {name: x[chosen] for name, x in given.items()}
            with program(layer, on) as other:
                out = other(moved, NONE, [lengths[i] for i in chosen])[0]
                np.testing.assert_array_equal(out, first[chosen])
                for cache, held in caches.items():
                    np.testing.assert_array_equal(other.held(cache), held[chosen])


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_C6_C7_one_token_all_tokens_and_none(rows: int, on: str) -> None:
    """The idle row's cache stays, and its result is zero; a batch of nothing but idle rows is legal too."""
    with program(Layer(capacity=64), on, (3, 0, 20)) as made:
        made.step(made.tokens(rows, 0), (3, 0, 20), (1, rows, 0))
        made.step(made.tokens(rows, 1), (4, rows, 20), (0, 0, min(rows, 40)))
        out = made.step(made.tokens(rows, 2), (4, rows, 20), NONE)
        np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("spread", [63, 64, 65, 128])
def test_C8_spreads_at_the_edges_of_tiles(spread: int, on: str) -> None:
    lengths = (1, 1 + spread, 2)
    with program(Layer(capacity=132), on) as made:
        made.step(made.tokens(1 + spread, spread), NONE, lengths)
        made.step(made.tokens(1, 0), lengths, (1, 1, 1))
        made.step(made.tokens(2, 1), tuple(n + 1 for n in lengths), (2, 1, 0))


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16])
def test_C9_batches(batch: int, on: str) -> None:
    lengths = [(7 * b + 3) % 18 for b in range(batch)]
    with program(Layer(batch=batch, capacity=24, heads=2, kv_heads=1), on) as made:
        made.step(made.tokens(17, 0), [0] * batch, lengths)
        made.step(made.tokens(3, 1), lengths, [b % 4 for b in range(batch)])


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rotary", ["fused", "apart", None])
@pytest.mark.parametrize("cache", ["f32", "f16", "bf16"])
def test_C10_rows_past_the_length_stay_as_they_were(cache: str, rotary: str | None, on: str) -> None:
    """Sentinels behind each row's tokens (`step` compares what is not written), at scalar and vector sizes."""
    for layer in (Layer(cache=cache, rotary=rotary), Layer(cache=cache, rotary=rotary, d=6, dv=5, kv_heads=1)):
        with program(layer, on, (0, 9, 38)) as made:
            made.step(made.tokens(6, 0), (0, 9, 38), (4, 6, 2))
            for name in "kv":
                held = made.held(name)
                for b, total in enumerate((4, 15, 40)):
                    assert np.isnan(held[b, total:]).all()
                    assert np.isfinite(held[b, :total]).all()


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("lengths", [(4, 2, 6), (20, 12, 33)])
def test_C11_padding_has_no_effect(lengths: Lengths, on: str) -> None:
    """Whatever stands in padding, NaN too, results and caches are the same bit by bit."""
    layer = Layer(capacity=40)
    found: list[tuple[Array, ...]] = []
    for filling in (0.0, 1e30, np.nan):
        with program(layer, on) as made:
            given = made.tokens(max(lengths), 0)
            for b, count in enumerate(lengths):
                for x in given.values():
                    x[b, count:] = filling
            out, query = made(given, NONE, lengths)
            assert np.isfinite(query).all()
            found.append((out, made.held("k"), made.held("v")))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


MIXED: tuple[tuple[Lengths, Lengths], ...] = (
    ((2, 4), (3, 2)),
    ((0, 30), (20, 1)),
    ((37, 0), (1, 17)),
    ((10, 11), (0, 9)),
)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(("past", "new"), MIXED)
def test_C12_mixed_past_and_unequal_new_tokens(past: Lengths, new: Lengths, on: str) -> None:
    with program(Layer(batch=2), on, past) as made, program(Layer(batch=2), on, past) as solo:
        given = made.tokens(max(new), 0)
        out = made.step(given, past, new)
        for b in range(2):
            np.testing.assert_array_equal(solo(given, past, alone(new, b))[0][b], out[b])


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rotary", ["fused", "apart"])
@pytest.mark.parametrize("style", [(True, 16), (False, 16), (True, 8), (False, 6)], ids=str)
def test_C13_rotary_positions_of_each_row(style: tuple[bool, int], rotary: str, on: str) -> None:
    """A table with exactly the rows that are used, and NaN behind them: padding takes no position past the table."""
    interleaved, rot = style
    layer = Layer(rotary=rotary, interleaved=interleaved, rot=rot, table_rows=33, guards=3)
    with program(layer, on, (27, 0, 30)) as made:
        made.step(made.tokens(6, 0), (27, 0, 30), (6, 6, 3))
        made.step(made.tokens(4, 1), (33, 6, 33), (0, 4, 0))


@pytest.mark.parametrize("on", DEVICES)
def test_C13_heads_before_positions(on: str) -> None:
    with program(Layer(layout="bhsd", rot=8), on, (3, 0, 30)) as made:
        made.step(made.tokens(6, 0), (3, 0, 30), (6, 2, 0))


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("shape", ["b", "b1", "1b"])
@pytest.mark.parametrize("dtype", ["i32", "i64"])
def test_D5_shapes_and_dtypes_of_lengths(dtype: str, shape: str, on: str) -> None:
    with program(Layer(lengths=dtype, shape=shape), on, (1, 0, 5)) as made:
        made.step(made.tokens(2, 0), (1, 0, 5), (2, 1, 0))


@pytest.mark.parametrize("on", DEVICES)
def test_every_row_has_all_tokens_without_q_len(on: str) -> None:
    with program(Layer(all_new=True), on, (1, 0, 37)) as made:
        made.step(made.tokens(3, 0), (1, 0, 37), (3, 3, 3))


@pytest.mark.parametrize("on", DEVICES)
def test_D8_growing_and_going_back(on: str) -> None:
    """Single tokens whose row goes back to any earlier length; the other rows differ in it."""
    with program(Layer(capacity=6), on) as made:
        for number, past in enumerate((0, 1, 2, 1, 3, 0, 4, 5)):
            made.step(made.tokens(1, number), (past, min(past, 1), 0), (1, 1, 1))
