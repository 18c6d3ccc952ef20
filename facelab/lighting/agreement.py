# SPDX-License-Identifier: Apache-2.0
"""How well lights that something found agree with the lights that are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LightAgreement:
    """Of N found lights with N known ones, both (N, 9) in the same axes and scale.

    Attributes:
        correlation: (9,) over the N, NaN where the known numbers do not vary.
        slope: (9,) found numbers change by this much for each unit of the known ones (NaN as above).
        mean_error: (9,) mean absolute differences.
        fitted_error: (9,) the same after the best scale and shift of each found number: what no calibration mends.
        guess_error: (9,) mean absolute differences of the known numbers from their mean: what a constant reaches.
        angle: median angle between the directions that most light comes from, radians.
    """

    correlation: Tensor
    slope: Tensor
    mean_error: Tensor
    fitted_error: Tensor
    guess_error: Tensor
    angle: float

    def summary(self) -> dict[str, list[float] | float]:
        """Plain numbers for a JSON file."""
        tensors = ("correlation", "slope", "mean_error", "fitted_error", "guess_error")
        return {name: [float(v) for v in getattr(self, name)] for name in tensors} | {"angle": self.angle}


def light_agreement(found: Tensor, known: Tensor) -> LightAgreement:
    """Compare (N, 9) lights; ValueError for other shapes or fewer than three lights."""
    if found.ndim != 2 or found.shape[1] != 9 or found.shape != known.shape or len(found) < 3:
        raise ValueError(f"lights must both be (N, 9), N at least 3, got {tuple(found.shape)} and {tuple(known.shape)}")
    f, k = found.detach().double().cpu(), known.detach().double().cpu()
    fc, kc = f - f.mean(0), k - k.mean(0)
    known_power, found_power, common = kc.square().sum(0), fc.square().sum(0), (fc * kc).sum(0)
    varies = known_power > 1e-12 * len(k)
    nan = torch.full_like(common, torch.nan)
    power = (known_power * found_power).sqrt()
    fit = torch.where(found_power > 0, common / found_power, torch.zeros_like(common))
    return LightAgreement(
        correlation=torch.where(varies & (power > 0), common / power, nan),
        slope=torch.where(varies, common / known_power, nan),
        mean_error=(f - k).abs().mean(0),
        fitted_error=(kc - fit * fc).abs().mean(0),
        guess_error=kc.abs().mean(0),
        angle=float(_angles(f, k).median()),
    )


def _angles(first: Tensor, second: Tensor) -> Tensor:
    """(N,) angles between the first-order vectors; the same axes give the same angle, whichever they are."""
    a, b = (torch.nn.functional.normalize(light[:, 1:4], dim=1) for light in (first, second))
    return torch.acos((a * b).sum(1).clamp(-1, 1))
