# SPDX-License-Identifier: Apache-2.0
"""Real photographs, where there are some: FACELAB_REAL_DATA."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facelab.data.preprocess import FileLandmarks, prepare_photo
from facelab.data.preprocess.crop import plan_crop
from facelab.data.preprocess.faces import by_size
from facelab.data.preprocess.head_points import standard_points
from facelab.data.preprocess.labels import view_angles
from facelab.data.preprocess.pose import fit_pose

pytestmark = pytest.mark.shared


def test_cameras_of_portraits(real_data: Path, mtcnn) -> None:
    labels = dict(json.loads((real_data / "eg3d_portraits" / "dataset.json").read_text())["labels"])
    errors, shifts = [], []
    for name, numbers in labels.items():
        image = np.asarray(Image.open(real_data / "eg3d_portraits" / name).convert("RGB"))
        faces = by_size(mtcnn.detect(image, name))
        if name == "cat.png":
            assert faces == []
            continue
        plan = plan_crop(faces[0].points5, image.shape[1::-1], standard_points())
        pose = fit_pose(plan.to_crop(faces[0].points5)).label_pose()
        errors.append(np.degrees(np.subtract(view_angles(pose), view_angles(np.reshape(numbers[:16], (4, 4))))))
        shifts.append(np.abs(plan.to_photo(np.array([[0.0, 0], [1, 1]])) - [[-0.5, -0.5], [511.5, 511.5]]).max())
    yaw, pitch, roll = np.median(np.abs(errors), axis=0)
    assert len(errors) == 18 and yaw < 4 and pitch < 4 and roll < 2
    assert np.median(shifts) < 12  # a crop of a crop is the crop itself


def test_photos_with_points(real_data: Path) -> None:
    folder = real_data / "deep3d_examples"
    photos = sorted(p for p in folder.iterdir() if p.suffix in (".jpg", ".png"))
    found = [prepare_photo(photo, FileLandmarks(folder / "detections")) for photo in photos]
    assert len(found) == 25 and sum(photo.go for photo in found) == 25


@pytest.mark.weights
def test_cameras_of_portraits_from_the_network(real_data: Path, weights_dir: Path, mtcnn) -> None:
    """The references come from the same network, so little more than another crop lies between the two."""
    from facelab.data.preprocess import make_camera_estimator

    weights = next(iter(sorted(weights_dir.rglob("epoch_20.pth"))), None)
    if weights is None:
        pytest.skip(f"needs Deep3DFaceRecon's epoch_20.pth in {weights_dir}")
    camera, errors = make_camera_estimator("deep3d", weights=weights), []
    labels = dict(json.loads((real_data / "eg3d_portraits" / "dataset.json").read_text())["labels"])
    for name, numbers in labels.items():
        found = prepare_photo(real_data / "eg3d_portraits" / name, mtcnn, camera=camera)
        if found.label is not None:
            angles = [view_angles(np.reshape(label[:16], (4, 4))) for label in (found.label, numbers)]
            errors.append(np.degrees(np.subtract(*angles)))
    yaw, pitch, roll = np.median(np.abs(errors), axis=0)
    assert len(errors) == 18 and yaw < 4 and pitch < 4 and roll < 2
