# SPDX-License-Identifier: Apache-2.0
"""EG3D labels: conventions, mirror images and crops against projections computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from facelab.cameras.camera import Camera
from facelab.data import eg3d_labels as labels
from facelab.data.synthetic import project_points
from facelab.errors import UserError


def some_labels(count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    yaw = math.pi / 2 + 0.6 * torch.randn(count, generator=generator, dtype=torch.float64)
    pitch = math.pi / 2 + 0.2 * torch.randn(count, generator=generator, dtype=torch.float64)
    return Camera.on_sphere(pitch, yaw, 13.0, 2.7).label().double()


def test_mirror_label_projects_mirrored_points_to_mirrored_places() -> None:
    label, points = some_labels(), torch.randn(4, 7, 3, dtype=torch.float64) * 0.3
    place = project_points(points, Camera.from_label(label))
    mirrored = project_points(points * torch.tensor([-1.0, 1, 1]), Camera.from_label(labels.mirror_label(label)))
    torch.testing.assert_close(mirrored, torch.stack([1 - place[..., 0], place[..., 1]], -1))
    assert not torch.allclose(labels.mirror_label(label), label)
    torch.testing.assert_close(labels.mirror_label(labels.mirror_label(label)), label)


def test_every_convention_comes_to_the_same_camera() -> None:
    camera = Camera.from_label(some_labels()).cam2world
    flip = torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))
    given = {
        "opencv_c2w": camera,
        "opengl_c2w": camera @ flip,
        "opencv_w2c": torch.linalg.inv(camera),
        "opengl_w2c": flip @ torch.linalg.inv(camera),
    }
    assert set(given) == set(labels.CONVENTIONS)
    for convention, matrix in given.items():
        torch.testing.assert_close(labels.to_opencv_cam2world(matrix, convention), camera, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="Did you mean 'opencv_c2w'"):
        labels.to_opencv_cam2world(camera, "opencv-c2w")
    with pytest.raises(UserError, match="singular"):
        labels.to_opencv_cam2world(torch.zeros(1, 4, 4), "opencv_w2c")


def test_scaling_positions_and_points_alike_changes_no_picture() -> None:
    label, points = some_labels(), torch.randn(4, 5, 3, dtype=torch.float64) * 0.2
    scaled = labels.rescale_positions(label, 2.7)
    place = project_points(points, Camera.from_label(label))
    torch.testing.assert_close(project_points(points * 2.7, Camera.from_label(scaled)), place)
    moved = labels.on_radius(label, 1.5)
    torch.testing.assert_close(moved[:, [3, 7, 11]].norm(dim=1), torch.full((4,), 1.5, dtype=torch.float64))
    with pytest.raises(ValueError, match="origin"):
        labels.on_radius(label * 0, 1.0)


def test_frontal_reconstruction_stands_in_front() -> None:
    label = labels.label_from_face_model(torch.zeros(1, 3), torch.zeros(1, 3))[0]
    pose = label[:16].reshape(4, 4)
    assert pose[2, 3] == pytest.approx(2.7, abs=1e-4) and pose[2, 2] == pytest.approx(-1)
    assert label[16] == pytest.approx(4.2647, abs=1e-5)


def test_modes_cor_and_simplify_share_a_position_and_simplify_has_no_roll() -> None:
    pose = labels.pose_from_face_model(torch.tensor([[0.1, 0.4, 0.3]]), torch.tensor([[0.05, 0.02, 0.1]]))
    cor, simple = (labels.normalise_pose(pose, mode) for mode in ("cor", "simplify"))
    torch.testing.assert_close(cor[:, :3, 3], simple[:, :3, 3])
    torch.testing.assert_close(cor[:, :3, :3], pose[:, :3, :3])
    rotation = simple[0, :3, :3]
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(3, dtype=torch.float64))
    assert torch.linalg.det(rotation) == pytest.approx(1) and rotation[1, 0] == pytest.approx(0, abs=1e-12)
    towards = torch.tensor(labels.COR_CENTRE, dtype=torch.float64) - simple[0, :3, 3]
    torch.testing.assert_close(rotation[:, 2], towards / towards.norm())
    with pytest.raises(ValueError, match="Did you mean 'orig'"):
        labels.normalise_pose(pose, "original")


def test_weak_perspective_recovers_scale_and_shift() -> None:
    model = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    points = 120 * model[:, :2] + torch.tensor([300.0, 200.0], dtype=torch.float64)
    assert labels.weak_perspective(points, model) == pytest.approx((120, 300, 200))
    crop = labels.crop_of((600, 400), (120.0, 300.0, 200.0))  # the face is in the middle already, at 2.5 times
    assert (crop.width, crop.height, crop.left, crop.up) == (1500, 1000, 1500 // 2 - 512, 1000 // 2 - 512)
    with pytest.raises(ValueError, match="left eye, right eye"):
        labels.weak_perspective(points[:4], model)
