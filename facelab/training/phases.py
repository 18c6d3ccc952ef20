# SPDX-License-Identifier: Apache-2.0
"""Phases: the pieces of one iteration, each with the networks it trains and the losses it yields."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from facelab.draws import Draws
from facelab.tensors import map_tensors, moved
from facelab.training.schedule import Progress

Losses = Iterator[tuple[str, Tensor]]
T = TypeVar("T")
H = TypeVar("H", bound=Hashable)


@dataclass(frozen=True)
class Phase:
    """One part of an iteration: losses, what they train, with which optimiser, how often.

    ``losses(ctx)`` is called once per chunk and yields ``(name, scalar)``: the mean over the chunk. Each scalar is
    back-propagated as it comes and its graph is freed, so a phase may yield several (real, fake, penalty) without
    holding all graphs at once. Do not yield inside ``with torch.no_grad()`` or ``torch.autocast`` blocks.

    Attributes:
        name: unique in its training stage; also the name of its random draws.
        trains: names of the models whose parameters get gradients; all others are frozen.
        optimizer: name of the optimiser that steps afterwards.
        losses: the function above.
        every: runs at steps that are multiples of it, with losses multiplied by it (lazy regularisation).
        real: False if the phase needs no real batch (``ctx.real`` is None then).
        reduction: ``"mean"`` weighs chunks so that they equal one big batch; ``"sum"`` adds the means of the chunks
            of one process, as pi-GAN's generator step does (a ``reference`` switch).
        chunk: config -> samples per chunk of this phase; None = ``train.batch_chunk``.
        after: called once per step on every process after the gradients are reduced, with the statistics that
            ``ctx.statistic`` collected (mapping average, augmentation strength); see :class:`AfterPhase`.
        exact: single precision without TF32 and autocast, whatever ``train.precision`` says.
    """

    name: str
    trains: tuple[str, ...]
    optimizer: str
    losses: Callable[[PhaseContext], Losses]
    every: int = 1
    real: bool = True
    reduction: Literal["mean", "sum"] = "mean"
    chunk: Callable[[Any], int] | None = None
    after: Callable[[AfterPhase], None] | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"phase {self.name!r}: every must be at least 1, got {self.every}")
        if isinstance(self.trains, str) or not self.trains:
            raise ValueError(f"phase {self.name!r}: trains must be a tuple of model names, got {self.trains!r}")
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"phase {self.name!r}: reduction must be 'mean' or 'sum', got {self.reduction!r}")

    def precision(self, run: str) -> str:
        """``train.precision`` of the run, or ``fp32``."""
        return "fp32" if self.exact else run


@dataclass
class SharedResults:
    """What phases of one step share, by (name, first sample); emptied at the end of the step."""

    values: dict[tuple[str, int], tuple[int, Any]] = field(default_factory=dict)

    def get(self, name: str, first: int, count: int, make: Callable[[], Any]) -> Any:
        """The result made earlier in this step for these samples, or a new one, without graph."""
        key = (name, first)
        if key not in self.values:
            with torch.no_grad():
                self.values[key] = (count, detach(make()))
        size, value = self.values[key]
        if size != count:
            raise ValueError(f"shared {name!r} was made for chunks of {size} samples, asked for {count}; use one size")
        return value

    def clear(self) -> None:
        self.values.clear()


class Sums:
    """Weighted sums of device tensors by name; nothing here waits for the device."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}

    def add(self, name: str, value: Tensor | float, weight: float) -> None:
        tensor = torch.tensor(float(value)) if isinstance(value, (int, float)) else value.detach()
        scaled = tensor.to(torch.float32 if tensor.dtype != torch.float64 else torch.float64) * weight
        self.totals[name] = self.totals[name] + scaled if name in self.totals else scaled
        self.weights[name] = self.weights.get(name, 0.0) + weight

    def clear(self) -> None:
        self.totals.clear()
        self.weights.clear()


@dataclass
class PhaseContext:
    """What a phase sees of the loop, for one chunk.

    Attributes:
        progress: step, images, fades.
        config: the configuration of the curriculum row in force.
        models: every network of the method by name.
        device: where the phase runs.
        count: samples in this chunk.
        chunk: number of the chunk within the step, counted across processes.
        first: number of the chunk's first sample within the step (``chunk * count``).
        draws: random numbers of (seed, step, phase, chunk).
        real: real samples of this chunk on the device, or None if the phase has ``real=False``.
    """

    progress: Progress
    config: Any
    models: Mapping[str, nn.Module]
    device: torch.device
    count: int
    chunk: int
    first: int
    draws: Draws
    real: Any
    _shared: SharedResults
    _log: Sums
    _statistics: Sums
    _scale: Tensor
    _autocast: Callable[[bool], AbstractContextManager]

    @property
    def step(self) -> int:
        return self.progress.step

    def shared(self, name: str, make: Callable[[Draws], Any]) -> Any:
        """One result for all phases of this step, without graph: the fakes of two discriminators.

        ``make(draws)`` runs under no_grad for the first phase that asks, with draws that do not depend on which
        phase that is; the result (tensors, containers or dataclasses of them) is released when the step ends.
        """
        draws = self.draws.at(phase=f"shared/{name}")
        return self._shared.get(name, self.first, self.count, lambda: make(draws))

    def log(self, name: str, value: Tensor | float) -> None:
        """Average a value over samples, chunks, processes and the steps between two lines of the log."""
        mean = value if isinstance(value, (int, float)) else value.detach().float().mean()
        self._log.add(name, mean, self.count)

    def statistic(self, name: str, value: Tensor) -> None:
        """Collect a chunk mean of any shape; ``Phase.after`` gets the mean over the whole batch of all processes."""
        self._statistics.add(name, value, self.count)

    def grad_scale(self) -> Tensor:
        """The loss scale, a scalar tensor (1 unless fp16): R1 differentiates ``logits.sum() * scale`` outside
        autocast and divides the gradient by it, so that half-precision gradients do not vanish."""
        return self._scale

    def host(self, make: Callable[[Draws], T], draws: Draws | None = None) -> T:
        """Tensors computed of draws on the CPU, on the device; see :meth:`facelab.draws.Draws.host`."""
        return (self.draws if draws is None else draws).host(make, self.device)

    def schedule(self, make: Callable[[Progress], float]) -> Tensor:
        """A number that changes with the progress (a weight, a probability), as a scalar tensor on the device."""
        return moved(torch.tensor(make(self.progress), dtype=torch.float32), self.device)

    def decide(self, make: Callable[[Draws, Progress], H], draws: Draws | None = None) -> H:
        """What Python branches on: a coin of the draws on the CPU, a resolution that follows the progress."""
        return make(self.draws if draws is None else draws, self.progress)

    def autocast(self, enabled: bool = True) -> AbstractContextManager:
        """The run's autocast, or none: ``with ctx.autocast(False): ...`` for parts that need fp32."""
        return self._autocast(enabled)


@dataclass
class AfterPhase:
    """What ``Phase.after`` sees; it may change buffers, through :meth:`assign_` only.

    Attributes:
        statistics: name -> mean over the whole batch of all processes, on the device.
        accepted: 1.0 if this phase's gradients were finite, else 0.0; a scalar tensor on the device.
    """

    progress: Progress
    config: Any
    models: Mapping[str, nn.Module]
    statistics: Mapping[str, Tensor]
    accepted: Tensor

    @torch.no_grad()
    def assign_(self, buffer: Tensor, value: Tensor) -> None:
        """``buffer <- value``, unless the step was rejected or a value is not finite."""
        value = value.to(buffer.dtype)
        good = (self.accepted > 0) & torch.isfinite(value).all()
        buffer.copy_(torch.where(good, value, buffer))


def detach(value: Any) -> Any:
    """Tensors without graph, inside tuples, lists, dicts and dataclasses too."""
    return map_tensors(Tensor.detach, value)
