# SPDX-License-Identifier: Apache-2.0
"""FiLM-SIREN fields of pi-GAN and FENeRF.

Shape legend: N scenes, R rays, S samples per ray, h hidden width, L geometry layers, C colour layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cuda_ops import film_siren
from cuda_ops.reference import fold_linear_chain
from facelab.fields.output import FieldOutput
from facelab.nn.init import reset_linear_bias, uniform_


@dataclass(frozen=True)
class SirenConfig:
    """Architecture of a :class:`SirenField`."""

    hidden: int = 256  # width of every layer
    geometry_layers: int = 8
    color_layers: int = 1  # FiLM layers of the colour branch: 1 (pi-GAN), 3 or 8 (FENeRF)
    label_layers: int = 0  # plain linear maps of the label head, 0 = no labels
    label_count: int = 18  # classes of the label head (background is not one of them)
    box_side: float | None = 0.24  # points are multiplied by 2 / box_side; None = used as they are
    use_direction: bool = True  # the colour branch sees the view direction
    grid_branch: Literal["none", "color", "geometry"] = "none"  # where the latent grid enters
    grid_channels: int = 32
    grid_size: tuple[int, int, int] = (96, 96, 96)  # cells along z, y, x
    grid_std: float = 0.1  # initial standard deviation of the grid
    color_first_layer_init: Literal["hidden", "fan_in", "three"] = "hidden"  # FENeRF's deep-colour variants

    @property
    def geometry_inputs(self) -> int:
        return 3 + (self.grid_channels if self.grid_branch == "geometry" else 0)

    @property
    def color_inputs(self) -> int:
        grid = self.grid_channels if self.grid_branch == "color" else 0
        return self.hidden + grid + (3 if self.use_direction else 0)


@dataclass(frozen=True)
class Film:
    """FiLM parameters ready for use, (N, L or C, h) each: frequencies (15 raw + 30) and phases."""

    geometry_frequencies: Tensor
    geometry_phases: Tensor
    color_frequencies: Tensor
    color_phases: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.geometry_frequencies, self.geometry_phases, self.color_frequencies, self.color_phases


def scale_frequencies(raw: Tensor) -> Tensor:
    """Raw mapping output -> the frequencies a FiLM layer uses (pi-GAN)."""
    return 15 * raw + 30


class SirenField(nn.Module):
    """FiLM-SIREN radiance field with optional labels and latent grid.

    pi-GAN (arXiv 2012.00926, equations 1 to 4) and FENeRF (arXiv 2111.15490, section 3.1). Every
    FiLM layer computes ``sin(f * (W x + b) + p)``. The colour branch sees the concatenation of
    view direction, grid features and the last geometry feature, in this order.

    ``precision`` (a plain attribute, not part of the state): ``"fp32"`` and ``"tf32"`` evaluate the layers
    one by one (the TF32 switch itself is torch's); ``"fp16"`` takes the fused kernels of
    :mod:`cuda_ops.film_siren`: half the operands, float32 phases, recomputed backward, first-order
    gradients only, whatever the autocast. Where they cannot run, one warning and float32.
    """

    def __init__(self, config: SirenConfig) -> None:
        super().__init__()
        self.config = config
        self.precision: Literal["fp32", "tf32", "fp16"] = "fp32"
        h = config.hidden
        widths = [config.geometry_inputs, *[h] * config.geometry_layers]
        self.geometry = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.sigma = nn.Linear(h, 1)
        widths = [config.color_inputs, *[h] * config.color_layers]
        self.color = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.rgb = nn.Linear(h, 3)
        widths = [h] * config.label_layers + [config.label_count]
        self.labels = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )  # nothing between them: a factorised linear map, as in the original
        self.grid: nn.Parameter | None = None
        if config.grid_branch != "none":
            grid = torch.zeros(1, config.grid_channels, *config.grid_size)
            self.grid = nn.Parameter(grid.contiguous(memory_format=torch.channels_last_3d))

    def forward(self, points: Tensor, directions: Tensor, film: Film) -> FieldOutput:
        """Evaluate the field.

        Args:
            points: (N, R, S, 3) in scene units.
            directions: (N, R, 3) unit view directions, shared by the samples of a ray.
            film: modulation of N scenes.

        Returns:
            Raw density, rgb in [0, 1] and label values.

        Raises:
            ValueError: the batch sizes of points, directions and film differ.
        """
        if points.shape[:2] != directions.shape[:2] or len(film.geometry_phases) != len(points):
            raise ValueError(
                f"points {tuple(points.shape)}, directions {tuple(directions.shape)} and film "
                f"({len(film.geometry_phases)}, ...) must agree in scenes and rays"
            )
        shape = points.shape[:3]
        if self.uses_kernels:
            return self._fused(points, directions, film)
        warped = self.warp(points).flatten(1, 2)
        grid = None if self.grid is None else sample_grid(self.grid, warped)
        feature = self.geometry_features(warped, grid, film)
        parts = [feature]
        if grid is not None and self.config.grid_branch == "color":
            parts.insert(0, grid.to(feature.dtype))
        if self.config.use_direction:
            expanded = directions[:, :, None].expand(*shape, 3).flatten(1, 2)
            parts.insert(0, expanded.to(feature.dtype))
        color = torch.cat(parts, dim=-1) if len(parts) > 1 else feature
        for i, layer in enumerate(self.color):
            color = film_sine(layer(color), film.color_frequencies[:, i], film.color_phases[:, i])
        semantics = feature
        for layer in self.labels:
            semantics = layer(semantics)
        return FieldOutput(
            sigma=self.sigma(feature).unflatten(1, shape[1:]),
            rgb=torch.sigmoid(self.rgb(color)).unflatten(1, shape[1:]),
            semantics=semantics.unflatten(1, shape[1:]) if len(self.labels) else None,
        )

    def geometry_features(self, warped: Tensor, grid: Tensor | None, film: Film) -> Tensor:
        """(N, P, 3) warped points -> (N, P, h), the input of the density, label and colour heads."""
        feature = warped
        if grid is not None and self.config.grid_branch == "geometry":
            feature = torch.cat([grid, warped], dim=-1)
        for i, layer in enumerate(self.geometry):
            feature = film_sine(layer(feature), film.geometry_frequencies[:, i], film.geometry_phases[:, i])
        return feature

    def density(self, points: Tensor, film: Film) -> Tensor:
        """(N, R, S, 3) points -> (N, R, S, 1) raw density only (importance sampling, meshes, normals).

        The fused kernels are used without gradients only: normals want the exact field.
        """
        if self.uses_kernels and not torch.is_grad_enabled():
            return self._fused_density(points, film)
        warped = self.warp(points).flatten(1, 2)
        grid = sample_grid(self.grid, warped) if self.config.grid_branch == "geometry" else None
        return self.sigma(self.geometry_features(warped, grid, film)).unflatten(1, points.shape[1:3])

    @property
    def uses_kernels(self) -> bool:
        """Whether ``precision`` asks for the fused kernels. ValueError when it is none of the three."""
        if self.precision not in ("fp32", "tf32", "fp16"):
            raise ValueError(f"precision is {self.precision!r}, expected 'fp32', 'tf32' or 'fp16'")
        return self.precision == "fp16"

    def _fused(self, points: Tensor, directions: Tensor, film: Film) -> FieldOutput:
        """:meth:`forward` by :func:`cuda_ops.film_siren.film_siren_field`."""
        with torch.autocast(points.device.type, enabled=False):
            labels = fold_linear_chain([_pair(layer) for layer in self.labels]) if len(self.labels) else None
        values = film_siren.film_siren_field(
            points,
            directions if self.config.use_direction else None,
            film.tensors(),
            self.grid,
            [_pair(layer) for layer in self.geometry],
            _pair(self.sigma),
            [_pair(layer) for layer in self.color],
            _pair(self.rgb),
            labels,
            scale=self._scale,
            grid_in_geometry=self.config.grid_branch == "geometry",
        ).unflatten(1, points.shape[1:3])
        k = values.shape[-1] - 4
        return FieldOutput(
            sigma=values[..., k + 3 :],
            rgb=values[..., k : k + 3],
            semantics=values[..., :k] if k else None,
        )

    def _fused_density(self, points: Tensor, film: Film) -> Tensor:
        """:meth:`density` by the kernels."""
        in_geometry = self.config.grid_branch == "geometry"
        return film_siren.film_siren_field(
            points,
            None,
            film.tensors(),
            self.grid if in_geometry else None,
            [_pair(layer) for layer in self.geometry],
            _pair(self.sigma),
            [],
            None,
            None,
            scale=self._scale,
            grid_in_geometry=in_geometry,
        ).unflatten(1, points.shape[1:3])

    @property
    def _scale(self) -> float:
        return 1.0 if self.config.box_side is None else 2 / self.config.box_side

    def warp(self, points: Tensor) -> Tensor:
        """Scene units -> the box the field works in (no clamping)."""
        return points if self.config.box_side is None else points * (2 / self.config.box_side)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """SIREN initialisation for frequencies around 30 (pi-GAN, supplement; FENeRF variants)."""
        for layer in [*self.geometry, self.sigma, *self.color, self.rgb, *self.labels]:
            assert isinstance(layer, nn.Linear)
            uniform_(layer.weight, math.sqrt(6 / layer.in_features) / 25, generator)
            reset_linear_bias(layer, generator)
        uniform_(self.geometry[0].weight, 1 / 3, generator)
        if self.config.color_first_layer_init == "three":
            uniform_(self.color[0].weight, 1 / 3, generator)
        elif self.config.color_first_layer_init == "fan_in":
            uniform_(self.color[0].weight, 1 / self.config.color_inputs, generator)
        if self.grid is not None:
            self.grid.normal_(0, self.config.grid_std, generator=generator)


def _pair(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A linear layer -> its weight and bias."""
    assert isinstance(layer, nn.Linear)
    return layer.weight, layer.bias


def film_sine(x: Tensor, frequency: Tensor, phase: Tensor) -> Tensor:
    """sin(frequency * x + phase); x (N, P, h), frequency and phase (N, h)."""
    return torch.sin(frequency[:, None] * x + phase[:, None])


def sample_grid(grid: Tensor | None, warped: Tensor) -> Tensor:
    """Trilinear lookup in a latent grid, zero outside [-1, 1], corners aligned, float32 under autocast.

    Args:
        grid: (1, C, D, H, W); the point's x runs along W, y along H, z along D.
        warped: (N, P, 3).

    Returns:
        (N, P, C).
    """
    if grid is None:
        raise ValueError("this field has no latent grid")
    with torch.autocast(warped.device.type, enabled=False):
        where = warped.float().reshape(1, 1, 1, -1, 3)
        values = F.grid_sample(grid.float(), where, mode="bilinear", padding_mode="zeros", align_corners=True)
    return values.reshape(grid.shape[1], -1).t().reshape(*warped.shape[:2], grid.shape[1])
