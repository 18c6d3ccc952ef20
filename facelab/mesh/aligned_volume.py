# SPDX-License-Identifier: Apache-2.0
"""A volume sampled along the rays of a camera -> a volume and a mesh in world axes.

A perspective volume (H, W, D) holds a field at the depths of every pixel's ray: rows from the top, columns from the
left, depths from near to far. Its cells are frusta; :func:`align_volume` resamples it to a box whose sides are as wide
as the view at the last depth, and :func:`aligned_mesh` puts marching cubes of the box into the scene.

``reference`` is StyleSDF's arithmetic, which differs in three ways: the widening between near and far is linear where
perspective asks for a reciprocal, the box is given the side far - near (2 percent more than the 12 degree view), and
a sample's place is index / n - 1/2, which is half a pixel off in x and y.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from facelab.cameras.camera import Camera
from facelab.errors import NoSurface
from facelab.mesh.depth_mesh import merge_equal_vertices
from facelab.mesh.io import Mesh


@dataclass(frozen=True)
class Frustum:
    """Where the samples of a perspective volume lie in their camera.

    Attributes:
        near, far: distances along the camera's axis in scene units.
        fov: full field of view in degrees; pixel i of n is at (i + 0.5) / n of the image.
        distance: of the camera to the origin, which it looks at.
        to_far: sample k of D is at near + (far - near) k / (D - 1); otherwise at k / D (StyleSDF's rays).

    Raises:
        ValueError: not 0 < near < far, or a field of view outside 0..180.
    """

    near: float = 0.88
    far: float = 1.12
    fov: float = 12.0
    distance: float = 1.0
    to_far: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.near < self.far or not 0 < self.fov < 180:
            raise ValueError(f"a frustum needs 0 < near < far and 0 < fov < 180, got {self}")

    def depths(self, count: int, like: Tensor | None = None) -> Tensor:
        """(count,) distances of the samples along the camera's axis."""
        dtype, device = (torch.float64, None) if like is None else (like.dtype, like.device)
        step = (self.far - self.near) / (count - 1 if self.to_far else count)
        return self.near + step * torch.arange(count, dtype=dtype, device=device)

    def half_side(self, count: int, depth: float) -> float:
        """Distance of the first of ``count`` pixels from the camera's axis at a depth."""
        return depth * math.tan(math.radians(self.fov) / 2) * (count - 1) / count


def align_volume(
    volume: Tensor, frustum: Frustum = Frustum(), *, outside: float = 1.0, reference: bool = False
) -> Tensor:
    """Resample a perspective volume to a box of the same shape, trilinearly.

    Args:
        volume: (H, W, D) values, see the module's text.
        frustum: where they were sampled.
        outside: value of cells that the camera did not see (1: outside of a signed distance).
        reference: the original's linear widening.

    Returns:
        (H, W, D): row, column and depth of the box; its last slice is that of ``volume``.

    Raises:
        ValueError: another shape or a side below 2.
    """
    if volume.ndim != 3 or min(volume.shape) < 2:
        raise ValueError(f"a perspective volume must be (H, W, D) with sides of at least 2, got {tuple(volume.shape)}")
    height, width, depth = volume.shape
    y, x, z = (torch.linspace(-1, 1, n, dtype=volume.dtype, device=volume.device) for n in volume.shape)
    if reference:
        widen = torch.linspace(frustum.far / frustum.near, 1, depth, dtype=volume.dtype, device=volume.device)
    else:
        depths = frustum.depths(depth, like=volume)
        widen = depths[-1] / depths
    shape = (height, width, depth)
    x = (x[None, :, None] * widen).expand(shape)
    y = (y[:, None, None] * widen).expand(shape)
    grid = torch.stack([z.expand(shape), x, y], dim=-1)  # last axis of the volume first
    looked_up = torch.nn.functional.grid_sample(
        volume[None, None], grid[None], mode="bilinear", padding_mode="border", align_corners=True
    )[0, 0]
    unseen = (x.abs() > 1) | (y.abs() > 1)
    return looked_up.masked_fill(unseen, outside)


def aligned_mesh(
    aligned: Tensor,
    frustum: Frustum = Frustum(),
    level: float = 0.0,
    *,
    camera: Camera | None = None,
    reference: bool = False,
) -> Mesh:
    """The surface of an aligned volume of distances (positive outside) as a mesh in the scene.

    Args:
        aligned: (H, W, D) from :func:`align_volume`.
        frustum: the same as there.
        level: value on the surface.
        camera: one camera whose rays the volume was sampled along; None: the frontal one, at (0, 0, distance).
        reference: the original's places (see the module's text); always the frontal camera.

    Returns:
        Mesh in scene units, counterclockwise seen from outside; equal vertices are merged in the reference.

    Raises:
        UserError: the level is outside the values of the volume; names their range.
        ValueError: another shape, or a camera together with ``reference``.
    """
    from skimage.measure import marching_cubes

    if aligned.ndim != 3 or min(aligned.shape) < 2:
        raise ValueError(f"an aligned volume must be (H, W, D) with sides of at least 2, got {tuple(aligned.shape)}")
    if reference and camera is not None:
        raise ValueError("the original's places are those of the frontal camera: give camera or reference, not both")
    if camera is not None and len(camera) != 1:
        raise ValueError(f"a volume has one camera, got {len(camera)}")
    values = np.ascontiguousarray(aligned.detach().cpu().float().permute(1, 0, 2).numpy())  # column, row, depth
    low, high = float(values.min()), float(values.max())
    if not low < level < high:
        raise NoSurface(
            f"no surface at level {level:g}: the volume goes from {low:.4g} to {high:.4g}; choose a level between"
        )
    vertices, faces, _, _ = marching_cubes(values, level)
    if reference:
        placed = (vertices / np.array(values.shape) - 0.5) * (frustum.far - frustum.near)
        placed[:, 1:] *= -1
        return merge_equal_vertices(Mesh(placed.astype(np.float32), faces.astype(np.int32)))
    return Mesh(_in_scene(vertices, values.shape, frustum, camera), faces.astype(np.int32))


def _in_scene(index: np.ndarray, shape: tuple[int, ...], frustum: Frustum, camera: Camera | None) -> np.ndarray:
    """(V, 3) column, row, depth numbers -> (V, 3) float32 scene units."""
    depths = frustum.depths(shape[2]).numpy()
    in_camera = np.empty(index.shape, dtype=np.float64)
    for axis in range(2):  # OpenCV: x right, y down
        half = frustum.half_side(shape[axis], depths[-1])
        in_camera[:, axis] = (2 * index[:, axis] / (shape[axis] - 1) - 1) * half
    in_camera[:, 2] = depths[0] + index[:, 2] * (depths[1] - depths[0])
    if camera is None:
        pose = np.diag([1.0, -1.0, -1.0, 1.0])
        pose[2, 3] = frustum.distance
    else:
        pose = camera.cam2world[0].detach().cpu().double().numpy()
    return (in_camera @ pose[:3, :3].T + pose[:3, 3]).astype(np.float32)
