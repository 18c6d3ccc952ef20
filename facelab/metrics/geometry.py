# SPDX-License-Identifier: Apache-2.0
"""Depth against the truth, poses against the truth, and depth against itself from other views."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from facelab.cameras.camera import Camera
from facelab.cameras.rays import Grid, make_rays
from facelab.errors import nearest

Alignment = Literal["none", "scale", "scale_shift"]
ALIGNMENTS = ("none", "scale", "scale_shift")


@dataclass(frozen=True)
class DepthError:
    """Errors of N depth maps over the masked pixels, float64.

    Attributes:
        mae: (N,) mean absolute error, scene units.
        rmse: (N,) root mean square error, scene units.
        relative: (N,) mean of |error| / truth.
        scale, shift: (N,) applied to the prediction before comparing.
    """

    mae: Tensor
    rmse: Tensor
    relative: Tensor
    scale: Tensor
    shift: Tensor


def depth_error(prediction: Tensor, truth: Tensor, mask: Tensor | None = None, align: Alignment = "none") -> DepthError:
    """Compare depth maps.

    Args:
        prediction, truth: (N, H, W) or (N, 1, H, W), scene units, truth > 0 within the mask.
        mask: where to compare, same shape, boolean; default everywhere.
        align: ``scale`` multiplies each prediction by the least squares factor, ``scale_shift``
            fits factor and offset (monocular depth), ``none`` compares as it is.

    Raises:
        ValueError: shapes differ, an unknown alignment, or a picture with fewer than 2 masked pixels.
    """
    if align not in ALIGNMENTS:
        raise ValueError(f"align must be one of {ALIGNMENTS}, got {align!r}.{nearest(align, ALIGNMENTS)}")
    valid = _valid(mask, truth)
    if not prediction.shape == truth.shape == valid.shape:
        shapes = [tuple(x.shape) for x in (prediction, truth, valid)]
        raise ValueError(f"prediction, truth and mask must have one shape, got {shapes}")
    weight = valid.flatten(1).double()
    count = weight.sum(dim=1)
    if bool((count < 2).any()):
        raise ValueError(f"a depth map needs at least 2 masked pixels, got {int(count.min())}")
    # what is outside the mask may be NaN or infinite: replace it before it meets a zero weight
    x = torch.where(valid, prediction, 0).flatten(1).double()
    y = torch.where(valid, truth, 1).flatten(1).double()
    scale, shift = _fit(x, y, weight, align)
    error = (x * scale[:, None] + shift[:, None] - y).abs()

    def mean(values: Tensor) -> Tensor:
        return (values * weight).sum(dim=1) / count

    return DepthError(mean(error), mean(error.square()).sqrt(), mean(error / y), scale, shift)


def normalised_depth_error(prediction: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """EG3D's depth measure: mean squared difference after each map was brought to mean 0 and deviation 1, (N,) float64.

    0 for maps that differ by shift and positive scale, 2 on average for unrelated ones.

    Args:
        prediction, truth: (N, H, W) or (N, 1, H, W); both grow with the distance.
        mask: where to compare, same shape, boolean; default everywhere.

    Raises:
        ValueError: shapes differ, or fewer than 2 masked pixels. NaN for a map that is flat within the mask.
    """
    valid = _valid(mask, truth)
    if not prediction.shape == truth.shape == valid.shape:
        shapes = [tuple(x.shape) for x in (prediction, truth, valid)]
        raise ValueError(f"prediction, truth and mask must have one shape, got {shapes}")
    weight = valid.flatten(1).double()
    count = weight.sum(dim=1, keepdim=True)
    if bool((count < 2).any()):
        raise ValueError(f"a depth map needs at least 2 masked pixels, got {int(count.min())}")

    def standard(values: Tensor) -> Tensor:
        flat = torch.where(valid, values, 0).flatten(1).double()
        centred = (flat - (flat * weight).sum(1, keepdim=True) / count) * weight
        return centred / (centred.square().sum(1, keepdim=True) / count).sqrt()

    return ((standard(prediction) - standard(truth)).square() * weight).sum(1) / count[:, 0]


def masked_deviation(values: Tensor, where: Tensor) -> Tensor:
    """Standard deviation of (N, S, S) over the pixels chosen, (N,) float64."""
    weight = where.flatten(1).double()
    flat, count = values.flatten(1).double(), weight.sum(1)
    mean = (flat * weight).sum(1) / count
    return (((flat - mean[:, None]).square() * weight).sum(1) / count).sqrt()


def _valid(mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()


def _fit(x: Tensor, y: Tensor, weight: Tensor, align: Alignment) -> tuple[Tensor, Tensor]:
    ones, zeros = torch.ones_like(x[:, 0]), torch.zeros_like(x[:, 0])
    if align == "none":
        return ones, zeros
    if align == "scale":
        return (x * y * weight).sum(1) / (x.square() * weight).sum(1), zeros
    count = weight.sum(dim=1)
    mean_x, mean_y = (x * weight).sum(1) / count, (y * weight).sum(1) / count
    centred = (x - mean_x[:, None]) * weight
    scale = (centred * (y - mean_y[:, None])).sum(1) / (centred * (x - mean_x[:, None])).sum(1)
    return scale, mean_y - scale * mean_x


@dataclass(frozen=True)
class PoseError:
    """Errors of N poses in radians: |pitch|, |yaw| (wrapped to 0..pi) and the angle between the view directions."""

    pitch: Tensor
    yaw: Tensor
    direction: Tensor


def pose_error(prediction: Tensor, truth: Tensor) -> PoseError:
    """Compare (N, 2) pitch and yaw in radians, as in ``Camera.angles``."""
    if prediction.shape != truth.shape or prediction.ndim != 2 or prediction.shape[1] != 2:
        raise ValueError(f"poses must both be (N, 2), got {tuple(prediction.shape)} and {tuple(truth.shape)}")
    prediction, truth = prediction.double(), truth.double()
    yaw = torch.remainder(prediction[:, 1] - truth[:, 1] + math.pi, 2 * math.pi) - math.pi
    first, second = _direction(prediction), _direction(truth)
    # atan2 is exact for small angles, where arccos of the dot product is not
    angle = torch.atan2(torch.linalg.cross(first, second).norm(dim=-1), (first * second).sum(-1))
    return PoseError((prediction[:, 0] - truth[:, 0]).abs(), yaw.abs(), angle)


def _direction(angles: Tensor) -> Tensor:
    pitch, yaw = angles.unbind(-1)
    return torch.stack([pitch.sin() * yaw.cos(), pitch.cos(), pitch.sin() * yaw.sin()], dim=-1)


def rotation_error(first: Tensor, second: Tensor) -> Tensor:
    """Angle (N,) in radians between (N, 3, 3) rotations: ``2 asin(|R1 - R2| / sqrt(8))``."""
    distance = (first.double() - second.double()).flatten(1).norm(dim=1)
    return 2 * torch.asin((distance / math.sqrt(8)).clamp(max=1))


@dataclass(frozen=True)
class ViewConsistency:
    """How well the depth of one view predicts that of another, N pairs, float64.

    Attributes:
        error: (N,) mean |predicted - rendered distance| over the compared pixels, scene units;
            NaN where nothing could be compared.
        compared: (N,) share of the first view's pixels in its mask that were compared.
        hidden: (N,) share that lies behind the second view's surface by more than ``occlusion``.
    """

    error: Tensor
    compared: Tensor
    hidden: Tensor


def view_consistency(
    depth_a: Tensor,
    camera_a: Camera,
    depth_b: Tensor,
    camera_b: Camera,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    occlusion: float = 0.02,
    grid: Grid = "corners",
) -> ViewConsistency:
    """Carry the points of view a to view b and compare them with the depth rendered there.

    Args:
        depth_a, depth_b: (N, S, S) distances along unit rays, scene units.
        camera_a, camera_b: N cameras each.
        mask_a, mask_b: (N, S, S) boolean, where there is a surface; default everywhere. A point is
            compared only if all four pixels around its place in b are in the mask.
        occlusion: a point this much behind b's surface counts as hidden, not as an error.
        grid: where pixels lie on the picture, see :func:`facelab.cameras.rays.pixel_coordinates`.
    """
    size = depth_a.shape[-1]
    if depth_a.shape != depth_b.shape or depth_a.shape[1:] != (size, size) or len(camera_a) != len(depth_a):
        raise ValueError(f"depths must both be (N, S, S), got {tuple(depth_a.shape)} and {tuple(depth_b.shape)}")
    valid_a, valid_b = _valid(mask_a, depth_a), _valid(mask_b, depth_b)
    rays = make_rays(camera_a.to(torch.float64), size, grid)
    points = rays.origins + rays.directions * torch.where(valid_a, depth_a, 0).flatten(1)[..., None].double()
    place, distance, in_front = _project(points, camera_b.to(torch.float64))
    rendered = _sample(torch.where(valid_b, depth_b, 0).double(), place, grid)
    covered = _sample(valid_b.double(), place, grid) > 1 - 1e-6
    seen = valid_a.flatten(1) & in_front & covered & (place.abs() <= 1).all(dim=-1)
    difference = distance - rendered
    hidden = seen & (difference > occlusion)
    compared = seen & ~hidden
    total = valid_a.flatten(1).sum(dim=1).clamp(min=1)
    count = compared.sum(dim=1)
    error = torch.where(compared, difference.abs(), 0).sum(dim=1) / count
    return ViewConsistency(error, count / total, hidden.sum(dim=1) / total)


def _project(points: Tensor, camera: Camera) -> tuple[Tensor, Tensor, Tensor]:
    """World points (N, R, 3) -> place for grid_sample (N, R, 2), distance (N, R), whether it is in front."""
    rotation, origin = camera.cam2world[:, :3, :3], camera.cam2world[:, None, :3, 3]
    local = (points - origin) @ rotation  # the transposed inverse of a rotation is itself
    z = local[..., 2]
    safe = torch.where(z > 1e-9, z, 1)
    pixel = torch.stack([local[..., 0] / safe, local[..., 1] / safe, torch.ones_like(z)], -1)
    pixel = pixel @ camera.intrinsics.transpose(1, 2)
    return pixel[..., :2] * 2 - 1, local.norm(dim=-1), z > 1e-9


def _sample(values: Tensor, place: Tensor, grid: Grid) -> Tensor:
    """Bilinear (N, S, S) at (N, R, 2) in -1..1 -> (N, R); the pixels of ``corners`` lie on the frame."""
    sampled = torch.nn.functional.grid_sample(
        values[:, None], place[:, None], mode="bilinear", padding_mode="zeros", align_corners=grid == "corners"
    )
    return sampled[:, 0, 0]
