# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import pytest
import torch

from facelab.data import Batch, CelebAMaskHQ, ImageStream, PrefetchStream, rank_chunks
from facelab.errors import UserError
from tests.data.pictures import write_pairs


@pytest.fixture
def stream(tmp_path):
    return ImageStream(CelebAMaskHQ(write_pairs(tmp_path / "set", count=5), 16), seed=7)


def same(first: Batch, second: Batch) -> bool:
    return first.image.equal(second.image) and first.label_map.equal(second.label_map)


def test_batch_is_a_pure_function_of_the_number(stream):
    whole = stream.batch(0, 40)
    assert same(stream.batch(13, 9), whole.select(slice(13, 22)))
    again = ImageStream(stream.dataset, seed=7)
    assert same(again.batch(31, 4), whole.select(slice(31, 35)))
    assert not same(ImageStream(stream.dataset, seed=8).batch(0, 40), whole)


def test_flips_are_about_half_and_change_with_the_epoch(stream):
    drawn = [[stream.mirrored(epoch, index) for index in range(5)] for epoch in range(60)]
    share = sum(map(sum, drawn)) / 300
    assert 0.4 < share < 0.6
    assert all(len({row[i] for row in drawn}) == 2 for i in range(5))
    assert not any(ImageStream(stream.dataset, 7, flip=False).mirrored(e, 0) for e in range(20))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_do_not_change_what_comes(stream, workers):
    with PrefetchStream(stream, batch_size=4, workers=workers, start_image=6) as batches:
        for step, batch in enumerate(itertools.islice(batches, 5)):
            assert same(batch, stream.batch(6 + 4 * step, 4))
            assert batches.position == 6 + 4 * (step + 1)


def test_two_processes_read_what_one_reads(stream):
    with PrefetchStream(stream, batch_size=4, chunk_size=1) as batches:
        one = [next(batches) for _ in range(12)]
    for rank in range(2):
        mine = rank_chunks(4, 1, rank, 2)
        with PrefetchStream(stream, batch_size=4, chunk_size=1, chunks=mine, workers=1) as batches:
            for step in range(3):
                for chunk in mine:
                    assert same(next(batches), one[step * 4 + chunk])


def test_resume_inside_an_epoch(stream):
    with PrefetchStream(stream, batch_size=4) as batches:
        for _ in range(3):
            next(batches)
        stored, following = batches.position, next(batches)
    assert stored == 12
    with PrefetchStream(ImageStream(stream.dataset, 7), batch_size=4, start_image=stored) as batches:
        assert same(next(batches), following)


def test_a_damaged_file_is_one_line_from_a_worker(tmp_path):
    root = write_pairs(tmp_path / "set", count=2, size=(200, 200))
    victim = root / "celebahq_mask_img" / "00001.jpg"
    victim.write_bytes(victim.read_bytes()[:300])
    dataset = CelebAMaskHQ(root, 16)
    with PrefetchStream(ImageStream(dataset, 0), batch_size=2) as batches, pytest.raises(UserError) as caught:
        next(batches)
    assert "00001.jpg" in str(caught.value) and "\n" not in str(caught.value)


def test_refuses(stream):
    with pytest.raises(ValueError, match="multiple of the chunk size"):
        PrefetchStream(stream, batch_size=4, chunk_size=3)
    with pytest.raises(ValueError, match="no chunk"):
        PrefetchStream(stream, batch_size=4, chunks=[])
    with pytest.raises(ValueError, match="got 9"):
        PrefetchStream(stream, batch_size=4, chunk_size=1, chunks=[9])


def test_later_stage_takes_the_same_pictures(stream):
    bigger = ImageStream(stream.dataset.with_image_size(32), 7).batch(0, 5)
    assert bigger.image.shape == (5, 3, 32, 32)
    small = torch.nn.functional.avg_pool2d(bigger.image.float(), 2)
    assert (small - stream.batch(0, 5).image.float()).abs().mean() < 3
