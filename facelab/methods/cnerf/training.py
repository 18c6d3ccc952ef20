# SPDX-License-Identifier: Apache-2.0
"""CNeRF as a method: building its generator and using it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from facelab.deviations import Deviation
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.generator import seed_latents
from facelab.methods.cnerf.config import DEVIATIONS, CameraConfig, CnerfConfig, generator_config
from facelab.methods.cnerf.model import CNerfGenerator, CNerfGeneratorConfig
from facelab.methods.cnerf.originals import generator_config_from_original, generator_from_original
from facelab.rendering.settings import RenderSettings


class Cnerf:
    """What the core asks of CNeRF."""

    name = "cnerf"
    config_type: type = CnerfConfig
    deviations: list[Deviation] = DEVIATIONS
    fills_empty = False  # the background is a region
    truncated_layers: int | None = None  # truncation has no cutoff: a region has one code for all its layers

    def generator_config(self, config: Any) -> CNerfGeneratorConfig:
        """The architecture that a run's configuration describes. UserError where its sizes do not fit together."""
        try:
            return generator_config(config)
        except ValueError as error:
            raise UserError(f"model: {error}") from error

    def build_generator(self, config: Any) -> CNerfGenerator:
        """An initialised generator on the CPU."""
        source = Draws(config.train.seed).at(phase="init").generator("generator")
        return CNerfGenerator(self.generator_config(config), source)

    def convert(self, original: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the authors' generator -> ours."""
        return generator_from_original(original, CNerfGenerator(generator_config_from_original(original)))

    def view(self, config: Any) -> CameraConfig:
        """Where the cameras of this configuration stand."""
        return config.camera

    def head_cube(self, config: Any) -> float:
        """Side of a cube around the origin that holds the head, scene units."""
        return 2 * config.camera.radius

    def depth_range(self, config: Any) -> tuple[float, float]:
        """Depths along the axis between which the head lies, scene units."""
        return 1 - config.camera.radius, 1 + config.camera.radius

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
            ray_step_multiplier: factor on the samples per ray of pictures.
            lock_view: view directions in the camera's own axes, also where ``render.static_views`` is off.
        """
        samples = round(config.render.inference_samples * ray_step_multiplier)
        settings = config.render.settings(config.camera.radius, resolution, samples)
        return settings.replace(lock_view=settings.lock_view or lock_view)


METHOD = Cnerf()
