# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from facelab.cameras import Camera
from facelab.data import Batch


def make(count: int, frames: int | None = None) -> Batch:
    axes = (count,) if frames is None else (count, frames)
    total = count * (frames or 1)
    yaw = torch.linspace(1.2, 1.8, total)
    numbers = torch.arange(total).view(*axes)
    return Batch(
        image=numbers[..., None, None, None].expand(*axes, 3, 4, 4).to(torch.uint8),
        label_map=numbers[..., None, None].expand(*axes, 4, 4),
        camera=Camera.on_sphere(torch.full((total,), math.pi / 2), yaw, 12.0),
        light=numbers[..., None].expand(*axes, 9).float(),
    )


@pytest.mark.parametrize("frames", [None, 2])
def test_select_and_collate_are_inverse(frames):
    batch = make(5, frames)
    assert len(batch) == 5 and batch.frames == (frames or 1)
    again = Batch.collate([batch.select(i) for i in range(5)])
    assert again.image.equal(batch.image) and again.light.equal(batch.light)
    assert again.camera.cam2world.equal(batch.camera.cam2world)
    picked = batch.select([3, 1])
    per = frames or 1
    assert picked.camera.angles[:per, 1].equal(batch.camera.angles[3 * per : 4 * per, 1])
    assert picked.label_map.equal(batch.label_map[[3, 1]])
    assert batch.select(-1).image.equal(batch.image[4:]) and len(batch.select(slice(1, 3))) == 2


def test_range_and_device():
    image = torch.tensor([0, 255, 128], dtype=torch.uint8).view(1, 3, 1, 1)
    batch = Batch(image).to("cpu")
    assert batch.float_image().flatten()[:2].tolist() == [-1.0, 1.0]
    assert batch.label_map is None and batch.camera is None
    assert len(Batch()) == 0
    with pytest.raises(ValueError, match="no image"):
        Batch().float_image()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (lambda: {"image": torch.zeros(2, 3, 4, 4)}, "uint8"),
        (lambda: {"image": torch.zeros(2, 4, 4, 4, dtype=torch.uint8)}, "uint8"),
        (lambda: {"label_map": torch.zeros(2, 4, 4)}, "integers"),
        (lambda: {"light": torch.zeros(2, 9), "coefficients": torch.zeros(3, 5)}, "one length"),
        (lambda: {"light": torch.zeros(2, 9), "camera": make(3).camera}, "expected 2 cameras, got 3"),
    ],
)
def test_refuses(fields, said):
    with pytest.raises(ValueError, match=said):
        Batch(**fields())


def test_collate_refuses_mixed_items():
    with pytest.raises(ValueError, match="every item must have the fields"):
        Batch.collate([make(1), Batch(make(1).image)])
