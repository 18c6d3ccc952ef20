# SPDX-License-Identifier: Apache-2.0
"""Synthetic heads: an endless, exactly labelled face data set that needs no download.

Head ``index`` of ``seed`` is always the same person, pose and light, whatever else is asked for in the batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from facelab import lighting
from facelab.cameras.camera import Camera
from facelab.data.batch import Batch
from facelab.data.synthetic_render import Pictures, Scene, render_torch
from facelab.data.synthetic_sampling import LIGHT, NUMBERS, POSE, HeadCoefficients, normal, sample_heads
from facelab.draws import Draws
from facelab.errors import UserError, nearest
from facelab.face_model.procedural import ProceduralHead
from facelab.mesh.normals import Incidence
from facelab.mesh.rasterize import GRIDS, has_numba

MAX_SAMPLES = 1 << 23  # samples shaded at once by the torch path, bounds its memory to a few GB
COLOURS = {"black": 0.0, "grey": 0.5, "white": 1.0}


@dataclass(frozen=True)
class SyntheticBatch:
    """N heads with everything that is known about them.

    Attributes:
        image: (N, 3, S, S) uint8; the background colour wherever ``mask`` is 0.
        mask: (N, S, S) int64 CelebAMask-HQ classes (l_ = subject's left = right side of a frontal picture).
        depth: (N, S, S) distance along the unit ray of each pixel in scene units, 0 on the background.
        normal: (N, S, S, 3) unit normals in world axes, 0 on the background.
        camera: N cameras with their angles.
        identity, expression, albedo: (N, 52), (N, 23), (N, 30) coefficients in standard deviations.
        shown: (N, 6) bool: hair, hat, visor, glasses, sunglasses, earrings.
        light: (N, 9, 3) spherical harmonics, see facelab.lighting.
        landmarks_3d: (N, 68, 3) world positions in 300-W order.
        landmarks_2d: (N, 68, 2) their pictures, normalised image coordinates 0..1 (x right, y down).
        index: (N,) which heads these are.
    """

    image: Tensor
    mask: Tensor
    depth: Tensor
    normal: Tensor
    camera: Camera
    identity: Tensor
    expression: Tensor
    albedo: Tensor
    shown: Tensor
    light: Tensor
    landmarks_3d: Tensor
    landmarks_2d: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.image)

    @property
    def coefficients(self) -> Tensor:
        """(N, 105): identity, expression, albedo."""
        return torch.cat([self.identity, self.expression, self.albedo], dim=1)

    def to(self, device: torch.device | str) -> SyntheticBatch:
        """Every field on ``device``."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def as_batch(self) -> Batch:
        """What training reads; the light is the grey one."""
        grey = self.light.mean(dim=-1)
        return Batch(
            image=self.image, label_map=self.mask, camera=self.camera, light=grey, coefficients=self.coefficients
        )


class SyntheticHeads:
    """An endless set of heads, drawn on demand.

    Args:
        seed: of the whole set.
        size: pixels per side.
        device: where to draw; on the CPU a compiled path is used where numba is installed.
        grid: pixel grid of the pictures, ``corners`` (pi-GAN, FENeRF) or ``centers`` (EG3D).
        fov: full field of view in degrees.
        radius: distance of the camera in scene units.
        yaw_std, pitch_std: standard deviations of the camera angles around frontal, radians.
        background: ``black``, ``grey``, ``white`` or three numbers in 0..1.
        supersample: odd number; k x k samples a pixel for smooth edges (masks and depth are never mixed).
        threads: heads drawn at the same time on the CPU (default: all cores this process may use).
        backend: ``auto``, ``numba`` or ``torch``.

    Raises:
        UserError: a parameter out of range.

    >>> heads = SyntheticHeads(seed=3, size=16)
    >>> sample = heads.head(7)
    >>> sample.image.shape, bool((sample.image == heads.batch([2, 7]).image[1:]).all())
    (torch.Size([1, 3, 16, 16]), True)
    """

    def __init__(
        self,
        seed: int = 0,
        size: int = 128,
        *,
        device: torch.device | str = "cpu",
        grid: str = "corners",
        fov: float = 12.0,
        radius: float = 1.0,
        yaw_std: float = 0.3,
        pitch_std: float = 0.155,
        background: str | Sequence[float] = "black",
        supersample: int = 3,
        threads: int | None = None,
        backend: str = "auto",
    ) -> None:
        _check_options(size, grid, fov, radius, supersample, yaw_std, pitch_std, backend)
        self.seed, self.size, self.grid, self.fov, self.radius = int(seed), int(size), grid, float(fov), float(radius)
        self.yaw_std, self.pitch_std, self.supersample = float(yaw_std), float(pitch_std), int(supersample)
        self.device = torch.device(device)
        self.background = _background(background)
        self.threads = threads if threads is not None else len(os.sched_getaffinity(0))
        if backend == "numba" and (self.device.type != "cpu" or not has_numba()):
            raise UserError(
                f"backend 'numba' needs the CPU and the numba package, got device {self.device}; use 'auto'"
            )
        self.compiled = backend != "torch" and self.device.type == "cpu" and has_numba()
        self._cpu_model = ProceduralHead.create()
        self.model = ProceduralHead.create(self.device)
        self._incidence = Incidence.of(self.model.faces, len(self.model.mean_shape))
        self._faces_and_labels = (self.model.faces, self.model.face_labels)

    def head(self, index: int) -> SyntheticBatch:
        """One head as a batch of one."""
        return self.batch([index])

    def batch(self, indices: Sequence[int] | Tensor, camera: Camera | None = None) -> SyntheticBatch:
        """The heads of these numbers; ``camera`` (one, or one for each head) replaces the drawn poses."""
        index = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        numbers = self.numbers(index)
        people = sample_heads(self._cpu_model, numbers)
        light = lighting.light_from_uniform(numbers[:, LIGHT : LIGHT + lighting.UNIFORMS])
        if camera is None:
            camera = self.cameras(numbers)
        elif len(camera) not in (1, len(index)):
            raise ValueError(f"expected 1 or {len(index)} cameras, got {len(camera)}")
        elif len(camera) == 1:
            camera = camera[[0] * len(index)]
        return self.render(people, camera, light, index)

    def batches(self, count: int, start: int = 0) -> Iterator[SyntheticBatch]:
        """Batches of ``count`` heads in the order of their numbers, without end."""
        while True:
            yield self.batch(range(start, start + count))
            start += count

    def numbers(self, index: Tensor) -> Tensor:
        """(N, NUMBERS) the uniform random numbers that make heads ``index`` (on the CPU, whatever the device)."""
        draws = Draws(self.seed, phase="synthetic_heads")
        return torch.stack([draws.at(step=int(i)).uniform("head", (NUMBERS,)) for i in index])

    def cameras(self, numbers: Tensor) -> Camera:
        """Poses on pi-GAN's sphere from the random numbers."""
        pitch = torch.pi / 2 + self.pitch_std * normal(numbers[:, POSE], limit=4.0)
        yaw = torch.pi / 2 + self.yaw_std * normal(numbers[:, POSE + 1], limit=4.0)
        return Camera.on_sphere(pitch, yaw, self.fov, self.radius)

    def render(
        self, people: HeadCoefficients, camera: Camera, light: Tensor, index: Tensor | None = None
    ) -> SyntheticBatch:
        """Draw given people: any coefficients, poses and (N, 9, 3) lights, not only sampled ones."""
        index = torch.full((len(people.identity),), -1) if index is None else index
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # half precision would tear the mesh
            return self._render(people, camera, light, index)

    def _render(self, people: HeadCoefficients, camera: Camera, light: Tensor, index: Tensor) -> SyntheticBatch:
        people, camera, light = people.to(self.device), camera.to(self.device), light.to(self.device)
        whole = self.model.vertices(people.identity, people.expression)
        albedo = self.model.albedo(people.albedo)
        scene = Scene(
            vertices=self.model.hide(whole, people.shown),
            colour=albedo * self.model.occlusion,  # type: ignore[operator]
            surface=self.model.surface,
            faces=self.model.faces,
            labels=self.model.face_labels,
            light=light,
            phase=people.phase,
            incidence=self._incidence,
        )
        pictures = self._draw(scene, camera)
        landmarks = self.model.landmark_positions(whole)
        return SyntheticBatch(
            image=pictures.image,
            mask=pictures.mask,
            depth=pictures.depth,
            normal=pictures.normal,
            camera=camera,
            identity=people.identity,
            expression=people.expression,
            albedo=people.albedo,
            shown=torch.stack(list(people.shown.values()), dim=1),
            light=light,
            landmarks_3d=landmarks,
            landmarks_2d=project_points(landmarks, camera),
            index=index.to(self.device),
        )

    def _draw(self, scene: Scene, camera: Camera) -> Pictures:
        if self.compiled:
            from facelab.data.synthetic_numba import render_numba

            return render_numba(scene, camera, self.size, self.grid, self.supersample, self.background, self.threads)
        portion = max(1, MAX_SAMPLES // (self.size * self.supersample) ** 2)
        parts = []
        for start in range(0, len(camera), portion):
            rows = torch.arange(start, min(start + portion, len(camera)), device=self.device)
            some = scene.select(rows)
            parts.append(render_torch(some, camera[rows], self.size, self.grid, self.supersample, self.background))
        return parts[0] if len(parts) == 1 else Pictures.cat(parts)


def project_points(points: Tensor, camera: Camera) -> Tensor:
    """(N, P, 3) world points -> (N, P, 2) normalised image coordinates."""
    world2cam = torch.linalg.inv(camera.cam2world)
    local = points @ world2cam[:, :3, :3].transpose(1, 2) + world2cam[:, None, :3, 3]
    image = local @ camera.intrinsics.transpose(1, 2)
    return image[..., :2] / image[..., 2:]


def _check_options(
    size: int, grid: str, fov: float, radius: float, supersample: int, yaw_std: float, pitch_std: float, backend: str
) -> None:
    if not 2 <= size <= 4096:
        raise UserError(f"size must be 2 to 4096 pixels, got {size}")
    if grid not in GRIDS:
        raise UserError(f"grid must be one of {', '.join(GRIDS)}, got {grid!r}.{nearest(grid, GRIDS)}")
    if backend not in ("auto", "numba", "torch"):
        raise UserError(
            f"backend must be auto, numba or torch, got {backend!r}.{nearest(backend, ('auto', 'numba', 'torch'))}"
        )
    if not 1 <= fov < 170:
        raise UserError(f"fov must be 1 to 170 degrees, got {fov}")
    if not 0.2 <= radius <= 100:
        raise UserError(f"radius must be 0.2 to 100 scene units (the head needs room), got {radius}")
    if supersample < 1 or supersample % 2 == 0:
        raise UserError(f"supersample must be an odd number such as 1, 3 or 5, got {supersample}")
    if yaw_std < 0 or pitch_std < 0:
        raise UserError(f"yaw_std and pitch_std must not be negative, got {yaw_std} and {pitch_std}")


def _background(colour: str | Sequence[float]) -> Tensor:
    if isinstance(colour, str):
        if colour not in COLOURS:
            raise UserError(
                f"background must be one of {', '.join(COLOURS)}, got {colour!r}.{nearest(colour, COLOURS)}"
            )
        return torch.full((3,), COLOURS[colour])
    values = torch.tensor([float(v) for v in colour])
    if values.shape != (3,) or not bool(((values >= 0) & (values <= 1)).all()):
        raise UserError(f"background must be three numbers in 0..1, got {list(colour)}")
    return values


def write_dataset(out: str | Path, count: int, size: int = 128, seed: int = 0, **options) -> Path:
    """Heads as picture and mask files, see :func:`facelab.data.synthetic_files.write_dataset`."""
    from facelab.data import synthetic_files

    return synthetic_files.write_dataset(out, count, size, seed, **options)
