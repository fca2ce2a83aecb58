"""Sampling: distributions, ties, filters, seeds and bad values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from executorch_webgpu.runtime import InputError, Sampling, WebGPUDelegateError
from executorch_webgpu.runtime.decoding.sampling import GREEDY, choose, philox, probabilities, uniform


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_numbers(counter: Any, key: Any, expected: Any) -> None:
    assert philox(counter, key) == expected


def test_uniform_numbers_are_uniform_and_independent_of_order() -> None:
    drawn = np.array([uniform(3, position) for position in range(4000)])
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.histogram(drawn, 20, (0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.05
    assert uniform(3, 7) == drawn[7]
    assert len({uniform(3, 7), uniform(4, 7), uniform(3 + 2**32, 7), uniform(3, 7 + 2**32), uniform(3, 7, row=1)}) == 5


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = np.array([1, 5, 2, 5, 5], np.float32)
    assert choose(logits, GREEDY) == 1
    assert choose(logits, Sampling(temperature=1, top_k=1, seed=0), position=9) == 1
    assert choose(np.array([-np.inf, -np.inf, -3.0]), GREEDY) == 2
    assert choose(np.array([0.0, np.inf, np.inf]), GREEDY) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(size=24).astype(np.float32) * 1.5
    expected = softmax(logits / np.float32(temperature))
    sampling = Sampling(temperature=temperature, seed=11)
    count = 6000
    seen = np.bincount([choose(logits, sampling, position=i) for i in range(count)], minlength=24)
    rare = expected * count < 5
    if rare.any():  # too few to test alone
        expected = np.append(expected[~rare], expected[rare].sum())
        seen = np.append(seen[~rare], seen[rare].sum())
    statistic = ((seen - expected * count) ** 2 / (expected * count)).sum()
    assert statistic < 49.7  # 23 degrees of freedom, p = 0.001


def test_top_k_keeps_exactly_k_and_ties_go_to_low_ids() -> None:
    logits = np.array([1.0, 3.0, 3.0, 0.0, 3.0])
    np.testing.assert_allclose(probabilities(logits, Sampling(temperature=1, top_k=2)), [0, 0.5, 0.5, 0, 0])
    full = probabilities(logits, Sampling(temperature=1))
    np.testing.assert_allclose(full, softmax(logits))
    np.testing.assert_array_equal(probabilities(logits, Sampling(temperature=1, top_k=9)), full)


def test_top_p_keeps_the_token_that_crosses_the_limit() -> None:
    logits = np.log([0.5, 0.2, 0.15, 0.1, 0.05])
    np.testing.assert_allclose(probabilities(logits, Sampling(temperature=1, top_p=0.6)), [5 / 7, 2 / 7, 0, 0, 0])
    np.testing.assert_allclose(probabilities(logits, Sampling(temperature=1, top_p=1e-9)), [1, 0, 0, 0, 0])


def test_top_p_of_a_flat_distribution_needs_more_than_the_first_candidates() -> None:
    logits = np.random.default_rng(1).normal(size=5000) * 0.01
    kept = np.flatnonzero(probabilities(logits, Sampling(temperature=1, top_p=0.9)))
    order = np.argsort(-logits, kind="stable")
    total = np.cumsum(softmax(logits)[order])
    np.testing.assert_array_equal(kept, np.sort(order[: int(np.searchsorted(total, 0.9)) + 1]))


def test_top_p_counts_among_those_that_top_k_leaves() -> None:
    """More of them than the first candidates, and equal ones at both limits."""
    logits = np.round(np.random.default_rng(2).normal(size=5000), 1)
    sampling = Sampling(temperature=1, top_k=2000, top_p=0.9)
    order = np.argsort(-logits, kind="stable")[:2000]
    weights = softmax(logits[order])
    kept = order[: int(np.searchsorted(np.cumsum(weights), 0.9)) + 1]
    expected = np.zeros(5000)
    expected[kept] = softmax(logits[kept])
    assert 1024 < len(kept) < 2000
    np.testing.assert_allclose(probabilities(logits, sampling), expected, rtol=1e-12)


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = np.log([0.5, 0.25, 0.2, 0.05])
    kept = probabilities(logits, Sampling(temperature=1, min_p=0.3))
    np.testing.assert_allclose(kept, np.array([0.5, 0.25, 0.2, 0]) / 0.95)


def test_repetition_penalty_changes_seen_tokens_only() -> None:
    logits = np.array([2.0, -1.0, 1.9, 0.0])
    penalty = Sampling(repetition_penalty=2.0)
    assert choose(logits, GREEDY, history=[0, 0, 1]) == 0
    assert choose(logits, penalty, history=[0, 0, 1, 99]) == 2
    got = probabilities(logits, Sampling(temperature=1, repetition_penalty=2.0), [0, 0, 1])
    np.testing.assert_allclose(got, softmax(np.array([1.0, -2.0, 1.9, 0.0])))


def test_extreme_values_stay_finite() -> None:
    logits = np.array([1e30, 0.0, -1e30, -np.inf], np.float32)
    np.testing.assert_array_equal(probabilities(logits, Sampling(temperature=1e-6)), [1, 0, 0, 0])
    np.testing.assert_allclose(probabilities(np.array([np.inf, 1.0, np.inf]), Sampling(temperature=1)), [0.5, 0, 0.5])
    assert probabilities(np.array([6e4, 6e4, -6e4], np.float16), Sampling(temperature=0.1)).tolist() == [0.5, 0.5, 0]


FLATTENED = [
    (Sampling(temperature=1e30, top_k=2), [1, 3]),
    (Sampling(temperature=1e30, top_p=0.3), [1, 3]),
    (Sampling(temperature=1e30, top_k=4, top_p=0.2), [3]),
    (Sampling(temperature=1e30, min_p=1.0), [3]),
    (Sampling(temperature=1e30, top_k=3, min_p=1.0), [3]),
    (Sampling(temperature=1e30, top_p=0.5, min_p=1.0), [3]),
]
"""Settings, and the ids of `flattened` that they keep."""


def flattened() -> np.ndarray[Any, Any]:
    """Logits of which all weights round to the same at a temperature of 1e30."""
    return np.array([0.0, 1.0, -1.0, 2.0, 0.5], np.float32)


@pytest.mark.parametrize(("sampling", "kept"), FLATTENED)
def test_the_order_is_that_of_the_logits_at_any_temperature(sampling: Sampling, kept: list[int]) -> None:
    assert np.flatnonzero(probabilities(flattened(), sampling)).tolist() == kept


@pytest.mark.filterwarnings("error")
def test_infinite_logits_warn_of_nothing() -> None:
    logits = np.array([np.inf, 1.0, np.inf, -np.inf], np.float32)
    for sampling in (Sampling(temperature=1), Sampling(temperature=1, repetition_penalty=1.5), GREEDY):
        assert probabilities(logits, sampling, [0, 1, 2, 3])[[1, 3]].tolist() == [0, 0]


@pytest.mark.filterwarnings("error")
def test_penalised_logits_stay_in_the_range_of_float32() -> None:
    """As on the GPU: what leaves it is a tie at its end."""
    logits = np.array([-3e38, -2e38, -np.inf], np.float32)
    assert choose(logits, Sampling(repetition_penalty=1e6), history=[0, 1, 2]) == 0
    assert choose(-logits[:2], Sampling(repetition_penalty=1e-300), history=[0, 1]) == 0


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf])
    drawn = {choose(logits, Sampling(temperature=1, seed=1), position=i) for i in range(200)}
    assert drawn == {1, 3}


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1)])
def test_unusable_logits_are_errors(sampling: Sampling) -> None:
    with pytest.raises(WebGPUDelegateError, match=r"1 of 3 logits are NaN \(the first: token 1\)"):
        choose(np.array([1.0, np.nan, 2.0]), sampling)
    with pytest.raises(WebGPUDelegateError, match="minus infinity"):
        choose(np.full(3, -np.inf), sampling)
    with pytest.raises(InputError, match="expected \\[vocabulary\\]"):
        choose(np.zeros((1, 3)), sampling)
    with pytest.raises(InputError, match="shape"):
        choose(np.zeros(0), sampling)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", "hot"), ("top_k", -1), ("top_k", 1.5),
        ("top_k", True), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 2), ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")), ("seed", -1), ("seed", 2**64), ("seed", 1.0),
    ],
)  # fmt: skip
def test_bad_options_are_named(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name} is .*, expected"):
        Sampling(**{name: value})
