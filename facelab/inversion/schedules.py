# SPDX-License-Identifier: Apache-2.0
"""Learning rates and perturbations over the steps of an inversion; all are pure functions of the step."""

from __future__ import annotations

import math


def ramped_rate(step: int, steps: int, base: float, rampdown: float = 0.25, rampup: float = 0.05) -> float:
    """StyleGAN2's projector (arXiv 1912.04958, appendix D): a linear start, a cosine end. The first step has rate 0.

    Args:
        step: 0 ... steps - 1.
        base: rate in between.
        rampdown, rampup: shares of the steps, 0: none.

    >>> [round(ramped_rate(s, 100, 0.1), 4) for s in (0, 5, 50, 99)]
    [0.0, 0.1, 0.1, 0.0004]
    """
    t = step / steps
    down = min(1.0, (1 - t) / rampdown) if rampdown else 1.0
    up = min(1.0, t / rampup) if rampup else 1.0
    return base * (0.5 - 0.5 * math.cos(math.pi * down)) * up


def perturbation(step: int, steps: int, deviation: float, factor: float = 0.05, ramp: float = 0.75) -> float:
    """StyleGAN2's projector: scale of the normal noise on codes, falling to 0 at the share ``ramp`` of the steps.

    ``deviation`` is that of the codes of random latents, see :mod:`facelab.inversion.start`.

    >>> round(perturbation(0, 100, 2.0), 4), perturbation(75, 100, 2.0)
    (0.1, 0.0)
    """
    return deviation * factor * max(0.0, 1 - step / steps / ramp) ** 2


def stepped_rate(step: int, base: float, every: int = 100, factor: float = 0.75) -> float:
    """FENeRF's inversion (arXiv 2111.15490): the rate is multiplied by ``factor`` every so many steps.

    >>> stepped_rate(99, 0.01), stepped_rate(200, 0.01)
    (0.01, 0.005625)
    """
    return base * factor ** (step // every)


def falling_noise(step: int, steps: int, scale: float = 0.03) -> float:
    """FENeRF's inversion: scale of the normal noise on codes, linear from ``scale`` to 0.

    >>> falling_noise(10, 20)
    0.015
    """
    return scale * (steps - step) / steps
