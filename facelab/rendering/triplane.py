# SPDX-License-Identifier: Apache-2.0
"""Volume rendering of a tri-plane field: the one door to the plain renderer and the fused one."""

from __future__ import annotations

from torch import Tensor

from facelab.cameras.rays import Rays
from facelab.draws import Draws
from facelab.fields.triplane import TriplaneField
from facelab.rendering.integrators import RenderOutput
from facelab.rendering.midpoint import render_midpoints
from facelab.rendering.settings import RenderSettings


def render_triplane(
    planes: Tensor,
    rays: Rays,
    field: TriplaneField,
    settings: RenderSettings,
    draws: Draws | None = None,
    keep_weights: bool = False,
) -> RenderOutput:
    """Render N x R rays of a tri-plane field.

    Args:
        planes: (N or 1, 3, C, H, W).
        rays: N x R rays.
        field: axes, box and decoder.
        settings: see :func:`~facelab.rendering.midpoint.render_midpoints`.
        draws: as there.
        keep_weights: return interval weights and midpoints too.

    Returns:
        RenderOutput with features (N, R, C), rgb, depth, opacity, mean_depth.

    Raises:
        ValueError: as the plain renderer.
    """
    return render_midpoints(lambda points, _: field(points, planes), rays, settings, draws, keep_weights)
