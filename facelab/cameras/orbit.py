# SPDX-License-Identifier: Apache-2.0
"""EG3D's cameras: on a sphere around the world's origin, looking at it or at another point.

Yaw and pitch are pi / 2 in front of the face, but are not those of :meth:`Camera.on_sphere`: the yaw runs the other
way round, and the pitch is a number whose even spread covers the sphere evenly, see :func:`polar_angle`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from facelab.cameras.camera import POLE_MARGIN, Camera
from facelab.draws import Draws
from facelab.tensors import constant

FOCAL = 2985.29 / 700  # of the FFHQ and AFHQ crops, divided by the image side
ORIGINAL_PI = 3.14159  # both constants are those of the original's conversion of a diagonal field of view
ORIGINAL_DIAGONAL = 1.414


def polar_angle(pitch: Tensor) -> Tensor:
    """arccos(1 - 2 pitch / pi), the pitch clamped off 0 and pi: radians from the +y axis."""
    return torch.arccos(1 - 2 * (pitch.clamp(POLE_MARGIN, math.pi - POLE_MARGIN) / math.pi))


def orbit_position(yaw: Tensor, pitch: Tensor, radius: float) -> Tensor:
    """(N,) yaw and pitch in radians -> (N, 3) positions on the sphere; pi / 2 and pi / 2 is (0, 0, radius)."""
    polar = polar_angle(pitch)
    azimuth = math.pi - yaw
    return radius * torch.stack([polar.sin() * azimuth.cos(), polar.cos(), polar.sin() * azimuth.sin()], dim=-1)


def look_at(position: Tensor, target: Tensor) -> Tensor:
    """(N, 3) positions and (3,) or (N, 3) targets -> (N, 4, 4) camera-to-world, OpenCV axes, no roll about +y."""
    forward = torch.nn.functional.normalize(target - position, dim=-1)
    up = constant((0.0, 1.0, 0.0), position.device, position.dtype).expand_as(forward)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=-1)
    down = torch.linalg.cross(forward, right)
    cam2world = torch.eye(4, dtype=position.dtype, device=position.device).repeat(len(position), 1, 1)
    cam2world[:, :3, :3] = torch.stack([right, down, forward], dim=-1)
    cam2world[:, :3, 3] = position
    return cam2world


def focal_intrinsics(focal: float, count: int = 1) -> Tensor:
    """(count, 3, 3) intrinsics with square pixels and the centre in the middle; ``focal`` over the image side."""
    return torch.tensor([[focal, 0.0, 0.5], [0.0, focal, 0.5], [0.0, 0.0, 1.0]]).repeat(count, 1, 1)


def diagonal_focal(degrees: float) -> float:
    """Focal length over the image side for the original's diagonal field of view.

    >>> round(diagonal_focal(18.837), 4), round(diagonal_focal(45), 4)
    (4.2634, 1.7074)
    """
    return 1 / (math.tan(degrees * ORIGINAL_PI / 360) * ORIGINAL_DIAGONAL)


def orbit_camera(
    yaw: Tensor | float | Sequence[float],
    pitch: Tensor | float | Sequence[float],
    radius: float,
    target: Sequence[float] = (0.0, 0.0, 0.0),
    focal: float = FOCAL,
) -> Camera:
    """Cameras on the sphere around the world's origin that look at ``target``.

    Args:
        yaw, pitch: radians, pi / 2 is frontal; broadcast against each other.
        radius: of the sphere, scene units; the target does not move the sphere.
        target: scene units.
        focal: over the image side.
    """
    yaw_N = torch.as_tensor(yaw, dtype=torch.get_default_dtype()).reshape(-1)
    pitch_N = torch.as_tensor(pitch, dtype=yaw_N.dtype, device=yaw_N.device).reshape(-1)
    yaw_N, pitch_N = torch.broadcast_tensors(yaw_N, pitch_N)
    position = orbit_position(yaw_N, pitch_N, radius)
    cam2world = look_at(position, torch.tensor(list(target), dtype=position.dtype, device=position.device))
    return Camera(cam2world, focal_intrinsics(focal, len(position)).to(position))


@dataclass(frozen=True)
class OrbitPrior:
    """A distribution of EG3D's cameras; angles in radians."""

    mode: Literal["gaussian", "uniform"] = "gaussian"
    yaw_mean: float = math.pi / 2
    yaw_std: float = 0.0  # half the range in the uniform mode
    pitch_mean: float = math.pi / 2
    pitch_std: float = 0.0
    radius: float = 2.7
    target: tuple[float, float, float] = (0.0, 0.0, 0.0)
    focal: float = FOCAL

    def from_raw(self, raw_yaw: Tensor, raw_pitch: Tensor) -> Camera:
        """Raw numbers (N,) -> cameras: standard normal ones, or uniform ones in [0, 1)."""
        if self.mode == "uniform":
            raw_yaw, raw_pitch = 2 * raw_yaw - 1, 2 * raw_pitch - 1
        yaw = self.yaw_mean + raw_yaw * self.yaw_std
        pitch = self.pitch_mean + raw_pitch * self.pitch_std
        return orbit_camera(yaw, pitch, self.radius, self.target, self.focal)

    def sample(self, draws: Draws, count: int, device: torch.device | str = "cpu") -> Camera:
        """``count`` random cameras; the draws are named ``yaw`` and ``pitch``, drawn on the CPU."""
        draw = draws.uniform if self.mode == "uniform" else draws.normal
        return self.from_raw(draw("yaw", (count,)), draw("pitch", (count,))).to(device)
