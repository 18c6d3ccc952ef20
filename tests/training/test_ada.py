# SPDX-License-Identifier: Apache-2.0
"""The controller of adaptive augmentation."""

from __future__ import annotations

import pytest
import torch

from facelab.nn.augment import AugmentPipe
from facelab.training.ada import SIGN, adapt, adapted
from facelab.training.phases import AfterPhase
from facelab.training.schedule import Progress


def test_one_change_by_hand() -> None:
    p = torch.tensor(0.1)
    assert adapted(p, torch.tensor(0.7), 0.6, 32, 4, 500).item() == pytest.approx(0.1 + 128 / 500_000)
    assert adapted(p, torch.tensor(0.5), 0.6, 32, 4, 500).item() == pytest.approx(0.1 - 128 / 500_000)
    assert adapted(torch.tensor(0.0), torch.tensor(0.5), 0.6, 32, 4, 500).item() == 0
    assert adapted(torch.tensor(3.0), torch.tensor(1.0), 0.6, 1000, 4, 1).item() == pytest.approx(7)  # no upper limit


def run(signs: list[float], accepted: float = 1.0) -> AugmentPipe:
    pipe = AugmentPipe(p=0.5)
    for step, sign in enumerate(signs):
        statistics = {SIGN: torch.tensor(sign)}
        after = AfterPhase(Progress(step, step * 10, 10), None, {}, statistics, torch.tensor(accepted))
        adapt(after, pipe, target=0.6, kimg=1.0, interval=4)
    return pipe


def test_p_moves_every_fourth_step_by_the_mean_sign() -> None:
    assert run([1, 1, 1]).p == 0.5 and run([1, 1, 1]).sign_steps == 3
    moved = run([1, 1, 1, 0.2])  # mean 0.8
    assert moved.p.item() == pytest.approx(0.54) and moved.sign_steps == 0 and moved.sign_sum == 0
    assert run([1, 1, 1, -1]).p.item() == pytest.approx(0.46)  # mean 0.5
    assert run([1] * 8).p.item() == pytest.approx(0.58)


def test_rejected_steps_and_bad_numbers_change_nothing() -> None:
    assert run([1, 1, 1, 1], accepted=0.0).p == 0.5
    assert run([float("nan")] * 4).p == 0.5
