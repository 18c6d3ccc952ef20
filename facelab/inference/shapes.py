# SPDX-License-Identifier: Apache-2.0
"""Shapes of a model's heads: what their surface is, and meshes cut out of a lattice or along a camera's rays.

A field of densities has its surface where the density is 10, solid above; a field of signed distances where the
distance is 0, solid below. P points, D samples along a ray.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from facelab.cameras import Camera
from facelab.errors import UserError
from facelab.fields.output import FieldOutput
from facelab.generator import Scene
from facelab.mesh.aligned_volume import Frustum, align_volume, aligned_mesh
from facelab.mesh.io import Mesh
from facelab.mesh.marching_cubes import extract_mesh, vertex_colors
from facelab.rendering.sdf import frustum_distances
from facelab.rendering.settings import RenderSettings

DENSITY_LEVEL, DISTANCE_LEVEL = 10.0, 0.0
OUTSIDE = 1.0  # signed distance of cells that the camera did not see


@dataclass(frozen=True)
class HeadField:
    """The field of one scene as functions of points (P, 3) in scene units, seen from the front, without gradient.

    Attributes:
        bound: the field with its codes filled in.
        device: where it lives.
        is_distance: whether it knows signed distances.
    """

    bound: Any
    device: torch.device
    is_distance: bool

    @staticmethod
    def of(generator: Any, scene: Scene) -> HeadField:
        """The field of a generator's scene."""
        field = HeadField(generator.field(scene), next(generator.parameters()).device, False)
        # fields whose density is made of no distance have the method too
        known = hasattr(field.bound, "distances") and field.at(torch.zeros(1, 3)).sdf is not None
        return replace(field, is_distance=known)

    @torch.no_grad()
    def at(self, points: Tensor) -> FieldOutput:
        """All values, (1, P, 1, C) each."""
        directions = torch.tensor([0.0, 0.0, -1.0], device=self.device).expand(1, len(points), 3)
        return self.bound(points.to(self.device)[None, :, None], directions)

    def density(self, points: Tensor) -> Tensor:
        """(P,) densities, raw where the field has no distance."""
        return self.at(points).sigma.reshape(-1)

    @torch.no_grad()
    def distance(self, points: Tensor) -> Tensor:
        """(P,) signed distances in scene units, negative inside. ValueError for a field of densities."""
        if not self.is_distance:
            raise ValueError("this field has densities, no signed distances")
        return self.bound.distances(points.to(self.device)[None, :, None]).reshape(-1)

    def color(self, points: Tensor) -> Tensor:
        """(P, 3) colours in [0, 1]."""
        return self.at(points).rgb.reshape(-1, 3)

    def surface(self) -> Surface:
        """What the surface is a level of."""
        if self.is_distance:
            return Surface(self.distance, DISTANCE_LEVEL, "below")
        return Surface(self.density, DENSITY_LEVEL, "above")


@dataclass(frozen=True)
class Surface:
    """A surface: where ``values`` of points (P, 3) -> (P,) equal ``level``; the solid is ``inside`` of it."""

    values: Callable[[Tensor], Tensor]
    level: float
    inside: Literal["above", "below"]


def lattice_mesh(
    field: HeadField,
    resolution: int,
    cube_size: float,
    level: float | None = None,
    max_points: int = 100_000,
    *,
    colored: bool = True,
    sheared: bool = False,
) -> Mesh:
    """The surface in a cube of ``resolution`` points per side in world axes; see :mod:`facelab.mesh.marching_cubes`.

    Args:
        level: None: that of the field's kind.
        sheared: pi-GAN's lattice (reference).
    """
    surface = field.surface()
    return extract_mesh(
        surface.values,
        resolution,
        cube_size,
        surface.level if level is None else level,
        max_points,
        color=field.color if colored else None,
        inside=surface.inside,
        reference=sheared,
        device=field.device,
    )


@torch.no_grad()
def frustum_mesh(
    generator: Any,
    scene: Scene,
    camera: Camera,
    settings: RenderSettings,
    *,
    level: float | None = None,
    colored: bool = True,
    reference: bool = False,
) -> Mesh:
    """The surface as StyleSDF cuts it out: distances along the rays of a camera, resampled to a box (its section 7.1).

    Args:
        generator: of signed distances.
        scene: one.
        camera: one; the reference arithmetic knows the frontal one only.
        settings: ``resolution`` rays per side with ``samples_coarse`` depths each, near, far, ``max_points``.
        level: distance on the surface, None: 0.
        colored: ask the field for the vertex colours.
        reference: the original's arithmetic, see :mod:`facelab.mesh.aligned_volume`.

    Raises:
        UserError: a field of densities; the level is outside the values; names their range.
    """
    field = HeadField.of(generator, scene)
    if not field.is_distance:
        raise UserError("this model has densities, no signed distances to align: leave out the aligned way")
    sampling = generator.config.sampling
    rays = generator.rays(camera, settings)
    distances = frustum_distances(field.bound.distances, rays, settings, sampling)[0]
    volume = distances.unflatten(0, (settings.resolution, settings.resolution))
    frustum = Frustum(
        settings.near,
        settings.far,
        fov=field_of_view(camera),
        distance=float(camera.cam2world[0, :3, 3].norm()),
        to_far=sampling == "stratified",
    )
    aligned = align_volume(volume, frustum, outside=OUTSIDE, reference=reference)
    usual = DISTANCE_LEVEL if level is None else level
    mesh = aligned_mesh(aligned, frustum, usual, camera=None if reference else camera, reference=reference)
    if not colored:
        return mesh
    return Mesh(mesh.vertices, mesh.faces, vertex_colors(field.color, mesh.vertices, settings.max_points, field.device))


def field_of_view(camera: Camera) -> float:
    """Full field of view of the first camera, degrees."""
    return float(torch.rad2deg(2 * torch.atan(0.5 / camera.intrinsics[0, 0, 0])))
