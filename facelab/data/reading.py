# SPDX-License-Identifier: Apache-2.0
"""Pictures and masks from files, with one clear line for each thing that can be wrong with them."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from facelab.data.classes import NUM_CLASSES, from_palette
from facelab.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
ALPHA_COLOURS = {"black": (0, 0, 0), "white": (255, 255, 255)}
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
OF_PAIR = "it and its partner"  # what to remove when a file of a data set is damaged
_ENDS = {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND"}
_TAIL = 4096  # bytes at the end of a file in which its end mark is looked for


def list_images(folder: Path, recursive: bool = False) -> list[Path]:
    """Picture files of a folder in lexicographic order; names that begin with a dot are unfinished, not data."""
    found = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(p for p in found if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def read_image(path: Path, alpha: str = "black", remove: str = OF_PAIR) -> Image.Image:
    """Decode a picture to 8-bit RGB.

    Args:
        path: any of ``IMAGE_SUFFIXES``.
        alpha: what shows through transparent pixels, ``"black"`` or ``"white"``.
        remove: what messages say may be removed instead of being replaced; pictures of a data set have partners.

    Raises:
        UserError: the file cannot be decoded (truncated, no picture, missing) or has 16 or more bits per channel.
    """
    image = _decode(path, "a picture", remove)
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{path}: expected 8 bits per channel, got mode {image.mode}; convert the picture to 8-bit RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (*ALPHA_COLOURS[alpha], 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")


def read_mask(path: Path, classes: int = NUM_CLASSES) -> tuple[np.ndarray, bool]:
    """Decode a mask -> ((H, W) uint8 class numbers, whether its colours had to be translated).

    Grey files hold class numbers. Colour files are accepted when every colour is one of the
    palette (or a grey below ``classes``). ``.npy`` files hold a 2-D array of integers (CNeRF).

    Raises:
        UserError: undecodable, a value outside 0..classes-1, or a foreign colour; names file and value.
    """
    if _is_array(path):
        return _array_mask(path, classes), False
    image = _decode(path, "a mask")
    values, translated = _mask_values(image, path, classes)
    worst = int(values.max(initial=0))
    if worst >= classes or values.min(initial=0) < 0:
        bad = worst if worst >= classes else int(values.min())
        raise UserError(
            f"{path}: mask value {bad}, expected class numbers 0..{classes - 1}; "
            "save masks as single-channel PNG whose pixel value is the class"
        )
    return values.astype(np.uint8), translated


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) from the header, without decoding. UserError if the file is no picture (or ``.npy`` mask)."""
    if _is_array(path):
        height, width = _load_array(path, mapped=True).shape
        return width, height
    try:
        with Image.open(path) as image:
            return image.size
    except _DECODE_ERRORS as error:
        raise UserError(_undecodable(path, "a picture", error)) from error


def looks_complete(path: Path) -> bool:
    """Whether the end mark of a JPEG or PNG is where it should be (True for other formats)."""
    mark = _ENDS.get(path.suffix.lower())
    if mark is None:
        return True
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
        return mark in file.read()


def aspect_problem(image_path: Path, image_size: tuple[int, int], mask_path: Path, mask_size: tuple[int, int]) -> str:
    """A line if the mask cannot belong to the picture because of its shape, else an empty string.

    One pixel of rounding is allowed on the smaller of the two.
    """
    (width, height), (mask_width, mask_height) = image_size, mask_size
    slack = max(width, height, mask_width, mask_height)
    if abs(width * mask_height - height * mask_width) <= slack:
        return ""
    return (
        f"{mask_path}: the mask is {mask_width}x{mask_height} but its picture {image_path.name} is {width}x{height}; "
        "expected the same aspect ratio; crop or scale both together"
    )


def _mask_values(image: Image.Image, path: Path, classes: int) -> tuple[np.ndarray, bool]:
    if image.mode == "1":
        return np.asarray(image.convert("L")) // 255, False
    if image.mode in ("L", "I", "I;16", "I;16B"):
        return np.asarray(image), False
    if image.mode == "LA":
        return np.asarray(image)[..., 0], False
    rgb = np.asarray(image.convert("RGB"))
    if image.mode != "P" and (rgb == rgb[..., :1]).all() and rgb.max() < classes:
        return rgb[..., 0], False  # class numbers saved as a grey picture in three channels
    try:
        return from_palette(rgb), True
    except ValueError as error:
        if image.mode == "P":
            return np.asarray(image), False  # a palette of its own: the indices are the classes
        raise UserError(
            f"{path}: expected a single-channel mask of class numbers, got a colour picture whose {error}; "
            "convert it to class numbers or to facelab's palette"
        ) from error


def _is_array(path: Path) -> bool:
    return isinstance(path, Path) and path.suffix.lower() == ".npy"


def _load_array(path: Path, mapped: bool = False) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except _DECODE_ERRORS as error:
        raise UserError(_undecodable(path, "a mask", error)) from error
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "iu" or not values.size:
        got = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else "an archive"
        raise UserError(f"{path}: expected a 2-D array of integer class numbers, got {got}; make the masks again")
    return values


def _array_mask(path: Path, classes: int) -> np.ndarray:
    values = _load_array(path)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= classes:
        raise UserError(
            f"{path}: mask value {low if low < 0 else high}, expected class numbers 0..{classes - 1}; translate the "
            "classes and save the mask again"
        )
    return values.astype(np.uint8)


def _decode(path: Path, what: str, remove: str = OF_PAIR) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except _DECODE_ERRORS as error:
        raise UserError(_undecodable(path, what, error, remove)) from error


def _undecodable(path: Path, what: str, error: Exception, remove: str = OF_PAIR) -> str:
    if isinstance(error, FileNotFoundError):
        remedy = "restore it or remove its partner" if remove == OF_PAIR else "check the path"
        return f"{path}: expected {what}, got no such file; {remedy}"
    if isinstance(error, IsADirectoryError):
        return f"{path}: expected {what}, got a folder; check the path"
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        return f"{path}: expected {what} of at most {limit} million pixels, got more; reduce it"
    reason = reason_of(error)
    reason = reason.replace(f"'{path}'", "it").replace(repr(path), "it").replace(str(path), "it")
    return f"{path}: expected {what}, got a damaged file ({reason}); replace it or remove {remove}"


def reason_of(error: Exception) -> str:
    """Why a file could not be read, in one line; without numpy's advice to load what is no array unsafely."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "it is no array of numbers" if "contains pickled (object) data" in text else text
