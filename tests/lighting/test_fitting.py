# SPDX-License-Identifier: Apache-2.0
"""The light in pictures of known surfaces: exact on matt balls, near on synthetic heads."""

from __future__ import annotations

import math

import pytest
import torch

from facelab import lighting
from facelab.data.synthetic import SyntheticBatch, SyntheticHeads
from facelab.data.synthetic_sampling import sample_heads


def lamps(count: int, seed: int) -> torch.Tensor:
    """(count, 9) even light and a lamp somewhere in front."""
    generator = torch.Generator().manual_seed(seed)
    azimuth, elevation = (torch.rand(2, count, generator=generator) * 2 - 1) * torch.tensor([[1.4], [0.9]])
    flat = elevation.cos()
    towards = torch.stack([flat * azimuth.sin(), elevation.sin(), flat * azimuth.cos()], dim=-1)
    return lighting.directional(towards, 0.6) + lighting.ambient(0.4)


def heads_under(light: torch.Tensor, seed: int) -> tuple[SyntheticBatch, torch.Tensor]:
    """Heads in drawn poses, and their skin without its border."""
    heads = SyntheticHeads(seed=seed, size=128, supersample=1, grid="centers", threads=1)
    numbers = heads.numbers(torch.arange(len(light)))
    people = sample_heads(heads.model, numbers)
    found = heads.render(people, heads.cameras(numbers), light[..., None].expand(-1, -1, 3))
    other = ((found.mask != 1) & (found.mask != 2)).float()[:, None]
    return found, torch.nn.functional.max_pool2d(other, 5, 1, 2)[:, 0] == 0


def ball(count: int, size: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    normals = torch.stack([x, y, (1 - x * x - y * y).clamp(min=0).sqrt()], dim=-1)
    return normals.expand(count, -1, -1, -1), (x * x + y * y < 0.98).expand(count, -1, -1)


def test_a_matt_ball_gives_its_light_whatever_its_albedo() -> None:
    light = lamps(6, 1)
    normals, mask = ball(6)
    brightness = 0.37 * lighting.shade(normals, light)[..., 0]
    found = lighting.fit_light(brightness, normals, mask, noise=1e-4)
    torch.testing.assert_close(found, 0.37 * light, atol=5e-3, rtol=0)
    torch.testing.assert_close(lighting.shading_correlation(brightness, normals, mask, 3 * light), torch.ones(6))


def test_what_a_picture_leaves_open_is_taken_from_usual_lights() -> None:
    """A third of a ball under a lamp at its side: still a light like others, not a wild one that fits by accident."""
    light = lamps(4, 2)
    normals, mask = ball(4)
    mask = mask & (normals[..., 0] > 0.3)
    brightness = lighting.shade(normals, light)[..., 0] + 0.02 * torch.randn(4, 40, 40)
    found = lighting.fit_light(brightness, normals, mask)
    assert (found - light)[:, 1:].abs().max() < 0.4
    torch.testing.assert_close(lighting.fit_light(5 * brightness, normals, mask), 5 * found, atol=1e-4, rtol=1e-4)


def test_the_light_of_synthetic_heads_is_found() -> None:
    light = lamps(24, 3)
    batch, skin = heads_under(light, seed=12)
    brightness = batch.image.float().mean(1) / 255
    found = lighting.fit_light(brightness, batch.normal, skin)
    agreement = lighting.light_agreement(found * (light[:, :1] / found[:, :1]), light)
    assert math.degrees(agreement.angle) < 9
    assert agreement.correlation[1:].min() > 0.7
    assert agreement.mean_error[1:].mean() < 0.45 * agreement.guess_error[1:].mean()
    right = lighting.shading_correlation(brightness, batch.normal, skin, light)
    wrong = lighting.shading_correlation(brightness, batch.normal, skin, light.roll(1, 0))
    assert right.median() > 0.93 and (right > wrong).float().mean() > 0.9


def test_bad_input_is_refused() -> None:
    normals, mask = ball(2)
    brightness = torch.rand(2, 40, 40)
    with pytest.raises(ValueError, match="at least 50 pixels"):
        lighting.fit_light(brightness, normals, mask & (normals[..., 0] > 0.97))
    with pytest.raises(ValueError, match="brightness, normals and mask must be"):
        lighting.fit_light(brightness[:, None], normals, mask)
    with pytest.raises(ValueError, match=r"light must be \(2, 9\)"):
        lighting.shading_correlation(brightness, normals, mask, torch.zeros(1, 9))
