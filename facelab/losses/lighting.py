# SPDX-License-Identifier: Apache-2.0
"""How far the light in a picture is from the light that is wanted (FaceDNeRF, arXiv 2306.00783, section 3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from facelab.lighting.colour import lightness

LightNet = Callable[[Tensor], Tensor]  # (N, 1, H, W) lightness in 0..1 -> (N, 9) numbers

__all__ = ["LightNet", "light_distance", "light_in", "lightness"]


def light_in(estimator: LightNet, pictures: Tensor) -> Tensor:
    """The light that ``estimator`` sees.

    Args:
        estimator: such as :class:`facelab.nn.pretrained.light_estimator.LightEstimator`.
        pictures: (N, 3, H, W) sRGB in [-1, 1]; not clamped, values outside keep their derivative.

    Returns:
        (N, 9) in the estimator's terms (DPR's: see :func:`facelab.lighting.to_dpr`).
    """
    return estimator(lightness(pictures / 2 + 0.5))


def light_distance(estimator: LightNet, pictures: Tensor, light: Tensor) -> Tensor:
    """(N,) sums of the nine squared differences.

    Args:
        estimator, pictures: as in :func:`light_in`.
        light: (9,) or (N, 9) wanted numbers in the estimator's terms, such as ``to_dpr(world_light, camera)``.

    Raises:
        ValueError: a light of another shape.
    """
    if light.ndim not in (1, 2) or light.shape[-1] != 9 or (light.ndim == 2 and len(light) not in (1, len(pictures))):
        raise ValueError(f"light must be (9,) or ({len(pictures)}, 9), got {tuple(light.shape)}")
    seen = light_in(estimator, pictures)
    return (seen - light.to(device=seen.device, dtype=torch.promote_types(seen.dtype, light.dtype))).square().sum(1)
