# SPDX-License-Identifier: Apache-2.0
"""Compiled CPU twin of :func:`facelab.data.synthetic_render.render_torch`: one thread a head.

Importing this module imports numba; :mod:`facelab.data.synthetic` does so on the first CPU batch.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

from facelab.cameras.camera import Camera
from facelab.data.synthetic_render import (
    GLOSS,
    INNER_HAIR,
    SHOULDER,
    SMOOTH,
    SQUARINGS,
    Pictures,
    Scene,
    half_vectors,
    ray_lengths,
)
from facelab.lighting import C0, C1, C2, C3, C4
from facelab.mesh.rasterize import project
from facelab.mesh.rasterize_numba import face_id_kernel

F = np.float32
INSIDE = np.float32(INNER_HAIR)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _normals(points, faces, normals):
    """Area weighted vertex normals, (V, 3) into ``normals`` (zeros)."""
    for f in range(faces.shape[0]):
        i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
        ax, ay, az = points[j, 0] - points[i, 0], points[j, 1] - points[i, 1], points[j, 2] - points[i, 2]
        bx, by, bz = points[k, 0] - points[i, 0], points[k, 1] - points[i, 1], points[k, 2] - points[i, 2]
        x, y, z = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
        for m in (i, j, k):
            normals[m, 0] += x
            normals[m, 1] += y
            normals[m, 2] += z
    for m in range(normals.shape[0]):
        length = np.sqrt(normals[m, 0] ** 2 + normals[m, 1] ** 2 + normals[m, 2] ** 2)
        if length > 1e-20:
            for c in range(3):
                normals[m, c] /= length


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _shade_sample(
    row, column, f, screen, faces, label, normals, colour, surface, light, half, gloss, squarings, phase, out
):
    """Shade one sample: ``out[0:3]`` colour, ``out[3:6]`` normal, ``out[6]`` camera z."""
    i0, i1, i2 = faces[f, 0], faces[f, 1], faces[f, 2]
    x0, x1, x2 = np.float64(screen[i0, 0]), np.float64(screen[i1, 0]), np.float64(screen[i2, 0])
    y0, y1, y2 = np.float64(screen[i0, 1]), np.float64(screen[i1, 1]), np.float64(screen[i2, 1])
    w0 = (x2 - x1) * (row - y1) - (y2 - y1) * (column - x1)
    w1 = (x0 - x2) * (row - y2) - (y0 - y2) * (column - x2)
    w2 = (x1 - x0) * (row - y0) - (y1 - y0) * (column - x0)
    area = w0 + w1 + w2
    w0, w1, w2 = w0 / screen[i0, 2], w1 / screen[i1, 2], w2 / screen[i2, 2]
    inverse = 1.0 / (w0 + w1 + w2)
    b0, b1, b2 = F(w0 * inverse), F(w1 * inverse), F(w2 * inverse)
    x = b0 * normals[i0, 0] + b1 * normals[i1, 0] + b2 * normals[i2, 0]
    y = b0 * normals[i0, 1] + b1 * normals[i1, 1] + b2 * normals[i2, 1]
    z = b0 * normals[i0, 2] + b1 * normals[i1, 2] + b2 * normals[i2, 2]
    scale = F(1.0) / max(np.sqrt(x * x + y * y + z * z), F(1e-12))
    if area > 0:
        scale = -scale
    x, y, z = x * scale, y * scale, z * scale
    factor = F(1.0)
    if label == 13 or label == 6 or label == 7:
        u0, u1, u2 = surface[i0, 0], surface[i1, 0], surface[i2, 0]
        if max(u0, u1, u2) - min(u0, u1, u2) > np.pi:
            u0 = u0 + F(2 * np.pi) if u0 < 0 else u0
            u1 = u1 + F(2 * np.pi) if u1 < 0 else u1
            u2 = u2 + F(2 * np.pi) if u2 < 0 else u2
        u = b0 * u0 + b1 * u1 + b2 * u2
        w = b0 * surface[i0, 1] + b1 * surface[i1, 1] + b2 * surface[i2, 1]
        p, q = phase[0], phase[1]
        if label == 13:
            wave = F(0.5) * np.sin(F(47) * u + F(3) * np.sin(F(4) * w + p) + q)
            wave += F(0.35) * np.sin(F(101) * u - F(5) * w + F(2) * q)
            factor = (INSIDE if area > 0 else F(1)) * (
                F(1) + F(0.17) * (wave + F(0.25) * np.sin(F(17) * u + F(7) * w + p))
            )
        else:
            factor = F(1) + F(0.22) * np.sin(F(44) * u + F(9) * w)
    shine = max(F(0), x * half[0] + y * half[1] + z * half[2])
    for _ in range(squarings[label]):
        shine = shine * shine
    shine = shine * gloss[label]
    xy, yz, zz, xz, difference = x * y, y * z, F(3) * z * z - F(1), x * z, x * x - y * y
    for c in range(3):  # ``light`` is already multiplied by the constants of the basis
        bright = light[0, c] + light[1, c] * y + light[2, c] * z + light[3, c] * x + light[4, c] * xy
        bright += light[5, c] * yz + light[6, c] * zz + light[7, c] * xz + light[8, c] * difference
        bright = max(bright, F(0))
        value = (b0 * colour[i0, c] + b1 * colour[i1, c] + b2 * colour[i2, c]) * factor * bright + shine
        value = max(value, F(0))
        if value >= SHOULDER:
            value = F(1 - (1 - SHOULDER) * np.exp((SHOULDER - value) / (1 - SHOULDER)))
        out[c] = value
    out[3], out[4], out[5] = x, y, z
    out[6] = area * inverse


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _one_label(face, labels, row, column, k, label):
    """Whether all k x k samples of a pixel show one class."""
    for i in range(row, row + k):
        for j in range(column, column + k):
            if face[i, j] < 0 or labels[face[i, j]] != label:
                return False
    return True


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _render(
    points,
    screen,
    colour,
    surface,
    faces,
    labels,
    light,
    half,
    gloss,
    squarings,
    smooth,
    phase,
    size,
    k,
    background,
    image,
    mask,
    depth,
    normal,
):
    """One head into ``image`` (3, S, S), ``mask`` (S, S), ``depth`` (S, S) camera z, ``normal`` (S, S, 3)."""
    fine = size * k
    buffer = np.full((fine, fine), F(np.inf), dtype=np.float32)
    face = np.full((fine, fine), -1, dtype=np.int32)
    face_id_kernel(screen, faces, fine, 0.0, np.inf, buffer, face)
    normals = np.zeros((points.shape[0], 3), dtype=np.float32)
    _normals(points, faces, normals)
    out = np.zeros(7)
    for row in range(size):
        for column in range(size):
            middle = face[row * k + k // 2, column * k + k // 2]
            if middle < 0:
                for c in range(3):
                    image[c, row, column] = np.uint8(background[c] * 255 + 0.5)
                continue
            red, green, blue = 0.0, 0.0, 0.0
            first, last = 0, k  # samples to shade
            if smooth[labels[middle]] and _one_label(face, labels, row * k, column * k, k, labels[middle]):
                first, last = k // 2, k // 2 + 1
            share = 1.0 / ((last - first) * (last - first))
            for i in range(row * k + first, row * k + last):
                for j in range(column * k + first, column * k + last):
                    f = face[i, j]
                    if f < 0:
                        red, green, blue = red + background[0], green + background[1], blue + background[2]
                        continue
                    _shade_sample(
                        i,
                        j,
                        f,
                        screen,
                        faces,
                        labels[f],
                        normals,
                        colour,
                        surface,
                        light,
                        half,
                        gloss,
                        squarings,
                        phase,
                        out,
                    )
                    red, green, blue = red + out[0], green + out[1], blue + out[2]
                    if i == row * k + k // 2 and j == column * k + k // 2:
                        depth[row, column] = out[6]
                        for c in range(3):
                            normal[row, column, c] = out[3 + c]
            image[0, row, column] = np.uint8(red * share * 255 + 0.5)
            image[1, row, column] = np.uint8(green * share * 255 + 0.5)
            image[2, row, column] = np.uint8(blue * share * 255 + 0.5)
            mask[row, column] = labels[middle]


def render_numba(
    scene: Scene, camera: Camera, size: int, grid: str, supersample: int, background: Tensor, threads: int = 2
) -> Pictures:
    """The CPU path; ``supersample`` is odd, ``threads`` heads are drawn at a time."""
    count = len(scene.vertices)
    screen = project(scene.vertices, camera, size, grid, supersample).numpy()
    points, colour = scene.vertices.contiguous().numpy(), scene.colour.contiguous().numpy()
    constants = torch.tensor([C0, C1, C1, C1, C2, C2, C3, C2, C4]).view(9, 1)
    light = (scene.light.float() * constants).numpy()
    phase, half = scene.phase.numpy(), half_vectors(scene.light, camera).numpy()
    faces, labels = scene.faces.int().numpy(), scene.labels.numpy()
    surface, gloss, squarings = scene.surface.numpy(), GLOSS.numpy(), SQUARINGS.numpy()
    backdrop = background.double().numpy()
    image = np.zeros((count, 3, size, size), np.uint8)
    mask = np.zeros((count, size, size), np.int64)
    depth = np.zeros((count, size, size), np.float32)
    normal = np.zeros((count, size, size, 3), np.float32)

    def one(n: int) -> None:
        shared = (
            surface,
            faces,
            labels,
            light[n],
            half[n],
            gloss,
            squarings,
            SMOOTH.numpy(),
            phase[n],
            size,
            supersample,
            backdrop,
        )
        _render(points[n], screen[n], colour[n], *shared, image[n], mask[n], depth[n], normal[n])

    if threads > 1 and count > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, range(count)))
    else:
        for n in range(count):
            one(n)
    distance = torch.from_numpy(depth) * ray_lengths(camera, size, grid)
    return Pictures(torch.from_numpy(image), torch.from_numpy(mask), distance, torch.from_numpy(normal))
