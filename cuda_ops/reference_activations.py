# SPDX-License-Identifier: Apache-2.0
"""Plain torch twin of bias_act with its derivatives: the specification, the fallback and the test oracle.

Computed in float32 for float16 and bfloat16 inputs (float64 for float64), rounded once at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cuda_ops.reference_filters import accumulator

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


@dataclass(frozen=True)
class Activation:
    """An activation f with its derivatives and defaults.

    Attributes:
        function, first, second: f, f', f'' of (x, alpha).
        alpha, gain: what None stands for.
        curved: f'' is not zero everywhere, so a second order needs the input.
    """

    function: Callable[[Tensor, float], Tensor]
    first: Callable[[Tensor, float], Tensor]
    second: Callable[[Tensor, float], Tensor]
    alpha: float = 0.0
    gain: float = 1.0
    curved: bool = True


def _exp_below(x: Tensor) -> Tensor:
    """exp(x) for x < 0, else 1."""
    return torch.exp(x.clamp(max=0))


def _elu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= 0, x, torch.expm1(x.clamp(max=0)))


def _sigmoid_slope(x: Tensor) -> Tensor:
    return x.sigmoid() * (-x).sigmoid()


ACTIVATIONS: dict[str, Activation] = {
    "linear": Activation(
        lambda x, alpha: x, lambda x, alpha: torch.ones_like(x), lambda x, alpha: torch.zeros_like(x), curved=False
    ),
    "relu": Activation(
        lambda x, alpha: x.relu(),
        lambda x, alpha: (x > 0).to(x.dtype),
        lambda x, alpha: torch.zeros_like(x),
        gain=math.sqrt(2),
        curved=False,
    ),
    "lrelu": Activation(
        lambda x, alpha: F.leaky_relu(x, alpha),
        lambda x, alpha: torch.where(x > 0, 1.0, alpha).to(x.dtype),
        lambda x, alpha: torch.zeros_like(x),
        alpha=0.2,
        gain=math.sqrt(2),
        curved=False,
    ),
    "tanh": Activation(
        lambda x, alpha: x.tanh(),
        lambda x, alpha: 1 - x.tanh().square(),
        lambda x, alpha: -2 * x.tanh() * (1 - x.tanh().square()),
    ),
    "sigmoid": Activation(
        lambda x, alpha: x.sigmoid(),
        lambda x, alpha: _sigmoid_slope(x),
        lambda x, alpha: _sigmoid_slope(x) * (1 - 2 * x.sigmoid()),
    ),
    "elu": Activation(
        _elu,
        lambda x, alpha: _exp_below(x),
        lambda x, alpha: torch.where(x >= 0, 0.0, _exp_below(x)),
    ),
    "selu": Activation(
        lambda x, alpha: SELU_SCALE * torch.where(x >= 0, x, SELU_ALPHA * torch.expm1(x.clamp(max=0))),
        lambda x, alpha: SELU_SCALE * torch.where(x >= 0, 1.0, SELU_ALPHA * _exp_below(x)),
        lambda x, alpha: SELU_SCALE * torch.where(x >= 0, 0.0, SELU_ALPHA * _exp_below(x)),
    ),
    "softplus": Activation(
        lambda x, alpha: F.softplus(x, threshold=40.0),
        lambda x, alpha: x.sigmoid(),
        lambda x, alpha: _sigmoid_slope(x),
    ),
    "swish": Activation(
        lambda x, alpha: x * x.sigmoid(),
        lambda x, alpha: x.sigmoid() + x * _sigmoid_slope(x),
        lambda x, alpha: _sigmoid_slope(x) * (2 + x * (1 - 2 * x.sigmoid())),
        gain=math.sqrt(2),
    ),
}


def activation(act: str) -> Activation:
    """The entry of :data:`ACTIVATIONS`. ValueError for an unknown name."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}, expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[act]


def activation_gain(act: str) -> float:
    """The gain that :func:`bias_act` gives an activation by default; ValueError for an unknown name."""
    return activation(act).gain


def check_bias(x: Tensor, b: Tensor | None, dim: int, clamp: float | None) -> None:
    """ValueError when a bias does not fit ``x`` along ``dim``, or a clamp is negative."""
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"clamp is {clamp}, expected a number >= 0 or None")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}, expected a floating point tensor")
    if b is None:
        return
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim is {dim}, expected an axis of a tensor of shape {tuple(x.shape)}")
    if b.ndim != 1 or b.shape[0] != x.shape[dim]:
        raise ValueError(f"the bias has shape {tuple(b.shape)}, expected ({x.shape[dim]},) for dim {dim} of the input")


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """The twin of :func:`cuda_ops.bias_act`, where arguments and errors are said."""
    entry = activation(act)
    alpha = entry.alpha if alpha is None else float(alpha)
    gain = entry.gain if gain is None else float(gain)
    check_bias(x, b, dim, clamp)
    y = (entry.function(_biased(x, b, dim), alpha) * gain).to(x.dtype)
    if clamp is None:
        return y
    if not y.requires_grad:
        return y.clamp(-clamp, clamp)
    bound = y.new_full((), clamp)
    return torch.where(_below(y, clamp), y, y.detach().clamp(-bound, bound))


def _below(y: Tensor, clamp: float) -> Tensor:
    """Where results did not reach the clamp, which is rounded as they are."""
    return y.abs() < y.new_full((), clamp)


def _biased(x: Tensor, b: Tensor | None, dim: int) -> Tensor:
    """x + b in the dtype of sums."""
    y = x.to(accumulator(x.dtype))
    if b is None:
        return y
    return y + b.to(x.dtype).to(y.dtype).reshape([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])


def sum_bias(dx: Tensor, dim: int) -> Tensor:
    """Gradient of a bias from that of the sum x + b."""
    return dx.sum([i for i in range(dx.ndim) if i != dim % dx.ndim])


def bias_act_grad(
    dy: Tensor,
    ref: Tensor,
    b: Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
    from_output: bool,
) -> Tensor:
    """dy * gain * f'(x + b), 0 where the clamp was reached: the gradient of :func:`bias_act` in x.

    Args:
        dy: gradient of the result.
        ref: ``x``; with ``from_output`` (linear, relu, lrelu with alpha >= 0) the result instead, whose
            sign tells the slope.
        b, dim, act, alpha, gain, clamp: as given to :func:`bias_act`, none of them None but b and clamp.
    """
    entry = activation(act)
    if from_output:
        y = ref
        sign = ref.to(accumulator(ref.dtype)) * (1.0 if gain >= 0 else -1.0)
        slope = entry.first(sign, alpha)
    else:
        z = _biased(ref, b, dim)
        y, slope = (entry.function(z, alpha) * gain).to(ref.dtype), entry.first(z, alpha)
    dx = dy.to(slope.dtype) * gain * slope
    return (dx if clamp is None else torch.where(_below(y, clamp), dx, 0.0)).to(dy.dtype)


def bias_act_grad2(
    v: Tensor,
    dy: Tensor,
    x: Tensor,
    b: Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> Tensor:
    """v * dy * gain * f''(x + b), 0 where the clamp was reached: the gradient of sum(v * dx) in x."""
    entry = activation(act)
    z = _biased(x, b, dim)
    d = v.to(z.dtype) * dy.to(z.dtype) * gain * entry.second(z, alpha)
    if clamp is not None:
        d = torch.where(_below((entry.function(z, alpha) * gain).to(x.dtype), clamp), d, 0.0)
    return d.to(x.dtype)
