# SPDX-License-Identifier: Apache-2.0
"""Bias, activation, gain and clamp in one pass over memory, with gradients of first and second order.

Three ops, each a torch.library op with kernels and a twin: the function, its gradient, and the gradient of
that in the input. linear, relu and lrelu save their result alone (linear without a clamp nothing);
the curved activations save input and bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cuda_ops import dispatch
from cuda_ops import reference_activations as reference
from cuda_ops.reference_activations import sum_bias

_library = torch.library.Library("facelab", "FRAGMENT")
_SETTINGS = "int dim, str act, float alpha, float gain, float? clamp"
_library.define(f"bias_act(Tensor x, Tensor? b, {_SETTINGS}) -> Tensor")
_library.define(f"bias_act_grad(Tensor dy, Tensor ref, Tensor? b, {_SETTINGS}, bool from_output) -> Tensor")
_library.define(f"bias_act_grad2(Tensor v, Tensor dy, Tensor x, Tensor? b, {_SETTINGS}) -> Tensor")


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """clamp(gain * act(x + b), -clamp, clamp).

    A value that reaches the clamp passes no gradient, at the boundary either (float16 saturates onto it).
    Works in the dtype of ``x``, under autocast too; sums in float32 (float64 for float64).

    Args:
        x: any shape and strides, floating point.
        b: (x.shape[dim],), or None. Cast to the dtype of ``x``.
        dim: the axis that ``b`` lies along.
        act: linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus or swish.
        alpha: slope of lrelu for negative inputs; None = 0.2. The others ignore it.
        gain: factor; None = the activation's own: sqrt(2) for relu, lrelu and swish, else 1.
        clamp: bound of the result, >= 0; None = none.

    Returns:
        Shape and dtype of ``x``, and its memory format where ``x`` is dense. ``x`` itself where there is
        nothing to do.

    Raises:
        ValueError: an unknown activation, a negative clamp, or a bias that does not fit.
        RuntimeError: FACELAB_OPS demands a kernel that cannot run; a third derivative was asked for.
    """
    entry = reference.activation(act)
    reference.check_bias(x, b, dim, clamp)
    alpha = entry.alpha if alpha is None else float(alpha)
    gain = entry.gain if gain is None else float(gain)
    if b is None and act == "linear" and gain == 1 and clamp is None:
        return x
    bias = None if b is None else b.to(x.dtype)
    dim = 0 if b is None else dim % x.ndim
    return _call("bias_act", (x, bias), dim, act, alpha, gain, None if clamp is None else float(clamp))


def _call(op: str, tensors: tuple[Tensor | None, ...], *settings: Any) -> Tensor:
    """An op of this module, by the shortest way."""
    if not all(x is None or dispatch.eager(x) for x in tensors):
        return getattr(torch.ops.facelab, op)(*tensors, *settings)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _FUNCTIONS[op].apply(*tensors, *settings)
    return _FUNCTIONS[op].kernel(*tensors, *settings)


def _run(out: Tensor, kernel: Callable[[], list[Tensor]], twin: Callable[[], Tensor], *settings: Any) -> Tensor:
    """Fill ``out`` by the kernel from the dense inputs that ``kernel`` gives, or by the twin."""

    def launch() -> Tensor:
        from cuda_ops import bias_act_kernels

        bias_act_kernels.launch(out, kernel(), *settings)
        return out

    def plain() -> Tensor:
        with torch.autocast(out.device.type, enabled=False):
            found = twin()
            return found if found.stride() == out.stride() else out.copy_(found)

    if out.numel() == 0:
        return plain()
    return dispatch.run("bias_act", out.device, dispatch.dtype_problem(out), launch, plain)


def _dense(x: Tensor) -> Tensor:
    """``x``, or a copy in its memory format, without gaps between its elements."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1 and stride != expected:
            return _like(x).copy_(x)
        expected *= size
    return x


def _like(x: Tensor) -> Tensor:
    """An empty dense tensor in the memory format of ``x``."""
    return torch.empty_like(x, memory_format=torch.preserve_format)


@torch.library.impl(_library, "bias_act", "CompositeExplicitAutograd")
def _bias_act(
    x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
) -> Tensor:
    settings = (b, dim, act, alpha, gain, clamp)
    return _run(_like(x), lambda: [_dense(x)], lambda: reference.bias_act(x, *settings), *settings, 0)


@torch.library.impl(_library, "bias_act_grad", "CompositeExplicitAutograd")
def _bias_act_grad(
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
    settings, dx = (b, dim, act, alpha, gain, clamp), _like(ref)
    twin = lambda: reference.bias_act_grad(dy, ref, *settings, from_output)
    return _run(dx, lambda: _aligned(dx, ref, dy), twin, *settings, 1, from_output)


@torch.library.impl(_library, "bias_act_grad2", "CompositeExplicitAutograd")
def _bias_act_grad2(
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
    settings, d = (b, dim, act, alpha, gain, clamp), _like(x)
    return _run(d, lambda: _aligned(d, x, dy, v), lambda: reference.bias_act_grad2(v, dy, x, *settings), *settings, 2)


def _aligned(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The inputs, copied where their strides differ from those of ``out``."""
    return [t if t.stride() == out.stride() else _like(out).copy_(t) for t in inputs]


@torch.library.register_fake("facelab::bias_act", lib=_library)
def _fake(x: Tensor, b: Tensor | None, *settings: Any) -> Tensor:
    return _like(x)


@torch.library.register_fake("facelab::bias_act_grad", lib=_library)
def _fake_grad(dy: Tensor, ref: Tensor, b: Tensor | None, *settings: Any) -> Tensor:
    return _like(ref)


@torch.library.register_fake("facelab::bias_act_grad2", lib=_library)
def _fake_grad2(v: Tensor, dy: Tensor, x: Tensor, b: Tensor | None, *settings: Any) -> Tensor:
    return _like(x)


# ---------------------------------------------------------------- gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, b, *settings = inputs
    _, act, alpha, _, clamp = settings
    ctx.settings = settings
    ctx.from_output = act in ("linear", "relu") or (act == "lrelu" and alpha >= 0)
    ctx.scale_only = act == "linear" and clamp is None
    ctx.has_bias = b is not None
    if ctx.scale_only:
        ctx.save_for_backward()
    elif ctx.from_output:
        ctx.save_for_backward(output)
    else:
        ctx.save_for_backward(x, b)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dim, _, _, gain, _ = ctx.settings
    if ctx.scale_only:
        dx = dy if gain == 1 else dy * gain
    else:
        ref, b = (*ctx.saved_tensors, None)[:2]
        dx = _call("bias_act_grad", (dy, ref, b), *ctx.settings, ctx.from_output)
    db = sum_bias(dx, dim) if ctx.has_bias and ctx.needs_input_grad[1] else None
    return dx if ctx.needs_input_grad[0] else None, db, *[None] * 5


def _setup_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, ref, b, *settings, from_output = inputs
    ctx.settings, ctx.from_output = settings, from_output
    ctx.curved = reference.activation(settings[1]).curved
    ctx.save_for_backward(ref, b, *([dy] if ctx.curved else []))


def _backward_grad(ctx: Any, v: Tensor) -> tuple[Any, ...]:
    ref, b, *rest = ctx.saved_tensors
    d_dy = d_ref = d_b = None
    if ctx.needs_input_grad[0]:
        d_dy = _call("bias_act_grad", (v, ref, b), *ctx.settings, ctx.from_output)
    if ctx.curved and any(ctx.needs_input_grad[1:3]):
        d_ref = _call("bias_act_grad2", (v, rest[0], ref, b), *ctx.settings)
        d_b = sum_bias(d_ref, ctx.settings[0]) if b is not None and ctx.needs_input_grad[2] else None
    return d_dy, d_ref, d_b, *[None] * 6


def _third_order(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(
        "bias_act has gradients of first and second order, but a third one of a curved activation is asked for; "
        "use cuda_ops.reference_activations.bias_act, which has all"
    )


torch.library.register_autograd("facelab::bias_act", _backward, setup_context=_setup, lib=_library)
torch.library.register_autograd("facelab::bias_act_grad", _backward_grad, setup_context=_setup_grad, lib=_library)
torch.library.register_autograd("facelab::bias_act_grad2", _third_order, lib=_library)


# ---------------------------------------------------------------- the ops where nothing but autograd looks on


class _BiasAct(torch.autograd.Function):
    kernel = staticmethod(_bias_act)
    backward = staticmethod(_backward)  # type: ignore[assignment]

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _bias_act(*inputs)
        _setup(ctx, inputs, output)
        return output


class _BiasActGrad(torch.autograd.Function):
    kernel = staticmethod(_bias_act_grad)
    backward = staticmethod(_backward_grad)  # type: ignore[assignment]

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _bias_act_grad(*inputs)
        _setup_grad(ctx, inputs, output)
        return output


class _BiasActGrad2(torch.autograd.Function):
    kernel = staticmethod(_bias_act_grad2)
    backward = staticmethod(_third_order)  # type: ignore[assignment]

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        return _bias_act_grad2(*inputs)


_FUNCTIONS: dict[str, Any] = {
    "bias_act": _BiasAct,
    "bias_act_grad": _BiasActGrad,
    "bias_act_grad2": _BiasActGrad2,
}
