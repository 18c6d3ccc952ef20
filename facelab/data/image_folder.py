# SPDX-License-Identifier: Apache-2.0
"""Map-style data sets of picture files: the common part, and folders of pictures without masks (pi-GAN)."""

from __future__ import annotations

import copy
import glob
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from facelab.data import reading
from facelab.data.batch import Batch
from facelab.data.cache import AUTO_LIMIT, PreparedCache, Sample
from facelab.data.classes import NUM_CLASSES
from facelab.data.transforms import AreaChain, Chain, PiganCelebaReference, PiganResizeReference
from facelab.errors import UserError, nearest

CHAINS = ("celeba", "cats", "carla")
FAST_LIMIT = 256  # a fast check decodes everything up to this many samples ...
FAST_DECODES = 64  # ... and this many, evenly spread, of a larger set


@dataclass(frozen=True)
class DatasetReport:
    """What a check found.

    Attributes:
        samples: pictures (or pairs) in the set.
        decoded: how many of them were decoded completely.
        smallest: (width, height) of the picture with the shortest side.
        class_pixels: pixels per class over the decoded masks, or None without masks.
        class_images: decoded masks in which each class occurs, or None.
        notes: things worth knowing that are no errors.
    """

    samples: int
    decoded: int
    smallest: tuple[int, int]
    class_pixels: tuple[int, ...] | None = None
    class_images: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()


class PictureSet:
    """Pictures, optionally with masks, as training samples.

    Args:
        images: picture files.
        masks: the mask of each picture, or None.
        chain: how they become samples.
        alpha: ground under transparent pixels, ``"black"`` or ``"white"``.
        cache: ``"none"``, ``"memory"``, ``"auto"`` (memory up to 2 GiB, else none), or a folder
            for memory-mapped arrays that processes share and later runs find again.
    """

    def __init__(
        self,
        images: Sequence[Path],
        masks: Sequence[Path] | None,
        chain: Chain,
        alpha: str = "black",
        cache: str | Path = "auto",
    ) -> None:
        if masks is not None and len(masks) != len(images):
            raise ValueError(f"every picture needs a mask, got {len(images)} pictures and {len(masks)} masks")
        if alpha not in reading.ALPHA_COLOURS:
            raise ValueError(f"alpha must be one of {sorted(reading.ALPHA_COLOURS)}, got {alpha!r}")
        self.images, self.masks = tuple(images), None if masks is None else tuple(masks)
        self.chain, self.alpha, self.cache_kind = chain, alpha, cache
        self._notes: tuple[str, ...] = ()
        self._warned: set[str] = set()
        self._cache = self._make_cache()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        """Sample ``index``, not mirrored."""
        return self.item(index)

    @property
    def image_size(self) -> int:
        return self.chain.image_size

    def with_image_size(self, image_size: int) -> PictureSet:
        """The same set at another size (a later stage of training); files are not listed again."""
        other = copy.copy(self)
        other.chain = self.chain.resized(image_size)
        if other.chain.key != self.chain.key:
            other._cache = other._make_cache()
        return other

    def item(self, index: int, flip: bool = False) -> Batch:
        """Sample ``index`` as a batch of one, mirrored on request. UserError on a damaged file."""
        return self.items([index], [flip])

    def items(self, indices: Sequence[int], flips: Sequence[bool] | None = None) -> Batch:
        """The samples of ``indices`` as one batch: image uint8 (N, 3, S, S), label_map uint8 (N, S, S)."""
        flips = [False] * len(indices) if flips is None else flips
        samples = [self.chain.finish(*self.prepared(i), flip) for i, flip in zip(indices, flips, strict=True)]
        images = np.stack([image.transpose(2, 0, 1) for image, _ in samples])
        if self.masks is None:
            return Batch(image=torch.from_numpy(images))
        masks = np.stack([mask for _, mask in samples if mask is not None])
        return Batch(torch.from_numpy(images), torch.from_numpy(masks))

    def prepared(self, index: int) -> Sample:
        """Picture and mask after the chain's first step, from the cache if there is one."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)}")
        index %= len(self)
        if self._cache is None:
            return self._prepare(index)
        return self._cache.get(index, lambda: self._prepare(index))

    def validate(self, fast: bool = True) -> DatasetReport:
        """Check the files before training.

        Args:
            fast: of sets larger than 256 look at every header and file end, but decode only 64.

        Raises:
            UserError: the first problem found, in one line.
        """
        problems, report = self.inspect(fast)
        if problems:
            raise UserError(problems[0])
        return report

    def inspect(self, fast: bool = True) -> tuple[list[str], DatasetReport]:
        """-> (every problem found, one line each; the report over the samples that are sound)."""
        step = max(1, len(self) // FAST_DECODES) if fast and len(self) > FAST_LIMIT else 1
        found = list(self._walk(step))
        problems = [entry.problem for entry in found if entry.problem]
        sound = [entry for entry in found if not entry.problem]
        counts = [entry.counts for entry in sound if entry.counts is not None]
        table = np.array(counts) if counts else np.zeros((0, NUM_CLASSES), int)
        smallest = min((entry.size for entry in sound), key=min, default=(0, 0))
        notes = list(self._notes)
        translated = sum(entry.translated for entry in sound)
        if translated:
            notes.append(f"{translated} masks are colour pictures of the palette; they are read as class numbers")
        small = [e for e in sound if self._too_small(e.size)]
        if small:
            notes.append(self._small_note(small[0].index, small[0].size))
            self._warn_small(small[0].index, small[0].size)
        return problems, DatasetReport(
            samples=len(self),
            decoded=sum(entry.decoded for entry in sound),
            smallest=smallest,
            class_pixels=None if self.masks is None else tuple(int(v) for v in table.sum(0)),
            class_images=None if self.masks is None else tuple(int(v) for v in (table > 0).sum(0)),
            notes=tuple(notes),
        )

    def _walk(self, step: int) -> Iterator[_Entry]:
        with ThreadPoolExecutor(8) as pool:
            yield from pool.map(lambda i: self._inspect_one(i, decode=i % step == 0), range(len(self)))

    def _inspect_one(self, index: int, decode: bool) -> _Entry:
        image_path = self.images[index]
        mask_path = None if self.masks is None else self.masks[index]
        entry = _Entry(index)
        try:
            entry.size = reading.read_size(image_path)
            if mask_path is not None:
                mask_size = reading.read_size(mask_path)
                entry.problem = reading.aspect_problem(image_path, entry.size, mask_path, mask_size)
            paths = [image_path] if mask_path is None else [image_path, mask_path]
            if decode or not all(reading.looks_complete(p) for p in paths):
                reading.read_image(image_path, self.alpha)
                if mask_path is not None:
                    mask, entry.translated = reading.read_mask(mask_path)
                    entry.counts = np.bincount(mask.ravel(), minlength=NUM_CLASSES)
                entry.decoded = True
        except UserError as error:
            entry.problem = str(error)
        return entry

    def _prepare(self, index: int) -> Sample:
        image = reading.read_image(self.images[index], self.alpha)
        if self._too_small(image.size):
            self._warn_small(index, image.size)
        if self.masks is None:
            return self.chain.prepare(image, None)
        mask, _ = reading.read_mask(self.masks[index])
        problem = reading.aspect_problem(self.images[index], image.size, self.masks[index], mask.shape[::-1])
        if problem:
            raise UserError(problem)
        return self.chain.prepare(image, mask)

    def _make_cache(self) -> PreparedCache | None:
        side, masks = self.chain.prepared_size, self.masks is not None
        if self.cache_kind == "none":
            return None
        if self.cache_kind in ("memory", "auto"):
            fits = PreparedCache.bytes_needed(len(self), side, masks) <= AUTO_LIMIT
            return PreparedCache.in_memory(len(self), side, masks) if fits or self.cache_kind == "memory" else None
        files = [*self.images, *(self.masks or ())]
        return PreparedCache.on_disk(Path(self.cache_kind), files, f"{self.chain.key}/{self.alpha}", side, masks)

    def _too_small(self, size: tuple[int, int]) -> bool:
        return min(size) * getattr(self.chain, "crop", 1.0) < self.image_size

    def _small_note(self, index: int, size: tuple[int, int]) -> str:
        name = self.images[index].name
        return f"some pictures are smaller than {self.image_size} px and are enlarged ({name}: {size[0]}x{size[1]})"

    def _warn_small(self, index: int, size: tuple[int, int]) -> None:
        if "small" not in self._warned:
            self._warned.add("small")
            warnings.warn(self._small_note(index, size), stacklevel=3)


@dataclass
class _Entry:
    """What was found about one sample."""

    index: int
    size: tuple[int, int] = (0, 0)
    problem: str = ""
    decoded: bool = False
    translated: bool = False
    counts: np.ndarray | None = None


class ImageFolder(PictureSet):
    """Pictures without masks: a folder (searched with its subfolders) or a glob pattern.

    Args:
        path: folder or pattern such as ``"data/img_align_celeba/*.jpg"``.
        image_size: side of the samples in pixels.
        chain: pi-GAN's framing: ``"celeba"`` (middle 0.8 of the short side, mirrored),
            ``"cats"`` (whole short side, mirrored) or ``"carla"`` (whole short side, not mirrored,
            transparent pixels white).
        crop: side of the middle square over the picture's short side; None takes the chain's.
        reference: the original's resizing (nearest pixels; Cats and Carla squeeze to a square); ``crop`` does not apply.
        alpha: ground under transparent pixels; None takes the chain's.
        cache: see :class:`PictureSet`.

    Raises:
        UserError: no such folder, no pictures, unknown chain.
    """

    def __init__(
        self,
        path: str | Path,
        image_size: int,
        *,
        chain: str = "celeba",
        crop: float | None = None,
        reference: bool = False,
        alpha: str | None = None,
        cache: str | Path = "auto",
    ) -> None:
        if chain not in CHAINS:
            raise UserError(
                f"unknown picture chain {chain!r}, expected one of {', '.join(CHAINS)}.{nearest(chain, CHAINS)}"
            )
        flips = chain != "carla"
        if not reference:
            crop = (0.8 if chain == "celeba" else 1.0) if crop is None else crop
            steps: Chain = AreaChain(image_size, crop=crop, flips=flips)
        elif chain == "celeba":
            steps = PiganCelebaReference(image_size)
        else:
            steps = PiganResizeReference(image_size, flips=flips)
        ground = alpha or ("white" if chain == "carla" else "black")
        super().__init__(find_pictures(path), None, steps, ground, cache)


def find_pictures(path: str | Path) -> list[Path]:
    """The pictures of a folder, its subfolders, or a glob pattern, in lexicographic order. UserError if none."""
    folder = Path(path)
    if folder.is_dir():
        found = reading.list_images(folder, recursive=True)
    elif glob.has_magic(str(path)):
        names = (Path(p) for p in glob.glob(str(path), recursive=True))
        found = sorted(p for p in names if p.suffix.lower() in reading.IMAGE_SUFFIXES)
    else:
        raise UserError(
            f"no data at {path}: expected a folder of pictures or a glob pattern, got no such folder; check the path"
        )
    if not found:
        kinds = ", ".join(reading.IMAGE_SUFFIXES)
        raise UserError(f"no pictures at {path}: expected files ending in {kinds}, got none; check the path")
    return found
