# SPDX-License-Identifier: Apache-2.0
"""Where the training cameras stand: pi-GAN's pose distributions and rows of a data set.

Angles are those of :meth:`Camera.on_sphere`: yaw (theta) is the azimuth, pi/2 frontal; pitch
(phi) is the polar angle from +y, pi/2 level. Both in radians. The pitch is clamped off the
poles in every mode, and the clamped value is the one that is used and returned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from facelab.cameras.camera import POLE_MARGIN, Camera
from facelab.draws import Draws
from facelab.errors import UserError, nearest

MODES = ("uniform", "gaussian", "hybrid", "truncated_gaussian", "spherical_uniform", "fixed")
ALIASES = {"normal": "gaussian"}
CANDIDATES = 4  # normal numbers per angle, of which truncated_gaussian takes the first within two deviations
SPHERE_MARGIN = 1e-5  # keeps the polar fraction of spherical_uniform off 0 and 1


@dataclass(frozen=True)
class PosePrior:
    """A distribution of cameras on the unit sphere (pi-GAN, arXiv 2012.00926).

    Attributes:
        mode: one of :data:`MODES`; ``normal`` means ``gaussian``, ``fixed`` gives the means.
        yaw_mean: mean yaw in radians.
        yaw_std: standard deviation of the yaw (half the range in the uniform modes), radians.
        pitch_mean: mean pitch in radians.
        pitch_std: standard deviation of the pitch (half the range in the uniform modes), radians.

    Raises:
        UserError: an unknown mode, a negative deviation or a number that is not finite.

    >>> prior = PosePrior("fixed")
    >>> [round(x, 4) for x in prior.sample(Draws(0), 1, fov=12).angles[0].tolist()]
    [1.5708, 1.5708]
    """

    mode: str = "gaussian"
    yaw_mean: float = math.pi / 2
    yaw_std: float = 0.3
    pitch_mean: float = math.pi / 2
    pitch_std: float = 0.155

    def __post_init__(self) -> None:
        check_mode(self.mode)
        for name in ("yaw_mean", "yaw_std", "pitch_mean", "pitch_std"):
            value = getattr(self, name)
            if not math.isfinite(value) or (name.endswith("std") and value < 0):
                raise UserError(f"pose prior: {name} must be a finite number of radians, std >= 0; got {value}")

    def angles(self, draws: Draws, count: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Draw ``count`` poses -> pitch (count,), yaw (count,) in radians, the pitch clamped off the poles.

        The draws are named ``yaw`` and ``pitch`` (yaw first), and ``pose_coin`` in the hybrid mode:
        one coin for the whole call.
        """
        mode, widen = ALIASES.get(self.mode, self.mode), 1.0
        if mode == "hybrid":
            heads = float(draws.uniform("pose_coin", (1,), device="cpu")) < 0.5
            mode, widen = ("uniform", 2.0) if heads else ("gaussian", 1.0)
        raw_yaw = _draw_raw(mode, "yaw", draws, count, device)
        raw_pitch = _draw_raw(mode, "pitch", draws, count, device)
        wide = PosePrior(mode, self.yaw_mean, self.yaw_std * widen, self.pitch_mean, self.pitch_std * widen)
        return angles_from_raw(wide, raw_yaw, raw_pitch)

    def sample(self, draws: Draws, count: int, fov: Tensor | float, device: torch.device | str = "cpu") -> Camera:
        """``count`` random cameras with a full field of view of ``fov`` degrees."""
        pitch, yaw = self.angles(draws, count, device)
        return Camera.on_sphere(pitch, yaw, fov)


def check_mode(mode: str) -> None:
    """UserError, with the nearest name, unless ``mode`` is a known pose distribution."""
    if mode not in MODES and mode not in ALIASES:
        known = (*MODES, *ALIASES)
        raise UserError(f"unknown pose mode {mode!r}, expected one of {', '.join(known)}.{nearest(mode, known)}")


def angles_from_raw(prior: PosePrior, raw_yaw: Tensor, raw_pitch: Tensor) -> tuple[Tensor, Tensor]:
    """Raw random numbers -> pitch (N,), yaw (N,) in radians; no randomness of its own.

    Args:
        prior: any mode but ``hybrid``, which is a coin flip between two others.
        raw_yaw: uniform numbers in [0, 1) for the uniform modes, standard normal ones for
            ``gaussian``; (N, 4) normal candidates for ``truncated_gaussian``; of ``fixed`` only
            the length counts.
        raw_pitch: the same for the pitch.
    """
    mode = ALIASES.get(prior.mode, prior.mode)
    if mode == "hybrid":
        raise ValueError("hybrid has no raw numbers of its own: flip the coin, then ask for uniform or gaussian")
    if mode == "truncated_gaussian":
        raw_yaw, raw_pitch = (_first_within(raw.reshape(-1, raw.shape[-1])) for raw in (raw_yaw, raw_pitch))
    raw_yaw, raw_pitch = raw_yaw.reshape(-1), raw_pitch.reshape(-1)
    if mode == "fixed":
        yaw = torch.full_like(raw_yaw, prior.yaw_mean)
        pitch = torch.full_like(raw_pitch, prior.pitch_mean)
    elif mode == "uniform":
        yaw = _symmetric(raw_yaw) * prior.yaw_std + prior.yaw_mean
        pitch = _symmetric(raw_pitch) * prior.pitch_std + prior.pitch_mean
    elif mode == "spherical_uniform":
        yaw = _symmetric(raw_yaw) * prior.yaw_std + prior.yaw_mean
        fraction = _symmetric(raw_pitch) * (prior.pitch_std / math.pi) + prior.pitch_mean / math.pi
        pitch = torch.arccos(1 - 2 * fraction.clamp(SPHERE_MARGIN, 1 - SPHERE_MARGIN))
    else:
        yaw = raw_yaw * prior.yaw_std + prior.yaw_mean
        pitch = raw_pitch * prior.pitch_std + prior.pitch_mean
    return pitch.clamp(POLE_MARGIN, math.pi - POLE_MARGIN), yaw


def _draw_raw(mode: str, name: str, draws: Draws, count: int, device: torch.device | str) -> Tensor:
    if mode == "fixed":
        return torch.zeros(count, device=device)
    if mode in ("uniform", "spherical_uniform"):
        return draws.uniform(name, (count,), device=device)
    if mode == "truncated_gaussian":
        return draws.normal(name, (count, CANDIDATES), device=device)
    return draws.normal(name, (count,), device=device)


def _symmetric(uniform: Tensor) -> Tensor:
    return (uniform - 0.5) * 2


def _first_within(candidates: Tensor, limit: float = 2.0) -> Tensor:
    """(N, K) -> (N,): in each row the first candidate with |x| < limit, the first of all when none has."""
    inside = (candidates.abs() < limit).to(torch.int8)
    first = inside.argmax(dim=-1, keepdim=True)  # argmax of 0/1 is the first 1, and 0 in a row of zeros
    return candidates.gather(-1, first).squeeze(-1)


@dataclass(frozen=True)
class Conditions:
    """What a generator phase is conditioned on, N of each.

    Attributes:
        camera: N cameras.
        light: (N, 9) spherical harmonics, or None.
        coefficients: (N, C) face model coefficients, or None.
    """

    camera: Camera
    light: Tensor | None = None
    coefficients: Tensor | None = None


class ConditionSource(Protocol):
    """Feeds the generator phases: a pose prior, or rows of the data set."""

    def draw(self, draws: Draws, count: int, device: torch.device | str = "cpu") -> Conditions:
        """``count`` conditions on ``device``, a function of ``draws`` alone."""
        ...


@dataclass(frozen=True)
class PriorSource:
    """Cameras from a :class:`PosePrior`; ``fov`` is the full field of view in degrees."""

    prior: PosePrior
    fov: float = 12.0

    def draw(self, draws: Draws, count: int, device: torch.device | str = "cpu") -> Conditions:
        """Cameras drawn on the CPU, so that every device sees the same poses."""
        return Conditions(self.prior.sample(draws, count, self.fov).to(device))


@dataclass(frozen=True)
class RowsSource:
    """Cameras, and what belongs to them, from rows of a data set drawn with replacement.

    Attributes:
        camera: the M cameras of the data set (``Camera.from_label`` reads 25-number labels).
        light: (M, 9) or None.
        coefficients: (M, C) or None.
    """

    camera: Camera
    light: Tensor | None = None
    coefficients: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.camera) == 0:
            raise ValueError("RowsSource needs at least one camera, got none")
        for name in ("light", "coefficients"):
            rows = getattr(self, name)
            if rows is not None and len(rows) != len(self.camera):
                raise ValueError(f"{name} must have {len(self.camera)} rows as the cameras have, got {len(rows)}")

    def draw(self, draws: Draws, count: int, device: torch.device | str = "cpu") -> Conditions:
        """One row index per condition; camera, light and coefficients come from the same row."""
        # float64: a float32 uniform reaches only 2^24 rows
        uniform = draws.uniform("condition_row", (count,), dtype=torch.float64)
        rows = (uniform * len(self.camera)).long().clamp(max=len(self.camera) - 1)
        camera = self.camera[rows.to(self.camera.device)].to(device)
        return Conditions(camera, _pick(self.light, rows, device), _pick(self.coefficients, rows, device))


def _pick(table: Tensor | None, rows: Tensor, device: torch.device | str) -> Tensor | None:
    return None if table is None else table[rows.to(table.device)].to(device)
