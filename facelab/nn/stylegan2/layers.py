# SPDX-License-Identifier: Apache-2.0
"""Layers with an equalised learning rate: the weight is stored with unit variance and scaled when it is used.

StyleGAN2 (arXiv 1912.04958), after Progressive GAN (arXiv 1710.10196, section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cuda_ops import activation_gain, bias_act, conv2d_resample, setup_filter

FILTER = (1, 3, 3, 1)  # binomial low-pass of every resampling layer


def normalize_second_moment(x: Tensor, eps: float = 1e-8) -> Tensor:
    """x / sqrt(mean of x^2 over the last dimension + eps)."""
    return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()


@runtime_checkable
class Resettable(Protocol):
    """A module whose own first weights are drawn from an explicit generator."""

    def reset_parameters(self, generator: torch.Generator) -> None: ...


def reset_children(module: nn.Module, generator: torch.Generator) -> None:
    """``reset_parameters(generator)`` of every direct child that has one, in order; walks through plain containers."""
    for child in module.children():
        if isinstance(child, Resettable):
            child.reset_parameters(generator)
        else:
            reset_children(child, generator)


class FullyConnected(nn.Module):
    """Linear layer with equalised learning rate.

    The effective weight is ``weight * lr_multiplier / sqrt(in_features)``, the effective bias ``bias *
    lr_multiplier``; the stored weight starts as N(0, 1) / lr_multiplier, the stored bias as ``bias_init``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activation: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.activation, self.lr_multiplier, self.bias_init = activation, lr_multiplier, bias_init
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init))) if bias else None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the weight, set the bias."""
        self.weight.normal_(generator=generator).div_(self.lr_multiplier)
        if self.bias is not None:
            self.bias.fill_(self.bias_init)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the number type of ``x``."""
        weight = self.weight.to(x.dtype) * (self.lr_multiplier / math.sqrt(self.weight.shape[1]))
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        if bias is not None and self.lr_multiplier != 1:  # two launches less in every style
            bias = bias * self.lr_multiplier
        if self.activation == "linear":
            return F.linear(x, weight, bias)
        return bias_act(F.linear(x, weight), bias, dim=-1 % x.ndim, act=self.activation)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, activation={self.activation}, lr_multiplier={self.lr_multiplier:g}"


class EqualizedConv2d(nn.Module):
    """Convolution with equalised learning rate, optional resampling, bias and activation; size is kept at up = down = 1.

    The effective weight is ``weight / sqrt(in_channels * kernel_size^2)``. Resampling filters with the binomial
    [1, 3, 3, 1].

    Args:
        up: integer factor by which the image grows; ``down``: by which it shrinks.
        clamp: the output is limited to +-``clamp * gain``; None: not.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bias: bool = True,
        activation: str = "linear",
        up: int = 1,
        down: int = 1,
        resample_filter: Sequence[float] = FILTER,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.up, self.down, self.clamp = activation, up, down, clamp
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("resample_filter", setup_filter(list(resample_filter), device="cpu"), persistent=False)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Weight N(0, 1), bias 0."""
        self.weight.normal_(generator=generator)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H * up / down, W * up / down), times ``gain``."""
        weight = (self.weight * (1 / math.sqrt(self.weight[0].numel()))).to(x.dtype)
        x = conv2d_resample(
            x,
            weight,
            f=cast(Tensor, self.resample_filter),
            up=self.up,
            down=self.down,
            padding=self.weight.shape[-1] // 2,
            flip_weight=self.up == 1,
        )
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        clamp = self.clamp * gain if self.clamp is not None else None
        return bias_act(x, bias, act=self.activation, gain=activation_gain(self.activation) * gain, clamp=clamp)

    def extra_repr(self) -> str:
        out_channels, in_channels, kernel, _ = self.weight.shape
        return f"{in_channels}, {out_channels}, {kernel}, activation={self.activation}, up={self.up}, down={self.down}"
