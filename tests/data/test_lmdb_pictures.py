# SPDX-License-Identifier: Apache-2.0
"""Pictures with thumbnails and label maps out of LMDBs and folders."""

from __future__ import annotations

import gc
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facelab.data.batch import Batch
from facelab.data.classes import FLIP_TABLE
from facelab.data.lmdb_dataset import LmdbPictures, inspect_lmdb, mask_folders
from facelab.data.lmdb_store import LmdbWriter, key_of
from facelab.data.loader import ImageStream, PrefetchStream
from facelab.data.regions import fuse_regions
from facelab.data.thumbnails import open_pictures, thumbnails_of
from facelab.errors import UserError
from tests.data.pictures import blocky_mask, smooth_picture

pytest.importorskip("lmdb", reason="needs the lmdb package: pip install facelab[lmdb]")
SIZES = (8, 32)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def picture(index: int, size: int) -> np.ndarray:
    return smooth_picture(size, size, index)


def label_map(index: int, size: int) -> np.ndarray:
    return np.roll(blocky_mask(size, size), index, 1)


def fill(root: Path, entries: dict[bytes, bytes], length: int) -> Path:
    gc.collect()  # a file must not be open for reading and for writing in one process
    with LmdbWriter(root) as writer:
        writer.commit(entries, {"index": length})
        writer.finish(length)
    return root


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures of two sizes, label maps as CNeRF names them."""
    root = tmp_path / "faces_lmdb"
    for size in SIZES:
        fill(root, {key_of(size, i): png(picture(i, size)) for i in range(5)}, 5)
        folder = tmp_path / f"faces_mask_{size}"
        folder.mkdir()
        for i in range(5):
            np.save(folder / f"{i:05d}.npy", label_map(i, size).astype(np.int64))
    return root


def test_samples_are_the_stored_bytes(pictures):
    found = open_pictures(pictures, 32, 8, masks="auto")
    batch = found.items([3, 0])
    assert batch.image is not None and batch.label_map is not None and batch.thumbnail is not None
    for row, index in enumerate((3, 0)):
        assert (batch.image[row].permute(1, 2, 0).numpy() == picture(index, 32)).all()
        assert (batch.label_map[row].numpy() == label_map(index, 32)).all()
        small = Image.fromarray(picture(index, 32)).resize((8, 8), Image.Resampling.HAMMING)
        assert (batch.thumbnail[row].permute(1, 2, 0).numpy() == np.asarray(small)).all()
    assert found.validate().decoded == 5 and len(found) == 5


def test_mirroring_turns_picture_thumbnail_and_label_map(pictures):
    found = open_pictures(pictures, 32, 8, masks="auto")
    plain, turned = found.item(2), found.item(2, flip=True)
    assert turned.image.equal(plain.image.flip(-1))
    expected = np.array(FLIP_TABLE)[label_map(2, 32)][:, ::-1]
    assert (turned.label_map[0].numpy() == expected).all()
    small = Image.fromarray(np.ascontiguousarray(picture(2, 32)[:, ::-1])).resize((8, 8), Image.Resampling.HAMMING)
    assert (turned.thumbnail[0].permute(1, 2, 0).numpy() == np.asarray(small)).all()


def test_thumbnails_of_the_same_size_are_the_pictures(pictures):
    batch = open_pictures(pictures, 8, 8).item(1)
    assert batch.thumbnail.equal(batch.image) and batch.label_map is None
    other = open_pictures(pictures, 32, 8, masks="auto").with_image_size(8).item(1)
    assert other.image.equal(batch.image) and (other.label_map[0].numpy() == label_map(1, 8)).all()


def test_folders_give_the_samples_of_the_lmdb(pictures, tmp_path):
    (tmp_path / "folder" / "images").mkdir(parents=True)
    (tmp_path / "folder" / "masks").mkdir()
    for i in range(5):
        Image.fromarray(picture(i, 32)).save(tmp_path / "folder" / "images" / f"{i}.png")
        Image.fromarray(label_map(i, 32)).save(tmp_path / "folder" / "masks" / f"{i}.png")
        np.save(tmp_path / "folder" / f"{i}_mask.npy", label_map(i, 32))
    stored = open_pictures(pictures, 32, 8, masks="auto")
    lying = open_pictures(tmp_path / "folder", 32, 8, masks="auto")
    named = open_pictures(tmp_path / "folder" / "images", 32, 8, masks=tmp_path / "folder")
    for index, flip in ((0, False), (4, True)):
        for other in (lying, named):
            a, b = stored.item(index, flip), other.item(index, flip)
            assert a.image.equal(b.image) and a.thumbnail.equal(b.thumbnail) and a.label_map.equal(b.label_map)
    assert lying.validate().class_images == stored.validate().class_images == named.validate().class_images
    assert open_pictures(tmp_path / "folder", 32, 8).item(0).label_map is None


def test_streams_read_ahead_in_threads(pictures):
    found = open_pictures(pictures, 32, 8, masks="auto", cache="none")
    stream = ImageStream(found, seed=4)  # type: ignore[arg-type]
    expected = [stream.batch(k, 4) for k in (0, 4, 8)]
    with PrefetchStream(stream, 4, workers=4) as ahead:
        for batch in expected:
            other = next(ahead)
            for name in ("image", "thumbnail", "label_map"):
                assert getattr(batch, name).equal(getattr(other, name))
    assert any(stream.mirrored(0, i) for i in range(5))


def test_masks_of_another_size_and_kind(pictures, tmp_path):
    folder = tmp_path / "png"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(label_map(i, 64)).save(folder / f"{i:05d}.png")
    found = open_pictures(pictures, 32, 8, masks=folder).item(3)
    assert (found.label_map[0].numpy() == label_map(3, 64)[1::2, 1::2]).all()
    with pytest.raises(UserError, match="the mask is 8x8, expected a square of at least 32 px"):
        open_pictures(pictures, 32, 8, masks=tmp_path / "faces_mask_8").validate()


def test_label_maps_become_channels(pictures):
    batch = open_pictures(pictures, 32, 8, masks="auto").items([0, 1])
    channels = fuse_regions(batch.label_map)
    assert channels.shape == (2, 9, 32, 32) and channels.amax(1).min() == 1
    assert channels[0, 1].sum() == int((label_map(0, 32) == 1).sum())


@pytest.mark.parametrize(
    ("path", "original"),
    [("a/ffhq_lmdb", "a/ffhq_mask_64"), ("lmdb/x", "mask_64/x"), ("lmdb/lmdb", "mask_64/mask_64")],
)
def test_the_originals_mask_folder_is_among_ours(path, original):
    assert Path(original) in mask_folders(path, 64)


# ------------------------------------------------------------------ what can be wrong


def _change(root: Path, kind: str) -> None:
    masks = root.parent / "faces_mask_32"
    if kind == "mask missing":
        (masks / "00003.npy").unlink()
    elif kind == "mask too many":
        np.save(masks / "00005.npy", label_map(0, 32))
    elif kind == "masks twice":
        Image.fromarray(label_map(0, 32)).save(masks / "00001.png")
    elif kind == "no masks":
        for file in masks.iterdir():
            file.unlink()
        masks.rmdir()
    elif kind == "class":
        np.save(masks / "00002.npy", np.full((32, 32), 19))
    elif kind == "negative":
        np.save(masks / "00002.npy", np.full((32, 32), -1))
    elif kind == "float mask":
        np.save(masks / "00002.npy", np.zeros((32, 32), np.float32))
    elif kind == "cut mask":
        (masks / "00002.npy").write_bytes((masks / "00002.npy").read_bytes()[:200])
    elif kind == "pickled mask":
        np.save(masks / "00002.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif kind == "cut picture":
        fill(root, {key_of(32, 2): png(picture(2, 32))[:-40]}, 5)
    elif kind == "no picture":
        fill(root, {key_of(32, 2): b"no picture"}, 5)
    elif kind == "other size":
        fill(root, {key_of(32, 2): png(picture(2, 16))}, 5)
    elif kind == "missing entry":
        fill(root, {}, 6)
        np.save(masks / "00005.npy", label_map(0, 32))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mask missing", r"faces_mask_32: 4 masks but 5 pictures.*first without: 00003.npy"),
        ("mask too many", r"6 masks but 5 pictures.*00005 has no picture"),
        ("masks twice", r"picture 00001 has a .npy and a .png mask"),
        ("no masks", r"no masks of 32 px at .*faces_mask_32; expected a folder of 00000.npy"),
        ("class", r"00002.npy: mask value 19, expected class numbers 0..18"),
        ("negative", r"00002.npy: mask value -1"),
        ("float mask", r"expected a 2-D array of integer class numbers, got float32"),
        ("cut mask", r"00002.npy: expected a mask, got a damaged file"),
        ("pickled mask", r"00002.npy: expected a mask, got a damaged file \(.*allow_pickle=False"),
        ("cut picture", r"32-00002: expected a picture, got a damaged file"),
        ("no picture", r"32-00002: expected a picture, got a damaged file"),
        ("other size", r"32-00002: expected 32x32 pixels as its key says, got 16x16"),
        ("missing entry", r"32-00005: no such entry, though the set states 6"),
    ],
)
def test_problems_are_one_line_before_training(pictures, kind, words):
    _change(pictures, kind)
    with pytest.raises(UserError, match=words) as caught:
        open_pictures(pictures, 32, 8, masks="auto").validate()
    assert "\n" not in str(caught.value)
    problems, lines, _ = inspect_lmdb(pictures)
    assert kind == "no masks" or any(str(caught.value) == problem for problem in problems)
    assert lines[0].endswith("sizes 8, 32 px")


def test_sizes_that_are_not_there_are_named(pictures, tmp_path):
    with pytest.raises(UserError, match=r"no pictures of 64 px in this LMDB, it has 8, 32; .*--size 8,32,64"):
        open_pictures(pictures, 64, 8)
    with pytest.raises(UserError, match="it has 8, 32"):
        LmdbPictures(pictures, 8).with_image_size(16)
    with pytest.raises(UserError, match="thumbnails must be 1 to 8 px"):
        open_pictures(pictures, 8, 32)
    with pytest.raises(UserError, match="no pictures at .*got no such folder"):
        open_pictures(tmp_path / "nowhere", 32, 8)
    with pytest.raises(UserError, match="no masks lie with these pictures"):
        Image.fromarray(picture(0, 8)).save(tmp_path / "0.png")
        open_pictures(tmp_path, 8, 8, masks="auto")


def test_a_picture_without_mask_in_a_folder_is_named(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for i in range(3):
        Image.fromarray(picture(i, 8)).save(tmp_path / "images" / f"{i}.png")
    Image.fromarray(label_map(1, 8)).save(tmp_path / "masks" / "1_seg.png")
    with pytest.raises(UserError, match=r"2 of 3 pictures have no mask here, first 0.png"):
        open_pictures(tmp_path, 8, 8, masks="auto")
    np.save(tmp_path / "masks" / "1.npy", label_map(1, 8))
    with pytest.raises(UserError, match="are masks of one picture"):
        open_pictures(tmp_path, 8, 8, masks="auto")


def test_batches_check_and_carry_thumbnails():
    image, small = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    batch = Batch(image=image, thumbnail=small)
    assert batch.float_thumbnail().unique().tolist() == [1.0] and batch.select([1]).thumbnail.shape == (1, 3, 4, 4)
    assert Batch.collate([batch, batch]).thumbnail.shape == (4, 3, 4, 4)
    with pytest.raises(ValueError, match="thumbnail must be uint8"):
        Batch(thumbnail=small.float())
    with pytest.raises(ValueError, match="one length"):
        Batch(image=image, thumbnail=small[:1])
    with pytest.raises(ValueError, match="no thumbnail"):
        Batch(image=image).float_thumbnail()
    with pytest.raises(ValueError, match="needs a picture of at least that size"):
        thumbnails_of(image, 16)
