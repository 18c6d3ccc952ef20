# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw

from facelab.cli.photos import prepare_photo as prepare_photo_command
from facelab.data.preprocess import FileLandmarks, Limits, prepare_photo
from facelab.data.preprocess.cameras import GivenCoefficients, read_coefficients
from facelab.data.preprocess.faces import Face
from facelab.data.preprocess.labels import label_from_coefficients
from facelab.errors import UserError
from tests.data.preprocess.conftest import ASTRONAUT, FixedDetector

DRAWING = FileLandmarks(ASTRONAUT / "drawing.json")


def levels(found) -> dict[str, str]:
    return {check.name: check.level for check in found.checks}


def test_the_astronaut(astronaut: Path) -> None:
    found = prepare_photo(astronaut, DRAWING)
    assert found.go and found.reasons == [] and found.require() is found
    np.testing.assert_allclose(found.label, np.load(ASTRONAUT / "astronaut.npy"), atol=1e-3)
    shipped = np.asarray(Image.open(ASTRONAUT / "astronaut.png")).astype(int)
    assert np.abs(np.asarray(found.crop).astype(int) - shipped).max() <= 2
    camera = found.camera()
    assert camera.cam2world[0, :3, 3].norm().item() == pytest.approx(2.7, abs=1e-4)
    assert levels(found)["too_small"] == "warning"


def test_the_astronauts_mask_is_its_drawing(astronaut: Path) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("astronaut_make", ASTRONAUT / "make.py")
    assert spec and spec.loader
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    found = prepare_photo(astronaut, DRAWING)
    mask = make.draw_mask(found.plan, json.loads((ASTRONAUT / "drawing.json").read_text())["polygons"])
    shipped = np.asarray(Image.open(ASTRONAUT / "astronaut_mask.png"))
    assert (mask != shipped).mean() < 1e-3
    assert set(np.unique(shipped)) == {0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 17, 18}
    five = (found.plan.to_crop(found.face.points5) * 512).astype(int)
    assert [int(shipped[y, x]) for x, y in five[:3]] == [5, 4, 2]  # subject's right eye, left eye, nose


def test_nothing_found(astronaut: Path) -> None:
    found = prepare_photo(astronaut, FixedDetector([]))
    assert not found.go and levels(found) == {"no_face": "refused"} and found.label is None
    with pytest.raises(UserError, match="no face found"):
        found.require()
    with pytest.raises(ValueError, match="no camera"):
        found.camera()


def test_covered_mouth_and_eye(astronaut: Path) -> None:
    photo = Image.open(astronaut)
    points = DRAWING.detect(np.asarray(photo))[0].points5
    pen = ImageDraw.Draw(photo)
    pen.rectangle([180, 126, 275, 172], fill=(120, 160, 200))
    photo.save(astronaut)
    found = prepare_photo(astronaut, DRAWING)
    assert levels(found)["hidden"] == "refused" and "mouth corner at the left" in "; ".join(found.reasons)
    pen.rectangle([0, 0, 512, 512], fill=(255, 255, 255))
    photo.save(astronaut)
    assert levels(prepare_photo(astronaut, FixedDetector([Face.from_points(points)])))["blurred"] == "refused"


@pytest.mark.parametrize("what", ["eyes", "mouth"])
def test_mtcnn_is_not_fooled_by_bars(what: str, astronaut: Path, mtcnn) -> None:
    plain = prepare_photo(astronaut, mtcnn)
    assert plain.go and plain.seen is not None and plain.seen.missed == 0
    photo = Image.open(astronaut)
    box = [190, 92, 265, 112] if what == "eyes" else [190, 132, 260, 170]
    ImageDraw.Draw(photo).rectangle(box, fill=(20, 20, 20))
    photo.save(astronaut)
    assert not prepare_photo(astronaut, mtcnn).go


def test_small_rolled_cut_off_and_turned(astronaut: Path) -> None:
    photo = Image.open(astronaut)
    points = DRAWING.detect(np.asarray(photo))[0].points5
    small = FixedDetector([Face.from_points(points / 4)])
    photo.resize((128, 128)).save(astronaut)
    assert levels(prepare_photo(astronaut, small))["too_small"] == "refused"
    photo.transpose(Image.Transpose.ROTATE_90).save(astronaut)
    quarter = FixedDetector([Face.from_points(np.stack([points[:, 1], 511 - points[:, 0]], -1))])
    assert levels(prepare_photo(astronaut, quarter))["rolled"] == "refused"
    photo.crop((210, 0, 512, 512)).save(astronaut)
    cut = FixedDetector([Face.from_points(points - [210, 0])])
    assert levels(prepare_photo(astronaut, cut))["points_outside"] == "refused"
    photo.save(astronaut)
    strict = prepare_photo(astronaut, DRAWING, limits=Limits(refuse_yaw=1.0))
    assert levels(strict)["side_view"] == "refused" and "degrees" in strict.reasons[0]


def test_uncertain_and_several_faces(astronaut: Path) -> None:
    face = DRAWING.detect(np.zeros((4, 4, 3), np.uint8))[0]
    other = Face(tuple(v + 5 for v in face.box), face.points5 + [5, 3], 0.5)  # type: ignore[arg-type]
    detector = FixedDetector([face, other])
    assert levels(prepare_photo(astronaut, detector))["several_faces"] == "warning"
    chosen = prepare_photo(astronaut, detector, face=2)
    assert chosen.face is other and levels(chosen)["uncertain"] == "refused" and "several_faces" not in levels(chosen)
    with pytest.raises(UserError, match="--face 3"):
        prepare_photo(astronaut, detector, face=3)


def test_upright_by_exif(astronaut: Path) -> None:
    photo = Image.open(astronaut).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6  # stored turned: a viewer turns it clockwise
    lying = astronaut.with_suffix(".jpg")
    photo.transpose(Image.Transpose.ROTATE_90).save(lying, exif=exif, quality=95)
    found = prepare_photo(lying, DRAWING)
    assert np.abs(np.asarray(found.photo).astype(int) - np.asarray(photo).astype(int)).mean() < 4


def test_camera_from_coefficients(astronaut: Path, tmp_path: Path) -> None:
    angle, shift = np.array([0.1, -0.2, 0.05]), np.array([0.02, -0.01, 0.3])
    np.savez(tmp_path / "a.npz", angle=angle[None], trans=shift[None])
    flat = np.zeros(257)
    flat[224:227], flat[254:257] = angle, shift
    np.save(tmp_path / "b.npy", flat)
    for name in ("a.npz", "b.npy"):
        found = prepare_photo(astronaut, DRAWING, camera=GivenCoefficients(*read_coefficients(tmp_path / name)))
        np.testing.assert_allclose(found.label, label_from_coefficients(angle, shift), atol=1e-9)
        assert found.camera_from == "coefficients"
    np.save(tmp_path / "c.npy", np.zeros(100))
    with pytest.raises(UserError, match="'angle' and 'trans'"):
        read_coefficients(tmp_path / "c.npy")


def test_files_and_exit_status(astronaut: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    given = [str(astronaut), "--landmarks", str(ASTRONAUT / "drawing.json")]
    result = run(prepare_photo_command, given)
    assert result.exit_code == 0 and result.output.startswith("GO: yaw")
    folder = astronaut.parent / "astronaut_prepared"
    assert {p.name for p in folder.iterdir()} == {
        "astronaut.png", "astronaut.npy", "astronaut.json", "astronaut_overlay.png"
    }  # fmt: skip
    report = json.loads((folder / "astronaut.json").read_text())
    assert report["go"] and np.load(folder / "astronaut.npy").tolist() == report["camera"]
    overlay = np.asarray(Image.open(folder / "astronaut_overlay.png"))
    assert overlay.shape[1] == 1280 and np.ptp(overlay[:640, 640:]) > 100
    over_itself = run(prepare_photo_command, [*given, "--out", str(astronaut.parent)])
    assert over_itself.exit_code == 2 and "replace the photo itself" in over_itself.output
    tiny = astronaut.with_name("tiny.png")
    Image.open(astronaut).resize((128, 128)).save(tiny)
    np.save(tmp_path / "tiny.npy", DRAWING.detect(np.zeros((4, 4, 3), np.uint8))[0].points5 / 4)
    given = [str(tiny), "--landmarks", str(tmp_path / "tiny.npy"), "--out", str(tmp_path / "no")]
    refused = run(prepare_photo_command, given)
    assert refused.exit_code == 1 and "pixels of the photo" in refused.output
    assert {p.name for p in (tmp_path / "no").iterdir()} == {"tiny.json", "tiny_overlay.png"}
    assert run(prepare_photo_command, [*given, "--force"]).exit_code == 0 and (tmp_path / "no" / "tiny.npy").is_file()
    missing = run(prepare_photo_command, [str(tmp_path / "none.jpg"), *given[1:]])
    assert missing.exit_code == 2 and missing.output.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a picture, got no such file; check the path"),
        (
            b"no picture",
            "expected a picture, got a damaged file (cannot identify image file it); replace it or remove it",
        ),
        ("folder", "expected a picture, got a folder"),
        ("huge", "expected a picture of at most 178 million pixels, got more; reduce it"),
    ],
)
@pytest.mark.parametrize("weights", ["detector", "deep3d"])
def test_the_photo_is_read_before_weights_are_looked_for(content, message: str, weights: str, tmp_path: Path) -> None:
    photo = tmp_path / "me.png"
    if content == "folder":
        photo.mkdir()
    elif content == "huge":
        Image.new("1", (20000, 20000)).save(photo)
    elif content is not None:
        photo.write_bytes(content)
    options = {
        "detector": ["--detector-weights", str(tmp_path / "none")],
        "deep3d": ["--camera-from", "deep3d", "--deep3d-weights", str(tmp_path / "none.pth")],
    }[weights]
    result = CliRunner().invoke(prepare_photo_command, [str(photo), *options])
    assert result.exit_code == 2 and message in result.output and len(result.output.splitlines()) == 1, result.output
    assert "partner" not in result.output


def test_a_missing_detector_is_said_for_a_sound_photo(astronaut: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(prepare_photo_command, [str(astronaut), "--detector-weights", str(tmp_path / "none")])
    assert result.exit_code == 2 and "expected MTCNN weights" in result.output


def test_a_refusal_leaves_no_crop_of_an_earlier_run(astronaut: Path, tmp_path: Path) -> None:
    out, points = tmp_path / "out", tmp_path / "points.npy"
    command = [str(astronaut), "--out", str(out), "--landmarks"]
    assert CliRunner().invoke(prepare_photo_command, [*command, str(ASTRONAUT / "drawing.json")]).exit_code == 0
    assert (out / "astronaut.png").is_file() and (out / "astronaut.npy").is_file()
    five = np.array(json.loads((ASTRONAUT / "drawing.json").read_text())["landmarks"])
    np.save(points, (five - five.mean(0)) @ np.array([[0.0, 1.0], [-1.0, 0.0]]) + five.mean(0))  # a face on its side
    result = CliRunner().invoke(prepare_photo_command, [*command, str(points)])
    assert result.exit_code == 1 and "removed, from an earlier run: " in result.output
    assert not (out / "astronaut.png").exists() and not (out / "astronaut.npy").exists()
    (out / "astronaut.png").write_text("somebody else's")
    assert CliRunner().invoke(prepare_photo_command, [*command, str(points)]).exit_code == 1
    assert (out / "astronaut.png").read_text() == "somebody else's"


def test_force_without_a_face_is_no_success(astronaut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facelab.cli.photo_input.lazy_detector", lambda *_: lambda: FixedDetector([]))
    result = CliRunner().invoke(prepare_photo_command, [str(astronaut), "--force", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1 and "no face found" in result.output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["astronaut.json", "astronaut_overlay.png"]


def test_the_verdict_below_the_pictures_is_not_cut_off(astronaut: Path) -> None:
    from facelab.data.preprocess.overlay import BAR, PANEL, wrapped

    found = prepare_photo(astronaut, FixedDetector([]))
    rows = [row for line in found.lines() for row in wrapped(line, PANEL - 16)]
    assert len(rows) > len(found.lines()) and " ".join(rows) == " ".join(found.lines())
    overlay = np.asarray(found.overlay())
    assert overlay.shape == (PANEL + BAR * len(rows), PANEL, 3)
    assert (overlay[PANEL:, -4:] == overlay[-1, -1]).all()  # no letter reaches the border


@pytest.mark.parametrize("factor", [1e3, 1e30])
def test_points_in_other_units_are_refused(astronaut: Path, factor: float) -> None:
    five = factor * np.array(json.loads((ASTRONAUT / "drawing.json").read_text())["landmarks"])
    with pytest.raises(UserError, match="points lie far outside the photo of 512x512; check their units"):
        prepare_photo(astronaut, FixedDetector([Face.from_points(five)]))


def test_missing_files_are_called_missing(astronaut: Path, tmp_path: Path) -> None:
    for option, words in (
        ("--standard-points", "no standard points at"),
        ("--coefficients", "no face coefficients at"),
    ):
        result = CliRunner().invoke(prepare_photo_command, [str(astronaut), option, str(tmp_path / "none.mat")])
        assert result.exit_code == 2 and words in result.output and "check the path" in result.output
