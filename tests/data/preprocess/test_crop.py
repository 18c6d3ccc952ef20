# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facelab.data.preprocess.crop import CropPlan, cut, plan_crop
from facelab.data.preprocess.head_points import align_frames, head_points, standard_points
from tests.data.pictures import smooth_picture

POINTS = np.array([[142.8, 207.2], [222.0, 203.9], [159.2, 253.6], [146.6, 290.9], [227.5, 284.7]])


def test_plan_matches_golden(golden_dir: Path) -> None:
    path = golden_dir / "eg3d" / "face_labels.npz"
    if not path.is_file():
        pytest.skip(f"no golden case {path}")
    golden, meta = np.load(path), json.loads(path.with_suffix(".json").read_text())["config"]
    for i, (width, height, *_rest) in enumerate(golden["align_params"]):
        upward = golden[f"lm5_{i}"].astype(np.float64)
        points = np.stack([upward[:, 0], height - 1 - upward[:, 1]], axis=-1)
        size = (int(width), int(height))
        plan = plan_crop(
            points, size, golden["lm3d"].astype(np.float64), meta["rescale_factor"], meta["target_size"], 700
        )
        assert (*plan.resized, *plan.corner) == tuple(golden["align_resize_w_h_left_up"][i])


def test_coordinates_go_there_and_back() -> None:
    plan = plan_crop(POINTS, (423, 594), standard_points())
    inside = plan.to_crop(POINTS)
    assert ((inside > 0.2) & (inside < 0.8)).all()
    np.testing.assert_allclose(plan.to_photo(inside), POINTS, atol=1e-9)


def test_cut_is_scaling_the_whole_photo_and_cutting() -> None:
    rng = np.random.default_rng(0)
    photo = Image.fromarray(smooth_picture(423, 594)).resize((423, 594))
    noise = Image.fromarray(rng.integers(0, 255, (60, 43, 3), dtype=np.uint8)).resize(
        (423, 594), Image.Resampling.BICUBIC
    )
    photo = Image.blend(photo, noise, 0.5)
    plan = plan_crop(POINTS, photo.size, standard_points())
    left, top = plan.corner
    whole = photo.resize(plan.resized, Image.Resampling.BICUBIC).crop((left, top, left + 1024, top + 1024))
    expected = whole.crop((162, 162, 862, 862)).resize((512, 512), Image.Resampling.LANCZOS)
    difference = np.abs(np.asarray(cut(photo, plan)).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 2
    assert np.asarray(expected).std() > 20


def test_points_land_on_the_same_pixels() -> None:
    photo = np.zeros((300, 260, 3), np.uint8)
    points = POINTS * 0.5 + 30
    row, column = 120, 100
    photo[row, column] = 255
    plan = plan_crop(points, (260, 300), standard_points())
    crop = np.asarray(cut(Image.fromarray(photo), plan, 700)).astype(float).mean(-1)
    rows, columns = np.mgrid[:700, :700]
    middle = np.array([(crop * columns).sum(), (crop * rows).sum()]) / crop.sum() + 0.5
    np.testing.assert_allclose(plan.to_crop(np.array([column, row])) * 700, middle, atol=0.5)


def test_a_tiny_face_in_a_large_photo_costs_little() -> None:
    photo = Image.new("RGB", (4000, 3000), (10, 20, 30))
    points = np.array([2000.0, 1500.0]) + 0.05 * (POINTS - POINTS.mean(0))
    plan = plan_crop(points, photo.size, standard_points())
    assert plan.resized[0] > 100_000  # the whole photo would take 30 GB
    assert cut(photo, plan).size == (512, 512)


def test_outside_is_black_and_counted() -> None:
    plan = CropPlan((100, 100), (700, 700), (-162 - 350, -162), 1024, 700)
    assert plan.outside() == pytest.approx(0.5)
    crop = np.asarray(cut(Image.new("RGB", (100, 100), (200, 200, 200)), plan, 700))
    assert crop[:, :349].max() == 0 and crop[:, 351:].min() == 200


def test_points_on_one_spot() -> None:
    with pytest.raises(ValueError, match="one spot"):
        plan_crop(np.full((5, 2), 3.0), (100, 100), standard_points())


def test_standard_points_are_where_the_originals_are(golden_dir: Path) -> None:
    path = golden_dir / "cgof" / "align.npz"
    if not path.is_file():
        pytest.skip(f"no golden case {path}")
    official = np.load(path)["lm3d"].astype(np.float64)
    scale, shift = align_frames(official)
    from facelab.data.preprocess import head_points as module

    assert scale == pytest.approx(module.STANDARD_SCALE, abs=1e-3)
    np.testing.assert_allclose(shift, module.STANDARD_SHIFT, atol=1e-3)
    assert np.abs(standard_points() - official).max() < 0.07  # 7 mm: another head, not another place


def test_five_points_are_symmetric() -> None:
    mean = head_points(5).mean
    np.testing.assert_allclose(mean[[1, 0, 2, 4, 3]] * [-1, 1, 1], mean, atol=1e-6)
    assert mean[1, 0] > 0  # picture-right eye is the subject's left: +x
