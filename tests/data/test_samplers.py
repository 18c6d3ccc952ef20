# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from facelab.data.samplers import ResumableSampler, chunk_starts, rank_chunks


def test_each_epoch_is_a_permutation_of_its_own():
    sampler = ResumableSampler(7, seed=3)
    stream = sampler.indices_for_chunk(0, 35)
    epochs = [stream[i : i + 7] for i in range(0, 35, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert sampler.entries(6, 2)[0][0] == 0 and sampler.entries(6, 2)[1][0] == 1


def test_number_decides_alone():
    stream = ResumableSampler(7, seed=3).indices_for_chunk(0, 200)
    fresh = ResumableSampler(7, seed=3)
    assert fresh.indices_for_chunk(150, 20) == stream[150:170]
    assert fresh.indices_for_chunk(5, 13) == stream[5:18]  # backwards, too
    assert ResumableSampler(7, seed=4).indices_for_chunk(0, 200) != stream
    assert ResumableSampler(3, 0, shuffle=False).indices_for_chunk(1, 5) == [1, 2, 0, 1, 2]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_one_order(world):
    batch, chunk = 8, 2
    whole = ResumableSampler(5, seed=0).indices_for_chunk(16, batch)
    parts = []
    for rank in range(world):
        sampler = ResumableSampler(5, seed=0)  # each process has its own
        for start in chunk_starts(16, batch, chunk, rank_chunks(batch, chunk, rank, world)):
            parts += sampler.indices_for_chunk(start, chunk)
    assert parts == whole


def test_refuses():
    with pytest.raises(ValueError, match="at least one image"):
        ResumableSampler(0, 0)
    with pytest.raises(ValueError, match="multiple of the chunk size 3, got 8"):
        chunk_starts(0, 8, 3, [0])
    with pytest.raises(ValueError, match=r"chunks 0..3, got 4"):
        chunk_starts(0, 8, 2, [4])
    with pytest.raises(ValueError, match="multiple of 6, got 8"):
        rank_chunks(8, 2, 0, 3)
