# SPDX-License-Identifier: Apache-2.0
"""What the authors' shape extraction adds to marching cubes, and their cross-section."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

OUTSIDE = -1000.0  # density given to the border of a volume
BORDER = 30 / 256  # of the side


def cross_section_points(resolution: int = 256, side: float = 1.2) -> Tensor:
    """(resolution^2, 3) points of the plane x = 0: y from +side / 2 down (rows), z from -side / 2 up (fastest)."""
    up = torch.linspace(-side / 2, side / 2, resolution)
    y, z = torch.meshgrid(up.flip(0), up, indexing="ij")
    return torch.stack([torch.zeros_like(y), y, z], dim=-1).reshape(-1, 3)


def trim_border(volume: np.ndarray, share: float = BORDER, value: float = OUTSIDE) -> np.ndarray:
    """A copy of an (N, N, N) volume whose outermost ``int(share * N)`` layers on every side are ``value``.

    It cuts the shoulders and what floats at the walls of the box.
    """
    layers = int(share * volume.shape[0])
    trimmed = np.full_like(volume, value)
    inner = (slice(layers, -layers or None),) * 3
    trimmed[inner] = volume[inner]
    return trimmed
