# SPDX-License-Identifier: Apache-2.0
"""Real samples of one process, read ahead and on the device."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from facelab.data.batch import Batch
from facelab.data.loader import PrefetchStream
from facelab.training.protocol import DataSource


class Feed:
    """Iterates over this process's share of each step of the endless stream.

    Args:
        source: the samples.
        start_image: samples consumed by the run so far.
        batch_size: samples per step over all processes.
        rank, world: which share; rank r owns the r-th contiguous part of each step.
        workers: threads that read ahead; 0 reads when asked.
        device: where the samples go.
    """

    def __init__(
        self,
        source: DataSource,
        start_image: int,
        batch_size: int,
        rank: int,
        world: int,
        workers: int,
        device: torch.device,
    ) -> None:
        self._device = device
        self._stream = PrefetchStream(
            source,  # type: ignore[arg-type]
            batch_size,
            start_image,
            [rank],
            workers,
            chunk_size=batch_size // world,
            depth=2,
            pin_memory=device.type == "cuda",
        )

    def next(self) -> Any:
        """The samples of the next step, in their stored dtypes, on the device."""
        return next(self._stream).to(self._device, non_blocking=True)

    def close(self) -> None:
        self._stream.close()


def chunk_of(batch: Any, first: int, count: int) -> Any:
    """Samples ``first`` ... ``first + count - 1`` of a batch, as views: nothing is copied, nothing waits."""
    if not isinstance(batch, Batch):
        return batch.select(slice(first, first + count))
    frames, parts = batch.frames, {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            parts[field.name] = value[first : first + count]
        elif value is not None:  # cameras, one for each frame
            parts[field.name] = value[first * frames : (first + count) * frames]
    return replace(batch, **parts)
