# SPDX-License-Identifier: Apache-2.0
"""From a data set to the batches of a run: a fixed endless stream, and reading ahead of the training loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from facelab.data.batch import Batch
from facelab.data.image_folder import PictureSet
from facelab.data.samplers import ResumableSampler, chunk_starts, chunks_in_batch
from facelab.draws import Draws


class ImageStream:
    """The endless stream of training samples of a run.

    Sample k is a pure function of (data set, seed, k): which picture it is comes from
    :class:`ResumableSampler`, and whether it is mirrored from a draw keyed by (seed, epoch,
    index). So any process can ask for any part, in any order.

    Args:
        dataset: where the samples come from.
        seed: seed of the run.
        flip: mirror half of the samples; None follows the data set's chain.
        shuffle: a new order in each epoch.
    """

    def __init__(self, dataset: PictureSet, seed: int, flip: bool | None = None, shuffle: bool = True) -> None:
        self.dataset, self.seed = dataset, seed
        self.flip = dataset.chain.flips if flip is None else flip
        self.sampler = ResumableSampler(len(dataset), seed, shuffle)

    def batch(self, image_number: int, count: int) -> Batch:
        """Samples ``image_number`` .. ``image_number + count - 1`` as one batch on the CPU.

        Raises:
            UserError: a file among them is damaged.
        """
        entries = self.sampler.entries(image_number, count)
        flips = [self.mirrored(epoch, index) for epoch, index in entries]
        return self.dataset.items([index for _, index in entries], flips)

    def mirrored(self, epoch: int, index: int) -> bool:
        """Whether this picture is mirrored in this epoch."""
        if not self.flip:
            return False
        draws = Draws(self.seed, step=epoch, phase="data", chunk=index)
        return bool(draws.uniform("flip", ()) < 0.5)


class PrefetchStream:
    """Reads ahead of the training loop in background threads (decoding releases the interpreter lock).

    Iterating yields one :class:`Batch` of ``chunk_size`` samples for each of this process's
    chunks, step after step, for ever. What it yields depends on the stream and the position
    alone, not on ``workers`` or timing. Use it as a context manager, or call :meth:`close`.

    Args:
        stream: the samples.
        batch_size: images in a step, over all processes.
        chunk_size: images in a chunk; None makes the whole step one chunk.
        start_image: images consumed by the run so far; a resumed run passes what it stored.
        chunks: numbers of this process's chunks within a step (see
            :func:`facelab.data.samplers.rank_chunks`); None means all of them.
        workers: background threads; 0 reads in the caller, when asked.
        depth: chunks read ahead; None means two steps' worth, at least ``workers``.
        pin_memory: put batches into page-locked memory (needs CUDA).

    Raises:
        ValueError: the chunk does not divide the batch, or a chunk lies outside the step.
        UserError: from ``next``, when a file is damaged.
    """

    def __init__(
        self,
        stream: ImageStream,
        batch_size: int,
        start_image: int = 0,
        chunks: Sequence[int] | None = None,
        workers: int = 2,
        *,
        chunk_size: int | None = None,
        depth: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.stream, self.batch_size = stream, batch_size
        self.chunk_size = batch_size if chunk_size is None else chunk_size
        self.chunks = list(range(chunks_in_batch(batch_size, self.chunk_size)) if chunks is None else chunks)
        if not self.chunks:
            raise ValueError("this process has no chunk of the step")
        chunk_starts(0, batch_size, self.chunk_size, self.chunks)  # refuses chunks outside the step
        self.start_image, self.pin_memory = start_image, pin_memory
        self._yielded = 0
        self._starts = self._all_starts()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="facelab-data") if workers else None
        self._depth = max(workers, 2 * len(self.chunks)) if depth is None else max(1, depth)
        self._waiting: deque[Future[Batch]] = deque()

    @property
    def position(self) -> int:
        """Images consumed by the run, over all processes, in steps whose chunks were all yielded."""
        return self.start_image + self._yielded // len(self.chunks) * self.batch_size

    def __iter__(self) -> PrefetchStream:
        return self

    def __next__(self) -> Batch:
        if self._pool is None:
            batch = self._read(next(self._starts))
        else:
            while len(self._waiting) < self._depth:
                self._waiting.append(self._pool.submit(self._read, next(self._starts)))
            batch = self._waiting.popleft().result()
        self._yielded += 1
        return batch

    def close(self) -> None:
        """Stop reading ahead and wait for reads under way."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()

    def __enter__(self) -> PrefetchStream:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _all_starts(self) -> Iterator[int]:
        step_start = self.start_image
        while True:
            yield from chunk_starts(step_start, self.batch_size, self.chunk_size, self.chunks)
            step_start += self.batch_size

    def _read(self, start: int) -> Batch:
        batch = self.stream.batch(start, self.chunk_size)
        return batch.pin_memory() if self.pin_memory else batch
