# SPDX-License-Identifier: Apache-2.0
"""FiLM-SIREN layers of StyleSDF (arXiv 2112.11427, sections 3.1 and A.1) and CNeRF, alone or several side by side.

A layer is ``sin(frequency * (W x + b) + phase)``. Frequency and bias are folded into weight and phase of each scene
(:class:`FilmLinear`), so that the layer on points is one matrix product and one sine.

The gradient of a linear map of the last layer with respect to the points is pulled back through the layers as ordinary
tensors (:func:`pull_back`): one more product per layer, and a loss on it needs one ordinary backward.

Shape legend: N scenes, G layers side by side (an axis that is there only with ``groups``), P any axes of points, I and
O inputs and outputs of a layer, W width of the style code. ``...`` is N or N, G.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facelab.nn.init import uniform_

LEAK = 0.2
FREQUENCY_GAIN, FREQUENCY_SHIFT, PHASE_GAIN = 15.0, 30.0, 0.25
Kind = Literal["normal", "freq"]


# ---------------------------------------------------------------- initial values; the fan-in is the last axis


@torch.no_grad()
def kaiming_normal_(weight: Tensor, generator: torch.Generator, gain: float = 1.0) -> Tensor:
    """Fill (..., out, in) with ``gain`` times the Kaiming normal rule of LeakyReLU(0.2), fan in."""
    return weight.normal_(0, gain * math.sqrt(2 / (1 + LEAK**2) / weight.shape[-1]), generator=generator)


@torch.no_grad()
def frequency_uniform_(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Fill (..., out, in) with U(+-sqrt(6 / in) / 25): SIREN for frequencies around 30."""
    return uniform_(weight, math.sqrt(6 / weight.shape[-1]) / 25, generator)


@torch.no_grad()
def first_uniform_(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Fill the weight of a layer that sees points with U(+-1/3)."""
    return uniform_(weight, 1 / 3, generator)


@torch.no_grad()
def fan_in_bias_(bias: Tensor, fan_in: int, generator: torch.Generator) -> Tensor:
    """Fill with U(+-1/sqrt(fan_in))."""
    return uniform_(bias, 1 / math.sqrt(fan_in), generator)


@torch.no_grad()
def scaled_linear_(weight: Tensor, bias: Tensor, kind: Kind, generator: torch.Generator) -> None:
    """Fill a plain linear layer: ``normal`` 0.25 times Kaiming, ``freq`` as :func:`frequency_uniform_`."""
    if kind == "normal":
        kaiming_normal_(weight, generator, 0.25)
    else:
        frequency_uniform_(weight, generator)
    fan_in_bias_(bias, weight.shape[-1], generator)


# ---------------------------------------------------------------- values at points


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``W x + b`` at points.

    Args:
        x: (..., P, I).
        weight: (..., O, I) of each scene, or (O, I) for all.
        bias: (..., O) or (O,).

    Returns:
        (..., P, O).
    """
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    rows, weights = _batches(x, weight)
    product = torch.baddbmm(bias.reshape(-1, 1, bias.shape[-1]), rows, weights.transpose(1, 2))
    return product.reshape(*x.shape[:-1], weight.shape[-2])


def sine_affine_plain(a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``affine(sin(a), weight, bias)``: the definition of :func:`sine_affine`, kept by autograd step by step."""
    return affine(torch.sin(a), weight, bias)


def sine_affine(a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``affine(sin(a), weight, bias)``, of which the backward keeps ``a`` alone: the sine is computed again there.

    Args:
        a: (..., P, I) arguments of the sine.
        weight, bias: see :func:`affine`.

    Returns:
        (..., P, O). Differentiable any number of times.
    """
    return _SineAffine.apply(a, weight, bias)


class _SineAffine(torch.autograd.Function):
    """See :func:`sine_affine`; the backward is made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(a, weight, bias)
        return affine(torch.sin(a), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        a, weight, bias = ctx.saved_tensors
        grad_a = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = _of_weight(grad, torch.sin(a), weight)
        if ctx.needs_input_grad[2]:
            lead = bias.shape[:-1]
            grad_bias = grad.reshape(*lead, -1, bias.shape[-1]).sum(-2)
        if ctx.needs_input_grad[0]:
            grad_a = torch.cos(a) * times(grad, weight)
        return grad_a, grad_weight, grad_bias


# ---------------------------------------------------------------- gradients at points


def pull_back(arguments: Sequence[Tensor], layers: Sequence[FilmLinear], upper: Tensor) -> Tensor:
    """The gradient of ``sum(upper * sin(arguments[-1]))`` with respect to what entered the first layer.

    ``g_(l-1) = (cos(a_l) * g_l) W_l`` from the last layer down to the points, as ordinary tensors of the graph.

    Args:
        arguments: (..., P, O_l) of the sines of all layers in order.
        layers: what made them of the points and of each other, as many.
        upper: weight of the distance, broadcastable to the last argument.

    Returns:
        (..., P, 3).
    """
    gradient = upper.expand_as(arguments[-1])
    for argument, layer in zip(reversed(arguments), reversed(layers), strict=True):
        gradient = cosine_back(argument, gradient, layer.weight)
    return gradient


def cosine_back_plain(a: Tensor, upper: Tensor, weight: Tensor) -> Tensor:
    """``(cos(a) * upper) W``: the definition of :func:`cosine_back`, kept by autograd step by step."""
    return times(torch.cos(a) * upper, weight)


def cosine_back(a: Tensor, upper: Tensor, weight: Tensor) -> Tensor:
    """``(cos(a) * upper) W``, one step of :func:`pull_back`; the backward keeps the arguments alone.

    Args:
        a, upper: (..., P, O).
        weight: (..., O, I) of each scene, or (O, I) for all.

    Returns:
        (..., P, I). Differentiable any number of times.
    """
    return _CosineBack.apply(a, upper, weight)


class _CosineBack(torch.autograd.Function):
    """See :func:`cosine_back`; the backward is made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, upper: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(a, upper, weight)
        return times(torch.cos(a) * upper, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        a, upper, weight = ctx.saved_tensors
        grad_a = grad_upper = grad_weight = None
        cosine = torch.cos(a)
        if ctx.needs_input_grad[2]:
            grad_weight = _of_weight(cosine * upper, grad, weight)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            through = times(grad, weight.transpose(-1, -2))
            grad_upper = cosine * through
            grad_a = -torch.sin(a) * upper * through
        return grad_a, grad_upper, grad_weight


def times(x: Tensor, weight: Tensor) -> Tensor:
    """(..., P, O) times (..., O, I) or (O, I) -> (..., P, I)."""
    if weight.ndim == 2:
        return torch.matmul(x, weight)
    rows, weights = _batches(x, weight)
    return torch.bmm(rows, weights).reshape(*x.shape[:-1], weight.shape[-1])


def _of_weight(rows: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    """Sum over the points of outer products (..., P, O) by (..., P, I), in the shape of the weight."""
    if weight.ndim == 2:
        return rows.flatten(0, -2).t() @ columns.flatten(0, -2)
    (left, _), (right, _) = _batches(rows, weight), _batches(columns, weight)
    return torch.bmm(left.transpose(1, 2), right).reshape(weight.shape)


def _batches(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(..., P, C) and (..., O, I) -> (B, P, C) and (B, O, I) with one batch axis for all in front."""
    count = weight.shape[:-2].numel()
    return x.reshape(count, -1, x.shape[-1]), weight.reshape(count, *weight.shape[-2:])


# ---------------------------------------------------------------- layers


@dataclass(frozen=True)
class FilmLinear:
    """A FiLM layer of N scenes ready for points: ``sin(weight x + bias)``.

    Attributes:
        weight: (..., O, I), frequency times weight.
        bias: (..., O), frequency times bias, plus phase.
    """

    weight: Tensor
    bias: Tensor

    def expand(self, count: int) -> FilmLinear:
        """One scene repeated ``count`` times; other counts must agree. ValueError if they do not."""
        if len(self.weight) == count:
            return self
        if len(self.weight) != 1:
            raise ValueError(f"{len(self.weight)} scenes cannot be seen from {count} cameras: give 1 or {count}")
        return FilmLinear(
            self.weight.expand(count, *self.weight.shape[1:]), self.bias.expand(count, *self.bias.shape[1:])
        )


class StackedLinear(nn.Module):
    """``W x + b``, or ``groups`` of them side by side: weight ((G,) O, I), bias ((G,) O).

    Parameters are zero until :meth:`reset_parameters`; ``kind`` is the rule of :func:`scaled_linear_`.
    """

    def __init__(self, inputs: int, outputs: int, kind: Kind, groups: int | None = None) -> None:
        super().__init__()
        lead = () if groups is None else (groups,)
        self.kind: Kind = kind
        self.weight = nn.Parameter(torch.zeros(*lead, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(*lead, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) codes -> (..., O); with groups (N, G, I) -> (N, G, O)."""
        if self.weight.ndim == 2:
            return F.linear(x, self.weight, self.bias)
        return torch.einsum("ngi,goi->ngo", x, self.weight) + self.bias

    def of_scenes(self, count: int) -> FilmLinear:
        """Weight and bias of N scenes, the same for each, for :func:`affine` of grouped layers."""
        return FilmLinear(self.weight.expand(count, *self.weight.shape), self.bias.expand(count, *self.bias.shape))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw weight and bias."""
        scaled_linear_(self.weight, self.bias, self.kind, generator)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, kind={self.kind}"


class FilmSine(nn.Module):
    """A FiLM-SIREN layer, or ``groups`` of them side by side.

    ``sin(f * (W x + b) + p)`` with the frequency ``f = 15 (W_g w + b_g) + 30`` and the phase
    ``p = 0.25 (W_p w + b_p)`` of a style code w (StyleSDF, section A.1). Parameters are zero until
    :meth:`reset_parameters`; ``first`` marks a layer that sees points.
    """

    def __init__(
        self, inputs: int, outputs: int, style_dim: int, groups: int | None = None, *, first: bool = False
    ) -> None:
        super().__init__()
        lead = () if groups is None else (groups,)
        self.first = first
        self.weight = nn.Parameter(torch.zeros(*lead, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(*lead, outputs))
        self.frequency = StackedLinear(style_dim, outputs, "normal", groups)
        self.phase = StackedLinear(style_dim, outputs, "normal", groups)

    def modulate(self, style: Tensor) -> FilmLinear:
        """Style codes (N, W), with groups (N, G, W), -> the layer of each scene."""
        frequency = FREQUENCY_GAIN * self.frequency(style) + FREQUENCY_SHIFT
        phase = PHASE_GAIN * self.phase(style)
        return FilmLinear(frequency[..., None] * self.weight, frequency * self.bias + phase)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all parameters (StyleSDF's rules)."""
        (first_uniform_ if self.first else frequency_uniform_)(self.weight, generator)
        fan_in_bias_(self.bias, self.weight.shape[-1], generator)
        self.frequency.reset_parameters(generator)
        self.phase.reset_parameters(generator)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, first={self.first}"


class StyleMapping(nn.Module):
    """Latent code -> style code: linear layers, each followed by LeakyReLU(0.2) without a gain (StyleSDF).

    The latent is not normalised. Parameters are those of ``nn.Linear``, zero until :meth:`reset_parameters`.
    """

    def __init__(self, latent_dim: int, style_dim: int, layers: int = 3) -> None:
        super().__init__()
        widths = [latent_dim, *[style_dim] * layers]
        self.linears = nn.ModuleList(
            StackedLinear(a, b, "normal") for a, b in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, latent: Tensor) -> Tensor:
        """(N, latent_dim) -> (N, style_dim)."""
        for linear in self.linears:
            latent = F.leaky_relu(linear(latent), LEAK)
        return latent

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Kaiming normal weights (a = 0.2, fan in), biases U(+-1/sqrt(fan_in))."""
        for linear in self.linears:
            assert isinstance(linear, StackedLinear)
            kaiming_normal_(linear.weight, generator)
            fan_in_bias_(linear.bias, linear.weight.shape[-1], generator)
