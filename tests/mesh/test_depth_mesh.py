# SPDX-License-Identifier: Apache-2.0
"""Meshes of point maps: which triangles, which side is out, what is dropped; smooth normals against trimesh."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from facelab.cameras.camera import Camera
from facelab.cameras.rays import make_rays
from facelab.mesh.depth_mesh import compact, delaunay_cells, depth_mesh, grid_cells, merge_equal_vertices
from facelab.mesh.io import Mesh
from facelab.mesh.normals import angle_weighted_normals

FRONT = Camera.on_sphere(math.pi / 2, math.pi / 2, fov=12)
RADIUS = 0.06


def ball_map(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a frontal camera sees of a ball before a wall at z = -0.12: (3, S, S) points and the (S, S) hit mask."""
    rays = make_rays(FRONT, size, "centers")
    o, d = rays.origins[0].double(), rays.directions[0].double()
    b, c, a = (o * d).sum(-1), (o * o).sum(-1) - RADIUS**2, (d * d).sum(-1)
    root = b * b - a * c
    hit = root > 0
    t = torch.where(hit, (-b - root.clamp(min=0).sqrt()) / a, (-0.12 - o[:, 2]) / d[:, 2])
    points = o + t[:, None] * d
    return points.T.reshape(3, size, size).float(), hit.reshape(size, size)


def face_normals(mesh: Mesh) -> np.ndarray:
    a, b, c = (mesh.vertices[mesh.faces[:, k]].astype(np.float64) for k in range(3))
    return np.cross(b - a, c - a)


@pytest.mark.parametrize("cells", [grid_cells, delaunay_cells])
@pytest.mark.parametrize("shape", [(2, 2), (3, 7), (6, 4)])
def test_cells_cover_the_image_once_and_face_the_camera(cells, shape: tuple[int, int]) -> None:
    height, width = shape
    faces = cells(height, width)
    assert len(faces) == 2 * (height - 1) * (width - 1)
    row, column = np.divmod(faces.astype(np.int64), width)
    x, y = column, -row  # as seen: y up
    area = (x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0]) - (y[:, 1] - y[:, 0]) * (x[:, 2] - x[:, 0])
    assert (area == 1).all()  # half a cell each, counterclockwise
    cell = np.stack([row.min(axis=1), column.min(axis=1)], axis=-1)
    _, count = np.unique(cell, axis=0, return_counts=True)
    assert (count == 2).all()


def test_ball_and_wall() -> None:
    xyz, hit = ball_map(32)
    whole = depth_mesh(xyz)
    assert np.array_equal(whole.vertices, xyz.permute(1, 2, 0).reshape(-1, 3).numpy())
    assert len(whole.faces) == 2 * 31 * 31
    toward = whole.vertices[whole.faces[:, 0]] - np.array([0, 0, 1.0])
    assert ((face_normals(whole) * toward).sum(axis=1) < 0).all()

    ball = depth_mesh(xyz, keep=hit)
    assert np.abs(np.linalg.norm(ball.vertices, axis=1) - RADIUS).max() < 1e-6
    assert len(ball.vertices) <= int(hit.sum())

    cut = depth_mesh(xyz, max_stretch=8)
    on_wall = np.abs(cut.vertices[:, 2] + 0.12) < 1e-6
    assert on_wall.any() and (~on_wall).any()
    per_face = on_wall[cut.faces].sum(axis=1)
    assert set(per_face) == {0, 3}  # no curtain from the ball to the wall
    assert len(cut.faces) > 0.8 * len(whole.faces)


def test_map_that_is_not_square_and_colours() -> None:
    xyz = torch.stack([*torch.meshgrid(torch.arange(5.0), torch.arange(3.0), indexing="xy"), torch.zeros(3, 5)])
    xyz[1] *= -1  # rows go down
    colors = torch.randint(0, 256, (3, 3, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for reference in (False, True):
        mesh = depth_mesh(xyz, colors=colors, reference=reference)
        normal = face_normals(mesh)
        assert np.allclose(normal, [0, 0, 1])  # unit cells towards +z: no triangle across rows
        assert np.array_equal(mesh.colors[7], colors[:, 1, 2].numpy())
    kept = torch.ones(3, 5, dtype=torch.bool)
    kept[:, 3:] = False
    part = depth_mesh(xyz, keep=kept, colors=colors)
    assert len(part.vertices) == 9 and np.array_equal(part.colors[3], colors[:, 1, 0].numpy())


def test_refusals() -> None:
    xyz = torch.zeros(3, 4, 5)
    for bad in (xyz[0], torch.zeros(3, 1, 5), torch.zeros(2, 4, 5)):
        with pytest.raises(ValueError, match="xyz must be"):
            depth_mesh(bad)
    with pytest.raises(ValueError, match="not finite at 1 pixels"):
        depth_mesh(xyz.index_put((torch.tensor(0), torch.tensor(1), torch.tensor(1)), torch.tensor(math.nan)))
    with pytest.raises(ValueError, match="keep must be"):
        depth_mesh(xyz, keep=torch.ones(5, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="no triangle is left"):
        depth_mesh(xyz, keep=torch.zeros(4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="colors must be"):
        depth_mesh(xyz, colors=torch.zeros(3, 5, 4, dtype=torch.uint8))


def test_normals_and_merging_equal_trimesh() -> None:
    import trimesh

    rng = np.random.default_rng(0)
    vertices = rng.normal(size=(40, 3)).astype(np.float32)
    vertices[17], vertices[23] = vertices[4], vertices[4]
    faces = rng.integers(0, 39, (70, 3)).astype(np.int32)  # vertex 39 is unused
    faces = faces[(faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 0] != faces[:, 2])]
    ours, theirs = merge_equal_vertices(Mesh(vertices, faces)), trimesh.Trimesh(vertices, faces)
    assert len(ours.vertices) == len(theirs.vertices) < 39
    assert np.array_equal(ours.vertices[ours.faces], theirs.vertices[theirs.faces].astype(np.float32))
    raw = trimesh.Trimesh(vertices, faces, process=False)
    got = angle_weighted_normals(vertices, faces)
    np.testing.assert_allclose(got, raw.vertex_normals, atol=1e-9)
    assert (got[39] == 0).all()
    assert len(compact(Mesh(vertices, faces)).vertices) == len(np.unique(faces))
