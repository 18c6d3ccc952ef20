# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from facelab.data import transforms
from facelab.data.labels import FLIP_TABLE
from tests.data.pictures import blocky_mask, smooth_picture


def run(chain, image, mask, flip=False):
    return chain.finish(*chain.prepare(Image.fromarray(image), mask), flip)


def test_area_chain_averages_the_middle_square():
    image = np.zeros((40, 50, 3), np.uint8)
    image[10:14, 20:24] = 200  # rows 4.. of the crop (crop 0.8 of 40 = 32, offsets 4 and 9)
    mask = np.zeros((40, 50), np.uint8)
    mask[10:14, 20:24] = 2
    small, labels = run(transforms.AreaChain(8), image, mask)
    expected = image[4:36, 9:41].reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert np.abs(small - expected).max() <= 1
    assert labels.shape == (8, 8) and set(np.unique(labels)) <= {0, 2}


def test_mask_of_another_resolution_stays_aligned():
    mask = blocky_mask(200, 200)
    fine = transforms.AreaChain(32).prepare(Image.fromarray(smooth_picture(400, 400)), mask)[1]
    coarse = transforms.AreaChain(32).prepare(Image.fromarray(smooth_picture(64, 64)), mask)[1]
    assert (fine == coarse).all()
    by_pillow = Image.fromarray(mask).resize((32, 32), Image.Resampling.NEAREST, box=(20, 20, 180, 180))
    assert (fine == np.asarray(by_pillow)).all()


def test_flip_mirrors_and_exchanges():
    image, mask = smooth_picture(40, 40), blocky_mask(40, 40)
    chain = transforms.AreaChain(32, crop=1.0)
    plain, flipped = run(chain, image, mask), run(chain, image, mask, flip=True)
    assert (flipped[0] == plain[0][:, ::-1]).all()
    assert (flipped[1] == np.array(FLIP_TABLE)[plain[1]][:, ::-1]).all()
    columns = {c: np.nonzero(flipped[1] == c)[1].mean() for c in (4, 5)}
    assert columns[4] > columns[5]  # the subject's left eye stays on the right of the picture
    kept = run(transforms.FenerfReference(32), image, mask, flip=True)[1]
    assert np.nonzero(kept == 4)[1].mean() < np.nonzero(kept == 5)[1].mean()  # the original's mistake


def test_background_is_blackened_before_resizing():
    image, mask = np.full((40, 40, 3), 200, np.uint8), blocky_mask(20, 20)
    small, labels = run(transforms.AreaChain(20, crop=1.0, background_mask=True), image, mask)
    assert (small[labels == 0] == 0).all() and (small[labels != 0] == 200).all()
    assert (run(transforms.AreaChain(20, crop=1.0), image, mask)[0] == 200).all()


def test_small_and_oblong_pictures_work():
    small, labels = run(transforms.AreaChain(128), smooth_picture(100, 80), blocky_mask(100, 80))
    assert small.shape == (128, 128, 3) and labels.shape == (128, 128)
    assert len(np.unique(small[64, :, 0])) > 60  # enlarged smoothly, not in blocks
    for chain in (transforms.FenerfReference(64), transforms.PiganCelebaReference(64)):
        assert run(chain, smooth_picture(100, 80), blocky_mask(100, 80))[0].shape == (64, 64, 3)


@pytest.mark.parametrize(("width", "height"), [(512, 512), (178, 218), (333, 250)])
@pytest.mark.parametrize("size", [64, 100, 256])
def test_reference_chain_equals_its_description(width, height, size):
    """Short side 320 by Pillow, middle 256, tensor resize: against torch's own interpolation."""
    image, mask = smooth_picture(width, height), blocky_mask(width, height)
    short = (320, int(320 * height / width)) if width <= height else (int(320 * width / height), 320)
    left, top = round((short[0] - 256) / 2), round((short[1] - 256) / 2)

    def crop(array, kind):
        return np.asarray(Image.fromarray(array).resize(short, kind))[top : top + 256, left : left + 256]

    colours = torch.from_numpy(crop(image, Image.Resampling.BILINEAR).copy()).permute(2, 0, 1)[None].float()
    classes = torch.from_numpy(crop(mask, Image.Resampling.NEAREST).copy())[None, None].float()
    resize = torch.nn.functional.interpolate
    smooth = resize(colours, size=(size, size), mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
    nearest = resize(classes, size=(size, size), mode="nearest")[0, 0].numpy()
    ours = run(transforms.FenerfReference(size, background_mask=False), image, mask)
    assert np.abs(ours[0] - smooth).max() <= 0.5 + 1e-3  # rounded to 8 bits
    assert (ours[1] == nearest).all()
    flipped = resize(colours.flip(3), size=(size, size), mode="nearest")[0].permute(1, 2, 0).numpy()
    assert (run(transforms.PiganCelebaReference(size), image, None, flip=True)[0] == flipped).all()


def test_cats_and_carla_squeeze_to_a_square():
    image = smooth_picture(60, 30)
    small, _ = run(transforms.PiganResizeReference(15), image, None)
    assert (small == image[1::2, 2::4]).all()  # nearest: the pixel under each new centre


def test_refuses():
    with pytest.raises(ValueError, match="crop is a fraction"):
        transforms.AreaChain(32, crop=1.5)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        transforms.FenerfReference(0)
