# SPDX-License-Identifier: Apache-2.0
"""Convolutions whose second derivatives are convolutions of the usual kind.

R1 differentiates a discriminator twice. Torch's own second derivative computes the gradient of the weights as a convolution
with a kernel as large as the picture; at 512 px in half precision cuDNN takes 10 ms for one of these (measured on an
H200: 107 of the 153 ms of EG3D's R1 phase). Here every derivative is one of three linear maps, each with a kernel of
its own: the convolution, the transposed convolution and the gradient of the weights. The derivatives of each are the
other two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Of a convolution, or of a transposed one.

    Attributes:
        stride, padding, extra: rows and columns; ``extra`` is added at the end of a transposed convolution's result.
        groups: of channels that do not see each other.
        transposed: which of the two.
    """

    stride: Pair
    padding: Pair
    extra: Pair
    groups: int
    transposed: bool

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution itself."""
        return torch.ops.aten.convolution(
            x, weight, None, self.stride, self.padding, (1, 1), self.transposed, self.extra, self.groups
        )

    def adjoint(self, x: torch.Size, y: torch.Size, weight: torch.Size) -> Geometry:
        """What carries gradients of the result (of shape ``y``) back to the input (of shape ``x``)."""
        if self.transposed:
            return Geometry(self.stride, self.padding, (0, 0), self.groups, False)
        rows, columns = (
            x[2 + i] - (y[2 + i] - 1) * self.stride[i] + 2 * self.padding[i] - weight[2 + i] for i in (0, 1)
        )
        return Geometry(self.stride, self.padding, (rows, columns), self.groups, True)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return geometry.apply(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        by_x = by_weight = None
        if ctx.needs_input_grad[0]:
            back = ctx.geometry.adjoint(x.shape, grad.shape, weight.shape)
            by_x = _Convolution.apply(grad, weight, back)
        if ctx.needs_input_grad[1]:
            by_weight = _WeightGradient.apply(grad, x, weight.shape, ctx.geometry)
        return by_x, by_weight, None


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(grad, x)
        ctx.geometry, ctx.shape = geometry, shape
        g = geometry
        shaped = torch.empty(shape, dtype=x.dtype, device=x.device)  # its numbers are not looked at
        return torch.ops.aten.convolution_backward(
            grad, x, shaped, None, g.stride, g.padding, (1, 1), g.transposed, g.extra, g.groups, (False, True, False)
        )[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        outer, x = ctx.saved_tensors
        by_outer = by_x = None
        if ctx.needs_input_grad[0]:
            by_outer = _Convolution.apply(x, grad, ctx.geometry)
        if ctx.needs_input_grad[1]:
            back = ctx.geometry.adjoint(x.shape, outer.shape, ctx.shape)
            by_x = _Convolution.apply(outer, grad, back)
        return by_outer, by_x, None, None


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with fast second derivatives.

    Args:
        x: (N, C, H, W).
        weight: (D, C / groups, h, w).
        bias: (D,).

    Returns:
        (N, D, H', W'), in autocast's type where it is on.
    """
    if not _differentiated(x, weight):
        return F.conv2d(x, weight, bias, stride, padding, 1, groups)
    x, weight = _cast(x, weight)
    y = _Convolution.apply(x, weight, Geometry(_pair(stride), _pair(padding), (0, 0), groups, False))
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]


def conv_transpose2d(
    x: Tensor, weight: Tensor, stride: int | Pair = 1, padding: int | Pair = 0, groups: int = 1
) -> Tensor:
    """``torch.nn.functional.conv_transpose2d`` with fast second derivatives: x (N, C, H, W), weight (C, D / groups, h, w)."""
    if not _differentiated(x, weight):
        return F.conv_transpose2d(x, weight, None, stride, padding, 0, groups)
    x, weight = _cast(x, weight)
    return _Convolution.apply(x, weight, Geometry(_pair(stride), _pair(padding), (0, 0), groups, True))


def _differentiated(x: Tensor, weight: Tensor) -> bool:
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return wanted and not torch.compiler.is_compiling()


def _cast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Autocast does not look into functions of ours: what it would do."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x, weight
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
