# SPDX-License-Identifier: Apache-2.0
"""Pictures with cameras, as EG3D trains on them: a zip or folder with 25-number labels in ``dataset.json``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from facelab.cameras.camera import Camera
from facelab.data import reading
from facelab.data.batch import Batch
from facelab.data.cache import AUTO_LIMIT, PreparedCache, Sample
from facelab.data.classes import NUM_CLASSES
from facelab.data.eg3d_labels import mirror_label
from facelab.data.eg3d_store import (
    FolderStore,
    NamedBytes,
    Store,
    ZipStore,
    open_store,
    read_description,
    read_labels,
    split_names,
)
from facelab.data.image_folder import PictureSet, _Entry
from facelab.data.transforms import AreaChain
from facelab.errors import UserError

LabelUse = Literal["required", "none"]


class Eg3dDataset(PictureSet):
    """Square pictures with the camera of each, and masks where there are some.

    Files with a picture ending, sorted by relative name, are the samples. Reads with
    :class:`facelab.data.loader.ImageStream` and ``PrefetchStream`` like every other set: its order is
    a pure function of seed and position, so runs resume exactly.

    Args:
        root: a zip, a folder, or a folder of zips.
        image_size: side of the samples; None takes that of the first picture.
        labels: ``"none"`` reads no labels and gives batches without cameras.
        mirror: append the mirror image of every sample, its camera mirrored too (the set is twice as long).
        flips: mirror half of the samples at random in training instead; the camera follows.
        masks: read the masks of a set that has one for every picture.
        max_size: use that many random pictures only (chosen by ``seed``; order and ``mirror`` as always).
        seed: of ``max_size``.
        alpha: ground under transparent pixels, ``"black"`` or ``"white"``.
        cache: see :class:`PictureSet`.

    Raises:
        UserError: no set there, no pictures, a picture without a label, a label that is no camera.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int | None = None,
        *,
        labels: LabelUse = "required",
        mirror: bool = False,
        flips: bool = False,
        masks: bool = False,
        max_size: int | None = None,
        seed: int = 0,
        alpha: str = "black",
        cache: str | Path = "auto",
    ) -> None:
        if labels not in ("required", "none"):
            raise ValueError(f"labels must be 'required' or 'none', got {labels!r}")
        if mirror and flips:
            raise ValueError("mirror appends every mirror image already; expected mirror or flips, got both")
        self.store: Store = open_store(root)
        self.mirror = mirror
        files = self.store.names()
        names, partners = split_names(files)
        if not names:
            kinds = ", ".join(reading.IMAGE_SUFFIXES)
            raise UserError(f"no pictures in {root}: expected files ending in {kinds}, got none; check the path")
        names = _subset(names, max_size, seed)
        self.mask_names = _all_masks(names, partners, self.store.root) if masks else None
        self._labels: Tensor | None = None
        if labels == "required":
            self._labels = read_labels(read_description(self.store, files), names, self.store.root)
            if self._labels is None:
                raise UserError(
                    f"{self.store.root}: the set has no camera labels, expected dataset.json with 25 numbers for each "
                    "picture; make them with scripts/prepare_data.py eg3d or train without labels"
                )
        self.names = tuple(names)
        size = image_size or self._read_size(names[0])[0]
        paths = [self.store.root / name for name in names]
        mask_paths = None if self.mask_names is None else [self.store.root / n for n in self.mask_names]
        super().__init__(paths, mask_paths, AreaChain(size, 1.0, False, flips), alpha, cache)

    def __len__(self) -> int:
        return len(self.names) * (2 if self.mirror else 1)

    @property
    def labels(self) -> Tensor | None:
        """(len(self), 25) float32, mirrored ones last, or None: what cameras to generate from are drawn from."""
        if self._labels is None or not self.mirror:
            return self._labels
        return torch.cat([self._labels, mirror_label(self._labels)])

    def label_std(self) -> Tensor:
        """(25,) population standard deviation of the labels as stored, without mirror images (EG3D's noise scale).

        ValueError for a set without labels.
        """
        return self._stored_labels().double().std(dim=0, correction=0).float()

    def cameras(self, indices: Sequence[int], flips: Sequence[bool] | None = None) -> Camera:
        """The cameras of some samples without reading pictures. ValueError for a set without labels."""
        rows, mirrored = self._locate(indices, flips)
        label = self._stored_labels()[rows]
        return Camera.from_label(torch.where(torch.tensor(mirrored)[:, None], mirror_label(label), label))

    def items(self, indices: Sequence[int], flips: Sequence[bool] | None = None) -> Batch:
        """Samples as one batch: image, label_map where masks are read, and the camera, mirrored with its picture."""
        rows, mirrored = self._locate(indices, flips)
        batch = super().items(rows, mirrored)
        return batch if self._labels is None else replace(batch, camera=self.cameras(rows, mirrored))

    def prepared(self, index: int) -> Sample:
        """Picture and mask of stored sample ``index`` (a mirror image is made from its original)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)}")
        index = index % len(self) % len(self.names)
        if self._cache is None:
            return self._prepare(index)
        return self._cache.get(index, lambda: self._prepare(index))

    # --- reading

    def read_picture(self, index: int) -> Image.Image:
        """The stored picture ``index``, RGB, at its own size. UserError if it is damaged."""
        return reading.read_image(cast(Any, self._file(self.names[index])), self.alpha)

    def read_mask(self, index: int) -> np.ndarray:
        """The mask of stored picture ``index``, (H, W) uint8. UserError if damaged; ValueError without masks."""
        if self.mask_names is None:
            raise ValueError("this data set was opened without masks")
        return reading.read_mask(cast(Any, self._file(self.mask_names[index])))[0]

    def _file(self, name: str) -> NamedBytes:
        return NamedBytes(self.store.read(name), str(self.store.root / name))

    def _read_size(self, name: str) -> tuple[int, int]:
        return reading.read_size(cast(Any, self._file(name)))

    def _stored_labels(self) -> Tensor:
        if self._labels is None:
            raise ValueError("this data set was opened without labels")
        return self._labels

    def _locate(self, indices: Sequence[int], flips: Sequence[bool] | None) -> tuple[list[int], list[bool]]:
        """Sample numbers -> (stored pictures, whether each is mirrored)."""
        flips = [False] * len(indices) if flips is None else flips
        stored = len(self.names)
        for index in indices:
            if not -len(self) <= index < len(self):
                raise IndexError(f"index {index} of a data set of {len(self)}")
        places = [index % len(self) for index in indices]
        mirrored = [bool(f) != (place >= stored) for place, f in zip(places, flips, strict=True)]
        return [place % stored for place in places], mirrored

    def _prepare(self, index: int) -> Sample:
        image = self.read_picture(index)
        _check_square(image.size, self.images[index])
        if self._too_small(image.size):
            self._warn_small(index, image.size)
        if self.masks is None:
            return self.chain.prepare(image, None)
        mask = self.read_mask(index)
        _check_square((mask.shape[1], mask.shape[0]), self.masks[index])
        return self.chain.prepare(image, mask)

    def _inspect_one(self, index: int, decode: bool) -> _Entry:
        entry = _Entry(index)
        try:
            file = self._file(self.names[index])
            entry.size = reading.read_size(cast(Any, file))
            _check_square(entry.size, self.images[index])
            cut = isinstance(self.store, FolderStore) and not reading.looks_complete(self.images[index])
            if decode or cut:
                reading.read_image(cast(Any, file), self.alpha)
                if self.masks is not None:
                    mask = self.read_mask(index)
                    _check_square((mask.shape[1], mask.shape[0]), self.masks[index])
                    entry.counts = np.bincount(mask.ravel(), minlength=NUM_CLASSES)
                entry.decoded = True
        except UserError as error:
            entry.problem = str(error)
        return entry

    def _walk(self, step: int) -> Iterator[_Entry]:
        with ThreadPoolExecutor(8) as pool:
            yield from pool.map(lambda i: self._inspect_one(i, decode=i % step == 0), range(len(self.names)))

    def _make_cache(self) -> PreparedCache | None:
        side, masks, count = self.chain.prepared_size, self.masks is not None, len(self.names)
        if self.cache_kind == "none":
            return None
        if self.cache_kind in ("memory", "auto"):
            fits = PreparedCache.bytes_needed(count, side, masks) <= AUTO_LIMIT
            return PreparedCache.in_memory(count, side, masks) if fits or self.cache_kind == "memory" else None
        if isinstance(self.store, ZipStore):  # members have no file times by which a stale cache would be known
            warnings.warn(
                f"cache {self.cache_kind}: a zip is read without a cache folder; unpack it to use one", stacklevel=3
            )
            return None
        return super()._make_cache()


def _check_square(size: tuple[int, int], path: Path) -> None:
    if size[0] != size[1]:
        raise UserError(
            f"{path}: expected a square picture, because its camera has one field of view, got {size[0]}x{size[1]}; "
            "crop it and make the set with scripts/prepare_data.py eg3d"
        )


def _subset(names: list[str], max_size: int | None, seed: int) -> list[str]:
    """``max_size`` random names in their old order, the choice of the original for the same seed."""
    if max_size is None or len(names) <= max_size:
        return names
    if max_size < 1:
        raise ValueError(f"max_size must be at least 1 picture, got {max_size}")
    order = np.arange(len(names))
    np.random.RandomState(seed % (1 << 31)).shuffle(order)
    return [names[i] for i in np.sort(order[:max_size])]


def _all_masks(names: list[str], partners: dict[str, str], root: Path) -> list[str]:
    lonely = [name for name in names if name not in partners]
    if lonely:
        raise UserError(
            f"{root}: {lonely[0]} has no mask ({len(lonely)} of {len(names)} pictures have none); expected PNG files "
            "of the same names in masks/ beside images/"
        )
    return [partners[name] for name in names]
