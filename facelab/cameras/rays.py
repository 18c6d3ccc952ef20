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
    """R rays for each of N cameras: ``directions`` and ``origins``, both (N, R, 3), world axes.

    Directions have unit length, except those of :func:`make_depth_rays`.
    ``limits`` (N, R, 2), first and last ray parameter of each ray, or None for those of the settings.
    ``views`` (N, R, 3), the unit view directions that a field sees, or None for the directions.
    """

    origins: Tensor
    directions: Tensor
    limits: Tensor | None = None
    views: Tensor | None = None

    def __len__(self) -> int:
        return self.origins.shape[1]

    def part(self, start: int, stop: int) -> Rays:
        """Rays ``start`` to ``stop`` of every camera."""
        limits = None if self.limits is None else self.limits[:, start:stop]
        views = None if self.views is None else self.views[:, start:stop]
        return Rays(self.origins[:, start:stop], self.directions[:, start:stop], limits, views)


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
    directions = torch.nn.functional.normalize(_camera_directions(camera, resolution, grid), dim=-1)
    directions = directions @ camera.cam2world[:, :3, :3].transpose(1, 2)
    return Rays(camera.cam2world[:, None, :3, 3].expand_as(directions), directions)


def make_depth_rays(camera: Camera, resolution: int, grid: Grid = "centers", static_views: bool = False) -> Rays:
    """Perspective rays whose parameter is the depth along the camera's axis (StyleSDF), row-major.

    Args:
        camera: N cameras.
        resolution: image side in pixels.
        grid: as in :func:`make_rays`.
        static_views: the field sees view directions in the camera's own OpenGL axes (x right, y up, looking along
            -z), the same for every camera, so that shading does not move with it; else those of the world.

    Returns:
        Rays with R = resolution**2, directions of length 1 / cos(angle to the axis), and unit ``views``.
    """
    local = _camera_directions(camera, resolution, grid)
    directions = local @ camera.cam2world[:, :3, :3].transpose(1, 2)
    seen = torch.cat([local[..., :1], -local[..., 1:]], dim=-1)  # no constant is copied: CUDA graphs can hold it
    views = torch.nn.functional.normalize(seen if static_views else directions, dim=-1)
    return Rays(camera.cam2world[:, None, :3, 3].expand_as(directions), directions, views=views)


def _camera_directions(camera: Camera, resolution: int, grid: Grid) -> Tensor:
    """(N, R, 3) directions in the camera's axes whose z is 1."""
    coordinates = pixel_coordinates(resolution, grid, camera.cam2world)
    v, u = torch.meshgrid(coordinates, coordinates, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1).reshape(1, -1, 3)
    x = (pixels[..., 0] - camera.intrinsics[:, 0, 2:3]) / camera.intrinsics[:, 0, 0:1]
    y = (pixels[..., 1] - camera.intrinsics[:, 1, 2:3]) / camera.intrinsics[:, 1, 1:2]
    x = x - camera.intrinsics[:, 0, 1:2] / camera.intrinsics[:, 0, 0:1] * y
    return torch.stack([x, y, torch.ones_like(x)], dim=-1)
