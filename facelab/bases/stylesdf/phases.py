# SPDX-License-Identifier: Apache-2.0
"""Pieces of training on signed distances that StyleSDF and CNeRF share; what they need of a configuration is passed in.

N samples of a chunk, L and D number and width of the decoder's style codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from facelab.bases.stylesdf.losses import sphere_start
from facelab.cameras.camera import Camera
from facelab.cameras.rays import make_depth_rays
from facelab.cameras.sphere import SpherePrior, view_angles
from facelab.draws import Draws
from facelab.generator import sample_latents
from facelab.losses.path_length import path_length
from facelab.losses.sdf import eikonal_loss, minimal_surface_loss, viewpoint_loss
from facelab.rendering.sdf import Sampling, SdfRenderOutput
from facelab.rendering.settings import RenderSettings
from facelab.training.phases import AfterPhase, Losses, Phase, PhaseContext
from facelab.training.protocol import EmaSpec, Warmup
from facelab.training.schedule import Progress, linear

GENERATOR, PATH = "generator", "path"  # models, and optimisers of the first
PATH_LENGTH = "path_length"  # statistic: mean length of the batch


# ---------------------------------------------------------------- samples of a chunk


@dataclass(frozen=True)
class Share:
    """What a chunk contributes to ``total`` samples of a step.

    Attributes:
        count: samples, possibly none.
        weight: on their mean, so that the mean over the chunks is the mean over all samples.
    """

    count: int
    weight: float


def share_of(ctx: PhaseContext, total: int) -> Share:
    """Spread ``total`` samples over the chunks of a step, for phases that see fewer than a batch."""
    chunks = ctx.progress.batch_size // ctx.count
    count = (ctx.chunk + 1) * total // chunks - ctx.chunk * total // chunks
    return Share(count, count * chunks / total)


def draw_latents(ctx: PhaseContext, spec: Mapping[str, tuple[int, ...]], draws: Draws, count: int) -> dict[str, Tensor]:
    """Normal latents on the device, drawn on the CPU."""
    return ctx.host(lambda own: sample_latents(spec, own, count), draws)


def draw_cameras(ctx: PhaseContext, prior: SpherePrior, draws: Draws, count: int) -> Camera:
    """Random cameras on the device, drawn on the CPU."""
    return ctx.host(lambda own: prior.sample(own, count), draws)


def mixing_layer(ctx: PhaseContext, probability: float, layers: int) -> int | None:
    """From which layer, 1 ... layers - 1, the pictures of this step take another style; None: they do not.

    One coin and one layer for the whole batch, whatever its chunks.
    """

    def layer(draws: Draws, _: Progress) -> int | None:
        coin, place = draws.uniform("mixing", (2,)).tolist()
        if coin >= probability or layers < 2:
            return None
        return 1 + min(int(place * (layers - 1)), layers - 2)

    return ctx.decide(layer, ctx.draws.at(chunk=0))


# ---------------------------------------------------------------- losses


def viewpoint_penalty(ctx: PhaseContext, guess: Tensor | None, camera: Camera, weight: float) -> Tensor:
    """Weighted error of the azimuth and elevation (N, 2) that a discriminator reads off fakes; logs ``view``."""
    if not weight or guess is None:
        return torch.zeros((), device=ctx.device)
    error = viewpoint_loss(guess, view_angles(camera))
    ctx.log("view", error)
    return weight * error


def field_penalty(
    ctx: PhaseContext, volume: SdfRenderOutput, eikonal: float, surface: float, sharpness: float
) -> Tensor:
    """Weighted eikonal and minimal surface terms of a rendering; logs ``eikonal`` and ``surface``.

    Also logs ``inside``, the share of the samples that lie within a head: at 0 there is no surface left.

    Args:
        volume: with ``gradient`` (for the first) and ``sdf`` (for the second); a term without its values is left out,
            as for fields without a signed distance.
        eikonal, surface: weights, 0 = none.
        sharpness: see :func:`facelab.losses.sdf.minimal_surface_loss`.
    """
    total = torch.zeros((), device=ctx.device)
    if volume.sdf is not None:
        ctx.log("inside", (volume.sdf.detach() < 0).float())
    if eikonal and volume.gradient is not None:
        term = eikonal_loss(volume.gradient)
        ctx.log("eikonal", term)
        total = total + eikonal * term
    if surface and volume.sdf is not None:
        term = minimal_surface_loss(volume.sdf, sharpness)
        ctx.log("surface", term)
        total = total + surface * term
    return total


# ---------------------------------------------------------------- start as a sphere


@dataclass(frozen=True)
class SphereBatch:
    """Cameras and codes of the sphere initialisation.

    Attributes:
        prior: of the cameras.
        settings: near, far, samples and side of the renderings; its jitter is not looked at.
        sampling: depths that the points are stratified around.
        distances: latents -> points (N, R, S, 3) -> signed distance (N, R, S, 1) of their heads.
    """

    prior: SpherePrior
    settings: RenderSettings
    sampling: Sampling
    distances: Callable[[PhaseContext, dict[str, Tensor]], Callable[[Tensor], Tensor]]


def sphere_loss(ctx: PhaseContext, what: SphereBatch, draws: Draws, count: int, model: str = GENERATOR) -> Tensor:
    """Mean distance (0-d) of random heads from the sphere, at the training depths of random cameras."""
    latents = draw_latents(ctx, ctx.models[model].latent_spec, draws, count)  # type: ignore[arg-type]
    camera = draw_cameras(ctx, what.prior, draws, count)
    rays = make_depth_rays(camera, what.settings.resolution, what.settings.grid, what.settings.lock_view)
    return sphere_start(what.distances(ctx, latents), rays, what.settings, draws, what.sampling).loss


def sphere_anchor(ctx: PhaseContext, what: SphereBatch, strength: float, steps: int) -> Tensor:
    """Weighted distance from the sphere; it fades over ``steps``, and keeps a surface until there are colours."""

    def weight(progress: Progress) -> float:
        return strength * linear(progress.step, steps, 1.0, 0.0)

    if not ctx.decide(lambda _, progress: weight(progress) > 0):
        return torch.zeros((), device=ctx.device)
    draws = ctx.draws.at(phase=f"{ctx.draws.phase}/sphere")
    distance = sphere_loss(ctx, what, draws, ctx.count)
    ctx.log("sphere", distance)
    return ctx.schedule(weight) * distance


def sphere_warmup(
    steps: int, batch: int | None, describe: Callable[[Any], SphereBatch], model: str = GENERATOR
) -> Warmup | None:
    """The first steps of a volume stage: the field learns a sphere. None for 0 steps.

    Random numbers are those of (seed, step, chunk) and gradients are summed over processes, so all processes keep the
    same network (in the original each draws its own, and they differ ever after).

    Args:
        batch: samples of a step over all processes; None: as many as a training step has.
        describe: configuration -> what is rendered.
        model: the network that is trained, with the optimiser of the same name.
    """
    if not steps:
        return None

    def losses(ctx: PhaseContext) -> Losses:
        share = share_of(ctx, batch or ctx.progress.batch_size)
        if not share.count:
            return
        start = sphere_loss(ctx, describe(ctx.config), ctx.draws, share.count, model)
        yield "distance", share.weight * start

    return Warmup(steps, (Phase("sphere", (model,), model, losses, real=False),))


# ---------------------------------------------------------------- path length


class PathMean(nn.Module):
    """The running mean of path lengths, a network of a run without parameters: saved, resumed, equal on all processes."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))


@dataclass(frozen=True)
class PathSettings:
    """Path length regularisation of one step.

    Attributes:
        weight: of the penalty, without the factor for its interval.
        decay: share of a batch in the running mean.
        shrink: the batch is smaller by this factor, at least one sample.
    """

    weight: float
    decay: float
    shrink: int


def path_phase(
    every: int,
    settings: Callable[[Any], PathSettings],
    draw: Callable[[PhaseContext, int], tuple[Tensor, Tensor]],
    reduction: Literal["mean", "sum"] = "mean",
) -> Phase:
    """The lazy phase ``g_path`` of the generator; the method's networks need a :class:`PathMean` called ``path``.

    The running mean takes in the whole batch of all processes. The penalty of a chunk takes in the chunk alone, which
    differs by at most ``decay`` times the difference of their mean lengths.

    Args:
        draw: (context, N) -> pictures (N, 3, S, S) and the style codes (N, L, D) that they were made from, with graph.
    """

    def losses(ctx: PhaseContext) -> Losses:
        chosen = settings(ctx.config)
        share = share_of(ctx, max(1, ctx.progress.batch_size // chosen.shrink))
        if not share.count:
            ctx.statistic(PATH_LENGTH, torch.zeros((), device=ctx.device))
            return
        image, codes = draw(ctx, share.count)
        noise = ctx.draws.normal("path_noise", image.shape, ctx.device)
        mean: Any = ctx.models[PATH].mean
        found = path_length(image, codes, noise, mean, chosen.decay)
        length = share.weight * found.lengths.detach().mean()
        ctx.statistic(PATH_LENGTH, length)
        ctx.log("length", found.lengths)
        yield "penalty", chosen.weight * share.weight * found.penalty

    def after(state: AfterPhase) -> None:
        mean: Any = state.models[PATH].mean
        state.assign_(mean, torch.lerp(mean, state.statistics[PATH_LENGTH].to(mean), settings(state.config).decay))

    return Phase("g_path", (GENERATOR,), GENERATOR, losses, every=every, real=False, reduction=reduction, after=after)


# ---------------------------------------------------------------- average


def constant_average(decay: float, model: str = GENERATOR) -> EmaSpec:
    """An average with the same decay from the first step on; buffers are copied."""
    return EmaSpec(model, lambda progress: decay)
