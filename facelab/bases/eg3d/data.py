# SPDX-License-Identifier: Apache-2.0
"""The order in which the original sees its pictures."""

from __future__ import annotations

import numpy as np


class WindowedSampler:
    """Endless shuffled order in which each served picture changes places with one served lately.

    The original's sampler (a ``reference`` switch; ours is :class:`facelab.data.samplers.ResumableSampler`): the order is
    shuffled once; after place i is served it is exchanged with place ``i - randint(window)``. Reaching an image number
    replays all exchanges before it, so random access costs time but no state travels in checkpoints.

    Args:
        length: pictures in the data set.
        seed: of the order.
        window: share of the data set within which places are exchanged.
    """

    def __init__(self, length: int, seed: int, window: float = 0.5) -> None:
        if length < 1:
            raise ValueError(f"a sampler needs at least one image, got length {length}")
        self.length, self.seed = length, seed
        self.window = int(np.rint(length * window))
        self._restart()

    def _restart(self) -> None:
        self._random = np.random.RandomState(self.seed)
        self._order = np.arange(self.length)
        self._random.shuffle(self._order)
        self._next = 0

    def _serve(self) -> int:
        place = self._next % self.length
        index = int(self._order[place])
        if self.window >= 2:
            other = (place - self._random.randint(self.window)) % self.length
            self._order[place], self._order[other] = self._order[other], self._order[place]
        self._next += 1
        return index

    def entries(self, start_image: int, size: int) -> list[tuple[int, int]]:
        """(epoch, index) of the ``size`` image numbers from ``start_image`` on."""
        if start_image < 0:
            raise ValueError(f"image numbers start at 0, got {start_image}")
        if start_image < self._next:
            self._restart()
        while self._next < start_image:
            self._serve()
        return [(number // self.length, self._serve()) for number in range(start_image, start_image + size)]

    def indices_for_chunk(self, start_image: int, size: int) -> list[int]:
        """Data set indices of ``size`` image numbers from ``start_image`` on."""
        return [index for _, index in self.entries(start_image, size)]
