# SPDX-License-Identifier: Apache-2.0
"""A whole tri-plane rendering as one kernel: coarse samples, importance samples, compositing; and its gradient.

One program walks over a few rays. The samples of a ray are one tile: bilinear lookups of planes whose channels lie
together, two small matrix products, weights of the coarse intervals, inverse-CDF samples, the same field there, and
the compositing of both sets. Nothing but pixels is written; the features of both sets stay in registers.

Both sets are in ascending order (coarse by construction, fine because the numbers they are drawn from are sorted),
so they are merged by counting: sample i of one set stands behind as many samples of the other as are smaller, and
the product of transmittances before it is a prefix of either set times a prefix of the other.

Where a gradient is wanted the depths of all samples are kept too, ascending, and nothing else of the size of the
samples. The backward takes them as constants (importance sampling has no gradient), computes the field of a ray once
more, adds to the planes' gradient with atomics and leaves a sum of the decoder's gradients per program, which are
added up afterwards. The order of the atomic additions, and with it the last digits of the planes' gradient, changes
from run to run; the decoder's and the rays' do not. Gradients of first order only.

The plain twin, with the same arguments in other clothes, is ``facelab.rendering.midpoint.render_midpoints``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from cuda_ops import dispatch

Decoder = tuple[Tensor, Tensor, Tensor, Tensor]
Precision = Literal["fp32", "tf32", "fp16"]
MAX_SAMPLES = 256  # of either set
_library = torch.library.Library("facelab", "FRAGMENT")
_INPUTS = "Tensor planes, Tensor origins, Tensor directions, Tensor w1, Tensor b1, Tensor w2, Tensor b2"
_SPEC = (
    "int[] axes, float scale, bool concat, float near, float far, int samples, int importance, bool disparity, "
    "bool white, str precision"
)
_library.define(
    f"triplane_render({_INPUTS}, Tensor? limits, Tensor? jitter, Tensor? u, {_SPEC}, bool keep) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"triplane_render_backward(Tensor d_features, Tensor d_scalars, {_INPUTS}, Tensor depths, {_SPEC}, "
    "bool of_planes, bool of_rays) -> (Tensor, Tensor, Tensor, Tensor)"
)


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
            ``fp16`` halves, and reads and interpolates the planes in halves; its gradients are ``tf32``. Sums are in
            float32.
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

    def arguments(self) -> tuple[Any, ...]:
        """As the ops take them."""
        return ([a for pair in self.axes for a in pair], *(getattr(self, field.name) for field in fields(self)[1:]))

    @classmethod
    def of(cls, axes: Sequence[int], *rest: Any) -> TriplaneSpec:
        """Back from :meth:`arguments`."""
        a, b, c, d, e, f = axes
        return cls(((a, b), (c, d), (e, f)), *rest)


@dataclass(frozen=True)
class Rendering:
    """Of N x R rays: features (N, R, F) in about [0, 1]; depth (weighted sum), opacity and mean depth (N, R, 1)."""

    features: Tensor
    depth: Tensor
    opacity: Tensor
    mean_depth: Tensor


def problem(planes: Tensor, decoder: Decoder, spec: TriplaneSpec) -> str | None:
    """Why the kernels cannot take these arguments, or None when they can."""
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
    """Render N x R rays. Planes, decoder, origins and directions may want gradients; the depths have none.

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
        RuntimeError: no kernel can run here (see :mod:`cuda_ops.dispatch`) or not with these sizes; a second
            derivative was asked for.
    """
    inputs = (planes, origins, directions, *decoder)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
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
    features, scalars, _ = torch.ops.facelab.triplane_render(*inputs, limits, jitter, u, *spec.arguments(), keep)
    return Rendering(features, *scalars.unbind(0))


@torch.library.impl(_library, "triplane_render", "CompositeExplicitAutograd")
def _render(
    planes: Tensor, origins: Tensor, directions: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from cuda_ops import triplane_launch

    spec, keep = TriplaneSpec.of(*rest[3:-1]), rest[-1]
    limits, jitter, u = rest[:3]
    return triplane_launch.forward(planes, origins, directions, (w1, b1, w2, b2), limits, jitter, u, spec, keep)


@torch.library.register_fake("facelab::triplane_render", lib=_library)
def _render_fake(
    planes: Tensor, origins: Tensor, directions: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    spec, keep = TriplaneSpec.of(*rest[3:-1]), rest[-1]
    n, r = origins.shape[:2]
    empty = lambda *shape: planes.new_empty(shape, dtype=torch.float32)
    kept = spec.samples + spec.importance if keep else 0
    return empty(n, r, w2.shape[0] - 1), empty(3, n, r, 1), empty(n, r, kept)


@torch.library.impl(_library, "triplane_render_backward", "CompositeExplicitAutograd")
def _backward_op(d_features: Tensor, d_scalars: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from cuda_ops import triplane_launch

    planes, origins, directions, *decoder, depths = rest[:8]
    spec, (of_planes, of_rays) = TriplaneSpec.of(*rest[8:-2]), rest[-2:]
    w1, b1, w2, b2 = decoder
    return triplane_launch.backward(
        d_features, d_scalars, planes, origins, directions, (w1, b1, w2, b2), depths, spec, of_planes, of_rays
    )


@torch.library.register_fake("facelab::triplane_render_backward", lib=_library)
def _backward_fake(d_features: Tensor, d_scalars: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    planes, origins, _, *decoder = rest[:7]
    of_planes, of_rays = rest[-2:]
    empty = lambda *shape: planes.new_empty(shape, dtype=torch.float32)
    n, _, c, h, w = planes.shape
    d_planes = empty(n, 3, h, w, c).permute(0, 1, 4, 2, 3) if of_planes else empty(0)
    d_rays = [empty(*origins.shape) if of_rays else empty(0) for _ in range(2)]
    return d_planes, *d_rays, empty(sum(x.numel() for x in decoder))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.spec = inputs[10:-1]
    ctx.save_for_backward(*inputs[:7], output[2])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, d_features: Tensor, d_scalars: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    *inputs, depths = ctx.saved_tensors
    if depths.shape[-1] == 0:
        raise RuntimeError("triplane_render: the gradient needs the depths, call it with keep=True")
    needs = ctx.needs_input_grad
    *found, flat = torch.ops.facelab.triplane_render_backward(
        d_features, d_scalars, *inputs, depths, *ctx.spec, needs[0], needs[1] or needs[2]
    )
    decoder = inputs[3:]
    parts = zip(flat.split([x.numel() for x in decoder]), decoder, strict=True)
    found += [part.view(x.shape) for part, x in parts]
    gradients = [g.to(x.dtype) if need else None for g, x, need in zip(found, inputs, needs)]
    return *gradients, *[None] * (len(needs) - len(gradients))


def _second_order(ctx: Any, *_: Any) -> tuple[Any, ...]:
    raise RuntimeError(
        "triplane_render has gradients of first order, but a second one is asked for; use "
        "facelab.rendering.midpoint.render_midpoints (FACELAB_OPS=reference), which has all"
    )


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Nothing is kept for what is refused."""


torch.library.register_autograd("facelab::triplane_render", _backward, setup_context=_setup, lib=_library)
torch.library.register_autograd(
    "facelab::triplane_render_backward", _second_order, setup_context=_setup_second, lib=_library
)


def _check(name: str, x: Tensor | None, shape: Sequence[int]) -> None:
    if x is not None and tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(x.shape)}")
