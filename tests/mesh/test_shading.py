# SPDX-License-Identifier: Apache-2.0
"""Shaded pictures: a ball against closed forms, outlines against rays, blending against a loop over all faces."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from facelab.cameras.camera import Camera
from facelab.cameras.rays import make_rays
from facelab.mesh.io import Mesh
from facelab.mesh.nearest_faces import nearest_faces
from facelab.mesh.shading import PointLight, Surface, shade_mesh, shade_values, turntable

FRONT = Camera.on_sphere(math.pi / 2, math.pi / 2, fov=12)
RADIUS = 0.08
LAMP = np.array([0.0, 1.0, 5.0])


def ball(level: int = 5) -> Mesh:
    import trimesh

    model = trimesh.creation.icosphere(subdivisions=level, radius=RADIUS)
    return Mesh(np.asarray(model.vertices, dtype=np.float32), np.asarray(model.faces, dtype=np.int32))


def seen_ball(camera: Camera, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The exact ball by ray casting: eye (3,), points (S, S, 3), NaN beside it, and b^2 - ac, positive on it."""
    rays = make_rays(camera, size, "centers")
    o, d = rays.origins[0].double().numpy(), rays.directions[0].double().numpy()
    b = (o * d).sum(-1)
    root = b * b - (o * o).sum(-1) + RADIUS**2
    t = -b - np.sqrt(np.where(root > 0, root, np.nan))
    return o[0], (o + t[:, None] * d).reshape(size, size, 3), root.reshape(size, size)


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def closed_form(points: np.ndarray, normals: np.ndarray, eye: np.ndarray, lamp: np.ndarray) -> np.ndarray:
    """0.1 + 0.65 max(0, n.l) + 0.2 [n.l > 0] max(0, r.v)^64, written out."""
    to_light, to_eye = unit(lamp - points), unit(eye - points)
    facing = (normals * to_light).sum(-1)
    mirrored = -to_light + 2 * facing[..., None] * normals
    glance = np.maximum(0, (mirrored * to_eye).sum(-1))
    return 0.1 + 0.65 * np.maximum(0, facing) + 0.2 * (facing > 0) * glance**64


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("angles", [(math.pi / 2, math.pi / 2), (1.1, 2.3), (1.8, -1.2)])
def test_ball_has_the_closed_form(angles: tuple[float, float], backend: str) -> None:
    camera = Camera.on_sphere(*angles, fov=12)
    eye, points, root = seen_ball(camera, 48)
    got = shade_values(ball(), camera, 48, backend=backend)[0].numpy()
    inside = root > 1e-3  # a pixel or more from the outline
    expected = closed_form(points[inside], points[inside] / RADIUS, eye, LAMP)
    assert inside.sum() > 500
    assert np.abs(got[inside] - expected[:, None]).max() < 6e-3
    assert np.abs(got[inside] - expected[:, None]).mean() < 6e-4
    outside = root < -1e-4
    assert outside.sum() > 500 and (got[outside] == 1).all()


def test_smooth_normals_of_a_ball() -> None:
    surface = Surface.of(ball())
    assert (surface.normals - surface.vertices / RADIUS).norm(dim=-1).max() < 2e-3


def test_values_by_hand() -> None:
    """The middle pixel of a square at the origin: l.z = 5 / sqrt(26), seen straight on."""
    s = 0.05
    square = Mesh(
        np.array([[-s, -s, 0], [s, -s, 0], [s, s, 0], [-s, s, 0]], dtype=np.float32),
        np.array([[0, 1, 2], [0, 2, 3]]),
        np.array([[255, 0, 51]] * 4, dtype=np.uint8),
    )
    facing = 5 / math.sqrt(26)
    matt, gloss = 0.1 + 0.65 * facing, 0.2 * facing**64
    white = shade_values(Surface.of(square, colored=False), FRONT, 5)[0, 2, 2]
    assert white.tolist() == pytest.approx([matt + gloss] * 3, abs=1e-5)
    for mode in ("nearest", "blend"):
        red = shade_values(square, FRONT, 5, mode=mode)[0, 2, 2]
        assert red.tolist() == pytest.approx([matt + gloss, gloss, 0.2 * matt + gloss], abs=1e-5)
    behind = Camera.on_sphere(math.pi / 2, -math.pi / 2, fov=12)
    back = shade_values(square, behind, 5)[0, 2, 2]  # not culled, lit from its front, no gloss on this side
    assert back.tolist() == pytest.approx([matt, 0, 0.2 * matt], abs=1e-5)
    assert shade_mesh(square, FRONT, 5)[0, :, 0, 0].tolist() == [255, 255, 255]
    picture = shade_mesh(square, FRONT, 5, background=(0, 0, 1))
    assert picture.shape == (1, 3, 5, 5) and picture.dtype == torch.uint8
    assert picture[0, :, 0, 0].tolist() == [0, 0, 255]
    assert picture[0, 0, 2, 2].item() == round(255 * (matt + gloss))


@pytest.mark.parametrize("mode", ["nearest", "blend"])
def test_outline_is_that_of_the_rays(mode: str) -> None:
    """Pixels are hit exactly where the rays of the volume renderer hit, up to the ball's facets."""
    camera = Camera.on_sphere([1.3, 1.6], [1.2, 2.0], 12)
    size = 64
    covered = (shade_values(ball(), camera, size, mode=mode) < 1).all(dim=-1).numpy()
    for n in range(2):
        root = seen_ball(camera[n], size)[2]
        clear = np.abs(root) > 1e-4  # less than a tenth of a pixel is left out: 0.06 % of what decides
        assert clear.mean() > 0.97
        assert np.array_equal(covered[n][clear], (root > 0)[clear])


def test_many_cameras_equal_one_by_one() -> None:
    camera = Camera.on_sphere([1.3, 1.6], [1.2, 2.0], 12)
    for light in (PointLight(), PointLight(attached=True)):
        for mode in ("nearest", "blend"):
            both = shade_mesh(ball(3), camera, 20, mode=mode, light=light)
            single = [shade_mesh(ball(3), camera[n], 20, mode=mode, light=light)[0] for n in range(2)]
            assert torch.equal(both, torch.stack(single))


@pytest.mark.parametrize("mode", ["nearest", "blend"])
def test_pictures_are_made_where_the_surface_is(mode: str, device: torch.device) -> None:
    camera = Camera.on_sphere([1.3, 1.6], [1.2, 2.0], 12)
    lamp = PointLight(attached=True)
    here = shade_mesh(ball(3), camera, 24, mode=mode, light=lamp)
    there = shade_mesh(Surface.of(ball(3), device), camera, 24, mode=mode, light=lamp, backend="torch")
    assert there.device.type == device.type
    far_off = (here.int() - there.cpu().int()).abs() > 1
    assert far_off.float().mean() < 2e-3  # a pixel on an edge may see the neighbour


def soup() -> Mesh:
    """Small triangles in layers a few thousandths apart, some edge on, so that several faces meet in a pixel."""
    rng = np.random.default_rng(3)
    middle = rng.uniform(-0.09, 0.09, (300, 1, 3)) * np.array([1, 1, 0.15])
    corners = (middle + rng.normal(0, 0.02, (300, 3, 3)) * np.array([1, 1, 0.2])).astype(np.float32)
    colors = rng.integers(0, 256, (900, 3)).astype(np.uint8)
    return Mesh(corners.reshape(-1, 3), np.arange(900).reshape(-1, 3), colors)


def blended_by_hand(mesh: Mesh, camera: Camera, size: int) -> tuple[np.ndarray, int]:
    """The formula of the blending, pixel by pixel over all faces, in float64; also the most faces of a pixel."""
    surface = Surface.of(mesh)
    normals, colors = surface.normals.double().numpy(), surface.colors.double().numpy()
    pose = camera.cam2world[0].double().numpy()
    local = (mesh.vertices.astype(np.float64) - pose[:3, 3]) @ pose[:3, :3]
    focal = camera.intrinsics[0, 0, 0].item() * 2
    flat, z = local[:, :2] / local[:, 2:] * focal, local[:, 2]  # image from -1 to 1, y down
    image, most = np.ones((size, size, 3)), 0
    for row in range(size):
        for column in range(size):
            p = np.array([(column + 0.5) * 2 / size - 1, (row + 0.5) * 2 / size - 1])
            found = []
            for face in mesh.faces:
                q = flat[face]
                system = np.vstack([q.T, np.ones(3)])
                if abs(np.linalg.det(system)) < 1e-12:
                    continue
                bary = np.linalg.solve(system, np.array([*p, 1]))
                squared = np.inf
                for a, b in ((0, 1), (1, 2), (2, 0)):
                    t = np.clip((p - q[a]) @ (q[b] - q[a]) / ((q[b] - q[a]) @ (q[b] - q[a])), 0, 1)
                    squared = min(squared, ((p - q[a] - t * (q[b] - q[a])) ** 2).sum())
                inside = (bary >= 0).all()
                if not inside and squared >= 1e-6:
                    continue
                weight = bary / z[face]
                weight = np.clip(weight / weight.sum(), 0, 1)
                weight /= weight.sum()
                found.append((weight @ z[face], -squared if inside else squared, weight, face))
            most = max(most, len(found))
            found = sorted(found, key=lambda f: f[0])[:5]
            if not found:
                continue
            scaled = [(100 - f[0]) / 99.99 for f in found]
            total, summed = 1e-10, np.full(3, 1e-10)
            for (_, d, weight, face), s in zip(found, scaled, strict=True):
                factor = 1 / (1 + np.exp(d / 1e-4)) * np.exp((s - max(scaled)) / 1e-4)
                point = (weight @ mesh.vertices[face].astype(np.float64))[None]
                normal = unit((weight @ normals[face])[None])
                matt = 0.1 + 0.65 * np.maximum(0, (normal * unit(LAMP - point)).sum(-1))
                gloss = closed_form(point, normal, pose[:3, 3], LAMP) - matt
                summed += factor * (matt * (weight @ colors[face]) + gloss)
                total += factor
            image[row, column] = summed / total
    return image, most


def test_blending_by_hand() -> None:
    """With either search for faces."""
    camera, mesh = Camera.on_sphere(1.5, 1.7, 12), soup()
    expected, most = blended_by_hand(mesh, camera, 14)
    assert most > 5  # the limit matters
    for backend in ("torch", "numba"):
        got = shade_values(mesh, camera, 14, mode="blend", backend=backend)[0].double().numpy()
        assert np.abs(got - expected).max() < 2e-4, backend
    nearest = shade_values(mesh, camera, 14)[0].double().numpy()
    assert np.abs(nearest - expected).max() > 0.1  # the test would see a renderer that does not blend
    assert (expected < 1).any() and (expected == 1).any()


def test_compiled_and_plain_search_agree() -> None:
    mesh, camera = soup(), Camera.on_sphere([1.4, 1.6], [1.5, 2.0], 12)
    vertices, faces = torch.from_numpy(mesh.vertices)[None], torch.from_numpy(mesh.faces)
    faces = torch.cat([faces, faces[:40]])  # equal depths
    for count, radius, near in ((5, 1e-4, 0.0), (2, 1e-3, 0.98), (1, 0.0, 0.0)):
        plain, compiled = (
            nearest_faces(vertices, faces, camera, 33, count, radius, near=near, far=1.02, backend=name)
            for name in ("torch", "numba")
        )
        assert len(plain.pixel) > 500 and (plain.distance > 0).any() == (radius > 0)
        assert 0.98 - 0.1 * (near == 0) <= plain.depth.min() and plain.depth.max() <= 1.02
        for name in ("pixel", "rank", "face"):
            assert torch.equal(getattr(plain, name), getattr(compiled, name)), name
        for name in ("barycentric", "depth", "distance"):
            torch.testing.assert_close(getattr(plain, name), getattr(compiled, name), rtol=0, atol=1e-12)


def test_near_and_far_hide() -> None:
    """Two squares one behind the other: the range of distances says which is seen."""
    square = np.array([[-0.1, -0.1, 0], [0.1, -0.1, 0], [0.1, 0.1, 0], [-0.1, 0.1, 0]], dtype=np.float32)
    vertices = np.concatenate([square, square + np.float32([0, 0, 0.1])])
    faces = np.array([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]])
    colors = np.repeat(np.array([[255, 0, 0], [0, 0, 255]], dtype=np.uint8), 4, axis=0)
    light = PointLight(ambient=1.0, diffuse=0.0, specular=0.0)
    seen = {}
    for mode in ("nearest", "blend"):
        for backend in ("torch", "numba"):
            for near, far in ((0.0, 9.0), (0.95, 9.0), (0.0, 0.95), (1.5, 9.0)):
                picture = shade_mesh(
                    Mesh(vertices, faces, colors), FRONT, 4, light=light, mode=mode, near=near, far=far, backend=backend
                )
                seen.setdefault((near, far), set()).add(tuple(picture[0, :, 1, 2].tolist()))
    blue, red, white = {(0, 0, 255)}, {(255, 0, 0)}, {(255, 255, 255)}
    assert list(seen.values()) == [blue, red, blue, white]


def test_near_faces_are_sorted_and_limited() -> None:
    mesh, camera = soup(), FRONT
    vertices, faces = torch.from_numpy(mesh.vertices)[None], torch.from_numpy(mesh.faces)
    all_of_them = nearest_faces(vertices, faces, camera, 24, count=100)
    two = nearest_faces(vertices, faces, camera, 24, count=2)
    assert int(two.rank.max()) == 1 and int(all_of_them.rank.max()) > 4
    same = all_of_them.take((all_of_them.rank < 2).nonzero()[:, 0])
    assert torch.equal(same.face, two.face) and torch.equal(same.pixel, two.pixel)
    following = all_of_them.pixel[1:] == all_of_them.pixel[:-1]
    assert (all_of_them.depth[1:] >= all_of_them.depth[:-1] - 1e-7)[following].all()
    assert (all_of_them.distance <= 0).all()
    nothing = nearest_faces(vertices - 5, faces, camera, 24)
    assert len(nothing.pixel) == 0
    assert (shade_values(Mesh(mesh.vertices - 5, mesh.faces), camera, 8, mode="blend") == 1).all()


def test_supersampling_averages() -> None:
    fine = shade_values(ball(3), FRONT, 24)[0]
    coarse = shade_values(ball(3), FRONT, 8, supersample=3)[0]
    assert torch.allclose(coarse[5, 2], fine[15:18, 6:9].mean(dim=(0, 1)), atol=1e-6)


def test_turn_of_a_lamp_that_goes_with_the_camera() -> None:
    """A ball looks the same from all sides, unless the lamp stays."""
    surface = Surface.of(ball(5))
    frames = list(turntable(surface, 4, elevation=0.3, size=32))
    assert len(frames) == 4 and frames[0].shape == (3, 32, 32)
    for frame in frames[1:]:
        assert (frame.int() - frames[0].int()).abs().float().mean() < 0.5
    fixed = [frame.float().mean().item() for frame in turntable(surface, 4, size=32, light=PointLight())]
    assert fixed[0] > fixed[2] + 20  # the back is in the dark
    front = next(turntable(surface, 1, size=32))
    assert (front.int() - shade_mesh(surface, FRONT, 32)[0].int()).abs().max() <= 1


def test_turn_finds_a_mesh_elsewhere() -> None:
    far = ball(3)
    far = Mesh(far.vertices * 7 + np.float32(3), far.faces)
    for frame in turntable(far, 3, size=24, center=None):
        covered = (frame < 255).any(dim=0)
        assert covered.float().mean() > 0.5
        assert not (covered[0].any() or covered[-1].any() or covered[:, 0].any() or covered[:, -1].any())
    swing = list(turntable(ball(3), 4, size=16, sway=0.4, light=PointLight()))
    assert torch.equal(swing[1], swing[3])
    assert not torch.equal(swing[0], swing[2])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="mode must be one of .* got 'blent'. Did you mean"):
        shade_mesh(ball(1), FRONT, 8, mode="blent")
    with pytest.raises(ValueError, match="size and supersample"):
        shade_mesh(ball(1), FRONT, 0)
    with pytest.raises(ValueError, match="at least one frame"):
        next(turntable(ball(1), 0))
