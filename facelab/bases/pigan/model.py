# SPDX-License-Identifier: Apache-2.0
"""pi-GAN's generator: mapping networks, a FiLM-SIREN field and plain volume rendering (arXiv 2012.00926)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from facelab.cameras import Camera
from facelab.cameras.rays import make_rays
from facelab.draws import Draws
from facelab.fields.output import BoundField
from facelab.fields.siren import Film, SirenConfig, SirenField, scale_frequencies
from facelab.generator import AVERAGE_SEED, Codes, GeneratorOutput, Scene, average_latents
from facelab.nn.mapping import FilmMapping
from facelab.rendering.settings import RenderSettings
from facelab.rendering.volume_renderer import render_rays


@dataclass(frozen=True)
class LatentConfig:
    """One latent code: its width and the layers it modulates."""

    dim: int = 256
    modulates: Literal["all", "geometry", "color"] = "all"


@dataclass(frozen=True)
class SirenGeneratorConfig:
    """Architecture of a :class:`SirenGenerator`."""

    field: SirenConfig = dataclasses.field(default_factory=SirenConfig)
    latents: dict[str, LatentConfig] = dataclasses.field(default_factory=lambda: {"z": LatentConfig()})
    mapping_hidden: int = 256
    mapping_linears: int = 4


class SirenGenerator(nn.Module):
    """A :class:`~facelab.generator.Generator` on a FiLM-SIREN field with one or more latent codes.

    pi-GAN has one code ``z`` for all layers; FENeRF has ``geo`` for density and labels and ``app``
    for colour. Codes are raw FiLM values ``(N, 2, layers * h)``: frequencies, then phases.
    Truncation uses stored averages, see :meth:`update_averages`.
    """

    def __init__(self, config: SirenGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.field_net = SirenField(config.field)
        self.mapping = nn.ModuleDict()
        for name, latent in config.latents.items():
            width = self._layers(latent) * config.field.hidden
            self.mapping[name] = FilmMapping(latent.dim, config.mapping_hidden, width, config.mapping_linears)
            self.register_buffer(f"average_{name}", torch.zeros(2, width))

    def _layers(self, latent: LatentConfig) -> int:
        geometry, color = self.config.field.geometry_layers, self.config.field.color_layers
        return {"all": geometry + color, "geometry": geometry, "color": color}[latent.modulates]

    @property
    def latent_spec(self) -> dict[str, tuple[int, ...]]:
        """Names and widths of the latent codes."""
        return {name: (latent.dim,) for name, latent in self.config.latents.items()}

    def map(self, latents: Mapping[str, Tensor], conditioning: Tensor | None = None, truncation: float = 1.0) -> Codes:
        """Latents {name: (N, dim)} -> raw FiLM codes {name: (N, 2, layers * h)}.

        ``truncation`` psi moves codes to ``average + psi (code - average)``. ValueError for a missing or
        unknown latent, or for psi other than 1 while no averages are stored.
        """
        if set(latents) != set(self.mapping):
            raise ValueError(f"expected the latents {sorted(self.mapping)}, got {sorted(latents)}")
        codes = Codes({name: self.mapping[name](latents[name]) for name in self.mapping})
        return codes if truncation == 1.0 else self.truncate(codes, truncation)

    def truncate(self, codes: Codes, psi: float) -> Codes:
        """Move codes towards the stored averages; psi 0 is the average, 1 leaves them."""
        if not self.has_averages:
            raise ValueError("no stored averages: call update_averages() once before truncating")
        averages = self.average_codes()
        return Codes({name: torch.lerp(averages.values[name], value, psi) for name, value in codes.values.items()})

    def average_codes(self) -> Codes:
        """The stored averages as codes of one scene."""
        return Codes({name: self.get_buffer(f"average_{name}")[None] for name in self.mapping})

    @property
    def has_averages(self) -> bool:
        """Whether averages were stored (they are zero before)."""
        return all(bool(self.get_buffer(f"average_{name}").any()) for name in self.mapping)

    @torch.no_grad()
    def update_averages(self, latents: Mapping[str, Tensor] | None = None, seed: int = AVERAGE_SEED) -> None:
        """Store the mean code of ``latents``, by default of 10 000 fixed normal draws."""
        if latents is None:
            device = next(self.parameters()).device
            latents = average_latents(self.latent_spec, seed, device)
        for name, code in self.map(latents).values.items():
            self.get_buffer(f"average_{name}").copy_(code.mean(0))

    @torch.no_grad()
    def forget_averages(self) -> None:
        """Drop the stored averages: further training makes them wrong."""
        for name in self.mapping:
            self.get_buffer(f"average_{name}").zero_()

    def scene(self, codes: Codes, noise: Any = None) -> Scene:
        """Codes -> a scene whose part ``film`` is ready for the field. ``noise`` is not used."""
        layers = [code.unflatten(-1, (-1, self.config.field.hidden)) for code in codes.values.values()]
        raw = torch.cat(layers, dim=2)  # (N, 2, geometry + color, h): geometry codes stand first
        frequencies, phases = scale_frequencies(raw[:, 0]), raw[:, 1]
        split = self.config.field.geometry_layers
        film = Film(frequencies[:, :split], phases[:, :split], frequencies[:, split:], phases[:, split:])
        return Scene({"film": film}, len(codes))

    def field(self, scene: Scene, count: int | None = None) -> BoundField:
        """The field of a scene, a callable (points (N, R, S, 3), directions (N, R, 3)) -> FieldOutput.

        ``count`` repeats a single scene for several cameras.
        """
        film: Film = scene.parts["film"]
        if count is not None and count != scene.count:
            if scene.count != 1:
                raise ValueError(f"{scene.count} scenes cannot be rendered from {count} cameras: give 1 or {count}")
            film = Film(*(x.expand(count, -1, -1) for x in film.tensors()))
        return lambda points, directions: self.field_net(points, directions, film)

    def render(
        self, scene: Scene, camera: Camera, settings: RenderSettings, draws: Draws | None = None, guide: Any = None
    ) -> GeneratorOutput:
        """Render each scene from its camera (one scene, many cameras broadcasts).

        Returns rgb and semantics as ``2 v - 1``; the semantics are raw scores of the classes 1..K.
        """
        output = render_rays(
            self.field(scene, len(camera)), make_rays(camera, settings.resolution, settings.grid), settings, draws
        )
        size = settings.resolution

        def image(x: Tensor | None, gain: float = 1.0, shift: float = 0.0) -> Tensor | None:
            return None if x is None else (gain * x + shift).transpose(1, 2).unflatten(2, (size, size)).contiguous()

        rgb, depth, opacity = image(output.rgb, 2.0, -1.0), image(output.depth), image(output.opacity)
        assert rgb is not None and depth is not None and opacity is not None
        return GeneratorOutput(rgb, depth, opacity, image(output.semantics, 2.0, -1.0), image(output.normals))

    def forward(
        self,
        latents: Mapping[str, Tensor],
        camera: Camera,
        settings: RenderSettings,
        draws: Draws | None = None,
        truncation: float = 1.0,
    ) -> GeneratorOutput:
        """``map``, ``scene`` and ``render`` in one call."""
        return self.render(self.scene(self.map(latents, truncation=truncation)), camera, settings, draws)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialise from an explicit generator as the original does."""
        self.field_net.reset_parameters(generator)
        for mapping in self.mapping.values():
            assert isinstance(mapping, FilmMapping)
            mapping.reset_parameters(generator)
