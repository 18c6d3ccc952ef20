# SPDX-License-Identifier: Apache-2.0
"""StyleSDF's cameras: on a sphere around the origin, told by azimuth and elevation in radians.

Both are 0 in front of the face (camera on the +z axis); azimuth grows towards +x, elevation upwards. In the terms of
:meth:`Camera.on_sphere` the yaw is pi / 2 - azimuth and the pitch pi / 2 - elevation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from facelab.cameras.camera import Angles, Camera, intrinsics_from_fov, opengl_to_opencv
from facelab.cameras.pose_sampling import Conditions
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.tensors import constant

FOV = 12.0  # degrees, full
NORM_EPS = 1e-5
VERTICAL = 5e-3  # below this in all components the right-hand axis is taken for undefined
FACTORS = (-1.5, -1.0, -0.5, 0.5, 1.0, 1.5)  # of the ranges, in the fixed views
SWEEP = 8  # azimuths of a validation grid


def sphere_camera(azimuth: Angles, elevation: Angles, fov: Tensor | float = FOV, radius: float = 1.0) -> Camera:
    """Cameras on the sphere, looking at the origin with y up.

    Args:
        azimuth, elevation: radians, broadcast against each other.
        fov: full field of view in degrees, one or (N,).
        radius: scene units.
    """
    azimuth_N = torch.as_tensor(azimuth, dtype=None if isinstance(azimuth, Tensor) else torch.get_default_dtype())
    azimuth_N = azimuth_N.reshape(-1)
    elevation_N = torch.as_tensor(elevation, dtype=azimuth_N.dtype, device=azimuth_N.device).reshape(-1)
    azimuth_N, elevation_N = torch.broadcast_tensors(azimuth_N, elevation_N)
    flat = elevation_N.cos()
    position = radius * torch.stack([flat * azimuth_N.sin(), elevation_N.sin(), flat * azimuth_N.cos()], dim=-1)
    back = _normalize(position)
    up = constant((0.0, 1.0, 0.0), position.device, position.dtype).expand_as(back)
    right = _normalize(torch.linalg.cross(up, back))
    above = _normalize(torch.linalg.cross(back, right))
    vertical = (right.abs() < VERTICAL).all(dim=-1, keepdim=True)
    right = torch.where(vertical, _normalize(torch.linalg.cross(above, back)), right)
    cam2world = torch.eye(4, dtype=position.dtype, device=position.device).repeat(len(position), 1, 1)
    cam2world[:, :3, :3] = torch.stack([right, above, back], dim=-1)
    cam2world[:, :3, 3] = position
    angles = math.pi / 2 - torch.stack([elevation_N, azimuth_N], dim=-1)
    return Camera(opengl_to_opencv(cam2world), intrinsics_from_fov(fov, len(position), position), angles)


def view_angles(camera: Camera) -> Tensor:
    """(N, 2) azimuth and elevation in radians: what StyleSDF's discriminator predicts."""
    return math.pi / 2 - camera.sphere_angles().flip(-1)


def _normalize(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1, eps=NORM_EPS)


@dataclass(frozen=True)
class SpherePrior:
    """A distribution of cameras on the unit sphere; a :class:`~facelab.cameras.pose_sampling.ConditionSource`.

    Attributes:
        mode: ``gaussian`` or ``uniform``.
        azimuth, elevation: standard deviation, or half the range of the uniform mode; radians.
        fov: full field of view in degrees.

    Raises:
        UserError: a negative range or a number that is not finite.
    """

    mode: Literal["gaussian", "uniform"] = "gaussian"
    azimuth: float = 0.3
    elevation: float = 0.15
    fov: float = FOV

    def __post_init__(self) -> None:
        for name in ("azimuth", "elevation"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise UserError(f"camera prior: {name} must be a finite number of radians, at least 0; got {value}")

    def from_raw(self, azimuth: Tensor, elevation: Tensor) -> Camera:
        """Raw numbers (N,) -> cameras: standard normal ones, or uniform ones in [0, 1)."""
        if self.mode == "uniform":
            azimuth, elevation = 2 * azimuth - 1, 2 * elevation - 1
        return sphere_camera(self.azimuth * azimuth, self.elevation * elevation, self.fov)

    def sample(self, draws: Draws, count: int, device: torch.device | str = "cpu") -> Camera:
        """``count`` random cameras; the draws are named ``azimuth`` and ``elevation``, drawn on the CPU."""
        draw = draws.uniform if self.mode == "uniform" else draws.normal
        return self.from_raw(draw("azimuth", (count,)), draw("elevation", (count,))).to(device)

    def draw(self, draws: Draws, count: int, device: torch.device | str = "cpu") -> Conditions:
        """:meth:`sample` for generator phases."""
        return Conditions(self.sample(draws, count, device))

    # ------------------------------------------------------------ fixed sets of cameras

    def sweep(self, u: Tensor, azimuths: int = SWEEP) -> Camera:
        """A validation grid: for each of N heads all azimuths of the range at one elevation.

        Args:
            u: (N,) uniform numbers in [0, 1) that choose the elevations.

        Returns:
            N * azimuths cameras, those of a head together.
        """
        across = torch.linspace(-self.azimuth, self.azimuth, azimuths, dtype=u.dtype, device=u.device)
        elevation = self.elevation * (2 * u.reshape(-1) - 1)
        return sphere_camera(across.repeat(len(elevation)), elevation.repeat_interleave(azimuths), self.fov)

    def fixed_views(self) -> Camera:
        """Thirteen cameras: in front, then six azimuths, then six elevations of up to 1.5 times the ranges."""
        factors, zeros = torch.tensor(FACTORS), torch.zeros(len(FACTORS))
        azimuth = torch.cat([torch.zeros(1), self.azimuth * factors, zeros])
        elevation = torch.cat([torch.zeros(1), zeros, self.elevation * factors])
        return sphere_camera(azimuth, elevation, self.fov)

    def row(self, views: int = 10, azimuth_factor: float = 1.5, elevation_factor: float = 0.8) -> Camera:
        """A row of views from one side to the other, at one elevation above the face (CNeRF's pictures)."""
        across = torch.linspace(-azimuth_factor, azimuth_factor, views)
        return sphere_camera(self.azimuth * across, elevation_factor * self.elevation, self.fov)

    def film(self, frames: int = 250, *, level: bool = False) -> Camera:
        """The cameras of a video, which close up: an ellipse, or with ``level`` to and fro at elevation 0."""
        turn = 2 * math.pi * torch.linspace(0, 1, frames)
        gain = 1.0 if self.mode == "uniform" else 1.5
        azimuth = gain * self.azimuth * turn.cos()
        if level:
            return sphere_camera(azimuth, torch.zeros(1), self.fov)
        if self.mode == "uniform":
            return sphere_camera(azimuth, self.elevation / 2 * (1 + turn.sin()), self.fov)
        return sphere_camera(azimuth, gain * self.elevation * turn.sin(), self.fov)
