# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU twin of the torch rasteriser: same arithmetic in float64, same ties, one pass per mesh.

Importing this module imports numba; :mod:`facelab.mesh.rasterize` does so only when it is used.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor


@numba.njit(nogil=True, cache=True, error_model="numpy")
def face_id_kernel(screen, faces, size, near, far, depth_buffer, face_buffer):
    """One mesh: (V, 3) float32 screen points -> the face id per pixel, written into ``face_buffer``.

    ``depth_buffer`` (size, size) float32 must hold infinity, ``face_buffer`` (size, size) int32 -1.
    """
    for f in range(faces.shape[0]):
        i0, i1, i2 = faces[f, 0], faces[f, 1], faces[f, 2]
        z0, z1, z2 = np.float64(screen[i0, 2]), np.float64(screen[i1, 2]), np.float64(screen[i2, 2])
        if z0 <= 0 or z1 <= 0 or z2 <= 0:
            continue
        x0, x1, x2 = np.float64(screen[i0, 0]), np.float64(screen[i1, 0]), np.float64(screen[i2, 0])
        left, right = np.ceil(max(0.0, min(x0, x1, x2))), np.floor(min(size - 1.0, max(x0, x1, x2)))
        if not left <= right:
            continue
        y0, y1, y2 = np.float64(screen[i0, 1]), np.float64(screen[i1, 1]), np.float64(screen[i2, 1])
        top, bottom = np.ceil(max(0.0, min(y0, y1, y2))), np.floor(min(size - 1.0, max(y0, y1, y2)))
        if not top <= bottom:
            continue
        for row in range(int(top), int(bottom) + 1):
            for column in range(int(left), int(right) + 1):
                w0 = (x2 - x1) * (row - y1) - (y2 - y1) * (column - x1)
                w1 = (x0 - x2) * (row - y2) - (y0 - y2) * (column - x2)
                w2 = (x1 - x0) * (row - y0) - (y1 - y0) * (column - x0)
                if not ((w0 >= 0 and w1 >= 0 and w2 >= 0) or (w0 <= 0 and w1 <= 0 and w2 <= 0)):
                    continue
                area = w0 + w1 + w2
                if area == 0:
                    continue
                depth = np.float32(1.0 / ((w0 / z0 + w1 / z1 + w2 / z2) / area))
                if depth < depth_buffer[row, column] and near <= depth <= far:
                    depth_buffer[row, column] = depth
                    face_buffer[row, column] = f


def face_ids(screen: Tensor, faces: Tensor, size: int, near: float, far: float) -> Tensor:
    """(N, V, 3) screen points -> (N, size, size) int64 ids of the nearest face, -1 for none."""
    points = np.ascontiguousarray(screen.detach().numpy(), dtype=np.float32 if screen.dtype != torch.float64 else None)
    corners = np.ascontiguousarray(faces.numpy(), dtype=np.int64)
    result = np.full((len(points), size, size), -1, dtype=np.int32)

    def one(index: int) -> None:
        depth = np.full((size, size), np.inf, dtype=np.float32)
        face_id_kernel(points[index], corners, size, near, far, depth, result[index])

    with ThreadPoolExecutor(min(len(points), os.cpu_count() or 1) or 1) as pool:
        list(pool.map(one, range(len(points))))
    return torch.from_numpy(result).long()
