# SPDX-License-Identifier: Apache-2.0
"""What the loop asks of a method: networks, training stages, optimisers, averages, data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import nn

from facelab.training.phases import Phase
from facelab.training.schedule import Progress


class Models(dict[str, nn.Module]):
    """Networks by name, in a fixed order: ``Models(generator=..., d_image=...)``."""

    def named_parameters(self, names: Sequence[str] | None = None) -> list[tuple[str, nn.Parameter]]:
        """``model.parameter`` names and parameters of some models, without repetitions. KeyError on unknown models."""
        found, seen = [], set()
        for name in self if names is None else names:
            for key, parameter in self[name].named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    found.append((f"{name}.{key}", parameter))
        return found


@dataclass(frozen=True)
class OptimizerSpec:
    """Adam over the parameters of some models.

    Attributes:
        models: names of the models.
        lr: learning rate; read from the configuration of the curriculum row in force, the moments stay.
        lr_factors: prefix of a full parameter name (``generator.mapping``) -> factor on ``lr``; the longest wins.
        select: full parameter name -> False to leave it untrained (a stage that trains a decoder only).
        lazy_correction: with phases of several intervals on one optimiser, ``lr * m`` and ``beta ** m``, where
            1 / m is the number of optimiser steps per iteration (StyleGAN2, appendix B).
    """

    models: tuple[str, ...]
    lr: float
    betas: tuple[float, float] = (0.0, 0.9)
    eps: float = 1e-8
    weight_decay: float = 0.0
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    select: Callable[[str], bool] | None = None
    lazy_correction: bool = True


@dataclass(frozen=True)
class EmaSpec:
    """One average of a network.

    Attributes:
        model: name of the network.
        decay: a number d, which means min(d, (1 + n) / (10 + n)) at update n (pi-GAN), or a function of the
            progress *before* the step is counted (EG3D: half-life in images).
        buffers: copied from the network at each update, or left alone.
    """

    model: str
    decay: float | Callable[[Progress], float]
    buffers: Literal["copy", "ignore"] = "copy"


@dataclass(frozen=True)
class Warmup:
    """Steps before step 0 (sphere initialisation); they count neither as steps nor as images, averages follow after."""

    steps: int
    phases: tuple[Phase, ...]


@dataclass(frozen=True)
class TrainStage:
    """One training procedure of a method; most have one, some several (volume, then super-resolution).

    Attributes:
        name: what ``--stage`` calls it.
        phases: in the order in which they run within an iteration.
        init_from: called once with the fresh networks, to load weights of an earlier stage or of a converted file.
        warmup: phases that run alone before the others.
    """

    name: str
    phases: tuple[Phase, ...]
    init_from: Callable[[Models], None] | None = None
    warmup: Warmup | None = None


class DataSource(Protocol):
    """Real samples by number: a pure function of (first, count), so that resuming needs the count only."""

    def batch(self, first_image: int, count: int, /) -> Any:
        """Samples ``first_image`` ... ``first_image + count - 1`` of the endless stream (a ``Batch``)."""
        ...


class Method(Protocol):
    """All that the core knows of a paper for building and conversion.

    Attributes:
        name: ``fenerf``; stored in checkpoints.
        config_type: its dataclass, with fields ``train``, ``checkpoint`` and ``log``.
    """

    name: str
    config_type: type

    def build(self, config: Any) -> Models:
        """The networks, on the CPU; torch's global generator is seeded with ``train.seed`` around the call."""
        ...


class Trainable(Method, Protocol):
    """A method that can be trained by :class:`facelab.training.loop.Trainer`."""

    def stages(self, config: Any) -> list[TrainStage]:
        """The training stages; phases read what changes with the curriculum from ``ctx.config``."""
        ...

    def emas(self, config: Any) -> Mapping[str, EmaSpec]:
        """Averages of networks by name: ``{"ema": EmaSpec("generator", ...)}``."""
        ...

    def optimizers(self, config: Any) -> Mapping[str, OptimizerSpec]:
        """Optimisers by name; asked again for each curriculum row, for its learning rates."""
        ...

    def dataset(self, config: Any) -> DataSource | None:
        """The real samples of a curriculum row, or None if no phase wants any."""
        ...
