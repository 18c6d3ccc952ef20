# SPDX-License-Identifier: Apache-2.0
"""Tri-plane fields: three feature planes and a small decoder (EG3D, arXiv 2112.07945, section 4).

Shape legend: N scenes, P points, C channels of a plane, R rays, S samples per ray.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facelab.fields.output import FieldOutput

PlaneAxes = Literal["xy_xz_zx", "xy_xz_zy", "xy_yz_zx"]
Aggregation = Literal["mean", "concat"]

# coordinates (0 x, 1 y, 2 z) along a plane's width and height
PLANE_AXES: dict[str, tuple[tuple[int, int], ...]] = {
    "xy_xz_zx": ((0, 1), (0, 2), (2, 0)),  # released EG3D weights: the last plane repeats the second, transposed
    "xy_xz_zy": ((0, 1), (0, 2), (2, 1)),
    "xy_yz_zx": ((0, 1), (1, 2), (2, 0)),  # rolled planes (NeRFFaceShop)
}
RGB_MARGIN = 0.001  # a colour reaches from -0.001 to 1.001, so that 0 and 1 lie within the sigmoid's range


@dataclass(frozen=True)
class TriplaneConfig:
    """Architecture of a :class:`TriplaneField`."""

    axes: PlaneAxes = "xy_xz_zy"  # which coordinates index each plane
    aggregation: Aggregation = "mean"  # of the three features of a point
    box_side: float = 1.0  # the planes cover a cube of this side around the origin, scene units
    channels: int = 32  # of one plane
    hidden: int = 64  # width of the decoder
    features: int = 32  # channels that are composited, the first three are colour
    decoder_lr_mul: float = 1.0  # learning rate multiplier of the decoder

    def __post_init__(self) -> None:
        if self.axes not in PLANE_AXES:
            raise ValueError(f"axes must be one of {', '.join(PLANE_AXES)}, got {self.axes!r}")
        if self.aggregation not in ("mean", "concat"):
            raise ValueError(f"aggregation must be 'mean' or 'concat', got {self.aggregation!r}")
        if not self.box_side > 0 or self.features < 3:
            raise ValueError(f"box_side must be > 0 and features >= 3, got {self.box_side} and {self.features}")

    @property
    def inputs(self) -> int:
        """Channels that the decoder reads."""
        return self.channels * (3 if self.aggregation == "concat" else 1)


def plane_coordinates(points: Tensor, axes: PlaneAxes = "xy_xz_zy") -> Tensor:
    """(N, P, 3) points -> (N, 3, P, 2): along the width and the height of each plane."""
    return torch.stack([torch.stack([points[..., a], points[..., b]], dim=-1) for a, b in PLANE_AXES[axes]], dim=1)


def sample_planes(planes: Tensor, points: Tensor, axes: PlaneAxes = "xy_xz_zy") -> Iterator[Tensor]:
    """Bilinear lookup, zero outside [-1, 1], pixel centres inside the border; one plane after the other.

    Args:
        planes: (N, 3, C, H, W), or one set of planes for all points; float32 is read whatever the dtype.
        points: (N, P, 3), the cube of the planes is [-1, 1]^3.

    Yields:
        (N, C, P) features of each plane.

    Raises:
        ValueError: planes of another shape or batch size.
    """
    if planes.ndim != 5 or planes.shape[1] != 3 or planes.shape[0] not in (1, len(points)):
        raise ValueError(f"planes must be ({len(points)} or 1, 3, C, H, W), got {tuple(planes.shape)}")
    with torch.autocast(points.device.type, enabled=False):
        for plane, (a, b) in zip(planes.float().unbind(1), PLANE_AXES[axes], strict=True):
            where = torch.stack([points[..., a], points[..., b]], dim=-1).float()[:, None]
            plane = plane.expand(len(points), -1, -1, -1)
            yield F.grid_sample(plane, where, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(2)


class _Softplus(torch.autograd.Function):
    """softplus whose gradient comes from its output, which the next layer keeps anyway: a quarter less memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.softplus(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradients[0] * -torch.expm1(-y)


class _Colour(torch.autograd.Function):
    """A sigmoid widened by ``RGB_MARGIN`` on both sides, whose gradient comes from its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.sigmoid(x).mul_(1 + 2 * RGB_MARGIN).sub_(RGB_MARGIN)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        share = (y + RGB_MARGIN) / (1 + 2 * RGB_MARGIN)
        return gradients[0] * (1 + 2 * RGB_MARGIN) * share * (1 - share)


class OSGDecoder(nn.Module):
    """Plane features -> raw density and features: one hidden softplus layer (EG3D, section 4.2).

    Weights are stored as N(0, 1) / ``lr_mul`` and used times ``lr_mul / sqrt(inputs)`` (equalised learning rate).
    """

    def __init__(self, inputs: int, hidden: int = 64, features: int = 32, lr_mul: float = 1.0) -> None:
        super().__init__()
        self.lr_mul = lr_mul
        self.hidden_weight = nn.Parameter(torch.zeros(hidden, inputs))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.output_weight = nn.Parameter(torch.zeros(1 + features, hidden))
        self.output_bias = nn.Parameter(torch.zeros(1 + features))

    def effective(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The matrices and biases as used: (hidden, inputs), (hidden,), (1 + features, hidden), (1 + features,)."""
        gains = [self.lr_mul / math.sqrt(w.shape[1]) for w in (self.hidden_weight, self.output_weight)]
        return (
            self.hidden_weight * gains[0],
            self.hidden_bias * self.lr_mul,
            self.output_weight * gains[1],
            self.output_bias * self.lr_mul,
        )

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(N, inputs, P) plane features -> raw density (N, P, 1), features (N, P, C) in about [0, 1]."""
        hidden_weight, hidden_bias, output_weight, output_bias = self.effective()
        output = _affine(self._hidden(inputs, hidden_weight, hidden_bias), output_weight, output_bias)
        return output[..., :1], _Colour.apply(output[..., 1:])

    def density(self, inputs: Tensor) -> Tensor:
        """(N, inputs, P) plane features -> raw density (N, P, 1)."""
        hidden_weight, hidden_bias, output_weight, output_bias = self.effective()
        return _affine(self._hidden(inputs, hidden_weight, hidden_bias), output_weight[:1], output_bias[:1])

    @staticmethod
    def _hidden(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _Softplus.apply(_affine(inputs.transpose(1, 2), weight, bias))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Weights N(0, 1) / lr_mul, biases 0."""
        for weight in (self.hidden_weight, self.output_weight):
            weight.normal_(0, 1 / self.lr_mul, generator=generator)
        for bias in (self.hidden_bias, self.output_bias):
            bias.zero_()


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(N, P, in) of any strides -> (N, P, out); a batched product reads a transposed x without copying it."""
    return torch.baddbmm(bias.to(x.dtype), x, weight.t().to(x.dtype).expand(len(x), -1, -1))


class TriplaneField(nn.Module):
    """Radiance field on three planes; directions are not used. Planes are an argument, nothing is kept.

    ``precision`` (a plain attribute, not part of the state) is that of the fused renderer's matrix products,
    see :class:`cuda_ops.triplane_render.TriplaneSpec`; ``fp16`` also reads the planes as halves, ``auto`` is ``tf32``
    where torch may round matrix products to TF32, else ``fp32``.
    """

    def __init__(self, config: TriplaneConfig) -> None:
        super().__init__()
        self.config = config
        self.precision: Literal["auto", "fp32", "tf32", "fp16"] = "auto"
        self.decoder = OSGDecoder(config.inputs, config.hidden, config.features, config.decoder_lr_mul)

    def forward(self, points: Tensor, planes: Tensor) -> FieldOutput:
        """Evaluate the field.

        Args:
            points: (N, R, S, 3) in scene units.
            planes: (N or 1, 3, C, H, W).

        Returns:
            Raw density and features in about [0, 1], whose first three channels are rgb.
        """
        sigma, features = self.decoder(self.plane_features(points.flatten(1, 2), planes))
        features = features.unflatten(1, points.shape[1:3])
        return FieldOutput(sigma.unflatten(1, points.shape[1:3]), features[..., :3], features=features)

    def density(self, points: Tensor, planes: Tensor) -> Tensor:
        """(N, R, S, 3) points in scene units -> raw density (N, R, S, 1)."""
        inputs = self.plane_features(points.flatten(1, 2), planes)
        return self.decoder.density(inputs).unflatten(1, points.shape[1:3])

    def plane_features(self, points: Tensor, planes: Tensor) -> Tensor:
        """(N, P, 3) points in scene units -> (N, inputs, P): the mean over the planes, or all three."""
        parts = sample_planes(planes, points * (2 / self.config.box_side), self.config.axes)
        if self.config.aggregation == "concat":
            return torch.cat(list(parts), dim=1)
        total = next(parts)
        for part in parts:
            total = total + part
        return total / 3

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialise the decoder from an explicit generator."""
        self.decoder.reset_parameters(generator)
