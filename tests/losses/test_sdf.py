# SPDX-License-Identifier: Apache-2.0
"""Losses on signed distances and viewpoints."""

from __future__ import annotations

import math

import pytest
import torch

from facelab.losses.sdf import eikonal_loss, minimal_surface_loss, sphere_distance, sphere_loss, viewpoint_loss


def test_eikonal_is_zero_for_distances_and_one_for_constants() -> None:
    unit = torch.nn.functional.normalize(torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert eikonal_loss(unit).item() == pytest.approx(0, abs=1e-10)
    assert eikonal_loss(3 * unit).item() == pytest.approx(4)
    assert eikonal_loss(torch.zeros(2, 3)).item() == 1


def test_minimal_surface_counts_points_near_the_surface() -> None:
    loss = minimal_surface_loss(torch.tensor([0.0, 0.01, -0.01, 1.0]), 100.0)
    assert loss.item() == pytest.approx((1 + 2 * math.exp(-1)) / 4)
    with pytest.raises(ValueError, match="sharpness must be positive"):
        minimal_surface_loss(torch.zeros(1), 0.0)


def test_viewpoint_is_quadratic_then_linear() -> None:
    true = torch.zeros(1, 2)
    assert viewpoint_loss(torch.tensor([[0.5, 3.0]]), true).item() == pytest.approx((0.125 + 2.5) / 2)
    with pytest.raises(ValueError, match="true ones"):
        viewpoint_loss(torch.zeros(3, 2), torch.zeros(3, 1))


def test_sphere_is_negative_inside() -> None:
    points = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.06, 0.0], [0.1, 0.0, 0.0]])
    assert sphere_distance(points, 0.06).flatten().tolist() == pytest.approx([-0.06, 0, 0.04])
    loss, target = sphere_loss(torch.zeros(3, 1), points, 0.06)
    assert loss.item() == pytest.approx(0.1 / 3) and target.shape == (3, 1)
    with pytest.raises(ValueError, match="sdf has shape"):
        sphere_loss(torch.zeros(3), points, 0.06)


def test_half_precision_is_summed_in_float32() -> None:
    assert eikonal_loss(torch.full((4, 3), 2.0, dtype=torch.bfloat16)).dtype == torch.float32
    assert minimal_surface_loss(torch.zeros(2, dtype=torch.float16)).dtype == torch.float32
