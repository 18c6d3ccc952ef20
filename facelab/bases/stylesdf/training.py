# SPDX-License-Identifier: Apache-2.0
"""StyleSDF as a trainable method: building its networks, its two stages (see ``stages.py``), using them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facelab.bases.stylesdf import phases, stages
from facelab.bases.stylesdf.config import DEVIATIONS, StyleSdfConfig, ViewConfig, decoder_config, generator_config
from facelab.bases.stylesdf.data import picture_source, pictures_at
from facelab.bases.stylesdf.first_stage import Stored, check_same, filler, open_stored
from facelab.bases.stylesdf.full_model import FullGeneratorConfig
from facelab.bases.stylesdf.full_originals import (
    build_generator,
    generator_config_from_original,
    generator_from_original,
)
from facelab.bases.stylesdf.model import SdfGenerator, SdfGeneratorConfig
from facelab.bases.stylesdf.snapshots import Snapshots
from facelab.deviations import Deviation
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.generator import seed_latents
from facelab.nn.discriminators.coordconv import ViewDiscriminator, ViewDiscriminatorConfig
from facelab.nn.discriminators.skip_residual import ResidualDiscriminator, ResidualDiscriminatorConfig
from facelab.nn.discriminators.stylegan2 import dividing_group
from facelab.nn.stylegan2.precision import Precision
from facelab.rendering.settings import RenderSettings
from facelab.training.loop import Callback
from facelab.training.protocol import DataSource, EmaSpec, Models, OptimizerSpec, TrainStage

# what the second stage must have in common with the first, or the same weights are another field
SHARED = (
    *(f"model.{name}" for name in ("latent_dim", "style_dim", "mapping_layers", "width", "layers")),
    *(f"model.{name}" for name in ("density", "normalize_points")),
    *("view.dist_radius", "view.fov", "render.resolution", "render.sampling"),
)

BETA = "generator.field_net.beta"


class StyleSdf:
    """StyleSDF, stage ``volume`` or ``full`` as the configuration says."""

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
        generator = build_generator(self.generator_config(config), source)
        if generator.field_net.beta is not None:
            torch.nn.init.constant_(generator.field_net.beta, config.sphere.beta)
        return generator

    def discriminator_config(self, config: Any) -> ViewDiscriminatorConfig | ResidualDiscriminatorConfig:
        """The architecture of the stage's discriminator. UserError where it does not fit pictures or batch."""
        d = config.discriminator
        try:
            if config.stage == "volume":
                return ViewDiscriminatorConfig(
                    resolution=config.render.resolution,
                    view=config.loss.view > 0,
                    channel_max=d.channel_max,
                    channels_last=d.channels_last,
                )
            dividing_group(config.train.batch_chunk, d.group_size)
            return ResidualDiscriminatorConfig(
                resolution=config.model.resolution,
                channel_multiplier=config.model.channel_multiplier,
                channel_max=d.channel_max,
                group_size=d.group_size,
                grouping="strided" if config.reference.strided_groups else "contiguous",
                clamp=d.clamp,
                half_blocks=d.half_blocks,
            )
        except ValueError as error:
            side = "render.resolution" if config.stage == "volume" else "model.resolution and train.batch_chunk"
            raise UserError(f"discriminator for {side}: {error}") from error

    def build(self, config: Any) -> Models:
        """Generator, discriminator and, for path lengths, their mean; initialised from the run's seed."""
        models = Models(generator=self.build_generator(config))
        source = Draws(config.train.seed).at(phase="init").generator("discriminator")
        shape = self.discriminator_config(config)
        if isinstance(shape, ViewDiscriminatorConfig):
            models[stages.DISCRIMINATOR] = ViewDiscriminator(shape, source)
            return models
        judge = ResidualDiscriminator(shape, source)
        judge.precision = Precision(torch.float16, "marked", config.discriminator.channels_last)
        models[stages.DISCRIMINATOR] = judge
        if config.loss.path > 0:
            models[phases.PATH] = phases.PathMean()
        return models

    def check_config(self, config: Any) -> None:
        """Find what would stop a run later. UserError in one line."""
        self.generator_config(config)
        self.discriminator_config(config)
        if config.train.compile:
            raise UserError("train.compile is on, but no part of StyleSDF is compiled in training; set it to false")
        try:
            config.render.settings(config.view, training=True)
        except ValueError as error:
            raise UserError(f"render: {error}") from error

    def callbacks(self) -> list[Callback]:
        """Sample grids."""
        return [Snapshots()]

    # ---------------------------------------------------------------- the Trainable protocol

    def emas(self, config: Any) -> Mapping[str, EmaSpec]:
        """One average of the generator, of the same decay from the first step on."""
        return {"ema": phases.constant_average(config.ema.decay)}

    def optimizers(self, config: Any) -> Mapping[str, OptimizerSpec]:
        """Adam for each network; the loop corrects for lazy phases. In stage ``full`` the decoder alone is trained."""
        o = config.optim
        if config.stage == "volume":
            rates = {"generator": o.volume_generator_lr, "discriminator": o.volume_discriminator_lr}
            factors = {"generator": {BETA: o.beta_factor} if config.model.density == "sdf" else {}, "discriminator": {}}
            return {
                name: OptimizerSpec((name,), lr, tuple(o.volume_betas), o.eps, lr_factors=factors[name])
                for name, lr in rates.items()
            }
        betas = tuple(o.full_betas)
        return {
            "generator": OptimizerSpec(
                ("generator",), o.full_lr, betas, o.eps, select=lambda key: key.startswith(stages.DECODER)
            ),
            "discriminator": OptimizerSpec(("discriminator",), o.full_lr, betas, o.eps),
        }

    def picture_size(self, config: Any) -> int:
        """Side of the real pictures: that of the thumbnails, or of what the decoder draws."""
        return config.render.resolution if config.stage == "volume" else config.model.resolution

    def dataset(self, config: Any) -> DataSource:
        """Pictures from ``data.path``, or synthetic heads where it is empty."""
        size, seed = self.picture_size(config), config.train.seed
        return picture_source(config.data, size, config.render.resolution, seed, fov=config.view.fov)

    def pictures(self, config: Any) -> Any:
        """The data set at ``data.path``."""
        return pictures_at(config.data, self.picture_size(config), config.render.resolution)

    def stages(self, config: Any) -> list[TrainStage]:
        """The one stage that the configuration names."""
        if config.stage == "volume":
            return [stages.volume_stage(config)]
        return [stages.full_stage(config, filler(lambda: self.first_stage(config), _of_the_decoder))]

    def first_stage(self, config: Any) -> Stored:
        """The model that ``init_from`` names, checked against the configuration of a second stage.

        UserError: none named, not readable, not of a first stage, or another architecture.
        """
        if not config.init_from:
            raise UserError(
                "stage full starts from a trained stage volume: say --init-from with its run folder, a checkpoint, a "
                "converted model or an official file"
            )
        stored = self.stored(config.init_from)
        check_same(config.init_from, stored.config, config, stored.told(SHARED))
        return stored

    def stored(self, path: str | Path) -> Stored:
        """A StyleSDF generator of either stage from a file; its best weights. UserError as :func:`open_stored`."""
        return open_stored(path, self.name, StyleSdfConfig, _read_original)

    @staticmethod
    def inherited(config: Any, discriminator: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Settings that fine-tuning takes from the file: those of the architecture, and the cameras unless stated.

        Args:
            config: that of the model to start from.
            discriminator: whether its weights are taken too.
        """
        firm = ("model", *(name for name in SHARED if not name.startswith("model.")))
        if discriminator:
            firm += ("discriminator.channel_max",)
        return firm, ("view.distribution", "view.azimuth", "view.elevation")

    # ---------------------------------------------------------------- use

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


def _of_the_decoder(key: str) -> bool:
    return key.startswith("decoder.") or key in ("average_w", "average_style")


def _read_original(path: Path) -> Any:
    from facelab.bases.stylesdf.convert import read_original  # which needs this module

    return read_original(path)


METHOD = StyleSdf()
