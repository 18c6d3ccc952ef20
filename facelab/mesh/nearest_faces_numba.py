# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU twin of the search for the nearest faces: the same arithmetic in float64 and the same ties.

Importing this module imports numba; :mod:`facelab.mesh.nearest_faces` does so only when it is used.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _edge_distance(x0, y0, x1, y1, column, row):
    """Squared distance of a pixel to an edge, in pixels."""
    along_x, along_y = x1 - x0, y1 - y0
    offset_x, offset_y = column - x0, row - y0
    length = max(along_x * along_x + along_y * along_y, 1e-30)
    t = min(max((along_x * offset_x + along_y * offset_y) / length, 0.0), 1.0)
    rest_x, rest_y = offset_x - t * along_x, offset_y - t * along_y
    return rest_x * rest_x + rest_y * rest_y


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _border_distance(corner, column, row):
    """Squared distance of a pixel to the nearest edge of (3, 3) corners, in pixels."""
    first = _edge_distance(corner[1, 0], corner[1, 1], corner[2, 0], corner[2, 1], column, row)
    second = _edge_distance(corner[2, 0], corner[2, 1], corner[0, 0], corner[0, 1], column, row)
    third = _edge_distance(corner[0, 0], corner[0, 1], corner[1, 0], corner[1, 1], column, row)
    return min(first, second, third)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _areas(corner, column, row):
    """Edge functions of (3, 3) corners at a pixel, and whether it is inside."""
    x0, y0 = corner[0, 0], corner[0, 1]
    x1, y1 = corner[1, 0], corner[1, 1]
    x2, y2 = corner[2, 0], corner[2, 1]
    w0 = (x2 - x1) * (row - y1) - (y2 - y1) * (column - x1)
    w1 = (x0 - x2) * (row - y2) - (y0 - y2) * (column - x2)
    w2 = (x1 - x0) * (row - y0) - (y1 - y0) * (column - x0)
    return w0, w1, w2, (w0 >= 0 and w1 >= 0 and w2 >= 0) or (w0 <= 0 and w1 <= 0 and w2 <= 0)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _weights(corner, w0, w1, w2):
    """Depth and clamped perspective-correct weights from edge functions."""
    z0, z1, z2 = corner[0, 2], corner[1, 2], corner[2, 2]
    w0, w1, w2 = w0 / z0, w1 / z1, w2 / z2
    total = w0 + w1 + w2
    w0 = min(max(w0 / total, 0.0), 1.0)
    w1 = min(max(w1 / total, 0.0), 1.0)
    w2 = min(max(w2 / total, 0.0), 1.0)
    total = w0 + w1 + w2
    w0, w1, w2 = w0 / total, w1 / total, w2 / total
    return w0 * z0 + w1 * z1 + w2 * z2, w0, w1, w2


@numba.njit(nogil=True, cache=True, error_model="numpy")
def face_list_kernel(screen, faces, size, blur_radius, near, far, depth_buffer, face_buffer):
    """One mesh: (V, 3) float32 screen points -> the ids of the K nearest faces per pixel, nearest first.

    ``depth_buffer`` (size, size, K) float32 must hold infinity, ``face_buffer`` (size, size, K) int32 -1.
    """
    count = face_buffer.shape[2]
    scale = (2.0 / size) ** 2
    margin = np.sqrt(blur_radius) * size / 2
    corner = np.empty((3, 3))
    for f in range(faces.shape[0]):
        for k in range(3):
            for axis in range(3):
                corner[k, axis] = screen[faces[f, k], axis]
        if corner[:, 2].min() <= 0:
            continue
        left = np.ceil(max(0.0, corner[:, 0].min() - margin))
        right = np.floor(min(size - 1.0, corner[:, 0].max() + margin))
        top = np.ceil(max(0.0, corner[:, 1].min() - margin))
        bottom = np.floor(min(size - 1.0, corner[:, 1].max() + margin))
        if not (left <= right and top <= bottom):
            continue
        for row in range(int(top), int(bottom) + 1):
            for column in range(int(left), int(right) + 1):
                w0, w1, w2, inside = _areas(corner, column, row)
                if not inside and (blur_radius == 0 or _border_distance(corner, column, row) * scale >= blur_radius):
                    continue
                if w0 + w1 + w2 == 0:
                    continue
                exact, _, _, _ = _weights(corner, w0, w1, w2)
                if not near <= exact <= far:
                    continue
                depth = np.float32(exact)
                slot = count
                while slot > 0 and depth < depth_buffer[row, column, slot - 1]:
                    slot -= 1
                for later in range(count - 1, slot, -1):
                    depth_buffer[row, column, later] = depth_buffer[row, column, later - 1]
                    face_buffer[row, column, later] = face_buffer[row, column, later - 1]
                if slot < count:
                    depth_buffer[row, column, slot] = depth
                    face_buffer[row, column, slot] = f


@numba.njit(nogil=True, cache=True, error_model="numpy")
def describe_kernel(screen, faces, face_buffer, start, pixel, rank, face, weights, depth, distance):
    """Fill rows ``start`` ... of the output arrays with the pairs of one mesh; see ``NearFaces``."""
    size, count = face_buffer.shape[0], face_buffer.shape[2]
    scale = (2.0 / size) ** 2
    corner = np.empty((3, 3))
    p = start
    for row in range(size):
        for column in range(size):
            for slot in range(count):
                f = face_buffer[row, column, slot]
                if f < 0:
                    break
                for k in range(3):
                    for axis in range(3):
                        corner[k, axis] = screen[faces[f, k], axis]
                w0, w1, w2, inside = _areas(corner, column, row)
                depth[p], weights[p, 0], weights[p, 1], weights[p, 2] = _weights(corner, w0, w1, w2)
                squared = _border_distance(corner, column, row) * scale
                pixel[p], rank[p], face[p] = row * size + column, slot, f
                distance[p] = -squared if inside else squared
                p += 1


def near_faces(
    screen: Tensor, faces: Tensor, size: int, count: int, blur_radius: float, near: float, far: float
) -> tuple[Tensor, ...]:
    """(N, V, 3) screen points -> pixel, rank, face, barycentric, depth, distance of ``NearFaces``."""
    points = np.ascontiguousarray(screen.detach().numpy())
    corners = np.ascontiguousarray(faces.numpy(), dtype=np.int64)
    lists = np.full((len(points), size, size, count), -1, dtype=np.int32)

    def search(index: int) -> None:
        depth = np.full((size, size, count), np.inf, dtype=np.float32)
        face_list_kernel(points[index], corners, size, blur_radius, near, far, depth, lists[index])

    with ThreadPoolExecutor(min(len(points), os.cpu_count() or 1) or 1) as pool:
        list(pool.map(search, range(len(points))))
    ends = np.cumsum([int((part >= 0).sum()) for part in lists])
    total = int(ends[-1]) if len(ends) else 0
    pixel, rank, face = (np.empty(total, dtype=np.int64) for _ in range(3))
    weights, depth, distance = np.empty((total, 3)), np.empty(total), np.empty(total)
    for index, stop in enumerate(ends):
        start = int(ends[index - 1]) if index else 0
        describe_kernel(points[index], corners, lists[index], start, pixel, rank, face, weights, depth, distance)
        pixel[start:stop] += index * size * size
    return tuple(torch.from_numpy(field) for field in (pixel, rank, face, weights, depth, distance))
