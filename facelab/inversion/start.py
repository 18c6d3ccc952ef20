# SPDX-License-Identifier: Apache-2.0
"""Where an inversion starts: the average of the codes of random latents, and how far codes lie around it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from facelab.draws import Draws
from facelab.generator import Codes, Generator, sample_latents


@dataclass(frozen=True)
class CodeStatistics:
    """Statistics of codes.

    Attributes:
        average: codes (1, ...).
        spread: standard deviation of each entry, of the shapes of ``average``.
        deviation: per name, root of the mean squared distance to the average (one vector's, all entries summed).
    """

    average: Codes
    spread: Codes
    deviation: Mapping[str, float]


def code_statistics(codes: Codes, repeated: Collection[str] = ()) -> CodeStatistics:
    """Statistics of codes (N, ...), N of one distribution.

    Args:
        repeated: names of codes (N, L, W) that repeat one vector L times: their deviation is that of one vector, as
            projectors of StyleGAN2 have it.
    """
    average, spread, deviation = {}, {}, {}
    for name, values in codes.values.items():
        mean = values.mean(0, keepdim=True)
        average[name] = mean
        spread[name] = values.std(0, correction=0, keepdim=True)
        around = (values - mean)[:, 0] if name in repeated else values - mean
        deviation[name] = math.sqrt(float(around.double().square().sum()) / len(values))
    return CodeStatistics(Codes(average), Codes(spread), deviation)


@torch.no_grad()
def start_statistics(
    generator: Generator,
    latents: Mapping[str, Tensor],
    conditioning: Tensor | None = None,
    repeated: Collection[str] = (),
) -> CodeStatistics:
    """:func:`code_statistics` of the codes that a generator maps ``latents`` (N, ...) to, without truncation."""
    return code_statistics(generator.map(latents, conditioning), repeated)


def random_latents(generator: Generator, count: int = 10_000, seed: int = 0, device="cpu") -> dict[str, Tensor]:
    """``count`` standard normal latents for :func:`start_statistics`, the same on every device."""
    return sample_latents(generator.latent_spec, Draws(seed).at(phase="inversion-start"), count, device)


def numpy_latents(seed: int, count: int, width: int) -> Tensor:
    """(count, width) as ``numpy.random.RandomState(seed).randn`` draws them: the start of StyleGAN's projectors."""
    return torch.from_numpy(np.random.RandomState(seed).randn(count, width)).float()
