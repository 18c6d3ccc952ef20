# SPDX-License-Identifier: Apache-2.0
"""All layers of the local generators at points, with the distance's gradient: the work of a training step in few passes.

A step of the generator is bound by tensors of K x C numbers a point, and plain autograd keeps some ten of them.
:func:`evaluate` is one function with a backward written out: it keeps the arguments of all sines but the first, goes
through the points in chunks whose inner tensors are gone before the next one begins, and has its sines and cosines in
four functions that a compiler may turn into one pass over memory each (``Plan.fused``).

Formulas, for layers ``a_l = W_l s_(l-1) + b_l``, ``s_l = sin a_l``, and the distance ``h s_L``:
``q_L = h``, ``g_l = cos(a_l) q_l``, ``q_(l-1) = g_l W_l``, gradient ``g_1 W_1``.

Half precision (``Plan.half``): operands of products are float16 forwards and bfloat16 backwards, whose range needs no
scale; sums, phases, sines and the first layer are float32, because sines of large arguments amplify rounding.

Shape legend: N scenes, K regions, B = N K, P points, C width, I inputs of a layer, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from facelab.nn.film import FilmLinear

CHUNK_NUMBERS = 2**24  # numbers in a tensor of a chunk: 64 MiB in float32, about what a GPU caches


@dataclass(frozen=True)
class Plan:
    """How the layers are evaluated.

    Attributes:
        depth: D, shape layers; masks are read behind the last of them.
        fused: compile the passes. Changes speed, and rounding in the last bits.
        half: half-precision operands, see above.
        chunk: points of all scenes at a time; None: so that a tensor has at most 2^24 numbers.
    """

    depth: int
    fused: bool = False
    half: bool = False
    chunk: int | None = None

    @property
    def forwards(self) -> torch.dtype | None:
        """Type of the operands of the values and of the gradient; None: as the layers."""
        return torch.float16 if self.half else None

    @property
    def backwards(self) -> torch.dtype | None:
        """Type of the operands of the backward."""
        return torch.bfloat16 if self.half else None

    def points(self, batches: int, width: int) -> int:
        """Points of a scene in a chunk."""
        return max(1, CHUNK_NUMBERS // (batches * width)) if self.chunk is None else self.chunk


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` finds.

    Attributes:
        mask: (N, K, P, 1) mask weights by the sines of layer D, without bias and directions.
        values: (N, K, P, O) head weights by the sines of the last layer, without bias and directions.
        gradient: (N, P, 3) of the first of the values, summed over the regions, with respect to the points.
    """

    mask: Tensor
    values: Tensor
    gradient: Tensor


def evaluate(points: Tensor, layers: Sequence[FilmLinear], mask: Tensor, head: Tensor, plan: Plan) -> Evaluation:
    """Run points through all layers.

    Args:
        points: (N, P, 3) in the networks' units; no derivative with respect to them is recorded.
        layers: L of weights (N, K, C, I) and biases (N, K, C).
        mask: (K, 1, C) weight of the masks.
        head: (K, O, C) weights of values; the first is the distance.

    Raises:
        ValueError: points that ask for derivatives, or a depth that leaves no layer behind the masks.
    """
    if points.requires_grad:
        raise ValueError("points may not require derivatives here: use distance_gradient of the field")
    if not 1 <= plan.depth < len(layers):
        raise ValueError(f"masks are read behind layer 1 to {len(layers) - 1}, got {plan.depth}")
    tensors = [*(layer.weight for layer in layers), *(layer.bias for layer in layers)]
    return Evaluation(*_Evaluate.apply(plan, points, mask, head, *tensors))


# ---------------------------------------------------------------- passes; dtype None: as it comes


def sine(a: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """sin a."""
    return _cast(torch.sin(a), dtype)


def cosine_times(a: Tensor, q: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """cos(a) q."""
    return _cast(torch.cos(a).mul_(q), dtype)


def turn(a: Tensor, q: Tensor, d: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """-sin(a) q d and cos(a) d: derivatives of cos(a) q by its factors, times d."""
    return _cast(torch.sin(a).mul_(q).mul_(d).neg_(), dtype), _cast(torch.cos(a).mul_(d), dtype)


def straight(a: Tensor, d: Tensor, more: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """cos(a) d + more: the derivative by the argument of a sine."""
    return _cast(torch.cos(a).mul_(d).add_(more), dtype)


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _pass(function: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    """The function, or one kernel that does the same; within a larger compiled function it is compiled anyway."""
    return _compiled(function) if plan.fused and not torch.compiler.is_compiling() else function


# ---------------------------------------------------------------- products


def phase(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, P, I) and (B, C, I) -> weight x + bias, (B, P, C), summed and kept in float32 for half operands."""
    if x.dtype == weight.dtype == bias.dtype:
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
    return wide(x, weight.to(x.dtype).transpose(1, 2), bias.dtype).add_(bias[:, None])


def wide(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Product of half operands in a wider type; without rounding in between."""
    if x.dtype == dtype:
        return torch.bmm(x, y)
    if x.is_cuda:
        return torch.bmm(x, y, out_dtype=dtype)
    return torch.bmm(x.to(dtype), y.to(dtype))


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total += x' y: (B, P, C) and (B, P, I) onto (B, C, I); both in half precision if one is."""
    if x.dtype == total.dtype == y.dtype:
        total.baddbmm_(x.transpose(1, 2), y)
    else:
        low = y.dtype if x.dtype == total.dtype else x.dtype
        total.add_(wide(x.to(low).transpose(1, 2), y.to(low), total.dtype))


class _Evaluate(torch.autograd.Function):
    """See :func:`evaluate`."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, points: Tensor, mask: Tensor, head: Tensor, *tensors: Tensor):  # type: ignore[override]
        weights, biases, scenes, regions = _layers(tensors)
        mask_B, head_B = _for_scenes(mask, scenes), _for_scenes(head, scenes)
        kept: list[Tensor] = []
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for part in points.split(plan.points(scenes * regions, head.shape[-1]), dim=1):
            arguments, masks, values = _forwards(_rows(part, regions), weights, biases, mask_B, head_B, plan)
            pulled = _pull(arguments, weights, head_B, plan, plan.forwards)[1]
            slope = torch.bmm(pulled[0].to(weights[0].dtype), weights[0])
            found.append((masks, values, slope.unflatten(0, (scenes, regions)).sum(1)))
            kept += arguments[1:]  # the first ones cost three multiplications each
        ctx.plan = plan
        ctx.save_for_backward(points, mask, head, *tensors, *kept)
        masks, values, slopes = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return masks.unflatten(0, (scenes, regions)), values.unflatten(0, (scenes, regions)), slopes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mask: Tensor, d_values: Tensor, d_slope: Tensor):  # type: ignore[override]
        plan, (points, mask, head, *rest) = ctx.plan, ctx.saved_tensors
        count = _layer_count(rest, points, plan)
        weights, biases, scenes, regions = _layers(rest[: 2 * count])
        total = _Gradients.zeros(_for_scenes(mask, scenes), _for_scenes(head, scenes), weights, biases)
        size, kept = plan.points(scenes * regions, head.shape[-1]), rest[2 * count :]
        for number, start in enumerate(range(0, points.shape[1], size)):
            here = slice(start, start + size)
            rows = _rows(points[:, here], regions)
            arguments = [phase(rows, weights[0], biases[0]), *kept[number * (count - 1) : (number + 1) * (count - 1)]]
            slopes = _rows(d_slope[:, here], regions)
            masks, values = d_mask[:, :, here].flatten(0, 1), d_values[:, :, here].flatten(0, 1)
            _backwards(total, rows, arguments, weights, _Incoming(masks, values, slopes), plan)
        shape = (scenes, regions)
        of_layers = [x.unflatten(0, shape) for x in (*total.weights, *total.biases)]
        return None, None, total.mask.unflatten(0, shape).sum(0), total.head.unflatten(0, shape).sum(0), *of_layers


@dataclass(frozen=True)
class _Incoming:
    """Derivatives of a loss by what was found at a chunk: (B, P, 1), (B, P, O), (B, P, 3)."""

    mask: Tensor
    values: Tensor
    slope: Tensor


@dataclass(frozen=True)
class _Gradients:
    """Sums over the chunks, filled in place, and the two heads (B, 1, C) and (B, O, C) themselves."""

    mask: Tensor
    head: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    mask_weight: Tensor
    head_weight: Tensor

    @staticmethod
    def zeros(mask: Tensor, head: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> _Gradients:
        like = torch.zeros_like
        of_weights, of_biases = [like(w, memory_format=torch.contiguous_format) for w in weights], [*map(like, biases)]
        return _Gradients(like(mask), like(head), of_weights, of_biases, mask, head)


def _layers(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], int, int]:
    """Weights (B, C, I), biases (B, C), N and K from those of N scenes and K regions."""
    half = len(tensors) // 2
    weights, biases = ([x.reshape(-1, *x.shape[2:]) for x in part] for part in (tensors[:half], tensors[half:]))
    scenes, regions = tensors[0].shape[:2]
    return weights, biases, scenes, regions


def _layer_count(rest: Sequence[Tensor], points: Tensor, plan: Plan) -> int:
    """L from 2 L weights and biases and L - 1 arguments of each chunk."""
    scenes, regions, width = rest[0].shape[:3]
    chunks = -(-points.shape[1] // plan.points(scenes * regions, width))
    return (len(rest) + chunks) // (2 + chunks)


def _for_scenes(weight: Tensor, scenes: int) -> Tensor:
    """(K, O, C) -> (B, O, C)."""
    return weight.expand(scenes, *weight.shape).reshape(-1, *weight.shape[1:])


def _rows(points: Tensor, regions: int) -> Tensor:
    """(N, P, 3) -> (B, P, 3), the same for all regions."""
    return points[:, None].expand(-1, regions, -1, -1).reshape(-1, *points.shape[1:])


def _forwards(
    rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], mask: Tensor, head: Tensor, plan: Plan
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Arguments of all sines, masks (B, P, 1), values (B, P, O)."""
    arguments: list[Tensor] = []
    masks, x = rows.new_empty(0), rows
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        arguments.append(phase(x, weight, bias))
        x = _pass(sine, plan)(arguments[-1], plan.forwards)
        if number == plan.depth:
            masks = wide(x, mask.to(x.dtype).transpose(1, 2), mask.dtype)
    return arguments, masks, wide(x, head.to(x.dtype).transpose(1, 2), head.dtype)


def _pull(
    arguments: Sequence[Tensor], weights: Sequence[Tensor], head: Tensor, plan: Plan, dtype: torch.dtype | None
) -> tuple[list[Tensor], list[Tensor]]:
    """q_l and g_l of all layers from the bottom; q_L is (B, 1, C)."""
    products, pulled = [head[:, :1]], []
    for number in reversed(range(len(arguments))):
        pulled.insert(0, _pass(cosine_times, plan)(arguments[number], products[0], dtype))
        if number:
            products.insert(0, torch.bmm(pulled[0], weights[number].to(pulled[0].dtype)))
    return products, pulled


def _backwards(
    total: _Gradients,
    rows: Tensor,
    arguments: Sequence[Tensor],
    weights: Sequence[Tensor],
    incoming: _Incoming,
    plan: Plan,
) -> None:
    """Add what one chunk contributes: first the backward of the pulling back, from the bottom, then that of the values."""
    dtype, last = plan.backwards, len(arguments) - 1
    products, pulled = _pull(arguments, weights, total.head_weight, plan, dtype)
    more: list[Tensor] = []
    _add_product(total.weights[0], pulled[0], incoming.slope)
    d = torch.bmm(incoming.slope, weights[0].transpose(1, 2))
    for number in range(last):
        bent, through = _pass(turn, plan)(arguments[number], products[number], d, dtype)
        more.append(bent)
        products[number] = pulled[number] = rows.new_empty(0)  # not needed any more
        _add_product(total.weights[number + 1], pulled[number + 1], through)
        d = torch.bmm(through, weights[number + 1].to(through.dtype).transpose(1, 2))
    bent, through = _pass(turn, plan)(arguments[last], products[last], d, dtype)
    more.append(bent)
    total.head[:, :1].add_(through.sum(1, keepdim=True, dtype=total.head.dtype))
    pulled.clear()
    x = _pass(sine, plan)(arguments[last], dtype)
    _add_product(total.head, incoming.values, x)
    d = torch.bmm(incoming.values, total.head_weight)
    for number in reversed(range(len(arguments))):
        d = _pass(straight, plan)(arguments[number], d, more.pop(), dtype)
        total.biases[number].add_(d.sum(1, dtype=total.biases[number].dtype))
        if number == 0:
            _add_product(total.weights[0], d, rows)
            return
        x = _pass(sine, plan)(arguments[number - 1], dtype)
        _add_product(total.weights[number], d, x)
        d = torch.bmm(d, weights[number].to(d.dtype))
        if number == plan.depth:
            _add_product(total.mask, incoming.mask, x)
            d.baddbmm_(incoming.mask.to(d.dtype), total.mask_weight.to(d.dtype))
