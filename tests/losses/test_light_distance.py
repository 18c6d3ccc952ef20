# SPDX-License-Identifier: Apache-2.0
"""The distance to a wanted light: what it adds up, what it refuses, and where its derivative goes."""

from __future__ import annotations

import pytest
import torch

from facelab.losses.lighting import light_distance, light_in, lightness
from facelab.nn.pretrained.light_estimator import LightEstimator


def corners(level: torch.Tensor) -> torch.Tensor:
    """A double of a light estimator: nine pixels of the picture."""
    return level[:, 0, :3, :3].flatten(1)


def test_sums_of_squares_for_each_picture() -> None:
    pictures = torch.rand(2, 3, 4, 4) * 2.4 - 1.2
    seen = lightness(pictures / 2 + 0.5)[:, 0, :3, :3].flatten(1)
    torch.testing.assert_close(light_in(corners, pictures), seen)
    wanted = torch.rand(2, 9)
    torch.testing.assert_close(light_distance(corners, pictures, wanted), (seen - wanted).square().sum(1))
    torch.testing.assert_close(light_distance(corners, pictures, wanted[0])[1], (seen[1] - wanted[0]).square().sum())
    for wrong in (torch.zeros(8), torch.zeros(3, 9), torch.zeros(1, 2, 9)):
        with pytest.raises(ValueError, match="light must be"):
            light_distance(corners, pictures, wrong)


def test_the_derivative_reaches_pixels_outside_the_range_and_no_weight() -> None:
    estimator = LightEstimator(side=None)
    pictures = (torch.rand(1, 3, 32, 32) * 3 - 1.5).requires_grad_()
    light_distance(estimator, pictures, torch.zeros(9)).sum().backward()
    assert pictures.grad is not None and pictures.grad.isfinite().all()
    outside = (pictures.detach().abs() > 1.2) & (pictures.grad.abs() > 0)
    assert outside.any()
    assert all(p.grad is None for p in estimator.parameters())


def test_steps_downhill_bring_the_light_nearer() -> None:
    estimator = LightEstimator(side=None)
    pictures = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    wanted = light_in(estimator, pictures.detach()) + 0.01
    first = float(light_distance(estimator, pictures, wanted).detach())
    optimiser = torch.optim.Adam([pictures], 0.03)
    for _ in range(40):
        optimiser.zero_grad()
        light_distance(estimator, pictures, wanted).sum().backward()
        optimiser.step()
    assert float(light_distance(estimator, pictures, wanted).detach()) < 0.3 * first
