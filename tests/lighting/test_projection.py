# SPDX-License-Identifier: Apache-2.0
"""Functions of direction as nine numbers: FaceDNeRF's lights, lobes, any function."""

from __future__ import annotations

import math

import pytest
import torch

from facelab import lighting
from facelab.errors import UserError


def points(count: int = 2000) -> torch.Tensor:
    """Evenly spread unit vectors (Fibonacci spiral), float64."""
    k = torch.arange(count, dtype=torch.float64) + 0.5
    y, angle = 1 - 2 * k / count, math.pi * (1 + 5**0.5) * k
    ring = (1 - y * y).sqrt()
    return torch.stack([ring * angle.cos(), y, ring * angle.sin()], dim=-1)


def test_a_function_made_of_the_basis_gives_its_numbers_back() -> None:
    wanted = torch.linspace(-1, 1, 9, dtype=torch.float64)
    for phase in (False, True):
        found = lighting.project(lambda t, p, on=phase: lighting.polar_basis(t, p, on) @ wanted, phase=phase)
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=0)


def test_the_phase_turns_the_sign_of_odd_m_only() -> None:
    theta, phi = torch.tensor([0.4, 1.0, 2.5]), torch.tensor([0.3, -2.0, 1.0])
    ratio = lighting.polar_basis(theta, phi, phase=True) / lighting.polar_basis(theta, phi)
    torch.testing.assert_close(ratio, torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1, 1]).expand(3, 9))


def test_many_offsets_are_one_call_and_agree_with_single_ones() -> None:
    offsets = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(1)) - 0.5
    together = lighting.project(lighting.PRESETS["below"], offsets, grid=30)
    assert together.shape == (2, 3, 9) and together.dtype == torch.float64
    torch.testing.assert_close(together[1, 2], lighting.project(lighting.PRESETS["below"], offsets[1, 2], grid=30))
    assert not torch.allclose(together[0, 0], together[1, 2], atol=1e-3)


def test_the_middles_are_what_a_jitter_of_a_half_gives_and_near_the_mean_of_random_ones() -> None:
    light = lighting.PRESETS["right"]
    middle = lighting.project(light)
    half = torch.full((100, 100, 2), 0.5)
    torch.testing.assert_close(lighting.project(light, jitter=half), middle, atol=0, rtol=0)
    generator = torch.Generator().manual_seed(0)
    random = [lighting.project(light, jitter=torch.rand(100, 100, 2, generator=generator)) for _ in range(30)]
    torch.testing.assert_close(torch.stack(random).mean(0), middle, atol=1e-3, rtol=0)


def test_a_table_made_in_inference_mode_serves_a_derivative() -> None:
    strength = torch.ones((), dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        lighting.project(lambda t, p: t.sin(), grid=17)
    (gradient,) = torch.autograd.grad(lighting.project(lambda t, p: strength * t.sin(), grid=17)[0], strength)
    assert float(gradient) == pytest.approx(math.pi**2 / (2 * math.sqrt(math.pi)), rel=1e-2)


def test_bad_offsets_jitter_and_functions_are_refused() -> None:
    light = lighting.PRESETS["right"]
    with pytest.raises(ValueError, match=r"offsets must be \(..., 2\)"):
        lighting.project(light, (0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="jitter must be"):
        lighting.project(light, jitter=torch.rand(99, 100, 2))
    with pytest.raises(ValueError, match="shape of its angles"):
        lighting.project(lambda t, p: t.sum())
    with pytest.raises(ValueError, match="grid must be"):
        lighting.project(light, grid=0)


def test_facednerfs_default_target_is_the_published_one() -> None:
    """The nine numbers that its authors' projection gives on average, to the three digits that are known."""
    expected = [0.554, -0.526, 0, 0.705, -0.787, 0, -0.474, 0, 0.233]
    assert lighting.reference_light("right").tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name, side, up", [("right", 1, 0), ("left", -1, 0), ("below", 0, -1), ("top_right", 1, 1)])
def test_presets_light_the_side_of_the_picture_that_they_name(name: str, side: int, up: int) -> None:
    x, y, z = lighting.main_direction(lighting.preset(name)[None])[0].tolist()
    assert (round(x * 0.9), round(y * 0.9)) == (side, up) and z > 0.3


def test_unknown_presets_name_the_nearest() -> None:
    with pytest.raises(UserError, match="no light named 'rigth'.*Did you mean 'right'"):
        lighting.preset("rigth")


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 4.0, 30.0])
def test_a_lobe_is_the_projection_of_its_function(sharpness: float) -> None:
    azimuth, elevation = 0.7, -0.3
    flat = math.cos(elevation)
    towards = torch.tensor([flat * math.sin(azimuth), math.sin(elevation), flat * math.cos(azimuth)]).double()
    light = lighting.lobe(azimuth, elevation, sharpness, intensity=0.8)
    wanted = lighting.light_from_function(lambda d: (1 - sharpness * (1 - d @ towards)).clamp(min=0), grid=400)
    facing = lighting.basis(towards.float()) @ wanted[0]
    torch.testing.assert_close(light, wanted * 0.8 / facing, atol=2e-3, rtol=0)
    assert float(lighting.basis(towards.float()) @ light[0]) == pytest.approx(0.8, abs=1e-5)


def test_a_small_lamp_is_a_directional_one_and_lobes_come_in_batches() -> None:
    light = lighting.lobe(torch.tensor([0.0, 0.5]), 0.0, sharpness=1e5)
    direction = torch.tensor([[0.0, 0.0, 1.0], [math.sin(0.5), 0.0, math.cos(0.5)]])
    facing = (lighting.basis(direction) * lighting.directional(direction)).sum(1, keepdim=True)
    torch.testing.assert_close(light, lighting.directional(direction) / facing, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="sharpness must be at least 0.5"):
        lighting.lobe(0.0, 0.0, sharpness=0.1)


def test_facednerfs_right_light_is_a_lobe() -> None:
    """4 sin(theta) cos(phi - 2.5) - 3 is a lobe of sharpness 4, at 2.5 - pi in DPR's ground plane."""
    light = lighting.preset("right")[None]
    angle = 2.5 + math.pi
    azimuth = math.atan2(math.cos(angle), -math.sin(angle))
    shape = lighting.lobe(azimuth, 0.0, 4.0)
    torch.testing.assert_close(light / light[0, 0], shape / shape[0, 0], atol=5e-3, rtol=0)


def test_even_light_of_one_is_brightness_one_and_colours_stay_apart() -> None:
    even = lighting.light_from_function(lambda d: d[:, 0] * 0 + 1)
    torch.testing.assert_close(even, lighting.ambient(1.0), atol=2e-4, rtol=0)
    colours = lighting.light_from_function(lambda d: torch.stack([d[:, 1].clamp(min=0)] * 2 + [d[:, 0] * 0], 1))
    assert colours.shape == (1, 9, 3) and not colours[..., 2].any() and colours[0, 1, 0] > 0.1
    with pytest.raises(ValueError, match="must be finite"):
        lighting.light_from_function(lambda d: d[:, 0] / 0)
