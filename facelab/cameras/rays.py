# SPDX-License-Identifier: Apache-2.0
"""Rays through the pixels of a camera."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from facelab.cameras.camera import Camera

Grid = Literal["corners", "centers"]


@dataclass(frozen=True)
class Rays:
    """R rays for each of N cameras: unit ``directions`` and ``origins``, both (N, R, 3), world axes.

    ``limits`` (N, R, 2), first and last ray parameter of each ray, or None for those of the settings.
    """

    origins: Tensor
    directions: Tensor
    limits: Tensor | None = None

    def __len__(self) -> int:
        return self.origins.shape[1]

    def part(self, start: int, stop: int) -> Rays:
        """Rays ``start`` to ``stop`` of every camera."""
        limits = None if self.limits is None else self.limits[:, start:stop]
        return Rays(self.origins[:, start:stop], self.directions[:, start:stop], limits)


def pixel_coordinates(size: int, grid: Grid, like: Tensor) -> Tensor:
    """Normalised pixel coordinates: ``corners`` = inclusive 0..1 (pi-GAN), ``centers`` = (i + 0.5) / size."""
    if grid == "corners":
        return (torch.linspace(-1, 1, size, dtype=like.dtype, device=like.device) + 1) / 2
    if grid == "centers":
        return (torch.arange(size, dtype=like.dtype, device=like.device) + 0.5) / size
    raise ValueError(f"grid must be 'corners' or 'centers', got {grid!r}")


def make_rays(camera: Camera, resolution: int, grid: Grid = "corners") -> Rays:
    """Perspective rays of square images in row-major pixel order.

    Args:
        camera: N cameras.
        resolution: image side in pixels.
        grid: where the samples of a pixel row lie, see :func:`pixel_coordinates`.

    Returns:
        Rays with R = resolution**2 and unit directions, so that the ray parameter is a distance.
    """
    coordinates = pixel_coordinates(resolution, grid, camera.cam2world)
    v, u = torch.meshgrid(coordinates, coordinates, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1).reshape(1, -1, 3)
    x = (pixels[..., 0] - camera.intrinsics[:, 0, 2:3]) / camera.intrinsics[:, 0, 0:1]
    y = (pixels[..., 1] - camera.intrinsics[:, 1, 2:3]) / camera.intrinsics[:, 1, 1:2]
    x = x - camera.intrinsics[:, 0, 1:2] / camera.intrinsics[:, 0, 0:1] * y
    directions = torch.nn.functional.normalize(torch.stack([x, y, torch.ones_like(x)], dim=-1), dim=-1)
    directions = directions @ camera.cam2world[:, :3, :3].transpose(1, 2)
    return Rays(camera.cam2world[:, None, :3, 3].expand_as(directions), directions)
