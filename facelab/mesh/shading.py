# SPDX-License-Identifier: Apache-2.0
"""Shaded pictures of meshes: a point light, Phong's reflection, smooth normals, a plain background.

The defaults are the pictures of StyleSDF and CNeRF: light at (0, 1, 5), ambient 0.1, diffuse 0.65, specular 0.2 with
exponent 64, white surface on white, both sides visible. ``nearest`` shows the nearest face of each pixel; ``blend``
mixes the five nearest by the original's formula (see :func:`blend_weights`), which softens where surfaces lie within
about 0.01 scene units behind each other.

Everything is torch and runs where the surface's tensors are; on the CPU the z-buffer is compiled with numba.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from facelab.cameras.camera import Camera
from facelab.errors import nearest
from facelab.mesh.io import Mesh
from facelab.mesh.nearest_faces import nearest_faces
from facelab.mesh.normals import angle_weighted_normals
from facelab.mesh.rasterize import choose_backend, rasterize

Color = tuple[float, float, float]
MODES = ("nearest", "blend")
WHITE: Color = (1.0, 1.0, 1.0)
BLEND_FACES = 5
BLUR_RADIUS = 1e-6  # squared, in an image that is 2 wide
SIGMA = GAMMA = 1e-4  # softness across a face's border and in depth
Z_NEAR, Z_FAR = 0.01, 100.0  # of the original's camera; they only scale GAMMA
BACKGROUND_WEIGHT = 1e-10

# N images, S image size, V vertices, F faces, P shaded places


@dataclass(frozen=True)
class PointLight:
    """A lamp without attenuation.

    Attributes:
        position: x, y, z in scene units; with ``attached`` in the axes in which the camera is at (0, 0, 1).
        ambient, diffuse, specular: brightness of each part for a white surface.
        shininess: Phong's exponent.
        attached: the lamp goes with the camera, as if the mesh were turned before both.
    """

    position: tuple[float, float, float] = (0.0, 1.0, 5.0)
    ambient: float = 0.1
    diffuse: float = 0.65
    specular: float = 0.2
    shininess: float = 64.0
    attached: bool = False

    def scaled(self, factor: float) -> PointLight:
        """The same light in a scene ``factor`` times as large."""
        x, y, z = self.position
        return replace(self, position=(x * factor, y * factor, z * factor))

    def positions(self, camera: Camera) -> Tensor:
        """(N, 3) world positions for N cameras."""
        here = torch.tensor(self.position, dtype=camera.cam2world.dtype, device=camera.device)
        if not self.attached:
            return here.expand(len(camera), 3)
        eye = camera.cam2world[:, :3, 3]
        x, y, z = (here * eye.norm(dim=-1, keepdim=True)).unbind(-1)
        right, down, forward = camera.cam2world[:, :3, :3].unbind(-1)
        # (0, 0, 1) of the light's axes is the camera's place, which need not be opposite to where it looks
        return eye + x[:, None] * right - y[:, None] * down - (z - eye.norm(dim=-1))[:, None] * forward


@dataclass(frozen=True)
class Surface:
    """A mesh as tensors, prepared once and shaded many times.

    Attributes:
        vertices: (V, 3) float32, scene units.
        faces: (F, 3) int64.
        normals: (V, 3) float32 smooth unit normals.
        colors: (V, 3) float32 in 0..1, or None for white.
    """

    vertices: Tensor
    faces: Tensor
    normals: Tensor
    colors: Tensor | None = None

    @staticmethod
    def of(mesh: Mesh, device: torch.device | str = "cpu", *, colored: bool = True) -> Surface:
        """With angle weighted normals, which do not show how flat cells were cut; ``colored``: use its colours."""
        normals = angle_weighted_normals(mesh.vertices, mesh.faces).astype(np.float32)
        colors = None
        if colored and mesh.colors is not None:
            colors = torch.from_numpy(mesh.colors).to(device).float() / 255
        return Surface(
            torch.from_numpy(np.ascontiguousarray(mesh.vertices, dtype=np.float32)).to(device),
            torch.from_numpy(mesh.faces.astype(np.int64)).to(device),
            torch.from_numpy(normals).to(device),
            colors,
        )


def shade_mesh(
    mesh: Mesh | Surface,
    camera: Camera,
    size: int,
    *,
    light: PointLight = PointLight(),
    mode: Literal["nearest", "blend"] = "nearest",
    background: Color = WHITE,
    supersample: int = 1,
    near: float = 1e-6,
    far: float = float("inf"),
    backend: str = "auto",
) -> Tensor:
    """Pictures of a mesh: (N, 3, S, S) uint8 for N cameras, on the device of the surface; see :func:`shade_values`."""
    values = shade_values(
        mesh, camera, size, light=light, mode=mode, background=background, supersample=supersample, near=near, far=far,
        backend=backend,
    )  # fmt: skip
    return (values * 255 + 0.5).to(torch.uint8).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def shade_values(
    mesh: Mesh | Surface,
    camera: Camera,
    size: int,
    *,
    light: PointLight = PointLight(),
    mode: Literal["nearest", "blend"] = "nearest",
    background: Color = WHITE,
    supersample: int = 1,
    near: float = 1e-6,
    far: float = float("inf"),
    backend: str = "auto",
) -> Tensor:
    """The same as numbers: (N, S, S, 3) float32 in 0..1. There is no gradient.

    Args:
        mesh: a mesh (on the CPU, in its colours if it has any) or a prepared surface.
        camera: N cameras.
        size: pixels per side; pixel i is at (i + 0.5) / size, where StyleSDF's rays are.
        light: see :class:`PointLight`.
        mode: ``nearest`` or ``blend`` (the original's, slower).
        background: colour where no face is, 0..1.
        supersample: k x k samples per pixel are averaged, which smooths outlines.
        near, far: range of camera z, scene units: what lies outside is not seen.
        backend: of the search for faces, see :func:`facelab.mesh.rasterize`.

    Raises:
        ValueError: an unknown mode or a size below 1.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}.{nearest(mode, MODES)}")
    if size < 1 or supersample < 1:
        raise ValueError(f"size and supersample must be at least 1, got {size}, {supersample}")
    surface = mesh if isinstance(mesh, Surface) else Surface.of(mesh)
    camera = camera.to(surface.vertices)
    fine = size * supersample
    if mode == "nearest":
        image = _nearest(surface, camera, fine, light, background, (near, far), backend)
    else:
        image = _blend(surface, camera, fine, light, background, (near, far), backend)
    image = image.clamp(0, 1)
    if supersample == 1:
        return image
    return image.view(len(camera), size, supersample, size, supersample, 3).mean(dim=(2, 4))


def turntable(
    mesh: Mesh | Surface,
    frames: int,
    elevation: float = 0.0,
    *,
    size: int = 512,
    sway: float | None = None,
    center: tuple[float, float, float] | None = (0.0, 0.0, 0.0),
    radius: float = 1.0,
    fov: float = 12.0,
    light: PointLight = PointLight(attached=True),
    mode: Literal["nearest", "blend"] = "nearest",
    background: Color = WHITE,
    supersample: int = 1,
    near: float = 1e-6,
    far: float = float("inf"),
) -> Iterator[Tensor]:
    """Yield the frames of a turn, (3, S, S) uint8 each, ready for ``facelab.inference.video.open_video``.

    Args:
        mesh: what is shown.
        frames: of the whole turn; the last one is a step before the first, so that the film can be repeated.
        elevation: of the camera above the middle, radians.
        size: pixels per side.
        sway: None: a full turn; otherwise the camera swings this many radians to both sides, as a cosine.
        center: what the camera looks at, scene units; None: the middle of the mesh's box, from so far away that all
            of it is seen (``radius`` is then not used).
        radius: distance of the camera, scene units.
        fov: full field of view, degrees.
        light, mode, background, supersample, near, far: see :func:`shade_values`; the lamp goes with the camera by default.

    Raises:
        ValueError: no frames.
    """
    if frames < 1:
        raise ValueError(f"a turn needs at least one frame, got {frames}")
    surface = mesh if isinstance(mesh, Surface) else Surface.of(mesh)
    if center is None:
        low, high = surface.vertices.amin(dim=0), surface.vertices.amax(dim=0)
        middle = (low + high) / 2
        radius = 1.05 * float((surface.vertices - middle).norm(dim=-1).max()) / math.sin(math.radians(fov) / 2)
    else:
        middle = torch.tensor(center, dtype=surface.vertices.dtype, device=surface.vertices.device)
    moved = Surface(surface.vertices - middle, surface.faces, surface.normals, surface.colors)
    for number in range(frames):
        angle = 2 * math.pi * number / frames
        yaw = angle if sway is None else sway * math.cos(angle)
        camera = Camera.on_sphere(math.pi / 2 - elevation, math.pi / 2 - yaw, fov, radius)
        yield shade_mesh(
            moved, camera, size, light=light, mode=mode, background=background, supersample=supersample, near=near,
            far=far,
        )[0]  # fmt: skip


def phong(
    points: Tensor, normals: Tensor, eyes: Tensor, lamps: Tensor, light: PointLight, colors: Tensor | None = None
) -> Tensor:
    """Phong's reflection: color (ambient + diffuse max(0, n.l)) + specular [n.l > 0] max(0, r.v)^shininess.

    Args:
        points: (P, 3) places on a surface, scene units.
        normals: (P, 3), made unit here.
        eyes, lamps: (P, 3) or (3,) positions.
        light: the brightnesses.
        colors: (P, 3) in 0..1; None: white.

    Returns:
        (P, 3), or (P, 1) without colours, not clamped.
    """
    normal = torch.nn.functional.normalize(normals, dim=-1)
    to_light = torch.nn.functional.normalize(lamps - points, dim=-1)
    to_eye = torch.nn.functional.normalize(eyes - points, dim=-1)
    facing = (normal * to_light).sum(dim=-1, keepdim=True)
    mirrored = 2 * facing * normal - to_light
    glance = (mirrored * to_eye).sum(dim=-1, keepdim=True).clamp(min=0) * (facing > 0)
    matt = light.ambient + light.diffuse * facing.clamp(min=0)
    return (matt if colors is None else matt * colors) + light.specular * glance**light.shininess


def blend_weights(distance: Tensor, depth: Tensor, nearest_depth: Tensor) -> Tensor:
    """Weight of a face in its pixel: sigmoid(-d / 1e-4) exp((z' - z'max) / 1e-4), z' = (100 - z) / 99.99.

    Args:
        distance: d, squared distance to the triangle's border in an image that is 2 wide, negative inside.
        depth: z along the camera's axis, scene units.
        nearest_depth: that of the pixel's nearest face.
    """
    return torch.sigmoid(-distance / SIGMA) * torch.exp((nearest_depth - depth) / ((Z_FAR - Z_NEAR) * GAMMA))


def _shade(
    surface: Surface, camera: Camera, light: PointLight, image: Tensor, face: Tensor, barycentric: Tensor
) -> Tensor:
    """P places, each given by image number, face and weights (P, 3) -> (P, 3) or (P, 1) brightness."""
    corners = surface.faces[face]
    parts = [surface.vertices, surface.normals] + ([] if surface.colors is None else [surface.colors])
    table = torch.cat(parts, dim=-1)
    weights = barycentric.to(table)
    mixed = sum(table[corners[:, k]] * weights[:, k : k + 1] for k in range(3))
    eyes, lamps = camera.cam2world[:, :3, 3], light.positions(camera)
    eye, lamp = (eyes[0], lamps[0]) if len(camera) == 1 else (eyes[image], lamps[image])
    return phong(mixed[:, :3], mixed[:, 3:6], eye, lamp, light, None if surface.colors is None else mixed[:, 6:])


def _canvas(camera: Camera, size: int, background: Color) -> Tensor:
    color = torch.tensor(background, dtype=torch.float32, device=camera.device)
    return color.expand(len(camera) * size * size, 3).clone()


def _nearest(
    surface: Surface,
    camera: Camera,
    size: int,
    light: PointLight,
    background: Color,
    limits: tuple[float, float],
    backend: str,
) -> Tensor:
    pixel, face, barycentric = _front(surface, camera, size, limits, backend)
    image = torch.div(pixel, size * size, rounding_mode="floor")
    canvas = _canvas(camera, size, background)
    canvas[pixel] = _shade(surface, camera, light, image, face, barycentric).expand(-1, 3)
    return canvas.view(len(camera), size, size, 3)


def _front(
    surface: Surface, camera: Camera, size: int, limits: tuple[float, float], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel, face and weights (P, 3) of the nearest surface, for pixels that see one."""
    vertices, (near, far) = surface.vertices[None], limits
    if choose_backend(backend, vertices.device) == "numba":  # the same faces and weights with fewer passes
        first = nearest_faces(vertices, surface.faces, camera, size, 1, near=near, far=far, backend="numba")
        return first.pixel, first.face, first.barycentric
    seen = rasterize(vertices, surface.faces, camera, size, near=near, far=far, backend=backend)
    face = seen.face.view(-1)
    pixel = (face >= 0).nonzero()[:, 0]
    return pixel, face[pixel], seen.barycentric.view(-1, 3)[pixel]


def _blend(
    surface: Surface,
    camera: Camera,
    size: int,
    light: PointLight,
    background: Color,
    limits: tuple[float, float],
    backend: str,
) -> Tensor:
    near = nearest_faces(
        surface.vertices[None], surface.faces, camera, size, BLEND_FACES, BLUR_RADIUS, near=limits[0], far=limits[1],
        backend=backend,
    )  # fmt: skip
    image = torch.div(near.pixel, size * size, rounding_mode="floor")
    brightness = _shade(surface, camera, light, image, near.face, near.barycentric).expand(-1, 3)
    nearest_depth = torch.zeros(len(camera) * size * size, dtype=near.depth.dtype, device=near.depth.device)
    first = near.rank == 0
    nearest_depth[near.pixel[first]] = near.depth[first]
    weight = blend_weights(near.distance, near.depth, nearest_depth[near.pixel])
    summed = _canvas(camera, size, background).double() * BACKGROUND_WEIGHT
    total = torch.full_like(nearest_depth, BACKGROUND_WEIGHT)
    for rank in range(BLEND_FACES):  # one face of each pixel at a time, so that the sum has one order
        chosen = (near.rank == rank).nonzero()[:, 0]
        pixel = near.pixel[chosen]
        summed[pixel] += weight[chosen, None] * brightness[chosen]
        total[pixel] += weight[chosen]
    return (summed / total[:, None]).float().view(len(camera), size, size, 3)
