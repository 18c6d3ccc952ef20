# SPDX-License-Identifier: Apache-2.0
"""StyleSDF's two training stages (arXiv 2112.11427, sections 3.3 and 3.4 and supplement).

``volume``: the field and its renderer against thumbnails, after a start as a sphere. ``full``: the decoder against whole
pictures, on renderings of a frozen field. N samples of a chunk, S side of the picture, L and D number and width of the
decoder's style codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from facelab.bases.stylesdf import phases
from facelab.bases.stylesdf.phases import GENERATOR, PathSettings, SphereBatch
from facelab.cameras.camera import Camera
from facelab.draws import Draws
from facelab.generator import Codes, Scene, ray_image
from facelab.losses.adversarial import d_fake_loss, d_real_loss, g_loss, r1_penalty
from facelab.rendering.sdf import SdfOptions, SdfRenderOutput
from facelab.training.phases import Losses, Phase, PhaseContext
from facelab.training.protocol import Models, TrainStage

DISCRIMINATOR = "discriminator"
DECODER = f"{GENERATOR}.decoder."  # parameters that stage full trains
Reduction = Literal["mean", "sum"]


def reduction_of(config: Any) -> Reduction:
    """How the chunks of a step come together."""
    return "sum" if config.reference.sum_chunks else "mean"


# ---------------------------------------------------------------- the volume renderer


@dataclass(frozen=True)
class VolumeFakes:
    """Rendered heads.

    Attributes:
        image: (N, 3, s, s) in [-1, 1].
        camera: what they are seen from.
        volume: with signed distances and gradients if asked for.
    """

    image: Tensor
    camera: Camera
    volume: SdfRenderOutput


def volume_stage(config: Any, start: Callable[[Models], None] | None = None) -> TrainStage:
    """Discriminator with viewpoint and R1, generator with viewpoint, eikonal and minimal surface, at every step.

    ``start`` loads first weights (fine-tuning).
    """
    reduction = reduction_of(config)
    judge = Phase(DISCRIMINATOR, (DISCRIMINATOR,), DISCRIMINATOR, judge_thumbnails, reduction=reduction)
    make = Phase(GENERATOR, (GENERATOR,), GENERATOR, make_thumbnails, real=False, reduction=reduction)
    # a renderer of raw densities has no distance that could be a sphere's
    steps = config.sphere.steps if config.model.density == "sdf" and start is None else 0
    warmup = phases.sphere_warmup(steps, config.sphere.batch, sphere_batch)
    return TrainStage("volume", (judge, make), start, warmup)


def sphere_batch(config: Any) -> SphereBatch:
    """What the sphere initialisation looks at: training cameras and training depths."""
    settings = config.render.settings(config.view, training=True)
    return SphereBatch(config.view.prior, settings, config.render.sampling, distances)


def distances(ctx: PhaseContext, latents: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The signed distance of the heads of these latents."""
    generator: Any = ctx.models[GENERATOR]
    return generator.field(generator.scene(generator.map(latents))).distances


def generate_volume(ctx: PhaseContext, draws: Draws, options: SdfOptions) -> VolumeFakes:
    """Fresh heads from fresh cameras, rendered with the training settings."""
    generator: Any = ctx.models[GENERATOR]
    latents = phases.draw_latents(ctx, generator.latent_spec, draws, ctx.count)
    camera = phases.draw_cameras(ctx, ctx.config.view.prior, draws, ctx.count)
    settings = ctx.config.render.settings(ctx.config.view, training=True)
    volume = generator.render_volume(generator.scene(generator.map(latents)), camera, settings, draws, options)
    return VolumeFakes(ray_image(2 * volume.rgb - 1, settings.resolution), camera, volume)


def judge_thumbnails(ctx: PhaseContext) -> Losses:
    """Logistic loss, R1 on real thumbnails, and the viewpoint of the fakes."""
    judge, loss = ctx.models[DISCRIMINATOR], ctx.config.loss
    real = ctx.real.float_thumbnail().requires_grad_(loss.r1 > 0)
    opinion = judge(real)
    ctx.log("real_logit", opinion.realness)
    total = d_real_loss(opinion.realness)
    if loss.r1 > 0:
        penalty = r1_penalty(real, opinion.realness, ctx.grad_scale())
        ctx.log("r1", penalty)
        total = total + 0.5 * loss.r1 * penalty
    yield "real", total
    with torch.no_grad():
        fakes = generate_volume(ctx, ctx.draws, SdfOptions(ctx.config.render.sampling))
    opinion = judge(fakes.image)
    ctx.log("fake_logit", opinion.realness)
    yield "fake", d_fake_loss(opinion.realness) + phases.viewpoint_penalty(ctx, opinion.view, fakes.camera, loss.view)


def make_thumbnails(ctx: PhaseContext) -> Losses:
    """Non-saturating loss, the viewpoint that the discriminator reads, and the two terms on signed distances."""
    loss = ctx.config.loss
    fakes = generate_volume(ctx, ctx.draws, field_options(ctx.config))
    opinion = ctx.models[DISCRIMINATOR](fakes.image)
    adversarial = g_loss(opinion.realness)
    ctx.log("adversarial", adversarial)
    view = phases.viewpoint_penalty(ctx, opinion.view, fakes.camera, loss.view)
    field = phases.field_penalty(ctx, fakes.volume, loss.eikonal, loss.surface, loss.surface_sharpness)
    beta = getattr(ctx.models[GENERATOR].field_net, "beta", None)
    if beta is not None:
        ctx.log("beta", beta)
    yield "total", adversarial + view + field + sphere_anchor(ctx)


def sphere_anchor(ctx: PhaseContext) -> Tensor:
    """Weighted distance from the sphere, which fades over the first steps: keeps a surface until there are colours."""
    loss = ctx.config.loss
    if ctx.config.model.density != "sdf":
        return torch.zeros((), device=ctx.device)
    return phases.sphere_anchor(ctx, sphere_batch(ctx.config), loss.sphere, loss.sphere_steps)


def field_options(config: Any) -> SdfOptions:
    """The values of single samples that the losses in force need."""
    if config.model.density != "sdf":
        return SdfOptions(config.render.sampling)
    gradient = config.render.gradient if config.loss.eikonal else "none"
    return SdfOptions(config.render.sampling, samples=config.loss.surface > 0, gradient=gradient)


# ---------------------------------------------------------------- the decoder


def full_stage(config: Any, start: Callable[[Models], None] | None) -> TrainStage:
    """Decoder and discriminator of whole pictures, with lazy path lengths and lazy R1.

    ``start`` fills the renderer, which is not trained.
    """
    loss, reduction = config.loss, reduction_of(config)
    made: list[Phase] = [
        Phase("d_main", (DISCRIMINATOR,), DISCRIMINATOR, judge_pictures, reduction=reduction),
    ]
    if loss.r1 > 0:
        every = loss.r1_every
        made.append(Phase("d_reg", (DISCRIMINATOR,), DISCRIMINATOR, judge_slope, every=every, reduction=reduction))
    made.append(Phase("g_main", (GENERATOR,), GENERATOR, make_pictures, real=False, reduction=reduction))
    if loss.path > 0:
        made.append(phases.path_phase(loss.path_every, path_settings, draw_paths, reduction))
    return TrainStage("full", tuple(made), start)


def path_settings(config: Any) -> PathSettings:
    """Of a configuration."""
    return PathSettings(config.loss.path, config.loss.path_decay, config.loss.path_shrink)


def prepare(ctx: PhaseContext, draws: Draws, count: int) -> tuple[Scene, Tensor]:
    """Fresh heads, rendered without gradient -> their scene, whose ``styles`` (N, L, D) have one, and features.

    Field and camera depend on the first latent alone; with probability ``loss.mixing`` the decoder takes the styles of
    a second one from a random layer on. Noise maps are new ones.
    """
    generator: Any = ctx.models[GENERATOR]
    latents = phases.draw_latents(ctx, generator.latent_spec, draws, count)
    camera = phases.draw_cameras(ctx, ctx.config.view.prior, draws, count)
    settings = ctx.config.render.settings(ctx.config.view, training=True)
    codes: Codes = generator.map(latents)
    inject = phases.mixing_layer(ctx, ctx.config.loss.mixing, generator.decoder.num_ws)
    if inject is not None:
        other = draw_other(ctx, draws, count)
        codes = generator.mixed(codes, generator.map(other), inject)
    scene = generator.scene(codes, draws)
    with torch.no_grad():
        options = SdfOptions(ctx.config.render.sampling)
        volume = generator.render_volume(scene, camera, settings, draws, options, features=True)
    return scene, ray_image(volume.features, settings.resolution)


def draw_other(ctx: PhaseContext, draws: Draws, count: int) -> dict[str, Tensor]:
    """Latents of the second style."""
    generator: Any = ctx.models[GENERATOR]
    return phases.draw_latents(ctx, generator.latent_spec, draws.at(phase=f"{draws.phase}/mixed"), count)


def generate_pictures(ctx: PhaseContext) -> Tensor:
    """(N, 3, S, S) fresh pictures."""
    generator: Any = ctx.models[GENERATOR]
    scene, features = prepare(ctx, ctx.draws, ctx.count)
    return generator.decode(features, scene)


def draw_paths(ctx: PhaseContext, count: int) -> tuple[Tensor, Tensor]:
    """Pictures and the styles that they were made from."""
    generator: Any = ctx.models[GENERATOR]
    scene, features = prepare(ctx, ctx.draws, count)
    styles = scene.parts["styles"].contiguous()
    return generator.decode(features, scene.replace(styles=styles)), styles


def judge_pictures(ctx: PhaseContext) -> Losses:
    """Logistic loss of fakes and of real pictures, back-propagated one after the other."""
    judge = ctx.models[DISCRIMINATOR]
    with torch.no_grad():
        fakes = generate_pictures(ctx)
    logits = judge(fakes)
    ctx.log("fake_logit", logits)
    yield "fake", d_fake_loss(logits)
    del logits, fakes
    logits = judge(ctx.real.float_image())
    ctx.log("real_logit", logits)
    yield "real", d_real_loss(logits)


def judge_slope(ctx: PhaseContext) -> Losses:
    """R1 on real pictures."""
    real = ctx.real.float_image().requires_grad_()
    penalty = r1_penalty(real, ctx.models[DISCRIMINATOR](real), ctx.grad_scale())
    ctx.log("penalty", penalty)
    yield "r1", 0.5 * ctx.config.loss.r1 * penalty


def make_pictures(ctx: PhaseContext) -> Losses:
    """Non-saturating loss."""
    logits = ctx.models[DISCRIMINATOR](generate_pictures(ctx))
    ctx.log("fake_logit", logits)
    yield "adversarial", g_loss(logits)
