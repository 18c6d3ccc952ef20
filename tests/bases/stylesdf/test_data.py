# SPDX-License-Identifier: Apache-2.0
"""Training pictures: synthetic heads with StyleSDF's cameras, and sets of pictures by their path."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facelab.bases.stylesdf import data
from facelab.bases.stylesdf.data import HeadPictures, PicturesConfig, head_pool, picture_source, pictures_at
from facelab.cameras.sphere import view_angles
from facelab.data.synthetic import SyntheticHeads
from facelab.errors import UserError
from facelab.training.protocol import DataSource

COUNT, SIZE = 40, 24


@pytest.fixture(scope="module")
def heads() -> DataSource:
    return picture_source(PicturesConfig(heads=COUNT), SIZE, 8, seed=3, label_maps=True)


def test_samples_have_picture_thumbnail_label_map_and_camera(heads):
    batch = heads.batch(0, 5)
    assert batch.image.shape == (5, 3, SIZE, SIZE) and batch.label_map.shape == (5, SIZE, SIZE)
    assert len(batch.camera) == 5 and batch.label_map.max() <= 18 and 0 < (batch.label_map == 1).float().mean() < 1
    for image, thumbnail in zip(batch.image, batch.thumbnail, strict=True):
        picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        small = np.asarray(picture.resize((8, 8), Image.Resampling.HAMMING))
        assert (thumbnail.permute(1, 2, 0).numpy() == small).all()
    ground = batch.image[0, 0, 0, 0]
    assert 120 < ground < 136  # grey outside the head
    outside = (batch.image == ground).all(1) & (batch.label_map == 0)
    assert outside.float().mean() > 0.1


def test_cameras_are_those_of_stylesdf(heads):
    camera = heads.batch(0, COUNT).camera
    assert camera.cam2world[:, :3, 3].norm(dim=-1).sub(1).abs().max() < 1e-5
    assert camera.intrinsics[:, 0, 0].sub(0.5 / math.tan(math.radians(6))).abs().max() < 1e-5
    angles = view_angles(camera)
    azimuth, elevation = angles[:, 0], angles[:, 1]
    expected = torch.stack([elevation.cos() * azimuth.sin(), elevation.sin(), elevation.cos() * azimuth.cos()], dim=-1)
    assert (camera.cam2world[:, :3, 3] - expected).abs().max() < 1e-5
    assert 0.2 < azimuth.std() < 0.4 and 0.1 < elevation.std() < 0.2 and azimuth.abs().max() <= 1.2


def test_pixels_stand_at_their_centres(heads):
    """The pool is drawn on the grid of the renderer: the same heads on the other grid are other pictures."""
    options = {"device": "cpu", "fov": 12.0, "yaw_std": 0.3, "pitch_std": 0.15}
    pool = head_pool(COUNT, SIZE, 3, 0.3, 0.15, 12.0, "black")
    centres, corners = (SyntheticHeads(3, SIZE, grid=grid, **options).batch([0, 7]) for grid in ("centers", "corners"))
    assert pool.label_map[[0, 7]].equal(centres.mask.to(torch.uint8))
    assert not pool.label_map[[0, 7]].equal(corners.mask.to(torch.uint8))


def test_a_sample_depends_on_seed_and_number_alone(heads):
    a, b = heads.batch(0, 8), heads.batch(4, 4)
    assert a.image[4:].equal(b.image) and a.camera.cam2world[4:].equal(b.camera.cam2world)
    again = HeadPictures(COUNT, SIZE, 8, 3, label_maps=True).batch(4, 4)
    assert again.image.equal(b.image) and again.label_map.equal(b.label_map)
    assert HeadPictures(COUNT, SIZE, 8, 3).batch(0, 1).label_map is None
    epoch = heads.batch(0, COUNT).image.flatten(1).unique(dim=0)
    assert len(epoch) == COUNT


def test_a_path_is_a_set_of_pictures(tmp_path: Path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    for i, array in enumerate(pixels):
        Image.fromarray(array).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(np.full((16, 16), i, np.uint8)).save(tmp_path / "masks" / f"{i}.png")
    config = PicturesConfig(path=str(tmp_path), mirror=False)
    source = picture_source(config, 16, 8, seed=0, label_maps=True)
    batch = source.batch(0, 4)
    for image, label_map in zip(batch.image, batch.label_map, strict=True):
        assert (image.permute(1, 2, 0).numpy() == pixels[int(label_map[0, 0])]).all()
    assert sorted(int(m[0, 0]) for m in batch.label_map) == [0, 1, 2, 3]
    assert pictures_at(config, 16, 8, True) is pictures_at(config, 16, 8, True)
    assert pictures_at(config, 16, 8, True).validate().decoded == 4
    assert picture_source(config, 16, 8, seed=0).batch(0, 1).label_map is None
    mirrored = picture_source(PicturesConfig(path=str(tmp_path)), 16, 8, seed=0, label_maps=True).batch(0, 8)
    plain = {array.transpose(2, 0, 1).tobytes() for array in pixels}
    turned = {array[:, ::-1].transpose(2, 0, 1).tobytes() for array in pixels}
    kinds = [(image.numpy().tobytes() in plain, image.numpy().tobytes() in turned) for image in mirrored.image]
    assert (True, False) in kinds and (False, True) in kinds and (False, False) not in kinds


def test_what_cannot_be_is_one_line(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="thumbnails must be 1 to 8 px"):
        HeadPictures(4, 8, 16, 0)
    with pytest.raises(UserError, match="at least 1, got 0"):
        HeadPictures(0, 8, 8, 0)
    monkeypatch.setattr(data, "_memory", lambda: 64 * 4 * 20.0)
    with pytest.raises(UserError, match="11 synthetic heads of 8 px do not fit.*expected at most 10"):
        HeadPictures(11, 8, 8, 0)
    with pytest.raises(UserError, match="no pictures at"):
        picture_source(PicturesConfig(path=str(tmp_path / "none")), 8, 8, 0)
