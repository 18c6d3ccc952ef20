# SPDX-License-Identifier: Apache-2.0
"""Training pictures of StyleSDF and CNeRF: an LMDB, a folder, or synthetic heads; with thumbnails, and label maps on request."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace

import torch

from facelab.cameras.sphere import FOV
from facelab.data.batch import Batch
from facelab.data.lmdb_dataset import AUTO, NONE
from facelab.data.loader import ImageStream
from facelab.data.samplers import ResumableSampler
from facelab.data.thumbnails import WithThumbnails, open_pictures, thumbnails_of
from facelab.errors import UserError
from facelab.ranges import check_ranges
from facelab.training.protocol import DataSource

BYTES_PER_PIXEL = 4  # picture and label map of a head in the pool
LARGEST_SHARE = 0.5  # of the machine's memory that a pool may take


@dataclass(frozen=True)
class PicturesConfig:
    """Where training pictures come from."""

    path: str = ""  # LMDB or folder of pictures; empty = synthetic heads made on the fly
    masks: str = AUTO  # folder of label maps; auto = those that lie with the pictures (CNeRF)
    mirror: bool = True  # mirror half of the samples
    cache: str = "auto"  # none, memory, auto, or a folder for memory-mapped arrays (folders only)
    heads: int = 20_000  # synthetic heads when path is empty
    heads_azimuth_std: float = 0.3  # of their cameras around the frontal view, radians
    heads_elevation_std: float = 0.15
    heads_background: str = "grey"  # black, grey or white: behind them

    def __post_init__(self) -> None:
        check_ranges("data", self, counts=("heads",), not_negative=("heads_azimuth_std", "heads_elevation_std"))


def picture_source(
    config: PicturesConfig, size: int, thumbnail: int, seed: int, *, label_maps: bool = False, fov: float = FOV
) -> DataSource:
    """The endless stream of training samples: image (N, 3, size, size), thumbnail, and label_map (N, size, size).

    Args:
        config: where from.
        size: pixels of pictures and label maps.
        thumbnail: pixels of the thumbnails, at most ``size``.
        seed: of the order, the mirroring and the heads.
        label_maps: whether the samples have label maps (CNeRF).
        fov: of the cameras of synthetic heads, degrees, full.

    Raises:
        UserError: what is wrong with the set, in one line.
    """
    if config.path:
        return ImageStream(pictures_at(config, size, thumbnail, label_maps), seed)  # type: ignore[arg-type]
    stds = (config.heads_azimuth_std, config.heads_elevation_std)
    return HeadPictures(config.heads, size, thumbnail, seed, *stds, fov, label_maps, config.heads_background)


@functools.lru_cache(maxsize=2)
def pictures_at(config: PicturesConfig, size: int, thumbnail: int, label_maps: bool = False) -> WithThumbnails:
    """The data set of ``config.path``, opened once in a process; its ``validate`` is the check before training.

    UserError as :func:`facelab.data.thumbnails.open_pictures`.
    """
    masks = config.masks if label_maps else NONE
    return open_pictures(config.path, size, thumbnail, masks=masks, flips=config.mirror, cache=config.cache)


class HeadPictures:
    """Synthetic heads, drawn once, seen as StyleSDF sees faces: camera on the unit sphere, pixel centres at i + 0.5.

    Sample k of the stream is a pure function of (seed, k). Azimuth and elevation are normal, cut at four deviations.

    Args:
        count: heads in the pool.
        size: pixels of pictures and label maps.
        thumbnail: pixels of the thumbnails.
        seed: of the heads and of their order.
        azimuth_std, elevation_std: of the camera around the frontal view, radians.
        fov: full field of view in degrees.
        label_maps: give label maps (19 classes) too.
        background: behind the heads; on a colour of hair, clothes or skin a field cannot tell them from nothing.

    Raises:
        UserError: fewer than one head, thumbnails larger than the pictures, or a pool too large for the memory.
    """

    def __init__(
        self,
        count: int,
        size: int,
        thumbnail: int,
        seed: int,
        azimuth_std: float = 0.3,
        elevation_std: float = 0.15,
        fov: float = FOV,
        label_maps: bool = False,
        background: str = "grey",
    ) -> None:
        if not 1 <= thumbnail <= size:
            raise UserError(f"thumbnails must be 1 to {size} px as the pictures are, got {thumbnail}")
        pool = head_pool(count, size, seed, azimuth_std, elevation_std, fov, background)
        self.pool = pool if label_maps else replace(pool, label_map=None)
        self.thumbnail = thumbnail
        self.sampler = ResumableSampler(count, seed)

    def __len__(self) -> int:
        return len(self.pool)

    def batch(self, first_image: int, count: int) -> Batch:
        """Samples ``first_image`` .. ``first_image + count - 1`` of the stream, on the CPU, with their cameras."""
        batch = self.pool.select(torch.tensor(self.sampler.indices_for_chunk(first_image, count)))
        assert batch.image is not None
        return replace(batch, thumbnail=thumbnails_of(batch.image, self.thumbnail))


@functools.lru_cache(maxsize=2)
def head_pool(
    count: int, size: int, seed: int, azimuth_std: float, elevation_std: float, fov: float, background: str
) -> Batch:
    """Synthetic heads as one batch: image, label_map, camera; drawn once in a process.

    UserError for fewer than one head, or for more than fit into half of the machine's memory.
    """
    from facelab.data.synthetic_pool import SyntheticPool

    limit = _memory() * LARGEST_SHARE
    if count * size**2 * BYTES_PER_PIXEL > limit:
        fits = int(limit // (size**2 * BYTES_PER_PIXEL))
        raise UserError(
            f"data.heads: {count} synthetic heads of {size} px do not fit into half of this machine's memory; expected at "
            f"most {fits}"
        )
    pool = SyntheticPool(count, size, seed, azimuth_std, elevation_std, fov, grid="centers", background=background)
    return pool.batch_of_all


def _memory() -> float:
    """Bytes of physical memory; infinite where the system does not tell."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
