# SPDX-License-Identifier: Apache-2.0
"""StyleSDF's generator of volumes: a mapping network, a signed distance field and its renderer (arXiv 2112.11427).

Shape legend: N scenes, Z and W widths of latent and style code, S side of the picture in pixels, C feature channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from facelab.cameras import Camera
from facelab.cameras.rays import Rays, make_depth_rays
from facelab.draws import Draws
from facelab.fields.sdf import BoundSdf, SdfField, SdfFieldConfig, SdfFilm
from facelab.generator import AVERAGE_SEED, Codes, GeneratorOutput, Scene, average_latents, ray_image
from facelab.nn.film import StyleMapping
from facelab.rendering.sdf import Sampling, SdfOptions, SdfRenderOutput, frustum_distances, render_sdf
from facelab.rendering.settings import RenderSettings


@dataclass(frozen=True)
class SdfGeneratorConfig:
    """Architecture of a :class:`SdfGenerator`; the defaults are those of the released models."""

    field: SdfFieldConfig = dataclasses.field(default_factory=SdfFieldConfig)
    latent_dim: int = 256
    mapping_layers: int = 3
    sampling: Sampling = "offset"


class SdfGenerator(nn.Module):
    """A :class:`~facelab.generator.Generator` on a signed distance field: pictures as the renderer makes them.

    The one latent is ``z`` (N, Z), the one code ``w`` (N, W), which modulates every layer of the field. A scene holds
    the layers (``film``) and ``w``. Truncation uses a stored average, see :meth:`update_averages`.
    """

    average_w: Tensor

    def __init__(self, config: SdfGeneratorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.mapping = StyleMapping(config.latent_dim, config.field.style_dim, config.mapping_layers)
        self.field_net = SdfField(config.field)
        self.register_buffer("average_w", torch.zeros(config.field.style_dim))
        self.reset_parameters(generator if generator is not None else torch.Generator().manual_seed(0))

    @property
    def latent_spec(self) -> dict[str, tuple[int, ...]]:
        """The latent ``z``."""
        return {"z": (self.config.latent_dim,)}

    # ------------------------------------------------------------ codes

    def map(self, latents: Mapping[str, Tensor], conditioning: Tensor | None = None, truncation: float = 1.0) -> Codes:
        """{"z": (N, Z)} -> {"w": (N, W)}; ``conditioning`` is not used.

        ``truncation`` psi moves codes to ``average + psi (code - average)``. ValueError for other latents, or for psi
        other than 1 while no average is stored.
        """
        if set(latents) != {"z"}:
            raise ValueError(f"expected the latents ['z'], got {sorted(latents)}")
        codes = Codes({"w": self.mapping(latents["z"])})
        return codes if truncation == 1.0 else self.truncate(codes, truncation)

    def truncate(self, codes: Codes, psi: float) -> Codes:
        """Move codes towards the stored average; psi 0 is the average, 1 leaves them."""
        if not self.has_averages:
            raise ValueError("no stored average: call update_averages() once before truncating")
        return codes.map(lambda w: torch.lerp(self.average_w.to(w), w, psi))

    def average_codes(self) -> Codes:
        """The stored average as the code of one scene."""
        return Codes({"w": self.average_w[None]})

    @property
    def has_averages(self) -> bool:
        """Whether an average was stored (it is zero before)."""
        return bool(self.average_w.any())

    @torch.no_grad()
    def update_averages(self, latents: Mapping[str, Tensor] | None = None, seed: int = AVERAGE_SEED) -> None:
        """Store the mean code of ``latents``, by default of 10 000 fixed normal draws."""
        if latents is None:
            latents = average_latents(self.latent_spec, seed, self.average_w.device)
        self.average_w.copy_(self.mapping(latents["z"]).mean(0))

    @torch.no_grad()
    def forget_averages(self) -> None:
        """Drop the stored average: further training makes it wrong."""
        self.average_w.zero_()

    # ------------------------------------------------------------ scenes and pictures

    def scene(self, codes: Codes, noise: Any = None) -> Scene:
        """Codes -> a scene whose part ``film`` is ready for the field. ``noise`` is not used."""
        w = codes.values["w"]
        return Scene({"film": self.field_net.film(w), "w": w}, len(w))

    def field(self, scene: Scene, count: int | None = None, features: bool = False) -> BoundSdf:
        """The field of a scene, a :class:`~facelab.fields.sdf.DistanceField`.

        Args:
            count: repeats a single scene for several cameras.
            features: evaluate what a decoder reads, too.
        """
        film: SdfFilm = scene.parts["film"]
        return BoundSdf(self.field_net, film if count is None else film.expand(count), features)

    def rays(self, camera: Camera, settings: RenderSettings) -> Rays:
        """Rays through the pixels; ``settings.lock_view`` shows the field the camera's own directions."""
        return make_depth_rays(camera, settings.resolution, settings.grid, settings.lock_view)

    def render_volume(
        self,
        scene: Scene,
        camera: Camera,
        settings: RenderSettings,
        draws: Draws | None = None,
        options: SdfOptions | None = None,
        features: bool = False,
    ) -> SdfRenderOutput:
        """What the rays see, row-major: rgb in [0, 1], depth, mask, mean positions, and what ``options`` ask for.

        Args:
            options: default: the configured sampling, no values of single samples.
            features: composite the features too.
        """
        options = options or SdfOptions(self.config.sampling)
        field = self.field(scene, len(camera), features)
        return render_sdf(field, self.rays(camera, settings), settings, draws, options)

    def frustum(self, scene: Scene, camera: Camera, settings: RenderSettings) -> Tensor:
        """Signed distances (N, s, s, S) at the unmoved depths of the pixels' rays: shapes, see facelab.mesh."""
        field = self.field(scene, len(camera))
        rays = self.rays(camera, settings)
        found = frustum_distances(field.distances, rays, settings, self.config.sampling)
        return found.unflatten(1, (settings.resolution, settings.resolution))

    def render(
        self, scene: Scene, camera: Camera, settings: RenderSettings, draws: Draws | None = None, guide: Any = None
    ) -> GeneratorOutput:
        """Render each scene from its camera (one scene, many cameras broadcasts); rgb is ``2 v - 1``."""
        return volume_pictures(self.render_volume(scene, camera, settings, draws), settings.resolution)

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
        self.mapping.reset_parameters(generator)
        self.field_net.reset_parameters(generator)


def volume_pictures(output: SdfRenderOutput, side: int) -> GeneratorOutput:
    """A volume rendering of square images -> pictures; rgb and labels as ``2 v - 1``, features as they are."""

    def image(x: Tensor | None) -> Tensor | None:
        return None if x is None else ray_image(x, side)

    rgb = ray_image(2 * output.rgb - 1, side)
    semantics = None if output.semantics is None else ray_image(2 * output.semantics - 1, side)
    return GeneratorOutput(
        rgb=rgb,
        depth=ray_image(output.depth, side),
        opacity=ray_image(output.opacity, side),
        semantics=semantics,
        normals=image(output.normals),
        raw_rgb=rgb,
        features=image(output.features),
    )
