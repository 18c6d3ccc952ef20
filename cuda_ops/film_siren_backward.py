# SPDX-License-Identifier: Apache-2.0
"""Backward of :func:`cuda_ops.film_siren.film_siren_field`: slab by slab, activations computed again.

In a slab, d of a layer is the scaled gradient at ``W x + b``, float16 (rows, h). Sums over points are
float32: for layer l and scene n, ``G[n, l] = d^T x`` and the column sums of d (see film_siren.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cuda_ops import grid_lookup
from cuda_ops.film_siren import BACKWARD_ROWS, Spec, _Backward, _demodulate, _Packed, _Slabs, pack, slabs
from cuda_ops.grid_lookup import Slab

SMALLEST_ROWS = 1 << 15
TARGET = 8.0  # size that the largest gradient at a first hidden layer is brought to


class _Sums:
    """What is added up over the slabs, float32, per scene."""

    def __init__(self, spec: Spec, scenes: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(scenes, *shape, device=device)

        h, e, w = spec.hidden, spec.extra_width, spec.head_width
        self.hidden = zeros(spec.layers - 1, h, h)
        self.first, self.extra = zeros(1, h, e), zeros(1, h, e)
        self.columns = zeros(spec.layers, h)
        self.head, self.rgb, self.head_columns = zeros(1, w, h), zeros(1, w, h), zeros(w)


def backward_rows(rows: int) -> int:
    """Rows of a slab of the backward at width 256: a sixth of all, for what a slab keeps is most of the memory of a
    small problem; within limits between which the GPU is busy."""
    return min(BACKWARD_ROWS, max(SMALLEST_ROWS, rows // 6))


def gradient_scale(grad: Tensor, weights: _Backward) -> Tensor:
    """Power of two that brings the gradients at the last layers to about TARGET, a device scalar; 1 if not finite."""
    largest = grad.abs().amax()
    largest = torch.maximum(largest * torch.maximum(weights.head.abs().amax(), weights.rgb.abs().amax()), largest)
    scale = torch.exp2(torch.floor(torch.log2(TARGET / largest)).clamp(-100, 100))
    return torch.where(torch.isfinite(largest) & (largest > 0), scale, torch.ones_like(scale))


def gradients(
    spec: Spec, tensors: Sequence[Tensor | None], out: Tensor, grad: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of (points, directions, film x 4, grid, weights and biases), None where not needed."""
    points, directions, *film, grid = tensors[:7]
    assert points is not None
    packed = pack(spec, film, tensors[7:])  # type: ignore[arg-type]
    run = _Slabs(spec, packed, points, directions, grid)
    weights = _demodulate(spec, packed)
    sums = _Sums(spec, len(out), grad.device)
    loss_scale = gradient_scale(grad, weights)
    unscale = 1 / loss_scale
    d_points = torch.zeros_like(run.points) if needed[0] else None
    d_directions = torch.zeros(out.shape[0], run.total, 3, device=grad.device) if needed[1] else None
    d_cells = torch.zeros_like(run.cells) if run.cells is not None and needed[6] else None
    for slab in slabs(len(out), out.shape[1], backward_rows(out.shape[0] * out.shape[1]) * 256 // spec.hidden):
        d_color, d_first = _slab(run, slab, weights, grad, out, loss_scale, sums)
        _inputs(run, slab, d_color, d_first, unscale, d_points, d_directions, d_cells)
    found: list[Tensor | None] = [None] * 7
    if d_points is not None:
        found[0] = d_points.reshape(points.shape)
    if d_directions is not None and directions is not None:
        found[1] = d_directions.reshape(*points.shape[:3], 3).sum(2)
    if d_cells is not None:
        found[6] = d_cells.permute(3, 0, 1, 2)[None]
    found[2:6] = _film(spec, packed, sums, unscale)
    found += _weights(spec, sums, unscale)
    for i, (x, tensor) in enumerate(zip(found, tensors, strict=True)):
        if x is None or tensor is None or not needed[i]:
            found[i] = None
            continue
        if x.shape != tensor.shape:  # FiLM rows beyond the layers in use
            x = torch.cat([x, x.new_zeros(x.shape[0], tensor.shape[1] - x.shape[1], x.shape[2])], dim=1)
        found[i] = x.to(tensor.dtype)
    return found


def _slab(
    run: _Slabs, slab: Slab, weights: _Backward, grad: Tensor, out: Tensor, loss_scale: Tensor, sums: _Sums
) -> tuple[Tensor | None, Tensor]:
    """Add the sums of one slab; -> d of the first colour layer and of the first layer."""
    spec = run.spec
    ys, extra = run.activations(slab)
    head_d = run.head_gradient(slab, grad, out, loss_scale)
    d = run.layer_gradients(slab, weights, head_d, ys)
    last = spec.geometry_layers - 1
    if spec.layers > 1:
        run.weight_gradient(slab, d[1:], ys[:-1], sums.hidden, sums.columns[:, 1:])
    run.weight_gradient(slab, d[:1], extra[None], sums.first, sums.columns)
    run.weight_gradient(slab, head_d[None], ys[last:], sums.head, None)
    columns = head_d.unflatten(0, (slab.scenes, slab.rows_per_scene)).sum(1, dtype=torch.float32)
    sums.head_columns[slab.scene0 : slab.scene0 + slab.scenes] += columns
    if spec.color_layers:
        run.weight_gradient(slab, head_d[None], ys[-1:], sums.rgb, None)
    if spec.color_extra:
        run.weight_gradient(slab, d[last + 1 : last + 2], extra[None], sums.extra, None)
    return d[last + 1] if spec.color_layers else None, d[0]


def _inputs(
    run: _Slabs,
    slab: Slab,
    d_color: Tensor | None,
    d_first: Tensor,
    unscale: Tensor,
    d_points: Tensor | None,
    d_directions: Tensor | None,
    d_cells: Tensor | None,
) -> None:
    """Gradients of the grid, the points and the directions of a slab."""
    spec, p = run.spec, run.packed
    g = spec.grid_channels

    def put(target: Tensor, value: Tensor) -> None:
        rows = value.reshape(slab.scenes, slab.rows_per_scene, 3)[:, : slab.count]
        target[slab.scene0 : slab.scene0 + slab.scenes, slab.p0 : slab.p0 + slab.count] += rows

    if d_directions is not None and d_color is not None and p.extra is not None:
        put(d_directions, d_color.float() @ p.extra[:, g : g + 3] * unscale)
    if d_points is not None:
        put(d_points, d_first.float() @ p.first * (unscale * spec.scale))
    if run.cells is None or (d_cells is None and d_points is None):
        return
    if spec.grid_in_geometry:
        d_grid = d_first @ p.first_full[:, :g].half()
    elif d_color is not None and p.extra is not None:
        d_grid = d_color @ p.extra[:, :g].half()
    else:
        return
    grid_lookup.scatter(run.cells, run.points, d_grid, unscale, slab, spec.scale, d_cells, d_points)


def _film(spec: Spec, p: _Packed, sums: _Sums, unscale: Tensor) -> list[Tensor]:
    """-> gradients of geometry frequencies and phases, colour frequencies and phases."""
    products = torch.einsum("nlij,lij->nli", sums.hidden, p.hidden)
    first = torch.einsum("nlij,ij->nli", sums.first, p.first_full)
    products = torch.cat([first, products], dim=1)
    if p.extra is not None:
        products[:, spec.geometry_layers] += torch.einsum("nlij,ij->nli", sums.extra, p.extra)[:, 0]
    f = p.safe_frequencies
    d_f = (products + p.biases * sums.columns) / f * unscale
    d_p = sums.columns / f * unscale
    n = spec.geometry_layers
    return [d_f[:, :n], d_p[:, :n], d_f[:, n:], d_p[:, n:]]


def _weights(spec: Spec, sums: _Sums, unscale: Tensor) -> list[Tensor]:
    """-> gradients in the order of the weights: geometry, density, colour, rgb, labels; weight then bias."""
    g, n, k = spec.grid_channels, spec.geometry_layers, spec.labels
    hidden, biases = sums.hidden.sum(0) * unscale, sums.columns.sum(0) * unscale
    first, extra = sums.first.sum((0, 1)) * unscale, sums.extra.sum((0, 1)) * unscale
    head, rgb = sums.head.sum((0, 1)) * unscale, sums.rgb.sum((0, 1)) * unscale
    head_biases = sums.head_columns.sum(0) * unscale
    first = (
        first[:, g + 3 : g + 6] if not spec.grid_in_geometry else torch.cat([first[:, :g], first[:, g + 3 : g + 6]], 1)
    )
    found = [first, biases[0]]
    for index in range(1, n):
        found += [hidden[index - 1], biases[index]]
    at = spec.channels - 1
    found += [head[at : at + 1], head_biases[at : at + 1]]
    for i in range(spec.color_layers):
        weight = hidden[n - 1 + i]
        if i == 0:
            parts = [extra[:, g : g + 3]] if spec.use_direction else []
            parts += [extra[:, :g]] if g and not spec.grid_in_geometry else []
            weight = torch.cat([*parts, weight], dim=1)
        found += [weight, biases[n + i]]
    if spec.color_layers:
        found += [rgb[k : k + 3], head_biases[k : k + 3]]
        if k:
            found += [head[:k], head_biases[:k]]
    return found
