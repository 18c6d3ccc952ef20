# SPDX-License-Identifier: Apache-2.0
"""The two stages of a FaceDNeRF run: codes of the frozen generator, then the generator around them.

States are kept in a folder per photo, and a run that goes on from them gives the numbers of an uninterrupted one: every
random number depends on seed, step and stage alone.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facelab.draws import Draws
from facelab.errors import Interrupted, UserError
from facelab.generator import Codes, GeneratorOutput
from facelab.inversion import schedules
from facelab.inversion import session as files
from facelab.inversion.loop import (
    Inversion,
    InversionSettings,
    NotFiniteError,
    Report,
    Solution,
    Stage,
    State,
    constant_rate,
)
from facelab.inversion.noise import normalise_noise
from facelab.inversion.problem import Problem, Target, Weighted
from facelab.inversion.recorded import warn
from facelab.inversion.session import Session
from facelab.inversion.start import CodeStatistics, numpy_latents, start_statistics
from facelab.inversion.tuning import Tuning, TuningSettings, tunable
from facelab.methods.facednerf.config import FaceDNeRFConfig
from facelab.methods.facednerf.model import Model, Recomputing, precision_of, tuned_parts
from facelab.methods.facednerf.terms import (
    SIDE,
    LightGoal,
    Networks,
    locality_term,
    make_terms,
    noise_weight,
    photo_terms,
)
from facelab.training.precision import device_switches

CODES, TUNE = "codes", "tune"  # names of the stages
LPIPS = "lpips_vgg"  # the distance whose values tune.stop_at means
THRIFT = (
    "memory.recompute=true, memory.max_points=500000, memory.superresolution=bf16, render.sample_factor=1, fewer photos "
    "side by side, or guidance.precision=bf16 and guidance.rows=1"
)


@dataclass(frozen=True)
class Step:
    """What a step hands to callbacks; everything detached.

    Attributes:
        stage: ``codes`` or ``tune``.
        photo: index of the photo that is tuned to, None in the first stage.
        step, steps: of this stage.
        total: (N,) weighted sum; parts: (N,) unweighted by name of the loss.
        front, side: (N, 3, S, S) what was rendered in this step, or None.
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
class Control:
    """How a run is watched, stored and stopped.

    Attributes:
        sessions: a folder for each photo, in which states are kept (``state.safetensors``, ``tuning.safetensors``) and
            from which they are gone on with; none: nothing is written.
        save_every, tuning_every: steps between two states of codes and of weights (three times the generator).
        on_step: called after each step.
        stop: asked before each step; True saves and raises :class:`facelab.errors.Interrupted`.
        draws: random numbers in place of those of ``config.seed``.
        say: told in one line, once for each stage, why its steps cannot be played back (``memory.cuda_graphs``).
    """

    sessions: Sequence[Session] = ()
    save_every: int = 50
    tuning_every: int = 100
    on_step: Callable[[Step], None] = lambda _: None
    stop: Callable[[], bool] = lambda: False
    draws: Draws | None = None
    say: Callable[[str], None] = warn


class Course:
    """One run for N photos.

    Args:
        model: an EG3D model; stays as it is.
        target: N photos of its picture size.
        config: what to do.
        networks: judges.
        goal: light to aim at.
        control: how it is watched.

    Raises:
        UserError: pictures of another size, a loss without its network, no loss at all, an unknown part to tune, another
            number of sessions than of photos.
    """

    def __init__(
        self,
        model: Model,
        target: Target,
        config: FaceDNeRFConfig,
        networks: Networks,
        goal: LightGoal | None = None,
        control: Control | None = None,
    ) -> None:
        self.model, self.config, self.networks, self.goal = model, config, networks, goal
        self.control = control or Control()
        self.target = target.to(model.device)
        self.draws = self.control.draws or Draws(config.seed)
        self.settings = model.settings(config)
        side, got = model.picture_side(self.settings), self.target.picture.shape[-1]
        if got != side:
            raise UserError(f"the photos have {got} pixels a side, expected the model's {side}; resize them")
        if self.control.sessions and len(self.control.sessions) != len(target):
            raise ValueError(f"expected a session for each of {len(target)} photos, got {len(self.control.sessions)}")
        tunable(model.generator, tuned_parts(model.generator, config.tune.parts))
        self.terms = make_terms(model, self.target, config, networks, goal)
        self.steps = 0

    def switches(self) -> contextlib.AbstractContextManager[None]:
        """What the device is told while the run lasts: TF32 or not, and to look for the fastest convolutions."""
        return device_switches(self.config.memory.precision, self.model.device)

    # ------------------------------------------------------------ codes

    @functools.cached_property
    def statistics(self) -> CodeStatistics:
        """Average and deviation of the codes of random latents under the front camera."""
        c = self.config
        z = numpy_latents(c.codes.start_seed, c.codes.start_samples, self.model.generator.latent_spec["z"][0])
        label = self.model.camera(c).label().float().to(self.model.device).expand(len(z), -1)
        return start_statistics(self.model.generator, {"z": z.to(label.device)}, label, repeated=("w",))

    def inversion(self, start: Codes | None = None) -> Inversion:
        """The first stage, at its beginning; ``start`` in place of the average."""
        c = self.config
        codes, spread = c.codes, self.statistics.deviation
        rate = functools.partial(
            schedules.ramped_rate, steps=codes.steps, base=codes.lr, rampdown=codes.rampdown, rampup=codes.rampup
        )

        def perturbation(step: int, name: str) -> float:
            return schedules.perturbation(step, codes.steps, spread[name], codes.perturbation)

        settings = InversionSettings(
            codes.steps,
            rate,
            perturbation=perturbation,
            keep_best=False,
            cuda_graphs=c.memory.cuda_graphs,
            say=self.control.say,
        )
        generator = self.model.movable(precision_of(c))
        problem = self._problem(generator, self.target, {**self.terms, **noise_weight(c)})
        return Inversion(
            problem,
            self.statistics.average if start is None else start,
            settings,
            shared=("w",) if codes.space == "w" else (),
            noise=self._drawn_noise("noise-start") if codes.noise_maps else None,
        )

    def find(self, start: Codes | None = None) -> Solution:
        """Run the first stage, from its states where there are any. Errors as :func:`facednerf.editing.edit`."""
        inversion = self.inversion(start)
        sessions = self.control.sessions
        states = [state for state in (session.read_state() for session in sessions) if state is not None]
        if states and len(states) != len(sessions):
            raise UserError("some photos were begun and others not, expected all or none; invert them in two calls")
        if states:
            with _naming(sessions[0] / files.STATE):
                inversion.restore(states)

        def save() -> None:
            for photo, session in enumerate(sessions):
                session.save_state(inversion.state(photo))

        self._drive(inversion, CODES, None, save, self.control.save_every)
        return inversion.present()

    # ------------------------------------------------------------ tuning

    def tune(self, solution: Solution, photo: int) -> Tuning:
        """Tune a copy of the generator to one photo; ``solution`` is that photo's alone, its noise maps are final then.

        Errors as :func:`facednerf.editing.edit`.
        """
        c = self.config
        tuning = self.tuning(solution, photo)
        noise = tuning.pivot.noise if c.reference.fresh_noise else {}
        session = self.control.sessions[photo] if self.control.sessions else None
        state = None if session is None else session.read_state(files.TUNING)
        if session is not None and state is not None:
            with _naming(session / files.TUNING), torch.no_grad():
                tuning.restore(state)
                for name, value in noise.items():
                    value.copy_(_stored_noise(state, name, value))

        def save() -> None:
            if session is not None:
                maps = {f"noise/{name}": value.cpu() for name, value in noise.items()}
                session.save_state({**tuning.state(), **maps}, files.TUNING)

        def after() -> None:
            for value in noise.values():
                normalise_noise(value, tuning.guard.flag)

        self._drive(tuning, TUNE, photo, save, self.control.tuning_every, after)
        tuning.problem.generator.requires_grad_(False)  # type: ignore[attr-defined]
        return tuning

    def tuning(self, solution: Solution, photo: int) -> Tuning:
        """The second stage of one photo, at its beginning."""
        c = self.config
        target = self.target[photo]
        if c.reference.fresh_noise:
            maps = {name: value[None, None].clone() for name, value in self._drawn_noise("noise-tune").items()}
            solution = Solution(solution.codes, maps, solution.camera, solution.view, solution.total)
        if c.tune.losses == "photo":
            terms = photo_terms(target, self.networks)
        elif len(self.target) == 1:
            terms = dict(self.terms)
        else:
            terms = make_terms(self.model, target, c, self.networks, self._goal_of(photo))
        generator: Any = self.model.movable(precision_of(c))
        if c.weights.locality:
            local = locality_term(self.model, generator, solution.codes, c, self.networks)
            terms["locality"] = Weighted(c.weights.locality, local)
        rate = (
            constant_rate(c.tune.lr)
            if c.tune.schedule == "constant"
            else functools.partial(schedules.ramped_rate, steps=c.tune.steps, base=c.tune.lr)
        )
        graphs, say = c.memory.cuda_graphs, self.control.say
        settings = TuningSettings(c.tune.steps, rate, enough=self._enough, cuda_graphs=graphs, say=say)
        problem = self._problem(generator, target, terms)
        return Tuning(problem, solution, settings, tuned_parts(generator, c.tune.parts))

    def _enough(self, report: Report) -> bool:
        t, net = self.config.tune, self.networks.perceptual
        wanted = t.losses == "photo" and t.stop_at > 0 and net is not None and net.metric == LPIPS
        return wanted and bool((report.parts["reconstruction"] <= t.stop_at).all())

    def _goal_of(self, photo: int) -> LightGoal | None:
        """The light of one photo."""
        goal, count = self.goal, len(self.target)
        if goal is None or count == 1:
            return goal

        def alone(side: Any) -> Tensor:
            wanted = goal(side)
            return wanted[photo : photo + 1] if wanted.ndim == 2 and len(wanted) == count else wanted

        return alone

    # ------------------------------------------------------------ both

    @torch.no_grad()
    def front(self, generator: Any, solution: Solution, noise: Mapping[str, Tensor] | None) -> GeneratorOutput:
        """Pictures from the target's cameras at fixed depths."""
        scene = generator.scene(solution.codes, noise)
        return generator.render(scene, solution.camera, self.settings.deterministic(), self.draws)

    def _problem(self, generator: Any, target: Target, terms: dict[str, Weighted]) -> Problem:
        if not self.config.memory.recompute:
            return Problem(generator, target, terms, self.settings, self.draws)
        thrifty = Recomputing(generator)
        return Problem(
            generator,
            target,
            terms,
            self.settings,
            self.draws,
            make_scene=thrifty.scene,
            make_output=thrifty.render,
        )

    def _drawn_noise(self, phase: str) -> dict[str, Tensor]:
        draws = self.draws.at(phase=phase)
        sizes = self.model.noise_sizes()
        return {name: draws.normal(f"noise/{name}", size).to(self.model.device) for name, size in sizes.items()}

    def _drive(
        self,
        stage: Any,
        name: str,
        photo: int | None,
        save: Callable[[], None],
        every: int,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Step until the end; saves now and then, when asked to stop, and before a step that is not finite."""
        while not stage.finished:
            try:
                if self.control.stop():
                    save()
                    raise Interrupted(
                        f"interrupted in stage {name} at step {stage.step} of {stage.steps}{self._kept()}"
                    )
                began = time.monotonic()
                with saying_what_helps(f"stage {name}, step {stage.step} of {stage.steps}"):
                    report = stage.advance()
                after()
                self.steps += 1
                if stage.finished:
                    stage.settle()
                if stage.step % every == 0 or stage.finished:
                    save()
            except NotFiniteError as error:
                save()  # the stage stands before the bad step
                raise UserError(f"{error}{self._kept()}") from error
            self._tell(stage, name, photo, report, time.monotonic() - began)

    def _kept(self) -> str:
        sessions = self.control.sessions
        return f"; the last good state is kept in {sessions[0].folder}" if sessions else ""

    def _tell(self, stage: Stage, name: str, photo: int | None, report: Report, seconds: float) -> None:
        front = None if report.seen is None else report.seen.rgb
        side = report.shared.get(SIDE)
        self.control.on_step(
            Step(name, photo, report.step, stage.steps, report.total, report.parts, front, side, seconds)
        )


@contextlib.contextmanager
def saying_what_helps(where: str) -> Iterator[None]:
    """Out of memory as a UserError that names the options which lower it."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise UserError(f"out of memory in {where}; lower it with {THRIFT}") from None


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file in front of what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}; remove it to begin this stage anew") from error


def _stored_noise(state: State, name: str, like: Tensor) -> Tensor:
    value = state.get(f"noise/{name}")
    if value is None or value.shape != like.shape:
        raise UserError(f"the stored state does not fit: expected the noise map '{name}' of {tuple(like.shape)}")
    return value.to(like)


def one_of(solution: Solution, photo: int) -> Solution:
    """The solution of one photo."""
    rows = slice(photo, photo + 1)
    view = None if solution.view is None else solution.view[rows]
    noise = {name: value[rows] for name, value in solution.noise.items()}
    return Solution(solution.codes[[photo]], noise, solution.camera[photo], view, solution.total[rows])
