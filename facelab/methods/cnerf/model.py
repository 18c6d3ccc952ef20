# SPDX-License-Identifier: Apache-2.0
"""CNeRF's generator: K local generators rendered as one head, and a decoder for picture and semantics (arXiv 2302.01579).

Without a decoder it is the volume generator of the first training stage.

Shape legend: N scenes, K regions, W width of a code, s side of the rendering, S side of the picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facelab.cameras import Camera
from facelab.cameras.rays import Rays, make_depth_rays
from facelab.draws import Draws
from facelab.generator import AVERAGE_SEED, Codes, GeneratorOutput, Scene, average_latents, enlarged, ray_image
from facelab.methods.cnerf import mixing
from facelab.methods.cnerf.field import BoundCNerf, CNerfField, CNerfFieldConfig
from facelab.methods.cnerf.fusion import Subset
from facelab.methods.cnerf.regions import parse_regions, region_names, region_palette
from facelab.nn.film import StyleMapping
from facelab.nn.skip_decoder import SkipDecoder, SkipDecoderConfig
from facelab.nn.stylegan2.layers import EqualizedConv2d
from facelab.nn.stylegan2.noise import NoiseMode, draw_noise
from facelab.rendering.sdf import Sampling, SdfOptions, SdfRenderOutput, render_sdf
from facelab.rendering.settings import RenderSettings

TRUNCATION = "truncation"  # code that remembers a truncation which is applied twice


@dataclass(frozen=True)
class CNerfGeneratorConfig:
    """Architecture of a :class:`CNerfGenerator`, and where it follows the original.

    Attributes:
        field: the local generators.
        mapping_layers: of the mapping network that all regions share.
        sampling: depths of the samples.
        decoder: None: the rendering is the picture (first stage). Its ``in_channels`` are those behind the layer that
            makes the field's features fit, its ``in_resolution`` is the side of the rendering.
        residual_eikonal: gradients of the distance leave the base out (reference).
        double_truncation: truncation is applied a second time in the scene, around the average code and around the
            decoder's average style (reference).
        features_only: a choice of regions restricts the features and nothing else (reference).
    """

    field: CNerfFieldConfig = dataclasses.field(default_factory=CNerfFieldConfig)
    mapping_layers: int = 3
    sampling: Sampling = "offset"
    decoder: SkipDecoderConfig | None = None
    residual_eikonal: bool = False
    double_truncation: bool = False
    features_only: bool = False

    def __post_init__(self) -> None:
        d = self.decoder
        if d is not None and (d.style_dim, d.semantic_channels) != (self.field.style_dim, self.field.regions):
            raise ValueError(
                f"the decoder must read codes of {self.field.style_dim} and {self.field.regions} regions, "
                f"got {d.style_dim} and {d.semantic_channels}"
            )


class CNerfGenerator(nn.Module):
    """A :class:`~facelab.generator.Generator` whose head is composed of K regions.

    The one latent is ``z``. Codes are ``shape`` and ``texture`` (N, K, W), one of each for every region, and
    ``decoder`` (N, W), what the decoder makes its styles from. A scene holds ``styles`` (N, K, L, W) of the field's
    layers, ``ws`` (N, Lw, Ww) of the decoder, its ``noise``, a ``subset`` of the regions or None, and
    ``base_gradient``: whether derivatives flow through the base shape too. In training they never do; an inversion,
    which moves cameras and the background's code, sets it.
    """

    average_w: Tensor
    average_style: Tensor

    def __init__(self, config: CNerfGeneratorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        source = generator if generator is not None else torch.Generator().manual_seed(0)
        width = config.field.style_dim
        self.mapping = StyleMapping(width, width, config.mapping_layers)
        self.field_net = CNerfField(config.field)
        self.transfer: EqualizedConv2d | None = None
        self.decoder: SkipDecoder | None = None
        self.register_buffer("average_w", torch.zeros(width))
        if config.decoder is not None:
            self.transfer = EqualizedConv2d(config.field.width, config.decoder.in_channels, 3, activation="lrelu")
            self.decoder = SkipDecoder(config.decoder, source)
            self.register_buffer("average_style", torch.zeros(config.decoder.width))
        self.reset_parameters(source)

    @property
    def latent_spec(self) -> dict[str, tuple[int, ...]]:
        """The latent ``z``."""
        return {"z": (self.config.field.style_dim,)}

    @property
    def region_names(self) -> tuple[str, ...]:
        """Names of the K regions in the order of the channels."""
        return region_names(self.config.field.regions)

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """Colour of each region in pictures of the segmentation, 0..255."""
        return region_palette(self.config.field.regions)

    @property
    def optional_codes(self) -> dict[str, tuple[int, ...]]:
        """Codes that a head may have besides those of :meth:`average_codes`, with their shapes without N."""
        return {TRUNCATION: (1,)}

    # ------------------------------------------------------------ codes

    def map(self, latents: Mapping[str, Tensor], conditioning: Tensor | None = None, truncation: float = 1.0) -> Codes:
        """{"z": (N, W)} -> the same code for every region and the decoder. There is no conditioning.

        Args:
            truncation: psi, moves codes towards the stored average once; with ``double_truncation`` the scene does
                so again.

        Raises:
            ValueError: other latents; truncation while no average is stored.
        """
        if set(latents) != {"z"}:
            raise ValueError(f"expected the latents ['z'], got {sorted(latents)}")
        codes = self.codes_of(self.mapping(latents["z"]))
        return codes if truncation == 1.0 else self.truncate(codes, truncation)

    def codes_of(self, w: Tensor) -> Codes:
        """One code (N, W) for every region, shape and texture, and for the decoder."""
        shape, texture = mixing.repeat(w, self.config.field.regions)
        return Codes({"shape": shape.contiguous(), "texture": texture.contiguous(), "decoder": w})

    def mixed(self, first: Codes, second: Codes, choices: Tensor) -> Codes:
        """Codes of every region from one of two heads by ``choices`` (K, N), see :func:`mixing.mix`."""
        shape, texture = mixing.mix(first.values["decoder"], second.values["decoder"], choices)
        return Codes({**first.values, "shape": shape, "texture": texture})

    def truncate(self, codes: Codes, psi: float) -> Codes:
        """Move codes towards the stored average; psi 0 is the average, 1 leaves them."""
        if not self.has_averages:
            raise ValueError("no stored average: call update_averages() once before truncating")
        average = self.average_w
        moved = {n: torch.lerp(average.to(v), v, psi) for n, v in codes.values.items() if n != TRUNCATION}
        if self.config.double_truncation:
            moved[TRUNCATION] = torch.full((len(codes), 1), psi, device=average.device)
        return Codes(moved)

    def average_codes(self) -> Codes:
        """The stored average as the codes of one scene."""
        return self.codes_of(self.average_w[None])

    @property
    def has_averages(self) -> bool:
        """Whether an average was stored (it is zero before)."""
        return bool(self.average_w.any())

    @torch.no_grad()
    def update_averages(self, latents: Mapping[str, Tensor] | None = None, seed: int = AVERAGE_SEED) -> None:
        """Store the mean code of ``latents`` and the decoder's mean style, by default of 10 000 fixed normal draws."""
        if latents is None:
            latents = average_latents(self.latent_spec, seed, self.average_w.device)
        w = self.mapping(latents["z"])
        self.average_w.copy_(w.mean(0))
        if self.decoder is not None:
            self.average_style.copy_(self.decoder.style(w).mean(0))

    @torch.no_grad()
    def forget_averages(self) -> None:
        """Drop the stored averages."""
        self.average_w.zero_()
        if self.decoder is not None:
            self.average_style.zero_()

    # ------------------------------------------------------------ scenes

    def scene(self, codes: Codes, noise: Mapping[str, Tensor] | Draws | NoiseMode | None = None) -> Scene:
        """Codes -> styles of all layers.

        Args:
            noise: of the decoder: maps by layer (layers without one keep their stored map), a source of random ones,
                ``"none"``, or None for the stored maps, which do not change between calls.
        """
        shape, texture, code = (codes.values[name] for name in ("shape", "texture", "decoder"))
        psi = codes.values.get(TRUNCATION)
        if psi is not None:
            shape, texture = (torch.lerp(self.average_w.to(x), x, psi[:, None]) for x in (shape, texture))
        ws = None
        maps: Mapping[str, Tensor] = {}
        mode: NoiseMode = "none" if noise == "none" else "const"
        if self.decoder is not None:
            style = self.decoder.style(code)
            if psi is not None:
                style = torch.lerp(self.average_style.to(style), style, psi)
            ws = self.decoder.broadcast(style)
            maps = draw_noise(self.decoder, len(code), noise) if isinstance(noise, Draws) else maps
        if isinstance(noise, Mapping):
            maps = noise
        styles = mixing.layer_styles(shape, texture, self.config.field.depth)
        parts = {"styles": styles, "ws": ws, "noise": (mode, maps), "subset": None, "base_gradient": False}
        return Scene(parts, len(codes))

    def subset(self, regions: str | Iterable[str | int], carve: bool | None = None) -> Subset:
        """Some regions of a head, for the part ``subset`` of its scene.

        Args:
            regions: names (``"eye,nose"``).
            carve: True: the others leave no density, colour or mask; False: the features are restricted and nothing
                else; None: as configured.

        Raises:
            UserError: an unknown region, with the nearest name.
        """
        carved = not self.config.features_only if carve is None else carve
        return Subset(parse_regions(regions, self.region_names), carved)

    def only(self, scene: Scene, regions: str | Iterable[str | int], carve: bool | None = None) -> Scene:
        """The scene with some regions only, see :meth:`subset`."""
        return scene.replace(subset=self.subset(regions, carve))

    def field(self, scene: Scene, count: int | None = None, *, features: bool = False) -> BoundCNerf:
        """The field of a scene: values, signed distances and their gradients at points; a subset counts.

        One scene may be asked for any number of cameras; ``count`` is checked only. ``features`` evaluates those too.
        """
        if count not in (None, scene.count) and scene.count != 1:
            raise ValueError(f"{scene.count} scenes cannot be rendered from {count} cameras: give 1 or {count}")
        return self.field_net.bind(
            scene.parts["styles"],
            features=features,
            subset=scene.parts["subset"],
            residual_gradient=self.config.residual_eikonal,
            base_gradient=scene.parts["base_gradient"],
        )

    def base_distance(self, scene: Scene, points: Tensor) -> Tensor:
        """(N, R, S, 3) points -> (N, R, S, 1) distance to the base shape, trainable: the sphere initialisation."""
        return self.field_net.base_distance(points, scene.parts["styles"])

    # ------------------------------------------------------------ pictures

    def rays(self, camera: Camera, settings: RenderSettings) -> Rays:
        """Rays whose parameter is the depth along the axis; ``lock_view``: directions in the camera's own axes."""
        return make_depth_rays(camera, settings.resolution, settings.grid, settings.lock_view)

    def render_volume(
        self,
        scene: Scene,
        camera: Camera,
        settings: RenderSettings,
        draws: Draws | None = None,
        options: SdfOptions | None = None,
        *,
        features: bool | None = None,
    ) -> SdfRenderOutput:
        """The volume rendering alone, of any side; values per ray, row-major.

        Args:
            settings: ``max_points`` counts evaluations of a local generator.
            options: samples and gradients that losses need; None: none, depths as configured.
            features: evaluate them; None: if there is a decoder.
        """
        with_features = self.decoder is not None if features is None else features
        field = self.field(scene, len(camera), features=with_features)
        settings = settings.replace(max_points=max(1, settings.max_points // self.config.field.regions))
        options = SdfOptions(self.config.sampling) if options is None else options
        return render_sdf(field, self.rays(camera, settings), settings, draws, options)

    def render(
        self, scene: Scene, camera: Camera, settings: RenderSettings, draws: Draws | None = None, guide: Any = None
    ) -> GeneratorOutput:
        """Render each scene from its camera (one scene, many cameras broadcasts).

        ``settings.resolution`` is the side s of the rendering; the decoder is made for one.

        Returns:
            rgb (N, 3, S, S); semantics (N, K, S, S), 2 m - 1 of masks m; raw_rgb, the rendering (N, 3, s, s); features
            (N, C, s, s); depth along the axis (weighted sum), opacity and normals, bilinearly enlarged to S.

        Raises:
            ValueError: another side than the decoder's.
        """
        return self.picture(self.render_volume(scene, camera, settings, draws), scene, settings.resolution)

    def picture(self, volume: SdfRenderOutput, scene: Scene, side: int) -> GeneratorOutput:
        """What :meth:`render` makes of a volume rendering of that side."""

        assert volume.semantics is not None
        thumbnail, masks = ray_image(2 * volume.rgb - 1, side), ray_image(volume.semantics, side)
        if self.decoder is None:
            rgb, features = thumbnail, None
        else:
            assert volume.features is not None
            features = ray_image(volume.features, side)
            rgb, masks = self.decode(features, masks, scene)
        size = rgb.shape[-1]
        depth, opacity = (enlarged(ray_image(x, side), size) for x in (volume.depth, volume.opacity))
        normals = (
            None if volume.normals is None else F.normalize(enlarged(ray_image(volume.normals, side), size), dim=1)
        )
        return GeneratorOutput(rgb, depth, opacity, 2 * masks - 1, normals, thumbnail, features)

    def decode(self, features: Tensor, masks: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
        """Rendered features (N, C, s, s) and masks (N, K, s, s) -> picture (N, 3, S, S) and masks (N, K, S, S).

        ValueError for another side than the decoder's, or without a decoder.
        """
        if self.decoder is None or self.transfer is None:
            raise ValueError("this generator has no decoder: it belongs to the first training stage")
        wanted = self.decoder.config.in_resolution
        if features.shape[-1] != wanted:
            raise ValueError(f"the decoder reads renderings of {wanted} pixels, got {features.shape[-1]}")
        mode, maps = scene.parts["noise"]
        ws = scene.parts["ws"].expand(len(features), -1, -1)
        drawn = self.decoder(self.transfer(features), ws, masks, noise_mode=mode, noise_maps=maps)
        return drawn.rgb, drawn.semantics

    def forward(
        self,
        latents: Mapping[str, Tensor],
        camera: Camera,
        settings: RenderSettings,
        draws: Draws | None = None,
        truncation: float = 1.0,
    ) -> GeneratorOutput:
        """``map``, ``scene`` and ``render`` in one call."""
        return self.render(self.scene(self.map(latents, None, truncation)), camera, settings, draws)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all weights and stored noise anew."""
        self.mapping.reset_parameters(generator)
        self.field_net.reset_parameters(generator)
        if self.decoder is not None and self.transfer is not None:
            self.transfer.reset_parameters(generator)
            self.decoder.reset_parameters(generator)
