# SPDX-License-Identifier: Apache-2.0
"""From a picture of any size (and its mask) to square training samples.

A chain has two steps: ``prepare`` does what is slow and the same every time (crop, resize), so
that its result can be cached; ``finish`` does what changes from one epoch to the next (flip) or
from one stage to the next. Pictures are uint8 (H, W, 3) arrays, masks uint8 (H, W) of classes.

:class:`AreaChain` is the default. The others repeat pi-GAN's and FENeRF's own chains for
comparison; they differ from the originals only in that the result is rounded to 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from facelab.data.classes import FLIP_TABLE

CROP = 0.8  # pi-GAN: short side to 320, then the middle 256
_SHORT_SIDE, _CROP_SIDE = 320, 256


class Chain(Protocol):
    """How a picture becomes a sample; see the module's docstring."""

    @property
    def image_size(self) -> int:
        """Side of the finished sample in pixels."""
        ...

    @property
    def flips(self) -> bool:
        """Whether training mirrors half of the samples."""
        ...

    def resized(self, image_size: int) -> Chain:
        """The same chain for samples of another side."""
        ...

    @property
    def prepared_size(self) -> int:
        """Side of what ``prepare`` returns."""
        ...

    @property
    def key(self) -> str:
        """Names everything that ``prepare`` depends on, for caches."""
        ...

    def prepare(self, image: Image.Image, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """RGB picture and mask of any size -> arrays of side ``prepared_size``."""
        ...

    def finish(self, image: np.ndarray, mask: np.ndarray | None, flip: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Prepared arrays -> sample of side ``image_size``, mirrored on request."""
        ...


@dataclass(frozen=True)
class AreaChain:
    """Default: the middle square of the picture, straight to ``image_size`` by antialiased area averaging.

    Attributes:
        image_size: side of the sample in pixels.
        crop: side of the square over the picture's short side. 0.8 frames a face as the
            originals do (256 of 320); 1.0 keeps all of a square picture.
        background_mask: blacken the picture where the mask is background, before resizing.
        flips: mirror half of the samples in training.
        exchange: exchange left and right classes when mirroring; the original forgets it.

    Masks are always sampled at the nearest pixel, so no class appears that was not there.
    A picture whose crop is smaller than the sample is enlarged bilinearly.
    """

    image_size: int
    crop: float = CROP
    background_mask: bool = False
    flips: bool = True
    exchange: bool = True

    def __post_init__(self) -> None:
        _check_size(self.image_size)
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is a fraction of the short side in (0, 1], got {self.crop}")

    def resized(self, image_size: int) -> AreaChain:
        return replace(self, image_size=image_size)

    @property
    def prepared_size(self) -> int:
        return self.image_size

    @property
    def key(self) -> str:
        return f"area-{self.image_size}-{self.crop:g}-{'black' if self.background_mask else 'full'}"

    def prepare(self, image: Image.Image, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        if self.background_mask and mask is not None:
            image = blacken_background(image, mask)
        width, height = image.size
        side = self.crop * min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        kind = Image.Resampling.BOX if side >= self.image_size else Image.Resampling.BILINEAR
        size = (self.image_size, self.image_size)
        small = np.asarray(image.resize(size, kind, box=(left, top, left + side, top + side)))
        return small, None if mask is None else _nearest_crop(mask, self.crop, self.image_size)

    def finish(self, image: np.ndarray, mask: np.ndarray | None, flip: bool) -> tuple[np.ndarray, np.ndarray | None]:
        return mirror(image, mask, self.exchange) if flip else (image, mask)


_S = TypeVar("_S", bound="_Sized")


@dataclass(frozen=True)
class _Sized:
    """What the originals' chains share: their size and how to change it."""

    image_size: int

    def __post_init__(self) -> None:
        _check_size(self.image_size)

    def resized(self: _S, image_size: int) -> _S:
        return replace(self, image_size=image_size)


@dataclass(frozen=True)
class FenerfReference(_Sized):
    """FENeRF's own chain: short side 320 bilinear, middle 256, then bilinear without antialiasing.

    Masks take the same way by nearest pixels and keep their classes when mirrored, which makes
    left and right ambiguous (the original's mistake).
    """

    background_mask: bool = True
    flips: bool = True

    @property
    def prepared_size(self) -> int:
        return _CROP_SIDE

    @property
    def key(self) -> str:
        return f"short320-{'black' if self.background_mask else 'full'}"

    def prepare(self, image: Image.Image, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        if self.background_mask and mask is not None:
            image = blacken_background(image, mask)
        crop = np.asarray(_short_side_crop(image, Image.Resampling.BILINEAR))
        if mask is None:
            return crop, None
        return crop, np.asarray(_short_side_crop(Image.fromarray(mask), Image.Resampling.NEAREST))

    def finish(self, image: np.ndarray, mask: np.ndarray | None, flip: bool) -> tuple[np.ndarray, np.ndarray | None]:
        image = _bilinear(image, self.image_size)
        mask = None if mask is None else _nearest(mask, self.image_size)
        return mirror(image, mask, exchange=False) if flip else (image, mask)


@dataclass(frozen=True)
class PiganCelebaReference(_Sized):
    """pi-GAN's CelebA chain: short side 320 bilinear, middle 256, mirror, then nearest pixels."""

    flips: bool = True

    @property
    def prepared_size(self) -> int:
        return _CROP_SIDE

    @property
    def key(self) -> str:
        return "short320-full"

    def prepare(self, image: Image.Image, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        return FenerfReference(self.image_size, background_mask=False).prepare(image, mask)

    def finish(self, image: np.ndarray, mask: np.ndarray | None, flip: bool) -> tuple[np.ndarray, np.ndarray | None]:
        if flip:  # before the resize, as there: nearest pixels of a mirrored picture are other pixels
            image, mask = mirror(image, mask, exchange=False)
        return _nearest(image, self.image_size), None if mask is None else _nearest(mask, self.image_size)


@dataclass(frozen=True)
class PiganResizeReference(_Sized):
    """pi-GAN's Cats (mirrored) and Carla (not mirrored) chain: the whole picture to a square, nearest pixels."""

    flips: bool = True

    @property
    def prepared_size(self) -> int:
        return self.image_size

    @property
    def key(self) -> str:
        return f"square-nearest-{self.image_size}"

    def prepare(self, image: Image.Image, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        size = (self.image_size, self.image_size)
        small = np.asarray(image.resize(size, Image.Resampling.NEAREST))
        return small, None if mask is None else resize_mask(mask, *size)

    def finish(self, image: np.ndarray, mask: np.ndarray | None, flip: bool) -> tuple[np.ndarray, np.ndarray | None]:
        return mirror(image, mask, exchange=False) if flip else (image, mask)


def mirror(image: np.ndarray, mask: np.ndarray | None, exchange: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Mirror picture and mask left to right; ``exchange`` also renames left and right classes."""
    image = image[:, ::-1]
    if mask is not None:
        mask = mask[:, ::-1]
        mask = np.array(FLIP_TABLE, dtype=mask.dtype)[mask] if exchange else mask
    return image, mask


def blacken_background(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture with zeros where the mask, brought to its size by nearest pixels, is background."""
    foreground = resize_mask((mask != 0).view(np.uint8) * np.uint8(255), *image.size)
    black = Image.new("RGB", image.size)
    black.paste(image, mask=Image.fromarray(foreground))
    return black


def resize_mask(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """Nearest pixels: each new pixel takes the class under its centre."""
    if mask.shape == (height, width):
        return mask
    rows = ((np.arange(height) + 0.5) * mask.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * mask.shape[1] / width).astype(int)
    return mask.take(rows, 0).take(columns, 1)


def _nearest_crop(mask: np.ndarray, crop: float, size: int) -> np.ndarray:
    """The middle square of side ``crop`` * short side, each new pixel the class under its centre."""
    height, width = mask.shape
    side = crop * min(height, width)
    steps = (np.arange(size) + 0.5) * side / size
    rows = ((height - side) / 2 + steps).astype(int).clip(max=height - 1)
    columns = ((width - side) / 2 + steps).astype(int).clip(max=width - 1)
    return mask.take(rows, 0).take(columns, 1)


def _short_side_crop(image: Image.Image, kind: Image.Resampling) -> Image.Image:
    """Short side to 320 (the long side rounds down), middle 256 (offsets round half to even)."""
    width, height = image.size
    if width <= height:
        size = (_SHORT_SIDE, int(_SHORT_SIDE * height / width))
    else:
        size = (int(_SHORT_SIDE * width / height), _SHORT_SIDE)
    image = image.resize(size, kind)
    left, top = round((size[0] - _CROP_SIDE) / 2.0), round((size[1] - _CROP_SIDE) / 2.0)
    return image.crop((left, top, left + _CROP_SIDE, top + _CROP_SIDE))


def _nearest(array: np.ndarray, size: int) -> np.ndarray:
    """Nearest as tensors are resized by default: pixel floor(i * old / new), not the one under the centre."""
    steps = np.arange(size) * array.shape[0] // size
    return array[steps[:, None], steps]


def _bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear between pixel centres, no antialiasing, rounded to uint8."""
    old = image.shape[0]
    place = ((np.arange(size) + 0.5) * old / size - 0.5).clip(0, old - 1)
    low = np.floor(place).astype(int)
    high = np.minimum(low + 1, old - 1)
    weight = (place - low).astype(np.float32)
    wide = image.astype(np.float32)
    rows = wide[low] * (1 - weight)[:, None, None] + wide[high] * weight[:, None, None]
    both = rows[:, low] * (1 - weight)[:, None] + rows[:, high] * weight[:, None]
    return np.rint(both).astype(np.uint8)


def _check_size(image_size: int) -> None:
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
