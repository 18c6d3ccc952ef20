# SPDX-License-Identifier: Apache-2.0
"""StyleSDF's whole generator: the volume generator, and the decoder that draws the picture (arXiv 2112.11427).

Shape legend: N scenes, L number of the decoder's style codes, W and D widths of the renderer's and the decoder's
codes, C feature channels, s side of the rendering, S side of the picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.bases.stylesdf.model import SdfGenerator, SdfGeneratorConfig, volume_pictures
from facelab.cameras import Camera
from facelab.draws import Draws
from facelab.generator import AVERAGE_SEED, Codes, GeneratorOutput, Scene, average_latents, enlarged
from facelab.nn.skip_decoder import SkipDecoder, SkipDecoderConfig
from facelab.nn.stylegan2.noise import NoiseMode, draw_noise
from facelab.rendering.sdf import SdfRenderOutput
from facelab.rendering.settings import RenderSettings

SceneNoise = Mapping[str, Tensor] | Draws | NoiseMode | None


@dataclass(frozen=True)
class FullGeneratorConfig(SdfGeneratorConfig):
    """Architecture of a :class:`FullGenerator`; the defaults are those of the released FFHQ model.

    Attributes:
        decoder: its ``style_dim`` and ``in_channels`` are the field's style and feature widths, its
            ``in_resolution`` is the side of the rendering.
        double_truncation: the decoder's styles come from the truncated code and are truncated once more (reference);
            else codes and styles are moved once each, towards their own averages.

    Raises:
        ValueError: a decoder that does not fit the field.
    """

    decoder: SkipDecoderConfig = dataclasses.field(default_factory=SkipDecoderConfig)
    double_truncation: bool = False

    def __post_init__(self) -> None:
        got, wanted = (self.decoder.style_dim, self.decoder.in_channels), (self.field.style_dim, self.field.width)
        if got != wanted:
            raise ValueError(f"the decoder must read codes of {wanted[0]} and {wanted[1]} features, got {got}")
        if self.decoder.semantic_channels:
            raise ValueError(f"the field has no semantics, got {self.decoder.semantic_channels} semantic channels")


class FullGenerator(SdfGenerator):
    """A :class:`~facelab.generator.Generator`: signed distance field, rendered small, and a decoder.

    The one latent is ``z`` (N, Z). Codes are ``w`` (N, W), which modulates the field, and ``styles`` (N, L, D) of the
    decoder's layers. A scene holds the field's layers (``film``), ``w``, ``styles`` and the decoder's ``noise``.
    ``decoder.precision`` says how the decoder computes.
    """

    config: FullGeneratorConfig
    average_style: Tensor

    def __init__(self, config: FullGeneratorConfig, generator: torch.Generator | None = None) -> None:
        source = generator if generator is not None else torch.Generator().manual_seed(0)
        super().__init__(config, source)
        self.decoder = SkipDecoder(config.decoder, source)
        self.register_buffer("average_style", torch.zeros(config.decoder.width))

    # ------------------------------------------------------------ codes

    def map(self, latents: Mapping[str, Tensor], conditioning: Tensor | None = None, truncation: float = 1.0) -> Codes:
        """{"z": (N, Z)} -> {"w": (N, W), "styles": (N, L, D)}; ``conditioning`` is not used.

        ``truncation`` as in :meth:`truncate`. ValueError for other latents, or while no averages are stored.
        """
        w = super().map(latents, conditioning).values["w"]
        codes = self.codes_of(w)
        return codes if truncation == 1.0 else self.truncate(codes, truncation)

    def codes_of(self, w: Tensor) -> Codes:
        """The codes whose styles all come from ``w`` (N, W)."""
        return Codes({"w": w, "styles": self.decoder.broadcast(self.decoder.style(w))})

    def mixed(self, first: Codes, second: Codes, inject: int) -> Codes:
        """The head of ``first``, drawn with the styles of ``second`` from layer ``inject`` (1 ... L - 1) on."""
        if not 1 <= inject < self.decoder.num_ws:
            raise ValueError(f"style mixing needs a layer from 1 to {self.decoder.num_ws - 1}, got {inject}")
        styles = torch.cat([first.values["styles"][:, :inject], second.values["styles"][:, inject:]], dim=1)
        return Codes({"w": first.values["w"], "styles": styles})

    def truncate(self, codes: Codes, psi: float) -> Codes:
        """Move codes and styles towards the stored averages; psi 0 is the average, 1 leaves them.

        With ``double_truncation`` the styles are made anew from the moved code first: mix styles afterwards.
        """
        w = super().truncate(Codes({"w": codes.values["w"]}), psi).values["w"]
        styles = self.codes_of(w).values["styles"] if self.config.double_truncation else codes.values["styles"]
        return Codes({"w": w, "styles": torch.lerp(self.average_style.to(styles), styles, psi)})

    def average_codes(self) -> Codes:
        """The stored averages as the codes of one scene."""
        styles = self.average_style.expand(1, self.decoder.num_ws, -1)
        return Codes({**super().average_codes().values, "styles": styles})

    @torch.no_grad()
    def update_averages(self, latents: Mapping[str, Tensor] | None = None, seed: int = AVERAGE_SEED) -> None:
        """Store mean code and mean style of the same ``latents``, by default of 10 000 fixed normal draws."""
        if latents is None:
            latents = average_latents(self.latent_spec, seed, self.average_w.device)
        w = self.mapping(latents["z"])
        self.average_w.copy_(w.mean(0))
        self.average_style.copy_(self.decoder.style(w).mean(0))

    @torch.no_grad()
    def forget_averages(self) -> None:
        """Drop the stored averages: further training makes them wrong."""
        super().forget_averages()
        self.average_style.zero_()

    # ------------------------------------------------------------ scenes and pictures

    def scene(self, codes: Codes, noise: SceneNoise = None) -> Scene:
        """Codes -> the layers of the field and all that the decoder needs beside the rendering.

        Args:
            noise: of the decoder: maps by layer (layers without one keep their stored map), a source of random ones,
                ``"none"``, or None for the stored maps, which do not change between calls.

        Raises:
            ValueError: noise that is none of these.
        """
        plain = super().scene(codes)
        return Scene(
            {**plain.parts, "styles": codes.values["styles"], "noise": self._noise(noise, len(codes))}, plain.count
        )

    def with_noise(self, scene: Scene, draws: Draws) -> Scene:
        """The scene with new noise maps for each picture: those of one head from several cameras differ (reference)."""
        return scene.replace(noise=("random", draws))

    def _noise(self, noise: SceneNoise, count: int) -> tuple[NoiseMode, Mapping[str, Tensor]]:
        if isinstance(noise, Draws):
            return "const", draw_noise(self.decoder, count, noise)
        if isinstance(noise, Mapping):
            return "const", noise
        if noise in (None, "const", "none"):
            return "none" if noise == "none" else "const", {}
        raise ValueError(f"noise: expected maps by layer, Draws, 'none' or None, got {noise!r}")

    def render(
        self, scene: Scene, camera: Camera, settings: RenderSettings, draws: Draws | None = None, guide: Any = None
    ) -> GeneratorOutput:
        """Render each scene from its camera (one scene, many cameras broadcasts).

        ``settings.resolution`` is the side s of the rendering; the decoder is made for one.

        Returns:
            rgb (N, 3, S, S); raw_rgb (N, 3, s, s) and features (N, C, s, s) as rendered; depth along the axis
            (weighted sum), opacity and normals, bilinearly enlarged to S.

        Raises:
            ValueError: another side than the decoder's.
        """
        volume = self.render_volume(scene, camera, settings, draws, features=True)
        return self.picture(volume, scene, settings.resolution)

    def picture(self, volume: SdfRenderOutput, scene: Scene, side: int) -> GeneratorOutput:
        """What :meth:`render` makes of a volume rendering with features, of this side."""
        small = volume_pictures(volume, side)
        if small.features is None:
            raise ValueError(
                "the decoder reads features, which this rendering does not have: render with features=True"
            )
        rgb = self.decode(small.features, scene)
        size = rgb.shape[-1]
        normals = None if small.normals is None else F.normalize(enlarged(small.normals, size), dim=1)
        depth, opacity = enlarged(small.depth, size), enlarged(small.opacity, size)
        return dataclasses.replace(small, rgb=rgb, depth=depth, opacity=opacity, normals=normals)

    def decode(self, features: Tensor, scene: Scene) -> Tensor:
        """Rendered features (N, C, s, s) -> picture (N, 3, S, S). ValueError for another side than the decoder's."""
        wanted = self.config.decoder.in_resolution
        if features.shape[-1] != wanted:
            raise ValueError(f"the decoder reads renderings of {wanted} pixels, got {features.shape[-1]}")
        mode, source = scene.parts["noise"]
        styles = scene.parts["styles"].expand(len(features), -1, -1)
        if mode == "random":
            return self.decoder(features, styles, noise_mode=mode, draws=source).rgb
        return self.decoder(features, styles, noise_mode=mode, noise_maps=source).rgb

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialise from an explicit generator as the original does."""
        super().reset_parameters(generator)
        if "decoder" in self._modules:  # not yet while the base is built
            self.decoder.reset_parameters(generator)
