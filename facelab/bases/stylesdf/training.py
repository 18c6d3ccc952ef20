# SPDX-License-Identifier: Apache-2.0
"""StyleSDF as a method: building its generators and using them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from facelab.bases.stylesdf.config import DEVIATIONS, StyleSdfConfig, ViewConfig, decoder_config, generator_config
from facelab.bases.stylesdf.full_model import FullGeneratorConfig
from facelab.bases.stylesdf.full_originals import (
    build_generator,
    generator_config_from_original,
    generator_from_original,
)
from facelab.bases.stylesdf.model import SdfGenerator, SdfGeneratorConfig
from facelab.deviations import Deviation
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.generator import seed_latents
from facelab.rendering.settings import RenderSettings


class StyleSdf:
    """What the core asks of StyleSDF."""

    name = "stylesdf"
    config_type: type = StyleSdfConfig
    deviations: list[Deviation] = DEVIATIONS
    truncated_layers: int | None = None  # truncation has no cutoff

    def generator_config(self, config: Any) -> SdfGeneratorConfig:
        """The architecture that a run's configuration describes: with a decoder in stage ``full``.

        UserError where its sizes do not fit together.
        """
        volume = generator_config(config.model, config.view, config.render)
        if config.stage == "volume":
            return volume
        try:
            return FullGeneratorConfig(
                volume.field,
                volume.latent_dim,
                volume.mapping_layers,
                volume.sampling,
                decoder=decoder_config(config.model, config.render),
                double_truncation=config.reference.double_truncation,
            )
        except ValueError as error:
            raise UserError(f"model: {error}") from error

    def build_generator(self, config: Any) -> SdfGenerator:
        """An initialised generator on the CPU."""
        source = Draws(config.train.seed).at(phase="init").generator("generator")
        return build_generator(self.generator_config(config), source)

    def convert(self, original: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the authors' generator -> ours."""
        return generator_from_original(original, build_generator(generator_config_from_original(original)))

    def view(self, config: Any) -> ViewConfig:
        """Where the cameras of this configuration stand."""
        return config.view

    def head_cube(self, config: Any) -> float:
        """Side of a cube around the origin that holds the head, scene units."""
        return config.field_cube

    def depth_range(self, config: Any) -> tuple[float, float]:
        """Depths along the axis between which the head lies, scene units."""
        return config.near, config.far

    def seed_latents(self, spec: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
        """Latents (1, Z) of a seed."""
        return seed_latents(spec, seed)

    def inference_settings(
        self, config: Any, resolution: int | None = None, ray_step_multiplier: float = 1, lock_view: bool = False
    ) -> RenderSettings:
        """Settings for pictures: fixed depths.

        Args:
            config: a run's configuration.
            resolution: side of the rendering in pixels, default the configuration's; a decoder reads no other.
            ray_step_multiplier: factor on the samples per ray.
            lock_view: view directions in the camera's own axes, also where ``render.eval_static_views`` is off.
        """
        settings = config.render.settings(config.view, resolution, ray_step_multiplier)
        return settings.replace(lock_view=settings.lock_view or lock_view)


METHOD = StyleSdf()
