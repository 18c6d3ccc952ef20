# SPDX-License-Identifier: Apache-2.0
"""What stands where a ray meets nothing (pi-GAN's and FENeRF's fill modes)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

FILL_VALUES = {"black": 0.0, "white": 1.0, "grey": 0.5, "light_grey": 0.81}
FILL_THRESHOLD = 0.9  # opacity below which the original takes a ray for empty
FillColor = Literal["black", "white", "grey", "light_grey"]


def fill_background(
    rgb: Tensor,
    semantics: Tensor | None,
    opacity: Tensor,
    color: FillColor = "black",
    reference: bool = False,
    dim: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Lay a picture over a colour and prepend a background class to its labels.

    The missing opacity ``1 - W`` shows the colour and is the score of the background. ``reference`` does
    what FENeRF's ``seg_padding_background`` does: where W < 0.9 the background channel becomes 1 and every
    other channel, labels too, the fill value; elsewhere nothing changes.

    Args:
        rgb: colours in [0, 1], composited over black, channels along ``dim``.
        semantics: K label scores in [0, 1] along ``dim``, or None.
        opacity: one channel along ``dim``.
        color: a name of ``FILL_VALUES``.

    Returns:
        rgb, and semantics with K + 1 channels.
    """
    value = FILL_VALUES[color]
    if not reference:
        rgb = rgb + value * (1 - opacity)
        return rgb, None if semantics is None else torch.cat([1 - opacity.to(semantics.dtype), semantics], dim=dim)
    empty = opacity < FILL_THRESHOLD
    rgb = torch.where(empty, torch.full_like(rgb, value), rgb)
    if semantics is not None:
        labels = torch.where(empty, torch.full_like(semantics, value), semantics)
        semantics = torch.cat([empty.to(labels.dtype), labels], dim=dim)
    return rgb, semantics


def highlight_empty(channels: Tensor, opacity: Tensor) -> Tensor:
    """Debug picture: (1, 0, 0, ...) along the last axis where the opacity is below 0.9 (mode ``debug``)."""
    marker = torch.zeros_like(channels)
    marker[..., 0] = 1
    return torch.where(opacity < FILL_THRESHOLD, marker, channels)
