# SPDX-License-Identifier: Apache-2.0
"""Small numpy curves and falloffs from which the procedural head is built (lengths in centimetres)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """One piece of the head mesh.

    Attributes:
        name: ``skin``, ``hair``, ``l_eye`` ...
        points: (V, 3) rest positions in centimetres, subject's left = +x, y up, face towards +z.
        faces: (F, 3) corner indices, anticlockwise seen from outside.
        labels: (F,) CelebAMask-HQ class of each face.
        surface: (V, 2) coordinates on the part (its meaning is the part's own: strand angle and length ...).
    """

    name: str
    points: Array
    faces: NDArray[np.int64]
    labels: NDArray[np.int64]
    surface: Array


def spline(table: Array, at: Array) -> Array:
    """Catmull-Rom through rows of ``table`` (K, C) at fractional row numbers ``at`` (...,) -> (..., C).

    Row numbers are clamped to [0, K - 1]; the ends are extended linearly.
    """
    padded = np.concatenate([2 * table[:1] - table[1:2], table, 2 * table[-1:] - table[-2:-1]])
    at = np.clip(np.asarray(at, dtype=float), 0, len(table) - 1)
    left = np.minimum(at.astype(int), len(table) - 2)
    t = (at - left)[..., None]
    p0, p1, p2, p3 = (padded[left + k] for k in range(4))
    return 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)


def curve(knots: list[tuple[float, float]], at: Array) -> Array:
    """Smooth curve through (position, value) knots with ascending positions; constant beyond the ends.

    Monotone between knots (Fritsch-Carlson slopes), so a profile never swings past its knots.
    """
    x, y = np.array(knots, dtype=float).T
    step = np.diff(x)
    chord = np.diff(y) / step
    slope = np.zeros_like(y)
    same = chord[:-1] * chord[1:] > 0
    harmonic = 2 * chord[:-1] * chord[1:] / np.where(same, chord[:-1] + chord[1:], 1.0)
    slope[1:-1] = np.where(same, harmonic, 0.0)
    at = np.clip(np.asarray(at, dtype=float), x[0], x[-1])
    k = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(step) - 1)
    t = (at - x[k]) / step[k]
    h = step[k]
    return (
        y[k] * (1 + 2 * t) * (1 - t) ** 2
        + slope[k] * h * t * (1 - t) ** 2
        + y[k + 1] * t**2 * (3 - 2 * t)
        + slope[k + 1] * h * t**2 * (t - 1)
    )


def smoothstep(low: float, high: float, at: Array) -> Array:
    """0 below ``low``, 1 above ``high`` (either order), smooth between."""
    t = np.clip((np.asarray(at, dtype=float) - low) / (high - low), 0.0, 1.0)
    return t * t * (3 - 2 * t)


def bump(points: Array, centre: tuple[float, float], sigma: tuple[float, float], mirror: bool = True) -> Array:
    """Gaussian over the frontal plane, (V,) in (0, 1]; ``mirror`` puts it on both sides of the face."""
    x = np.abs(points[..., 0]) if mirror else points[..., 0]
    return np.exp(-0.5 * (((x - centre[0]) / sigma[0]) ** 2 + ((points[..., 1] - centre[1]) / sigma[1]) ** 2))


def blob(points: Array, centre: tuple[float, float, float], sigma: float | tuple[float, float, float]) -> Array:
    """Gaussian in space around a centre that is mirrored to both sides, (V,) in (0, 1]."""
    offset = np.stack([np.abs(points[..., 0]), points[..., 1], points[..., 2]], axis=-1) - np.array(centre)
    return np.exp(-0.5 * ((offset / np.array(sigma)) ** 2).sum(axis=-1))


def smooth_max(a: Array, b: Array, width: float) -> Array:
    """Maximum of two surfaces with a fillet of about ``width``."""
    return 0.5 * (a + b + np.sqrt((a - b) ** 2 + width**2))


def grid_faces(rows: int, columns: int, wrap: bool = False) -> NDArray[np.int64]:
    """Triangles of a rows x columns vertex grid, two a cell, cell by cell; ``wrap`` joins the last column to the first."""
    cells = columns if wrap else columns - 1
    row, column = np.meshgrid(np.arange(rows - 1), np.arange(cells), indexing="ij")
    right = (column + 1) % columns
    a, b = row * columns + column, row * columns + right
    c, d = a + columns, b + columns
    return np.stack([np.stack([a, c, b], -1), np.stack([b, c, d], -1)], axis=2).reshape(-1, 3)
