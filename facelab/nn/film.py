# SPDX-License-Identifier: Apache-2.0
"""FiLM-SIREN layers of StyleSDF (arXiv 2112.11427, sections 3.1 and A.1) and CNeRF, alone or several side by side.

A layer is ``sin(frequency * (W x + b) + phase)``. Frequency and bias are folded into weight and phase of each scene
(:class:`FilmLinear`), so that the layer on points is one matrix product and one sine.

Values may travel with their derivatives with respect to the point: the axis T before the points holds the value
alone (T = 1) or the value and its three derivatives along x, y and z (T = 4). They are pushed forward layer by
layer, ``dy = cos(a) W' dx``, so a loss on the gradient of a field needs one ordinary backward.

Shape legend: N scenes, G layers side by side (an axis that is there only with ``groups``), T as above, P points,
I and O inputs and outputs of a layer, W width of the style code. ``...`` is N or N, G.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facelab.nn.init import uniform_

LEAK = 0.2
FREQUENCY_GAIN, FREQUENCY_SHIFT, PHASE_GAIN = 15.0, 30.0, 0.25
TANGENTS = 4  # the value and its derivatives along x, y and z
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


# ---------------------------------------------------------------- sines of values and derivatives


def point_tangents(points: Tensor, scale: float = 1.0) -> Tensor:
    """(..., P, 3) points -> (..., 4, P, 3): ``scale * points`` and their derivatives, ``scale`` times the unit vectors."""
    units = (scale * torch.eye(3, device=points.device, dtype=points.dtype))[:, None]
    units = units.expand(*points.shape[:-2], 3, *points.shape[-2:])
    return torch.cat([(scale * points)[..., None, :, :], units], dim=-3)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``W x + b`` of values and derivatives; the bias enters the value alone.

    Args:
        x: (..., T, P, I).
        weight: (..., O, I) of each scene, or (O, I) for all.
        bias: (..., O) or (O,).

    Returns:
        (..., T, P, O).
    """
    if weight.ndim == 2:
        if x.shape[-3] == 1:
            return F.linear(x, weight, bias)
        product = F.linear(x, weight)
        return torch.cat([product[..., :1, :, :] + bias, product[..., 1:, :, :]], dim=-3)
    tangents, points = x.shape[-3:-1]
    rows, weights = x.reshape(-1, tangents * points, x.shape[-1]), weight.reshape(-1, *weight.shape[-2:])
    biases = bias.reshape(-1, 1, bias.shape[-1])
    if tangents == 1:
        product = torch.baddbmm(biases, rows, weights.transpose(1, 2))
    else:
        product = torch.bmm(rows, weights.transpose(1, 2))
        product[:, :points] += biases
    return product.unflatten(1, (tangents, points)).unflatten(0, weight.shape[:-2])


def sine(a: Tensor) -> Tensor:
    """Sine of values and derivatives (..., T, P, C): ``sin(a)``, and ``cos(a) da`` where there are derivatives."""
    if a.shape[-3] == 1:
        return torch.sin(a)
    value = a[..., :1, :, :]
    return torch.cat([torch.sin(value), torch.cos(value) * a[..., 1:, :, :]], dim=-3)


def sine_affine_plain(a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``affine(sine(a), weight, bias)``: the definition of :func:`sine_affine`, kept by autograd step by step."""
    return affine(sine(a), weight, bias)


def sine_affine(a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``affine(sine(a), weight, bias)``, of which the backward keeps ``a`` alone: the sine is computed again there.

    Args:
        a: (..., T, P, I) arguments of the sine.
        weight, bias: see :func:`affine`.

    Returns:
        (..., T, P, O). Differentiable any number of times.
    """
    return _SineAffine.apply(a, weight, bias)


class _SineAffine(torch.autograd.Function):
    """See :func:`sine_affine`; the backward is made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(a, weight, bias)
        return affine(sine(a), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        a, weight, bias = ctx.saved_tensors
        grad_a = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = _product_over_points(grad, sine(a), weight)
        if ctx.needs_input_grad[2]:
            grad_bias = grad[..., 0, :, :].sum(-2)
            grad_bias = grad_bias.reshape(-1, *bias.shape).sum(0)
        if ctx.needs_input_grad[0]:
            grad_a = _sine_backward(a, _back(grad, weight))
        return grad_a, grad_weight, grad_bias


def _back(grad: Tensor, weight: Tensor) -> Tensor:
    """(..., T, P, O) -> (..., T, P, I): the gradient of what entered :func:`affine`."""
    if weight.ndim == 2:
        return F.linear(grad, weight.t())
    tangents, points = grad.shape[-3:-1]
    rows = grad.reshape(-1, tangents * points, grad.shape[-1])
    product = torch.bmm(rows, weight.reshape(-1, *weight.shape[-2:]))
    return product.unflatten(1, (tangents, points)).unflatten(0, weight.shape[:-2])


def _product_over_points(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the weight of :func:`affine`, in its shape."""
    if weight.ndim == 2:
        return grad.flatten(0, -2).t() @ x.flatten(0, -2)
    scenes = weight.shape[:-2].numel()
    rows, inputs = grad.reshape(scenes, -1, grad.shape[-1]), x.reshape(scenes, -1, x.shape[-1])
    return torch.bmm(rows.transpose(1, 2), inputs).reshape(weight.shape)


def _sine_backward(a: Tensor, grad: Tensor) -> Tensor:
    """The gradient of ``a`` from that of ``sine(a)``."""
    if a.shape[-3] == 1:
        return torch.cos(a) * grad
    value, slopes = a[..., :1, :, :], a[..., 1:, :, :]
    through = (grad[..., 1:, :, :] * slopes).sum(-3, keepdim=True)
    cosine = torch.cos(value)
    of_value = cosine * grad[..., :1, :, :] - torch.sin(value) * through
    return torch.cat([of_value, cosine * grad[..., 1:, :, :]], dim=-3)


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
