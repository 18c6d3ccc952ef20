# SPDX-License-Identifier: Apache-2.0
"""Light as second-order spherical harmonics: nine numbers, or nine per colour channel.

The basis is the real, orthonormal one without Condon-Shortley phase, evaluated at unit normals in world
axes (x to the subject's left, y up, z out of the face), in the order l(l+1)+m:

    Y = [c0, c1 y, c1 z, c1 x, c2 xy, c2 yz, c3 (3 z^2 - 1), c2 xz, c4 (x^2 - y^2)]

with c0 = 1 / (2 sqrt(pi)), c1 = sqrt(3 / (4 pi)), c2 = sqrt(15 / (4 pi)), c3 = sqrt(5 / (16 pi)), c4 = sqrt(15 / (16 pi)).
A light's coefficients L already contain the cosine lobe (Ramamoorthi and Hanrahan 2001), so shading is the plain
dot product Y(n) . L: the brightness of a white surface. A uniform light of brightness 1 is L = (2 sqrt(pi), 0, ...).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

C0 = 0.5 / math.sqrt(math.pi)
C1 = math.sqrt(3 / (4 * math.pi))
C2 = math.sqrt(15 / (4 * math.pi))
C3 = math.sqrt(5 / (16 * math.pi))
C4 = math.sqrt(15 / (16 * math.pi))
LOBE = (1.0, 2 / 3, 1 / 4)  # cosine lobe by order, divided by pi: radiance to brightness of a white surface


def basis(normals: Tensor) -> Tensor:
    """(..., 3) unit vectors -> (..., 9) basis values.

    >>> basis(torch.tensor([0.0, 0.0, 1.0]))[2].item() == torch.tensor(C1).item()
    True
    """
    x, y, z = normals.unbind(-1)
    one = torch.ones_like(x)
    values = [C0 * one, C1 * y, C1 * z, C1 * x, C2 * x * y, C2 * y * z, C3 * (3 * z * z - 1), C2 * x * z]
    return torch.stack([*values, C4 * (x * x - y * y)], dim=-1)


def shade(normals: Tensor, light: Tensor) -> Tensor:
    """Brightness of a white surface.

    Args:
        normals: (N, ..., 3) unit vectors in world axes.
        light: (N, 9) for white light or (N, 9, 3) for RGB.

    Returns:
        (N, ..., 1) or (N, ..., 3), at least 0. ValueError if ``light`` has another shape.
    """
    if light.ndim == 2:
        light = light[..., None]
    if light.ndim != 3 or light.shape[1] != 9 or light.shape[2] not in (1, 3):
        raise ValueError(f"light must be (N, 9) or (N, 9, 3), got {tuple(light.shape)}")
    flat = basis(normals).flatten(1, -2)
    return (flat @ light.to(flat)).clamp(min=0).view(*normals.shape[:-1], light.shape[-1])


def directional(direction: Tensor, strength: Tensor | float = 1.0) -> Tensor:
    """(N, 3) directions towards a distant lamp -> (N, 9); a surface that faces it gets about ``strength``.

    The second-order approximation of strength * max(0, n . d).
    """
    unit = torch.nn.functional.normalize(direction, dim=-1)
    lobe = torch.tensor([LOBE[0]] + [LOBE[1]] * 3 + [LOBE[2]] * 5, dtype=unit.dtype, device=unit.device) * math.pi
    strength = torch.as_tensor(strength, dtype=unit.dtype, device=unit.device).reshape(-1, 1)
    return basis(unit) * lobe * strength


def ambient(strength: Tensor | float, count: int = 1) -> Tensor:
    """(count, 9): the same brightness from everywhere."""
    value = torch.as_tensor(strength, dtype=torch.get_default_dtype())
    light = torch.zeros(count, 9, dtype=value.dtype, device=value.device)
    light[:, 0] = value / C0
    return light


def main_direction(light: Tensor) -> Tensor:
    """(N, 9) or (N, 9, 3) -> (N, 3) unit direction that most light comes from (+z if the light has none)."""
    grey = light.mean(dim=-1) if light.ndim == 3 else light
    direction = torch.stack([grey[:, 3], grey[:, 1], grey[:, 2]], dim=-1)
    still = direction.norm(dim=-1, keepdim=True) < 1e-8
    forward = torch.tensor([0.0, 0.0, 1.0], dtype=light.dtype, device=light.device)
    return torch.nn.functional.normalize(torch.where(still, forward, direction), dim=-1)
