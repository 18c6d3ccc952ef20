# SPDX-License-Identifier: Apache-2.0
"""A density field -> a triangle mesh, in scene units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from facelab.errors import NoSurface, UserError
from facelab.mesh.io import Mesh

PointFunction = Callable[[Tensor], Tensor]
MAX_POINTS = 100_000  # points per query of the field


@dataclass(frozen=True)
class Lattice:
    """resolution^3 query points in a cube of side ``cube_size`` (scene units) around the origin.

    The flat index runs over z fastest and x slowest. The clean lattice has integer indices; with
    ``reference`` it is pi-GAN's sheared one, whose y and x run up to one voxel too far within each
    row and slab because the original divides real numbers (in float32).

    Raises:
        UserError: fewer than two points per side, or a cube without size.
    """

    resolution: int
    cube_size: float
    reference: bool = False

    def __post_init__(self) -> None:
        if self.resolution < 2:
            raise UserError(f"the voxel resolution must be at least 2, got {self.resolution}")
        if not 0 < self.cube_size < float("inf"):
            raise UserError(f"the cube size must be a positive number of scene units, got {self.cube_size}")

    def __len__(self) -> int:
        return self.resolution**3

    @property
    def voxel_size(self) -> float:
        """Distance of neighbouring points, scene units."""
        return self.cube_size / (self.resolution - 1)

    @property
    def origin(self) -> float:
        """Coordinate of the first point on every axis."""
        return -self.cube_size / 2

    def points(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """Points ``start`` .. ``stop - 1`` -> (stop - start, 3) float32 x, y, z."""
        n = self.resolution
        index = torch.arange(start, stop, device=device)
        if self.reference:
            row = index.float() / n
            cells = torch.stack([(row / n) % n, row % n, (index % n).float()], dim=-1)
        else:
            cells = torch.stack([index // (n * n), index // n % n, index % n], dim=-1).float()
        return cells * self.voxel_size + self.origin

    def chunks(self, max_points: int = MAX_POINTS, device: torch.device | str = "cpu") -> Iterator[tuple[int, Tensor]]:
        """Yield (start, points) until all points were given, at most ``max_points`` at a time."""
        if max_points < 1:
            raise ValueError(f"max_points must be at least 1, got {max_points}")
        for start in range(0, len(self), max_points):
            yield start, self.points(start, min(start + max_points, len(self)), device)


def sample_volume(
    function: PointFunction, lattice: Lattice, max_points: int = MAX_POINTS, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Evaluate a field on a lattice -> (N, N, N) float32, x slowest.

    Args:
        function: (P, 3) points on ``device`` -> (P,) or (P, 1) values.
        lattice: where to evaluate.
        max_points: points per call, which bounds the memory that the field needs.
        device: where the field lives.

    Raises:
        ValueError: the function returns another shape or values that are not finite.
    """
    volume = np.empty(len(lattice), dtype=np.float32)
    with torch.no_grad():
        for start, points in lattice.chunks(max_points, device):
            volume[start : start + len(points)] = _values(function, points, 1)[:, 0]
    if not np.isfinite(volume).all():
        raise ValueError(f"the field is not finite at {int((~np.isfinite(volume)).sum())} of {volume.size} points")
    return volume.reshape((lattice.resolution,) * 3)


def extract_mesh(
    density: PointFunction,
    resolution: int = 256,
    cube_size: float = 0.3,
    level: float = 10.0,
    max_points: int = MAX_POINTS,
    color: PointFunction | None = None,
    *,
    inside: Literal["above", "below"] = "above",
    reference: bool = False,
    device: torch.device | str = "cpu",
) -> Mesh:
    """The surface where the field equals ``level``.

    Args:
        density: (P, 3) points -> (P,) or (P, 1) values.
        resolution: points per side of the lattice.
        cube_size: side of the cube around the origin, scene units.
        level: value of the field on the surface.
        max_points: points per call of ``density`` and ``color``.
        color: (P, 3) points -> (P, 3) colours in [0, 1], asked at the vertices.
        inside: which side of the level is solid: ``above`` for densities, ``below`` for distances.
        reference: query the original's sheared lattice (see :class:`Lattice`).
        device: where the field lives.

    Returns:
        Mesh in scene units whose faces turn counterclockwise seen from outside.

    Raises:
        UserError: the level is outside the values of the field; names their range.
    """
    lattice = Lattice(resolution, cube_size, reference)
    volume = sample_volume(density, lattice, max_points, device)
    mesh = mesh_from_volume(volume, lattice, level, inside)
    if color is None:
        return mesh
    return Mesh(mesh.vertices, mesh.faces, vertex_colors(color, mesh.vertices, max_points, device))


def mesh_from_volume(
    volume: np.ndarray, lattice: Lattice, level: float, inside: Literal["above", "below"] = "above"
) -> Mesh:
    """Marching cubes of an (N, N, N) volume, x slowest, placed on the (clean) lattice; see :func:`extract_mesh`."""
    from skimage.measure import marching_cubes

    low, high = float(volume.min()), float(volume.max())
    if not low < level < high:
        raise NoSurface(
            f"no surface at level {level:g}: the field goes from {low:.4g} to {high:.4g} "
            f"in the cube of side {lattice.cube_size:g}; choose a level between, or another cube size"
        )
    direction = "ascent" if inside == "above" else "descent"  # skimage counts turns left-handed
    vertices, faces, _, _ = marching_cubes(volume, level, gradient_direction=direction)
    vertices = vertices.astype(np.float32) * np.float32(lattice.voxel_size) + np.float32(lattice.origin)
    return Mesh(vertices, faces.astype(np.int32))


def vertex_colors(
    color: PointFunction, vertices: np.ndarray, max_points: int = MAX_POINTS, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Ask a colour field at V vertices -> (V, 3) uint8."""
    points = torch.from_numpy(vertices)
    with torch.no_grad():
        parts = [_values(color, part.to(device), 3) for part in points.split(max_points)]
    return (np.concatenate(parts) * 255 + 0.5).clip(0, 255).astype(np.uint8)


def _values(function: PointFunction, points: Tensor, width: int) -> np.ndarray:
    values = function(points)
    if values.shape not in ((len(points),), (len(points), width)) or (values.ndim == 1 and width != 1):
        raise ValueError(f"the field must return ({len(points)}, {width}) values, got {tuple(values.shape)}")
    return values.reshape(len(points), width).float().cpu().numpy()
