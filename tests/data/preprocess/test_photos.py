# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from facelab.cli.prepare import prepare_data as main
from facelab.data.eg3d_dataset import Eg3dDataset
from facelab.data.eg3d_labels import mirror_label
from facelab.data.preprocess import photos as module
from facelab.data.preprocess.photos import PhotoSettings, prepare_photos
from facelab.errors import Interrupted, UserError
from tests.data.preprocess.conftest import ASTRONAUT


@pytest.fixture
def folder(astronaut: Path, tmp_path: Path) -> Path:
    """Three photos (one in a subfolder, one damaged) and the points of the good ones."""
    photos, points = astronaut.parent, tmp_path / "points"
    (photos / "more").mkdir()
    points.mkdir()
    picture = Image.open(astronaut)
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photos / "more" / "second.png")
    (photos / "zz.jpg").write_text("no picture")
    five = np.array(json.loads((ASTRONAUT / "drawing.json").read_text())["landmarks"])
    np.save(points / "astronaut.npy", five)
    from facelab.face_model.landmarks import mirror_order

    np.save(points / "second.npy", (five * [-1, 1] + [511, 0])[mirror_order()])
    return photos


def test_data_set(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "set"
    settings = PhotoSettings(landmarks=str(tmp_path / "points"), size=64, mirror=True)
    report = prepare_photos(folder, target, settings, progress=False, overlays=tmp_path / "seen")
    assert (report.photos, report.used, report.pictures, report.kept, report.finished) == (3, 2, 4, 0, True)
    assert list(report.damaged) == ["zz"] and not report.refused
    labels = dict(json.loads((target / "dataset.json").read_text())["labels"])
    assert set(labels) == {
        "astronaut.png", "astronaut_mirror.png", "more/second.png", "more/second_mirror.png"
    }  # fmt: skip
    first = torch.tensor(labels["astronaut.png"])[None].double()
    np.testing.assert_allclose(labels["astronaut_mirror.png"], mirror_label(first)[0], atol=1e-6)
    np.testing.assert_allclose(labels["more/second.png"], labels["astronaut_mirror.png"], atol=0.02)
    crop = np.asarray(Image.open(target / "astronaut.png"))
    assert crop.shape == (64, 64, 3)
    assert np.array_equal(np.asarray(Image.open(target / "astronaut_mirror.png")), crop[:, ::-1])
    assert {p.name for p in (tmp_path / "seen").rglob("*.jpg")} == {"astronaut.jpg", "second.jpg"}
    dataset = Eg3dDataset(target)
    assert len(dataset) == 4 and dataset.labels is not None and dataset.labels.shape == (4, 25)


def test_goes_on_where_it_stopped(folder: Path, tmp_path: Path, monkeypatch) -> None:
    target, settings = tmp_path / "set", PhotoSettings(landmarks=str(tmp_path / "points"), size=64)
    real, calls = module.make_one, []

    def stopping(photo: Path, name: str, *rest):
        calls.append(name)
        if name == "more/second":
            raise KeyboardInterrupt
        return real(photo, name, *rest)

    monkeypatch.setattr(module, "make_one", stopping)
    with pytest.raises(Interrupted):
        prepare_photos(folder, target, settings, progress=False)
    assert not json.loads((target / "report.json").read_text())["finished"]
    assert len(json.loads((target / "dataset.json").read_text())["labels"]) == 1
    monkeypatch.setattr(
        module, "make_one", lambda photo, name, *rest: calls.append(f"again {name}") or real(photo, name, *rest)
    )
    report = prepare_photos(folder, target, settings, progress=False)
    assert calls == ["astronaut", "more/second", "again more/second", "again zz"]
    assert report.kept == 1 and report.used == 2 and report.finished


def test_refusals(folder: Path, tmp_path: Path) -> None:
    target, settings = tmp_path / "set", PhotoSettings(landmarks=str(tmp_path / "points"), size=64)
    prepare_photos(folder, target, settings, progress=False)
    with pytest.raises(UserError, match="begun with another size"):
        prepare_photos(folder, target, PhotoSettings(landmarks=str(tmp_path / "points"), size=32), progress=False)
    with pytest.raises(UserError, match="no folder"):
        prepare_photos(tmp_path / "none", target, settings, progress=False)
    with pytest.raises(UserError, match="choose another folder"):
        prepare_photos(folder, folder, settings, progress=False)
    with pytest.raises(UserError, match="inside the data set"):
        prepare_photos(folder, target, settings, overlays=target / "seen", progress=False)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="not made by this command"):
        prepare_photos(folder, foreign, settings, progress=False)


def test_nothing_usable(folder: Path, tmp_path: Path) -> None:
    only = tmp_path / "only"
    only.mkdir()
    (only / "a.jpg").write_text("no picture")
    with pytest.raises(UserError, match="none of 1 photos could be used; a:"):
        prepare_photos(only, tmp_path / "set", PhotoSettings(landmarks=str(tmp_path / "points")), progress=False)


def test_command(folder: Path, tmp_path: Path) -> None:
    arguments = ["photos", str(folder), str(tmp_path / "set"), "--landmarks", str(tmp_path / "points"), "--size", "64"]
    result = CliRunner().invoke(main, [*arguments, "--quiet"])
    assert (
        result.exit_code == 0 and "2 of 3 photos used, 2 pictures" in result.output and "damaged: zz" in result.output
    )
    failed = CliRunner().invoke(main, ["photos", str(tmp_path / "none"), str(tmp_path / "x"), "--quiet"])
    assert failed.exit_code == 2 and failed.output.count("\n") == 1


def test_a_mended_photo_and_new_overlays_are_made_on_the_next_run(folder: Path, tmp_path: Path) -> None:
    settings = PhotoSettings(landmarks=str(tmp_path / "points"), size=64)
    first = prepare_photos(folder, tmp_path / "set", settings, progress=False)
    assert list(first.damaged) == ["zz"]
    Image.open(folder / "astronaut.png").convert("RGB").save(folder / "zz.jpg", quality=95)
    np.save(tmp_path / "points" / "zz.npy", np.load(tmp_path / "points" / "astronaut.npy"))
    second = prepare_photos(folder, tmp_path / "set", settings, progress=False)
    assert not second.damaged and (second.used, second.kept) == (3, 2)
    third = prepare_photos(folder, tmp_path / "set", settings, progress=False, overlays=tmp_path / "seen")
    assert third.kept == 0 and len(list((tmp_path / "seen").rglob("*.jpg"))) == 3


def test_a_photo_named_as_a_mirror_image_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "zz.jpg").rename(folder / "astronaut_mirror.jpg")
    settings = PhotoSettings(landmarks=str(tmp_path / "points"), size=64, mirror=True)
    with pytest.raises(
        UserError, match="astronaut_mirror.jpg has the name that the mirror image of astronaut.png gets"
    ):
        prepare_photos(folder, tmp_path / "set", settings, progress=False)


def test_a_data_set_inside_the_folder_of_photos_goes_on(folder: Path, tmp_path: Path) -> None:
    settings = PhotoSettings(landmarks=str(tmp_path / "points"), size=64)
    first = prepare_photos(folder, folder / "out", settings, progress=False)
    again = prepare_photos(folder, folder / "out", settings, progress=False)
    assert (first.photos, first.used) == (again.photos, again.used) == (3, 2) and again.kept == 2
    with pytest.raises(UserError, match="lies over the photos"):
        prepare_photos(folder / "more", folder, settings, progress=False)
    with pytest.raises(UserError, match="--overlays .* lies inside the photos"):
        prepare_photos(folder, folder / "out", settings, overlays=folder / "seen", progress=False)
    with pytest.raises(UserError, match="expected a folder of photos, got a file; prepare_photo.py takes one photo"):
        prepare_photos(folder / "astronaut.png", tmp_path / "other", settings, progress=False)
