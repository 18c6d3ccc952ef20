# SPDX-License-Identifier: Apache-2.0
"""Cameras by azimuth and elevation, their distributions, and rays by depth."""

from __future__ import annotations

import math

import pytest
import torch

from facelab.cameras.camera import Camera
from facelab.cameras.rays import make_depth_rays, make_rays
from facelab.cameras.sphere import SpherePrior, sphere_camera, view_angles
from facelab.draws import Draws
from facelab.errors import UserError


def test_camera_stands_where_the_angles_say_and_looks_at_the_origin() -> None:
    camera = sphere_camera([0.0, math.pi / 2, 0.0], [0.0, 0.0, math.pi / 6])
    expected = [[0, 0, 1], [1, 0, 0], [0, 0.5, math.sqrt(0.75)]]
    torch.testing.assert_close(camera.cam2world[:, :3, 3], torch.tensor(expected), atol=1e-6, rtol=0)
    rotation = camera.cam2world[:, :3, :3]
    torch.testing.assert_close(rotation[..., 2], -camera.cam2world[:, :3, 3], atol=1e-6, rtol=0)  # forward
    assert (rotation[:, 1, 1] < 0).all()  # the y axis points down
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(3))


def test_angles_agree_with_those_of_the_other_sphere() -> None:
    azimuth, elevation = torch.tensor([0.3, -0.7]), torch.tensor([0.2, -0.4])
    ours = sphere_camera(azimuth, elevation, 10.0)
    other = Camera.on_sphere(math.pi / 2 - elevation, math.pi / 2 - azimuth, 10.0)
    torch.testing.assert_close(ours.cam2world, other.cam2world, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.intrinsics, other.intrinsics)
    torch.testing.assert_close(ours.angles, other.angles)
    torch.testing.assert_close(view_angles(ours), torch.stack([azimuth, elevation], -1), atol=1e-6, rtol=0)
    no_angles = Camera(ours.cam2world, ours.intrinsics)
    torch.testing.assert_close(view_angles(no_angles), view_angles(ours), atol=1e-3, rtol=0)


@pytest.mark.parametrize("elevation", [math.pi / 2, -math.pi / 2])
def test_straight_from_above_or_below_is_still_a_rotation(elevation: float) -> None:
    camera = sphere_camera(0.4, elevation)
    rotation = camera.cam2world[0, :3, :3]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3), atol=1e-5, rtol=0)


def test_distributions_have_their_ranges_and_depend_on_the_draws_alone() -> None:
    uniform = SpherePrior("uniform", 0.4, 0.1)
    angles = view_angles(uniform.sample(Draws(0), 4000))
    assert 0.39 < angles[:, 0].abs().max() <= 0.4001 and 0.095 < angles[:, 1].abs().max() <= 0.1001
    gaussian = SpherePrior("gaussian", 0.4, 0.1)
    angles = view_angles(gaussian.sample(Draws(0), 4000))
    assert angles.std(0).tolist() == pytest.approx([0.4, 0.1], rel=0.05)
    assert torch.equal(gaussian.draw(Draws(0), 5).camera.cam2world, gaussian.sample(Draws(0), 5).cam2world)
    assert not torch.equal(gaussian.sample(Draws(1), 5).cam2world, gaussian.sample(Draws(0), 5).cam2world)
    with pytest.raises(UserError, match="azimuth must be a finite number"):
        SpherePrior("gaussian", float("nan"))


def test_fixed_sets_of_cameras() -> None:
    prior = SpherePrior("gaussian", 0.2, 0.1)
    sweep = view_angles(prior.sweep(torch.tensor([0.0, 1.0]), 3))
    expected = [[a, e] for e in (-0.1, 0.1) for a in (-0.2, 0.0, 0.2)]
    torch.testing.assert_close(sweep, torch.tensor(expected), atol=1e-6, rtol=0)
    fixed = view_angles(prior.fixed_views())
    assert fixed.shape == (13, 2) and fixed[0].abs().max() < 1e-6
    assert fixed[1].tolist() == pytest.approx([-0.3, 0], abs=1e-6)
    assert fixed[12].tolist() == pytest.approx([0, 0.15], abs=1e-6)
    row = view_angles(prior.row(5))
    assert row[:, 0].tolist() == pytest.approx([-0.3, -0.15, 0, 0.15, 0.3], abs=1e-6)
    assert row[:, 1].tolist() == pytest.approx([0.08] * 5, abs=1e-6)
    film = view_angles(prior.film(9))
    assert film[0].tolist() == pytest.approx([0.3, 0], abs=1e-6) and film[2].tolist() == pytest.approx(
        [0, 0.15], abs=1e-6
    )
    assert view_angles(prior.film(9, level=True))[:, 1].abs().max() < 1e-6
    low = view_angles(SpherePrior("uniform", 0.2, 0.1).film(9))
    assert low[:, 1].min().item() == pytest.approx(0, abs=1e-6) and low[:, 1].max().item() == pytest.approx(0.1)


def test_ray_parameter_is_the_depth_along_the_axis() -> None:
    camera = sphere_camera([0.2, -0.5], [0.1, 0.3], torch.tensor([12.0, 40.0]))
    rays, unit = make_depth_rays(camera, 5), make_rays(camera, 5, "centers")
    forward = camera.cam2world[:, None, :3, 2]
    torch.testing.assert_close((rays.directions * forward).sum(-1), torch.ones(2, 25))
    assert rays.views is not None
    torch.testing.assert_close(rays.views, unit.directions, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rays.origins, unit.origins)
    static = make_depth_rays(camera, 5, static_views=True)
    assert static.views is not None
    assert static.views[0, 0, 0] < 0 < static.views[0, 0, 1] and static.views[0, 0, 2] < 0  # left, up, forward
    part = static.part(3, 7)
    assert part.views is not None and torch.equal(part.views, static.views[:, 3:7])
