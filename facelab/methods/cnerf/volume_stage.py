# SPDX-License-Identifier: Apache-2.0
"""The first training stage: the volume renderer against a global discriminator and one of regions (section 3.4).

One batch of fakes serves both discriminators; the generator then makes its own. Before that, the base shape learns a
sphere, on all processes the same one.

Shape legend: N samples of a chunk, K regions, R side of the rendering.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from facelab.bases.stylesdf import phases
from facelab.bases.stylesdf.phases import SphereBatch, draw_cameras, draw_latents, sphere_warmup
from facelab.cameras.sphere import view_angles
from facelab.data.regions import fuse_regions
from facelab.draws import Draws
from facelab.generator import Codes, ray_image
from facelab.methods.cnerf.config import CnerfConfig
from facelab.methods.cnerf.losses import Portraits, Terms, generator_terms, global_terms, region_terms
from facelab.methods.cnerf.mixing import draw_choices
from facelab.methods.cnerf.model import CNerfGenerator
from facelab.rendering.sdf import SdfOptions, SdfRenderOutput
from facelab.training.phases import Losses, Phase, PhaseContext
from facelab.training.protocol import TrainStage

GENERATOR, GLOBAL, REGION = "generator", "d_global", "d_region"


@dataclass(frozen=True)
class Fakes:
    """Rendered portraits and (N, 2) azimuth and elevation that they are seen from, radians."""

    portraits: Portraits
    angles: Tensor


# ---------------------------------------------------------------- pieces that both stages share


def generator_of(ctx: PhaseContext) -> CNerfGenerator:
    """The generator of a run."""
    generator = ctx.models[GENERATOR]
    assert isinstance(generator, CNerfGenerator)
    return generator


def judged_at_once(config: Any) -> int:
    """Samples per pass of a discriminator."""
    return config.train.batch_chunk if config.discriminator.chunk is None else config.discriminator.chunk


def draw_codes(ctx: PhaseContext, draws: Draws, count: int, latents: dict[str, Tensor] | None = None) -> Codes:
    """Random codes; in most steps those of two heads, mixed region by region. Code ``decoder`` is the first head's.

    One coin for the whole batch, whatever its chunks; a choice for each sample and region.
    """
    return draw_pair(ctx, draws, count, latents)[0]


def draw_pair(
    ctx: PhaseContext, draws: Draws, count: int, latents: dict[str, Tensor] | None = None
) -> tuple[Codes, Codes | None]:
    """As :func:`draw_codes`, with the codes of the second head, or None where nothing is mixed."""
    generator = generator_of(ctx)
    first = generator.map(draw_latents(ctx, generator.latent_spec, draws, count) if latents is None else latents)
    share = ctx.config.loss.mixing
    if not ctx.decide(lambda own, _: float(own.uniform("mixing", ())) < share, draws.at(chunk=0)):
        return first, None
    again = draws.at(phase=f"{draws.phase}/second")
    second = generator.map(draw_latents(ctx, generator.latent_spec, again, count))
    regions = generator.config.field.regions
    choices = ctx.host(lambda own: draw_choices(own, regions, count), draws)
    return generator.mixed(first, second, choices), second


def real_portraits(ctx: PhaseContext) -> Portraits:
    """Pictures of the data with their masks, which are fused on the device; once for all phases of a step."""

    def make(_: Draws) -> Portraits:
        masks = fuse_regions(ctx.real.label_map, reference=ctx.config.reference.lopsided_brows)
        return Portraits(ctx.real.float_image(), masks)

    return ctx.shared("real", make)


def rendered_portraits(volume: SdfRenderOutput, side: int) -> Portraits:
    """A volume rendering as pictures (N, 3, R, R) and masks (N, K, R, R)."""
    assert volume.semantics is not None
    return Portraits(ray_image(2 * volume.rgb - 1, side), ray_image(volume.semantics, side))


def log_terms(ctx: PhaseContext, terms: Terms) -> None:
    """Each weighted term by its name."""
    for name, value in vars(terms).items():
        ctx.log(name, value)


# ---------------------------------------------------------------- the stage


class VolumeStage:
    """Sphere initialisation, then the phases ``d_global``, ``d_region`` and ``g``."""

    def __init__(self, config: CnerfConfig) -> None:
        self.config = config

    def stage(self) -> TrainStage:
        """The whole."""
        return TrainStage("volume", tuple(self.phases()), warmup=sphere_warmup(self.config.sphere.steps, None, sphere))

    def phases(self) -> list[Phase]:
        """In the order of an iteration; without weight, regions are not judged."""
        c = self.config
        found = [Phase("d_global", (GLOBAL,), GLOBAL, self.d_global, chunk=judged_at_once)]
        if c.loss.semantic > 0:
            found.append(Phase("d_region", (REGION,), REGION, self.d_region, chunk=judged_at_once))
        reduction = "sum" if c.reference.sum_chunks else "mean"
        found.append(Phase("g", (GENERATOR,), GENERATOR, self.g, real=False, reduction=reduction))
        return found

    def render(self, ctx: PhaseContext, draws: Draws, options: SdfOptions) -> tuple[Fakes, SdfRenderOutput]:
        """Fresh heads from fresh cameras."""
        c, generator = ctx.config, generator_of(ctx)
        camera = draw_cameras(ctx, c.camera.prior(), draws, ctx.count)
        scene = generator.scene(draw_codes(ctx, draws, ctx.count))
        settings = c.render.settings(c.camera.radius, training=True)
        volume = generator.render_volume(scene, camera, settings, draws, options, features=False)
        return Fakes(rendered_portraits(volume, settings.resolution), view_angles(camera)), volume

    def fakes(self, ctx: PhaseContext) -> Fakes:
        """What both discriminators judge in a step."""
        options = SdfOptions(ctx.config.model.sampling)
        return ctx.shared("fakes", lambda draws: self.render(ctx, draws, options)[0])

    def regions(self, ctx: PhaseContext) -> Tensor:
        """(N,) a random region for each sample."""
        count = generator_of(ctx).config.field.regions
        return ctx.host(lambda draws: (count * draws.uniform("region", (ctx.count,))).long().clamp_max(count - 1))

    # ---------------------------------------------------------------- losses

    def d_global(self, ctx: PhaseContext) -> Losses:
        """Logistic loss, R1 on picture and masks, the view of fakes."""
        fakes = self.fakes(ctx)
        judge: Any = ctx.models[GLOBAL]
        terms = global_terms(judge, real_portraits(ctx), fakes.portraits, fakes.angles, ctx.config.loss)
        log_terms(ctx, terms)
        yield "total", terms.total

    def d_region(self, ctx: PhaseContext) -> Losses:
        """Logistic loss, R1 on picture and channel, the region of reals and fakes: the same one for both."""
        judge: Any = ctx.models[REGION]
        fakes, real = self.fakes(ctx).portraits, real_portraits(ctx)
        terms = region_terms(judge, real, fakes, self.regions(ctx), ctx.config.loss)
        log_terms(ctx, terms)
        yield "total", terms.total

    def g(self, ctx: PhaseContext) -> Losses:
        """What both discriminators say of fresh fakes, and the regularity of the distance."""
        fakes, volume = self.render(ctx, ctx.draws, SdfOptions(ctx.config.model.sampling, True, "layers"))
        assert volume.sdf is not None and volume.gradient is not None
        whole, one = (ctx.models[name] for name in (GLOBAL, REGION))
        terms = generator_terms(
            whole, one, fakes.portraits, fakes.angles, volume.sdf, volume.gradient, self.regions(ctx), ctx.config.loss
        )
        log_terms(ctx, terms)
        ctx.log("beta", generator_of(ctx).field_net.beta)
        ctx.log("inside", (volume.sdf.detach() < 0).float())  # share of the samples; at 0 there is no surface left
        yield "total", terms.total + sphere_anchor(ctx)


def sphere_anchor(ctx: PhaseContext) -> Tensor:
    """Weighted distance of whole heads from the sphere; it fades, and keeps a surface until there are colours."""
    loss = ctx.config.loss
    return phases.sphere_anchor(ctx, sphere(ctx.config, whole=True), loss.sphere, loss.sphere_steps)


def sphere(config: CnerfConfig, whole: bool = False) -> SphereBatch:
    """What the sphere initialisation looks at: random heads, of which it trains base shape and mapping.

    With ``sphere.residuals`` the whole distance becomes a sphere's, and the regions are trained too; ``whole`` looks at
    the whole distance without training the base.
    """

    def distances(ctx: PhaseContext, latents: dict[str, Tensor]) -> Any:
        generator = generator_of(ctx)
        scene = generator.scene(draw_codes(ctx, ctx.draws, len(latents["z"]), latents))
        if whole or config.sphere.residuals:
            return generator.field(scene.replace(base_gradient=not whole)).distances
        return lambda points: generator.base_distance(scene, points)

    settings = config.render.settings(config.camera.radius, training=True)
    return SphereBatch(config.camera.prior(), settings, config.model.sampling, distances)
