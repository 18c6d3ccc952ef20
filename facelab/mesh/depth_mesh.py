# SPDX-License-Identifier: Apache-2.0
"""A map of surface points, one per pixel, -> a triangle mesh."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from facelab.mesh.io import Mesh


def depth_mesh(
    xyz: Tensor,
    *,
    keep: Tensor | None = None,
    max_stretch: float | None = None,
    colors: Tensor | None = None,
    reference: bool = False,
) -> Mesh:
    """Join the points of neighbouring pixels.

    Without ``keep`` and ``max_stretch`` every pixel is a vertex, in rows from the top left, and every cell of four
    pixels is two triangles; then the background of a rendering is a sheet behind the head and curtains hang from the
    head's outline to it.

    Args:
        xyz: (3, H, W) world positions of what the pixels see, scene units; H and W may differ.
        keep: (H, W) bool, the pixels that may be vertices, for instance ``background_probability < 0.5``. That alone
            drops the sheet and the curtains that end on it.
        max_stretch: drop triangles with an edge longer than so many times the median edge of its kind (along a row,
            along a column, diagonal). About 8 drops what is seen at less than 7 degrees: curtains, also those
            between parts of a head, where holes are left.
        colors: (3, H, W) uint8 RGB of the pixels.
        reference: the diagonals that StyleSDF's Delaunay triangulation (scipy, default options) happens to choose,
            instead of the one from top right to bottom left in every cell; the triangles' order is then scipy's too.

    Returns:
        Mesh whose faces turn counterclockwise seen from the camera; pixels without a face are left out if
        ``keep`` or ``max_stretch`` is given.

    Raises:
        ValueError: another shape, fewer than 2 x 2 pixels, positions that are not finite, or nothing left.
    """
    if xyz.ndim != 3 or xyz.shape[0] != 3 or min(xyz.shape[1:]) < 2:
        raise ValueError(f"xyz must be (3, H, W) with at least 2 x 2 pixels, got {tuple(xyz.shape)}")
    height, width = xyz.shape[1:]
    points = _rows(xyz).astype(np.float32)
    if not np.isfinite(points).all():
        raise ValueError(f"xyz is not finite at {int((~np.isfinite(points)).any(axis=1).sum())} pixels")
    paint = None
    if colors is not None:
        if tuple(colors.shape) != (3, height, width):
            raise ValueError(f"colors must be {(3, height, width)}, got {tuple(colors.shape)}")
        paint = _rows(colors)
    faces = delaunay_cells(height, width) if reference else grid_cells(height, width)
    if keep is None and max_stretch is None:
        return Mesh(points, faces, paint)
    if keep is not None:
        if tuple(keep.shape) != (height, width):
            raise ValueError(f"keep must be {(height, width)}, got {tuple(keep.shape)}")
        faces = faces[keep.detach().cpu().numpy().astype(bool).reshape(-1)[faces].all(axis=1)]
    if max_stretch is not None:
        faces = faces[~_stretched(points, faces, width, max_stretch)]
    if not len(faces):
        raise ValueError("no triangle is left: keep more pixels or allow a larger max_stretch")
    return compact(Mesh(points, faces, paint))


def grid_cells(height: int, width: int) -> np.ndarray:
    """(2 (H - 1) (W - 1), 3) int32 triangles over an image's pixels, counterclockwise as the image is seen.

    >>> grid_cells(2, 2).tolist()
    [[0, 2, 1], [1, 2, 3]]
    """
    number = np.arange(height * width, dtype=np.int32).reshape(height, width)
    a, b, c, d = number[:-1, :-1], number[:-1, 1:], number[1:, :-1], number[1:, 1:]
    return np.stack([a, c, b, b, c, d], axis=-1).reshape(-1, 3)


def delaunay_cells(height: int, width: int) -> np.ndarray:
    """The same area, triangulated by ``scipy.spatial.Delaunay`` of the points (column, row) in rows (StyleSDF).

    The four corners of a cell lie on one circle, so each diagonal is Qhull's choice.
    """
    from scipy.spatial import Delaunay

    row, column = np.divmod(np.arange(height * width), width)
    simplices = Delaunay(np.stack([column, row], axis=-1)).simplices
    return np.ascontiguousarray(simplices[:, [1, 0, 2]], dtype=np.int32)


def compact(mesh: Mesh) -> Mesh:
    """The mesh without vertices that no face uses; the rest keeps its order."""
    used = np.zeros(len(mesh.vertices), dtype=bool)
    used[mesh.faces] = True
    number = np.cumsum(used) - 1
    colors = None if mesh.colors is None else mesh.colors[used]
    return Mesh(mesh.vertices[used], number[mesh.faces].astype(np.int32), colors)


def merge_equal_vertices(mesh: Mesh, digits: int = 8) -> Mesh:
    """One vertex for all with the same coordinates to ``digits`` decimals; the first of each stays, in order.

    Unused vertices go too. With 8 digits this is what trimesh's constructor does to every mesh.
    """
    mesh = compact(mesh)
    key = np.round(mesh.vertices.astype(np.float64) * 10**digits).astype(np.int64)
    _, first, inverse = np.unique(key, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    kept = first[order]
    faces = rank[inverse.reshape(-1)][mesh.faces].astype(np.int32)
    return Mesh(mesh.vertices[kept], faces, None if mesh.colors is None else mesh.colors[kept])


def _rows(image: Tensor) -> np.ndarray:
    """(3, H, W) -> (H W, 3) array, rows from the top."""
    return np.ascontiguousarray(image.detach().cpu().permute(1, 2, 0).reshape(-1, 3).numpy())


def _stretched(points: np.ndarray, faces: np.ndarray, width: int, limit: float) -> np.ndarray:
    """(F,) bool: an edge is longer than ``limit`` times the median length of its kind."""
    ends = faces[:, [[0, 1], [1, 2], [2, 0]]]  # (F, 3 edges, 2)
    length = np.linalg.norm(points[ends[..., 0]] - points[ends[..., 1]], axis=-1)
    row, column = np.divmod(ends, width)
    kind = np.abs(np.diff(row, axis=-1))[..., 0] + 2 * np.abs(np.diff(column, axis=-1))[..., 0]
    too_long = np.zeros(len(faces), dtype=bool)
    for one in (1, 2, 3):  # along a column, along a row, diagonal
        chosen = kind == one
        if chosen.any():
            too_long |= ((length > limit * np.median(length[chosen])) & chosen).any(axis=1)
    return too_long
