# SPDX-License-Identifier: Apache-2.0
"""Small layers shared by the networks.

Shapes: N batch, C channels, H and W image height and width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cuda_ops.convolution_derivatives import conv2d
from facelab.nn.init import uniform_

Initialisation = Literal["default", "kaiming"]
LEAK = 0.2  # negative slope of every LeakyReLU, and the ``a`` of the Kaiming rule that goes with it


def coordinate_channels(height: int, width: int) -> Tensor:
    """(1, 2, height, width) float32: the row, then the column, both linspace(-1, 1) inclusive of the ends."""
    row = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    column = torch.linspace(-1, 1, width)[None, :].expand(height, width)
    return torch.stack([row, column])[None]


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` that draws its first weights from an explicit generator (see :func:`reset_conv`)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding: int = 0
    ) -> None:
        # The values are drawn by reset(): those of nn.Conv2d would come from the global generator.
        with torch.device("meta"):
            super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding)
        self.to_empty(device="cpu")

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D, H', W'), with fast second derivatives."""
        (sy, sx), (py, px) = self.stride, self.padding
        return conv2d(input, self.weight, self.bias, (sy, sx), (int(py), int(px)))

    def reset(self, generator: torch.Generator, initialisation: Initialisation = "default") -> None:
        """Draw weight and bias; see :func:`reset_conv`."""
        assert self.bias is not None
        reset_conv([self.weight], self.bias, generator, initialisation)


class CoordConv2d(nn.Module):
    """Convolution of the channels [x, row, column] (CoordConv, arXiv 1807.03247), with zero padding.

    The coordinates are the same for every sample, so their share of the result is one map per
    image size, computed once for the whole batch and added in place of the bias. This is the same
    linear map as a convolution of the concatenated channels (equal up to float rounding), without
    the copy of x and without channel counts that are no multiple of 8, which tensor cores dislike.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.coord_weight = nn.Parameter(torch.empty(out_channels, 2, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.stride, self.padding = stride, padding

    def reset(self, generator: torch.Generator, initialisation: Initialisation = "default") -> None:
        """Draw weights and bias with the fan-in of the concatenated channels; see :func:`reset_conv`."""
        reset_conv([self.weight, self.coord_weight], self.bias, generator, initialisation)

    def forward(self, x: Tensor, coordinates: Tensor) -> Tensor:
        """x (N, C, H, W), coordinates (1, 2, H, W) of :func:`coordinate_channels` -> (N, out, H', W')."""
        y = conv2d(x, self.weight, None, self.stride, self.padding)
        # Full precision under autocast: half floats cannot tell neighbouring pixels of a large image
        # apart. It is the size of one sample, so it costs next to nothing.
        with torch.autocast(x.device.type, enabled=False):
            position = F.conv2d(coordinates, self.coord_weight, self.bias, self.stride, self.padding)
        return y.add_(position)

    def extra_repr(self) -> str:
        out_channels, in_channels, kernel, _ = self.weight.shape
        return f"{in_channels}+2, {out_channels}, kernel_size={kernel}, stride={self.stride}, padding={self.padding}"


@torch.no_grad()
def reset_conv(
    weights: list[nn.Parameter], bias: nn.Parameter, generator: torch.Generator, initialisation: Initialisation
) -> None:
    """Draw a convolution whose input channels are spread over ``weights``, in order.

    Args:
        weights: (out, C_i, k, k) each; the fan-in is that of all of them together.
        initialisation: ``default``: PyTorch's U(+-1/sqrt(fan_in)); ``kaiming``: N(0, gain^2 / fan_in)
            with the gain of LeakyReLU(0.2). The bias is U(+-1/sqrt(fan_in)) either way.
    """
    out_channels, kernel = weights[0].shape[0], weights[0].shape[-2:]
    whole = torch.empty(out_channels, sum(w.shape[1] for w in weights), *kernel)
    fan_in = whole[0].numel()
    if initialisation == "kaiming":
        whole.normal_(0, math.sqrt(2 / (1 + LEAK**2) / fan_in), generator=generator)
    else:
        uniform_(whole, 1 / math.sqrt(fan_in), generator)
    for weight, part in zip(weights, whole.split([w.shape[1] for w in weights], dim=1), strict=True):
        weight.copy_(part)
    uniform_(bias, 1 / math.sqrt(fan_in), generator)
