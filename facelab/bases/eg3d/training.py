# SPDX-License-Identifier: Apache-2.0
"""Training of EG3D (arXiv 2112.07945, section 4 and supplement): four phases, lazily regularised.

``g_main`` and ``d_main`` run at every step, ``g_reg`` (density) and ``d_reg`` (R1) every few steps with their losses
multiplied by the interval. Fakes are conditioned on a camera that is swapped for a foreign one with a probability that
falls over the run, and always rendered from their own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from facelab.bases.eg3d.config import DEVIATIONS, Eg3dConfig, ViewConfig, generator_config
from facelab.bases.eg3d.data import DatasetPictures, HeadPictures, LabelTable, camera_notes, labelled_pictures
from facelab.bases.eg3d.inheritance import inherited
from facelab.bases.eg3d.losses import DensityPoints, Sight, gradient_penalty, label_noise
from facelab.bases.eg3d.model import TriPlaneGenerator, TriPlaneGeneratorConfig
from facelab.bases.eg3d.schedules import blur_half_width, blur_sigma, ema_schedule, neural_resolution, swap_probability
from facelab.bases.eg3d.snapshots import Snapshots
from facelab.cameras.camera import Camera
from facelab.deviations import Deviation
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.generator import Codes
from facelab.losses.adversarial import d_fake_loss, d_real_loss, g_loss
from facelab.losses.density import Density, density_l1, density_monotonic, density_tv
from facelab.nn.augment import AugmentPipe
from facelab.nn.discriminators.stylegan2 import StyleGan2Discriminator, StyleGan2DiscriminatorConfig
from facelab.nn.filtered_resizing import blur_taps, filtered_resizing
from facelab.nn.stylegan2.precision import Precision
from facelab.rendering.settings import RenderSettings
from facelab.training.ada import SIGN, adapt
from facelab.training.loop import Callback
from facelab.training.phases import AfterPhase, Losses, Phase, PhaseContext
from facelab.training.protocol import EmaSpec, Models, OptimizerSpec, TrainStage
from facelab.training.schedule import Progress

STYLE_MEAN = "style_mean"  # statistic of d_main: what the mapping network's average moves to
FINE_CELLS = 256  # the monotonic regularisers step by 1/256 of the box


@dataclass(frozen=True)
class Fakes:
    """Generated pictures and what they were made from.

    Attributes:
        image: (N, 3, S, S).
        raw: (N, 3, R, R), before super-resolution.
        label: (N, 25) cameras they are rendered from.
        style: (N, W) first style code, before mixing.
    """

    image: Tensor
    raw: Tensor
    label: Tensor
    style: Tensor


class Eg3d:
    """EG3D as a trainable method."""

    name = "eg3d"
    config_type: type = Eg3dConfig
    deviations: list[Deviation] = DEVIATIONS
    truncated_layers: int | None = 14  # of the programs for samples and videos; all that 256 px planes have
    running_averages = True  # the mapping network's average is part of the weights, also for fine-tuning
    inherited = staticmethod(inherited)

    # ---------------------------------------------------------------- building

    def generator_config(self, config: Any) -> TriPlaneGeneratorConfig:
        """The architecture of the generator that a run's configuration describes."""
        return generator_config(
            config.model,
            config.view,
            pose_conditioning=config.conditioning.pose,
            legacy_raw=config.reference.legacy_raw,
        )

    def build_generator(self, config: Any) -> TriPlaneGenerator:
        """An initialised generator on the CPU."""
        source = Draws(config.train.seed).at(phase="init").generator("generator")
        generator = TriPlaneGenerator(self.generator_config(config), source)
        generator.precision = self.precision(config)
        return generator

    def precision(self, config: Any) -> Precision:
        """How the marked blocks compute."""
        t = config.train
        blocks: Literal["marked", "all", "none"] = "all" if t.half_everywhere else "marked"
        if t.half == "none":
            blocks = "none"
        return Precision(torch.bfloat16 if t.half == "bf16" else torch.float16, blocks, t.channels_last)

    def training_settings(self, config: Any, resolution: int) -> RenderSettings:
        """Settings of a training render with a neural rendering of this side."""
        reference = config.reference.batch_depth
        return config.render.settings(config.model.box_side, resolution, training=True, reference=reference)

    def view(self, config: Any) -> ViewConfig:
        """Where the cameras of this configuration stand."""
        return config.view

    def head_cube(self, config: Any) -> float:
        """Side of the cube around the origin that the planes cover, scene units."""
        return config.model.box_side

    def depth_range(self, config: Any) -> tuple[float, float]:
        """Distances from the camera between which the planes hold something, scene units."""
        half, render = config.model.box_side / 2, config.render
        box = max(0.0, config.view.radius - half), config.view.radius + half
        if render.box_limits:
            return box
        near, far = max(render.near, box[0]), min(render.far, box[1])
        return (near, far) if near < far else (render.near, render.far)

    def seed_latents(self, spec: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
        """Latents (1, Z) of a seed as the original's programs draw them, float32. UserError for a seed out of range."""
        if not 0 <= seed < 2**32:
            raise UserError(f"a seed of this model must be 0..{2**32 - 1}, got {seed}")
        source = np.random.RandomState(seed)
        return {name: torch.from_numpy(source.randn(1, *shape)).float() for name, shape in spec.items()}

    def inference_settings(
        self, config: Any, resolution: int | None = None, ray_step_multiplier: float = 1, lock_view: bool = False
    ) -> RenderSettings:
        """Settings for pictures: fixed depths, unless ``reference.random_inference``.

        Args:
            config: a run's configuration.
            resolution: side of the neural rendering in pixels, default the configuration's.
            ray_step_multiplier: factor on the samples per ray of training.
            lock_view: without effect, EG3D's colours do not depend on the direction.
        """
        settings = config.render.settings(
            config.model.box_side, resolution, ray_step_multiplier, reference=config.reference.batch_depth
        )
        return settings.replace(jitter=True) if config.reference.random_inference else settings

    def discriminator_config(self, config: Any) -> StyleGan2DiscriminatorConfig:
        """The architecture that a run's configuration describes. UserError where it does not fit the batch."""
        d = config.discriminator
        if config.train.batch_chunk % d.group_size:
            raise UserError(
                f"train.batch_chunk is {config.train.batch_chunk}, expected a multiple of discriminator.group_size "
                f"{d.group_size}: a minibatch statistic needs whole groups; change one of them (group_size=1 always fits)"
            )
        try:
            found = StyleGan2DiscriminatorConfig(
                resolution=config.model.resolution,
                dual=d.dual,
                label_dim=25 if d.conditioned else 0,
                channel_base=d.channel_base,
                channel_max=d.channel_max,
                clamp=d.clamp,
                half_blocks=d.half_blocks,
                group_size=d.group_size,
                grouping="strided" if config.reference.strided_groups else "contiguous",
                freeze_layers=d.freeze_layers,
            )
        except ValueError as error:
            raise UserError(f"the discriminator of model.resolution {config.model.resolution}: {error}") from error
        if d.freeze_layers > found.freezable:
            raise UserError(
                f"discriminator.freeze_layers (--freezed) is {d.freeze_layers}, expected at most {found.freezable}: so many "
                f"layers can be frozen in a discriminator of {config.model.resolution} px; lower it"
            )
        return found

    def build(self, config: Any) -> Models:
        """Generator, discriminator and, where it is wanted, augmentation; initialised from the run's seed."""
        source = Draws(config.train.seed).at(phase="init")
        models = Models(generator=self.build_generator(config))
        models["discriminator"] = StyleGan2Discriminator(
            self.discriminator_config(config), source.generator("discriminator")
        )
        a = config.augment
        if a.mode != "none":
            models["augment"] = AugmentPipe(a.strengths, a.p if a.mode == "fixed" else 0.0)
        return models

    def check_config(self, config: Any) -> None:
        """Find what would stop a run later. UserError in one line."""
        self.discriminator_config(config)
        try:
            self.generator_config(config)
        except ValueError as error:
            raise UserError(f"model: {error}") from error
        if config.train.compile:
            raise UserError("train.compile is on, but no part of EG3D is compiled in training; set it to false")
        try:
            self.training_settings(config, config.neural.initial)
        except ValueError as error:
            raise UserError(f"render: {error}") from error
        if config.model.superresolution_kind is None:
            sides = {config.model.resolution, config.neural.initial, config.neural.final or config.neural.initial}
            if len(sides) > 1:
                raise UserError(
                    f"without super-resolution the rendering is the picture: neural.initial {config.neural.initial} and "
                    f"final {config.neural.final} must be model.resolution {config.model.resolution}"
                )

    def callbacks(self) -> list[Callback]:
        """Sample grids."""
        return [Snapshots()]

    # ---------------------------------------------------------------- the Trainable protocol

    def emas(self, config: Any) -> Mapping[str, EmaSpec]:
        """One average of the generator, whose half-life grows with the run."""
        return {"ema": EmaSpec("generator", ema_schedule(config.ema.half_life_kimg, config.ema.rampup))}

    def optimizers(self, config: Any) -> Mapping[str, OptimizerSpec]:
        """Adam for each network; the loop corrects for the lazy phases."""
        o = config.optim
        rates = {"generator": o.generator_lr, "discriminator": o.discriminator_lr}
        return {name: OptimizerSpec((name,), lr, tuple(o.betas), o.eps) for name, lr in rates.items()}

    def dataset(self, config: Any) -> DatasetPictures | HeadPictures:
        """Pictures with cameras from ``data.path``, or synthetic heads where it is empty."""
        windowed, seed = config.reference.windowed_order, config.train.seed
        if config.data.path:
            return DatasetPictures(self.pictures(config), seed, windowed)
        d, v = config.data, config.view
        fov = 2 * math.degrees(math.atan(0.5 / v.focal))
        size = config.model.resolution
        return HeadPictures(d.heads, size, seed, d.heads_yaw_std, d.heads_pitch_std, fov, v.radius, windowed, d.alpha)

    def pictures(self, config: Any) -> Any:
        """The data set at ``data.path``."""
        d = config.data
        return labelled_pictures(d.path, config.model.resolution, d.mirror, d.max_size, d.alpha, d.cache)

    def data_notes(self, config: Any) -> list[str]:
        """What is odd about the cameras at ``data.path``. UserError where they are none."""
        return camera_notes(self.pictures(config), config.data.path)

    def stages(self, config: Any) -> list[TrainStage]:
        """One training stage with up to four phases."""
        return [TrainStage("main", tuple(Schedule(self, config).phases()))]


class Schedule:
    """The phases of one run.

    Args:
        method: builds nothing here; gives the data set.
        config: of the first curriculum row.
        labels: cameras to generate from; None = those of the data set, read when first asked for.
    """

    def __init__(self, method: Eg3d, config: Any, labels: LabelTable | None = None) -> None:
        self.method, self.config, self._given = method, config, labels

    @functools.cached_property
    def labels(self) -> LabelTable:
        """Cameras to generate from."""
        return self._given or LabelTable(self.method.dataset(self.config).labels)

    def phases(self) -> list[Phase]:
        """g_main, g_reg, d_main, d_reg; a regulariser of weight 0 has no phase."""
        c = self.config
        reduction = "sum" if c.reference.sum_chunks else "mean"
        make = functools.partial(Phase, reduction=reduction)
        phases = [make("g_main", ("generator",), "generator", self.g_main, real=False)]
        if c.loss.density_weight > 0:
            every, exact = c.loss.density_every, c.train.exact_density
            phases.append(make("g_reg", ("generator",), "generator", self.g_reg, every=every, real=False, exact=exact))
        judge = ("discriminator",)
        phases.append(make("d_main", judge, "discriminator", self.d_main, after=self.after_d_main))
        if c.loss.r1_gamma > 0:
            phases.append(make("d_reg", judge, "discriminator", self.d_reg, every=c.loss.r1_every))
        return phases

    # ---------------------------------------------------------------- generating

    def resolution(self, ctx: PhaseContext) -> int:
        """Side of the neural rendering at this step."""
        n = ctx.config.neural
        return ctx.decide(lambda _, progress: neural_resolution(progress.images, n.initial, n.final, n.fade_kimg))

    def conditioning(self, ctx: PhaseContext, label: Tensor, name: str, per_sample: bool = True) -> Tensor:
        """(N, 25) what the generator is told of the camera: its own, a foreign one, or zeros.

        Args:
            name: of the draws ``<name>`` (the coin) and ``<name>_partner``.
            per_sample: one coin for each sample, or one for the chunk (density regularisers).
        """
        c = ctx.config.conditioning
        if not c.pose:
            return torch.zeros_like(label)
        if c.swap is None:
            return label
        swap, fade = c.swap, c.swap_fade_kimg
        probability = ctx.schedule(lambda progress: swap_probability(progress.images, swap, fade))
        if ctx.config.reference.roll_partners:
            partner = label.roll(1, 0)
        else:
            partner = ctx.host(lambda draws: self.labels.draw(draws, f"{name}_partner", ctx.count))
        coin = ctx.host(lambda draws: draws.uniform(name, (ctx.count if per_sample else 1, 1)))
        return torch.where(coin < probability, partner, label)

    def sample(self, ctx: PhaseContext) -> tuple[Tensor, Tensor]:
        """(N, Z) latent codes and (N, 25) cameras to render from."""
        generator: Any = ctx.models["generator"]
        (width,) = generator.latent_spec["z"]
        z = ctx.host(lambda draws: draws.normal("z", (ctx.count, width)))
        return z, ctx.host(lambda draws: self.labels.draw(draws, "label", ctx.count))

    def mix(self, ctx: PhaseContext, codes: Codes, conditioning: Tensor) -> Codes:
        """Style mixing: with a probability, the codes from a random layer on are those of another latent."""
        share = ctx.config.loss.style_mixing
        if share <= 0:
            return codes
        generator: Any = ctx.models["generator"]
        ws = codes.values["w"]
        z = ctx.host(lambda draws: draws.normal("z_mix", (ctx.count, *generator.latent_spec["z"])))
        other = generator.map({"z": z}, conditioning).values["w"]
        coins = ctx.host(lambda draws: draws.uniform("mix", (ctx.count, 2)))
        first = 1 + torch.floor(coins[:, 1:] * (ws.shape[1] - 1))
        first = torch.where(coins[:, :1] < share, first, torch.full_like(first, ws.shape[1]))
        layer = torch.arange(ws.shape[1], device=ws.device)[None]
        return Codes({"w": torch.where((layer >= first)[..., None], other, ws)})

    def generate(self, ctx: PhaseContext) -> Fakes:
        """Fresh fakes of this phase and chunk."""
        generator: Any = ctx.models["generator"]
        z, label = self.sample(ctx)
        conditioning = self.conditioning(ctx, label, "swap")
        codes = generator.map({"z": z}, conditioning)
        style = codes.values["w"][:, 0]
        scene = generator.scene(self.mix(ctx, codes, conditioning), ctx.draws)
        settings = self.method.training_settings(ctx.config, self.resolution(ctx))
        output = generator.render(scene, Camera.from_label(label, trusted=True), settings, ctx.draws)
        return Fakes(output.rgb, output.raw_rgb, label, style)

    # ---------------------------------------------------------------- what the discriminator sees

    def sight(self, ctx: PhaseContext) -> Sight:
        """Blur and augmentation at this step; the kernel has the length of the first step's while the blur fades."""
        loss = ctx.config.loss
        fade = loss.blur_fade_kimg * ctx.progress.batch_size / 32

        def sigma(progress: Progress) -> float:
            return blur_sigma(progress.images, loss.blur_sigma, fade)

        def reach(progress: Progress) -> int:
            return blur_half_width(sigma(progress))

        def fading(_: Draws) -> Tensor:
            return blur_taps(ctx.schedule(sigma), ctx.schedule(reach), blur_half_width(loss.blur_sigma))

        taps = None
        if ctx.decide(lambda _, progress: reach(progress) > 0):
            taps = ctx.shared("blur_taps", fading)  # of this step, whichever phase asks first
        pipe = ctx.models.get("augment")
        assert pipe is None or isinstance(pipe, AugmentPipe)
        return Sight(taps, pipe)

    def judge(self, ctx: PhaseContext, image: Tensor, raw: Tensor | None, label: Tensor, draws: Draws) -> Tensor:
        """(N, 1) logits of pictures as they enter the discriminator."""
        discriminator: Any = ctx.models["discriminator"]
        discriminator.precision = self.method.precision(ctx.config)
        strength = ctx.config.discriminator.label_noise
        if strength > 0:
            own = ctx.config.reference.chunk_label_noise
            label = label_noise(label, label.std(0) if own else self.labels.deviation(ctx.device), strength, draws)
        return discriminator(image, raw, label if ctx.config.discriminator.conditioned else None)

    def judge_fakes(self, ctx: PhaseContext, fakes: Fakes) -> Tensor:
        draws = ctx.draws.at(phase=f"{ctx.draws.phase}/fake")
        image, raw = self.sight(ctx).fake(fakes.image, fakes.raw, draws)
        return self.judge(ctx, image, raw, fakes.label, draws)

    def real_raw(self, ctx: PhaseContext) -> Tensor:
        """(N, 3, R, R) real pictures as the neural rendering would be; once for both phases of a step."""
        size, mode = self.resolution(ctx), ctx.config.loss.raw_filter
        return ctx.shared("real_raw", lambda draws: filtered_resizing(ctx.real.float_image(), size, mode))

    def judge_real(self, ctx: PhaseContext) -> tuple[Tensor, list[Tensor]]:
        """Logits of the real pictures, and the tensors that entered the discriminator, with gradient."""
        draws = ctx.draws.at(phase=f"{ctx.draws.phase}/real")
        dual = ctx.config.discriminator.dual
        image, raw = self.sight(ctx).real(ctx.real.float_image(), self.real_raw(ctx) if dual else None, draws)
        image = image.detach().requires_grad_()
        raw = None if raw is None else raw.detach().requires_grad_()
        logits = self.judge(ctx, image, raw, real_label(ctx), draws)
        return logits, [x for x in (image, raw) if x is not None]

    # ---------------------------------------------------------------- losses

    def g_main(self, ctx: PhaseContext) -> Losses:
        """Non-saturating loss."""
        logits = self.judge_fakes(ctx, self.generate(ctx))
        ctx.log("fake_logit", logits)
        yield "adversarial", g_loss(logits)

    def g_reg(self, ctx: PhaseContext) -> Losses:
        """Density regularisers; the monotonic kinds add a smoothness term of their own coin and codes."""
        loss = ctx.config.loss
        z, label = self.sample(ctx)
        if loss.density_type.startswith("monotonic"):
            density, where = self.density(ctx, z, label, "swap")
            x = where.draw(ctx.draws, "points_monotonic", ctx.count, loss.monotonic_points, ctx.device)
            term = density_monotonic(density, x, self.cell(ctx), loss.density_type == "monotonic-detach")
            ctx.log("monotony", term)
            yield "monotonic", loss.monotonic_weight * where.share * term
            distance, coin = self.cell(ctx), "swap_again"
        else:
            distance, coin = loss.density_distance, "swap"
        density, where = self.density(ctx, z, label, coin)
        x = where.draw(ctx.draws, "points", ctx.count, loss.density_points, ctx.device)
        if loss.density_type == "tv":
            term = density_tv(density, x, distance)
        else:
            term = density_l1(density, x, distance * ctx.draws.normal("offsets", x.shape, ctx.device))
        ctx.log("difference", term)
        yield "density", loss.density_weight * where.share * term

    def d_main(self, ctx: PhaseContext) -> Losses:
        """Logistic loss of fakes and of real pictures, back-propagated one after the other."""
        with torch.no_grad():
            fakes = self.generate(ctx)
        ctx.statistic(STYLE_MEAN, fakes.style.mean(0))
        logits = self.judge_fakes(ctx, fakes)
        ctx.log("fake_logit", logits)
        yield "fake", d_fake_loss(logits)
        del logits, fakes
        logits, _ = self.judge_real(ctx)
        ctx.log("real_logit", logits)
        ctx.statistic(SIGN, logits.detach().sign().mean())
        yield "real", d_real_loss(logits)

    def d_reg(self, ctx: PhaseContext) -> Losses:
        """R1 on what enters the discriminator."""
        logits, inputs = self.judge_real(ctx)
        if not ctx.config.loss.r1_raw:
            inputs = inputs[:1]
        penalty = gradient_penalty(inputs, logits, ctx.grad_scale()).mean()
        ctx.log("penalty", penalty)
        yield "r1", 0.5 * ctx.config.loss.r1_gamma * penalty

    def after_d_main(self, after: AfterPhase) -> None:
        """The average style code moves; the augmentation adapts."""
        generator: Any = after.models["generator"]
        mapping = generator.backbone.mapping
        mean = after.statistics[STYLE_MEAN].to(mapping.w_avg.device)
        after.assign_(mapping.w_avg, mean.lerp(mapping.w_avg, mapping.w_avg_beta))
        a, pipe = after.config.augment, after.models.get("augment")
        if a.mode == "ada" and isinstance(pipe, AugmentPipe):
            adapt(after, pipe, a.target, a.kimg, a.interval)

    # ---------------------------------------------------------------- density

    def cell(self, ctx: PhaseContext) -> float:
        """Step of the monotonic regularisers in scene units."""
        return ctx.config.model.box_side / FINE_CELLS

    def density(self, ctx: PhaseContext, z: Tensor, label: Tensor, coin: str) -> tuple[Density, DensityPoints]:
        """Raw density of fresh scenes as a function of points (N, P, 3), and where to look."""
        generator: Any = ctx.models["generator"]
        conditioning = self.conditioning(ctx, label, coin, per_sample=False)
        codes = self.mix(ctx, generator.map({"z": z}, conditioning), conditioning)
        planes = generator.scene(codes, ctx.draws.at(phase=f"{ctx.draws.phase}/{coin}")).parts["planes"]

        def density(points: Tensor) -> Tensor:
            return generator.field_net.density(points[:, :, None], planes).flatten(1)

        return density, DensityPoints.of_box(ctx.config.model.box_side, ctx.config.reference.density_cube)


def real_label(ctx: PhaseContext) -> Tensor:
    """(N, 25) cameras of the real pictures. ValueError if the data have none."""
    if ctx.real.camera is None:
        raise ValueError("EG3D trains on pictures with cameras; this data set has none")
    return ctx.real.camera.label()


METHOD = Eg3d()
