# SPDX-License-Identifier: Apache-2.0
"""Perspective volumes: a known shape sampled along rays must come back where it is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from facelab.cameras.camera import Camera
from facelab.cameras.rays import make_rays
from facelab.errors import UserError
from facelab.mesh.aligned_volume import Frustum, align_volume, aligned_mesh

CENTER = torch.tensor([0.02, -0.015, 0.01], dtype=torch.float64)
RADII = torch.tensor([0.05, 0.06, 0.045], dtype=torch.float64)


def levels(points: torch.Tensor) -> torch.Tensor:
    """Positive outside an ellipsoid off the centre, about a distance near its surface."""
    return (((points - CENTER) / RADII).norm(dim=-1) - 1) * 0.05


def sampled(camera: Camera, frustum: Frustum, size: int, count: int) -> torch.Tensor:
    """The field along the rays of a camera: (S, S, count) at distances along the camera's axis."""
    rays = make_rays(camera, size, "centers")
    o, d = rays.origins[0].double(), rays.directions[0].double()
    along = (d * camera.cam2world[0, :3, 2].double()).sum(-1, keepdim=True)
    t = frustum.depths(count)[None] / along
    points = o[:, None] + t[..., None] * d[:, None]
    return levels(points).view(size, size, count)


@pytest.mark.parametrize("to_far", [False, True])
@pytest.mark.parametrize("angles", [None, (1.4, 1.9)])
def test_surface_comes_back_where_it_is(to_far: bool, angles: tuple[float, float] | None) -> None:
    frustum = Frustum(to_far=to_far)
    camera = Camera.on_sphere(*(angles or (math.pi / 2, math.pi / 2)), fov=12)
    aligned = align_volume(sampled(camera, frustum, 40, 36), frustum)
    mesh = aligned_mesh(aligned, frustum, camera=None if angles is None else camera)
    points = torch.from_numpy(mesh.vertices).double()
    assert levels(points).abs().max() < 4e-4  # cells are 6e-3 wide
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    outward = (corners.mean(axis=1) - CENTER.numpy()) / RADII.numpy() ** 2
    assert ((normal * outward).sum(axis=1) > 0).mean() > 0.999


def test_the_original_places_it_less_well() -> None:
    """Half a pixel and 2 percent: the reference is several times as far off, so the switch does something."""
    frustum, camera = Frustum(), Camera.on_sphere(math.pi / 2, math.pi / 2, fov=12)
    volume = sampled(camera, frustum, 40, 36)
    errors = []
    for reference in (False, True):
        mesh = aligned_mesh(align_volume(volume, frustum, reference=reference), frustum, reference=reference)
        errors.append(levels(torch.from_numpy(mesh.vertices).double()).abs().mean().item())
    assert errors[0] * 5 < errors[1] < 0.01


@pytest.mark.parametrize("reference", [False, True])
def test_lookup_by_hand(reference: bool) -> None:
    """Against a loop over cells of a volume with three different sides."""
    frustum = Frustum(near=0.7, far=1.3, to_far=True)
    volume = torch.rand(4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    aligned = align_volume(volume, frustum, outside=3.0, reference=reference)
    for k in range(5):
        depth = 0.7 + 0.6 * k / 4
        widen = (1.3 / 0.7) * (1 - k / 4) + k / 4 if reference else 1.3 / depth
        for i in range(4):
            for j in range(6):
                y, x = (2 * i / 3 - 1) * widen, (2 * j / 5 - 1) * widen
                if max(abs(x), abs(y)) > 1 + 1e-12:
                    assert aligned[i, j, k] == 3.0
                    continue
                row, column = min((y + 1) / 2 * 3, 3 - 1e-9), min((x + 1) / 2 * 5, 5 - 1e-9)
                r, c = int(row), int(column)
                fr, fc = row - r, column - c
                plane = volume[..., k]
                upper = plane[r, c] * (1 - fc) + plane[r, c + 1] * fc
                lower = plane[r + 1, c] * (1 - fc) + plane[r + 1, c + 1] * fc
                assert aligned[i, j, k].item() == pytest.approx((upper * (1 - fr) + lower * fr).item(), abs=1e-7)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="perspective volume must be"):
        align_volume(torch.zeros(1, 4, 4, 4))
    with pytest.raises(UserError, match="no surface at level 0: the volume goes from 1 to 1"):
        aligned_mesh(torch.ones(4, 4, 4))
    with pytest.raises(ValueError, match="give camera or reference"):
        aligned_mesh(torch.ones(4, 4, 4), camera=Camera.on_sphere(1.5, 1.5, 12), reference=True)
    with pytest.raises(ValueError, match="0 < near < far"):
        Frustum(near=1.2, far=0.9)
