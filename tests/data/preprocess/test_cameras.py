# SPDX-License-Identifier: Apache-2.0
"""Cameras from Deep3DFaceRecon's network; its weights are random here, or answer every picture alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from facelab.cli.photos import prepare_photo as prepare_photo_command
from facelab.cli.prepare import prepare_data
from facelab.data.eg3d_labels import pose_from_face_model
from facelab.data.preprocess import Deep3dCamera, FileLandmarks, make_camera_estimator, prepare_photo
from facelab.data.preprocess.alignment import FIXED_CENTRE, FIXED_SCALE, UNIT_PIXELS, align_face, fixed_crop
from facelab.data.preprocess.crop import UNIT_PIXELS as CROP_UNIT
from facelab.data.preprocess.crop import plan_crop
from facelab.data.preprocess.head_points import read_standard_points, standard_points
from facelab.data.preprocess.labels import FOCAL, label_from_coefficients
from facelab.data.preprocess.photos import PhotoSettings, prepare_photos
from facelab.data.preprocess.pose import project
from facelab.errors import UserError
from facelab.face_model.bfm import face_rotation
from facelab.nn.pretrained.face_reconstruction import regressor_from_published
from tests.data.preprocess.conftest import ASTRONAUT
from tests.recon_weights import constant_state, random_state, write_epoch

DRAWING = FileLandmarks(ASTRONAUT / "drawing.json")
MODEL_FOCAL, MODEL_CENTRE, MODEL_DISTANCE = 1015.0, 112.0, 10.0  # of the network's training, pixels and 10 cm
STRAIGHT, SHIFT = (-0.05, 0.08, 0.02), (0.03, -0.04, 0.2)


@pytest.fixture
def straight(tmp_path: Path) -> Path:
    """A weight file whose network sees every face nearly from the front, as the astronaut is."""
    return write_epoch(tmp_path / "weights" / "epoch_20.pth", constant_state(STRAIGHT, SHIFT))


def levels(found) -> dict[str, str]:
    return {check.name: check.level for check in found.checks}


def fixed(angle: tuple[float, float, float]) -> Deep3dCamera:
    return Deep3dCamera(regressor_from_published(constant_state(angle, SHIFT)))


def test_what_the_network_sees(astronaut: Path) -> None:
    """The whole photo scaled, 224 pixels cut, values 0..1, no mean and deviation taken off."""
    network = regressor_from_published(random_state(depth=18))
    photo = Image.open(astronaut).convert("RGB")
    face = DRAWING.detect(np.asarray(photo))[0]
    plan = plan_crop(face.points5, photo.size, standard_points(), 102.0, 224, 224)
    left, top = plan.corner
    seen = photo.resize(plan.resized, Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    batch = torch.from_numpy(np.array(seen)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = network(batch)[0].numpy()
    got = Deep3dCamera(network).coefficients(photo, face)
    assert got.shape == (257,) and np.abs(expected).max() > 0.05
    np.testing.assert_allclose(got, expected, atol=2e-3)
    found = prepare_photo(astronaut, DRAWING, camera=Deep3dCamera(network))
    np.testing.assert_allclose(found.label, label_from_coefficients(got[224:227], got[254:257]), atol=1e-9)
    np.testing.assert_allclose(found.coefficients, got)


@pytest.mark.parametrize("angle", [(0.0, 0.0, 0.0), (0.2, -0.5, 0.1), (-0.3, 0.4, -0.2)])
def test_both_cameras_see_the_head_at_the_same_place(angle: tuple[float, float, float]) -> None:
    """What the network's camera projects into its 224 pixels, EG3D's camera projects into its crop."""
    head = standard_points()
    turn = face_rotation(torch.tensor([angle]))[0].numpy()
    placed = head @ turn + SHIFT
    depth = MODEL_DISTANCE - placed[:, 2]
    pixels = np.stack([placed[:, 0], -placed[:, 1]], -1) * MODEL_FOCAL / depth[:, None]  # from the middle, y down
    pose = pose_from_face_model(torch.tensor([angle]).double(), torch.tensor([SHIFT]).double())[0].numpy()
    scene = 0.27 * head + np.array([0.0, 0.006, 0.161])
    crop = (project(pose, scene, FOCAL) - 0.5) * 700
    np.testing.assert_allclose(crop / CROP_UNIT, pixels / UNIT_PIXELS, atol=1e-4)
    assert MODEL_CENTRE == 224 / 2


def test_the_doctor_compares_it_with_the_points(astronaut: Path) -> None:
    near = prepare_photo(astronaut, DRAWING, camera=fixed(STRAIGHT))
    assert near.go and near.camera_from == "deep3d" and levels(near)["disagreement"] == "ok"
    np.testing.assert_allclose(near.label, label_from_coefficients(np.array(STRAIGHT), np.array(SHIFT)), atol=1e-6)
    report = near.report()
    assert report["camera_from"] == "deep3d" and report["camera"] == near.label.tolist()
    assert {name: len(part) for name, part in report["coefficients"].items()} == {
        "id": 80, "exp": 64, "tex": 80, "angle": 3, "gamma": 27, "trans": 3
    }  # fmt: skip
    np.testing.assert_allclose(report["coefficients"]["trans"], SHIFT, atol=1e-6)
    plain = prepare_photo(astronaut, DRAWING)
    assert "coefficients" not in plain.report() and levels(plain)["disagreement"] == "ok"
    off = prepare_photo(astronaut, DRAWING, camera=fixed((-0.05, 0.4, 0.0)))
    assert off.go and levels(off)["disagreement"] == "warning"
    far = prepare_photo(astronaut, DRAWING, camera=fixed((-0.05, -0.9, 0.0)))
    assert not far.go and levels(far)["disagreement"] == levels(far)["side_view"] == "refused"
    assert np.asarray(far.overlay()).shape[1] == 1280


def test_damaged_weights(astronaut: Path) -> None:
    state = constant_state(STRAIGHT, SHIFT)
    state["final_layers.3.bias"][1] = float("nan")
    with pytest.raises(UserError, match="astronaut.png: the reconstruction network gives NaN"):
        prepare_photo(astronaut, DRAWING, camera=Deep3dCamera(regressor_from_published(state)))


def test_choosing(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_camera_estimator() is None
    assert isinstance(make_camera_estimator("deep3d", weights=straight), Deep3dCamera)
    with pytest.raises(UserError, match="unknown camera source 'deep3'.*deep3d"):
        make_camera_estimator("deep3")
    with pytest.raises(UserError, match="add --camera-from deep3d"):
        make_camera_estimator("points", weights=straight)
    monkeypatch.setenv("FACELAB_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match="deep3d/epoch_20.pth is missing"):
        make_camera_estimator("deep3d")
    (tmp_path / "home" / "deep3d").mkdir(parents=True)
    straight.rename(tmp_path / "home" / "deep3d" / "epoch_20.pth")
    assert isinstance(make_camera_estimator("deep3d"), Deep3dCamera)


def test_prepare_photo(astronaut: Path, straight: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    given = [str(astronaut), "--landmarks", str(ASTRONAUT / "drawing.json"), "--out", str(tmp_path / "out")]
    deep = ["--camera-from", "deep3d", "--deep3d-weights", str(straight)]
    result = run(prepare_photo_command, [*given, *deep])
    assert result.exit_code == 0 and result.output.startswith("GO: yaw -4.6, pitch -2.9")
    expected = label_from_coefficients(np.array(STRAIGHT), np.array(SHIFT))
    np.testing.assert_allclose(np.load(tmp_path / "out" / "astronaut.npy"), expected, atol=1e-6)
    assert json.loads((tmp_path / "out" / "astronaut.json").read_text())["camera_from"] == "deep3d"
    np.savez(tmp_path / "fit.npz", angle=np.zeros(3), trans=np.zeros(3))
    for options, words in (
        (deep[2:], "--deep3d-weights has no effect"),
        ([*deep[:2], "--deep3d-weights", str(tmp_path / "none.pth")], "no file at"),
        ([*deep, "--coefficients", str(tmp_path / "fit.npz")], "expected one of them, got both"),
        (["--camera-from", "deep"], "'deep' is not one of"),
    ):
        refused = run(prepare_photo_command, [*given, *options])
        assert refused.exit_code == 2 and words in refused.output and refused.output.count("\n") == 1


@pytest.mark.parametrize("command", ["photos", "eg3d"])
def test_prepare_data(command: str, astronaut: Path, straight: Path, tmp_path: Path) -> None:
    target = tmp_path / "set"
    points = ["--landmarks", str(ASTRONAUT / "drawing.json"), "--size", "64", "--quiet"]
    deep = ["--camera-from", "deep3d", "--deep3d-weights", str(straight)]
    given = [command, str(astronaut.parent), str(target), *points]
    result = CliRunner().invoke(prepare_data, [*given, *deep])
    assert result.exit_code == 0 and "1 of 1 photos used, 1 pictures" in result.output
    [[name, label]] = json.loads((target / "dataset.json").read_text())["labels"]
    expected = label_from_coefficients(np.array(STRAIGHT), np.array(SHIFT))
    np.testing.assert_allclose(label, expected, atol=1e-6)
    assert Image.open(target / name).size == (64, 64)
    again = CliRunner().invoke(prepare_data, [*given, "--camera-from", "points"])
    assert again.exit_code == 2 and "begun with another camera_from, deep3d_weights" in again.output
    assert CliRunner().invoke(prepare_data, [*given, *deep]).exit_code == 0


def test_eg3d_says_what_does_not_go_together(astronaut: Path, tmp_path: Path) -> None:
    given = ["eg3d", str(astronaut.parent), str(tmp_path / "set")]
    photos = ["--camera-from", "points", "--landmarks", str(ASTRONAUT / "drawing.json")]
    for arguments, words in (
        ([*given, "--deep3d-weights", "x.pth"], "--deep3d-weights has no effect on pictures with cameras"),
        ([*given, *photos, "--focal", "4"], "--focal has no effect on photographs"),
        ([*given[:2], str(tmp_path / "set.zip"), *photos], "writes a folder"),
        (["eg3d", "synthetic", *given[2:], *photos], "synthetic heads have cameras"),
    ):
        refused = CliRunner().invoke(prepare_data, arguments)
        assert refused.exit_code == 2 and words in refused.output and refused.output.count("\n") == 1
    assert not (tmp_path / "set").exists()


def test_folders_begun_before_there_was_a_choice(astronaut: Path, tmp_path: Path) -> None:
    settings = PhotoSettings(landmarks=str(ASTRONAUT / "drawing.json"), size=64)
    prepare_photos(astronaut.parent, tmp_path / "set", settings, progress=False)
    path = tmp_path / "set" / "prepare.json"
    old = {key: v for key, v in json.loads(path.read_text()).items() if key not in ("camera_from", "deep3d_weights")}
    path.write_text(json.dumps(old))
    assert prepare_photos(astronaut.parent, tmp_path / "set", settings, progress=False).kept == 1


def test_standard_points_of_68(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(68, 3))
    np.save(tmp_path / "lm.npy", points)
    five = read_standard_points(str(tmp_path / "lm.npy"))
    np.testing.assert_allclose(five[:2], [(points[36] + points[39]) / 2, (points[42] + points[45]) / 2])
    np.testing.assert_allclose(five[2:], points[[30, 48, 54]])


def test_points_carried_into_the_picture(astronaut: Path) -> None:
    photo = Image.open(astronaut)
    face = DRAWING.detect(np.asarray(photo))[0]
    found = align_face(photo, face.points5, standard_points())
    carried = found.carry(face.points5)
    assert found.picture.size == (224, 224)
    ours = found.plan.to_crop(face.points5) * 224 - 0.5
    np.testing.assert_allclose(carried, np.stack([ours[:, 0], 223 - ours[:, 1]], -1), atol=1.6)
    with pytest.raises(ValueError, match="one spot"):
        align_face(photo, np.ones((5, 2)), standard_points())


def test_fixed_crop_of_generated_pictures() -> None:
    image = torch.zeros(1, 1, 128, 128, dtype=torch.float64)
    middle = (FIXED_CENTRE[0] / 2, FIXED_CENTRE[1] / 2)
    row, column = 128 - 1 - round(middle[1]), round(middle[0])
    image[0, 0, row, column] = 1
    image.requires_grad_()
    cut = fixed_crop(image, 2 * FIXED_SCALE)
    peak = divmod(int(cut.argmax()), 224)
    assert cut.shape == (1, 1, 224, 224) and max(abs(peak[0] - 112), abs(peak[1] - 112)) <= 2
    (gradient,) = torch.autograd.grad(cut.sum(), image)
    assert gradient[0, 0, row, column] > 0
    with pytest.raises(ValueError, match=r"\(N, C, S, S\)"):
        fixed_crop(image[..., :64])
