# SPDX-License-Identifier: Apache-2.0
"""The order in which a training run sees its images.

There is one infinite stream of image numbers 0, 1, 2 ... for the whole run, shared by all
processes. Epoch e covers the numbers e * length .. (e + 1) * length - 1 with a permutation of
its own, so nothing is dropped where an epoch ends inside a batch. Which image stands at a
number depends on (seed, number) alone: to resume, a run needs only the count of images that
it has consumed, and it may go on with another number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from facelab.draws import Draws


@dataclass
class ResumableSampler:
    """Image number -> place in the data set, as a pure function of the seed.

    Attributes:
        length: number of images in the data set.
        seed: seed of the run.
        shuffle: False walks through the data set in its own order, every epoch alike.

    >>> sampler = ResumableSampler(length=4, seed=0)
    >>> sorted(sampler.indices_for_chunk(0, 4))
    [0, 1, 2, 3]
    >>> sampler.indices_for_chunk(2, 4) == sampler.indices_for_chunk(0, 6)[2:]
    True
    """

    length: int
    seed: int
    shuffle: bool = True
    _orders: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)  # memo of pure results

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"a sampler needs at least one image, got length {self.length}")

    def locate(self, image_number: int) -> tuple[int, int]:
        """Global image number -> (epoch, index in the data set)."""
        if image_number < 0:
            raise ValueError(f"image numbers start at 0, got {image_number}")
        epoch, place = divmod(image_number, self.length)
        return epoch, int(self._order(epoch)[place])

    def entries(self, start_image: int, size: int) -> list[tuple[int, int]]:
        """(epoch, index) of the ``size`` image numbers from ``start_image`` on."""
        return [self.locate(number) for number in range(start_image, start_image + size)]

    def indices_for_chunk(self, start_image: int, size: int) -> list[int]:
        """Data set indices of the chunk whose first sample has the global number ``start_image``."""
        return [index for _, index in self.entries(start_image, size)]

    def _order(self, epoch: int) -> Tensor:
        order = self._orders.get(epoch)  # threads share the memo: never look twice
        if order is None:
            if self.shuffle:
                generator = Draws(self.seed, step=epoch, phase="data").generator("order")
                order = torch.randperm(self.length, generator=generator)
            else:
                order = torch.arange(self.length)
            for old in [e for e in list(self._orders) if abs(e - epoch) > 1]:
                self._orders.pop(old, None)
            self._orders[epoch] = order
        return order


def chunk_starts(start_image: int, batch_size: int, chunk_size: int, chunks: range | list[int]) -> list[int]:
    """First image number of each of the given chunks of one step.

    Args:
        start_image: images consumed by the run before this step.
        batch_size: images in a step, over all processes.
        chunk_size: images in a chunk (``batch_gpu``).
        chunks: numbers of the chunks within the step, counted across processes.

    Raises:
        ValueError: the batch is no multiple of the chunk, or a chunk lies outside the step.
    """
    total = chunks_in_batch(batch_size, chunk_size)
    outside = [c for c in chunks if not 0 <= c < total]
    if outside:
        raise ValueError(f"a step has the chunks 0..{total - 1}, got {outside[0]}")
    return [start_image + c * chunk_size for c in chunks]


def rank_chunks(batch_size: int, chunk_size: int, rank: int = 0, world: int = 1) -> range:
    """Chunk numbers of one process: rank r owns a contiguous run of the step's chunks.

    Raises:
        ValueError: the chunks cannot be shared out evenly; says which sizes would do.
    """
    total = chunks_in_batch(batch_size, chunk_size)
    if total % world or not 0 <= rank < world:
        raise ValueError(
            f"{total} chunks of {chunk_size} cannot be shared by {world} processes (rank {rank}); "
            f"the batch size must be a multiple of {chunk_size * world}, got {batch_size}"
        )
    share = total // world
    return range(rank * share, (rank + 1) * share)


def chunks_in_batch(batch_size: int, chunk_size: int) -> int:
    """Number of chunks in a step; ValueError unless the chunk divides the batch."""
    if chunk_size < 1 or batch_size < 1 or batch_size % chunk_size:
        raise ValueError(f"the batch size must be a multiple of the chunk size {chunk_size}, got {batch_size}")
    return batch_size // chunk_size
