# SPDX-License-Identifier: Apache-2.0
"""The camera that every part of facelab shares.

Axes are OpenCV's (x right, y down, z forward); ``cam2world`` maps camera to world
coordinates and intrinsics are divided by the image size. The world's y axis points up.
Conventions of other programs are converted here, in one named function each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from facelab.tensors import constant

Angles = Tensor | float | Sequence[float]

POLE_MARGIN = 1e-5  # radians kept between the pitch and the poles, pi-GAN


@dataclass(frozen=True)
class Camera:
    """A batch of N pinhole cameras.

    Attributes:
        cam2world: (N, 4, 4) camera-to-world, OpenCV axes, scene units.
        intrinsics: (N, 3, 3), normalised by the image size (``fx = 0.5 / tan(fov / 2)``).
        angles: (N, 2) pitch and yaw in radians on pi-GAN's unit sphere, or None;
            kept because a pose loss needs the sampled values.
    """

    cam2world: Tensor
    intrinsics: Tensor
    angles: Tensor | None = None

    def __post_init__(self) -> None:
        if self.cam2world.ndim != 3 or self.cam2world.shape[1:] != (4, 4):
            raise ValueError(f"cam2world must be (N, 4, 4), got {tuple(self.cam2world.shape)}")
        if self.intrinsics.shape != (len(self.cam2world), 3, 3):
            raise ValueError(f"intrinsics must be ({len(self.cam2world)}, 3, 3), got {tuple(self.intrinsics.shape)}")
        if self.angles is not None and self.angles.shape != (len(self.cam2world), 2):
            raise ValueError(f"angles must be ({len(self.cam2world)}, 2), got {tuple(self.angles.shape)}")

    def __len__(self) -> int:
        return len(self.cam2world)

    def __getitem__(self, index) -> Camera:
        """Select cameras; an integer keeps the batch axis."""
        if isinstance(index, int):
            index = [index] if index >= 0 else [index + len(self)]
        angles = None if self.angles is None else self.angles[index]
        return Camera(self.cam2world[index], self.intrinsics[index], angles)

    @property
    def device(self) -> torch.device:
        return self.cam2world.device

    def map(self, function: Callable[[Tensor], Tensor]) -> Camera:
        """Apply a function to every tensor."""
        angles = None if self.angles is None else function(self.angles)
        return Camera(function(self.cam2world), function(self.intrinsics), angles)

    def to(self, *args, **kwargs) -> Camera:
        """Move or cast as ``Tensor.to`` does."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def label(self) -> Tensor:
        """-> (N, 25): the row-major EG3D label, 16 extrinsics then 9 intrinsics."""
        return torch.cat([self.cam2world.flatten(1), self.intrinsics.flatten(1)], dim=1)

    @staticmethod
    def from_label(label: Tensor, trusted: bool = False) -> Camera:
        """(N, 25) EG3D labels -> cameras. ValueError on another width or on values that are not finite.

        ``trusted`` leaves out the look at the values, for which a GPU would have to be waited for.
        """
        if label.ndim != 2 or label.shape[1] != 25:
            raise ValueError(f"a camera label has 25 numbers, expected (N, 25), got {tuple(label.shape)}")
        if not trusted and not torch.isfinite(label).all():
            raise ValueError("a camera label holds NaN or infinite numbers")
        return Camera(label[:, :16].reshape(-1, 4, 4), label[:, 16:].reshape(-1, 3, 3))

    @staticmethod
    def on_sphere(
        pitch: Angles,
        yaw: Angles,
        fov: Tensor | float,
        radius: float = 1.0,
    ) -> Camera:
        """Cameras on a sphere, looking at the origin (pi-GAN's parametrisation).

        Args:
            pitch: polar angle from the +y axis in radians, pi/2 is level; clamped off the poles.
            yaw: azimuth in radians, pi/2 is frontal (camera on the +z axis).
            fov: full horizontal field of view in degrees.
            radius: distance to the origin in scene units.
        """
        pitch_N = torch.as_tensor(pitch, dtype=torch.get_default_dtype()).reshape(-1)
        yaw_N = torch.as_tensor(yaw, dtype=pitch_N.dtype, device=pitch_N.device).reshape(-1)
        pitch_N, yaw_N = torch.broadcast_tensors(pitch_N, yaw_N)
        pitch_N = pitch_N.clamp(POLE_MARGIN, math.pi - POLE_MARGIN)
        direction = torch.stack([pitch_N.sin() * yaw_N.cos(), pitch_N.cos(), pitch_N.sin() * yaw_N.sin()], dim=-1)
        cam2world = opengl_to_opencv(look_at_opengl(radius * direction))
        return Camera(cam2world, intrinsics_from_fov(fov, len(pitch_N), cam2world), torch.stack([pitch_N, yaw_N], -1))

    def sphere_angles(self) -> Tensor:
        """(N, 2) pitch and yaw in radians: the stored ones, else those of the camera's position."""
        if self.angles is not None:
            return self.angles
        x, y, z = torch.nn.functional.normalize(self.cam2world[:, :3, 3], dim=-1).unbind(-1)
        return torch.stack([torch.acos(y.clamp(-1, 1)), torch.atan2(z, x)], dim=-1)

    def with_fov(self, fov: Tensor | float) -> Camera:
        """The same poses with another field of view (degrees)."""
        return replace(self, intrinsics=intrinsics_from_fov(fov, len(self), self.cam2world))

    def scaled(self, factor: float) -> Camera:
        """The same views of a scene ``factor`` times as large: positions move, angles and intrinsics stay."""
        cam2world = self.cam2world.clone()
        cam2world[:, :3, 3] *= factor
        return Camera(cam2world, self.intrinsics, self.sphere_angles())

    @staticmethod
    def cat(cameras: Sequence[Camera]) -> Camera:
        """Concatenate along the batch axis; angles are kept if every part has them."""
        angles = None
        if all(c.angles is not None for c in cameras):
            angles = torch.cat([c.angles for c in cameras if c.angles is not None])
        return Camera(torch.cat([c.cam2world for c in cameras]), torch.cat([c.intrinsics for c in cameras]), angles)


def intrinsics_from_fov(fov: Tensor | float, count: int, like: Tensor) -> Tensor:
    """Square-pixel intrinsics (count, 3, 3), normalised, from a full field of view in degrees."""
    fov_N = fov.to(like).reshape(-1).expand(count) if isinstance(fov, Tensor) else like.new_full((count,), float(fov))
    focal = 0.5 / torch.tan(torch.deg2rad(fov_N) / 2)
    intrinsics = torch.zeros(count, 3, 3, dtype=like.dtype, device=like.device)
    intrinsics[:, 0, 0] = focal
    intrinsics[:, 1, 1] = focal
    intrinsics[:, 0, 2] = 0.5
    intrinsics[:, 1, 2] = 0.5
    intrinsics[:, 2, 2] = 1.0
    return intrinsics


def look_at_opengl(position: Tensor) -> Tensor:
    """(N, 3) positions -> (N, 4, 4) OpenGL camera-to-world looking at the origin, y up (pi-GAN)."""
    forward = torch.nn.functional.normalize(-position, dim=-1)
    world_up = constant((0.0, 1.0, 0.0), position.device, position.dtype).expand_as(forward)
    left = torch.nn.functional.normalize(torch.linalg.cross(world_up, forward), dim=-1)
    up = torch.nn.functional.normalize(torch.linalg.cross(forward, left), dim=-1)
    cam2world = torch.zeros(len(position), 4, 4, dtype=position.dtype, device=position.device)
    cam2world[:, :3, :3] = torch.stack([-left, up, -forward], dim=-1)
    cam2world[:, :3, 3] = position
    cam2world[:, 3, 3] = 1.0
    return cam2world


def opengl_to_opencv(cam2world: Tensor) -> Tensor:
    """Flip the camera's y and z axes: OpenGL (y up, looks along -z) <-> OpenCV (y down, along +z)."""
    flip = constant((1.0, -1.0, -1.0, 1.0), cam2world.device, cam2world.dtype)
    return cam2world * flip


opencv_to_opengl = opengl_to_opencv  # the flip is its own inverse
