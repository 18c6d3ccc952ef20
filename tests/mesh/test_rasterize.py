# SPDX-License-Identifier: Apache-2.0
"""The rasteriser against hand-computed pixels, against the volume renderer's rays, and torch against numba."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from facelab.cameras.camera import Camera
from facelab.cameras.rays import make_rays
from facelab.mesh import Incidence, interpolate, rasterize, vertex_normals

FRONT = Camera.on_sphere(math.pi / 2, math.pi / 2, fov=12)
SIDE = 2 * math.tan(math.radians(6))  # visible side at distance 1


def soup(count: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return (torch.rand(3, 300, 3, generator=g) - 0.5) * 0.22, torch.randint(0, 300, (count, 3), generator=g)


@pytest.mark.parametrize("grid", ["corners", "centers"])
@pytest.mark.parametrize("supersample", [1, 3])
def test_torch_equals_numba(grid: str, supersample: int) -> None:
    vertices, faces = soup()
    camera = Camera.on_sphere([1.4, 1.6, 1.7], [1.5, 1.2, 2.0], 12)
    one, two = (
        rasterize(vertices, faces, camera, 21, grid, supersample=supersample, backend=name)
        for name in ("torch", "numba")
    )
    assert one.hit.float().mean() > 0.3
    assert torch.equal(one.face, two.face)
    assert torch.equal(one.depth, two.depth)
    assert torch.equal(one.barycentric, two.barycentric)


def test_work_in_portions_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    vertices, faces = soup(200)
    camera = FRONT[[0, 0, 0]]
    whole = rasterize(vertices, faces, camera, 21, backend="torch")
    monkeypatch.setattr(sys.modules["facelab.mesh.rasterize"], "MAX_PAIRS", 700)
    assert torch.equal(rasterize(vertices, faces, camera, 21, backend="torch").face, whole.face)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_pixels_of_a_half_plane(backend: str) -> None:
    """A square that ends at u = 0.5: which pixel columns it covers tells where the pixels are."""
    s = SIDE
    vertices = torch.tensor([[[-s, -s, 0.0], [0, -s, 0], [0, s, 0], [-s, s, 0]]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    corners = rasterize(vertices, faces, FRONT, 5, "corners", backend=backend)
    assert corners.hit[0, 2].tolist() == [True, True, True, False, False]  # u = 0, 1/4, 1/2, 3/4, 1
    centers = rasterize(vertices, faces, FRONT, 4, "centers", backend=backend)
    assert centers.hit[0, 2].tolist() == [True, True, False, False]  # u = 1/8, 3/8, 5/8, 7/8
    assert torch.allclose(centers.depth[centers.hit], torch.tensor(1.0), atol=1e-6)


@pytest.mark.parametrize("grid", ["corners", "centers"])
def test_meets_the_rays_of_the_volume_renderer(grid: str) -> None:
    """Surface points found by the rasteriser lie on the ray of their pixel."""
    vertices, faces = soup(60)
    camera = Camera.on_sphere([1.4, 1.6, 1.7], [1.5, 1.2, 2.0], 12)
    size = 16
    seen = rasterize(vertices, faces, camera, size, grid)
    points = interpolate(vertices, faces, seen).flatten(1, 2)
    rays = make_rays(camera, size, grid)
    t = ((points - rays.origins) * rays.directions).sum(-1, keepdim=True)
    miss = (rays.origins + t * rays.directions - points).norm(dim=-1)
    hit = seen.hit.flatten(1)
    assert hit.sum() > 100
    assert miss[hit].max() < 2e-6
    forward = camera.cam2world[:, None, :3, 2]
    z = ((points - rays.origins) * forward).sum(-1)
    assert torch.allclose(z[hit], seen.depth.flatten(1)[hit], atol=2e-6)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_perspective_correct_weights(backend: str) -> None:
    """On a slanted triangle the weights reproduce the intersection computed by hand."""
    vertices = torch.tensor([[[-0.3, -0.3, 0.4], [0.3, -0.3, -0.5], [0.0, 0.4, 0.1]]])
    faces = torch.tensor([[0, 1, 2]])
    seen = rasterize(vertices, faces, FRONT, 3, "corners", backend=backend)
    middle = seen.barycentric[0, 1, 1]
    # the ray x = y = 0 meets the triangle where b0 = b1 and 0.4 b2 = 0.3 (b0 + b1)
    assert torch.allclose(middle, torch.tensor([2 / 7, 2 / 7, 3 / 7]), atol=1e-5)
    assert seen.depth[0, 1, 1] == pytest.approx(1 - (0.4 * 2 / 7 - 0.5 * 2 / 7 + 0.1 * 3 / 7), abs=1e-5)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_nearest_wins_and_ties_go_to_the_lower_face(backend: str) -> None:
    square = [[-0.3, -0.3], [0.3, -0.3], [0.0, 0.4]]
    vertices = torch.tensor([[[*p, z] for z in (0.0, 0.1) for p in square]])
    far, near = [0, 1, 2], [3, 4, 5]
    assert (rasterize(vertices, torch.tensor([far, near]), FRONT, 3, backend=backend).face[0, 1, 1]) == 1
    twice = rasterize(vertices, torch.tensor([near[::-1], far, near]), FRONT, 3, backend=backend)
    assert twice.face[0, 1, 1] == 0
    clipped = rasterize(vertices, torch.tensor([far, near]), FRONT, 3, backend=backend, near=0.95)
    assert clipped.face[0, 1, 1] == 0
    assert not rasterize(vertices, torch.tensor([far, near]), FRONT, 3, backend=backend, far=0.5).hit.any()


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_behind_the_camera_and_flat_triangles_are_dropped(backend: str) -> None:
    vertices = torch.tensor([[[-1.0, -1, 2], [1, -1, 2], [0, 1, 2], [0, 0, 0], [0, 0, 0], [0, 0, 0]]])
    seen = rasterize(vertices, torch.tensor([[0, 1, 2], [3, 4, 5]]), FRONT, 5, "corners", backend=backend)
    assert not seen.hit.any()


def test_supersampled_middle_is_the_pixel() -> None:
    vertices, faces = soup()
    for grid in ("corners", "centers"):
        plain = rasterize(vertices, faces, FRONT[[0, 0, 0]], 11, grid)
        fine = rasterize(vertices, faces, FRONT[[0, 0, 0]], 11, grid, supersample=3)
        assert (plain.face == fine.face[:, 1::3, 1::3]).float().mean() > 0.995  # rounding at edges


def test_bad_arguments() -> None:
    vertices, faces = soup()
    with pytest.raises(ValueError, match="Did you mean 'corners'"):
        rasterize(vertices, faces, FRONT, 8, "corner")
    with pytest.raises(ValueError, match="backend must be"):
        rasterize(vertices, faces, FRONT, 8, backend="cuda")
    with pytest.raises(ValueError, match=r"vertices must be \(N, V, 3\)"):
        rasterize(vertices[0], faces, FRONT, 8)


def test_normals_of_a_sphere_with_poles() -> None:
    rows, columns = 20, 40
    polar = math.pi * torch.arange(1, rows) / rows
    angle = 2 * math.pi * torch.arange(columns) / columns
    ring = torch.stack(
        [
            polar.sin()[:, None] * angle.sin(),
            polar.cos()[:, None].expand(-1, columns),
            polar.sin()[:, None] * angle.cos(),
        ],
        -1,
    )
    points = torch.cat([ring.reshape(-1, 3), torch.tensor([[0.0, 1, 0], [0, -1, 0]])])
    faces = []
    for r in range(rows - 2):
        for c in range(columns):
            a, b = r * columns + c, r * columns + (c + 1) % columns
            faces += [[a, a + columns, b], [b, a + columns, b + columns]]
    top, bottom, last = len(points) - 2, len(points) - 1, (rows - 2) * columns
    for c in range(columns):
        faces += [[top, c, (c + 1) % columns], [bottom, last + (c + 1) % columns, last + c]]
    triangles = torch.tensor(faces)
    around = Incidence.of(triangles, len(points))
    assert len(around.poles) == 2 and around.pole_table.shape[1] == columns - 8
    normals = vertex_normals(points[None], triangles, around)[0]
    assert (normals * points).sum(-1).min() > 0.999
