# SPDX-License-Identifier: Apache-2.0
"""FaceDNeRF's procedures: reconstruct, edit and relight photos, and make heads from text alone (arXiv 2306.00783).

All are one loop: codes (and noise maps) of a frozen EG3D, then the generator around them, with losses of the front view
(the photo's camera) and of a random side view of the same planes.

    model = facelab.load("models/ffhq.safetensors", "cuda")
    target = Target(picture, camera)                      # (N, 3, S, S) in [-1, 1], 25-number cameras
    nets = Networks(perceptual=..., identity=..., light=...)
    found = relight(Model.of(model), target, config, nets, light)
    found.generators[0], found.codes, found.noise

N photos are optimised side by side in the first stage; the second tunes one generator for each, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from facelab.bases.eg3d.config import RenderConfig as ModelRenderConfig
from facelab.bases.eg3d.config import ViewConfig
from facelab.bases.eg3d.model import TriPlaneGenerator
from facelab.cameras import Camera
from facelab.draws import Draws
from facelab.generator import Codes, GeneratorOutput
from facelab.inversion.problem import Target
from facelab.inversion.session import Session
from facelab.losses.perceptual import PerceptualNet
from facelab.methods.facednerf.config import FaceDNeRFConfig


@dataclass(frozen=True)
class Model:
    """An EG3D generator with what its configuration says of cameras and rendering.

    Attributes:
        generator: on its device; never changed (tuning works on a copy).
        view: where cameras stand: radius, pivot, focal length.
        render: range of depths, samples per ray.
    """

    generator: TriPlaneGenerator
    view: ViewConfig = field(default_factory=ViewConfig)
    render: ModelRenderConfig = field(default_factory=ModelRenderConfig)

    @staticmethod
    def of(face: Any) -> Model:
        """Of a :class:`facelab.api.FaceModel`. UserError unless it is an EG3D model."""
        raise NotImplementedError


@dataclass(frozen=True)
class SideView:
    """One rendering from the side, as losses see it.

    Attributes:
        picture: (N, 3, S, S) in about [-1, 1], not clamped.
        camera: 1 camera, the same for every photo.
        angles: horizontal and vertical angle away from the front, radians (the vertical one in EG3D's even measure).
        draws: random numbers of the step.
    """

    picture: Tensor
    camera: Camera
    angles: tuple[float, float]
    draws: Draws


class TextLoss(Protocol):
    """``losses.score_distillation.ScoreDistillation`` or a CLIP similarity with the prompt filled in."""

    def loss(self, pictures: Tensor, draws: Draws) -> Tensor:
        """(N, 3, S, S) in [-1, 1] -> (N,), with gradient for pictures."""
        ...


LightGoal = Callable[[SideView], Tensor]  # -> (N or 1, 9) in the frame of DPR as that camera sees it


@dataclass(frozen=True)
class Networks:
    """Judges; one whose loss has weight 0 may be None.

    Attributes:
        perceptual: of the reconstruction.
        identity: pictures (N, 3, S, S) in [-1, 1] -> unit vectors (N, D); ArcFace on the part that holds the face.
        text: score distillation of the prompt.
        clip: CLIP similarity to the prompt.
        light: pictures (N, 3, S, S) in [-1, 1] -> (N, 9) estimated light in DPR's frame.
    """

    perceptual: PerceptualNet | None = None
    identity: Callable[[Tensor], Tensor] | None = None
    text: TextLoss | None = None
    clip: TextLoss | None = None
    light: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Step:
    """What a step hands to callbacks; everything detached.

    Attributes:
        stage: ``codes`` or ``tune``; photo: index of the tuned photo, None in the first stage.
        step, steps: of this stage.
        total: (N,) weighted sum; parts: (N,) unweighted by name of the loss.
        front, side: what was rendered in this step, or None.
        seconds: the step took.
    """

    stage: str
    photo: int | None
    step: int
    steps: int
    total: Tensor
    parts: dict[str, Tensor]
    front: Tensor | None
    side: Tensor | None
    seconds: float


@dataclass(frozen=True)
class Edited:
    """What was found for N photos.

    Attributes:
        codes: ``w`` (N, L, W).
        noise: maps (N, 1, H, W) by layer of the backbone; empty: the generator's own.
        camera: N cameras.
        generators: one for each photo: a tuned copy with that photo's noise maps stored in it, or (without second stage)
            a copy with its maps.
        front: renderings from the cameras, fixed depths.
        losses: (N,) by name at the end, unweighted.
        steps: made in both stages, of this call.
    """

    codes: Codes
    noise: dict[str, Tensor]
    camera: Camera
    generators: tuple[TriPlaneGenerator, ...]
    front: GeneratorOutput
    losses: dict[str, Tensor]
    steps: int


@dataclass(frozen=True)
class Control:
    """How a run is watched, stored and stopped.

    Attributes:
        sessions: a folder for each photo, in which states are kept (``state.safetensors``, ``tuning.safetensors``) and
            from which they are gone on with; none: nothing is written.
        save_every: steps between two states.
        on_step: called after each step.
        stop: asked before each step; True saves and raises :class:`facelab.errors.Interrupted`.
    """

    sessions: Sequence[Session] = ()
    save_every: int = 50
    on_step: Callable[[Step], None] = lambda _: None
    stop: Callable[[], bool] = lambda: False


def edit(
    model: Model,
    target: Target,
    config: FaceDNeRFConfig,
    networks: Networks,
    light: LightGoal | None = None,
    control: Control | None = None,
) -> Edited:
    """Both stages with every loss that the configuration gives a weight.

    Raises:
        UserError: a loss without its network, pictures of another size than the generator's, states that do not fit, a
            step whose loss is not finite (the last good state is kept), out of memory (names the options that help).
        Interrupted: ``control.stop``; the states are saved.
    """
    raise NotImplementedError


def project(
    model: Model, target: Target, config: FaceDNeRFConfig, networks: Networks, control: Control | None = None
) -> Edited:
    """The photo as it is: :func:`edit` with the losses of text and light left out."""
    raise NotImplementedError


def relight(
    model: Model,
    target: Target,
    config: FaceDNeRFConfig,
    networks: Networks,
    light: LightGoal,
    control: Control | None = None,
) -> Edited:
    """The photo under another light: :func:`edit` without text."""
    raise NotImplementedError


def generate(
    model: Model,
    config: FaceDNeRFConfig,
    networks: Networks,
    count: int = 1,
    light: LightGoal | None = None,
    control: Control | None = None,
    random_start: bool = True,
) -> Edited:
    """Heads from text (and light) alone: no photo, the front camera, losses of the photo left out.

    Args:
        count: heads, each from a start of its own (``config.seed`` + number); ``random_start`` False: from the average.
    """
    raise NotImplementedError
