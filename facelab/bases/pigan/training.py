# SPDX-License-Identifier: Apache-2.0
"""Training of SIREN GANs: pi-GAN with one discriminator; FENeRF adds a second (see methods/fenerf)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from facelab.bases.pigan import convert
from facelab.bases.pigan.config import DEVIATIONS, CameraConfig, PiganConfig, RenderConfig
from facelab.bases.pigan.convert_discriminator import published_config
from facelab.bases.pigan.model import LatentConfig, SirenGenerator, SirenGeneratorConfig
from facelab.bases.pigan.variants import FENERF_VARIANTS, PIGAN_VARIANTS
from facelab.cameras import Camera
from facelab.cameras.pose_sampling import PosePrior
from facelab.data.batch import Batch
from facelab.deviations import Deviation
from facelab.draws import Draws
from facelab.errors import UserError, nearest
from facelab.generator import GeneratorOutput, sample_latents, seed_latents
from facelab.losses.adversarial import d_fake_loss, d_real_loss, g_loss, r1_penalty, topk_count
from facelab.losses.regularizers import latent_penalty, pose_penalty
from facelab.nn.discriminators import DiscriminatorConfig, DiscriminatorOutput, ProgressiveDiscriminator
from facelab.rendering.settings import RenderSettings
from facelab.training.phases import Losses, Phase, PhaseContext
from facelab.training.protocol import DataSource, EmaSpec, Models, OptimizerSpec, TrainStage
from facelab.training.schedule import Progress, nerf_noise

HEAD_CUBE = 0.3  # side of a cube that holds a head on the unit sphere of cameras, scene units


@dataclass(frozen=True)
class Fakes:
    """Generated pictures and what they were made from."""

    output: GeneratorOutput
    latents: Mapping[str, Tensor]
    camera: Camera


@dataclass(frozen=True)
class Judge:
    """One discriminator: what it sees, what its opinion weighs in the generator's loss.

    Attributes:
        model: its name among the models.
        channels: image channels it takes.
    """

    model: str
    channels: int

    def real(self, batch: Batch) -> Tensor:
        """(N, 3, S, S) real pictures in [-1, 1]."""
        return batch.float_image()

    def fake(self, output: GeneratorOutput, for_generator: bool) -> Tensor:
        """(N, 3, S, S) generated pictures in [-1, 1]."""
        return output.rgb

    def weight(self, config: Any) -> float:
        return 1.0


class Pigan:
    """pi-GAN as a trainable method (arXiv 2012.00926, section 3.3 and supplement)."""

    name = "pigan"
    config_type: type = PiganConfig
    deviations: list[Deviation] = DEVIATIONS
    truncated_layers: int | None = None  # one code for all layers
    seed_latents = staticmethod(seed_latents)
    roles: Mapping[str, str] = {"z": "all"}  # latent -> layers it modulates
    variants = PIGAN_VARIANTS

    def judges(self) -> list[Judge]:
        """The discriminators, in the order of their phases."""
        return [Judge("d_image", 3)]

    # ---------------------------------------------------------------- building

    def generator_config(self, config: Any) -> SirenGeneratorConfig:
        """The architecture that a run's ``model`` section describes. UserError for an unknown variant."""
        m = config.model
        known = PIGAN_VARIANTS | FENERF_VARIANTS
        if m.variant not in self.variants:
            wrong = " belongs to another method" if m.variant in known else " is not known"
            raise UserError(
                f"model.variant {m.variant!r}{wrong}; expected one of {', '.join(self.variants)}."
                f"{nearest(m.variant, self.variants)}"
            )
        field = self.variants[m.variant]
        if m.grid_size and field.grid_branch == "none":
            raise UserError(
                f"model.grid_size is {m.grid_size}, but model.variant {m.variant} has no latent grid; set it to null"
            )
        if m.hidden:
            field = replace(field, hidden=m.hidden)
        if m.grid_size:
            field = replace(field, grid_size=tuple(m.grid_size))
        latents = {name: LatentConfig(m.latent_dim, role) for name, role in self.roles.items()}  # type: ignore[arg-type]
        return SirenGeneratorConfig(field, latents, m.mapping_hidden, m.mapping_linears)

    def discriminator_config(self, config: Any, channels: int) -> DiscriminatorConfig:
        """The architecture of a discriminator for pictures of ``channels`` channels."""
        names = [_head_name(name) for name in self.roles]
        base = published_config(config.discriminator.kind, in_channels=channels)
        unknown = set(config.loss.latent) - set(names)
        if unknown:
            name = min(unknown)
            raise UserError(f"loss.latent.{name}: no such code, expected {', '.join(names)}.{nearest(name, names)}")
        latents = dict.fromkeys(names, config.model.latent_dim) if base.latents else {}
        chosen = tuple(config.discriminator.channels or ()) or base.channels
        return replace(base, channels=chosen, latents=latents, channels_last=config.discriminator.channels_last)

    def check_config(self, config: Any) -> None:
        """Find what would stop a run later, or have no effect on it. UserError in one line."""
        for judge in self.judges():
            try:
                self.discriminator_config(config, judge.channels).start(config.render.resolution)
            except ValueError as error:
                raise UserError(f"render.resolution: {error}") from error
        self.generator_config(config)
        try:
            self.inference_settings(config)
        except ValueError as error:
            raise UserError(f"render: {error}") from error
        if config.train.compile:
            raise UserError("train.compile is on, but no part of it is compiled in training; set it to false")

    def build_generator(self, config: Any) -> SirenGenerator:
        """An initialised generator on the CPU."""
        generator = SirenGenerator(self.generator_config(config))
        generator.reset_parameters(Draws(config.train.seed).at(phase="init").generator("generator"))
        generator.field_net.precision = field_precision(config)
        return generator

    def build(self, config: Any) -> Models:
        """Generator and discriminators, initialised from the run's seed."""
        models = Models(generator=self.build_generator(config))
        for judge in self.judges():
            source = Draws(config.train.seed).at(phase="init").generator(judge.model)
            models[judge.model] = ProgressiveDiscriminator(self.discriminator_config(config, judge.channels), source)
        return models

    def convert(self, original: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Original generator key names -> ours."""
        return convert.from_original(original)

    def view(self, config: Any) -> CameraConfig:
        """Where the cameras of this configuration stand."""
        return config.camera

    def head_cube(self, config: Any) -> float:
        """Side of a cube around the origin that holds a head, scene units."""
        return HEAD_CUBE

    def depth_range(self, config: Any) -> tuple[float, float]:
        """Distances from the camera between which a head lies, scene units."""
        return config.render.near, config.render.far

    def inference_settings(
        self, config: Any, resolution: int | None = None, ray_step_multiplier: int = 2, lock_view: bool = False
    ) -> RenderSettings:
        """Settings for pictures, see :func:`inference_settings`."""
        return inference_settings(config, resolution, ray_step_multiplier, lock_view)

    # ---------------------------------------------------------------- the Trainable protocol

    def emas(self, config: Any) -> Mapping[str, EmaSpec]:
        """The two averages of the original."""
        return {
            "ema": EmaSpec("generator", config.ema.decay),
            "ema_slow": EmaSpec("generator", config.ema.slow_decay),
        }

    def optimizers(self, config: Any) -> Mapping[str, OptimizerSpec]:
        """Adam for the generator and for each discriminator."""
        o = config.optim
        rates = {"generator": o.generator_lr, **self.discriminator_rates(config)}
        return {
            name: OptimizerSpec((name,), lr, betas=tuple(o.betas), weight_decay=o.weight_decay)
            for name, lr in rates.items()
        }

    def discriminator_rates(self, config: Any) -> dict[str, float]:
        """Learning rate of each discriminator."""
        return {"d_image": config.optim.image_lr}

    def dataset(self, config: Any) -> DataSource:
        """Pictures from ``data.path``, or synthetic heads where it is empty."""
        from facelab.data.loader import ImageStream
        from facelab.data.synthetic_pool import SyntheticPool

        if config.data.path:
            return ImageStream(self.pictures(config), config.train.seed)
        c, size, seed = config.camera, config.render.resolution, config.train.seed
        return SyntheticPool(config.data.heads, size, seed, c.yaw_std, c.pitch_std, c.fov)

    def pictures(self, config: Any) -> Any:
        """The picture set at ``data.path``."""
        from facelab.data.image_folder import ImageFolder

        d, size = config.data, config.render.resolution
        return ImageFolder(
            d.path, size, chain=d.chain, crop=d.crop, reference=config.reference.data_chain, cache=d.cache
        )

    def data_notes(self, config: Any) -> list[str]:
        """What is odd about training on the pictures at ``data.path``."""
        if not config.loss.real_pose:
            return []
        return [
            f"pictures of files have no known cameras: loss.real_pose={config.loss.real_pose:g} has no effect on them"
        ]

    def stages(self, config: Any) -> list[TrainStage]:
        """One training stage: each discriminator, then the generator (pi-GAN's order)."""
        phases = [
            Phase(
                j.model,
                (j.model,),
                j.model,
                lambda ctx, j=j: self.discriminator_losses(ctx, j),
                chunk=discriminator_chunk,
            )
            for j in self.judges()
        ]
        reduction = "sum" if config.reference.sum_chunks else "mean"
        phases.append(
            Phase("generator", ("generator",), "generator", self.generator_losses, real=False, reduction=reduction)
        )
        return [TrainStage("main", tuple(phases))]

    # ---------------------------------------------------------------- losses

    def generate(self, ctx: PhaseContext, draws: Draws) -> Fakes:
        """Fresh latents and cameras, rendered with the training settings."""
        generator: Any = ctx.models["generator"]
        generator.field_net.precision = field_precision(ctx.config)
        spec, prior, fov = generator.latent_spec, pose_prior(ctx.config), ctx.config.camera.fov
        steps = ctx.config.render.noise_steps
        latents = ctx.host(lambda own: sample_latents(spec, own, ctx.count), draws)
        camera = ctx.host(lambda own: prior.sample(own, ctx.count, fov), draws)
        noise: float | Tensor = 0.0
        if steps and ctx.decide(lambda _, progress: nerf_noise(progress.step, steps) > 0):
            noise = ctx.schedule(lambda progress: nerf_noise(progress.step, steps))
        settings = render_settings(ctx.config.render).replace(sigma_noise=noise)
        with ctx.autocast(ctx.config.render.precision == "autocast"):
            return Fakes(generator(latents, camera, settings, draws), latents, camera)

    def discriminator_losses(self, ctx: PhaseContext, judge: Judge) -> Losses:
        """Non-saturating loss with R1 on real pictures, and the reconstruction penalties on fakes."""
        discriminator, alpha, weights = ctx.models[judge.model], self.alpha(ctx), ctx.config.loss
        real = judge.real(ctx.real).requires_grad_(weights.r1 > 0)
        opinion: DiscriminatorOutput = discriminator(real, alpha)
        loss = d_real_loss(opinion.realness)
        ctx.log(f"{judge.model}/real_logit", opinion.realness)
        if weights.r1 > 0:
            penalty = r1_penalty(real, opinion.realness, ctx.grad_scale())
            ctx.log(f"{judge.model}/r1", penalty)
            loss = loss + 0.5 * weights.r1 * penalty
        if weights.real_pose > 0 and opinion.pose is not None and ctx.real.camera is not None:
            # Over a narrow field of view a hollow face turned the other way looks the same; known poses decide.
            error = pose_penalty(opinion.pose, ctx.real.camera.sphere_angles())
            ctx.log(f"{judge.model}/real_pose", error)
            loss = loss + weights.real_pose * error
        yield "real", loss
        with torch.no_grad():
            fakes = self.discriminator_fakes(ctx)
            pictures = judge.fake(fakes.output, for_generator=False)
        opinion = discriminator(pictures, alpha)
        ctx.log(f"{judge.model}/fake_logit", opinion.realness)
        yield "fake", d_fake_loss(opinion.realness) + self.penalties(ctx, opinion, fakes)

    def discriminator_fakes(self, ctx: PhaseContext) -> Fakes:
        """Fakes for a discriminator step: a batch of its own for each discriminator."""
        return self.generate(ctx, ctx.draws)

    def generator_losses(self, ctx: PhaseContext) -> Losses:
        """Non-saturating loss on the best fakes and the reconstruction penalties, summed over the judges."""
        fakes, alpha, loss = self.generate(ctx, ctx.draws), self.alpha(ctx), ctx.config.loss
        top = ctx.decide(lambda _, now: topk_count(now.step, ctx.count, loss.topk_interval, loss.topk_floor))
        total = torch.zeros((), device=ctx.device)
        for judge in self.judges():
            opinion = ctx.models[judge.model](judge.fake(fakes.output, for_generator=True), alpha)
            term = g_loss(opinion.realness, top) + self.penalties(ctx, opinion, fakes)
            ctx.log(f"generator/{judge.model}", term)
            total = total + judge.weight(ctx.config) * term
        yield "total", total + self.regularization(ctx, fakes)

    def regularization(self, ctx: PhaseContext, fakes: Fakes) -> Tensor:
        """Further terms of the generator's loss; pi-GAN has none."""
        return torch.zeros((), device=ctx.device)

    def penalties(self, ctx: PhaseContext, opinion: DiscriminatorOutput, fakes: Fakes) -> Tensor:
        """Weighted errors of the codes and the pose that a discriminator read off the fakes."""
        total = torch.zeros((), device=ctx.device)
        weights = ctx.config.loss
        for name, latent in fakes.latents.items():
            head = _head_name(name)
            weight = weights.latent.get(head, 0.0)
            if weight and head in opinion.latents:
                total = total + weight * latent_penalty(opinion.latents[head], latent)
        if weights.pose and opinion.pose is not None and fakes.camera.angles is not None:
            total = total + weights.pose * pose_penalty(opinion.pose, fakes.camera.angles)
        return total

    def alpha(self, ctx: PhaseContext) -> float | Tensor:
        """Fade-in of the discriminators' new resolution."""
        steps = ctx.config.loss.fade_steps

        def fade(progress: Progress) -> float:
            return progress.fade(steps, lambda config: config.render.resolution)

        return ctx.schedule(fade) if ctx.decide(lambda _, progress: fade(progress) < 1) else 1.0


def discriminator_chunk(config: Any) -> int:
    """Samples per pass of a discriminator's phase; it has no top-k, so the size changes memory and speed only."""
    return config.discriminator.chunk or config.train.batch_chunk


def pose_prior(config: Any) -> PosePrior:
    """The camera prior of a configuration."""
    c = config.camera
    return PosePrior(c.distribution, c.yaw_mean, c.yaw_std, c.pitch_mean, c.pitch_std)


def field_precision(config: Any) -> Literal["fp32", "tf32", "fp16"]:
    """What the field is told: its own modes; under ``autocast`` it is plain and the loop's autocast is on."""
    return "fp32" if config.render.precision == "autocast" else config.render.precision


def render_settings(render: RenderConfig) -> RenderSettings:
    """Training settings of a configuration, without density noise."""
    return RenderSettings(
        resolution=render.resolution,
        near=render.near,
        far=render.far,
        samples_coarse=render.samples,
        samples_fine=render.samples if render.hierarchical else 0,
        density=render.density,  # type: ignore[arg-type]
        background=render.background,  # type: ignore[arg-type]
        coarse_gradient=render.coarse_gradient,
        max_points=render.max_points,
        recompute=render.recompute,
    )


def inference_settings(
    config: Any, resolution: int | None = None, ray_step_multiplier: int = 2, lock_view: bool = False
) -> RenderSettings:
    """Settings for pictures: more samples per ray, fixed depths (unless ``reference.random_inference``).

    Args:
        config: a run's configuration.
        resolution: image side in pixels, default the configuration's.
        ray_step_multiplier: factor on the samples per ray of training.
        lock_view: evaluate colours for the direction (0, 0, -1).
    """
    settings = render_settings(config.render)
    samples = config.render.samples * ray_step_multiplier
    settings = settings.replace(
        resolution=resolution or config.render.resolution,
        samples_coarse=samples,
        samples_fine=samples if config.render.hierarchical else 0,
        background=config.render.eval_background,
        lock_view=lock_view,
    )
    return settings if config.reference.random_inference else settings.deterministic()


def _head_name(latent: str) -> str:
    """Name of a latent in the discriminators' head: ``z``, ``z_geo``, ``z_app``."""
    return latent if latent == "z" else f"z_{latent}"


METHOD = Pigan()
