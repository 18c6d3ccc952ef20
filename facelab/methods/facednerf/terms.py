# SPDX-License-Identifier: Apache-2.0
"""FaceDNeRF's losses as functions of a :class:`~facelab.inversion.problem.Moment` (arXiv 2306.00783, section 3).

Reconstruction and identity look at the front view, text and light at a random side view of the same planes, which is
rendered once for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from facelab.cameras import Camera
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.generator import Codes
from facelab.inversion.clock import Clock
from facelab.inversion.problem import Moment, Target, Term, Weighted
from facelab.inversion.terms import noise_term, perceptual_term, picture_term
from facelab.lighting import PRESETS, project, reference_light, to_dpr
from facelab.lighting.projection import REFERENCE_GRID, REFERENCE_SCALE, PolarFunction
from facelab.losses.identity import IdentityLoss
from facelab.losses.lighting import LightNet, light_distance
from facelab.losses.perceptual import PerceptualNet, at_most, perceptual_distance
from facelab.losses.reconstruction import picture_mse
from facelab.methods.facednerf.config import FaceDNeRFConfig
from facelab.methods.facednerf.model import Model

SIDE = "side"  # name of the side view's picture in reports
FRONT_LOSSES = ("identity", "reconstruction", "picture")
SIDE_LOSSES = ("text", "clip", "light")
PERCEPTUAL_SIDE = 256  # pixels at which the reconstruction is judged
FULL_SIDE = 1 << 16  # pixels: no picture is larger
HALFWAY = 0.5  # of the way from the pivot to random codes, where locality looks


@dataclass(frozen=True)
class Side:
    """One rendering from the side, as losses see it.

    Attributes:
        picture: (N, 3, S, S) in about [-1, 1], not clamped.
        draws: random numbers of the step.
    """

    picture: Tensor
    draws: Draws


@dataclass(frozen=True)
class SideView:
    """Where that is seen from, as lights to aim at see it; all on the CPU, so that nothing waits for the device.

    Attributes:
        camera: N cameras, the same for every photo.
        angles: horizontal and vertical angle away from the front, radians (the vertical one in EG3D's even measure).
        draws: random numbers of the step.
        progress: 0..1 of the stage.
        look: gives the picture.
    """

    camera: Camera
    angles: tuple[float, float]
    draws: Draws
    progress: float
    look: Callable[[], Tensor]

    @property
    def picture(self) -> Tensor:
        """(N, 3, S, S) in about [-1, 1], not clamped, on its device. A light that looks at it keeps the steps from being
        played back as CUDA graphs."""
        return self.look()


class TextLoss(Protocol):
    """:class:`~facelab.losses.score_distillation.ScoreDistillation` is one."""

    def loss(self, pictures: Tensor, draws: Draws, *, progress: Callable[[int], float]) -> Tensor:
        """(N, 3, S, S) in about [-1, 1] -> (N,), with derivative for pictures.

        ``progress``: step -> 0..1 of the stage; it is asked where numbers are drawn (``draws.host``), which know their
        step.
        """
        ...


class ClipLoss(Protocol):
    """:class:`~facelab.losses.clip_similarity.ClipSimilarity` is one."""

    def loss(self, pictures: Tensor) -> Tensor:
        """(N, 3, S, S) in about [-1, 1] -> (N,), with derivative for pictures."""
        ...


LightGoal = Callable[[SideView], Tensor]  # -> (9,) or (N, 9) DPR's numbers as that camera should see them, on the CPU


@dataclass(frozen=True)
class Networks:
    """Judges; one whose loss has weight 0 may be None.

    Attributes:
        perceptual: of the reconstruction.
        identity: portraits (N, 3, S, S) in [-1, 1] -> (N, D), such as ``nn.pretrained.arcface.FaceIdentity``.
        text: score distillation of the prompt.
        clip: similarity to the prompt.
        light: lightness (N, 1, S, S) in 0..1 -> (N, 9), such as ``nn.pretrained.light_estimator.LightEstimator``.
    """

    perceptual: PerceptualNet | None = None
    identity: Callable[[Tensor], Tensor] | None = None
    text: TextLoss | None = None
    clip: ClipLoss | None = None
    light: LightNet | None = None


# ---------------------------------------------------------------- light that is wanted


def world_light(light: Tensor) -> LightGoal:
    """A light that stays where it is while the camera moves.

    Args:
        light: (9,), (1, 9) or (N, 9) in world terms (:mod:`facelab.lighting`), what ``light_from_yaml`` returns.
    """
    known = (light if light.ndim > 1 else light[None]).detach().cpu().float()
    return lambda side: to_dpr(known, side.camera)


def reference_goal(function: str | PolarFunction, sampled: bool = False) -> LightGoal:
    """The original's light of a function of polar angle and azimuth: the camera's angles are added to both.

    Args:
        function: a name of :data:`facelab.lighting.PRESETS`, or any.
        sampled: from random directions in the cells of a grid, new ones at every step.
    """
    if isinstance(function, str) and function not in PRESETS:
        reference_light(function)  # says what is known
    chosen = PRESETS[function] if isinstance(function, str) else function

    def goal(side: SideView) -> Tensor:
        offsets = (side.angles[1], side.angles[0])
        jitter = side.draws.uniform("light", (REFERENCE_GRID, REFERENCE_GRID, 2)) if sampled else None
        return (REFERENCE_SCALE * project(chosen, offsets, jitter=jitter, phase=True)).float()

    return goal


# ---------------------------------------------------------------- losses


def side_view(model: Model, config: FaceDNeRFConfig, moment: Moment) -> Side:
    """The step's side view: rendered once, whoever asks first."""

    def make() -> Side:
        count = len(moment.target)
        camera = moment.host(lambda clock: _random_camera(model, config, count, _of_side(clock.draws))[0])
        draws = _of_side(moment.draws)
        picture = moment.render(camera, draws).rgb
        moment.shared(SIDE, lambda: picture)
        return Side(picture, draws)

    return moment.shared("side_view", make)


def side_place(model: Model, config: FaceDNeRFConfig, count: int, look: Callable[[], Tensor], clock: Clock) -> SideView:
    """From where the side view of a step is seen; ``look`` gives its picture."""
    draws = _of_side(clock.draws)
    camera, angles = _random_camera(model, config, count, draws)
    return SideView(camera, angles, draws, _share(clock.steps, clock.step), look)


def _of_side(draws: Draws) -> Draws:
    return draws.at(phase=f"{draws.phase}/side")


def _random_camera(
    model: Model, config: FaceDNeRFConfig, count: int, draws: Draws
) -> tuple[Camera, tuple[float, float]]:
    """``count`` times one camera at angles from the front that are drawn, and the angles; on the CPU."""
    u = draws.uniform("side", (2,)).double() - 0.5
    angles = (float(u[0]) * config.side.width, float(u[1]) * config.side.height)
    return model.camera(config, *angles).map(lambda x: x.expand(count, *x.shape[1:])), angles


def _share(steps: int, step: int) -> float:
    """0..1 of a stage."""
    return step / max(1, steps)


def make_terms(
    model: Model, target: Target, config: FaceDNeRFConfig, networks: Networks, goal: LightGoal | None
) -> dict[str, Weighted]:
    """The losses that have a weight, by name; with ``reference.all_losses`` also those that have none.

    Raises:
        UserError: a loss without its network or light, or no loss at all.
    """
    weights, made = config.active, {}
    makers = _makers(model, target, config, networks, goal)
    for name, (needed, make) in makers.items():
        weight = getattr(weights, name)
        missing = [what for what, value in needed.items() if value is None]
        if weight and missing:
            raise UserError(
                f"the loss '{name}' has weight {weight:g} but there is no {missing[0]}; give one or set weights.{name}=0"
            )
        if weight:
            made[name] = Weighted(weight, make())
        elif config.reference.all_losses and not missing and name not in _meaningless_names(config):
            made[name] = Weighted(0.0, _detached(make()))
    if not any(weighted.weight for weighted in made.values()):
        raise UserError("all weights are 0, so there is nothing to aim at; give one of them a weight")
    return made


def _makers(
    model: Model, target: Target, config: FaceDNeRFConfig, networks: Networks, goal: LightGoal | None
) -> dict[str, tuple[dict[str, Any], Callable[[], Term]]]:
    """name of the loss -> what it needs, what makes it."""
    n, side = networks, functools.partial(side_view, model, config)
    place = functools.partial(side_place, model, config, len(target))
    return {
        "identity": ({"identity network": n.identity}, lambda: _identity(_given(n.identity), target)),
        "reconstruction": (
            {"perceptual network": n.perceptual},
            lambda: perceptual_term(_given(n.perceptual), target, PERCEPTUAL_SIDE),
        ),
        "picture": ({}, lambda: picture_term),
        "text": ({"diffusion model with a prompt": n.text}, lambda: _text(_given(n.text), side)),
        "clip": ({"CLIP model with a prompt": n.clip}, lambda: _clip(_given(n.clip), side)),
        "light": (
            {"light estimator": n.light, "light to aim at": goal},
            lambda: _light(_given(n.light), _given(goal), side, place),
        ),
    }


def noise_weight(config: FaceDNeRFConfig) -> dict[str, Weighted]:
    """What keeps noise maps noise, in the stage that moves them."""
    wanted = config.codes.noise_maps and config.weights.noise
    return {"noise": Weighted(config.weights.noise, noise_term)} if wanted else {}


def photo_terms(target: Target, networks: Networks) -> dict[str, Weighted]:
    """Pivotal tuning as published with EG3D's public projector: squared difference and LPIPS of the whole picture.

    UserError without a perceptual network.
    """
    if networks.perceptual is None:
        raise UserError("tune.losses=photo needs a perceptual network; give one or set tune.losses=same")
    perceptual = perceptual_term(networks.perceptual, target, FULL_SIDE)
    return {"picture": Weighted(1.0, picture_term), "reconstruction": Weighted(1.0, perceptual)}


@torch.no_grad()
def front_losses(picture: Tensor, target: Target, config: FaceDNeRFConfig, networks: Networks) -> dict[str, Tensor]:
    """(N,) losses of pictures from the front that have a weight, unweighted."""
    weights, found = config.active, {}
    if weights.identity and networks.identity is not None:
        found["identity"] = IdentityLoss(networks.identity, target.picture)(picture)
    if weights.reconstruction and networks.perceptual is not None:
        sides = (at_most(target.picture, PERCEPTUAL_SIDE), at_most(picture, PERCEPTUAL_SIDE))
        found["reconstruction"] = perceptual_distance(networks.perceptual, *sides)
    if weights.picture:
        found["picture"] = picture_mse(picture, target.picture)
    return found


def locality_term(model: Model, generator: Any, pivot: Codes, config: FaceDNeRFConfig, networks: Networks) -> Term:
    """How far the tuned generator has moved elsewhere (after arXiv 2106.05744, section 3.3).

    Codes half way from the pivot to random ones are rendered from the step's side camera by both generators; the loss is
    the squared difference, plus the perceptual distance where there is a network.

    Args:
        model: with the generator as it was.
        generator: the one that is tuned.
        pivot: codes ``w`` (1, L, W).
    """
    settings, samples = model.settings(config), config.tune.locality_samples
    label = model.camera(config).label().float().to(model.device)

    def elsewhere(draws: Draws) -> tuple[Camera, Tensor]:
        camera, _ = _random_camera(model, config, samples, draws)
        return camera, draws.normal("z", (samples, *model.generator.latent_spec["z"]))

    def term(moment: Moment) -> Tensor:
        draws = moment.draws.at(phase=f"{moment.draws.phase}/locality")
        camera, z = draws.host(elsewhere, model.device)
        with torch.no_grad():
            random = model.generator.map({"z": z}, label)
            codes = Codes({"w": torch.lerp(pivot.values["w"], random.values["w"], HALFWAY)})
            before = model.generator.render(model.generator.scene(codes), camera, settings, draws).rgb
        after = generator.render(generator.scene(codes), camera, settings, draws).rgb
        loss = picture_mse(after, before)
        if networks.perceptual is not None:
            loss = loss + perceptual_distance(networks.perceptual, before, after)
        return loss.mean().expand(len(moment.target))

    return term


def _identity(embed: Callable[[Tensor], Tensor], target: Target) -> Term:
    loss = IdentityLoss(embed, target.picture)
    return lambda moment: loss(moment.output.rgb)


def _text(net: TextLoss, side: Callable[[Moment], Side]) -> Term:
    def term(moment: Moment) -> Tensor:
        seen = side(moment)
        return net.loss(seen.picture, seen.draws, progress=functools.partial(_share, moment.steps))

    return term


def _clip(net: ClipLoss, side: Callable[[Moment], Side]) -> Term:
    return lambda moment: net.loss(side(moment).picture)


def _light(
    net: LightNet,
    goal: LightGoal,
    side: Callable[[Moment], Side],
    place: Callable[[Callable[[], Tensor], Clock], SideView],
) -> Term:
    def term(moment: Moment) -> Tensor:
        picture = side(moment).picture
        look = moment.clock.beside(picture, "has a light to aim at that looks at the picture")
        wanted = moment.host(lambda clock: goal(place(look, clock)))
        return light_distance(net, picture, wanted.to(picture.dtype))

    return term


def _detached(term: Term) -> Term:
    # not without gradient: other losses may share the side view that this one asks for first
    return lambda moment: term(moment).detach()


def _meaningless_names(config: FaceDNeRFConfig) -> set[str]:
    return {
        name for name in (*FRONT_LOSSES, *SIDE_LOSSES) if getattr(config.weights, name) != getattr(config.active, name)
    }


def _given(value: Any) -> Any:
    assert value is not None
    return value
