# SPDX-License-Identifier: Apache-2.0
"""EG3D's container: zips and folders, labels and their errors, mirror images, order and resuming."""

from __future__ import annotations

import copy
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facelab.cameras.camera import Camera
from facelab.data.eg3d_dataset import Eg3dDataset
from facelab.data.eg3d_labels import mirror_label
from facelab.data.eg3d_store import OpenZips, ZipStore
from facelab.data.loader import ImageStream, PrefetchStream
from facelab.errors import UserError
from tests.data.pictures import smooth_picture


def label_of(number: int) -> list[float]:
    camera = Camera.on_sphere(1.5 + 0.02 * number, 1.2 + 0.1 * number, 13.0, 2.7)
    return [float(v) for v in camera.label()[0]]


def make_folder_set(root: Path, count: int = 5, size: int = 16) -> Path:
    """Pictures in two subfolders; names sorted differently from the label list."""
    labels = []
    for number in range(count):
        name = f"{number % 2:05d}/img{number:08d}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth_picture(size, size, number)).save(root / name)
        labels.append([name, label_of(number)])
    (root / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    return root


def zip_of(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder).as_posix())
    return target


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder_set(tmp_path / "set")


def numbers_of(dataset: Eg3dDataset) -> list[int]:
    return [int(Path(name).stem[3:11]) for name in dataset.names]


def test_labels_belong_to_their_pictures_in_folder_zip_and_shards(folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("a.zip", "b.zip"):
        zip_of(folder, shards / name)
    for root, repeats in ((folder, 1), (zip_of(folder, tmp_path / "set.zip"), 1), (shards, 2)):
        dataset = Eg3dDataset(root)
        order = numbers_of(dataset)
        assert order == [0, 2, 4, 1, 3] * repeats and dataset.image_size == 16
        batch = dataset.items(range(len(dataset)))
        for place, number in enumerate(order):
            assert (batch.image[place].permute(1, 2, 0).numpy() == smooth_picture(16, 16, number)).all()
            assert batch.camera is not None
            torch.testing.assert_close(batch.camera.label()[place], torch.tensor(label_of(number)))


def test_mirror_doubles_the_set_with_mirrored_cameras(folder: Path) -> None:
    dataset = Eg3dDataset(folder, mirror=True)
    assert len(dataset) == 10 and dataset.labels is not None and len(dataset.labels) == 10
    batch = dataset.items([3, 8, 8], [False, False, True])
    assert torch.equal(batch.image[0], batch.image[1].flip(-1)) and torch.equal(batch.image[0], batch.image[2])
    label = batch.camera.label()  # type: ignore[union-attr]
    torch.testing.assert_close(label[1:2], mirror_label(label[:1]))
    torch.testing.assert_close(label[2], label[0])
    torch.testing.assert_close(label, torch.stack([dataset.labels[3], dataset.labels[8], dataset.labels[3]]))
    torch.testing.assert_close(dataset.label_std(), dataset.labels[:5].double().std(0, correction=0).float())
    with pytest.raises(IndexError, match="data set of 10"):
        dataset.items([10])


def test_random_flips_of_the_stream_take_the_camera_along(folder: Path) -> None:
    stream = ImageStream(Eg3dDataset(folder, flips=True), seed=3)
    plain = Eg3dDataset(folder)
    batch = stream.batch(0, 20)
    entries = stream.sampler.entries(0, 20)
    flips = [stream.mirrored(epoch, index) for epoch, index in entries]
    assert any(flips) and not all(flips)
    for place, ((_, index), flip) in enumerate(zip(entries, flips, strict=True)):
        expected = plain.labels[index : index + 1]  # type: ignore[index]
        torch.testing.assert_close(
            batch.camera.label()[place : place + 1],  # type: ignore[union-attr]
            mirror_label(expected) if flip else expected,
        )


def test_resumed_stream_goes_on_with_the_same_samples_whatever_the_workers(folder: Path, tmp_path: Path) -> None:
    whole = Eg3dDataset(zip_of(folder, tmp_path / "set.zip"), mirror=True)
    with PrefetchStream(ImageStream(whole, 1), 4, workers=3) as stream:
        first = [next(stream) for _ in range(6)]
        position = stream.position
    assert position == 24
    with PrefetchStream(ImageStream(whole, 1), 4, start_image=8, workers=0) as stream:
        for expected in first[2:]:
            again = next(stream)
            assert torch.equal(again.image, expected.image)  # type: ignore[arg-type]
            assert torch.equal(again.camera.label(), expected.camera.label())  # type: ignore[union-attr]


def test_max_size_is_a_sorted_seeded_subset(folder: Path) -> None:
    order = np.arange(5)
    np.random.RandomState(7).shuffle(order)
    names = Eg3dDataset(folder).names
    assert Eg3dDataset(folder, max_size=3, seed=7).names == tuple(names[i] for i in sorted(order[:3]))


def test_open_zips_keeps_the_least_recently_used_closed(folder: Path, tmp_path: Path) -> None:
    paths = [zip_of(folder, tmp_path / f"{i}.zip") for i in range(3)]
    zips = OpenZips(limit=2)
    first = zips.get(paths[0])
    second = zips.get(paths[1])
    assert zips.get(paths[0]) is first
    zips.get(paths[2])
    assert second.fp is None and first.fp is not None
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(zips.get, paths[0]).result() is not first
    assert copy.deepcopy(zips).limit == 2  # goes through the same door as sending it to another process
    store = ZipStore(paths[0], zips)
    with ThreadPoolExecutor(4) as pool:
        contents = list(pool.map(store.read, ["00000/img00000000.png"] * 40))
    assert set(contents) == {(folder / "00000/img00000000.png").read_bytes()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: {"labels": c["labels"][1:]}, "no label for .*img00000004.png \\(1 of 5"),
        (lambda c: {"labels": [[n, v[:24]] for n, v in c["labels"]]}, "must be 25 numbers .*got 24 values"),
        (lambda c: {"labels": [[n, v + [0.0]] for n, v in c["labels"]]}, "got 26 values"),
        (lambda c: {"labels": [[n, 3] for n, _ in c["labels"]]}, "is the class 3, expected a camera"),
        (lambda c: {"labels": [[n, ["1"] * 25] for n, _ in c["labels"]]}, "not all numbers"),
        (lambda c: {"labels": [[n, [float("nan")] * 25] for n, _ in c["labels"]]}, "NaN or infinite"),
        (lambda c: {"labels": None}, "no camera labels"),
        (lambda c: {"labels": 3}, "must be a list of"),
        (lambda c: [1], "expected a JSON object"),
        (lambda c: {"labels": [*c["labels"], [c["labels"][0][0], [1.0] * 25]]}, "two different labels"),
    ],
)
def test_bad_labels_are_named_in_one_line(folder: Path, change, words: str) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=words) as caught:
        Eg3dDataset(folder)
    assert "\n" not in str(caught.value)


def test_set_without_labels_serves_unconditional_training(folder: Path) -> None:
    (folder / "dataset.json").unlink()
    assert Eg3dDataset(folder, labels="none").items([0]).camera is None
    with pytest.raises(UserError, match="prepare_data.py eg3d"):
        Eg3dDataset(folder)
    (folder / "dataset.json").write_text('{"labels": [')
    with pytest.raises(UserError, match="expected JSON"):
        Eg3dDataset(folder)


def test_damaged_and_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    victim = folder / "00000/img00000002.png"
    content = victim.read_bytes()
    archive = zip_of(folder, tmp_path / "set.zip")
    victim.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="img00000002.png: expected a picture, got a damaged file"):
        Eg3dDataset(folder, cache="none").items([1])
    problems, report = Eg3dDataset(folder).inspect()
    assert len(problems) == 1 and report.decoded == 4
    data = bytearray(archive.read_bytes())
    place = data.index(content[60:90])
    data[place : place + 8] = b"\0" * 8
    archive.write_bytes(data)
    problems, _ = Eg3dDataset(archive).inspect()
    assert len(problems) == 1 and "damaged in the archive" in problems[0]
    archive.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged or unfinished"):
        Eg3dDataset(archive)
    dataset = Eg3dDataset(folder, cache="none")
    (folder / dataset.names[0]).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        dataset.items([0])


def test_archives_with_repeated_or_monstrous_members(folder: Path, tmp_path: Path, monkeypatch) -> None:
    archive = zip_of(folder, tmp_path / "set.zip")
    with zipfile.ZipFile(archive, "a") as content, pytest.warns(UserWarning, match="Duplicate"):
        content.write(folder / "00001/img00000001.png", "00000/img00000000.png")
    dataset = Eg3dDataset(archive)
    assert len(dataset) == 5 and numbers_of(dataset)[0] == 0
    assert (np.asarray(dataset.read_picture(0)) == smooth_picture(16, 16, 1)).all(), "the last one counts"
    monkeypatch.setattr("facelab.data.eg3d_store.LARGEST_FILE", 10)
    with pytest.raises(UserError, match="no picture and no label file"):
        Eg3dDataset(archive)


@pytest.mark.parametrize("mirror", [False, True])
def test_cache_folder_gives_the_same_samples(folder: Path, tmp_path: Path, mirror: bool) -> None:
    plain = Eg3dDataset(folder, 8, mirror=mirror, cache="none")
    for _ in range(2):  # filled, then found again
        cached = Eg3dDataset(folder, 8, mirror=mirror, cache=tmp_path / "cache")
        assert torch.equal(cached.items(range(len(cached))).image, plain.items(range(len(plain))).image)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="without a cache folder"):
        Eg3dDataset(zip_of(folder, tmp_path / "set.zip"), 8, cache=tmp_path / "cache")


def test_other_things_that_are_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        Eg3dDataset(tmp_path / "nothing")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match="got a .txt file"):
        Eg3dDataset(tmp_path / "x.txt")
    with pytest.raises(UserError, match="no pictures"):
        Eg3dDataset(tmp_path)


def test_oblong_picture_is_refused(folder: Path) -> None:
    Image.fromarray(smooth_picture(16, 20, 0)).save(folder / "00000/img00000000.png")
    with pytest.raises(UserError, match="expected a square picture.*got 16x20"):
        Eg3dDataset(folder, 16, cache="none").items([0])


def test_later_stage_reads_the_same_samples_larger(folder: Path) -> None:
    small = Eg3dDataset(folder, 8)
    large = small.with_image_size(16)
    assert small.items([1]).image.shape[-1] == 8 and large.items([1]).image.shape[-1] == 16  # type: ignore[union-attr]
    assert torch.equal(small.cameras([1]).label(), large.cameras([1]).label())


@pytest.mark.shared
def test_real_crops_read_with_their_cameras(real_data: Path) -> None:
    dataset = Eg3dDataset(real_data / "eg3d_portraits", 64)
    batch = dataset.items(range(len(dataset)))
    assert len(dataset) == 19 and batch.camera is not None
    distance = batch.camera.cam2world[:, :3, 3].norm(dim=1)
    assert ((distance - 2.7).abs() < 0.01).sum() == 18  # the README of the folder names the one that differs
    assert (batch.camera.intrinsics[:, 0, 0] - 4.2647).abs().max() < 1e-4
