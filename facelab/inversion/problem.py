# SPDX-License-Identifier: Apache-2.0
"""What an inversion wants: pictures from known cameras, and how far a rendering is from them.

A loss is any function of a :class:`Moment`, one step of the optimisation; it can look at codes and noise, and render the
scene from cameras of its own. N photos are optimised side by side and know nothing of each other: losses are (N,).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from facelab.cameras import Camera
from facelab.draws import Draws
from facelab.generator import Codes, Generator, GeneratorOutput, Scene
from facelab.inversion.clock import Clock
from facelab.rendering.settings import RenderSettings

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """What N renderings should look like.

    Attributes:
        picture: (N, 3, S, S) in [-1, 1].
        camera: N cameras.
        scores: (N, K, S, S) in [-1, 1] that the generator's segmentation should have, or None.
        labels: (N, S, S) integers, the channel that should be the strongest, -1 unknown; or None.
    """

    picture: Tensor
    camera: Camera
    scores: Tensor | None = None
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        count, side = len(self.picture), tuple(self.picture.shape[2:])
        if self.picture.ndim != 4 or self.picture.shape[1] != 3 or len(self.camera) != count:
            raise ValueError(
                f"expected pictures (N, 3, S, S) and N cameras, got {tuple(self.picture.shape)} and {len(self.camera)}"
            )
        for name, value in (("scores", self.scores), ("labels", self.labels)):
            if value is not None and (len(value) != count or tuple(value.shape[-2:]) != side):
                raise ValueError(f"{name} must be of {count} pictures of {side} pixels, got {tuple(value.shape)}")

    def __len__(self) -> int:
        return len(self.picture)

    def to(self, device: torch.device | str) -> Target:
        """On another device."""
        scores, labels = (None if v is None else v.to(device) for v in (self.scores, self.labels))
        return Target(self.picture.to(device), self.camera.to(device), scores, labels)

    def __getitem__(self, index: int) -> Target:
        """One photo."""
        rows = slice(index, index + 1)
        scores, labels = (None if v is None else v[rows] for v in (self.scores, self.labels))
        return Target(self.picture[rows], self.camera[index], scores, labels)


@dataclass(frozen=True)
class Moment:
    """One step, as losses see it.

    Attributes:
        clock: where the optimisation stands; :attr:`step`, :attr:`steps`, :attr:`draws` and :meth:`host` are its own.
        target: what is wanted.
        codes: the rendered codes, perturbation included.
        offsets: what was found so far, by name of the code: the codes without perturbation minus the start; copy what is
            to be kept, they move on.
        noise: optimised noise maps (N, 1, H, W) by layer.
        scene: the scene of the codes.
        camera: the target's cameras, or where they have moved.
        view: renders the scene from cameras, with random numbers.
        memo: what :meth:`shared` computed.
    """

    clock: Clock
    target: Target
    codes: Codes
    offsets: Mapping[str, Tensor]
    noise: Mapping[str, Tensor]
    scene: Scene
    camera: Camera
    view: Callable[[Camera, Draws], GeneratorOutput]
    memo: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def step(self) -> int:
        """Number of the step."""
        return self.clock.step

    @property
    def steps(self) -> int:
        """In all."""
        return self.clock.steps

    @property
    def draws(self) -> Draws:
        """The step's random numbers."""
        return self.clock.draws

    def host(self, make: Callable[[Clock], T]) -> T:
        """Tensors computed on the CPU of step and draws, on the device: :meth:`Clock.host`."""
        return self.clock.host(make)

    @property
    def output(self) -> GeneratorOutput:
        """The rendering from the target's cameras, made when a loss first asks for it."""
        return self.shared("output", lambda: self.render(self.camera))

    @property
    def seen(self) -> GeneratorOutput | None:
        """:attr:`output` if it was made."""
        return self.memo.get("output")

    def render(self, camera: Camera, draws: Draws | None = None) -> GeneratorOutput:
        """The scene from other cameras; ``draws`` in place of the step's."""
        return self.view(camera, self.draws if draws is None else draws)

    def shared(self, name: str, make: Callable[[], Any]) -> Any:
        """What several losses need, computed once."""
        if name not in self.memo:
            self.memo[name] = make()
        return self.memo[name]


Term = Callable[[Moment], Tensor]  # -> (N,)


@dataclass(frozen=True)
class Weighted:
    """A loss and its factor."""

    weight: float
    term: Term


@dataclass(frozen=True)
class Problem:
    """Generator, target, losses.

    Attributes:
        generator: see :class:`~facelab.generator.Generator`; its weights stay.
        target: what is wanted.
        terms: losses by name.
        settings: of the rendering; random depths (``jitter``) are drawn for the whole batch.
        draws: where random numbers come from.
        make_scene: (codes, noise maps or None) -> scene; None: the generator's ``scene``.
        make_output: (scene, camera, settings, draws) -> pictures; None: the generator's ``render``.
        make_camera: (N, P) numbers of a view -> N cameras, where cameras are to be found too.
        start_view: (N, P) the numbers to start from.
    """

    generator: Generator
    target: Target
    terms: Mapping[str, Weighted]
    settings: RenderSettings
    draws: Draws = field(default_factory=lambda: Draws(0))
    make_scene: Callable[[Codes, Any], Scene] | None = None
    make_output: Callable[[Scene, Camera, RenderSettings, Draws], GeneratorOutput] | None = None
    make_camera: Callable[[Tensor], Camera] | None = None
    start_view: Tensor | None = None

    def camera(self, view_offset: Tensor | None = None) -> Camera:
        """The target's cameras, or those of the start view moved by (N, P) numbers."""
        if view_offset is None or self.make_camera is None or self.start_view is None:
            return self.target.camera
        return self.make_camera(self.start_view + view_offset)

    def clock(self, step: int, steps: int, stage: str) -> Clock:
        """A step of a stage."""
        return Clock(step, steps, self.draws.at(step=step, phase=stage), self.target.picture.device)

    def moment(
        self,
        codes: Codes,
        offsets: Mapping[str, Tensor],
        noise: Mapping[str, Tensor],
        camera: Camera,
        clock: Clock,
    ) -> Moment:
        """The scene of codes and noise, at a step."""
        make = self.generator.scene if self.make_scene is None else self.make_scene
        scene = make(codes, dict(noise) or None)
        render = self.generator.render if self.make_output is None else self.make_output

        def view(seen_from: Camera, numbers: Draws) -> GeneratorOutput:
            return render(scene, seen_from, self.settings, numbers)

        return Moment(clock, self.target, codes, offsets, noise, scene, camera, view)

    def losses(self, moment: Moment) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum (N,), and every term (N,) without its weight. ValueError for a term of another shape."""
        parts = {name: weighted.term(moment) for name, weighted in self.terms.items()}
        total = self.target.picture.new_zeros(len(self.target))
        for name, value in parts.items():
            if value.shape != total.shape:
                raise ValueError(f"the loss {name!r} must be ({len(total)},), one for each photo, got {value.shape}")
            total = total + self.terms[name].weight * value
        return total, parts
