# SPDX-License-Identifier: Apache-2.0
"""Regularisers of a density field, at random points (EG3D, arXiv 2112.07945, supplement section 2).

``density`` maps points (N, P, 3) in scene units to raw densities (N, P, 1) or (N, P), before any activation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.losses.adversarial import at_least_float32
from facelab.tensors import constant

Density = Callable[[Tensor], Tensor]


def density_l1(density: Density, points: Tensor, offsets: Tensor) -> Tensor:
    """Mean |s(x) - s(x + d)|: neighbouring densities should agree. points and offsets (N, P, 3)."""
    here, there = _pair(density, points, points + offsets)
    return F.l1_loss(here, there)


def density_tv(density: Density, points: Tensor, step: float) -> Tensor:
    """Anisotropic total variation: mean over points of the sum of |s(x) - s(x + step e_i)| over the three axes."""
    shifts = step * torch.eye(3, device=points.device, dtype=points.dtype)
    moved = points[:, None] + shifts[None, :, None]  # (N, 3, P, 3)
    values = at_least_float32(density(torch.cat([points[:, None], moved], dim=1).flatten(1, 2)))
    values = values.reshape(len(points), 4, points.shape[1])
    return (values[:, 1:] - values[:, :1]).abs().sum(dim=1).mean()


def density_monotonic(density: Density, points: Tensor, step: float, detach: bool) -> Tensor:
    """Mean max(s(x) - s(x - step e_z), 0): density may not fall behind the surface.

    Faces look along +z, so a point ``step`` further along -z lies behind.

    Args:
        points: (N, P, 3).
        step: scene units.
        detach: the front point is a target without gradient, so that only the point behind learns.
    """
    back = constant((0.0, 0.0, -step), points.device, points.dtype)
    front, behind = _pair(density, points, points + back)
    return F.relu((front.detach() if detach else front) - behind).mean()


def _pair(density: Density, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    values = at_least_float32(density(torch.cat([first, second], dim=1)))
    return values[:, : first.shape[1]], values[:, first.shape[1] :]
