# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are pictures, and which mask belongs to which picture."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from facelab.data import reading
from facelab.errors import UserError

LAYOUTS = (("celebahq_mask_img", "celebahq_mask_mask"), ("images", "masks"))
MASK_SUFFIXES = (".png", ".npy")
_ENDING = re.compile(r"_(mask|seg|label)$")


@dataclass(frozen=True)
class Source:
    """Pictures of a folder.

    Attributes:
        root: what relative names start from.
        pictures: sorted by path as text, the order of StyleSDF's conversion.
        masks: folder of the masks that lie with them, or None.
    """

    root: Path
    pictures: tuple[Path, ...]
    masks: Path | None


def find_source(folder: str | Path) -> Source:
    """The pictures of a folder and its subfolders.

    Masks are told from pictures in three layouts: ``images/`` with ``masks/``, FENeRF's two folders, and ``N_mask.png``
    beside ``N.jpg``.

    Raises:
        UserError: no such folder, or no pictures in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise UserError(f"no pictures at {folder}: expected a folder, got {got}; check the path")
    for image_name, mask_name in LAYOUTS:
        if (folder / image_name).is_dir() and (folder / mask_name).is_dir():
            return _source(folder, folder / image_name, folder / mask_name)
    beside = any(p.suffix.lower() == ".png" and p.stem.endswith("_mask") for p in reading.list_images(folder))
    return _source(folder, folder, folder if beside else None)


def masks_by_name(pictures: Sequence[Path], root: Path, masks: str | Path) -> list[Path | None]:
    """The mask of each picture in ``masks`` and its subfolders, None where there is none.

    A mask (PNG, or a ``.npy`` array) belongs to the picture with the same relative path, or else the same name if all
    pictures have different names; an ending ``_mask``, ``_seg`` or ``_label`` of the mask's name is ignored.

    Raises:
        UserError: no such folder, or two masks for one picture.
    """
    masks = Path(masks)
    if not masks.is_dir():
        got = "a file" if masks.exists() else "no such folder"
        raise UserError(f"no masks at {masks}: expected a folder of PNG or .npy masks, got {got}; check the path")
    own = set(pictures)
    by_path: dict[str, Path] = {}
    by_name: dict[str, list[Path]] = {}
    for path in _files(masks, MASK_SUFFIXES):
        if path in own:
            continue
        key = _ENDING.sub("", path.relative_to(masks).with_suffix("").as_posix())
        if key in by_path:
            raise UserError(f"{path} and {by_path[key].name} are masks of one picture; expected one, remove the other")
        by_path[key] = path
        by_name.setdefault(key.rsplit("/", 1)[-1], []).append(path)
    plain = len({p.stem for p in pictures}) == len(pictures)
    found: list[Path | None] = []
    for picture in pictures:
        same_name = by_name.get(picture.stem, []) if plain else []
        key = picture.relative_to(root).with_suffix("").as_posix()
        found.append(by_path.get(key) or (same_name[0] if len(same_name) == 1 else None))
    return found


def _source(folder: Path, root: Path, masks: Path | None) -> Source:
    pictures = _files(root, reading.IMAGE_SUFFIXES)
    if masks == root:
        pictures = [p for p in pictures if not (p.suffix.lower() == ".png" and "_mask" in p.stem)]
    if not pictures:
        kinds = ", ".join(reading.IMAGE_SUFFIXES)
        raise UserError(f"no pictures in {folder}: expected files ending in {kinds}, got none; check the path")
    return Source(root, tuple(pictures), masks)


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files with these endings, subfolders and links to folders followed, sorted by path as text."""
    found = []
    for directory, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(directory, n) for n in names if not n.startswith(".") and Path(n).suffix.lower() in suffixes]
    return sorted(found, key=str)
