# SPDX-License-Identifier: Apache-2.0
"""Training pictures with cameras: a data set or synthetic heads, and the cameras to generate from."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from facelab.data.batch import Batch
from facelab.data.eg3d_labels import mirror_label
from facelab.data.loader import ImageStream
from facelab.data.samplers import ResumableSampler
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.tensors import constant


class Pictures(Protocol):
    """An endless stream of pictures with cameras, and all its labels."""

    labels: Tensor

    def batch(self, first_image: int, count: int, /) -> Batch: ...


@dataclass(frozen=True)
class LabelTable:
    """Cameras to generate from: rows of the data set, drawn uniformly.

    Attributes:
        labels: (L, 25) float32 on the CPU.
    """

    labels: Tensor

    def draw(self, draws: Draws, name: str, count: int) -> Tensor:
        """(count, 25), a pure function of the draws."""
        place = (draws.uniform(name, (count,), dtype=torch.float64) * len(self.labels)).long()
        return self.labels[place]

    def deviation(self, device: torch.device | str) -> Tensor:
        """(25,) population standard deviation, copied to the device once."""
        return constant(self._deviation, device)

    @functools.cached_property
    def _deviation(self) -> tuple[float, ...]:
        return tuple(self.labels.double().std(dim=0, correction=0).float().tolist())


class DatasetPictures(ImageStream):
    """A data set with labels as an endless stream.

    Args:
        dataset: an :class:`facelab.data.eg3d_dataset.Eg3dDataset`; its ``flips`` mirrors half of the samples.
        seed: of the order and the mirroring.
        windowed: the original's order instead of ours.
    """

    def __init__(self, dataset: Any, seed: int, windowed: bool = False) -> None:
        super().__init__(dataset, seed)
        if windowed:
            self.sampler = WindowedSampler(len(dataset), seed)  # type: ignore[assignment]
        stored = dataset.labels
        self.labels = torch.cat([stored, mirror_label(stored)]) if self.flip else stored


@functools.lru_cache(maxsize=2)
def labelled_pictures(path: str, size: int, flips: bool, max_size: int | None, alpha: str, cache: str) -> Any:
    """The data set at ``path``, opened once in a process: the training, its cameras and its sample grids share it."""
    from facelab.data.eg3d_dataset import Eg3dDataset

    return Eg3dDataset(path, size, flips=flips, max_size=max_size, alpha=alpha, cache=cache)


def camera_notes(dataset: Any, path: str) -> list[str]:
    """What is odd about the cameras of a data set, a line each.

    Raises:
        UserError: they are no cameras of a picture (a matrix that mirrors, intrinsics in pixels, another convention).
    """
    from facelab.data.checking import SetReport, check_cameras

    report = SetReport(path, len(dataset.names))
    check_cameras(dataset.labels[: len(dataset.names)], dataset.names, report)
    if report.problems:
        raise UserError(
            f"{path}: {report.problems[0]}; mend the labels (scripts/prepare_data.py check {path} tells all that is wrong)"
        )
    return [*report.warnings, *report.notes]


class HeadPictures:
    """Synthetic heads, drawn once, with cameras at EG3D's distance.

    Args:
        count: heads in the pool.
        size: pixels.
        seed: of the heads and of their order.
        yaw_std, pitch_std: of the camera around the frontal view, radians.
        fov: full field of view in degrees.
        radius: the unit sphere of the heads' cameras becomes a sphere of this radius; the pictures stay the same.
        windowed: the original's order instead of ours.
        background: behind the heads.
    """

    def __init__(
        self,
        count: int,
        size: int,
        seed: int,
        yaw_std: float,
        pitch_std: float,
        fov: float,
        radius: float,
        windowed: bool = False,
        background: str = "black",
    ) -> None:
        pool = head_pool(count, size, seed, yaw_std, pitch_std, fov, background)
        camera = pool.camera
        assert camera is not None
        self.pool = replace(pool, camera=camera.scaled(radius))
        self.labels = camera.scaled(radius).label()
        self.sampler = WindowedSampler(count, seed) if windowed else ResumableSampler(count, seed)

    def batch(self, first_image: int, count: int) -> Batch:
        """Samples ``first_image`` .. ``first_image + count - 1`` of the stream, on the CPU."""
        return self.pool.select(torch.tensor(self.sampler.indices_for_chunk(first_image, count)))


@functools.lru_cache(maxsize=2)
def head_pool(
    count: int, size: int, seed: int, yaw_std: float, pitch_std: float, fov: float, background: str = "black"
) -> Batch:
    """Synthetic heads as one batch, pixel centres at (i + 0.5) / size as EG3D has them; drawn once in a process.

    UserError for fewer than one head.
    """
    from facelab.data.synthetic_pool import SyntheticPool

    pool = SyntheticPool(count, size, seed, yaw_std, pitch_std, fov, grid="centers", background=background)
    return replace(pool.batch_of_all, label_map=None)


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
