# SPDX-License-Identifier: Apache-2.0
"""The light in a picture whose surface is known: least squares over pixels, no network.

Brightness of a matt surface is albedo times Y(n) . L, linear in the light. Over pixels of about one albedo (skin) the
nine numbers times that albedo follow from brightness and normals. A picture shows one side of a head only, so that some
mixtures of the numbers hardly change it; what the picture leaves open is taken from the mean and covariance of lights
that consist of even light and two lamps somewhere in front.

N pictures of H x W pixels.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from facelab.lighting.harmonics import C0, ambient, basis, directional, shade

NOISE = 0.03  # of the mean brightness: what a pixel's brightness is off a matt surface's by
FEWEST = 50  # pixels


def fit_light(brightness: Tensor, normals: Tensor, mask: Tensor, noise: float = NOISE) -> Tensor:
    """The most probable light, times the albedo: compare after dividing by the first number.

    Args:
        brightness: (N, H, W), in the space in which the pictures are shaded.
        normals: (N, H, W, 3) unit vectors, world axes.
        mask: (N, H, W) bool, pixels of about one albedo and neither in cast shadow nor glossy.
        noise: trust in the usual lights against the pixels, relative to the mean brightness.

    Returns:
        (N, 9) world light. ValueError for other shapes or fewer than 50 pixels in a mask.
    """
    _check(brightness, normals, mask)
    weight = mask.flatten(1).double()
    share = weight / weight.sum(1, keepdim=True)
    values = basis(normals.double()).flatten(1, 2)
    from_pixels = torch.einsum("np,npi,npj->nij", share, values, values)
    seen = torch.einsum("np,npi,np->ni", share, values, brightness.double().flatten(1))
    usual = (noise * C0) ** 2 * _usual_lights().to(seen.device)
    return torch.linalg.solve(from_pixels + usual, seen).to(brightness)


@functools.lru_cache(maxsize=1)
def _usual_lights(count: int = 4000) -> Tensor:
    """(9, 9) float64 matrix Q: L Q L is the squared Mahalanobis distance of L from the usual lights, times L_0^2."""
    with torch.inference_mode(False):
        numbers = torch.rand(count, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        height, angle = 2 * numbers[..., 0] - 1, math.pi * numbers[..., 1]
        flat = (1 - height.square()).sqrt()
        towards = torch.stack([flat * angle.cos(), height, flat * angle.sin()], dim=-1)
        key = directional(towards[:, 0], 0.2 + 2.3 * numbers[:, 0, 2])
        fill = directional(towards[:, 1], 0.6 * numbers[:, 1, 2])
        light = ambient(1.0).double() + key + fill
        relative = light[:, 1:] / light[:, :1]
        away = torch.cat([-relative.mean(0)[:, None], torch.eye(8, dtype=torch.float64)], dim=1)
        return away.T @ torch.linalg.inv(torch.cov(relative.T)) @ away


def shading_correlation(brightness: Tensor, normals: Tensor, mask: Tensor, light: Tensor) -> Tensor:
    """How a picture's brightness goes along with a light's shading of its surface.

    Args:
        brightness, normals, mask: as in :func:`fit_light`.
        light: (N, 9) in the axes of the normals; its strength does not matter.

    Returns:
        (N,) correlations over the mask: 1 for a surface of one albedo under this very light. ValueError as above.
    """
    _check(brightness, normals, mask)
    if light.shape != (len(brightness), 9):
        raise ValueError(f"light must be ({len(brightness)}, 9), got {tuple(light.shape)}")
    wanted = shade(normals.double(), light.double())[..., 0].flatten(1)
    seen, weight = brightness.double().flatten(1), mask.flatten(1).double()
    weight = weight / weight.sum(1, keepdim=True)
    seen, wanted = (v - (v * weight).sum(1, keepdim=True) for v in (seen, wanted))
    power = ((seen.square() * weight).sum(1) * (wanted.square() * weight).sum(1)).sqrt()
    return ((seen * wanted * weight).sum(1) / power.clamp(min=1e-12)).to(brightness)


def _check(brightness: Tensor, normals: Tensor, mask: Tensor) -> None:
    if brightness.ndim != 3 or normals.shape != (*brightness.shape, 3) or mask.shape != brightness.shape:
        shapes = [tuple(t.shape) for t in (brightness, normals, mask)]
        raise ValueError(f"brightness, normals and mask must be (N, H, W), (N, H, W, 3), (N, H, W), got {shapes}")
    if mask.dtype != torch.bool or int(mask.flatten(1).sum(1).min()) < FEWEST:
        raise ValueError(f"a mask must be bool with at least {FEWEST} pixels for each picture")
