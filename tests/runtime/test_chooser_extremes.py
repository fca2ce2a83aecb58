"""Choosing on the GPU where weights of different logits round to the same, or scores leave the range of float32."""

from __future__ import annotations

import numpy as np
import pytest

from executorch_webgpu.runtime import Sampling
from executorch_webgpu.runtime.decoding.sampling import choose
from tests.harness import DEVICES, device
from tests.runtime.test_chooser import rig
from tests.runtime.test_sampling import FLATTENED, flattened


@pytest.mark.parametrize("on", DEVICES)
def test_weights_that_round_to_the_same_keep_the_order_of_the_logits(on: str) -> None:
    with rig(device(on), flattened()[None]) as r:
        for sampling, kept in FLATTENED:
            got = r.choose(24, sampling, 5)[:, 0].tolist()
            assert got == [choose(r.logits[0], sampling, 5, i) for i in range(24)]
            assert set(got) == set(kept)
        r.set(np.array([[1e-9, 2e-9, 0, 0, 0]]))  # their difference is lost in a weight near 1
        assert set(r.choose(24, Sampling(temperature=1, min_p=1.0), 5)[:, 0].tolist()) == {1}
        r.set(np.array([[-3e38, -2e38, -np.inf, -np.inf, -np.inf]]))
        penalty = Sampling(repetition_penalty=1e6)
        assert r.choose(1, penalty, seen=[0, 1, 2]).tolist() == [[choose(r.logits[0], penalty, history=[0, 1, 2])]]
