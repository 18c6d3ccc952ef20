# SPDX-License-Identifier: Apache-2.0
"""Camera paths for videos: the curves of pi-GAN, FENeRF and EG3D, and keyframes from a file.

A path gives for each frame a mix factor (between two codes), pitch, yaw and field of view.
Pitch and yaw are radians as in :meth:`Camera.on_sphere` (pi/2 is level, pi/2 is frontal), the
field of view is in degrees.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from facelab.cameras.camera import Camera
from facelab.cameras.orbit import polar_angle
from facelab.errors import UserError, nearest
from facelab.yaml_files import YAML_ERRORS, parse_yaml

ZOOM_DEGREES = 5.0  # amplitude of the field of view in zoom, and in front with zoom
LEVEL = math.pi / 2
FRONTAL = math.pi / 2


@dataclass(frozen=True)
class Trajectory:
    """F frames of a camera path.

    Attributes:
        t: (F,) mix factor between a first and a second code; 0..1 unless ``reference``.
        pitch: (F,) radians.
        yaw: (F,) radians.
        fov: (F,) full field of view in degrees.
    """

    t: Tensor
    pitch: Tensor
    yaw: Tensor
    fov: Tensor

    def __post_init__(self) -> None:
        if any(part.shape != (len(self.t),) for part in (self.t, self.pitch, self.yaw, self.fov)):
            shapes = [tuple(part.shape) for part in (self.t, self.pitch, self.yaw, self.fov)]
            raise ValueError(f"t, pitch, yaw and fov must be (F,) of one length, got {shapes}")
        if not bool(((self.fov > 0) & (self.fov < 180)).all()):
            low, high = float(self.fov.min()), float(self.fov.max())
            raise UserError(
                f"the field of view must stay within 0..180 degrees, the path goes from {low:g} to {high:g}"
            )

    def __len__(self) -> int:
        return len(self.t)

    def camera(self, radius: float = 1.0) -> Camera:
        """-> F cameras on a sphere of the given radius (scene units) that look at the origin."""
        return Camera.on_sphere(self.pitch, self.yaw, self.fov, radius)


@dataclass(frozen=True)
class _Curve:
    """Pitch and yaw as functions of the curve parameter u, with its range and the zoom of the fov."""

    pitch: Callable[[Tensor], Tensor]
    yaw: Callable[[Tensor], Tensor]
    start: float = 0.0
    end: float = 1.0
    zoom: Callable[[Tensor], Tensor] | None = None  # degrees added to the fov, per unit of ZOOM_DEGREES
    zooms_by_default: bool = False
    loops: bool = False  # the frame after the last would be the first


def _constant(value: float) -> Callable[[Tensor], Tensor]:
    return lambda u: torch.full_like(u, value)


def _wave(function: Callable[[Tensor], Tensor], amplitude: float, centre: float) -> Callable[[Tensor], Tensor]:
    return lambda u: amplitude * function(2 * math.pi * u) + centre


def _line(slope: float, start: float) -> Callable[[Tensor], Tensor]:
    return lambda u: slope * u + start


def _eg3d_pitch(u: Tensor) -> Tensor:
    return polar_angle(LEVEL - 0.05 + 0.25 * torch.cos(2 * math.pi * u))


_ELLIPSE_PITCH = _wave(torch.cos, 0.2, LEVEL)
_ELLIPSE_YAW = _wave(torch.sin, 0.4, FRONTAL)

_CURVES: Mapping[str, _Curve] = {
    "front": _Curve(_ELLIPSE_PITCH, _ELLIPSE_YAW, zoom=lambda u: 1 + torch.sin(2 * math.pi * u)),
    "sphere": _Curve(_ELLIPSE_PITCH, _ELLIPSE_YAW),
    "inverse_sphere": _Curve(lambda u: 0.2 * (1 - torch.cos(2 * math.pi * u)) + LEVEL, _ELLIPSE_YAW),
    "orbit": _Curve(_constant(LEVEL), _line(2 * math.pi, 0.0), end=0.5),
    "orbit_raised": _Curve(_constant(math.pi / 4), _line(2 * math.pi, 0.0)),
    "orbit_nodding": _Curve(_wave(torch.cos, 0.2, math.pi / 4), _line(2 * math.pi, 0.0)),
    "rotation_horizontal": _Curve(_constant(LEVEL), _line(0.5, FRONTAL), start=-1.0),
    "rotation_linear": _Curve(_constant(LEVEL), _line(0.4, FRONTAL), start=-1.0),
    "zoom": _Curve(
        _constant(LEVEL), _constant(FRONTAL), zoom=lambda u: torch.sin(2 * math.pi * u), zooms_by_default=True
    ),
    "non_rotation": _Curve(_constant(LEVEL), _constant(FRONTAL)),
    "eg3d": _Curve(_eg3d_pitch, _wave(torch.sin, -0.35, FRONTAL), loops=True),
}

NAMES: tuple[str, ...] = tuple(_CURVES)


def trajectory(name: str, frames: int, fov: float = 12.0, *, zoom: bool = False, reference: bool = False) -> Trajectory:
    """A named path of ``frames`` cameras.

    ``front`` and ``sphere`` are an ellipse around the frontal view (0.4 rad sideways, 0.2 rad up
    and down), ``orbit`` a half circle (FENeRF), ``orbit_raised`` and ``orbit_nodding`` full circles
    from 45 degrees above (pi-GAN's two videos), ``rotation_horizontal`` 0.5 rad to either side,
    ``rotation_linear`` 0.4 rad, ``zoom`` a fixed pose with a breathing field of view,
    ``non_rotation`` a fixed pose. ``eg3d`` is the ellipse of EG3D's videos: 0.35 rad sideways, from about
    0.19 rad above to 0.13 rad below, closed without a repeated frame.

    Args:
        name: one of :data:`NAMES`.
        frames: number of frames, at least 1; first and last lie on the ends of the curve.
        fov: full field of view in degrees.
        zoom: let ``front`` open the field of view by 0..10 degrees, as the originals do unasked.
        reference: the originals' numbers: ``front`` zooms and the mix factor is the curve's own
            parameter, which is 0..0.5 in ``orbit`` and -1..1 (extrapolation) in ``rotation_*``.

    Raises:
        UserError: an unknown name (with the nearest one) or a frame count below 1.

    >>> [round(yaw, 3) for yaw in trajectory("rotation_horizontal", 3).yaw.tolist()]
    [1.071, 1.571, 2.071]
    """
    if name not in _CURVES:
        raise UserError(f"unknown trajectory {name!r}, expected one of {', '.join(NAMES)}.{nearest(name, NAMES)}")
    _check_frames(frames)
    curve = _CURVES[name]
    if zoom and curve.zoom is None:
        zooming = [key for key, value in _CURVES.items() if value.zoom is not None]
        raise UserError(f"trajectory {name!r} has no zoom, expected one of {', '.join(zooming)}; leave the zoom off")
    ends = (curve.start, curve.end)
    if curve.loops:
        ends = (curve.start, curve.end - (curve.end - curve.start) / frames)
    u = torch.linspace(*ends, frames, dtype=torch.float64)
    fovs = torch.full_like(u, float(fov))
    if curve.zoom is not None and (zoom or reference or curve.zooms_by_default):
        fovs = fovs + ZOOM_DEGREES * curve.zoom(u)
    mix = u if reference else torch.linspace(0, 1, frames, dtype=torch.float64)
    return Trajectory(*(part.float() for part in (mix, curve.pitch(u), curve.yaw(u), fovs)))


@dataclass(frozen=True)
class Keyframe:
    """A pose at a time: ``t`` any increasing number, pitch and yaw in radians, fov in degrees."""

    t: float
    pitch: float
    yaw: float
    fov: float


def keyframe_trajectory(keyframes: Sequence[Keyframe], frames: int) -> Trajectory:
    """A smooth path through keyframes: a natural cubic spline in t of pitch, yaw and fov.

    Frames are even in t from the first to the last keyframe; t itself is the mix factor. Yaws are
    taken as they are (a turn from 350 to 370 degrees crosses the front of 360).

    Raises:
        UserError: fewer than two keyframes, times that do not increase, a number out of range.
    """
    _check_keyframes(keyframes)
    _check_frames(frames)
    knots = torch.tensor([k.t for k in keyframes], dtype=torch.float64)
    values = torch.tensor([[k.pitch, k.yaw, k.fov] for k in keyframes], dtype=torch.float64)
    t = torch.linspace(keyframes[0].t, keyframes[-1].t, frames, dtype=torch.float64)
    curve = natural_cubic_spline(knots, values, t)
    return Trajectory(t.float(), *curve.float().unbind(-1))


def read_keyframes(path: str | Path, fov: float = 12.0) -> list[Keyframe]:
    """Read keyframes from a YAML or JSON file: a list of mappings.

    Each has ``t``, ``pitch`` and ``yaw`` in radians or ``pitch_degrees`` and ``yaw_degrees``, and
    optionally ``fov`` in degrees (default: the argument). Pitch is measured from straight above:
    90 degrees is level; yaw 90 degrees is frontal.

    Raises:
        UserError: a file that cannot be read, a wrong key (with the nearest one) or value.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"cannot read keyframes {path}: {reason}") from error
    rows = _parse(text, path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of keyframes like '- {{t: 0, pitch: 1.57, yaw: 1.2, fov: 12}}'")
    keyframes = [_keyframe(row, f"{path}, keyframe {number}", fov) for number, row in enumerate(rows, 1)]
    try:
        _check_keyframes(keyframes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return keyframes


def natural_cubic_spline(knots: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """Interpolate with a natural cubic spline (second derivative zero at both ends).

    Args:
        knots: (K,) increasing, K >= 2, float64.
        values: (K, C) at the knots.
        at: (F,) where to evaluate, within the knots.

    Returns:
        (F, C). The second derivatives M solve the usual tridiagonal system.
    """
    gaps = knots.diff()
    slopes = values.diff(dim=0) / gaps[:, None]
    second = torch.zeros_like(values)
    if len(knots) > 2:
        system = torch.diag(2 * (gaps[:-1] + gaps[1:]))
        system = system + torch.diag(gaps[1:-1], 1) + torch.diag(gaps[1:-1], -1)
        second[1:-1] = torch.linalg.solve(system, 6 * slopes.diff(dim=0))
    cell = (torch.searchsorted(knots, at, right=True) - 1).clamp(0, len(knots) - 2)
    gap = gaps[cell][:, None]
    left, right = (at - knots[cell])[:, None], (knots[cell + 1] - at)[:, None]
    bend = (right**3 / gap - right * gap) * second[cell] + (left**3 / gap - left * gap) * second[cell + 1]
    return (right * values[cell] + left * values[cell + 1]) / gap + bend / 6


def _check_frames(frames: int) -> None:
    if frames < 1:
        raise UserError(f"a trajectory needs at least 1 frame, got {frames}")


def _check_keyframes(keyframes: Sequence[Keyframe]) -> None:
    if len(keyframes) < 2:
        raise UserError(f"a keyframe path needs at least 2 keyframes, got {len(keyframes)}")
    for number, key in enumerate(keyframes, 1):
        if not all(math.isfinite(x) for x in (key.t, key.pitch, key.yaw, key.fov)):
            raise UserError(f"keyframe {number}: all numbers must be finite, got {key}")
        if not 0 < key.pitch < math.pi:
            raise UserError(f"keyframe {number}: pitch must be within 0..pi radians (pi/2 is level), got {key.pitch:g}")
        if not 0 < key.fov < 180:
            raise UserError(f"keyframe {number}: fov must be within 0..180 degrees, got {key.fov:g}")
    for number, (before, after) in enumerate(itertools.pairwise(keyframes), 2):
        if after.t <= before.t:
            raise UserError(f"keyframe {number}: t must increase, got {after.t:g} after {before.t:g}")


_KEYS = ("t", "pitch", "yaw", "pitch_degrees", "yaw_degrees", "fov")


def _keyframe(row: Mapping, where: str, fov: float) -> Keyframe:
    for key in row:
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key {key!r}, expected {', '.join(_KEYS)}.{nearest(key, _KEYS)}")
    angles = {}
    for name in ("pitch", "yaw"):
        given = [key for key in (name, f"{name}_degrees") if key in row]
        if len(given) != 1:
            raise UserError(f"{where}: give either {name} (radians) or {name}_degrees, got {given or 'neither'}")
        value = _number(row, given[0], where)
        angles[name] = math.radians(value) if given[0] != name else value
    if "t" not in row:
        raise UserError(f"{where}: the time t is missing")
    fov = _number(row, "fov", where) if "fov" in row else fov
    return Keyframe(_number(row, "t", where), angles["pitch"], angles["yaw"], fov)


def _number(row: Mapping, key: str, where: str) -> float:
    value = row[key]
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {key} must be a number, got {value!r}") from None


def _parse(text: str, path: Path) -> object:
    if path.suffix.lower() == ".json":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not valid JSON, line {error.lineno}: {error.msg}") from error
    try:
        return parse_yaml(text)
    except YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error).split("\n")[0]
        raise UserError(f"{path}: not valid YAML{where}: {problem}") from error
