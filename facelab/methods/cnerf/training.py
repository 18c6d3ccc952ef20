# SPDX-License-Identifier: Apache-2.0
"""CNeRF as a trainable method (arXiv 2302.01579): building its networks, using them, two training stages.

:mod:`facelab.methods.cnerf.volume_stage` and :mod:`~facelab.methods.cnerf.full_stage` hold the phases, ``model.stage``
of the configuration says which of them a run trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facelab.bases.stylesdf.data import picture_source, pictures_at
from facelab.bases.stylesdf.first_stage import Stored, check_same, filler, open_stored
from facelab.bases.stylesdf.phases import PATH, PathMean, constant_average
from facelab.data.regions import REGIONS
from facelab.deviations import Deviation
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.generator import seed_latents
from facelab.methods.cnerf.config import DEVIATIONS, CameraConfig, CnerfConfig, generator_config
from facelab.methods.cnerf.full_stage import FULL, FullStage, is_decoder
from facelab.methods.cnerf.inheritance import inherited
from facelab.methods.cnerf.model import CNerfGenerator, CNerfGeneratorConfig
from facelab.methods.cnerf.options import UNTRAINED
from facelab.methods.cnerf.originals import generator_config_from_original, generator_from_original
from facelab.methods.cnerf.samples import SampleRows
from facelab.methods.cnerf.volume_stage import GENERATOR, GLOBAL, REGION, VolumeStage, judged_at_once
from facelab.nn.discriminators.coordconv import (
    RegionDiscriminator,
    RegionDiscriminatorConfig,
    ViewDiscriminator,
    ViewDiscriminatorConfig,
)
from facelab.nn.discriminators.skip_residual import Grouping, ResidualDiscriminator, ResidualDiscriminatorConfig
from facelab.nn.discriminators.stylegan2 import dividing_group
from facelab.rendering.settings import RenderSettings
from facelab.training.loop import Callback
from facelab.training.protocol import DataSource, EmaSpec, Models, OptimizerSpec, TrainStage

BETA = f"{GENERATOR}.field_net.beta"
# what the second stage must have in common with the first, or the same weights are another field
SHARED = (
    *(f"model.{name}" for name in ("regions", "depth", "width", "style_dim", "mapping_layers")),
    *("model.normalize", "model.sampling", "camera.radius", "camera.fov", "render.resolution"),
)


class Cnerf:
    """What the core asks of CNeRF: a :class:`~facelab.training.protocol.Trainable`."""

    name = "cnerf"
    config_type: type = CnerfConfig
    deviations: list[Deviation] = DEVIATIONS
    fills_empty = False  # the background is a region
    truncated_layers: int | None = None  # truncation has no cutoff: a region has one code for all its layers
    inherited = staticmethod(inherited)

    # ---------------------------------------------------------------- building and using

    def generator_config(self, config: Any) -> CNerfGeneratorConfig:
        """The architecture that a run's configuration describes. UserError where its sizes do not fit together."""
        try:
            return generator_config(config)
        except ValueError as error:
            raise UserError(f"model: {error}") from error

    def build_generator(self, config: Any) -> CNerfGenerator:
        """An initialised generator on the CPU."""
        source = Draws(config.train.seed).at(phase="init").generator("generator")
        generator = CNerfGenerator(self.generator_config(config), source)
        torch.nn.init.constant_(generator.field_net.beta, config.sphere.beta)
        generator.field_net.precision, generator.field_net.fused = config.render.precision, config.render.fused
        return generator

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

    # ---------------------------------------------------------------- training

    def build(self, config: Any) -> Models:
        """Generator and the discriminators of the stage, initialised from the run's seed."""
        source = Draws(config.train.seed).at(phase="init")
        models = Models(generator=self.build_generator(config))
        if config.model.stage == "full":
            models[FULL] = ResidualDiscriminator(self.full_discriminator(config), source.generator(FULL))
            models[PATH] = PathMean()
            return models
        models[GLOBAL] = ViewDiscriminator(self.global_discriminator(config), source.generator(GLOBAL))
        models[REGION] = RegionDiscriminator(self.region_discriminator(config), source.generator(REGION))
        return models

    def global_discriminator(self, config: Any) -> ViewDiscriminatorConfig:
        """The first stage's discriminator of picture and all masks."""
        d = config.discriminator
        return ViewDiscriminatorConfig(
            resolution=config.render.resolution,
            semantic_channels=config.model.regions,
            group_size=d.group_size,
            grouping=_grouping(config),
            channel_max=d.channel_max,
            channels_last=d.channels_last,
        )

    def region_discriminator(self, config: Any) -> RegionDiscriminatorConfig:
        """The first stage's discriminator of one region."""
        d = config.discriminator
        return RegionDiscriminatorConfig(
            resolution=config.render.resolution,
            classes=config.model.regions,
            group_size=d.group_size,
            grouping=_grouping(config),
            channel_max=d.channel_max,
            channels_last=d.channels_last,
        )

    def full_discriminator(self, config: Any) -> ResidualDiscriminatorConfig:
        """The second stage's discriminator."""
        d = config.discriminator
        return ResidualDiscriminatorConfig(
            resolution=config.model.resolution,
            semantic_channels=config.model.regions,
            channel_multiplier=d.channel_multiplier,
            channel_max=d.channel_max,
            group_size=d.group_size,
            grouping=_grouping(config),
            clamp=d.clamp,
            half_blocks=d.half_blocks,
        )

    def check_config(self, config: Any) -> None:
        """Find what would stop a run later. UserError in one line."""
        m, d = config.model, config.discriminator
        if m.regions != len(REGIONS):
            raise UserError(f"model.regions is {m.regions}, but the data have {len(REGIONS)}: {', '.join(REGIONS)}")
        if config.train.compile:
            raise UserError("train.compile is on, but no part of CNeRF is compiled in training; set it to false")
        if m.stage == "volume" and config.init_from:
            raise UserError(
                f"init_from is {config.init_from}: only the full stage starts from another; --init-from is for fine-tuning"
            )
        if judged_at_once(config) % d.group_size:
            raise UserError(
                f"{judged_at_once(config)} samples are judged at once, expected a multiple of discriminator.group_size "
                f"{d.group_size}: a minibatch statistic needs whole groups; change discriminator.chunk, "
                "train.batch_chunk or group_size (1 always fits)"
            )
        self.generator_config(config)
        try:
            dividing_group(config.train.batch_chunk, d.group_size)
        except ValueError as error:
            raise UserError(f"train.batch_chunk: {error}") from error
        try:
            config.render.settings(config.camera.radius, training=True)
            self.inference_settings(config)
        except ValueError as error:
            raise UserError(f"render: {error}") from error
        try:
            if m.stage == "full":
                self.full_discriminator(config)
            else:
                self.global_discriminator(config)
                self.region_discriminator(config)
        except ValueError as error:
            key = "model.resolution" if m.stage == "full" else "render.resolution"
            raise UserError(f"the discriminators of {key}: {error}") from error

    def callbacks(self) -> list[Callback]:
        """Sample grids."""
        return [SampleRows()]

    def emas(self, config: Any) -> Mapping[str, EmaSpec]:
        """One average of the generator, with the same decay from the first step on."""
        return {"ema": constant_average(config.ema.decay)}

    def optimizers(self, config: Any) -> Mapping[str, OptimizerSpec]:
        """Adam for each network; in the second stage of the generator's decoder alone, corrected for lazy phases."""
        o = config.optim
        if config.model.stage == "full":
            lr, betas = o.full_lr, tuple(o.full_betas)
            return {
                GENERATOR: OptimizerSpec((GENERATOR,), lr, betas, o.eps, select=is_decoder),
                FULL: OptimizerSpec((FULL,), lr, betas, o.eps),
            }
        rates = {GENERATOR: o.volume_generator_lr, GLOBAL: o.volume_discriminator_lr, REGION: o.volume_discriminator_lr}
        factors = {GENERATOR: {BETA: o.beta_factor}}
        return {
            name: OptimizerSpec((name,), lr, tuple(o.volume_betas), o.eps, lr_factors=factors.get(name, {}))
            for name, lr in rates.items()
        }

    def dataset(self, config: Any) -> DataSource:
        """Pictures with label maps from ``data.path``, or synthetic heads where it is empty."""
        side = self.side(config)
        fov = config.camera.fov
        return picture_source(config.data, side, side, config.train.seed, label_maps=True, fov=fov)

    def pictures(self, config: Any) -> Any:
        """The data set at ``data.path``."""
        side = self.side(config)
        return pictures_at(config.data, side, side, label_maps=True)

    def side(self, config: Any) -> int:
        """Side of the pictures that a stage is trained on, pixels."""
        return config.model.resolution if config.model.stage == "full" else config.render.resolution

    def stages(self, config: Any) -> list[TrainStage]:
        """The one training stage that ``model.stage`` names."""
        if config.model.stage == "volume":
            return [VolumeStage(config).stage()]
        start = None if config.init_from == UNTRAINED else filler(lambda: self.first_stage(config), _of_the_decoder)
        return [FullStage(config, start).stage()]

    def first_stage(self, config: Any) -> Stored:
        """The model that ``init_from`` names, checked against the configuration of a second stage.

        UserError: none named, not readable, not of a first stage, or another architecture.
        """
        if not config.init_from:
            raise UserError(
                "stage full starts from a trained stage volume: name its run folder, a checkpoint, a converted model or "
                f"an original file with --pretrain_render_path (init_from); {UNTRAINED} is for trials"
            )
        stored = self.stored(config.init_from)
        check_same(config.init_from, stored.config, config, stored.told(SHARED))
        return stored

    def stored(self, path: str | Path) -> Stored:
        """A CNeRF generator of either stage from a file; its best weights. UserError as :func:`open_stored`."""
        return open_stored(path, self.name, CnerfConfig, _read_original)


def _of_the_decoder(key: str) -> bool:
    return not key.startswith(("mapping.", "field_net."))


def _read_original(path: Path) -> Any:
    from facelab.methods.cnerf.convert import read_original  # only where one is read

    return read_original(path)


def _grouping(config: Any) -> Grouping:
    return "strided" if config.reference.strided_groups else "contiguous"


METHOD = Cnerf()
