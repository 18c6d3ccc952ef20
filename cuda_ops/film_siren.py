# SPDX-License-Identifier: Apache-2.0
"""A whole FiLM-SIREN field as one op: float16 operands, float32 sums and phases, recomputed backward.

The plain twin is :func:`cuda_ops.reference.film_siren_field`. Forward saves its inputs and its output,
so memory does not grow with the depth of the field; backward walks over slabs of points, computes
their activations again and adds up the gradients in float32. Gradients of first order only.

How the FiLM gradients are had without keeping pre-activations: with d = dL/d(W x + b) of the points of
one scene and G = d^T x, the weight gradient is the sum of G over the scenes, and since
W x + b is linear, dL/df = (rowsum(W * G) + b * colsum(d)) / f and dL/dp = colsum(d) / f.
A frequency smaller than 2^-6 is held at 2^-6 there, which is below the float16 noise (f is about 30).

Incoming gradients are brought to a fixed size by a power of two that is read on the device, so no
loss scale is needed for float16; infinities and NaN pass through to the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cuda_ops import dispatch, grid_lookup, reference
from cuda_ops.grid_lookup import TILE, Slab
from cuda_ops.reference import Linear

WIDTHS = (128, 256)  # hidden widths the kernels are written for
BLOCK = 128  # columns of a layer computed at once
PAD = 128  # rows of a scene in a slab are padded to a multiple of this
FORWARD_ROWS, BACKWARD_ROWS = 1 << 19, 1 << 18  # rows of a slab at width 256
SMALL_FREQUENCY = 2.0**-6
SHARED_MEMORY = {128: 90 << 10, 256: 140 << 10}  # bytes a block needs with the least prefetching


@dataclass(frozen=True)
class Spec:
    """What the tensors do not tell."""

    hidden: int
    geometry_layers: int
    color_layers: int  # 0: density only
    labels: int
    use_direction: bool
    grid_channels: int  # 0: no grid
    grid_in_geometry: bool
    scale: float

    @property
    def channels(self) -> int:
        return 1 if self.color_layers == 0 else self.labels + 4

    @property
    def head_width(self) -> int:
        return max(16, _power_of_two(self.channels))

    @property
    def rgb_at(self) -> int:
        return -1 if self.color_layers == 0 else self.labels

    @property
    def extra_width(self) -> int:
        """Columns of the float16 side input [grid | direction | point | 0]."""
        return max(16, _power_of_two(self.grid_channels + 6))

    @property
    def color_extra(self) -> bool:
        return self.color_layers > 0 and (self.use_direction or (self.grid_channels > 0 and not self.grid_in_geometry))

    @property
    def layers(self) -> int:
        return self.geometry_layers + self.color_layers


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class _Packed:
    """Parameters placed for the kernels, float32; l counts geometry then colour layers."""

    first: Tensor  # (h, 3), the first layer on the point
    first_full: Tensor  # (h, E), the first layer on the side input
    hidden: Tensor  # (layers - 1, h, h): every layer but the first, on the layer before
    extra: Tensor | None  # (h, E), the first colour layer on the side input
    biases: Tensor  # (layers, h)
    frequencies: Tensor  # (N, layers, h)
    phases: Tensor  # (N, layers, h)
    head: Tensor  # (Wd, h), labels and density
    rgb: Tensor  # (Wd, h)
    head_bias: Tensor  # (Wd,)

    @property
    def safe_frequencies(self) -> Tensor:
        """Frequencies kept away from zero, sign included."""
        f = self.frequencies
        return torch.where(f < 0, f.clamp(max=-SMALL_FREQUENCY), f.clamp(min=SMALL_FREQUENCY))


def pack(spec: Spec, film: Sequence[Tensor], weights: Sequence[Tensor]) -> _Packed:
    """Cast and place the parameters (a dozen small launches)."""
    w = [x.detach().float() for x in weights]
    g, width, n = spec.grid_channels, spec.extra_width, 2 * spec.geometry_layers
    geometry, sigma, rest = w[:n], w[n : n + 2], w[n + 2 :]
    color, rest = rest[: 2 * spec.color_layers], rest[2 * spec.color_layers :]
    first = geometry[0]
    first_full = first.new_zeros(spec.hidden, width)
    first_full[:, g + 3 : g + 6] = first[:, -3:]
    if spec.grid_in_geometry:
        first_full[:, :g] = first[:, :g]
    extra = None
    hidden = [*geometry[2::2], *color[::2]]
    if spec.color_layers:
        hidden[spec.geometry_layers - 1] = color[0][:, -spec.hidden :]
    if spec.color_extra:
        extra = first.new_zeros(spec.hidden, width)
        directions = 3 if spec.use_direction else 0
        extra[:, g : g + directions] = color[0][:, :directions]
        if g and not spec.grid_in_geometry:
            extra[:, :g] = color[0][:, directions : directions + g]
    head, rgb = first.new_zeros(2, spec.head_width, spec.hidden)
    bias = first.new_zeros(spec.head_width)
    head[spec.channels - 1], bias[spec.channels - 1] = sigma[0][0], sigma[1][0]
    if spec.color_layers:
        rgb[spec.labels : spec.labels + 3], bias[spec.labels : spec.labels + 3] = rest[0], rest[1]
        if spec.labels:
            head[: spec.labels], bias[: spec.labels] = rest[2], rest[3]
    film = [x.detach().float() for x in film]
    return _Packed(
        first=first[:, -3:],
        first_full=first_full,
        hidden=torch.stack(hidden) if hidden else first.new_zeros(0, spec.hidden, spec.hidden),
        extra=extra,
        biases=torch.stack([*geometry[1::2], *color[1::2]]),
        frequencies=torch.cat([film[0], film[2][:, : spec.color_layers]], dim=1),
        phases=torch.cat([film[1], film[3][:, : spec.color_layers]], dim=1),
        head=head,
        rgb=rgb,
        head_bias=bias,
    )


@dataclass(frozen=True)
class _Forward:
    """Parameters with each scene's frequencies multiplied in, so that a product is a phase in turns."""

    first: Tensor  # (N, 3, h) float32
    features: Tensor | None  # (N, G, h) float32
    hidden: Tensor  # (N, layers - 1, h out, h in) float16
    extra: Tensor | None  # (N, h, E) float16
    phases: Tensor  # (N, layers, h) float32 in [-0.5, 0.5]
    head: Tensor  # (Wd, h) float16
    rgb: Tensor


def _modulate(spec: Spec, p: _Packed) -> _Forward:
    turns = p.frequencies * (0.5 / math.pi)
    phases = turns * p.biases + p.phases * (0.5 / math.pi)
    first, g = turns[:, :1], spec.grid_channels
    color = turns[:, spec.geometry_layers, :, None] if spec.color_layers else None
    return _Forward(
        first=(first * p.first.t()).contiguous(),
        features=(first * p.first_full[:, :g].t()).contiguous() if spec.grid_in_geometry else None,
        hidden=(turns[:, 1:, :, None] * p.hidden).half(),
        extra=None if p.extra is None or color is None else (color * p.extra).half(),
        phases=(phases - phases.round()).contiguous(),
        head=p.head.half(),
        rgb=p.rgb.half(),
    )


@dataclass(frozen=True)
class _Backward:
    """Weights whose columns carry the frequency of the layer below, float16."""

    hidden: Tensor  # (N, layers - 1, h, h)
    head: Tensor  # (N, Wd, h)
    rgb: Tensor


def _demodulate(spec: Spec, p: _Packed) -> _Backward:
    f = p.safe_frequencies[:, :, None, :]
    return _Backward(
        hidden=(p.hidden * f[:, :-1]).half(),
        head=(p.head * f[:, spec.geometry_layers - 1]).half(),
        rgb=(p.rgb * f[:, -1]).half(),
    )


def slabs(scenes: int, points: int, limit: int) -> Iterator[Slab]:
    """Cut N scenes of P points into slabs of about ``limit`` rows: whole scenes, or parts of one."""
    padded = -(-points // PAD) * PAD
    if padded <= limit:
        group = -(-scenes // -(-scenes // max(1, limit // padded)))  # evenly
        for s in range(0, scenes, group):
            yield Slab(s, min(group, scenes - s), 0, points, padded)
        return
    parts = -(-padded // limit)
    size = -(-points // (parts * PAD)) * PAD
    for s in range(scenes):
        for p0 in range(0, points, size):
            count = min(size, points - p0)
            yield Slab(s, 1, p0, count, -(-count // PAD) * PAD)


def _blocks(hidden: Tensor) -> Any:
    """(N, layers, h, h) weights -> descriptor of (rows, h) that the kernels read in square blocks."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    flat = hidden.reshape(-1, hidden.shape[-1])
    if not len(flat):  # a field of one layer never reads it, but a descriptor needs memory
        flat = hidden.new_zeros(BLOCK, hidden.shape[-1])
    return TensorDescriptor.from_tensor(flat, [BLOCK, BLOCK])


class _Slabs:
    """Launches the kernels for the points of one call."""

    def __init__(self, spec: Spec, packed: _Packed, points: Tensor, directions: Tensor | None, grid: Tensor | None):
        from cuda_ops import grid_kernels, siren_kernels

        self.kernels, self.grid_kernels = siren_kernels, grid_kernels
        self.spec, self.packed = spec, packed
        self.folded = _modulate(spec, packed)
        self.samples = points.shape[2]
        self.points = points.detach().float().reshape(points.shape[0], -1, 3).contiguous()
        self.directions = None if directions is None else directions.detach().float().contiguous()
        self.cells = None if grid is None else grid_lookup.channels_last(grid)
        self.device = points.device
        self.total = self.points.shape[1]

    def empty(self, slab: Slab, columns: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.empty(slab.rows, columns, dtype=dtype, device=self.device)

    def extras(self, slab: Slab, half: bool, single: bool) -> tuple[Tensor | None, Tensor | None]:
        """-> side input (rows, E) float16 and grid features (rows, G) float32, where wanted."""
        spec = self.spec
        single = single and self.cells is not None
        if not half and not single:
            return None, None
        out16 = self.empty(slab, spec.extra_width) if half else None
        out32 = self.empty(slab, spec.grid_channels, torch.float32) if single else None
        d, h, w = (1, 1, 1) if self.cells is None else self.cells.shape[:3]
        self.grid_kernels.read[(slab.rows // TILE,)](
            self.cells, self.points, self.directions, out16, out32,
            self.total, slab.p0, slab.count, slab.scene0, slab.rows_per_scene // TILE, self.samples, spec.scale,
            C=spec.grid_channels, D=d, H=h, W=w, E=spec.extra_width if half else spec.grid_channels,
            USE_DIRECTIONS=self.directions is not None and spec.use_direction,
            WRITE16=half, WRITE32=single, BM=TILE, num_warps=4,
        )  # fmt: skip
        return out16, out32

    def _field(self, slab: Slab, ys: Tensor | None, out: Tensor | None) -> Tensor | None:
        """Run the layers of a slab: fill ``ys`` (layers, rows, h) if given, else ``out``; -> the side input."""
        spec, p = self.spec, self.folded
        extra, features = self.extras(slab, spec.color_extra or ys is not None, spec.grid_in_geometry)
        t = tiles("forward" if ys is None else "save", spec.hidden, self.device)
        self.kernels.field_forward[(slab.rows // t.rows,)](
            self.points, features, extra, p.first, p.features, _blocks(p.hidden), p.extra, p.phases,
            p.head, p.rgb, self.packed.head_bias, ys, out,
            self.total, slab.p0, slab.count, slab.scene0, slab.rows_per_scene // t.rows, slab.rows, spec.scale,
            H=spec.hidden, B=BLOCK, G=spec.geometry_layers, L=spec.layers,
            C=spec.grid_channels if spec.grid_in_geometry else 0, E=spec.extra_width if spec.color_extra else 0,
            W=spec.head_width, OC=spec.channels, RGB=spec.rgb_at, SAVE=ys is not None,
            BM=t.rows, STAGES=t.stages, num_warps=t.warps,
        )  # fmt: skip
        return extra

    def forward(self, slab: Slab, out: Tensor) -> None:
        """Fill the slab's part of ``out`` (N, P, channels)."""
        self._field(slab, None, out)

    def activations(self, slab: Slab) -> tuple[Tensor, Tensor]:
        """Every layer's output (layers, rows, h), marked for the backward, and the side input (rows, E)."""
        ys = torch.empty(self.spec.layers, slab.rows, self.spec.hidden, dtype=torch.float16, device=self.device)
        extra = self._field(slab, ys, None)
        assert extra is not None
        return ys, extra

    def head_gradient(self, slab: Slab, grad: Tensor, out: Tensor, loss_scale: Tensor) -> Tensor:
        spec = self.spec
        d = self.empty(slab, spec.head_width)
        self.kernels.head_gradient[(slab.rows // PAD,)](
            grad, out, loss_scale, d,
            self.total, slab.p0, slab.count, slab.scene0, slab.rows_per_scene // PAD,
            W=spec.head_width, OC=spec.channels, RGB=spec.rgb_at, BM=PAD, num_warps=4,
        )  # fmt: skip
        return d

    def layer_gradients(self, slab: Slab, p: _Backward, head_d: Tensor, ys: Tensor) -> Tensor:
        """Gradients at W x + b of every layer, (layers, rows, h)."""
        spec = self.spec
        d = torch.empty_like(ys)
        t = tiles("backward", spec.hidden, self.device)
        self.kernels.field_backward[(slab.rows // t.rows,)](
            head_d, _blocks(p.hidden), p.head, p.rgb, ys, d,
            slab.scene0, slab.rows_per_scene // t.rows, slab.rows,
            H=spec.hidden, B=BLOCK, G=spec.geometry_layers, L=spec.layers, W=spec.head_width,
            BM=t.rows, STAGES=t.stages, num_warps=t.warps,
        )  # fmt: skip
        return d

    def weight_gradient(self, slab: Slab, d: Tensor, x: Tensor, gradient: Tensor, sums: Tensor | None) -> None:
        """gradient (N, layers, M, K) += per-scene d^T x, sums (N, layers, M) += column sums of d.

        d (layers, rows, M), x (layers, rows, K); all may be strided but in their last dimension(s).
        """
        t = tiles("weights", self.spec.hidden, self.device)
        layers, _, m = d.shape
        k = x.shape[2]
        chunk = min(t.columns, slab.rows_per_scene)
        splits = -(-slab.rows_per_scene // chunk)
        rows = min(t.rows, m)
        self.kernels.weight_gradient[(m // rows, slab.scenes * splits, layers)](
            d, d, x, gradient, sums, slab.rows_per_scene, slab.scene0, splits, chunk,
            gradient.stride(0), 0 if sums is None else sums.stride(0),
            d.stride(0), x.stride(0), gradient.stride(1), 0 if sums is None else sums.stride(1),
            M=m, K=k, SUMS=sums is not None, BM=rows, BR=64, STAGES=t.stages, num_warps=t.warps,
        )  # fmt: skip


@dataclass(frozen=True)
class Tiles:
    """Shape of a kernel's work; ``columns`` is used by ``weights`` alone: the points of one program."""

    rows: int
    warps: int
    stages: int
    columns: int = 0


_TILES = {  # fastest on an H200, see tests/benchmarks/bench_siren.py --tiles
    ("forward", 256): Tiles(128, 8, 2),
    ("forward", 128): Tiles(64, 4, 2),
    ("save", 256): Tiles(128, 8, 2),
    ("save", 128): Tiles(64, 4, 2),
    ("backward", 256): Tiles(64, 4, 1),
    ("backward", 128): Tiles(64, 4, 2),
    ("weights", 256): Tiles(128, 8, 3, 8192),
    ("weights", 128): Tiles(128, 8, 3, 8192),
}


def tiles(kernel: str, hidden: int, device: torch.device) -> Tiles:
    """The measured choice for a kernel and width; less prefetching where shared memory is short."""
    choice = _TILES[kernel, hidden]
    if device.type == "cuda" and _shared_memory(device) < 220 << 10:
        rows = choice.rows if kernel == "weights" else 64
        return replace(choice, rows=rows, stages=1, warps=4 if rows == 64 else choice.warps)
    return choice


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


class _FilmSirenField(torch.autograd.Function):
    """Inputs: spec, points, directions, four film tensors, grid, then weights and biases."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, *tensors: Tensor | None) -> Tensor:
        points, directions, *film, grid = tensors[:7]
        assert points is not None
        out = torch.empty(points.shape[0], points.shape[1] * points.shape[2], spec.channels, device=points.device)
        run = _Slabs(spec, pack(spec, film, tensors[7:]), points, directions, grid)
        for slab in slabs(len(out), out.shape[1], FORWARD_ROWS * 256 // spec.hidden):
            run.forward(slab, out)
        ctx.spec = spec
        ctx.save_for_backward(*tensors, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grid_lookup.refuse_second_order("film_siren_field", "use the field with precision='fp32'")
        from cuda_ops.film_siren_backward import gradients

        *tensors, out = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False), torch.cuda.device_of(grad):
            found = gradients(ctx.spec, tensors, out, grad.float().contiguous(), ctx.needs_input_grad[1:])
        return None, *found


def problem(spec: Spec, grid: Tensor | None, device: torch.device) -> str | None:
    """Why the kernels do not support this field on this device, or None."""
    if spec.hidden not in WIDTHS:
        return f"the hidden width is {spec.hidden}, the kernels take {WIDTHS}"
    if spec.head_width > 64:
        return f"there are {spec.labels} labels, the kernels take at most 60"
    if device.type == "cuda" and _shared_memory(device) < SHARED_MEMORY[spec.hidden]:
        return f"the GPU has too little shared memory for a hidden width of {spec.hidden}"
    return None if grid is None else grid_lookup.problem(grid)


def _spec(
    points: Tensor,
    directions: Tensor | None,
    film: Sequence[Tensor],
    grid: Tensor | None,
    geometry: Sequence[Linear],
    color: Sequence[Linear],
    labels: Linear | None,
    scale: float,
    grid_in_geometry: bool,
) -> Spec:
    """Read the architecture off the tensors. ValueError when they do not fit together."""
    hidden, channels = geometry[0][0].shape[0], 0 if grid is None else grid.shape[1]
    spec = Spec(
        hidden=hidden,
        geometry_layers=len(geometry),
        color_layers=len(color),
        labels=0 if labels is None else labels[0].shape[0],
        use_direction=directions is not None,
        grid_channels=channels,
        grid_in_geometry=grid_in_geometry and grid is not None,
        scale=float(scale),
    )
    inputs = [3 + (channels if spec.grid_in_geometry else 0)] + [hidden] * (len(geometry) - 1)
    if color:
        grid_inputs = 0 if spec.grid_in_geometry else channels
        inputs += [(3 if spec.use_direction else 0) + grid_inputs + hidden] + [hidden] * (len(color) - 1)
    for (weight, _), width in zip([*geometry, *color], inputs, strict=True):
        if weight.shape != (hidden, width):
            raise ValueError(f"a layer's weight has shape {tuple(weight.shape)}, expected {(hidden, width)}")
    for part, wanted in zip(film, [len(geometry)] * 2 + [len(color)] * 2, strict=True):
        if part.ndim != 3 or part.shape[0] != len(points) or part.shape[1] < wanted or part.shape[2] != hidden:
            raise ValueError(f"FiLM tensor {tuple(part.shape)}, expected ({len(points)}, {wanted}, {hidden})")
    if directions is not None and directions.shape != (*points.shape[:2], 3):
        raise ValueError(f"directions {tuple(directions.shape)}, expected {(*points.shape[:2], 3)}")
    return spec


def film_siren_field(
    points: Tensor,
    directions: Tensor | None,
    film: tuple[Tensor, Tensor, Tensor, Tensor],
    grid: Tensor | None,
    geometry: Sequence[Linear],
    sigma: Linear,
    color: Sequence[Linear],
    rgb: Linear | None,
    labels: Linear | None,
    scale: float = 1.0,
    grid_in_geometry: bool = False,
) -> Tensor:
    """:func:`cuda_ops.reference.film_siren_field` by the fused kernels, or by itself where they cannot run.

    Arguments and result as there; ``color`` may be empty (and ``rgb`` None): then the result is the
    density alone, (N, R * S, 1). The result is float32 and has gradients of first order for every tensor.

    Raises:
        ValueError: the shapes do not fit together.
        RuntimeError: FACELAB_OPS demands a kernel that cannot run, or (in backward) create_graph=True.
    """
    spec = _spec(points, directions, film, grid, geometry, color, labels, scale, grid_in_geometry)
    if (
        dispatch.choose("film_siren_field", points.device, problem(spec, grid, points.device)) == "reference"
        or points.numel() == 0
    ):
        with torch.autocast(points.device.type, enabled=False):
            return reference.film_siren_field(
                points, directions, film, grid, geometry, sigma, color, rgb, labels, scale, grid_in_geometry
            )
    pairs = [*geometry, sigma, *color, *([rgb] if rgb is not None else []), *([labels] if labels is not None else [])]
    flat = [tensor for pair in pairs for tensor in pair]
    with torch.autocast(points.device.type, enabled=False), torch.cuda.device_of(points):
        return _FilmSirenField.apply(spec, points, directions, *film, grid, *flat)
