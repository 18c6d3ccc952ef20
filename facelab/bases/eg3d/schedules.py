# SPDX-License-Identifier: Apache-2.0
"""What changes over an EG3D run: pure functions of the number of real images seen before the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from facelab.training.schedule import Progress, linear


def blur_sigma(images: int, initial: float, fade_kimg: float) -> float:
    """Standard parameter of the blur of what enters the discriminator, in pixels: ``initial`` -> 0, linear.

    >>> blur_sigma(0, 10, 200), blur_sigma(100_000, 10, 200), blur_sigma(300_000, 10, 200)
    (10.0, 5.0, 0.0)
    """
    return initial * max(1 - images / (fade_kimg * 1000), 0.0) if fade_kimg > 0 else 0.0


def blur_half_width(sigma: float) -> int:
    """Taps on each side of the middle one; 0 = no blur.

    >>> blur_half_width(10.0), blur_half_width(0.2)
    (30, 0)
    """
    return math.floor(3 * sigma)


def swap_probability(images: int, final: float | None, fade_kimg: float) -> float:
    """Probability that the generator is conditioned on another camera than it renders: 1 -> ``final``, linear.

    ``final`` None: never swapped.

    >>> swap_probability(0, 0.5, 1000), swap_probability(500_000, 0.5, 1000), swap_probability(5_000_000, 0.5, 0)
    (1.0, 0.75, 0.5)
    """
    return 0.0 if final is None else linear(images, fade_kimg * 1000, 1.0, final)


def neural_resolution(images: int, initial: int, final: int | None, fade_kimg: float) -> int:
    """Side of the neural rendering in pixels: ``initial`` -> ``final``, linear, rounded to the nearest (half to even).

    >>> neural_resolution(0, 64, 128, 1000), neural_resolution(500_000, 64, 128, 1000), neural_resolution(9, 64, None, 1)
    (64, 96, 64)
    """
    return initial if final is None else round(linear(images, fade_kimg * 1000, float(initial), float(final)))


def ema_decay(images: int, batch_size: int, half_life_kimg: float, rampup: float | None) -> float:
    """Decay of the generator's average for one step: its half-life is ``half_life_kimg``, at the start a share of the run.

    Args:
        images: seen before this step.
        batch_size: images of this step.
        half_life_kimg: in thousands of images.
        rampup: the half-life is at most this share of the images so far; None = no ramp (resumed runs of the original).

    >>> ema_decay(0, 32, 10, 0.05), round(ema_decay(10_000_000, 32, 10, 0.05), 6)
    (0.0, 0.997784)
    """
    life = half_life_kimg * 1000
    if rampup is not None:
        life = min(life, images * rampup)
    return 0.5 ** (batch_size / max(life, 1e-8))


def ema_schedule(half_life_kimg: float, rampup: float | None) -> Callable[[Progress], float]:
    """:func:`ema_decay` of a run's progress, with the half-life scaled to the batch as the original does (per 32)."""
    return lambda progress: min(
        ema_decay(progress.images, progress.batch_size, half_life_kimg * progress.batch_size / 32, rampup),
        1 - 1e-12,
    )
