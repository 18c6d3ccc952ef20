# SPDX-License-Identifier: Apache-2.0
"""StyleSDF's field: a FiLM-SIREN that tells signed distance, colour and features (arXiv 2112.11427, section 3.1).

Shape legend: N scenes, R rays, S samples per ray, P = R S points, C width, W width of the style code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from facelab.fields.output import BoundField, FieldOutput
from facelab.nn.film import FilmLinear, FilmSine, StackedLinear, affine, pull_back, sine_affine

BETA_START = 0.1
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


class DistanceField(Protocol):
    """A field with its codes filled in that tells a signed distance and its gradient."""

    def __call__(self, points: Tensor, directions: Tensor) -> FieldOutput:
        """points (N, R, S, 3) in scene units, directions (N, R, 3) -> values with ``sdf``."""
        ...

    def with_gradient(self, points: Tensor, directions: Tensor) -> tuple[FieldOutput, Tensor]:
        """The values, and the gradient (N, R, S, 3) of the signed distance with respect to the points.

        The gradient is an ordinary tensor of the graph: a loss on it needs one backward.
        """
        ...


def gradient_by_autograd(field: BoundField, points: Tensor, directions: Tensor) -> tuple[FieldOutput, Tensor]:
    """``field.with_gradient`` by differentiating the signed distance; a loss on it needs a backward of a backward.

    ValueError for a field without a signed distance.
    """
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        leaf = points.detach().requires_grad_() if not points.requires_grad else points
        values = field(leaf, directions)
        if values.sdf is None:
            raise ValueError("this field has no signed distance, and so no gradient of one")
        (gradient,) = torch.autograd.grad(values.sdf.sum(), leaf, create_graph=recording, retain_graph=recording)
    return values, gradient


def laplace_density(sdf: Tensor, beta: Tensor) -> Tensor:
    """Density ``sigmoid(-sdf / beta) / beta`` of a signed distance (StyleSDF, equation 4); 1 / scene unit."""
    return torch.sigmoid(-sdf / beta) / beta


@dataclass(frozen=True)
class SdfFieldConfig:
    """Architecture of an :class:`SdfField`."""

    width: int = 256  # of every layer
    layers: int = 8  # before the signed distance
    style_dim: int = 256
    box_side: float | None = (
        0.24  # points are multiplied by 2 / box_side, far - near of the cameras; None = as they are
    )
    density: Literal["sdf", "raw"] = "sdf"  # raw: the first output is a raw density and there is no beta


@dataclass(frozen=True)
class SdfFilm:
    """The layers of N scenes: those that see points, then the one that sees the view direction."""

    points: tuple[FilmLinear, ...]
    view: FilmLinear

    def __len__(self) -> int:
        return len(self.view.weight)

    def expand(self, count: int) -> SdfFilm:
        """One scene for ``count`` cameras. ValueError for other counts that do not agree."""
        return SdfFilm(tuple(layer.expand(count) for layer in self.points), self.view.expand(count))


class SdfField(nn.Module):
    """Signed distance, colour and features at points, from a style code.

    The signed distance is a linear map of the last of ``layers`` FiLM-SIREN layers; one more of them sees these and
    the view direction and gives the features, of which the colour is a linear map. ``beta`` is the learned width of
    the surface. Everything is computed in float32 at least, because sines of large arguments amplify rounding.
    Parameters are zero until :meth:`reset_parameters`. ``precision`` says what the layers compute in.
    """

    precision: Literal["fp32"] = "fp32"

    def __init__(self, config: SdfFieldConfig) -> None:
        super().__init__()
        self.config = config
        c, w = config.width, config.style_dim
        self.layers = nn.ModuleList(
            FilmSine(c if i else 3, c, w, first=i == 0)  # the first sees points
            for i in range(config.layers)
        )
        self.distance = StackedLinear(c, 1, "freq")
        self.view = FilmSine(c + 3, c, w)
        self.rgb = StackedLinear(c, 3, "freq")
        self.beta: nn.Parameter | None = None
        if config.density == "sdf":
            self.beta = nn.Parameter(torch.full((1,), BETA_START))

    def film(self, style: Tensor) -> SdfFilm:
        """Style codes (N, W) -> the layers of N scenes."""
        with torch.autocast(style.device.type, enabled=False):
            style = _at_least_float32(style)
            layers = (layer.modulate(style) for layer in self.layers if isinstance(layer, FilmSine))
            return SdfFilm(tuple(layers), self.view.modulate(style))

    def forward(self, points: Tensor, directions: Tensor, film: SdfFilm, features: bool = True) -> FieldOutput:
        """Evaluate the field.

        Args:
            points: (N, R, S, 3) in scene units.
            directions: (N, R, 3) unit view directions, shared by the samples of a ray.
            film: layers of N scenes.
            features: return the features too.

        Raises:
            ValueError: the numbers of scenes or rays differ.
        """
        rgb, distance, feature, _ = self.raw(points, directions, film, features=features)
        return self._output(rgb, distance, feature)

    def with_gradient(
        self, points: Tensor, directions: Tensor, film: SdfFilm, features: bool = True
    ) -> tuple[FieldOutput, Tensor]:
        """:meth:`forward`, and the gradient (N, R, S, 3) of the first output with respect to the points.

        It is pulled back through the layers (:func:`~facelab.nn.film.pull_back`); see :class:`DistanceField`.
        """
        rgb, distance, feature, slope = self.raw(points, directions, film, features=features, gradient=True)
        assert slope is not None
        return self._output(rgb, distance, feature), slope

    def distances(self, points: Tensor, film: SdfFilm) -> Tensor:
        """(N, R, S, 3) points -> (N, R, S, 1) signed distance alone (meshes, sphere initialisation)."""
        with torch.autocast(points.device.type, enabled=False):
            step, last, _ = self._trunk(_at_least_float32(points), film)
            return step(last, self.distance.weight, self.distance.bias).unflatten(1, points.shape[1:3])

    def raw(
        self, points: Tensor, directions: Tensor, film: SdfFilm, *, features: bool = True, gradient: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The outputs of the network.

        Returns:
            colour (N, R, S, 3) before the sigmoid; signed distance (N, R, S, 1); features (N, R, S, C) in [-1, 1] or
            None; gradient (N, R, S, 3) of the signed distance with respect to ``points`` or None.
        """
        if points.shape[:2] != directions.shape[:2] or len(film) != len(points):
            raise ValueError(
                f"points {tuple(points.shape)}, directions {tuple(directions.shape)} and {len(film)} scenes must agree "
                "in scenes and rays"
            )
        rays = points.shape[1:3]
        with torch.autocast(points.device.type, enabled=False):
            step, last, arguments = self._trunk(_at_least_float32(points), film, gradient)
            distance = step(last, self.distance.weight, self.distance.bias).unflatten(1, rays)
            slope = None
            if gradient:
                slope = self._scale * pull_back(arguments, film.points, self.distance.weight[0]).unflatten(1, rays)
            width, view = self.config.width, film.view
            # the view direction is the same for the samples of a ray, so its share is added per ray
            seen = step(last, view.weight[..., :width], view.bias).unflatten(1, rays)
            of_ray = (_at_least_float32(directions) @ view.weight[..., width:].transpose(1, 2))[:, :, None]
            seen = seen.add_(of_ray).sin_() if step is affine else seen + of_ray
            rgb = step(seen, self.rgb.weight, self.rgb.bias)
            if not features:
                return rgb, distance, None, slope
            return rgb, distance, seen if step is affine else torch.sin(seen), slope

    def _trunk(self, points: Tensor, film: SdfFilm, keep: bool = False) -> tuple[Step, Tensor, list[Tensor]]:
        """Points through the layers that see them.

        Returns:
            what makes the next layer's arguments of the last ones, these (N, P, C), and, if ``keep``, those of all
            layers in order. Where no graph is recorded the sines are taken in place and the step has none to take.
        """
        x = self.warp(points).flatten(1, 2)
        if not keep and not torch.is_grad_enabled():
            for layer in film.points:
                x = affine(x, layer.weight, layer.bias).sin_()
            return affine, x, []
        a = affine(x, film.points[0].weight, film.points[0].bias)
        arguments = [a] if keep else []
        for layer in film.points[1:]:
            a = sine_affine(a, layer.weight, layer.bias)
            if keep:
                arguments.append(a)
        return sine_affine, a, arguments

    def warp(self, points: Tensor) -> Tensor:
        """Scene units -> the box the network works in (no clamping)."""
        return self._scale * points

    @property
    def _scale(self) -> float:
        return 1.0 if self.config.box_side is None else 2 / self.config.box_side

    def _output(self, rgb: Tensor, distance: Tensor, features: Tensor | None) -> FieldOutput:
        color = torch.sigmoid(rgb)
        if self.beta is None:
            return FieldOutput(distance, color, features=features)
        return FieldOutput(laplace_density(distance, self.beta), color, features=features, sdf=distance)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """StyleSDF's initialisation; beta becomes 0.1."""
        for module in self.modules():
            if isinstance(module, FilmSine):
                module.reset_parameters(generator)
        self.distance.reset_parameters(generator)
        self.rgb.reset_parameters(generator)
        if self.beta is not None:
            self.beta.fill_(BETA_START)


@dataclass(frozen=True)
class BoundSdf:
    """An :class:`SdfField` with its codes filled in: a :class:`DistanceField`.

    Attributes:
        features: whether the features are evaluated too.
    """

    network: SdfField
    film: SdfFilm
    features: bool = True

    def __call__(self, points: Tensor, directions: Tensor) -> FieldOutput:
        return self.network(points, directions, self.film, self.features)

    def with_gradient(self, points: Tensor, directions: Tensor) -> tuple[FieldOutput, Tensor]:
        return self.network.with_gradient(points, directions, self.film, self.features)

    def distances(self, points: Tensor) -> Tensor:
        """(N, R, S, 3) points -> (N, R, S, 1) signed distance alone."""
        return self.network.distances(points, self.film)

    def without_features(self) -> BoundSdf:
        """The same field that does not evaluate its features."""
        return replace(self, features=False)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
