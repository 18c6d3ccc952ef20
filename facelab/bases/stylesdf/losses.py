# SPDX-License-Identifier: Apache-2.0
"""What StyleSDF's volume stage asks of a field beside the discriminator: its start as a sphere, its regularity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from facelab.cameras.rays import Rays
from facelab.draws import Draws
from facelab.losses.sdf import sphere_loss
from facelab.rendering.sdf import Sampling, sphere_points
from facelab.rendering.settings import RenderSettings

RADIUS_SHARE = 0.25  # of far - near


@dataclass(frozen=True)
class SphereStart:
    """One step of the sphere initialisation.

    Attributes:
        loss: mean absolute difference, 0-d.
        sdf: (N, R, S, 1) predicted.
        target: (N, R, S, 1) distance to the sphere, scene units.
    """

    loss: Tensor
    sdf: Tensor
    target: Tensor


def sphere_start(
    distances: Callable[[Tensor], Tensor],
    rays: Rays,
    settings: RenderSettings,
    draws: Draws,
    sampling: Sampling = "offset",
) -> SphereStart:
    """Compare a field with the sphere whose radius is a quarter of far - near, at stratified points of the rays.

    A warm-up phase calls it with random codes and cameras; draws that are the same on every process keep the
    networks of all processes equal.

    Args:
        distances: points (N, R, S, 3) -> signed distance (N, R, S, 1): ``BoundSdf.distances``.
        settings: near, far and ``samples_coarse``; its jitter is not looked at.
        draws: the uniform numbers ``jitter`` (N, R, S).
        sampling: of the depths that the points are stratified around.
    """
    shape = (*rays.origins.shape[:2], settings.samples_coarse)
    points = sphere_points(rays, settings, sampling, draws.uniform("jitter", shape, rays.origins.device))
    sdf = distances(points)
    loss, target = sphere_loss(sdf, points, RADIUS_SHARE * (settings.far - settings.near))
    return SphereStart(loss, sdf, target)
