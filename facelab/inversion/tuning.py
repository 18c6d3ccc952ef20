# SPDX-License-Identifier: Apache-2.0
"""Pivotal tuning (arXiv 2106.05744): codes stay, the generator's weights move a little until the picture fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from facelab.errors import UserError, nearest
from facelab.inversion import recorded
from facelab.inversion.clock import Clock
from facelab.inversion.loop import STEP, Report, Solution, Stage, State, _fitting
from facelab.inversion.problem import Moment, Problem
from facelab.inversion.recorded import warn
from facelab.inversion.schedules import ramped_rate


@dataclass(frozen=True)
class TuningSettings:
    """How a :class:`Tuning` goes.

    Attributes:
        steps: in all.
        rate: step -> learning rate; None: :func:`ramped_rate` from 3e-4.
        betas: Adam's.
        enough: looked at before the weights move; True ends the tuning without another move.
        cuda_graphs, say: as those of :class:`~facelab.inversion.loop.InversionSettings`.
    """

    steps: int = 100
    rate: Callable[[int], float] | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    enough: Callable[[Report], bool] | None = None
    cuda_graphs: bool = False
    say: Callable[[str], None] = warn

    def rate_at(self, step: int) -> float:
        """Learning rate."""
        return ramped_rate(step, self.steps, 3e-4) if self.rate is None else self.rate(step)


def tunable(generator: nn.Module, parts: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Parameters of the named parts: ``decoder``, ``field_net.texture`` ...; no part at all means every parameter.

    Raises:
        UserError: a part that the generator does not have, with the nearest name.
    """
    named = dict(generator.named_parameters())
    chosen: dict[str, nn.Parameter] = {}
    for part in parts:
        found = {name: value for name, value in named.items() if name == part or name.startswith(f"{part}.")}
        if not found:
            tops = sorted({name.partition(".")[0] for name in named})
            raise UserError(f"the generator has no part '{part}', expected {', '.join(tops)}.{nearest(part, tops)}")
        chosen.update(found)
    return {name: value for name, value in named.items() if name in chosen} if parts else named


class Tuning(Stage):
    """Moves weights of ``problem.generator`` in place (give it a copy) so that found codes fit better.

    Args:
        problem: its generator is an ``nn.Module``; one photo or several that share the weights.
        pivot: codes, noise and cameras that stay.
        settings: how.
        parts: see :func:`tunable`.
    """

    def __init__(
        self, problem: Problem, pivot: Solution, settings: TuningSettings | None = None, parts: Sequence[str] = ()
    ) -> None:
        generator: Any = problem.generator
        self.problem, self.pivot, self.settings = problem, pivot, settings or TuningSettings()
        generator.requires_grad_(False)
        chosen = tunable(generator, parts)
        for value in chosen.values():
            value.requires_grad_()
        s = self.settings
        graphs = recorded.step_graphs(s.cuda_graphs, problem.target.picture.device, s.say)
        super().__init__(chosen, s.steps, s.betas, 0.0, graphs)

    def advance(self) -> Report:
        """One step. UserError where the loss is not finite."""
        found = self._compute(self.problem, self._clock(), self._moment)
        report = Report.of(self.step, found)
        if self.settings.enough is not None and self.settings.enough(report):
            self.steps, self.graphs = self.step, None  # a tuning that goes on from here sees the same and ends as well
            return report
        rate = self.settings.rate_at(self.step)
        self._descend(found, lambda _: rate)
        return report

    @torch.no_grad()
    def losses(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Total and terms, (N,) each, with the present weights."""
        return self.problem.losses(self._moment(self._clock()))

    def state(self) -> State:
        """Weights, Adam's moments and the step, on the CPU. NotFiniteError as :meth:`settle`."""
        self.settle()
        found = {name: value.detach().cpu().clone() for name, value in self._moments().items()}
        return {**found, STEP: torch.tensor([self.step])}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a stored state. UserError where it does not fit."""
        step = int(_fitting(state, STEP, torch.zeros(1, dtype=torch.int64)))
        self._restore_moments(state, step)

    def _clock(self) -> Clock:
        return self.problem.clock(self.step, self.steps, "tuning")

    def _moment(self, clock: Clock) -> Moment:
        p = self.pivot
        nothing = {name: torch.zeros_like(value) for name, value in p.codes.values.items()}
        return self.problem.moment(p.codes, nothing, p.noise, p.camera, clock)
