# SPDX-License-Identifier: Apache-2.0
"""Rendered depth against what a face model estimates from the rendered picture (EG3D, arXiv 2112.07945, section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from facelab.metrics.evaluate import Tick, Views
from facelab.metrics.geometry import normalised_depth_error

LEAST_PIXELS = 16  # of the face, to be compared

# (N, 3, S, S) in [-1, 1] -> depth (N, s, s) that grows with the distance, and where the face is (N, s, s) boolean
DepthEstimator = Callable[[Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def estimated_depth_report(
    views: Iterable[Views], estimate: DepthEstimator, tick: Tick | None = None
) -> dict[str, Any]:
    """Mean squared difference of depth, each map at mean 0 and deviation 1 over the face.

    Args:
        views: rendered heads.
        estimate: any depth estimator, for example a reconstruction network with a rasteriser.

    Returns:
        ``value``: mean over the heads, None if none could be compared; ``count`` of those compared;
        ``without_face``: heads on which estimate and rendering share fewer than 16 pixels, or one of them is flat.
    """
    errors, without = [], 0
    for view in views:
        depth, face = estimate(view.image * 2 - 1)
        if depth.shape != face.shape or depth.ndim != 3 or len(depth) != len(view.depth):
            raise ValueError(
                f"an estimator gives depth and face (N, s, s), got {tuple(depth.shape)}, {tuple(face.shape)}"
            )
        side = view.depth.shape[-1]
        sized = torch.nn.functional.interpolate(depth[:, None].double(), size=(side, side), mode="nearest-exact")[:, 0]
        where = (
            torch.nn.functional.interpolate(face[:, None].float(), size=(side, side), mode="nearest-exact")[:, 0] > 0.5
        )
        where = where.to(view.depth.device) & view.foreground
        for k in range(len(where)):
            if int(where[k].sum()) < LEAST_PIXELS:
                without += 1
                continue
            one = slice(k, k + 1)
            error = float(normalised_depth_error(view.depth[one], sized[one].to(view.depth.device), where[one]))
            if math.isfinite(error):
                errors.append(error)
            else:
                without += 1
        if tick is not None:
            tick(len(where))
    value = sum(errors) / len(errors) if errors else None
    return {"value": value, "count": len(errors), "without_face": without}
