# SPDX-License-Identifier: Apache-2.0
"""Where an optimisation stands, and the doors by which what changes with the step enters its losses."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import torch

from facelab.draws import Draws
from facelab.tensors import map_tensors, moved

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)


@dataclass(frozen=True)
class Clock:
    """One step.

    A step that is played back as a CUDA graph (:mod:`facelab.inversion.recorded`) is not run by Python again, so losses
    take what differs from step to step from :attr:`draws`, :meth:`host` and :meth:`decide`. A loss that reads
    :attr:`step` itself is right, too, but no graph.

    Attributes:
        step: its number.
        steps: in all.
        draws: random numbers of the step and stage.
        device: where the scene is.
    """

    step: int
    steps: int
    draws: Draws
    device: torch.device

    def host(self, make: Callable[[Clock], T]) -> T:
        """Tensors computed on the CPU of step and draws, on the device.

        ``make`` depends on nothing that changes with the step but its argument; of what it returns, only tensors change.
        """
        return map_tensors(lambda tensor: moved(tensor, self.device), make(self))

    def decide(self, make: Callable[[Clock], H]) -> H:
        """What Python branches on."""
        return make(self)

    def beside(self, value: T, what: str) -> Callable[[], T]:
        """A way for ``make`` of :meth:`host` to ``value``, which no graph can have; ``what`` says so."""
        return lambda: value
