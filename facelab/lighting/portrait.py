# SPDX-License-Identifier: Apache-2.0
"""Plausible lights of portraits from random numbers, and pictures of lights."""

from __future__ import annotations

import torch
from torch import Tensor

from facelab.lighting.harmonics import ambient, directional, shade

UNIFORMS = 8  # random numbers in one light


def random_light(count: int, generator: torch.Generator) -> Tensor:
    """(count, 9, 3) plausible portrait lights, see :func:`light_from_uniform`."""
    return light_from_uniform(torch.rand(count, UNIFORMS, generator=generator))


def light_from_uniform(numbers: Tensor) -> Tensor:
    """(N, 8) uniform random numbers -> (N, 9, 3): sky, a tinted key lamp from the front and above, a weak fill."""
    u = numbers.clamp(1e-6, 1 - 1e-6)

    def between(low: float, high: float, column: int) -> Tensor:
        return low + (high - low) * u[:, column]

    def lamp(yaw: Tensor, pitch: Tensor) -> Tensor:
        return torch.stack([pitch.cos() * yaw.sin(), pitch.sin(), pitch.cos() * yaw.cos()], dim=-1)

    yaw = (0.65 * torch.special.ndtri(u[:, 0])).clamp(-1.5, 1.5)
    key = directional(lamp(yaw, between(0.0, 1.0, 1)), between(0.45, 0.80, 2))
    fill = directional(lamp(-yaw.sign() * between(0.3, 1.4, 3), between(-0.3, 0.6, 4)), between(0.05, 0.25, 5))
    sky = ambient(between(0.44, 0.60, 6), len(u)).to(u)
    warmth = 0.025 * torch.special.ndtri(u[:, 7]).view(-1, 1, 1)
    tint = torch.tensor([1.0, 0.0, -1.0], dtype=u.dtype, device=u.device).view(1, 1, 3)
    return key[..., None] * (1 + warmth * tint) + (fill + sky)[..., None] * (1 - 0.5 * warmth * tint)


def sphere_picture(light: Tensor, size: int = 64) -> Tensor:
    """A white ball under each light, seen from the front: (N, 9) or (N, 9, 3) -> (N, 3, size, size) in [0, 1]."""
    axis = (torch.arange(size, dtype=torch.float32, device=light.device) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    inside = x * x + y * y <= 1
    z = (1 - x * x - y * y).clamp(min=0).sqrt()
    normals = torch.stack([x, y, z], dim=-1).expand(len(light), size, size, 3)
    brightness = shade(normals, light.float()) * inside[..., None]
    return brightness.expand(-1, -1, -1, 3).permute(0, 3, 1, 2).clamp(0, 1)
