# SPDX-License-Identifier: Apache-2.0
"""Depth and pose errors by hand; view consistency on a ball whose depth is known exactly."""

from __future__ import annotations

import math

import pytest
import torch

from facelab.cameras.camera import Camera
from facelab.cameras.rays import make_rays
from facelab.metrics.geometry import depth_error, pose_error, rotation_error, view_consistency

RADIUS = 0.1


def ball_depth(camera: Camera, size: int, grid: str = "corners"):
    """Exact distance to a ball around the origin (N, S, S), and where it is hit."""
    rays = make_rays(camera, size, grid)
    along = (rays.origins * rays.directions).sum(-1)
    root = along.square() - rays.origins.square().sum(-1) + RADIUS**2
    hit = root > 0
    return torch.where(hit, -along - root.clamp(min=0).sqrt(), 0).view(-1, size, size), hit.view(-1, size, size)


def test_depth_errors_by_hand():
    truth = torch.tensor([[[1.0, 2.0], [4.0, float("nan")]]])
    guess = torch.tensor([[[1.5, 2.0], [3.0, 7.0]]])
    error = depth_error(guess, truth, mask=~truth.isnan())
    assert float(error.mae) == pytest.approx(0.5)
    assert float(error.rmse) == pytest.approx(math.sqrt((0.25 + 1) / 3))
    assert float(error.relative) == pytest.approx((0.5 + 0 + 0.25) / 3)


def test_alignment_recovers_a_scale_and_a_shift():
    truth = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    scaled = depth_error(truth / 3, truth, align="scale")
    assert scaled.mae.max() < 1e-12
    torch.testing.assert_close(scaled.scale, torch.full((2,), 3.0, dtype=torch.float64))
    both = depth_error((truth - 0.4) / 2, truth, align="scale_shift")
    assert both.rmse.max() < 1e-12
    torch.testing.assert_close(both.shift, torch.full((2,), 0.4, dtype=torch.float64))
    assert depth_error((truth - 0.4) / 2, truth, align="scale").mae.min() > 0.01
    assert depth_error(truth / 3, truth).mae.min() > 0.6


def test_least_squares_scale_by_hand():
    # s = (1*2 + 2*2) / (1 + 4) = 1.2 -> errors 0.8 and 0.4
    error = depth_error(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[2.0, 2.0]]]), align="scale")
    assert float(error.scale) == pytest.approx(1.2) and float(error.mae) == pytest.approx(0.6)


def test_bad_depths_are_refused():
    depth = torch.ones(1, 2, 2)
    with pytest.raises(ValueError, match="Did you mean 'scale'"):
        depth_error(depth, depth, align="scal")
    with pytest.raises(ValueError, match="one shape"):
        depth_error(depth, depth[:, :1])
    with pytest.raises(ValueError, match="at least 2 masked"):
        depth_error(depth, depth, mask=torch.zeros(1, 2, 2))


def test_pose_errors_wrap_and_shrink_towards_the_pole():
    level, high = math.pi / 2, 0.1
    truth = torch.tensor([[level, 0.1], [high, 1.0], [1.2, 2.0]])
    guess = torch.tensor([[level, 2 * math.pi - 0.1], [high, 2.0], [1.3, 2.0]])
    error = pose_error(guess, truth)
    torch.testing.assert_close(error.yaw, torch.tensor([0.2, 1.0, 0.0], dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(error.pitch, torch.tensor([0, 0, 0.1], dtype=torch.float64), atol=1e-6, rtol=0)
    near_pole = 2 * math.asin(math.sin(high) * math.sin(0.5))  # chord of a circle of radius sin(0.1)
    expected = torch.tensor([0.2, near_pole, 0.1], dtype=torch.float64)
    torch.testing.assert_close(error.direction, expected, atol=1e-6, rtol=0)


def test_tiny_direction_errors_are_not_lost():
    truth = torch.tensor([[1.5, 1.5]], dtype=torch.float64)
    assert float(pose_error(truth + torch.tensor([[1e-9, 0]]), truth).direction) == pytest.approx(1e-9, rel=1e-5)


def test_rotation_error_is_the_angle():
    angles = torch.tensor([0.0, 0.3, math.pi], dtype=torch.float64)
    rotation = torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)
    rotation[:, 0, 0], rotation[:, 1, 1] = angles.cos(), angles.cos()
    rotation[:, 0, 1], rotation[:, 1, 0] = -angles.sin(), angles.sin()
    torch.testing.assert_close(rotation_error(rotation, rotation[:1].expand(3, 3, 3)), angles, atol=1e-6, rtol=0)


@pytest.mark.parametrize("grid", ["corners", "centers"])
def test_a_ball_is_consistent_with_itself_and_a_scaled_view_is_not(grid):
    first = Camera.on_sphere([math.pi / 2, 1.4], [math.pi / 2, 1.5], 16.0).to(torch.float64)
    second = Camera.on_sphere([math.pi / 2, 1.5], [math.pi / 2 - 0.3, 1.8], 16.0).to(torch.float64)
    (depth_a, hit_a), (depth_b, hit_b) = ball_depth(first, 96, grid), ball_depth(second, 96, grid)
    good = view_consistency(depth_a, first, depth_b, second, hit_a, hit_b, grid=grid)
    assert good.error.max() < 2e-4  # bilinear reading of a curved surface at 96 px
    assert 0.7 < float(good.compared.min()) < 1  # the far side of the ball is not seen from there
    assert float((good.compared + good.hidden).max()) <= 1
    # 0.01 nearer in view b: an error of 0.01, below the occlusion limit of 0.02
    moved = view_consistency(depth_a, first, depth_b - 0.01, second, hit_a, hit_b, grid=grid)
    torch.testing.assert_close(moved.error, torch.full((2,), 0.01, dtype=torch.float64), atol=3e-4, rtol=0)
    wrong_grid = "centers" if grid == "corners" else "corners"
    assert view_consistency(depth_a, first, depth_b, second, hit_a, hit_b, grid=wrong_grid).error.min() > 2e-4


def test_what_lies_behind_the_other_surface_is_hidden_not_wrong():
    camera = Camera.on_sphere(math.pi / 2, math.pi / 2, 16.0)
    depth, _ = ball_depth(camera, 32)
    plane = torch.full_like(depth, 1.0)
    result = view_consistency(plane, camera, plane - 0.5, camera)
    assert float(result.hidden) == 1 and float(result.compared) == 0 and bool(result.error.isnan())
    in_front = view_consistency(plane, camera, plane + 0.5, camera)
    assert float(in_front.error) == pytest.approx(0.5) and float(in_front.compared) == 1


def test_points_behind_the_other_camera_are_not_compared():
    front = Camera.on_sphere(math.pi / 2, math.pi / 2, 16.0)
    back = Camera.on_sphere(math.pi / 2, -math.pi / 2, 16.0)
    far = torch.full((1, 16, 16), 2.5)  # beyond the camera on the other side
    assert float(view_consistency(far, front, far, back).compared) == 0
