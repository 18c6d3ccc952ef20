# SPDX-License-Identifier: Apache-2.0
"""Pose distributions: hand-computed angles, the statistics of each mode, and bad names."""

from __future__ import annotations

import math

import pytest
import torch

from facelab.cameras.camera import Camera
from facelab.cameras.pose_sampling import (
    MODES,
    PosePrior,
    PriorSource,
    RowsSource,
    angles_from_raw,
)
from facelab.draws import Draws, TapeDraws
from facelab.errors import UserError

HALF_PI = math.pi / 2


def test_uniform_maps_zero_and_one_to_the_ends_of_the_range():
    prior = PosePrior("uniform", yaw_mean=1.0, yaw_std=0.5, pitch_mean=1.5, pitch_std=0.2)
    pitch, yaw = angles_from_raw(prior, torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(yaw, torch.tensor([0.5, 1.0, 1.5]))
    torch.testing.assert_close(pitch, torch.tensor([1.7, 1.5, 1.3]))


def test_spherical_uniform_has_uniform_heights():
    prior = PosePrior("spherical_uniform", yaw_std=math.pi, pitch_std=HALF_PI)
    raw = torch.linspace(0.001, 0.999, 101)
    pitch, _ = angles_from_raw(prior, torch.zeros(101), raw)
    torch.testing.assert_close(pitch.cos(), 1 - 2 * raw, atol=1e-5, rtol=0)  # the camera's height is linear in u


def test_spherical_uniform_without_spread_is_not_the_mean():
    # the original's formula: arccos(1 - 2 m / pi), which differs from m off the equator
    prior = PosePrior("spherical_uniform", yaw_std=0, pitch_std=0, pitch_mean=0.7)
    pitch, _ = angles_from_raw(prior, torch.rand(2), torch.rand(2))
    torch.testing.assert_close(pitch, torch.full((2,), math.acos(1 - 2 * 0.7 / math.pi)))


def test_truncated_gaussian_takes_the_first_candidate_inside_or_the_first_of_all():
    prior = PosePrior("truncated_gaussian", yaw_mean=0, yaw_std=1, pitch_mean=HALF_PI, pitch_std=0.1)
    raw = torch.tensor([[2.5, -3.0, 0.25, 1.0], [-2.1, 2.2, 2.3, -5.0]])
    pitch, yaw = angles_from_raw(prior, raw, raw)
    torch.testing.assert_close(yaw, torch.tensor([0.25, -2.1]))
    torch.testing.assert_close(pitch, torch.tensor([HALF_PI + 0.025, HALF_PI - 0.21]))


def test_pitch_is_clamped_and_the_clamped_value_is_returned_while_yaw_is_free():
    prior = PosePrior("gaussian", yaw_std=10, pitch_std=10)
    pitch, yaw = angles_from_raw(prior, torch.tensor([5.0, -5.0]), torch.tensor([5.0, -5.0]))
    torch.testing.assert_close(pitch, torch.tensor([math.pi - 1e-5, 1e-5]))
    torch.testing.assert_close(yaw, torch.tensor([50 + HALF_PI, HALF_PI - 50]))
    camera = Camera.on_sphere(pitch, yaw, 12)
    torch.testing.assert_close(camera.angles, torch.stack([pitch, yaw], -1))


@pytest.mark.parametrize("mode", ["uniform", "gaussian", "truncated_gaussian"])
def test_means_and_spreads_of_many_poses(mode):
    prior = PosePrior(mode, yaw_std=0.3, pitch_std=0.155)
    pitch, yaw = prior.angles(Draws(3), 20_000)
    # a uniform range of +-s has deviation s/sqrt(3); a normal one cut at 2 has 0.880 s
    spread = {"uniform": 1 / math.sqrt(3), "gaussian": 1.0, "truncated_gaussian": 0.8796}[mode]
    assert abs(float(yaw.mean()) - HALF_PI) < 0.01 and abs(float(pitch.mean()) - HALF_PI) < 0.01
    assert float(yaw.std()) == pytest.approx(0.3 * spread, rel=0.02)
    assert float(pitch.std()) == pytest.approx(0.155 * spread, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([pitch, yaw]))[0, 1])) < 0.03  # separate draws


def test_hybrid_flips_one_coin_for_the_whole_call():
    prior = PosePrior("hybrid", yaw_mean=0, yaw_std=1.0, pitch_std=0.1)
    numbers = {"yaw": torch.tensor([0.75, 1.0]), "pitch": torch.tensor([0.5, 0.5])}
    _, yaw = prior.angles(TapeDraws(tape={**numbers, "pose_coin": torch.tensor([0.2])}), 2)
    torch.testing.assert_close(yaw, torch.tensor([1.0, 2.0]))  # uniform, twice the range
    _, yaw = prior.angles(TapeDraws(tape={**numbers, "pose_coin": torch.tensor([0.7])}), 2)
    torch.testing.assert_close(yaw, torch.tensor([0.75, 1.0]))  # normal
    with pytest.raises(ValueError, match="hybrid has no raw numbers"):
        angles_from_raw(prior, torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("mode", MODES)
def test_same_place_same_cameras_and_another_step_others(mode):
    prior = PosePrior(mode)
    first, again = (prior.sample(Draws(1, step=5), 4, 12.0) for _ in range(2))
    assert first.cam2world.equal(again.cam2world)
    other = prior.sample(Draws(1, step=6), 4, 12.0)
    assert first.cam2world.equal(other.cam2world) == (mode == "fixed")
    torch.testing.assert_close(first.cam2world[:, :3, 3].norm(dim=-1), torch.ones(4))


def test_normal_is_gaussian():
    assert PosePrior("normal").sample(Draws(0), 3, 12).cam2world.equal(PosePrior().sample(Draws(0), 3, 12).cam2world)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "gausian"}, "Did you mean 'gaussian'"),
        ({"yaw_std": -1.0}, "yaw_std"),
        ({"pitch_mean": math.nan}, "nan"),
    ],
)
def test_bad_priors_are_refused_in_one_line(arguments, words):
    with pytest.raises(UserError, match=words) as caught:
        PosePrior(**arguments)
    assert "\n" not in str(caught.value)


def test_rows_source_keeps_rows_together_and_covers_them_all():
    camera = PosePrior().sample(Draws(0), 7, 12.0)
    light = torch.arange(7.0)[:, None].expand(7, 9)
    source = RowsSource(Camera.from_label(camera.label()), light=light)
    drawn = source.draw(Draws(2), 200)
    rows = drawn.light[:, 0].long()
    assert set(rows.tolist()) == set(range(7))
    torch.testing.assert_close(drawn.camera.label(), camera.label()[rows])
    assert drawn.coefficients is None
    with pytest.raises(ValueError, match="7 rows"):
        RowsSource(camera, light=light[:5])


def test_prior_source_equals_its_prior():
    source = PriorSource(PosePrior("uniform"), fov=18.0)
    assert source.draw(Draws(4), 3).camera.label().equal(PosePrior("uniform").sample(Draws(4), 3, 18.0).label())
