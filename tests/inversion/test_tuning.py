# SPDX-License-Identifier: Apache-2.0
"""Tuning of the generator around found codes."""

from __future__ import annotations

import functools

import pytest
import torch

from facelab.errors import UserError
from facelab.inversion.loop import Inversion, InversionSettings, advance_until
from facelab.inversion.schedules import ramped_rate
from facelab.inversion.tuning import Tuning, TuningSettings, tunable
from tests.inversion.doubles import Double, make_problem, own_pictures

VIEWS = torch.tensor([[0.2, -0.1]])
SETTINGS = TuningSettings(20, functools.partial(ramped_rate, steps=20, base=0.02))


def started(parts: tuple[str, ...] = ()) -> Tuning:
    """A tuning towards the picture of another generator, which no code of this one gives."""
    target, _ = own_pictures(Double(seed=9), VIEWS)
    problem = make_problem(target)
    average = Double().map({"z": torch.zeros(1, 6)})
    inversion = Inversion(problem, average, InversionSettings(3))
    advance_until(inversion)
    return Tuning(problem, inversion.solution(), SETTINGS, parts)


def test_the_loss_falls_and_codes_stay() -> None:
    tuning = started()
    before = tuning.losses()[0]
    pivot = tuning.pivot.codes.map(torch.clone)
    advance_until(tuning)
    assert tuning.losses()[0] < before / 5
    assert all(torch.equal(v, tuning.pivot.codes.values[k]) for k, v in pivot.values.items())


def test_only_named_parts_move() -> None:
    tuning = started(("tone",))
    generator = tuning.problem.generator
    advance_until(tuning)
    assert generator.tone.abs().max() > 0.01 and torch.equal(generator.paint, Double().paint)
    assert not generator.paint.requires_grad
    with pytest.raises(UserError, match="has no part 'tune', expected paint, tone. Did you mean 'tone'"):
        tunable(Double(), ["tune"])
    assert list(tunable(Double())) == ["paint", "tone"]


def test_going_on_is_exact() -> None:
    whole, cut = started(), started()
    advance_until(whole)
    for _ in range(7):
        cut.advance()
    state = cut.state()
    resumed = started()
    resumed.restore(state)
    advance_until(resumed)
    for name, value in whole.state().items():
        assert torch.equal(value, resumed.state()[name]), name
    with pytest.raises(UserError, match="does not fit: expected 'value/paint'"):
        resumed.restore({**state, "value/paint": torch.zeros(2)})
