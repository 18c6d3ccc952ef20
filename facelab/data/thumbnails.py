# SPDX-License-Identifier: Apache-2.0
"""Training pictures with thumbnails, as StyleSDF and CNeRF read them: from an LMDB or from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from facelab.data.batch import Batch
from facelab.data.image_folder import DatasetReport, PictureSet
from facelab.data.lmdb_dataset import AUTO, NONE, LmdbPictures
from facelab.data.lmdb_store import is_lmdb
from facelab.data.pairing import find_source, masks_by_name
from facelab.data.transforms import AreaChain, Chain
from facelab.errors import UserError


def thumbnails_of(images: Tensor, size: int) -> Tensor:
    """(N, 3, H, W) uint8 on the CPU -> (N, 3, size, size) uint8 by Pillow's Hamming filter, as the originals do.

    Pictures of that size are returned as they are. ValueError if they are smaller.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (N, 3, H, W), got {tuple(images.shape)} {images.dtype}")
    if min(images.shape[2:]) < size or size < 1:
        raise ValueError(
            f"a thumbnail of {size} px needs a picture of at least that size, got {tuple(images.shape[2:])}"
        )
    if images.shape[2:] == (size, size):
        return images
    out = np.empty((len(images), size, size, 3), np.uint8)
    for row, image in zip(out, images, strict=True):
        picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        row[:] = np.asarray(picture.resize((size, size), Image.Resampling.HAMMING))
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


class WithThumbnails:
    """A data set whose batches carry thumbnails, made after the mirroring.

    What :class:`facelab.data.loader.ImageStream` asks for is passed on to the data set.

    Args:
        dataset: pictures, with or without masks.
        size: side of the thumbnails in pixels, at most that of the pictures.

    Raises:
        ValueError: the thumbnails would be larger than the pictures.
    """

    def __init__(self, dataset: PictureSet, size: int) -> None:
        if not 1 <= size <= dataset.image_size:
            raise ValueError(f"thumbnails must be 1 to {dataset.image_size} px as the pictures are, got {size}")
        self.dataset, self.size = dataset, size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Batch:
        """Sample ``index``, not mirrored."""
        return self.item(index)

    @property
    def chain(self) -> Chain:
        """Of the pictures."""
        return self.dataset.chain

    @property
    def image_size(self) -> int:
        return self.dataset.image_size

    def with_image_size(self, image_size: int) -> WithThumbnails:
        """The same set at another size; thumbnails stay."""
        return WithThumbnails(self.dataset.with_image_size(image_size), self.size)

    def item(self, index: int, flip: bool = False) -> Batch:
        """Sample ``index`` as a batch of one, mirrored on request. UserError on a damaged file."""
        return self.items([index], [flip])

    def items(self, indices: Sequence[int], flips: Sequence[bool] | None = None) -> Batch:
        """The samples of ``indices``: image (N, 3, S, S), thumbnail (N, 3, s, s), label_map (N, S, S) with masks."""
        batch = self.dataset.items(indices, flips)
        assert batch.image is not None
        return replace(batch, thumbnail=thumbnails_of(batch.image, self.size))

    def validate(self, fast: bool = True) -> DatasetReport:
        """Check the files before training; see :meth:`PictureSet.validate`."""
        return self.dataset.validate(fast)

    def inspect(self, fast: bool = True) -> tuple[list[str], DatasetReport]:
        """Every problem and the report; see :meth:`PictureSet.inspect`."""
        return self.dataset.inspect(fast)


def open_pictures(
    path: str | Path,
    image_size: int,
    thumbnail: int = 64,
    *,
    masks: str | Path = NONE,
    flips: bool = True,
    cache: str | Path = "auto",
) -> WithThumbnails:
    """Whole square pictures with thumbnails from an LMDB or a folder with its subfolders.

    Args:
        path: an LMDB (see :class:`LmdbPictures`), or a folder of pictures (see
            :func:`facelab.data.pairing.find_source`), whose middle squares are averaged down to ``image_size``.
        image_size: side of the pictures and label maps in pixels; an LMDB must hold this size.
        thumbnail: side of the thumbnails in pixels, at most ``image_size``.
        masks: ``"none"``; ``"auto"``: the masks that lie with the set, required; or their folder (PNG or ``.npy``,
            19 classes; matched by number for an LMDB, by name for a folder).
        flips: mirror half of the samples in training; left and right classes change places.
        cache: see :class:`PictureSet`.

    Raises:
        UserError: what is wrong with the set, in one line.
    """
    if not 1 <= thumbnail <= image_size:
        raise UserError(f"thumbnails must be 1 to {image_size} px as the pictures are, got {thumbnail}")
    if is_lmdb(path):
        pictures: PictureSet = LmdbPictures(path, image_size, masks=masks, flips=flips, cache=cache)
        return WithThumbnails(pictures, thumbnail)
    source = find_source(path)
    folder = source.masks if str(masks) == AUTO else None if str(masks) == NONE else Path(masks)
    if folder is None and str(masks) == AUTO:
        raise UserError(
            f"{path}: no masks lie with these pictures; expected images/ with masks/, or N_mask.png beside N.jpg; make "
            "masks with prepare_data.py masks and name their folder"
        )
    paths = None if folder is None else _all_masks(source.pictures, source.root, folder)
    chain = AreaChain(image_size, 1.0, False, flips)
    return WithThumbnails(PictureSet(source.pictures, paths, chain, "black", cache), thumbnail)


def _all_masks(pictures: Sequence[Path], root: Path, folder: Path) -> list[Path]:
    found = masks_by_name(pictures, root, folder)
    lonely = [picture for picture, mask in zip(pictures, found, strict=True) if mask is None]
    if lonely:
        raise UserError(
            f"{folder}: {len(lonely)} of {len(pictures)} pictures have no mask here, first {lonely[0].name}; expected "
            f"{lonely[0].stem}.png; make the masks or remove the pictures"
        )
    return [mask for mask in found if mask is not None]
