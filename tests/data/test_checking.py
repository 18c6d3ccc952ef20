# SPDX-License-Identifier: Apache-2.0
"""The check of a data set finds each thing that it is there to find, and nothing in a sound set."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from facelab.cameras.camera import Camera
from facelab.cli.prepare import prepare_data as main
from facelab.data.checking import SetReport, check_cameras, check_set, common_point, guess_convention, pose_angles
from facelab.data.eg3d_dataset import Eg3dDataset
from facelab.data.eg3d_labels import CONVENTIONS
from facelab.data.eg3d_prepare import synthetic_items, write_items

FLIP = torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))


def cameras(count: int = 400, h: float = 0.3, v: float = 0.15) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    yaw = math.pi / 2 + h * torch.randn(count, generator=generator)
    pitch = math.pi / 2 + v * torch.randn(count, generator=generator)
    return Camera.on_sphere(pitch, yaw, 13.0, 2.7).label().double()


def judged(labels: torch.Tensor) -> SetReport:
    report = SetReport("x", len(labels))
    check_cameras(labels, [f"{k}.png" for k in range(len(labels))], report)
    return report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_items(tmp_path / "set", synthetic_items(6, 48, 1), masks=True)
    return tmp_path / "set"


def check(folder: Path) -> SetReport:
    return check_set(Eg3dDataset(folder, masks=True, cache="none"))


def edit_labels(folder: Path, change: Callable[[int, list[float]], list[float]]) -> None:
    path = folder / "dataset.json"
    labels = json.loads(path.read_text())["labels"]
    path.write_text(json.dumps({"labels": [[name, change(k, v)] for k, (name, v) in enumerate(labels)]}))


def test_sound_set_has_nothing_to_complain_about(folder: Path) -> None:
    report = check(folder)
    assert not report.problems and not report.warnings and report.decoded == 6
    assert report.sizes == {"48x48": 6} and report.poses is not None and report.masks is not None
    assert report.poses.radius == pytest.approx((2.7, 2.7, 2.7)) and report.masks.own_better == 1


def test_deviations_are_those_of_the_sampler() -> None:
    stats = judged(cameras()).poses
    assert stats is not None and stats.convention == "opencv_c2w"
    assert stats.h_stddev == pytest.approx(0.3, rel=0.1) and stats.v_stddev == pytest.approx(0.15, rel=0.1)
    assert abs(stats.h_mean) < 0.05 and stats.roll_stddev < 1e-3
    assert stats.look_at == pytest.approx((0, 0, 0), abs=1e-4)


def test_pose_angles_of_known_cameras() -> None:
    left = Camera.on_sphere(math.pi / 2 - 0.2, math.pi / 2 - 0.4, 13.0, 2.7).cam2world.double()
    assert pose_angles(left)[0].tolist() == pytest.approx([0.4, 0.2, 0.0], abs=1e-6)  # to the subject's left, above
    cosine, sine = math.cos(0.1), math.sin(0.1)
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[cosine, -sine], [sine, cosine]])
    assert pose_angles(left @ turn)[0].tolist() == pytest.approx([0.4, 0.2, 0.1], abs=1e-6)


def test_common_point_is_where_the_axes_meet() -> None:
    matrix = cameras(5)[:, :16].reshape(-1, 4, 4)
    matrix[:, :3, 3] += torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    assert common_point(matrix) == pytest.approx((0.1, -0.2, 0.3), abs=1e-5)
    assert common_point(matrix[:1]) is None


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_foreign_conventions_are_recognised(convention: str) -> None:
    labels = cameras(50)
    matrix = labels[:, :16].reshape(-1, 4, 4)
    if convention.startswith("opengl"):
        matrix = matrix @ FLIP
    if convention.endswith("w2c"):
        matrix = torch.linalg.inv(matrix)
    assert guess_convention(matrix) == convention
    labels[:, :16] = matrix.flatten(1)
    problems = judged(labels).problems
    assert bool(problems) == (convention != "opencv_c2w")
    assert all(f"--convention {convention}" in line for line in problems)
    assert judged(labels).poses.h_stddev == pytest.approx(0.3, rel=0.25)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "words", "where"),
    [
        (lambda v: [-v[0], *v[1:4], -v[4], *v[5:8], -v[8], *v[9:]], "negative determinant", "problems"),
        (lambda v: [*v[:12], 0.5, *v[13:]], "last row", "problems"),
        (lambda v: [*v[:16], 512.0, 0, 256.0, 0, 512.0, 256.0, 0, 0, 1], "not normalised", "problems"),
        (lambda v: [1.1 * v[0], *v[1:]], "not orthonormal", "warnings"),
        (lambda v: [*v[:3], 1.2 * v[3], *v[4:7], 1.2 * v[7], *v[8:11], 1.2 * v[11], *v[12:]], "radius", "warnings"),
        (lambda v: [*v[:18], 0.7, *v[19:]], "principal point", "notes"),
    ],
)
def test_one_bad_camera_is_named(folder: Path, change, words: str, where: str) -> None:
    edit_labels(folder, lambda k, v: change(v) if k == 4 else v)
    lines = getattr(check(folder), where)
    assert any(words in line and "1 of 6" in line and "img00000004.png" in line for line in lines), lines


def test_cameras_that_look_elsewhere_are_reported() -> None:
    labels = cameras(50)
    labels[:, [3, 11]] *= -1  # the positions behind the head, the views as before: away from it
    report = judged(labels)
    assert any("do not look at the origin" in line for line in report.warnings) or report.problems


def test_damaged_files_and_copies_are_found(folder: Path) -> None:
    images = folder / "images/00000"
    (images / "img00000005.png").write_bytes((images / "img00000001.png").read_bytes())
    content = (images / "img00000003.png").read_bytes()
    (images / "img00000003.png").write_bytes(content[: len(content) // 2])
    report = check(folder)
    assert len(report.problems) == 1 and "img00000003.png" in report.problems[0] and report.decoded == 5
    (copies,) = [line for line in report.warnings if "copies" in line]
    assert "1 pictures" in copies and "img00000005.png of images/00000/img00000001.png" in copies


@pytest.mark.parametrize("broken", [[0, 1, 4], [1, 4, 6]], ids=["the first picture too", "the labels too"])
def test_every_damaged_member_of_a_zip_is_named(tmp_path: Path, broken: list[int]) -> None:
    write_items(tmp_path / "set.zip", synthetic_items(6, 16, 1))
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        members = archive.infolist()
    data = bytearray((tmp_path / "set.zip").read_bytes())
    for index in broken:
        data[members[index].header_offset + 30 + len(members[index].filename) + members[index].file_size // 2] ^= 255
    (tmp_path / "set.zip").write_bytes(data)
    result = CliRunner().invoke(main, ["check", str(tmp_path / "set.zip")])
    lines = [line for line in result.output.splitlines() if "damaged in the archive" in line]
    assert result.exit_code == 2 and len(lines) == len(broken)
    assert all(any(f"set.zip/{members[index].filename}: damaged" in line for line in lines) for index in broken)
    assert result.output.splitlines()[-1].startswith("error: ")


def test_mirror_images_with_unmirrored_cameras_are_found(tmp_path: Path) -> None:
    write_items(tmp_path / "set", synthetic_items(3, 32, 1), mirror=True)
    good = check_set(Eg3dDataset(tmp_path / "set"))
    assert not good.warnings and any("6 pictures have their mirror image" in line for line in good.notes)
    labels = json.loads((tmp_path / "set/dataset.json").read_text())["labels"]
    edit_labels(tmp_path / "set", lambda k, v: labels[k - k % 2][1])
    assert any("not the mirrored one" in line for line in check_set(Eg3dDataset(tmp_path / "set")).warnings)


def test_exchanged_masks_are_found(folder: Path) -> None:
    masks = sorted((folder / "masks/00000").iterdir())
    contents = [path.read_bytes() for path in masks]
    for path, content in zip(masks, contents[3:] + contents[:3], strict=True):
        path.write_bytes(content)
    assert any("masks follow their pictures no better" in line for line in check(folder).warnings)
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(masks[2])
    assert any("one class only" in line and "img00000002" in line for line in check(folder).warnings)
    Image.fromarray(np.full((48, 48), 77, np.uint8)).save(masks[2])
    assert any("mask value 77" in line for line in check(folder).problems)


def test_missing_and_surplus_masks_are_found(folder: Path) -> None:
    (folder / "masks/00000/img00000003.png").rename(folder / "masks/00000/other.png")
    result = CliRunner().invoke(main, ["check", str(folder)])
    assert result.exit_code == 2
    assert "1 of 6 pictures have no mask, the first: images/00000/img00000003.png" in result.output
    assert "1 masks have no picture, the first: masks/00000/other.png" in result.output


def test_command_says_it_as_text_json_and_picture(folder: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    options = ["check", str(folder), "--picture", str(tmp_path / "p.png"), "--report", str(tmp_path / "r.json")]
    result = runner.invoke(main, options)
    assert result.exit_code == 0, result.output
    assert "horizontal mean" in result.output and "hair" in result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["poses"]["radius"][1] == pytest.approx(2.7)
    with Image.open(tmp_path / "p.png") as picture:
        pixels = np.asarray(picture)
        assert picture.width == 1200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
    edit_labels(folder, lambda k, v: [*v[:12], 1.0, *v[13:]] if k == 0 else v)
    result = runner.invoke(main, options)
    assert result.exit_code == 2 and "cannot be used as it is" in result.output
    result = runner.invoke(main, [*options[:2], "--picture", str(tmp_path / "p.txt")])
    assert result.exit_code == 2 and "got 'p.txt'" in result.output


def test_set_without_labels_is_checked_for_the_rest(folder: Path) -> None:
    (folder / "dataset.json").write_text('{"labels": null}')
    result = CliRunner().invoke(main, ["check", str(folder)])
    assert result.exit_code == 0 and "no camera labels" in result.output and "fit their own mask" in result.output
    result = CliRunner().invoke(main, ["eg3d-rebalance", str(folder), str(folder.parent / "x")])
    assert result.exit_code == 2 and "no poses to rebalance" in result.output


@pytest.mark.shared
def test_real_crops_have_the_oddities_that_their_readme_names(real_data: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["check", str(real_data / "eg3d_portraits"), "--picture", str(tmp_path / "p.png")]
    )
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("warning")]
    assert "1 of 19: the radius differs from the median 2.7 (up to 2.965): R.png" in line
    report = check_set(Eg3dDataset(real_data / "eg3d_portraits"), fast=True)
    assert report.poses is not None and report.poses.convention == "opencv_c2w"
    assert report.poses.h_stddev == pytest.approx(math.radians(8.1), abs=0.005)


def test_labels_without_a_picture_are_told(folder: Path) -> None:
    description = json.loads((folder / "dataset.json").read_text())
    description["labels"].append(["00000/gone.png", description["labels"][0][1]])
    (folder / "dataset.json").write_text(json.dumps(description))
    report = check(folder)
    assert report.warnings == ["1 labels have no picture, the first: 00000/gone.png"] and not report.problems


def test_a_folder_without_labels_or_masks_is_told_of_both_layouts(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    result = CliRunner().invoke(main, ["check", str(tmp_path)])
    assert result.exit_code == 2 and "N_mask.png (sets with cameras: a dataset.json with labels)" in result.output
