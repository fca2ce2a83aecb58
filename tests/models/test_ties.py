"""References that may round a value at a tie to either side, and no other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.models import verify
from tests.models.reference import Reference
from tests.models.ties import MOST, NEAR, agreeing

VALUES = torch.tensor([0.5 + 1e-5, 1.2, -2.5 - 2e-5, 7.5 - 5 * NEAR, 3.0, 4.5 + 3e-5, 8.5 + 4e-5, 9.5 - 6e-5])


class Rounds(torch.nn.Module):
    """Two projections round the same values; a sum of what was rounded is kept for the next call."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def forward(self) -> torch.Tensor:
        first, second = (VALUES + 0).round(), (VALUES + 0).round()
        self.total += (first.sum() + second.sum()) / 8
        return torch.cat([first, second, self.total[None]])


def result(*flipped: int, calls: int = 1) -> torch.Tensor:
    """What one gets that rounds the values at `flipped` to the other side in every call."""
    values = VALUES.double().round()
    for index in flipped:
        values[index] = 2 * VALUES[index].double().floor() + 1 - values[index]
    return torch.cat([values, values, (calls * values.sum() / 4)[None]]).float()


def oracle() -> Reference:
    module = Rounds()
    return Reference(module, lambda tokens, position: module())


def errors(got: torch.Tensor) -> Callable[[tuple[torch.Tensor, ...]], torch.Tensor]:
    return lambda references: (got - references[0]).abs() / 0.1


@pytest.mark.parametrize("flipped", [(), (0,), (2,), (0, 5), (5, 6, 7), (0, 2, 5, 6)])
def test_values_at_ties_may_fall_to_either_side(flipped: tuple[int, ...]) -> None:
    reference = oracle()
    for calls in (1, 2):  # the second goes on from the state of what the first agreed with
        found = agreeing(reference, np.zeros(1), 0, errors(result(*flipped, calls=calls)))
        assert found == (0.0, len(flipped))


@pytest.mark.parametrize("flipped", [(1,), (3,), (4,), (0, 3)])
def test_others_may_not(flipped: tuple[int, ...]) -> None:
    least, _ = agreeing(oracle(), np.zeros(1), 0, errors(result(*flipped)))
    assert least >= 10


def test_a_wrong_number_stays_wrong() -> None:
    got = result()
    got[4] += 0.2
    least, flipped = agreeing(oracle(), np.zeros(1), 0, errors(got))
    assert (least, flipped) == (pytest.approx(2), 0)


def test_projections_of_one_tensor_round_it_alike() -> None:
    got = result(0)
    got[0] = result()[0]
    assert agreeing(oracle(), np.zeros(1), 0, errors(got))[0] >= 10


def test_only_a_few_may_be_open() -> None:
    many = (0, 2, 5, 6, 7)
    assert len(many) > MOST
    assert agreeing(oracle(), np.zeros(1), 0, errors(result(*many)))[0] > 1


@pytest.mark.parametrize(
    ("got", "reference", "right"),
    [
        (1.0, float("nan"), False),
        (float("nan"), 1.0, False),
        (float("inf"), 1.0, False),
        (1.0, float("inf"), False),
        (float("inf"), float("inf"), True),
        (float("-inf"), float("inf"), False),
        (1.0, 1.0, True),
    ],
)
def test_what_is_no_number_is_an_error(got: float, reference: float, right: bool) -> None:
    """Of either side: a maximum that a NaN takes part in says nothing."""
    found = float(verify.errors(torch.tensor([0.0, got]), torch.tensor([0.0, reference]), "fp32").max())
    assert max(0.0, found) == (0.0 if right else float("inf"))
