# SPDX-License-Identifier: Apache-2.0
"""Spherical harmonics: orthonormal basis, the cosine lobe, and pictures of lights."""

from __future__ import annotations

import math

import pytest
import torch

from facelab import lighting


def sphere(count: int = 20_000) -> torch.Tensor:
    """Evenly spread unit vectors (Fibonacci spiral), float64."""
    k = torch.arange(count, dtype=torch.float64) + 0.5
    y, angle = 1 - 2 * k / count, math.pi * (1 + 5**0.5) * k
    ring = (1 - y * y).sqrt()
    return torch.stack([ring * angle.cos(), y, ring * angle.sin()], dim=-1)


def test_basis_is_orthonormal() -> None:
    values = lighting.basis(sphere())
    gram = values.T @ values * (4 * math.pi / len(values))
    assert torch.allclose(gram, torch.eye(9, dtype=torch.float64), atol=2e-3)


def test_directional_light_is_the_projected_cosine() -> None:
    """Coefficients of max(0, n . d), integrated numerically."""
    points = sphere()
    direction = torch.nn.functional.normalize(torch.tensor([[0.3, 0.5, 0.8]], dtype=torch.float64), dim=-1)
    cosine = (points @ direction[0]).clamp(min=0)
    expected = (lighting.basis(points) * cosine[:, None]).mean(dim=0) * 4 * math.pi
    assert torch.allclose(lighting.directional(direction)[0], expected, atol=2e-3)


def test_ambient_is_even() -> None:
    brightness = lighting.shade(sphere(50)[None], lighting.ambient(0.7).double())
    assert torch.allclose(brightness, torch.full_like(brightness, 0.7), atol=1e-6)


def test_shade_shapes_and_errors() -> None:
    normals = sphere(12).float().view(1, 3, 4, 3).expand(2, -1, -1, -1)
    assert lighting.shade(normals, torch.zeros(2, 9)).shape == (2, 3, 4, 1)
    assert lighting.shade(normals, torch.zeros(2, 9, 3)).shape == (2, 3, 4, 3)
    with pytest.raises(ValueError, match="light must be"):
        lighting.shade(normals, torch.zeros(2, 27))


def test_main_direction_points_at_the_lamp() -> None:
    lamp = torch.nn.functional.normalize(torch.tensor([[0.2, 0.9, 0.4], [-1.0, 0.0, 0.3]]), dim=-1)
    light = lighting.directional(lamp) + lighting.ambient(0.5)
    assert torch.allclose(lighting.main_direction(light), lamp, atol=1e-5)
    assert lighting.main_direction(lighting.ambient(1.0))[0].tolist() == [0, 0, 1]


def test_random_lights_are_plausible_and_repeatable() -> None:
    lights = lighting.random_light(200, torch.Generator().manual_seed(1))
    assert torch.equal(lights, lighting.random_light(200, torch.Generator().manual_seed(1)))
    front = lighting.shade(torch.tensor([0.0, 0.0, 1.0]).expand(200, 1, 3), lights)
    below = lighting.shade(torch.tensor([0.0, -1.0, 0.0]).expand(200, 1, 3), lights)
    assert front.min() > 0.3 and front.max() < 2.0
    assert (front.mean(-1) > below.mean(-1)).float().mean() > 0.95  # lit from the front and above


def test_sphere_picture() -> None:
    light = lighting.directional(torch.tensor([[1.0, 0.0, 0.3]])) + lighting.ambient(0.2)
    picture = lighting.sphere_picture(light, 32)
    assert picture.shape == (1, 3, 32, 32)
    assert picture[0, 0, 16, 28] > picture[0, 0, 16, 4]  # brighter on the right, where the lamp is
    assert picture[0, :, 0, 0].abs().sum() == 0
