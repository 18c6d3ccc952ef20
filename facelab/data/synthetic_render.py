# SPDX-License-Identifier: Apache-2.0
"""Pictures of meshes under spherical-harmonics light: the plain torch path (CPU and CUDA) and its definitions.

Per sample: colour = albedo * occlusion * strands * (Y(n) . L) + gloss * max(0, n . h)^p, with a soft shoulder
below white, in display space; h is half way between view and main light direction. Each pixel is the mean of its samples,
or its middle sample where all lie in one even class (skin, nose, hat, neck, clothes).

Letters: N heads, V vertices, F faces, S size, K supersampled size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from facelab import lighting
from facelab.cameras.camera import Camera
from facelab.mesh.normals import Incidence, vertex_normals
from facelab.mesh.rasterize import Fragments, interpolate, project, rasterize

# strength and number of squarings of the highlight, by CelebAMask-HQ class
GLOSS = torch.zeros(19)
GLOSS[[1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 15, 17, 18]] = torch.tensor(
    [0.07, 0.09, 0.35, 0.75, 0.75, 0.04, 0.04, 0.1, 0.13, 0.16, 0.17, 0.6, 0.05, 0.02]
)
SQUARINGS = torch.full((19,), 3, dtype=torch.int64)
SQUARINGS[[3, 4, 5, 15]] = 6
SQUARINGS[[2, 11, 12]] = 4
SMOOTH = torch.zeros(19, dtype=torch.bool)  # classes so even that one sample inside them stands for the pixel
SMOOTH[[1, 2, 14, 17, 18]] = True
SHOULDER = 0.75  # brighter values approach white smoothly: 1 - (1 - s) exp((s - c) / (1 - s))
INNER_HAIR = 0.45  # light that reaches the inside of hanging hair
HAIR, BROWS = 13, (6, 7)


@dataclass(frozen=True)
class Scene:
    """Everything a renderer needs. ``vertices`` (N, V, 3), ``colour`` (N, V, 3), ``surface`` (V, 2), ``faces`` (F, 3),
    ``labels`` (F,), ``light`` (N, 9, 3), ``phase`` (N, 2), ``incidence`` of the faces."""

    vertices: Tensor
    colour: Tensor
    surface: Tensor
    faces: Tensor
    labels: Tensor
    light: Tensor
    phase: Tensor
    incidence: Incidence

    def select(self, rows: Tensor) -> Scene:
        """Some of the heads."""
        per_head = {name: getattr(self, name)[rows] for name in ("vertices", "colour", "light", "phase")}
        return replace(self, **per_head)


@dataclass(frozen=True)
class Pictures:
    """``image`` (N, 3, S, S) uint8, ``mask`` (N, S, S) int64, ``depth`` (N, S, S) along unit rays (0 = background),
    ``normal`` (N, S, S, 3) world axes, towards the camera."""

    image: Tensor
    mask: Tensor
    depth: Tensor
    normal: Tensor

    @staticmethod
    def cat(parts: Sequence[Pictures]) -> Pictures:
        """Concatenate along the batch axis."""
        return Pictures(*(torch.cat([getattr(p, f) for p in parts]) for f in ("image", "mask", "depth", "normal")))


def render_torch(scene: Scene, camera: Camera, size: int, grid: str, supersample: int, background: Tensor) -> Pictures:
    """The torch path. ``supersample`` is odd, so that the middle sample is the pixel itself."""
    normals = vertex_normals(scene.vertices, scene.faces, scene.incidence)
    fine = rasterize(scene.vertices, scene.faces, camera, size, grid, supersample=supersample, backend="torch")
    normal, back = _facing_normals(scene, camera, fine, normals, size, grid)
    colour = _shade(scene, camera, fine, normal, back)
    count, channels = len(colour), 3
    colour = torch.where(fine.hit[..., None], colour, background.to(colour))
    samples = colour.view(count, size, supersample, size, supersample, channels)
    middle = supersample // 2
    face = fine.face[:, middle::supersample, middle::supersample]
    hit = face >= 0
    mask = torch.where(hit, scene.labels[face.clamp(min=0)], 0)
    label = torch.where(fine.hit, scene.labels[fine.face.clamp(min=0)], 0)
    same = (label.view(count, size, supersample, size, supersample) == mask[:, :, None, :, None]).all(4).all(2)
    plain = same & SMOOTH.to(mask.device)[mask]
    pixels = torch.where(plain[..., None], samples[:, :, middle, :, middle], samples.mean(dim=(2, 4)))
    pixels = torch.where(hit[..., None], pixels, background.to(pixels))
    image = (pixels * 255 + 0.5).to(torch.uint8).permute(0, 3, 1, 2).contiguous()
    depth = fine.depth[:, middle::supersample, middle::supersample] * ray_lengths(camera, size, grid)
    return Pictures(image, mask, depth, normal[:, middle::supersample, middle::supersample].contiguous())


def ray_lengths(camera: Camera, size: int, grid: str) -> Tensor:
    """(N, S, S) distance per unit of camera z along the ray of each pixel."""
    coordinate = torch.arange(size, dtype=torch.float32, device=camera.device)
    coordinate = coordinate / (size - 1) if grid == "corners" else (coordinate + 0.5) / size
    focal, centre = camera.intrinsics[:, (0, 1), (0, 1)], camera.intrinsics[:, :2, 2]
    x, y = ((coordinate - centre[:, k, None]) / focal[:, k, None] for k in range(2))
    return (1 + x[:, None, :] ** 2 + y[:, :, None] ** 2).sqrt()


def _facing_normals(
    scene: Scene, camera: Camera, fine: Fragments, normals: Tensor, size: int, grid: str
) -> tuple[Tensor, Tensor]:
    """Interpolated unit normals, turned where a triangle shows its back; and (N, K, K) bool where that is."""
    normal = torch.nn.functional.normalize(interpolate(normals, scene.faces, fine), dim=-1)
    corner = project(scene.vertices, camera, size, grid)[:, scene.faces]
    a, b = corner[:, :, 1] - corner[:, :, 0], corner[:, :, 2] - corner[:, :, 0]
    back = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0] > 0  # rows count downwards: front faces are negative
    flipped = torch.gather(back, 1, fine.face.clamp(min=0).flatten(1)).view_as(fine.face)
    return torch.where(flipped[..., None], -normal, normal), flipped


def _shade(scene: Scene, camera: Camera, fine: Fragments, normal: Tensor, back: Tensor) -> Tensor:
    """(N, K, K, 3) colours in 0..1; whatever stands where nothing is hit is not used."""
    label = torch.where(fine.hit, scene.labels[fine.face.clamp(min=0)], 0)
    colour = interpolate(scene.colour, scene.faces, fine) * strands(scene, fine, label)[..., None]
    colour = colour * lighting.shade(normal, scene.light)
    colour = torch.where((back & (label == HAIR))[..., None], colour * INNER_HAIR, colour)
    half = half_vectors(scene.light, camera)
    shine = (normal * half[:, None, None]).sum(-1).clamp(min=0)
    power = shine
    result = torch.zeros_like(shine)
    squarings = SQUARINGS.to(label.device)[label]
    for step in range(1, 7):
        power = power * power
        result = torch.where(squarings == step, power, result)
    colour = (colour + (GLOSS.to(result)[label] * result)[..., None]).clamp(min=0)
    return torch.where(colour < SHOULDER, colour, 1 - (1 - SHOULDER) * torch.exp((SHOULDER - colour) / (1 - SHOULDER)))


def half_vectors(light: Tensor, camera: Camera) -> Tensor:
    """(N, 3) unit vectors half way between the main light and the viewer."""
    view = -camera.cam2world[:, :3, 2].to(light)
    return torch.nn.functional.normalize(lighting.main_direction(light) + view, dim=-1)


def strands(scene: Scene, fine: Fragments, label: Tensor) -> Tensor:
    """(N, K, K) factor around 1 that draws strands on hair and brows."""
    corners = scene.surface[scene.faces[fine.face.clamp(min=0)]]  # (N, K, K, 3 corners, 2)
    angle, row = corners[..., 0], corners[..., 1]
    wraps = angle.amax(-1, keepdim=True) - angle.amin(-1, keepdim=True) > torch.pi
    angle = torch.where(wraps & (angle < 0), angle + 2 * torch.pi, angle)
    u = (angle * fine.barycentric).sum(-1)
    w = (row * fine.barycentric).sum(-1)
    p, q = scene.phase[:, 0, None, None], scene.phase[:, 1, None, None]
    hair = 0.5 * torch.sin(47 * u + 3 * torch.sin(4 * w + p) + q) + 0.35 * torch.sin(101 * u - 5 * w + 2 * q)
    hair = 1 + 0.17 * (hair + 0.25 * torch.sin(17 * u + 7 * w + p))
    brow = 1 + 0.22 * torch.sin(44 * u + 9 * w)
    factor = torch.where(label == HAIR, hair, torch.ones_like(hair))
    return torch.where((label == BROWS[0]) | (label == BROWS[1]), brow, factor)
