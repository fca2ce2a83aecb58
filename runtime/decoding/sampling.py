"""Choosing the next token from logits: greedy, or drawn after temperature, top-k, top-p and min-p.

Random numbers are counter-based: the number for a token depends on the seed and on the token's position alone, not
on what was drawn before. So a run that was rewound, split over calls or batched with others draws the same, and a
GPU can compute the same numbers with 32-bit integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError, WebGPUDelegateError

Array = np.ndarray[Any, Any]
_WORD = 0xFFFFFFFF
_FIRST_TRY = 1024
"""Candidates looked at before all tokens are sorted; top-p rarely needs more."""
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default is greedy: the most likely one, the lowest id among equals.

    The steps in their order: repetition penalty, temperature, top-k, top-p, min-p, draw; each takes what the last left.

    Attributes:
        temperature: logits are divided by it; 0 means greedy, which needs no random number.
        top_k: keep the k most likely tokens (among equals the lowest ids); 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities sum to at least this, in (0, 1].
        min_p: keep tokens at least this times as likely as the most likely one, in [0, 1].
        repetition_penalty: above 1, tokens that occurred before become less likely (a positive logit is divided by
            it, a negative one multiplied); greedy choice too.
        seed: in [0, 2**64); the same seed, program and tokens give the same result. None: another one for each
            generator.
    Raises:
        InputError: a value is out of range; says which.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        def require(good: bool, name: str, wanted: str) -> None:
            if not good:
                raise InputError(f"{name} is {getattr(self, name)!r}, expected {wanted}")

        require(_real(self.temperature) and self.temperature >= 0, "temperature", "a number of at least 0")
        require(_integer(self.top_k) and self.top_k >= 0, "top_k", "an integer of at least 0 (0: off)")
        require(_real(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number in (0, 1] (1: off)")
        require(_real(self.min_p) and 0 <= self.min_p <= 1, "min_p", "a number in [0, 1] (0: off)")
        require(
            _real(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            "a number above 0 (1: off)",
        )
        good_seed = self.seed is None or (_integer(self.seed) and 0 <= self.seed < 2**64)
        require(good_seed, "seed", "an integer in [0, 2**64), or None")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):  # numpy's scalars behave otherwise
            object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("top_k", "seed"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, int(getattr(self, name)))

    @property
    def greedy(self) -> bool:
        """Whether no random number is needed."""
        return self.temperature == 0


def _real(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


GREEDY = Sampling()


def probabilities(logits: Array, sampling: Sampling, history: Iterable[int] = ()) -> Array:
    """The distribution that a token is drawn from.

    Args:
        logits: f16, f32 or f64 [V].
        history: the ids so far, for the repetition penalty; ids of V or more are ignored.
    Returns:
        f64 [V] that sums to 1; one-hot for greedy sampling.
    Raises:
        WebGPUDelegateError: a logit is NaN, or all are minus infinity.
        InputError: logits are not one-dimensional, or there are none.
    """
    scores = _penalised(logits, sampling, history)
    if sampling.greedy:
        result = np.zeros(len(scores))
        result[int(np.argmax(scores))] = 1.0
        return result
    # The largest one is subtracted before the division: no overflow, however small the temperature. An infinite
    # one takes everything (inf - inf would be NaN).
    top = scores.max()
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        shifted = np.where(scores == top, 0.0, scores - top)
        exponents = shifted / sampling.temperature
        weights = np.exp(exponents)
    weights /= weights.sum()
    # By scores and exponents, not by weights: those of different scores may round to the same at a high temperature.
    order: Array | None = None
    if sampling.top_k and sampling.top_k < len(weights):
        order = _descending(scores, sampling.top_k)[: sampling.top_k]
        weights = _keep(weights, order)
    if sampling.top_p < 1:
        weights = _keep(weights, _nucleus(weights, scores, sampling.top_p, order))
    if sampling.min_p > 0:
        weights = np.where(exponents >= math.log(sampling.min_p), weights, 0.0)
        weights /= weights.sum()
    return weights


def choose(
    logits: Array, sampling: Sampling, seed: int = 0, position: int = 0, history: Iterable[int] = (), row: int = 0
) -> int:
    """The next token.

    Args:
        logits, history: as for `probabilities`.
        seed: used where `sampling.seed` is None.
        position: where in the sequence the token will stand, below 2**64; with the seed it decides the random number.
        row: number of the sequence in a batch.
    Raises:
        WebGPUDelegateError, InputError: as `probabilities`.
    """
    if sampling.greedy:
        return int(np.argmax(_penalised(logits, sampling, history)))
    total = np.cumsum(probabilities(logits, sampling, history))
    key = seed if sampling.seed is None else sampling.seed
    # Side "right" never picks a token of probability 0; rounding of the sum is undone by scaling.
    return int(np.searchsorted(total, uniform(key, position, row) * total[-1], side="right"))


def _penalised(logits: Array, sampling: Sampling, history: Iterable[int]) -> Array:
    """Checked logits as f64, after the repetition penalty."""
    if logits.ndim != 1 or not logits.size:
        raise InputError(f"logits have shape {list(logits.shape)}, expected [vocabulary]")
    scores = logits.astype(np.float64)
    wrong = np.flatnonzero(np.isnan(scores))
    if wrong.size:
        raise WebGPUDelegateError(
            f"{wrong.size:,} of {scores.size:,} logits are NaN (the first: token {wrong[0]}): no token can be chosen. "
            "The weights or the computation overflowed; try the program in float32"
        )
    if scores.max() == -np.inf:
        raise WebGPUDelegateError(f"all {scores.size:,} logits are minus infinity: no token can be chosen")
    if sampling.repetition_penalty != 1:
        seen = np.unique(np.fromiter(history, np.int64))
        seen = seen[(seen >= 0) & (seen < scores.size)]
        old = scores[seen]
        with np.errstate(over="ignore"):
            moved = np.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty)
        finite = np.minimum(np.maximum(moved, -_LARGEST), _LARGEST)  # as in float32
        scores[seen] = np.where(np.isinf(old), old, finite)
    return scores


def _descending(scores: Array, count: int) -> Array:
    """Ids of at least `count` largest scores, largest first, equal ones by id."""
    if count >= len(scores):
        return np.argsort(-scores, kind="stable")
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    found = np.flatnonzero(scores >= least)
    return found[np.argsort(-scores[found], kind="stable")]


def _nucleus(weights: Array, scores: Array, top_p: float, order: Array | None = None) -> Array:
    """Ids of the fewest of the largest scores whose weights sum to `top_p`; all weights sum to 1. `order`: ids of
    all that have a weight, those of the largest scores first, where they are known."""
    for count in (_FIRST_TRY, len(weights)):
        ids = _descending(scores, count) if order is None else order
        total = np.cumsum(weights[ids])
        if total[-1] >= top_p or count >= len(weights) or order is not None:
            break
    return ids[: int(np.searchsorted(total, top_p)) + 1]


def _keep(weights: Array, ids: Array) -> Array:
    """Zero outside `ids`, scaled to sum to 1."""
    kept: Array = np.zeros_like(weights)
    kept[ids] = weights[ids]
    kept /= kept.sum()
    return kept


def uniform(seed: int, position: int, row: int = 0) -> float:
    """A random number in [0, 1) with 32 bits, from the seed and a counter."""
    counter = (position & _WORD, position >> 32 & _WORD, row & _WORD, 0)
    return philox(counter, (seed & _WORD, seed >> 32 & _WORD))[0] / 2**32


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four 32-bit words."""
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ low, second & _WORD, (first >> 32) ^ d ^ high, first & _WORD
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    return a, b, c, d
