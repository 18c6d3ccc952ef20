# SPDX-License-Identifier: Apache-2.0
"""Launches the kernels of :mod:`cuda_ops.triplane_render`. All tensors are checked before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cuda_ops.triplane_render import Decoder, TriplaneSpec, channels_last


@dataclass(frozen=True)
class Tuning:
    """How the kernels share their work out; ``bench_eg3d.py --sweep`` tries others.

    Attributes:
        rays: that one program of the forward renders, one after the other.
        warps: of a program of the forward, for tiles of 64 samples of one set; larger tiles take more.
        registers: at most so many a thread of the forward, None = as the compiler likes.
        programs: of the backward, at most; each leaves one partial sum of the decoder's gradients.
        block: samples of a ray whose field the backward computes at once, 16 for each warp.
        backward_registers: as above.
    """

    rays: int = 4
    warps: int = 4
    registers: int | None = None
    programs: int = 1056
    block: int = 128
    backward_registers: int | None = None


TUNING = Tuning()


def tile(samples: int) -> int:
    """Samples as a power of two that matrix products take."""
    return max(16, 1 << max(samples - 1, 0).bit_length())


def _limited(registers: int | None) -> dict[str, int]:
    return {} if registers is None else {"maxnreg": registers}


def _stored(planes: Tensor, spec: TriplaneSpec) -> Tensor:
    """Planes as the kernels read them."""
    return channels_last(planes.half() if spec.precision == "fp16" else planes)


def _shared(planes: Tensor, decoder: Decoder, spec: TriplaneSpec) -> dict[str, Any]:
    """Arguments that both directions have."""
    channels, height, width = planes.shape[2:]
    (a0, b0), (a1, b1), (a2, b2) = spec.axes
    return {
        "planes_stride": 0 if planes.shape[0] == 1 else 3 * height * width * channels,
        "size": height * width * channels, "height": height, "width": width, "scale": float(spec.scale),
        "A0": a0, "B0": b0, "A1": a1, "B1": b1, "A2": a2, "B2": b2,
        "C": channels, "HIDDEN": decoder[0].shape[0], "F": decoder[2].shape[0] - 1,
        "WHITE": spec.white, "CONCAT": spec.concat,
        "HALF": spec.precision == "fp16", "DOT": "tf32x3" if spec.precision == "fp32" else "tf32",
    }  # fmt: skip


def forward(
    planes: Tensor,
    origins: Tensor,
    directions: Tensor,
    decoder: Decoder,
    limits: Tensor | None,
    jitter: Tensor | None,
    u: Tensor | None,
    spec: TriplaneSpec,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> features (N, R, F), depth, opacity and mean depth (3, N, R, 1), all depths (N, R, S) ascending, if kept."""
    from cuda_ops.triplane_kernels import render_forward

    n, r = origins.shape[:2]
    like = {"dtype": torch.float32, "device": planes.device}
    out = torch.empty(n, r, decoder[2].shape[0] - 1, **like)
    scalars = torch.empty(3, n, r, 1, **like)
    depths = torch.empty(n, r, spec.samples + spec.importance if keep else 0, **like)
    if n * r == 0:
        return out, scalars, depths
    stored, weights = _stored(planes, spec), [x.float().contiguous() for x in decoder]
    # ascending numbers give ascending samples, and their order does not change the picture
    u = None if u is None else u.float().sort(-1).values
    origins, directions = origins.float().contiguous(), directions.float().contiguous()
    limits = None if limits is None else limits.float().contiguous()
    jitter = None if jitter is None else jitter.float().contiguous()
    tiles = tile(spec.samples), tile(spec.importance)
    kernel: Any = render_forward
    with torch.cuda.device_of(planes):
        kernel[(math.ceil(n * r / TUNING.rays),)](
            stored,
            origins,
            directions,
            origins if limits is None else limits,
            origins if jitter is None else jitter,
            origins if u is None else u,
            *weights,
            out,
            scalars,
            depths if keep else scalars,
            rays=n * r, rays_per_image=r, near=float(spec.near), far=float(spec.far),
            S=spec.samples, TS=tiles[0], LOG_TS=tiles[0].bit_length() - 1,
            I=spec.importance, TI=tiles[1], LOG_TI=tiles[1].bit_length() - 1,
            LIMITS=limits is not None, JITTER=jitter is not None, U=u is not None, DISPARITY=spec.disparity,
            KEEP=keep, RAYS=TUNING.rays, num_warps=max(TUNING.warps, TUNING.warps * max(tiles) // 64),
            **_shared(stored, decoder, spec), **_limited(TUNING.registers),
        )  # fmt: skip
    return out, scalars, depths


def backward(
    d_out: Tensor,
    d_scalars: Tensor,
    planes: Tensor,
    origins: Tensor,
    directions: Tensor,
    decoder: Decoder,
    depths: Tensor,
    spec: TriplaneSpec,
    of_planes: bool,
    of_rays: bool,
) -> tuple[Tensor, ...]:
    """Gradients of planes, origins and directions (each empty where not asked for), and of all of the decoder, flat."""
    from cuda_ops.triplane_backward_kernels import render_backward

    n, r = origins.shape[:2]
    like = {"dtype": torch.float32, "device": planes.device}
    _, _, channels, height, width = planes.shape
    d_planes = torch.zeros(len(planes), 3, height, width, channels, **like) if of_planes else torch.empty(0, **like)
    d_origins, d_directions = (torch.empty((n, r, 3) if of_rays else 0, **like) for _ in range(2))
    count = min(n * r, TUNING.programs)
    each = math.ceil(n * r / max(count, 1))
    count = math.ceil(n * r / max(each, 1))
    partial = torch.empty(count, sum(x.numel() for x in decoder), **like)
    if count:
        stored, weights = _stored(planes, spec), [x.float().contiguous() for x in decoder]
        both = tile(depths.shape[-1])
        block = min(TUNING.block, both)
        kernel: Any = render_backward
        with torch.cuda.device_of(planes):
            kernel[(count,)](
                stored, origins.float().contiguous(), directions.float().contiguous(), *weights, depths,
                d_out.float().contiguous(), d_scalars.float().contiguous(),
                d_planes if of_planes else partial,
                *((d_origins, d_directions) if of_rays else (partial, partial)),
                partial,
                rays=n * r, rays_per_image=r, each=each,
                K=depths.shape[-1], T=both, B=block, BLOCKS=-(-depths.shape[-1] // block),
                PLANES=of_planes, POINTS=of_rays, num_warps=block // 16, num_stages=1,
                **_shared(stored, decoder, spec), **_limited(TUNING.backward_registers),
            )  # fmt: skip
    d_planes = d_planes.permute(0, 1, 4, 2, 3) if of_planes else d_planes
    return d_planes, d_origins, d_directions, partial.sum(0)  # in the same order always
