# SPDX-License-Identifier: Apache-2.0
"""Pictures out of an LMDB, with their masks from a folder beside it (StyleSDF, CNeRF)."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np

from facelab.data import reading
from facelab.data.cache import AUTO_LIMIT, PreparedCache, Sample
from facelab.data.classes import NUM_CLASSES
from facelab.data.eg3d_store import NamedBytes
from facelab.data.image_folder import DatasetReport, PictureSet, _Entry
from facelab.data.lmdb_store import LmdbStore
from facelab.data.transforms import AreaChain
from facelab.errors import UserError

AUTO, NONE = "auto", "none"
_MASK = re.compile(r"(\d{5,})\.(npy|png)")
_WORD = "lmdb"


def mask_folders(root: str | Path, size: int) -> list[Path]:
    """Where masks of an LMDB may lie, the place that our conversion uses first.

    The original replaces every ``lmdb`` in the path by ``mask_{size}`` and looks into the LMDB itself if there is
    none. We replace it in the last part of the path, and use a folder ``mask_{size}`` inside the LMDB if there is none.

    >>> [str(p) for p in mask_folders("data/ffhq_lmdb", 64)]
    ['data/ffhq_mask_64']
    >>> [str(p) for p in mask_folders("lmdb/ffhq_lmdb", 64)], [str(p) for p in mask_folders("data/ffhq", 64)]
    (['lmdb/ffhq_mask_64', 'mask_64/ffhq_mask_64'], ['data/ffhq/mask_64'])
    """
    root, word = Path(root), f"mask_{size}"
    found = [root.with_name(root.name.replace(_WORD, word)) if _WORD in root.name else root / word]
    original = Path(str(root).replace(_WORD, word))
    if original != root and original not in found:
        found.append(original)
    return found


class LmdbPictures(PictureSet):
    """The entries of one size of an LMDB as training samples.

    Reads with :class:`facelab.data.loader.ImageStream` and ``PrefetchStream`` like every other set.

    Args:
        root: folder of the LMDB.
        image_size: pixels; the LMDB must have entries of this size.
        masks: ``"none"``, ``"auto"`` (the folders of :func:`mask_folders`), or a folder of ``{index:05d}.npy`` or
            ``.png`` label maps, square and at least as large as the pictures.
        flips: mirror half of the samples in training; left and right classes change places.
        cache: see :class:`PictureSet`; a folder is not used, because the LMDB is one.

    Raises:
        UserError: no LMDB there, not finished, no entries of this size, no masks, not as many masks as pictures.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        *,
        masks: str | Path = NONE,
        flips: bool = True,
        cache: str | Path = "auto",
    ) -> None:
        self.store = LmdbStore(root)
        sizes = self.store.sizes()
        if image_size not in sizes:
            stored = ", ".join(map(str, sizes)) or "none"
            raise UserError(
                f"{root}: no pictures of {image_size} px in this LMDB, it has {stored}; train at one of these, or convert "
                f"the pictures again with prepare_data.py lmdb --size {','.join(map(str, sorted({*sizes, image_size})))}"
            )
        self.mask_source = masks
        names = [Path(self.store.name_of(image_size, i)) for i in range(len(self.store))]
        mask_paths = None if str(masks) == NONE else self._mask_paths(image_size)
        super().__init__(names, mask_paths, AreaChain(image_size, 1.0, False, flips), "black", cache)

    def with_image_size(self, image_size: int) -> LmdbPictures:
        """The entries of another size, with the masks of that size. UserError if there are none."""
        if image_size == self.image_size:
            return self
        return LmdbPictures(
            self.store.root, image_size, masks=self.mask_source, flips=self.chain.flips, cache=self.cache_kind
        )

    def read_label_map(self, index: int) -> np.ndarray:
        """The stored mask ``index``, (H, W) uint8. UserError if damaged; ValueError without masks."""
        if self.masks is None:
            raise ValueError("this data set was opened without masks")
        mask, _ = reading.read_mask(self.masks[index])
        height, width = mask.shape
        if height != width or height < self.image_size:
            raise UserError(
                f"{self.masks[index]}: the mask is {width}x{height}, expected a square of at least {self.image_size} px as "
                f"its picture {self.images[index].name}; make masks of this size"
            )
        return mask

    # --- reading

    def _mask_paths(self, size: int) -> list[Path]:
        places = [Path(self.mask_source)] if str(self.mask_source) != AUTO else mask_folders(self.store.root, size)
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            where = " or ".join(map(str, places))
            raise UserError(
                f"{self.store.root}: no masks of {size} px at {where}; expected a folder of 00000.npy ...; make them with "
                "prepare_data.py lmdb --masks or --parser, or name their folder"
            )
        files: dict[int, str] = {}
        for entry in os.scandir(folder):
            match = _MASK.fullmatch(entry.name)
            if match and int(match[1]) in files:
                raise UserError(
                    f"{folder}: picture {match[1]} has a .npy and a .png mask; expected one, remove one kind"
                )
            if match:
                files[int(match[1])] = entry.name
        length = len(self.store)
        missing = next((i for i in range(length) if i not in files), None)
        if len(files) != length or missing is not None:
            what = f"first without: {missing:05d}.npy" if missing is not None else f"{length:05d} has no picture"
            raise UserError(
                f"{folder}: {len(files)} masks but {length} pictures in {self.store.root}, expected as many; {what}; "
                "make the masks again or name another folder"
            )
        return [folder / files[i] for i in range(length)]

    def _picture(self, index: int, decode: bool = True) -> Any:
        """The RGB picture, or with ``decode`` off only whether it seems whole. UserError if it is not what it should be."""
        name, data = str(self.images[index]), self.store.read(self.image_size, index)
        size = reading.read_size(cast(Any, NamedBytes(data, name)))
        if size != (self.image_size, self.image_size):
            raise UserError(
                f"{name}: expected {self.image_size}x{self.image_size} pixels as its key says, got {size[0]}x{size[1]}; "
                "convert the pictures again"
            )
        if decode or (data.startswith(b"\x89PNG") and b"IEND" not in data[-64:]):
            return reading.read_image(cast(Any, NamedBytes(data, name)), self.alpha)
        return None

    def _prepare(self, index: int) -> Sample:
        image = self._picture(index)
        return self.chain.prepare(image, None if self.masks is None else self.read_label_map(index))

    def _inspect_one(self, index: int, decode: bool) -> _Entry:
        entry = _Entry(index, (self.image_size, self.image_size))
        try:
            self._picture(index, decode)
            if decode and self.masks is not None:
                entry.counts = np.bincount(self.read_label_map(index).ravel(), minlength=NUM_CLASSES)
            entry.decoded = decode
        except UserError as error:
            entry.problem = str(error)
        return entry

    def _make_cache(self) -> PreparedCache | None:
        side, masks = self.chain.prepared_size, self.masks is not None
        if self.cache_kind == "none":
            return None
        if self.cache_kind in ("memory", "auto"):
            fits = PreparedCache.bytes_needed(len(self), side, masks) <= AUTO_LIMIT
            return PreparedCache.in_memory(len(self), side, masks) if fits or self.cache_kind == "memory" else None
        warnings.warn(f"cache {self.cache_kind}: an LMDB is read without a cache folder", stacklevel=3)
        return None


def inspect_lmdb(
    root: str | Path, masks: str | Path = AUTO, fast: bool = False
) -> tuple[list[str], list[str], DatasetReport]:
    """Look at all sizes of an LMDB -> (problems, lines about what is there, report of the largest size, with masks if any).

    Args:
        masks: as of :class:`LmdbPictures`; ``"auto"`` looks at masks only where there are some, a folder only at the
            sizes for which its masks are large enough.
        fast: of large sets, decode a sample of 64 only.

    Raises:
        UserError: it cannot be opened, or holds no pictures.
    """
    store = LmdbStore(root)
    sizes = store.sizes()
    if not sizes:
        raise UserError(f"{root}: no pictures in this LMDB: expected keys such as 64-00000; make the set again")
    problems: list[str] = []
    lines = [f"{len(store)} pictures, sizes {', '.join(map(str, sizes))} px"]
    reports: list[DatasetReport] = []
    for size in sizes:
        extra = [i for i in store.indices(size) if i >= len(store)]
        if extra:
            lines.append(f"note: {len(extra)} entries of {size} px lie beyond the length and are not used")
        kind, aside = masks, ""
        if str(masks) == AUTO and not any(place.is_dir() for place in mask_folders(root, size)):
            kind = NONE
        elif str(masks) != AUTO and size > _first_side(Path(masks)):
            kind, aside = NONE, f" (those in {masks} are smaller)"
        try:
            pictures = LmdbPictures(root, size, masks=kind, cache="none")
        except UserError as error:
            problems.append(str(error))
            pictures = LmdbPictures(root, size, cache="none")
        found, report = pictures.inspect(fast)
        problems += found
        reports.append(report)
        where = f"no masks{aside}" if pictures.masks is None else f"masks in {pictures.masks[0].parent}"
        lines.append(f"{size} px: {report.decoded} decoded and sound, {where}")
    return problems, lines, max(reversed(reports), key=lambda report: sum(report.class_pixels or ()) > 0)


def _first_side(folder: Path) -> int:
    """Height of the first label map of a folder; 0 if there is none."""
    first = min((p for p in folder.iterdir() if _MASK.fullmatch(p.name)), default=None) if folder.is_dir() else None
    return 0 if first is None else reading.read_size(first)[1]
