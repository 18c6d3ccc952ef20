# SPDX-License-Identifier: Apache-2.0
"""The Generator protocol: all that inference, inversion, metrics and viewers know of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.cameras import Camera
from facelab.draws import Draws
from facelab.fields.output import BoundField
from facelab.rendering.background import FillColor, fill_background
from facelab.rendering.settings import RenderSettings

AVERAGE_SEED, AVERAGE_COUNT = 0, 10_000


@dataclass(frozen=True)
class Codes:
    """Mapped codes by name, each (N, ...): the space in which codes are mixed, edited and optimised."""

    values: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def __getitem__(self, index) -> Codes:
        """Select along the batch; an integer keeps the axis."""
        if isinstance(index, int):
            index = [index]
        return Codes({k: v[index] for k, v in self.values.items()})

    def map(self, function: Callable[[Tensor], Tensor]) -> Codes:
        return Codes({k: function(v) for k, v in self.values.items()})

    def to(self, *args, **kwargs) -> Codes:
        return self.map(lambda v: v.to(*args, **kwargs))

    def mix(self, other: Codes, t: Mapping[str, float] | float) -> Codes:
        """Linear mix ``(1 - t) self + t other``; ``t`` per code name or for all, any real number."""
        factors = t if isinstance(t, Mapping) else dict.fromkeys(self.values, t)
        unknown = set(factors) - set(self.values)
        if unknown:
            raise ValueError(f"unknown codes {sorted(unknown)}, this generator has {sorted(self.values)}")
        return Codes({k: torch.lerp(v, other.values[k], float(factors.get(k, 0.0))) for k, v in self.values.items()})

    @staticmethod
    def cat(parts: list[Codes]) -> Codes:
        return Codes({k: torch.cat([p.values[k] for p in parts]) for k in parts[0].values})


@dataclass(frozen=True)
class Scene:
    """What does not depend on the camera, frozen; ``parts`` are model specific and replaceable."""

    parts: Mapping[str, Any]
    count: int

    def replace(self, **parts: Any) -> Scene:
        """A scene with some parts exchanged. KeyError on a part the scene does not have."""
        unknown = set(parts) - set(self.parts)
        if unknown:
            raise KeyError(f"unknown scene parts {sorted(unknown)}, this scene has {sorted(self.parts)}")
        return replace(self, parts={**self.parts, **parts})


@dataclass(frozen=True)
class GeneratorOutput:
    """Pictures of N cameras, S x S pixels.

    Attributes:
        rgb: (N, 3, S, S) in [-1, 1].
        depth: (N, 1, S, S) ray parameter t in scene units, weighted sum.
        opacity: (N, 1, S, S) in [0, 1].
        semantics: (N, K, S, S) scores in about [-1, 1], or None.
        normals: (N, 3, S, S) unit world vectors, or None.
        raw_rgb: (N, 3, s, s) before super-resolution, or None.
        features: (N, C, s, s) or None.
    """

    rgb: Tensor
    depth: Tensor
    opacity: Tensor
    semantics: Tensor | None = None
    normals: Tensor | None = None
    raw_rgb: Tensor | None = None
    features: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> GeneratorOutput:
        values = {k: (None if v is None else function(v)) for k, v in self.__dict__.items()}
        return GeneratorOutput(**values)

    @staticmethod
    def cat(parts: list[GeneratorOutput]) -> GeneratorOutput:
        names = parts[0].__dict__
        return GeneratorOutput(
            **{n: None if getattr(parts[0], n) is None else torch.cat([getattr(p, n) for p in parts]) for n in names}
        )


class Generator(Protocol):
    """A 3D-aware generator. One scene is computed once and rendered from many cameras."""

    @property
    def latent_spec(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes (without the batch) of the latents."""
        ...

    def map(self, latents: Mapping[str, Tensor], conditioning: Tensor | None = None, truncation: float = 1.0) -> Codes:
        """Latents -> codes; ``truncation`` 1 is none, 0 the average."""
        ...

    def scene(self, codes: Codes, noise: Any = None) -> Scene:
        """Codes -> everything that does not depend on the camera."""
        ...

    def render(
        self, scene: Scene, camera: Camera, settings: RenderSettings, draws: Draws | None = None, guide: Any = None
    ) -> GeneratorOutput:
        """Render each scene from its camera; one scene and many cameras broadcasts."""
        ...

    def field(self, scene: Scene) -> BoundField:
        """The field with its codes filled in: meshes, regularisers, landmarks."""
        ...


def sample_latents(spec: Mapping[str, tuple[int, ...]], draws: Draws, count: int, device="cpu") -> dict[str, Tensor]:
    """Standard normal latents for ``spec``, drawn on the CPU (the same on every device)."""
    return {name: draws.normal(name, (count, *shape)).to(device) for name, shape in spec.items()}


def average_latents(spec: Mapping[str, tuple[int, ...]], seed: int = AVERAGE_SEED, device="cpu") -> dict[str, Tensor]:
    """The 10 000 normal draws that stored averages are taken over."""
    return sample_latents(spec, Draws(seed).at(phase="average"), AVERAGE_COUNT, device)


def seed_latents(spec: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Latents (1, ...) of a seed, one code after the other as ``torch.manual_seed(seed); torch.randn(1, ...)`` draws."""
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(1, *shape, generator=source) for name, shape in spec.items()}


def ray_image(x: Tensor, side: int) -> Tensor:
    """Values of rays (N, side * side, C), row-major, -> image (N, C, side, side)."""
    return x.transpose(1, 2).unflatten(2, (side, side)).contiguous()


def enlarged(x: Tensor, size: int) -> Tensor:
    """Images (N, C, s, s) -> (N, C, size, size), bilinear."""
    if x.shape[-1] == size:
        return x
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


def fill_output(output: GeneratorOutput, color: FillColor = "black", reference: bool = False) -> GeneratorOutput:
    """:func:`fill_background` for a picture, whose values lie in [-1, 1]."""
    semantics = None if output.semantics is None else output.semantics / 2 + 0.5
    rgb, semantics = fill_background(output.rgb / 2 + 0.5, semantics, output.opacity, color, reference)
    return replace(output, rgb=2 * rgb - 1, semantics=None if semantics is None else 2 * semantics - 1)
