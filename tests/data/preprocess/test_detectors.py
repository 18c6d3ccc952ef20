# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from facelab.data.preprocess.detectors import FileLandmarks, make_detector, read_points
from facelab.data.preprocess.faces import Face, by_size, choose
from facelab.data.synthetic import SyntheticHeads
from facelab.errors import UserError
from facelab.face_model.landmarks import to_five
from facelab.nn.pretrained import mtcnn as module
from facelab.nn.pretrained.mtcnn import Mtcnn, suppress

FIVE = np.array([[10.0, 20], [30, 20], [20, 30], [13, 40], [27, 40]])
PICTURE = np.zeros((64, 64, 3), np.uint8)


def test_mtcnn_finds_synthetic_heads(mtcnn) -> None:
    heads = SyntheticHeads(seed=0, size=160, grid="centers", background="grey", threads=1).batch(range(6))
    for i in range(len(heads)):
        faces = mtcnn.detect(heads.image[i].permute(1, 2, 0).numpy())
        assert len(faces) == 1 and faces[0].score > 0.95
        truth = to_five(heads.landmarks_2d[i].double().numpy() * 160 - 0.5)
        distance = np.linalg.norm(faces[0].points5 - truth, axis=-1) / faces[0].eye_distance
        assert distance.max() < 0.3 and np.median(distance) < 0.12
        left, top, right, bottom = faces[0].box
        assert (left < truth[:, 0]).all() and (truth[:, 0] < right).all()
        assert (top < truth[:, 1]).all() and (truth[:, 1] < bottom).all()


def test_mtcnn_finds_nothing_in_noise(mtcnn) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (120, 140, 3), dtype=np.uint8)
    assert mtcnn.detect(noise) == [] and mtcnn.detect(PICTURE) == [] and mtcnn.detect(PICTURE[:8]) == []


def test_mtcnn_reduced_search_gives_photo_pixels(mtcnn, monkeypatch) -> None:
    from facelab.data.preprocess import detectors

    image = SyntheticHeads(seed=0, size=240, grid="centers", background="grey", threads=1).batch([0]).image[0]
    picture = image.permute(1, 2, 0).numpy()
    whole = mtcnn.detect(picture)[0]
    monkeypatch.setattr(detectors, "SEARCH_SIDE", 120)
    reduced = mtcnn.detect(picture)[0]
    assert np.abs(whole.points5 - reduced.points5).max() < 0.08 * whole.eye_distance
    assert not np.array_equal(whole.points5, reduced.points5)


def test_weights_absent(monkeypatch) -> None:
    def missing(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps facenet-pytorch"):
        make_detector("mtcnn")


def test_weights_are_never_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    for name in module.FILES:
        torch.save({"conv1.weight": Evil()}, tmp_path / name)
    with pytest.raises(UserError, match="damaged or holds more than tensors"):
        Mtcnn.from_files(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_weights_of_another_network(tmp_path: Path) -> None:
    for name in module.FILES:
        torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / name)
    with pytest.raises(UserError, match=r"pnet\.pt: expected MTCNN weights"):
        Mtcnn.from_files(tmp_path)
    with pytest.raises(UserError, match="no file"):
        Mtcnn.from_files(tmp_path / "nowhere")


def test_suppression() -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9], [1, 1, 10, 10], [20, 20, 29, 29], [3, 3, 6, 6]])
    scores = torch.tensor([0.8, 0.9, 0.7, 0.6])
    assert suppress(boxes, scores, 0.5).tolist() == [1, 2, 3]  # 0 is covered by 1; 3 is small: union is large
    assert suppress(boxes, scores, 0.5, of_smaller=True).tolist() == [1, 2]
    assert suppress(boxes[:0], scores[:0], 0.5).tolist() == []


@pytest.mark.parametrize("kind", ["txt", "npy", "json", "json map", "json faces"])
def test_points_from_files(kind: str, tmp_path: Path) -> None:
    stem = tmp_path / "me"
    if kind == "txt":
        np.savetxt(stem.with_suffix(".txt"), FIVE)
    elif kind == "npy":
        np.save(stem.with_suffix(".npy"), FIVE)
    elif kind == "json":
        stem.with_suffix(".json").write_text(json.dumps({"landmarks": FIVE.tolist()}))
    elif kind == "json map":
        stem.with_suffix(".json").write_text(json.dumps({"me.jpg": FIVE.tolist(), "you.jpg": []}))
    else:
        stem.with_suffix(".json").write_text(json.dumps([FIVE.tolist(), (FIVE * 2).tolist()]))
    faces = FileLandmarks(tmp_path).detect(PICTURE, "me.jpg")
    assert len(faces) == (2 if kind == "json faces" else 1)
    np.testing.assert_allclose(faces[0].points5, FIVE)
    assert faces[0].score == 1 and faces[0].box[0] < 10 and faces[0].box[3] > 40


def test_68_points_are_reduced(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(68, 2))
    np.save(tmp_path / "a.npy", points)
    face = FileLandmarks(tmp_path / "a.npy").detect(PICTURE)[0]
    np.testing.assert_allclose(face.points5[0], points[[37, 38, 40, 41]].mean(0))
    np.testing.assert_allclose(face.points5[2:], points[[30, 48, 54]])
    assert face.points68 is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [("1 2\n3 4\n", "expected 5 or 68 points"), ("a b\n", "cannot be read"), ("1 nan\n" * 5, "finite")],
)
def test_bad_point_files(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_points(path)


def test_points_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no landmarks at"):
        FileLandmarks(tmp_path / "none")
    with pytest.raises(UserError, match=r"no landmarks for me\.jpg"):
        FileLandmarks(tmp_path).detect(PICTURE, "me.jpg")


def test_pickled_points_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        read_points(tmp_path / "a.npy")


def test_unknown_detector() -> None:
    with pytest.raises(UserError, match="Did you mean 'mtcnn'"):
        make_detector("mtcn")


def test_largest_face_or_the_chosen_one() -> None:
    small, large = Face.from_points(FIVE), Face.from_points(FIVE * 3)
    faces = by_size([small, large])
    assert choose(faces, None, "a") is large and choose(faces, 2, "a") is small
    with pytest.raises(UserError, match="expected 1 to 2"):
        choose(faces, 3, "a")


def test_no_advice_to_load_foreign_files_unsafely(tmp_path: Path) -> None:
    from facelab.data.preprocess.cameras import read_coefficients
    from facelab.data.preprocess.head_points import read_standard_points

    path = tmp_path / "a.npy"
    path.write_bytes(b"no array")
    for read in (read_points, read_coefficients, lambda p: read_standard_points(str(p))):
        with pytest.raises(UserError, match="it is no array of numbers") as error:
            read(path)
        assert "unsafely" not in str(error.value)


def test_points_that_are_not_finite_are_called_so(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((5, 2), np.nan))
    with pytest.raises(UserError, match="got NaN or infinite ones"):
        read_points(tmp_path / "a.npy")
