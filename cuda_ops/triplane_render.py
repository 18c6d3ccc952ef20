# SPDX-License-Identifier: Apache-2.0
"""A whole tri-plane rendering as one kernel, without gradient: coarse samples, importance samples, compositing.

One program walks over a few rays. The samples of a ray are one tile: bilinear lookups of planes whose channels lie
together, two small matrix products, weights of the coarse intervals, inverse-CDF samples, the same field there, and
the compositing of both sets. Nothing but pixels is written; the features of both sets stay in registers.

Both sets are in ascending order (coarse by construction, fine because the numbers they are drawn from are sorted),
so they are merged by bisection: sample i of one set stands behind as many samples of the other as are smaller, and
the product of transmittances before it is a prefix of either set times a prefix of the other.

The plain twin, with the same arguments in other clothes, is ``facelab.rendering.midpoint.render_midpoints``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cuda_ops import dispatch

Decoder = tuple[Tensor, Tensor, Tensor, Tensor]
Precision = Literal["fp32", "tf32", "fp16"]
RAYS_PER_PROGRAM = 4
MAX_SAMPLES = 256  # of either set


@dataclass(frozen=True)
class TriplaneSpec:
    """What the tensors do not tell.

    Attributes:
        axes: coordinates (0 x, 1 y, 2 z) along the width and the height of each plane.
        scale: world points are multiplied by it, the planes cover [-1, 1].
        concat: the decoder reads the features of the three planes side by side, not their mean.
        near, far: range of the ray parameter where rays have no limits of their own.
        samples: coarse samples per ray, importance: fine ones, 0 for none.
        disparity: coarse samples evenly spaced in 1 / t.
        white: the missing opacity is added to every feature.
        precision: ``fp32`` splits the operands of the matrix products into three TF32 parts, ``tf32`` takes one,
            ``fp16`` halves; half planes are read as they are. Sums are in float32.
    """

    axes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    scale: float
    concat: bool
    near: float
    far: float
    samples: int
    importance: int
    disparity: bool = False
    white: bool = False
    precision: Precision = "fp32"


@dataclass(frozen=True)
class Rendering:
    """Of N x R rays: features (N, R, F) in about [0, 1]; depth (weighted sum), opacity and mean depth (N, R, 1)."""

    features: Tensor
    depth: Tensor
    opacity: Tensor
    mean_depth: Tensor


def problem(planes: Tensor, decoder: Decoder, spec: TriplaneSpec) -> str | None:
    """Why the kernel cannot take these arguments, or None when it can."""
    hidden, channels = decoder[0].shape[0], planes.shape[2]
    features = decoder[2].shape[0] - 1
    for name, value in (("plane channels", channels), ("hidden width", hidden), ("features", features)):
        if value < 16 or value > 128 or value & (value - 1):
            raised = f"{name} are {value}, the kernel takes 16, 32, 64 or 128"
            return raised
    if max(spec.samples, spec.importance) > MAX_SAMPLES:
        return f"there are more than {MAX_SAMPLES} samples per ray"
    if planes.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"planes are {planes.dtype}"
    return None


def channels_last(planes: Tensor) -> Tensor:
    """(N, 3, C, H, W) planes -> the same numbers with the channels of a pixel together in memory.

    No copy where they already are; do it once where a scene is rendered often.
    """
    return planes.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def render_triplane(
    planes: Tensor,
    origins: Tensor,
    directions: Tensor,
    decoder: Decoder,
    spec: TriplaneSpec,
    limits: Tensor | None = None,
    jitter: Tensor | None = None,
    u: Tensor | None = None,
) -> Rendering:
    """Render N x R rays; no gradients.

    Args:
        planes: (N or 1, 3, C, H, W), fastest as :func:`channels_last` leaves them.
        origins, directions: (N, R, 3), world.
        decoder: effective weights and biases, (hidden, C or 3 C), (hidden,), (1 + F, hidden), (1 + F,); raw density
            is output 0.
        spec: the rest.
        limits: (N, R, 2) first and last ray parameter of each ray, or None.
        jitter: (N, R, samples) in [0, 1), None = 0.5.
        u: (N, R, importance) in [0, 1), None = fixed midpoints.

    Raises:
        ValueError: shapes that do not fit each other.
        RuntimeError: no kernel can run here (see :mod:`cuda_ops.dispatch`) or not with these sizes.
    """
    reason = dispatch.triton_problem(planes.device) or problem(planes, decoder, spec)
    if reason is not None:
        raise RuntimeError(f"triplane_render: {reason}")
    n, r = origins.shape[:2]
    _check("origins", origins, (n, r, 3))
    _check("directions", directions, (n, r, 3))
    _check("limits", limits, (n, r, 2))
    _check("jitter", jitter, (n, r, spec.samples))
    _check("u", u, (n, r, spec.importance))
    if planes.ndim != 5 or planes.shape[1] != 3 or planes.shape[0] not in (1, n):
        raise ValueError(f"planes must be ({n} or 1, 3, C, H, W), got {tuple(planes.shape)}")
    features = decoder[2].shape[0] - 1
    out = planes.new_empty(n, r, features, dtype=torch.float32)
    scalars = planes.new_empty(3, n, r, 1, dtype=torch.float32)
    if n * r:
        _launch(channels_last(planes), origins, directions, decoder, spec, limits, jitter, u, out, scalars)
    return Rendering(out, *scalars.unbind(0))


def _launch(
    planes: Tensor,
    origins: Tensor,
    directions: Tensor,
    decoder: Decoder,
    spec: TriplaneSpec,
    limits: Tensor | None,
    jitter: Tensor | None,
    u: Tensor | None,
    out: Tensor,
    scalars: Tensor,
) -> None:
    from cuda_ops.triplane_kernels import render_forward

    rays = origins.shape[0] * origins.shape[1]
    channels, height, width = planes.shape[2:]
    weights = [x.detach().float().contiguous() for x in decoder]
    hidden, features = weights[0].shape[0], weights[2].shape[0] - 1
    # ascending numbers give ascending samples, and their order does not change the picture
    u = None if u is None else u.float().sort(-1).values
    origins, directions = origins.float().contiguous(), directions.float().contiguous()
    limits = None if limits is None else limits.float().contiguous()
    jitter = None if jitter is None else jitter.float().contiguous()
    tile = [max(16, 1 << (max(s, 1) - 1).bit_length()) for s in (spec.samples, spec.importance)]
    (a0, b0), (a1, b1), (a2, b2) = spec.axes
    kernel: Any = render_forward
    kernel[(math.ceil(rays / RAYS_PER_PROGRAM),)](
        planes,
        origins,
        directions,
        origins if limits is None else limits,
        origins if jitter is None else jitter,
        origins if u is None else u,
        *weights,
        out,
        scalars,
        rays,
        origins.shape[1],
        0 if planes.shape[0] == 1 else 3 * height * width * channels,
        height * width * channels,
        height,
        width,
        float(spec.scale),
        float(spec.near),
        float(spec.far),
        A0=a0, B0=b0, A1=a1, B1=b1, A2=a2, B2=b2,
        C=channels, HIDDEN=hidden, F=features,
        S=spec.samples, TS=tile[0], LOG_TS=tile[0].bit_length() - 1,
        I=spec.importance, TI=tile[1], LOG_TI=tile[1].bit_length() - 1,
        LIMITS=limits is not None, JITTER=jitter is not None, U=u is not None,
        DISPARITY=spec.disparity, WHITE=spec.white, CONCAT=spec.concat,
        HALF=spec.precision == "fp16", DOT="tf32x3" if spec.precision == "fp32" else "tf32",
        RAYS=RAYS_PER_PROGRAM,
        num_warps=max(4, max(tile) // 16),
    )  # fmt: skip


def _check(name: str, x: Tensor | None, shape: Sequence[int]) -> None:
    if x is not None and tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(x.shape)}")
