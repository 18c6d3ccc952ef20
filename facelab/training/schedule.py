# SPDX-License-Identifier: Apache-2.0
"""Where a run stands, and the quantities that follow from it: pure functions of the progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Position of a run.

    Attributes:
        step: finished iterations; the first iteration runs at step 0.
        images: real images (or samples) consumed before this step.
        batch_size: samples of this step over all processes.
        stage: index of the curriculum row in force.
        starts: (step, images) at which each row up to ``stage`` began.
        configs: the configuration of every row.
        warmup: True during the warm-up of a training stage, which counts its own steps.
    """

    step: int
    images: int
    batch_size: int
    stage: int = 0
    starts: tuple[tuple[int, int], ...] = ((0, 0),)
    configs: tuple[Any, ...] = field(default=(), repr=False)
    warmup: bool = False

    def last_change(self, setting: Callable[[Any], Any]) -> tuple[int, int]:
        """(step, images) at which ``setting(config)`` took its present value; (0, 0) if it never changed.

        >>> progress = Progress(30, 300, 10, 2, ((0, 0), (10, 100), (20, 200)), (32, 64, 64))
        >>> progress.last_change(lambda config: config)
        (10, 100)
        """
        index = self.stage
        while index > 0 and setting(self.configs[index - 1]) == setting(self.configs[self.stage]):
            index -= 1
        return self.starts[index]

    def fade(self, steps: int, setting: Callable[[Any], Any]) -> float:
        """Weight of the new resolution: 0 -> 1 over ``steps`` after the last change, also in the first stage.

        pi-GAN: ``alpha = min(1, (step - last_upsample_step) / fade_steps)``.
        """
        return linear(self.step - self.last_change(setting)[0], steps)


def linear(position: float, length: float, start: float = 0.0, end: float = 1.0) -> float:
    """``start`` -> ``end`` over ``length``, constant afterwards; ``end`` at once for a length of 0.

    >>> linear(5, 10), linear(20, 10), linear(0, 0)
    (0.5, 1.0, 1.0)
    """
    share = min(max(position / length, 0.0), 1.0) if length > 0 else 1.0
    return start + (end - start) * share


def nerf_noise(step: int, steps: int = 5000) -> float:
    """Standard deviation of the noise on raw densities (pi-GAN): 1 -> 0 over ``steps``.

    >>> nerf_noise(0), nerf_noise(2500), nerf_noise(6000)
    (1.0, 0.5, 0.0)
    """
    return max(0.0, 1.0 - step / steps)
