# SPDX-License-Identifier: Apache-2.0
"""The optimisation of codes (and noise maps, and cameras) against a :class:`~facelab.inversion.problem.Problem`.

Codes are a fixed start plus an offset that begins at 0. The state of each photo is a dictionary of tensors that can be
written and read back; going on from it gives the numbers of an uninterrupted run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from facelab.cameras import Camera
from facelab.errors import UserError, nearest
from facelab.generator import Codes, GeneratorOutput
from facelab.inversion import recorded
from facelab.inversion.clock import Clock
from facelab.inversion.guard import FiniteGuard
from facelab.inversion.noise import normalise_noise
from facelab.inversion.problem import Moment, Problem
from facelab.inversion.recorded import Found, StepGraphs, warn
from facelab.inversion.schedules import ramped_rate

STEP, BEST_LOSS, VIEW = "step", "best_loss", "view"
STAGE = "inversion"  # in names of draws
MOMENTS = (("value", None), ("first", "exp_avg"), ("second", "exp_avg_sq"))  # in files, in Adam's state
State = dict[str, Tensor]


@dataclass(frozen=True)
class InversionSettings:
    """How a :class:`Inversion` goes.

    Attributes:
        steps: in all.
        rate: step -> learning rate of the codes; None: :func:`ramped_rate` from 0.01.
        noise_factor, view_factor: factors on it for noise maps and views.
        betas, weight_decay: Adam's; the decay pulls offsets to 0.
        perturbation: (step, name of a code) -> scale of normal noise added to that code, the same for every photo.
        keep_best: the result is the state of the lowest total loss, over the steps without perturbation; off: the
            last one.
        cuda_graphs: on a GPU, steps are queued at once and played back (:mod:`facelab.inversion.recorded`).
        say: where the reason is told, once, why steps cannot be played back.
    """

    steps: int = 500
    rate: Callable[[int], float] | None = None
    noise_factor: float = 1.0
    view_factor: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    perturbation: Callable[[int, str], float] | None = None
    keep_best: bool = True
    cuda_graphs: bool = False
    say: Callable[[str], None] = warn

    def rate_at(self, step: int) -> float:
        """Learning rate of the codes."""
        return ramped_rate(step, self.steps, 0.01) if self.rate is None else self.rate(step)


@dataclass(frozen=True)
class Report:
    """One step, detached.

    Attributes:
        step: its number.
        total: (N,) the loss; parts: (N,) each term, unweighted.
        seen: what was rendered from the target's cameras, None where no loss asked for that.
        shared: pictures that losses shared (``Moment.shared``) by name.
    """

    step: int
    total: Tensor
    parts: dict[str, Tensor]
    seen: GeneratorOutput | None
    shared: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(step: int, found: Found) -> Report:
        """Of what a step computed."""
        return Report(step, found.total, found.parts, found.seen, found.shared)

    @property
    def output(self) -> GeneratorOutput:
        """What was rendered. ValueError where no loss asked for it."""
        if self.seen is None:
            raise ValueError("no loss of this step looks at the target's cameras, so nothing was rendered from them")
        return self.seen


class NotFiniteError(UserError):
    """A step whose loss or derivative is not finite; nothing has moved since, and the stage stands at that step.

    On a GPU it is noticed some steps later, at the latest when the state is asked for or the stage ends.
    """


@dataclass(frozen=True)
class Solution:
    """What was found for N photos: codes, noise maps, cameras, and the (N, P) numbers of the views if they moved.

    ``total`` is NaN where it was not judged.
    """

    codes: Codes
    noise: dict[str, Tensor]
    camera: Camera
    view: Tensor | None
    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Stage:
    """Adam over named tensors, with a state that can be stored. Subclasses say what a step is.

    Attributes:
        graphs: what plays the steps back, or None; not there any more at the end.
    """

    def __init__(
        self,
        variables: Mapping[str, Tensor],
        steps: int,
        betas: tuple[float, float],
        decay: float,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.graphs = graphs
        self.variables = dict(variables)
        self.steps = steps
        self.step = 0
        groups: dict[str, dict[str, Any]] = {}  # what shares a rate moves in one go
        for name, value in self.variables.items():
            kind = name.partition("/")[0] if "/" in name or name == VIEW else ""
            groups.setdefault(kind, {"params": [], "kind": kind})["params"].append(value)
        # fused: one kernel for all, which obeys a flag on the device
        self.optimizer = torch.optim.Adam(list(groups.values()), lr=0.0, betas=betas, weight_decay=decay, fused=True)
        self.guard = FiniteGuard(next(iter(self.variables.values())).device)

    @property
    def finished(self) -> bool:
        """Whether all steps were made."""
        return self.step >= self.steps

    def _compute(self, problem: Problem, clock: Clock, work: Callable[[Clock], Moment]) -> Found:
        """Losses and their derivatives at the moment that ``work`` makes of a clock."""
        variables = [value for group in self.optimizer.param_groups for value in group["params"]]

        def step(now: Clock) -> Found:
            moment = work(now)
            total, parts = problem.losses(moment)
            return _found(total, parts, moment, variables)

        return step(clock) if self.graphs is None else self.graphs.run(type(self).__name__.lower(), clock, step)

    def _descend(self, found: Found, rate: Callable[[str], float]) -> None:
        """Take one step along what was computed; ``rate`` is the learning rate by kind: what stands before the slash in
        the names, empty without one.

        Raises:
            NotFiniteError: see :meth:`settle`.
        """
        gradients = iter(found.gradients)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(group["kind"])
            for value in group["params"]:
                value.grad = next(gradients)
        self.guard.record(self.step, torch.isfinite(found.largest), found.parts)
        self.optimizer.found_inf = self.guard.flag  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.settle(wait=self.finished)
        if self.finished:
            self.graphs = None  # and its memory

    def settle(self, wait: bool = True) -> None:
        """See whether all steps so far were finite.

        Args:
            wait: for the device; without it only what is known by now counts.

        Raises:
            NotFiniteError: loss or derivative of a step were not; names the losses. Nothing has moved since, and
                :attr:`step` is that step.
        """
        found = self.guard.found(wait)
        if found is None:
            return
        self.step, parts = found
        bad = [name for name, value in parts.items() if not bool(torch.isfinite(value).all())]
        what = f"the loss {', '.join(bad)}" if bad else "the derivative of the loss"
        raise NotFiniteError(f"{what} is not finite at step {self.step}; expected a number, try a lower learning rate")

    def _moments(self) -> State:
        """Values and Adam's moments by name."""
        found: State = {}
        for name, value in self.variables.items():
            kept = self.optimizer.state.get(value, {})
            for kind, theirs in MOMENTS:
                found[f"{kind}/{name}"] = (
                    value.detach() if theirs is None else kept.get(theirs, torch.zeros_like(value))
                )
        return found

    @torch.no_grad()
    def _restore_moments(self, state: Mapping[str, Tensor], step: int) -> None:
        for name, value in self.variables.items():
            read = {kind: _fitting(state, f"{kind}/{name}", value) for kind, _ in MOMENTS}
            value.copy_(read["value"])
            self.optimizer.state[value] = {
                "step": torch.tensor(float(step), dtype=torch.float32, device=value.device),
                "exp_avg": torch.empty_like(value).copy_(read["first"]),
                "exp_avg_sq": torch.empty_like(value).copy_(read["second"]),
            }
        self.step = step


class Inversion(Stage):
    """Finds codes for N photos.

    Args:
        problem: what is wanted.
        start: codes (1 or N, ...) to start from.
        settings: how.
        free: names of the codes that move; None: all.
        shared: names of codes (N, L, W) whose L vectors move as one (a W space).
        noise: maps to optimise, (H, W) or (N, 1, H, W) by layer; what the generator's ``scene`` takes as noise.
        move_view: also find the cameras; the problem then has ``make_camera`` and ``start_view``.

    Raises:
        UserError: an unknown code. ValueError: views without what makes cameras of them.
    """

    def __init__(
        self,
        problem: Problem,
        start: Codes,
        settings: InversionSettings | None = None,
        *,
        free: Collection[str] | None = None,
        shared: Collection[str] = (),
        noise: Mapping[str, Tensor] | None = None,
        move_view: bool = False,
    ) -> None:
        self.problem, self.settings, self.shared = problem, settings or InversionSettings(), frozenset(shared)
        count = len(problem.target)
        self.start = start.map(lambda v: v.detach().expand(count, *v.shape[1:]).clone())
        for name in [*(free or ()), *shared]:
            if name not in self.start.values:
                known = self.start.values
                raise UserError(f"no code '{name}', expected some of {', '.join(known)}.{nearest(name, known)}")
        variables = {}
        for name, value in self.start.values.items():
            if free is None or name in free:
                shape = (count, 1, *value.shape[2:]) if name in shared else value.shape
                variables[f"code/{name}"] = value.new_zeros(shape).requires_grad_()
        for name, value in (noise or {}).items():
            whole = value.detach().reshape(-1, 1, *value.shape[-2:]).expand(count, 1, *value.shape[-2:])
            variables[f"noise/{name}"] = whole.clone().requires_grad_()
        if move_view:
            if problem.make_camera is None or problem.start_view is None:
                raise ValueError("to move views, the problem needs make_camera and start_view")
            variables[VIEW] = torch.zeros_like(problem.start_view).requires_grad_()
        s = self.settings
        graphs = recorded.step_graphs(s.cuda_graphs, problem.target.picture.device, s.say)
        super().__init__(variables, s.steps, s.betas, s.weight_decay, graphs)
        self.best: State = {name: value.detach().clone() for name, value in variables.items()}
        self.best_loss = problem.target.picture.new_full((count,), torch.inf)

    def advance(self) -> Report:
        """One step. UserError where the loss is not finite."""
        step, clock = self.step, self.problem.clock(self.step, self.steps, STAGE)
        found = self._compute(self.problem, clock, functools.partial(self._moment, self.variables, perturbed=True))
        if not _perturbed(self.settings.perturbation, tuple(self.start.values), clock):
            self._remember(found.total)
        rate = self.settings.rate_at(step)
        factors = {"noise": self.settings.noise_factor, VIEW: self.settings.view_factor}
        self._descend(found, lambda kind: rate * factors.get(kind, 1.0))
        for name, value in self.variables.items():
            if name.startswith("noise/"):
                normalise_noise(value.detach(), self.guard.flag)
        return Report.of(step, found)

    @torch.no_grad()
    def solution(self) -> Solution:
        """What was found so far: of each photo the best step, the present one included (or the present one alone).

        NotFiniteError as :meth:`settle`.
        """
        self.settle()
        chosen = {name: value.detach() for name, value in self.variables.items()}
        total, parts = self._judge(chosen)
        if self.settings.keep_best:
            better = total <= self.best_loss
            chosen = {name: _where(better, value, self.best[name]) for name, value in chosen.items()}
            total, parts = self._judge(chosen)
        moved = chosen.get(VIEW)
        view = None if moved is None or self.problem.start_view is None else self.problem.start_view + moved
        codes, noise = self._codes(chosen), _named(chosen, "noise/")
        return Solution(codes, {k: v.clone() for k, v in noise.items()}, self.problem.camera(moved), view, total, parts)

    @torch.no_grad()
    def present(self) -> Solution:
        """Codes, noise maps and cameras as they stand after the last step, not judged. NotFiniteError as :meth:`settle`."""
        self.settle()
        now = {name: value.detach().clone() for name, value in self.variables.items()}
        moved = now.get(VIEW)
        view = None if moved is None or self.problem.start_view is None else self.problem.start_view + moved
        total = torch.full_like(self.best_loss, torch.nan)
        return Solution(self._codes(now), _named(now, "noise/"), self.problem.camera(moved), view, total)

    def state(self, photo: int) -> State:
        """Everything of one photo, on the CPU. NotFiniteError as :meth:`settle`."""
        self.settle()
        tensors = {**self._moments(), **{f"best/{name}": value for name, value in self.best.items()}}
        found = {name: value[photo : photo + 1].detach().cpu().clone() for name, value in tensors.items()}
        found[BEST_LOSS] = self.best_loss[photo : photo + 1].cpu().clone()
        return {**found, STEP: torch.tensor([self.step])}

    @torch.no_grad()
    def restore(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from the states of the N photos. UserError where they do not fit, or stand at different steps."""
        steps = {int(_fitting(state, STEP, torch.zeros(1, dtype=torch.int64))) for state in states}
        if len(steps) != 1 or len(states) != len(self.problem.target):
            raise UserError(f"states of {len(states)} photos at steps {sorted(steps)} cannot go on side by side")
        for state in states:
            for name, value in {**self._moments(), **{f"best/{k}": v for k, v in self.best.items()}}.items():
                _fitting(state, name, value[:1])
        joint = {name: torch.cat([state[name] for state in states]) for name in states[0] if name != STEP}
        self._restore_moments(joint, steps.pop())
        for name, value in self.best.items():
            value.copy_(joint[f"best/{name}"])
        self.best_loss.copy_(_fitting(joint, BEST_LOSS, self.best_loss))

    def _codes(self, variables: Mapping[str, Tensor], perturbations: Mapping[str, Tensor] | None = None) -> Codes:
        values = {}
        for name, value in self.start.values.items():
            offset = variables.get(f"code/{name}")
            if perturbations and name in perturbations:
                value = value + perturbations[name].to(value.dtype)
            values[name] = value if offset is None else value + offset
        return Codes(values)

    def _perturbations(self, clock: Clock) -> dict[str, Tensor]:
        """What is added to codes in a step, by name."""
        scale = self.settings.perturbation
        names = clock.decide(functools.partial(_perturbed, scale, tuple(self.start.values)))
        if scale is None or not names:
            return {}
        sizes = {name: tuple(self.start.values[name].shape[1:]) for name in names}
        shapes = {name: (1, 1, *size[1:]) if name in self.shared else (1, *size) for name, size in sizes.items()}
        return clock.host(functools.partial(_perturbation, scale, shapes))

    def _moment(self, variables: Mapping[str, Tensor], clock: Clock | None = None, perturbed: bool = False) -> Moment:
        clock = self.problem.clock(self.step, self.steps, STAGE) if clock is None else clock
        codes = self._codes(variables, self._perturbations(clock) if perturbed else None)
        offsets = {
            name: variables[f"code/{name}"].expand_as(value) if f"code/{name}" in variables else torch.zeros_like(value)
            for name, value in self.start.values.items()
        }
        camera = self.problem.camera(variables.get(VIEW))
        return self.problem.moment(codes, offsets, _named(variables, "noise/"), camera, clock)

    @torch.no_grad()
    def _judge(self, variables: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.problem.losses(self._moment(variables))

    @torch.no_grad()
    def _remember(self, total: Tensor) -> None:
        better = (total < self.best_loss) & (self.guard.flag == 0)
        self.best_loss = torch.where(better, total, self.best_loss)
        for name, value in self.variables.items():
            self.best[name] = _where(better, value, self.best[name])


def advance_until(
    stage: Any, stop: Callable[[], bool] = lambda: False, on_step: Callable[[Report], None] = lambda _: None
) -> bool:
    """Steps until the stage is finished or ``stop`` says so; whether it is finished."""
    while not stage.finished:
        if stop():
            return False
        on_step(stage.advance())
    return True


def constant_rate(rate: float) -> Callable[[int], float]:
    """The same learning rate at every step."""
    return functools.partial(_constant, rate)


def _constant(rate: float, step: int) -> float:
    return rate


def _found(total: Tensor, parts: Mapping[str, Tensor], moment: Moment, variables: Sequence[Tensor]) -> Found:
    """A step without its graph, with the derivative of the sum of ``total`` for each variable."""
    known = torch.autograd.grad(total.sum(), variables, allow_unused=True)
    gradients = [
        torch.zeros_like(value) if gradient is None else _laid_out(gradient, value)
        for gradient, value in zip(known, variables, strict=True)
    ]
    largest = torch.nn.utils.get_total_norm([total.detach(), *gradients], torch.inf)  # NaN where any is
    seen = None if moment.seen is None else moment.seen.map(torch.Tensor.detach)
    shared = {name: value.detach() for name, value in moment.memo.items() if isinstance(value, Tensor)}
    return Found(total.detach(), {k: v.detach() for k, v in parts.items()}, seen, shared, largest, gradients)


def _perturbed(scale: Callable[[int, str], float] | None, names: tuple[str, ...], clock: Clock) -> tuple[str, ...]:
    """Which codes a step perturbs."""
    return () if scale is None else tuple(name for name in names if scale(clock.step, name))


def _perturbation(
    scale: Callable[[int, str], float], shapes: Mapping[str, tuple[int, ...]], clock: Clock
) -> dict[str, Tensor]:
    draws = clock.draws.at(phase="perturb")
    return {name: scale(clock.step, name) * draws.normal(f"perturb/{name}", shape) for name, shape in shapes.items()}


def _named(variables: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in variables.items() if name.startswith(prefix)}


def _laid_out(gradient: Tensor, value: Tensor) -> Tensor:
    """In the memory order of ``value``, which fused kernels ask for even where a side is 1."""
    return gradient if gradient.stride() == value.stride() else torch.empty_like(value).copy_(gradient)


def _where(choice: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.where(choice.reshape(-1, *[1] * (first.ndim - 1)), first.detach(), second)


def _fitting(state: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A tensor of a state. UserError where it is missing, of another shape or not finite."""
    value = state.get(name)
    if value is None or value.shape != like.shape:
        got = "none" if value is None else tuple(value.shape)
        raise UserError(f"the stored state does not fit: expected '{name}' of shape {tuple(like.shape)}, got {got}")
    if name != BEST_LOSS and value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise UserError(f"the stored state is damaged: '{name}' holds NaN or infinite numbers")
    return value.to(like.device)
