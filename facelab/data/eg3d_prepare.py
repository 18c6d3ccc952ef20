# SPDX-License-Identifier: Apache-2.0
"""Pictures and cameras -> EG3D's container: PNG files named by number, ``dataset.json`` written last."""

from __future__ import annotations

import io
import json
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from facelab.data import reading
from facelab.data.eg3d_cameras import CameraSource
from facelab.data.eg3d_labels import FOCAL, RADIUS, mirror_label, on_radius
from facelab.data.eg3d_store import DESCRIPTION, MASK_FOLDERS, split_names
from facelab.data.transforms import mirror as mirror_arrays
from facelab.errors import UserError
from facelab.files import atomic_path, make_folder
from facelab.progress import progress_bar

UNFINISHED = ".unfinished"  # stands in a folder until its dataset.json does


@dataclass(frozen=True)
class Loaded:
    """One picture on its way into a set: RGB, its label (25,) float64 or None, its mask (H, W) uint8 or None."""

    image: Image.Image
    label: Tensor | None
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Item:
    """A picture to come: what it is called in messages, how it is read (may raise UserError), the stem it gets."""

    name: str
    load: Callable[[], Loaded]
    stem: str | None = None


@dataclass
class WriteReport:
    """What was made: pictures written, name -> reason of those left out."""

    written: int = 0
    left_out: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For a person."""
        text = [f"{self.written} pictures written"]
        if self.left_out:
            name, reason = next(iter(self.left_out.items()))
            text.append(f"{len(self.left_out)} left out, the first: {name}: {reason}")
        return text


class SetWriter:
    """A new set at ``target``: a zip (uncompressed, renamed into place when whole) or a folder.

    Used as a context manager; nothing is left of a zip whose making failed. A folder whose making was
    interrupted is written again from the start.

    Args:
        target: ends in ``.zip`` and does not exist yet, or is a folder that does not hold a data set yet.
        masks: pictures go to ``images/``, masks to ``masks/``.

    Raises:
        UserError: the target cannot be written or holds a data set already.
    """

    def __init__(self, target: str | Path, masks: bool = False) -> None:
        self.target, self.masks = Path(target), masks
        self.labels: list[list[Any]] = []
        self.names: set[str] = set()
        self._earlier: set[Path] = set()  # pictures of an interrupted making, until they are written again
        self._zip: zipfile.ZipFile | None = None
        self._stack = ExitStack()

    def __enter__(self) -> SetWriter:
        if self.target.suffix.lower() == ".zip":
            if self.target.is_dir():
                raise UserError(f"{self.target}: a folder stands where the zip would go; choose another name")
            if self.target.exists():
                raise UserError(f"{self.target} exists already; choose another name, or remove it to make it anew")
            temporary = self._stack.enter_context(atomic_path(self.target))
            self._zip = self._stack.enter_context(zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED))
            return self
        mark = self.target / UNFINISHED
        if self.target.is_dir() and any(self.target.iterdir()) and not mark.exists():
            raise UserError(f"{self.target} is not empty; choose another folder, or a name that ends in .zip")
        make_folder(self.target)
        self._earlier = set(self.target.rglob("*.png")) if mark.exists() else set()
        mark.touch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            for path in self._earlier:  # made with other options or from more pictures
                path.unlink(missing_ok=True)
            stated = all(label is not None for _, label in self.labels)
            content = {"labels": self.labels if stated else None}
            self._put(DESCRIPTION, json.dumps(content).encode())
        self._stack.__exit__(kind, error, trace)
        if kind is None and self._zip is None:
            (self.target / UNFINISHED).unlink(missing_ok=True)

    def add(self, picture: bytes, label: Tensor | None, mask: bytes | None = None, stem: str | None = None) -> str:
        """Append a PNG file; returns its name. ``stem`` replaces ``00000/img00000000``."""
        number = f"{len(self.labels):08d}"
        stem = f"{number[:5]}/img{number}" if stem is None else stem
        name = f"{'images/' if self.masks else ''}{stem}.png"
        if name in self.names:
            raise ValueError(f"{name} was written already")
        self._put(name, picture)
        if self.masks:
            if mask is None:
                raise ValueError(f"{name} needs a mask like the others")
            self._put(f"{MASK_FOLDERS['images']}/{stem}.png", mask)
        self.names.add(name)
        self.labels.append([name, None if label is None else [float(v) for v in label]])
        return name

    def _put(self, name: str, data: bytes) -> None:
        if self._zip is not None:
            self._zip.writestr(zipfile.ZipInfo(name), data)  # a fixed date: the same pictures give the same file
            return
        with atomic_path(self.target / name) as temporary:
            temporary.write_bytes(data)
        self._earlier.discard(self.target / name)


def write_items(
    target: str | Path,
    items: Sequence[Item],
    *,
    size: int | None = None,
    crop: bool = False,
    mirror: bool = False,
    masks: bool = False,
    compression: int = 1,
    workers: int = 4,
    progress: bool = False,
) -> WriteReport:
    """Read, transform, encode (in threads) and write pictures in the order given.

    Args:
        size: side in pixels (Lanczos); None keeps the size, which must then be the same for all.
        crop: cut the middle square of pictures that are not square; the intrinsics follow.
        mirror: after each picture its mirror image with the mirrored camera, named ``<stem>_mirror``.
        masks: write masks; items must have them.
        compression: of the PNG files, 0 (large, read fastest) to 9.

    Raises:
        UserError: nothing could be made, sizes differ, or the target cannot be written.
    """
    report = WriteReport()
    sides: set[int] = set()

    def encode(item: Item) -> list[tuple[bytes, Tensor | None, bytes | None, int]] | UserError:
        try:
            loaded = fit(item.load(), item.name, size, crop)
        except UserError as error:
            return error
        versions = [loaded, mirrored(loaded)] if mirror else [loaded]
        return [(_png(v.image, compression), v.label, _mask_png(v), v.image.width) for v in versions]

    with SetWriter(target, masks) as writer:
        encoded = progress_bar(_ordered(encode, items, workers), total=len(items), unit="img", show=progress)
        for item, result in zip(items, encoded, strict=True):
            if isinstance(result, UserError):
                report.left_out[item.name] = str(result)
                continue
            for number, (picture, label, mask, side) in enumerate(result):
                sides.add(side)
                if len(sides) > 1:
                    raise UserError(
                        f"{item.name}: {side} px, but those before have {min(sides - {side})}; every picture of a set has "
                        "one size; give --size"
                    )
                counter = f"{report.written:08d}"
                stem = item.stem or f"{counter[:5]}/img{counter}"
                writer.add(picture, label, mask if masks else None, stem + ("_mirror" if number else ""))
            report.written += 1
        if not report.written:
            name, reason = next(iter(report.left_out.items()), ("", "there were no pictures"))
            raise UserError(f"nothing could be made of {len(items)} pictures; {name}{': ' if name else ''}{reason}")
    report.written *= 2 if mirror else 1
    return report


def fit(loaded: Loaded, name: str, size: int | None, crop: bool) -> Loaded:
    """Make a picture square and of ``size`` pixels. UserError if it is not square and must not be cropped."""
    image, label, mask = loaded.image, loaded.label, loaded.mask
    width, height = image.size
    if mask is not None and mask.shape != (height, width):
        mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    if width != height:
        if not crop:
            raise UserError(f"{name}: expected a square picture, got {width}x{height}; crop it, or give --center-crop")
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        mask = None if mask is None else mask[top : top + side, left : left + side]
        label = None if label is None else _cropped(label, (width, height), (left, top), side)
    if size is not None and image.width != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
        mask = (
            None if mask is None else np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
        )
    return Loaded(image, label, mask)


def mirrored(loaded: Loaded) -> Loaded:
    """The mirror image: pose mirrored, left and right classes of the mask exchanged."""
    image, mask = mirror_arrays(np.asarray(loaded.image), loaded.mask, True)
    label = None if loaded.label is None else mirror_label(loaded.label[None])[0]
    return Loaded(Image.fromarray(np.ascontiguousarray(image)), label, mask)


def _cropped(label: Tensor, size: tuple[int, int], corner: tuple[int, int], side: int) -> Tensor:
    """Intrinsics after a crop: rows are normalised by width and height before, by the side after."""
    label = label.clone()
    inner = label[16:].reshape(3, 3)
    for row in (0, 1):
        inner[row] *= size[row] / side
        inner[row, 2] -= corner[row] / side
    return label


# ------------------------------------------------------------------ where pictures come from


def folder_items(
    folder: Path,
    cameras: CameraSource | None,
    radius: float | None = None,
    alpha: str = "black",
    limit: int | None = None,
) -> list[Item]:
    """The pictures of a folder with its subfolders, sorted; pictures without a camera report that when read.

    Args:
        cameras: where the cameras come from; None makes a set without labels.
        radius: move every camera to this distance from the origin.

    Raises:
        UserError: no such folder or no pictures; camera files that cannot be read; no picture has a camera.
    """
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise UserError(f"no pictures at {folder}: expected a folder, got {got}; check the path")
    found = [p.relative_to(folder).as_posix() for p in reading.list_images(folder, recursive=True)]
    names, partners = split_names(found)
    names = names[:limit]
    if not names:
        raise UserError(
            f"no pictures in {folder}: expected {', '.join(reading.IMAGE_SUFFIXES)}, got none; check the path"
        )
    labels = None if cameras is None else cameras.labels_of(names, folder)
    if labels is not None and not labels:
        where = "beside them" if cameras is None or cameras.path is None else f"in {cameras.path}"
        raise UserError(
            f"none of the {len(names)} pictures of {folder} has a camera {where}; check names and --cameras"
        )

    def load(name: str) -> Loaded:
        if labels is not None and name not in labels:
            raise UserError(f"{folder / name}: no camera for it; add one or remove it")
        label = None if labels is None else labels[name]
        if label is not None and radius is not None:
            label = on_radius(label[None], radius)[0]
        mask = reading.read_mask(folder / partners[name])[0] if name in partners else None
        return Loaded(reading.read_image(folder / name, alpha), label, mask)

    return [Item(name, lambda name=name: load(name)) for name in names]


def synthetic_items(
    count: int, size: int, seed: int, focal: float = FOCAL, radius: float = RADIUS, background: str = "black"
) -> list[Item]:
    """Synthetic heads with exact cameras and masks in EG3D's units and pixel grid.

    The scene is scaled so that a camera at 1 unit stands at ``radius``: at 2.7 the head fits EG3D's box of
    side 1 and its rays from 2.25 to 3.3.
    """
    from facelab.data.synthetic import SyntheticHeads

    fov = float(np.degrees(2 * np.arctan(0.5 / focal)))
    heads = SyntheticHeads(seed, size, grid="centers", fov=fov, background=background, threads=1)

    def load(index: int) -> Loaded:
        batch = heads.head(index)
        label = batch.camera.scaled(radius).label()[0].double()
        image = Image.fromarray(batch.image[0].permute(1, 2, 0).contiguous().numpy())
        return Loaded(image, label, batch.mask[0].to(torch.uint8).numpy())

    return [Item(f"head {index}", lambda index=index: load(index)) for index in range(count)]


# ------------------------------------------------------------------ helpers


def _ordered(function: Callable[[Item], Any], items: Iterable[Item], workers: int) -> Iterator[Any]:
    """Results in order, computed in threads, at most a few ahead of the consumer."""
    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _png(image: Image.Image, compression: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=compression)
    return buffer.getvalue()


def _mask_png(loaded: Loaded) -> bytes | None:
    return None if loaded.mask is None else _png(Image.fromarray(np.ascontiguousarray(loaded.mask)), 6)
