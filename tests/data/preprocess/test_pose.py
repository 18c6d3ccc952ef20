# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from facelab.data.eg3d_labels import mirror_label as mirror_reference
from facelab.data.preprocess.head_points import head_points
from facelab.data.preprocess.labels import FLIP, FOCAL, label, label_from_coefficients, mirror_label, view_angles
from facelab.data.preprocess.pose import POINT_NOISE, fit_pose, project


def camera(yaw: float, pitch: float, roll: float, distance: float = 2.7) -> np.ndarray:
    """(4, 4): degrees; the camera looks at a point in the head."""
    turn = Rotation.from_euler("YXZ", [yaw, -pitch, roll], degrees=True).as_matrix()
    pose = np.eye(4)
    pose[:3, :3] = turn @ FLIP
    pose[:3, 3] = np.array([0.0, 0.01, 0.16]) + distance * turn[:, 2]
    return pose


@pytest.mark.parametrize("count", [5, 68])
@pytest.mark.parametrize(("yaw", "pitch", "roll"), [(0, 0, 0), (25, -8, 10), (-35, 15, -20), (10, 20, 5)])
def test_known_camera_is_found(count: int, yaw: float, pitch: float, roll: float) -> None:
    truth = camera(yaw, pitch, roll)
    fit = fit_pose(project(truth, head_points(count).mean))  # type: ignore[arg-type]
    turn = Rotation.from_matrix(fit.cam2world[:3, :3].T @ truth[:3, :3]).magnitude()
    assert math.degrees(turn) < 1.0
    np.testing.assert_allclose(fit.cam2world[:3, 3], truth[:3, 3], atol=0.04)
    assert fit.misfit < 0.5
    assert np.linalg.norm(fit.label_pose()[:3, 3]) == pytest.approx(2.7)


def test_angles_mean_what_they_say() -> None:
    yaw, pitch, roll = (math.degrees(v) for v in view_angles(camera(20, 12, 0)))
    assert (yaw, pitch, roll) == pytest.approx((20, 12, 0), abs=1e-6)
    assert camera(20, 12, 0)[0, 3] > 0.5 and camera(20, 12, 0)[1, 3] > 0.3  # subject's left, above
    leaning = camera(0, 0, 15)
    assert math.degrees(view_angles(leaning)[2]) == pytest.approx(15, abs=1e-6)
    top = project(leaning, np.array([[0.0, 0.3, 0.0], [0.0, -0.3, 0.0]]))
    assert top[0, 0] > top[1, 0]  # the head leans towards picture-right


@pytest.mark.parametrize(("count", "limit"), [(5, 5.0), (68, 2.0)])
def test_other_people_and_noisy_points(count: int, limit: float) -> None:
    rng = np.random.default_rng(1)
    head, errors = head_points(count), []  # type: ignore[arg-type]
    for _ in range(20):
        truth = camera(*rng.normal(0, [18, 8, 5]))
        shape = head.mean + np.tensordot(rng.normal(size=len(head.basis)), head.basis, axes=1)
        fit = fit_pose(project(truth, shape) + rng.normal(0, POINT_NOISE / 2, (count, 2)))
        errors.append(np.degrees(np.abs(np.subtract(view_angles(fit.cam2world), view_angles(truth)))[:2].max()))
    assert np.median(errors) < limit


def test_wrong_points_do_not_fit() -> None:
    points = project(camera(0, 0, 0), head_points(5).mean)
    swapped = points[[3, 4, 2, 0, 1]]  # eyes and mouth exchanged
    assert fit_pose(swapped).misfit > 2.5 > 10 * fit_pose(points).misfit


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(5, 2\) or \(68, 2\)"):
        fit_pose(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="finite"):
        fit_pose(np.full((5, 2), np.nan))


def test_mirrored_points_give_the_mirrored_camera() -> None:
    truth = camera(25, -8, 10)
    points = project(truth, head_points(5).mean)
    mirrored = (points * [-1, 1] + [1, 0])[[1, 0, 2, 4, 3]]
    a, b = label(fit_pose(points).label_pose()), label(fit_pose(mirrored).label_pose())
    np.testing.assert_allclose(mirror_label(a), b, atol=1e-3)


def test_labels_agree_with_the_data_sets() -> None:
    import torch

    numbers = label(camera(10, 5, 3))
    assert numbers[16] == pytest.approx(FOCAL) and numbers.shape == (25,)
    np.testing.assert_allclose(mirror_label(numbers), mirror_reference(torch.from_numpy(numbers)[None])[0].numpy())
    straight = label_from_coefficients(np.zeros(3), np.zeros(3))
    assert [math.degrees(v) for v in view_angles(straight[:16].reshape(4, 4))] == pytest.approx([0, 0, 0], abs=1e-6)
