# SPDX-License-Identifier: Apache-2.0
"""Lattices by hand, meshes of spheres by their known volume, and clear errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from facelab.errors import UserError
from facelab.mesh.marching_cubes import Lattice, extract_mesh, sample_volume

CENTRE = torch.tensor([0.05, 0.0, -0.02])


def ball(points):
    """Density that is 10 on a sphere of radius 0.1 around CENTRE and higher inside."""
    return 20 - 100 * (points - CENTRE).norm(dim=-1)


def enclosed_volume(mesh) -> float:
    """Positive if the faces turn counterclockwise seen from outside (divergence theorem)."""
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    return float(np.einsum("fi,fi->f", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6)


def test_clean_lattice_has_z_fastest_and_reaches_the_corners():
    lattice = Lattice(3, 2.0)
    points = lattice.points(0, 27)
    assert points[0].tolist() == [-1, -1, -1] and points[26].tolist() == [1, 1, 1]
    assert points[1].tolist() == [-1, -1, 0] and points[3].tolist() == [-1, 0, -1] and points[9].tolist() == [0, -1, -1]
    assert points.unique(dim=0).shape == (27, 3)


def test_reference_lattice_is_sheared_by_up_to_a_voxel():
    lattice = Lattice(4, 3.0, reference=True)  # voxel size 1
    clean, sheared = Lattice(4, 3.0).points(0, 64), lattice.points(0, 64)
    shift = sheared - clean
    assert shift[:, 2].abs().max() == 0
    # index 7 = x 0, y 1, z 3: y runs to 7/4, x to 7/16
    torch.testing.assert_close(sheared[7], torch.tensor([7 / 16 - 1.5, 7 / 4 - 1.5, 1.5]))
    assert 0.7 < float(shift[:, 1].max()) < 1 and 0.9 < float(shift[:, 0].max()) < 1


@pytest.mark.parametrize("reference", [False, True])
def test_chunks_make_the_whole(reference):
    lattice = Lattice(5, 1.0, reference)
    parts = list(lattice.chunks(max_points=37))
    assert [start for start, _ in parts] == [0, 37, 74, 111] and max(len(p) for _, p in parts) == 37
    assert torch.cat([p for _, p in parts]).equal(lattice.points(0, 125))


def test_ball_has_its_volume_place_and_outward_faces():
    mesh = extract_mesh(ball, resolution=40, cube_size=0.4, level=10, max_points=1000)
    assert enclosed_volume(mesh) == pytest.approx(4 / 3 * math.pi * 0.1**3, rel=0.02)
    np.testing.assert_allclose(np.linalg.norm(mesh.vertices - CENTRE.numpy(), axis=1), 0.1, atol=5e-4)
    assert mesh.colors is None


def test_distance_fields_are_solid_below_the_level():
    mesh = extract_mesh(lambda p: p.norm(dim=-1, keepdim=True) - 0.1, 30, 0.3, level=0, inside="below")
    assert enclosed_volume(mesh) == pytest.approx(4 / 3 * math.pi * 0.1**3, rel=0.02)


def test_vertex_colours_are_asked_at_the_vertices_in_chunks():
    sizes = []

    def color(points):
        sizes.append(len(points))
        return torch.stack(
            [(points[:, 0] > CENTRE[0]).float(), torch.full_like(points[:, 0], 0.5), points[:, 0] * 9], -1
        )

    mesh = extract_mesh(ball, 24, 0.4, 10, max_points=200, color=color)
    assert max(sizes) <= 200 and sum(sizes) == len(mesh.vertices)
    assert mesh.colors.dtype == np.uint8
    assert np.array_equal(mesh.colors[:, 0] == 255, mesh.vertices[:, 0] > CENTRE[0].item())
    assert set(mesh.colors[:, 1].tolist()) == {128}
    assert mesh.colors[:, 2].max() == 255 and mesh.colors[:, 2].min() == 0  # clamped


def test_the_field_is_never_asked_for_more_points_than_allowed():
    sizes = []
    volume = sample_volume(lambda p: sizes.append(len(p)) or p[:, 0], Lattice(6, 1.0), max_points=50)
    assert sizes == [50, 50, 50, 50, 16]
    np.testing.assert_allclose(volume[:, 0, 0], np.linspace(-0.5, 0.5, 6), atol=1e-6)  # x is the first axis
    assert np.ptp(volume[2]) == 0


def test_a_level_outside_the_field_names_its_range():
    with pytest.raises(UserError, match=r"no surface at level 50: .* from -.* to 1\d\.") as caught:
        extract_mesh(ball, 12, 0.4, level=50)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        (lambda p: p, "must return"),
        (lambda p: p[:-1, 0], "must return"),
        (lambda p: p[:, 0] / 0, "not finite"),
    ],
)
def test_wrong_fields_are_refused(field, words):
    with pytest.raises(ValueError, match=words):
        extract_mesh(field, 6, 1.0, 0.0)


@pytest.mark.parametrize(("resolution", "size"), [(1, 1.0), (8, 0.0), (8, math.inf)])
def test_impossible_lattices(resolution, size):
    with pytest.raises(UserError, match="must be"):
        Lattice(resolution, size)
