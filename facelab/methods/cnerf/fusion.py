# SPDX-License-Identifier: Apache-2.0
"""How the values of the local generators become one field (CNeRF, section 3.2).

Shape legend: N scenes, K regions, R rays, S samples per ray, C features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from facelab.fields.output import FieldOutput
from facelab.fields.sdf import laplace_density

CARVE_WIDTH = 0.05  # scene units of distance for a share of one: how steep a cut is
EMPTY = 1e-6  # share of a point that no region claims goes to all regions alike


@dataclass(frozen=True)
class RegionValues:
    """What the local generators say of each point.

    Attributes:
        rgb: (N, K, R, S, 3) raw colours.
        sdf: (N, K, R, S) residual signed distances.
        mask: (N, K, R, S) raw masks, about 0..1 where a trained model shows a surface, unbounded elsewhere.
    """

    rgb: Tensor
    sdf: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Subset:
    """Some regions of a head.

    Attributes:
        channels: regions that stay.
        carve: the others are taken away: no density, colour, mask or feature of theirs remains. Without it only
            the features are restricted and everything else stays whole, as in the original.
    """

    channels: tuple[int, ...]
    carve: bool = True

    def __post_init__(self) -> None:
        if not self.channels or len(set(self.channels)) != len(self.channels):
            raise ValueError(f"expected one or more different regions, got {self.channels}")

    def check(self, regions: int) -> None:
        """ValueError for a channel that the model does not have."""
        if not 0 <= min(self.channels) <= max(self.channels) < regions:
            raise ValueError(f"expected regions 0 to {regions - 1}, got {self.channels}")


def fuse(values: RegionValues, base: Tensor, beta: Tensor, subset: Subset | None = None) -> FieldOutput:
    """Sum of the residual distances on the base, colours weighted by masks.

    Args:
        base: (N, R, S) signed distance of the base shape.
        beta: (1,) of the density.
        subset: see :class:`Subset`; the share of the kept regions at a point, :func:`kept_share`, scales its density
            and bounds its distance, so that a mesh ends where other regions take over.

    Returns:
        FieldOutput without features.
    """
    sdf = base + values.sdf.sum(1)
    rgb, mask = values.rgb, values.mask
    sigma = laplace_density(sdf, beta)
    if subset is not None and subset.carve:
        share = kept_share(mask, subset)
        sigma = sigma * share
        sdf = torch.maximum(sdf, CARVE_WIDTH * (0.5 - share))
        kept = torch.zeros(mask.shape[1], 1, 1, dtype=mask.dtype, device=mask.device)
        kept[list(subset.channels)] = 1
        mask = mask * kept
    color = torch.sigmoid((mask[..., None] * rgb).sum(1))
    return FieldOutput(sigma[..., None], color, mask.movedim(1, -1), sdf=sdf[..., None])


def kept_share(mask: Tensor, subset: Subset) -> Tensor:
    """(N, R, S) in [0, 1]: how much of what the masks claim at a point belongs to the kept regions; 1 for all."""
    claims = mask.clamp(0, 1)
    every = claims.sum(1)
    some = claims[:, list(subset.channels)].sum(1) if len(subset.channels) < mask.shape[1] else every
    return (some + EMPTY * len(subset.channels) / mask.shape[1]) / (every + EMPTY)


def fuse_features(features: Tensor, mask: Tensor) -> Tensor:
    """Features (N, K, R, S, C) weighted by masks (N, K, R, S) -> (N, R, S, C)."""
    return (mask[..., None] * features).sum(1)
