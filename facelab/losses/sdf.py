# SPDX-License-Identifier: Apache-2.0
"""Losses on signed distances and on the pose a discriminator reads (StyleSDF, arXiv 2112.11427, section 3.4).

Losses are 0-d tensors of at least float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.losses.adversarial import at_least_float32


def eikonal_loss(gradient: Tensor) -> Tensor:
    """Mean of ``(|gradient| - 1)^2``; gradient (..., 3) of the signed distance with respect to scene units."""
    return (at_least_float32(gradient).norm(dim=-1) - 1).square().mean()


def minimal_surface_loss(sdf: Tensor, sharpness: float = 100.0) -> Tensor:
    """Mean of ``exp(-sharpness |sdf|)``: few points should lie near a surface. ValueError unless sharpness > 0."""
    if not sharpness > 0:
        raise ValueError(f"sharpness must be positive (1 / scene unit), got {sharpness}")
    return torch.exp(-sharpness * at_least_float32(sdf).abs()).mean()


def viewpoint_loss(predicted: Tensor, angles: Tensor) -> Tensor:
    """Smooth L1 distance (quadratic below 1) between predicted and true azimuth and elevation, radians, both (N, 2).

    ValueError for different shapes.
    """
    if predicted.shape != angles.shape:
        raise ValueError(f"predicted angles have shape {tuple(predicted.shape)}, true ones {tuple(angles.shape)}")
    return F.smooth_l1_loss(at_least_float32(predicted), at_least_float32(angles))


def sphere_distance(points: Tensor, radius: float) -> Tensor:
    """Signed distance (..., 1) of points (..., 3) to the sphere of this radius around the origin; scene units."""
    return points.norm(dim=-1, keepdim=True) - radius


def sphere_loss(sdf: Tensor, points: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """What makes a field start as a sphere: the mean absolute difference, and the target.

    Args:
        sdf: (..., 1) predicted.
        points: (..., 3) where, scene units.
        radius: of the sphere; StyleSDF takes a quarter of far - near.

    Returns:
        loss, target (..., 1).
    """
    target = sphere_distance(at_least_float32(points), radius)
    if sdf.shape != target.shape:
        raise ValueError(f"sdf has shape {tuple(sdf.shape)}, expected {tuple(target.shape)} for these points")
    return F.l1_loss(at_least_float32(sdf), target), target
