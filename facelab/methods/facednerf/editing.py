# SPDX-License-Identifier: Apache-2.0
"""FaceDNeRF's procedures: reconstruct, edit and relight photos, and make heads from text alone (arXiv 2306.00783).

All are one loop: codes (and noise maps) of a frozen EG3D, then the generator around them, with losses of the front view
(the photo's camera) and of a random side view of the same planes::

    model = Model.of(facelab.load("models/ffhq.safetensors", "cuda"))
    target = Target(picture, camera)                      # (N, 3, S, S) in [-1, 1], 25-number cameras
    nets = Networks(perceptual=..., identity=..., light=...)
    found = relight(model, target, config, nets, light_from_text("left"))
    found.generators[0], found.codes, found.noise

N photos are optimised side by side in the first stage; the second tunes one generator for each, one after the other.
Random depths (``render.jitter``) are drawn for all photos together, so the last digits of a photo's numbers depend on its
place among them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from facelab.bases.eg3d.model import TriPlaneGenerator
from facelab.cameras import Camera
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.generator import Codes, GeneratorOutput, sample_latents
from facelab.inversion.problem import Target
from facelab.methods.facednerf.config import FaceDNeRFConfig
from facelab.methods.facednerf.course import Control, Course, Step, one_of, saying_what_helps
from facelab.methods.facednerf.model import Model, keep_noise
from facelab.methods.facednerf.terms import (
    FRONT_LOSSES,
    SIDE_LOSSES,
    LightGoal,
    Networks,
    SideView,
    front_losses,
    reference_goal,
    world_light,
)

__all__ = [
    "Control", "Edited", "LightGoal", "Model", "Networks", "SideView", "Step", "edit", "generate", "light_goal",
    "project", "relight",
]  # fmt: skip
RANDOM_START = 0.7  # of the way from the average to random codes


@dataclass(frozen=True)
class Edited:
    """What was found for N photos.

    Attributes:
        codes: ``w`` (N, L, W).
        noise: maps (N, 1, H, W) by layer of the backbone that belong to the codes; empty: the model's own.
        camera: N cameras.
        generators: one for each photo: a copy with that photo's noise maps stored in it, tuned if there was a second
            stage.
        front: renderings from the cameras by these generators, fixed depths.
        losses: (N,) of the front view at the end, by name, unweighted.
        steps: made by this call, in both stages.
    """

    codes: Codes
    noise: dict[str, Tensor]
    camera: Camera
    generators: tuple[TriPlaneGenerator, ...]
    front: GeneratorOutput
    losses: dict[str, Tensor]
    steps: int


def edit(
    model: Model,
    target: Target,
    config: FaceDNeRFConfig,
    networks: Networks,
    light: Tensor | LightGoal | str | None = None,
    control: Control | None = None,
    start: Codes | None = None,
) -> Edited:
    """Both stages with every loss that the configuration gives a weight.

    Args:
        model: stays as it is.
        target: N photos of the model's picture size and their cameras, on any device.
        networks: judges, on the model's device (that of the text may lie on another).
        light: what the side views should be lit by, see :func:`light_goal`.
        start: codes ``w`` (1 or N, L, W) to begin with; None: the average.

    Raises:
        UserError: a loss without its network, pictures of another size, states that do not fit, a step whose loss is not
            finite (the last good state is kept), out of memory (names the options that help).
        Interrupted: ``control.stop``; the states are saved.
    """
    goal = light_goal(light, config)
    with saying_what_helps("the networks"):
        return _run(Course(model, target, config, networks, goal, control), start)


def project(
    model: Model,
    target: Target,
    config: FaceDNeRFConfig,
    networks: Networks,
    control: Control | None = None,
    start: Codes | None = None,
) -> Edited:
    """The photo as it is: :func:`edit` with the losses of text and light left out."""
    return edit(model, target, without(config, *SIDE_LOSSES), networks, None, control, start)


def relight(
    model: Model,
    target: Target,
    config: FaceDNeRFConfig,
    networks: Networks,
    light: Tensor | LightGoal | str,
    control: Control | None = None,
    start: Codes | None = None,
) -> Edited:
    """The photo under another light: :func:`edit` without text."""
    return edit(model, target, without(config, "text", "clip"), networks, light, control, start)


def generate(
    model: Model,
    config: FaceDNeRFConfig,
    networks: Networks,
    count: int = 1,
    light: Tensor | LightGoal | str | None = None,
    control: Control | None = None,
    random_start: bool = True,
) -> Edited:
    """Heads from text (and light) alone: no photo, the front camera, no losses of the photo.

    Args:
        count: heads, each from a start of its own that ``config.seed`` and its number decide.
        random_start: False: all from the average.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    config = without(config, *FRONT_LOSSES)
    config = dataclasses.replace(config, tune=dataclasses.replace(config.tune, losses="same"))
    side = model.picture_side(model.settings(config))
    camera = model.camera(config).map(lambda x: x.expand(count, *x.shape[1:]))
    target = Target(torch.zeros(count, 3, side, side, device=model.device), camera)
    goal = light_goal(light, config)
    with saying_what_helps("the networks"):
        course = Course(model, target, config, networks, goal, control)
        return _run(course, random_codes(course, count) if random_start else None)


def light_goal(light: Tensor | LightGoal | str | None, config: FaceDNeRFConfig) -> LightGoal | None:
    """What the light of a side view is compared with.

    Args:
        light: a world light (9,) or (N or 1, 9) (what :func:`facelab.lighting.light_from_yaml` gives), a name of
            :data:`facelab.lighting.PRESETS`, or a function of the side view.

    Raises:
        UserError: an unknown name; the original's offsets or samples for a light that is no function of angles.
    """
    offsets, sampled = config.reference.light_offsets, config.reference.sampled_light
    if light is None or callable(light):
        return light
    if offsets or sampled:
        if not isinstance(light, str):
            raise UserError(
                "reference.light_offsets and reference.sampled_light are for named lights, got nine numbers; give a "
                "light by its name or leave these switches off"
            )
        if not offsets:
            raise UserError("reference.sampled_light needs reference.light_offsets too; set both or none")
        return reference_goal(light, sampled)
    if isinstance(light, str):
        from facelab.lighting import preset

        return world_light(preset(light))
    return world_light(light)


def without(config: FaceDNeRFConfig, *names: str) -> FaceDNeRFConfig:
    """The same run without some losses.

    >>> without(FaceDNeRFConfig(), "text").weights.text
    0.0
    """
    return dataclasses.replace(config, weights=dataclasses.replace(config.weights, **dict.fromkeys(names, 0.0)))


@torch.no_grad()
def random_codes(course: Course, count: int) -> Codes:
    """Starts of :func:`generate`: codes of random latents, drawn towards the average."""
    generator, device = course.model.generator, course.model.device
    drawn = [Draws(course.config.seed).at(phase="generate-start", chunk=i) for i in range(count)]
    z = torch.cat([sample_latents(generator.latent_spec, draws, 1, device)["z"] for draws in drawn])
    codes = generator.map({"z": z}, course.model.camera(course.config).label().float().to(device))
    average = course.statistics.average
    return codes.map(lambda w: torch.lerp(average.values["w"].to(w), w, RANDOM_START))


def _run(course: Course, start: Codes | None = None) -> Edited:
    with course.switches():
        return _both_stages(course, start)


def _both_stages(course: Course, start: Codes | None) -> Edited:
    solution = course.find(start)
    generators, noise, pictures, losses = [], [], [], []
    for photo in range(len(course.target)):
        alone = one_of(solution, photo)
        if course.config.tune.steps:
            tuning = course.tune(alone, photo)
            generator, alone = tuning.problem.generator, tuning.pivot
            del tuning  # and with it Adam's moments
        else:
            generator = course.model.copy()
        generator = course.model.as_it_was(generator)  # type: ignore[arg-type]
        keep_noise(generator, alone.noise)  # type: ignore[arg-type]
        pictures.append(course.front(generator, alone, None))
        losses.append(front_losses(pictures[-1].rgb, course.target[photo], course.config, course.networks))
        generators.append(generator)
        noise.append(alone.noise)
    return Edited(
        solution.codes,
        {name: torch.cat([maps[name] for maps in noise]) for name in noise[0]},
        solution.camera,
        tuple(generators),  # type: ignore[arg-type]
        GeneratorOutput.cat(pictures),
        {name: torch.cat([row[name] for row in losses]) for name in losses[0]},
        course.steps,
    )
