# SPDX-License-Identifier: Apache-2.0
"""Folders of pictures -> an LMDB of square PNGs in several sizes, with label maps beside it (StyleSDF, CNeRF).

Pictures are numbered in the order of their paths. Each step of the conversion (pictures, and how far it is) reaches
the file whole or not at all; a run that was interrupted or killed goes on when the same command is given again, and
until the last step no reader takes the set for whole. Damaged pictures are left out, named in ``report.json``.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facelab.data import reading
from facelab.data.classes import CLASSES, NUM_CLASSES
from facelab.data.lmdb_dataset import mask_folders
from facelab.data.lmdb_store import DATA, LmdbWriter, key_of
from facelab.data.pairing import Source, find_source, masks_by_name
from facelab.data.prepare import REPORT, SETTINGS, _cpus, histogram_lines
from facelab.data.transforms import resize_mask
from facelab.errors import Interrupted, UserError
from facelab.files import atomic_path, make_folder
from facelab.progress import progress_bar

RESAMPLE = {"lanczos": Image.Resampling.LANCZOS, "bilinear": Image.Resampling.BILINEAR}
PARSED = "parsed_masks"  # inside the LMDB's folder: what the parser made
STEP_ENTRIES, STEP_SECONDS = 256, 5.0  # a step ends at whichever comes first


@dataclass(frozen=True)
class Job:
    """One picture to convert, its mask (None = no masks), and what to make of it; ``lacks``: why it has no mask."""

    picture: Path
    mask: Path | None
    sizes: tuple[int, ...]
    resample: str
    compression: int
    lacks: str = ""


@dataclass
class Made:
    """What a job made: size -> PNG bytes and size -> label map; or why nothing could be made."""

    pictures: dict[int, bytes] = field(default_factory=dict)
    masks: dict[int, np.ndarray] = field(default_factory=dict)
    small: bool = False
    problem: str = ""


@dataclass
class LmdbReport:
    """Result of a conversion; stored as ``report.json``.

    Attributes:
        sizes: sides in pixels.
        length: pictures in the set; ``kept`` of them came from earlier runs.
        left_out: picture -> reason, one line each.
        enlarged: pictures smaller than the largest size.
        masks: folders of the label maps.
        pixels, images: per class, pixels over the largest label maps and label maps that contain it.
        seconds: spent by this run.
        finished: False if the run was interrupted.
    """

    sizes: list[int]
    length: int = 0
    kept: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    enlarged: int = 0
    masks: list[str] = field(default_factory=list)
    pixels: list[int] = field(default_factory=lambda: [0] * NUM_CLASSES)
    images: list[int] = field(default_factory=lambda: [0] * NUM_CLASSES)
    seconds: float = 0.0
    finished: bool = False

    def lines(self) -> list[str]:
        """The report for a person."""
        sizes = ", ".join(map(str, self.sizes))
        state = "" if self.finished else ", not finished"
        text = [f"{self.length} pictures at {sizes} px ({self.kept} from earlier runs){state}"]
        if self.enlarged:
            text.append(f"note: {self.enlarged} pictures are smaller than {max(self.sizes)} px and were enlarged")
        if self.left_out:
            name, reason = next(iter(self.left_out.items()))
            text.append(f"{len(self.left_out)} left out, first: {name}: {reason}")
        if self.masks:
            text += [f"masks: {', '.join(self.masks)}", *histogram_lines(self.pixels, self.images, self.length)]
        return text


def prepare_lmdb(
    source: str | Path,
    target: str | Path,
    sizes: Sequence[int] = (512, 64),
    *,
    masks: str | Path | None = None,
    parser: str | Path | None = None,
    resample: str = "lanczos",
    compression: int = 6,
    workers: int | None = None,
    device: Any = "cpu",
    progress: bool = True,
) -> LmdbReport:
    """Convert the pictures of a folder and its subfolders.

    Each picture's short side is brought to ``size``, then the middle square is cut. Label maps take the same way by
    nearest pixels and become ``{index:05d}.npy`` (uint8, 19 classes) in :func:`mask_folders`' first place, one folder
    for each size.

    Args:
        source: folder of pictures; masks that lie with them (``images/`` with ``masks/``, ``N_mask.png``) are used.
        target: folder of the LMDB.
        masks: folder of masks (PNG or ``.npy``, matched by name); pictures without a mask are left out.
        parser: file of a face parser that makes the masks (kept as pictures in ``target/parsed_masks``).
        resample: ``"lanczos"`` or ``"bilinear"``.
        compression: of the PNG bytes, 0 (large, fast) to 9.
        workers: threads; None takes the CPUs at hand.
        device: of the parser.

    Raises:
        UserError: no pictures, options out of range, another source or other options began the target, disk full.
        Interrupted: Ctrl-C.
    """
    sizes, workers = _checked_sizes(sizes), workers or _cpus()
    if resample not in RESAMPLE:
        raise UserError(f"resample must be {' or '.join(RESAMPLE)}, got {resample!r}")
    if masks is not None and parser is not None:
        raise UserError("--masks and --parser say where masks come from; expected one of them, got both")
    start, found, target = time.monotonic(), find_source(source), Path(target)
    if found.root.resolve() in target.resolve().parents or found.root.resolve() == target.resolve():
        raise UserError(f"{target} lies inside the pictures' folder {found.root}; choose a folder outside it")
    if parser is not None and found.masks is not None:
        raise UserError(f"{source} holds masks already ({found.masks}), which --parser would not use; leave it out")
    settings = _settings(found, sizes, resample, masks or found.masks, parser)
    _claim(target, settings)
    if parser is not None:
        masks = _parse(found, target, Path(parser), max(sizes), device, workers, progress)
    folder = masks or found.masks
    jobs = _jobs(found, None if folder is None else Path(folder), sizes, resample, compression)
    report = LmdbReport(list(sizes))
    if folder is not None:
        report.masks = [str(mask_folders(target, size)[0]) for size in sizes]
    try:
        with LmdbWriter(target) as writer:
            _convert(jobs, found.root, writer, report, workers, progress)
    except KeyboardInterrupt:
        done = report.length + len(report.left_out)
        raise Interrupted(
            f"interrupted after {done} of {len(jobs)} pictures; what is done is kept, give the same command again to go on"
        ) from None
    finally:
        report.seconds = round(time.monotonic() - start, 2)
        with atomic_path(target / REPORT) as temporary:
            content = asdict(report) | {
                name: dict(zip(CLASSES, getattr(report, name))) for name in ("pixels", "images")
            }
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return report


def make_entries(job: Job) -> Made:
    """Decode, resize, crop and encode one picture and its mask; problems become :attr:`Made.problem`."""
    made = Made()
    try:
        image = reading.read_image(job.picture)
        made.small = min(image.size) < max(job.sizes)
        for size in job.sizes:
            made.pictures[size] = _png(square(image, size, RESAMPLE[job.resample]), job.compression)
        if job.lacks:
            raise UserError(job.lacks)
        if job.mask is not None:
            mask, _ = reading.read_mask(job.mask)
            problem = reading.aspect_problem(job.picture, image.size, job.mask, (mask.shape[1], mask.shape[0]))
            if problem:
                raise UserError(problem)
            made.masks = {size: square_mask(mask, size) for size in job.sizes}
    except UserError as error:
        return Made(problem=str(error))
    return made


def square(image: Image.Image, size: int, filter_: Image.Resampling) -> Image.Image:
    """Short side to ``size`` (the long side rounds down), then the middle square (offsets round half to even)."""
    width, height = _scaled(image.size, size)
    image = image if image.size == (width, height) else image.resize((width, height), filter_)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


def square_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """The same for a label map (H, W), by nearest pixels."""
    width, height = _scaled((mask.shape[1], mask.shape[0]), size)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return np.ascontiguousarray(resize_mask(mask, width, height)[top : top + size, left : left + size])


# ------------------------------------------------------------------ the run


def _convert(jobs: list[Job], root: Path, writer: LmdbWriter, report: LmdbReport, workers: int, progress: bool) -> None:
    """Number and write what the threads make, in the order of the jobs, from where an earlier run stopped."""
    first = _resume(writer, report, len(jobs))
    if writer.length is None:
        entries: dict[bytes, bytes] = {}
        record, last = _record(report, first), time.monotonic()
        try:
            with closing(_in_order(jobs[first:], workers)) as results:
                bar = progress_bar(results, total=len(jobs), initial=first, unit="img", show=progress, smoothing=0.05)
                for done, (job, made) in enumerate(bar, start=first + 1):
                    if made.problem:
                        report.left_out[job.picture.relative_to(root).as_posix()] = made.problem
                    else:
                        _add(made, report, entries)
                    record = _record(report, done)
                    if len(entries) >= STEP_ENTRIES or time.monotonic() - last > STEP_SECONDS:
                        writer.commit(entries, record)
                        entries, last = {}, time.monotonic()
        finally:
            writer.commit(entries, record)  # after Ctrl-C too
        if not report.length:
            name, reason = next(iter(report.left_out.items()))
            raise UserError(f"none of {len(jobs)} pictures could be converted; {name}: {reason}")
        writer.finish(report.length)
    report.finished = True


def _record(report: LmdbReport, done: int) -> dict[str, Any]:
    """How far the conversion is: ``done`` jobs, ``index`` pictures, and what was counted."""
    names = ("left_out", "enlarged", "pixels", "images")
    return {"done": done, "index": report.length, **{name: getattr(report, name) for name in names}}


def _add(made: Made, report: LmdbReport, entries: dict[bytes, bytes]) -> None:
    index = report.length
    for folder, (size, mask) in zip(report.masks, made.masks.items(), strict=True):
        with atomic_path(Path(folder) / f"{index:05d}.npy") as temporary:
            np.save(temporary, mask)
        if size == max(made.masks):
            counts = np.bincount(mask.ravel(), minlength=NUM_CLASSES)
            report.pixels = [a + int(b) for a, b in zip(report.pixels, counts, strict=True)]
            report.images = [a + int(b > 0) for a, b in zip(report.images, counts, strict=True)]
    entries.update({key_of(size, index): data for size, data in made.pictures.items()})
    report.enlarged += made.small
    report.length += 1


def _resume(writer: LmdbWriter, report: LmdbReport, total: int) -> int:
    """Take over what earlier runs did -> the first job to do."""
    if writer.length is not None:
        report.length = report.kept = writer.length
        before = _read_json(writer.root / REPORT)
        report.left_out = dict(before.get("left_out", {}))
        report.enlarged = int(before.get("enlarged", 0))
        for name in ("pixels", "images"):
            setattr(report, name, [int(before.get(name, {}).get(c, 0)) for c in CLASSES])
        return total
    if writer.progress is None:
        return 0
    record = writer.progress
    report.length = report.kept = record["index"]
    report.left_out, report.enlarged = dict(record["left_out"]), record["enlarged"]
    report.pixels, report.images = list(record["pixels"]), list(record["images"])
    return record["done"]


def _in_order(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Made]]:
    from facelab.data.eg3d_prepare import _ordered  # results in order from threads, few ahead of the writer

    yield from _ordered(lambda job: (job, make_entries(job)), jobs, workers)


# ------------------------------------------------------------------ before the run


def _jobs(source: Source, masks: Path | None, sizes: tuple[int, ...], resample: str, compression: int) -> list[Job]:
    if masks is None:
        return [Job(picture, None, sizes, resample, compression) for picture in source.pictures]
    own = masks_by_name(source.pictures, source.root, masks)
    if not any(own):
        first = source.pictures[0]
        raise UserError(
            f"none of {len(own)} pictures has a mask in {masks}: expected {first.stem}.png or {first.stem}.npy for "
            f"{first.name}; check names and folder"
        )
    jobs = []
    for picture, mask in zip(source.pictures, own, strict=True):
        lacks = (
            "" if mask else f"{picture}: no mask {picture.stem}.png or .npy in {masks}; add it or remove the picture"
        )
        jobs.append(Job(picture, mask, sizes, resample, compression, lacks))
    return jobs


def _parse(source: Source, target: Path, parser: Path, size: int, device: Any, workers: int, progress: bool) -> Path:
    """Let a face parser make the masks; what it made before is kept."""
    from facelab.data.parsing import write_masks

    out = target / PARSED
    write_masks(source.root, out, parser, size=size, device=device, workers=workers, progress=progress)
    return out


def _checked_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    checked = tuple(sorted({int(size) for size in sizes}))
    if not checked or checked[0] < 1 or checked[-1] > 1 << 14:
        raise UserError(f"--size must be pixels such as 512,64, got {','.join(map(str, sizes)) or 'nothing'}")
    return checked


def _settings(
    source: Source, sizes: tuple[int, ...], resample: str, masks: str | Path | None, parser: str | Path | None
) -> dict[str, Any]:
    """What a later run must agree with, the list of pictures as a digest."""
    digest = hashlib.blake2b(digest_size=8)
    for picture in source.pictures:
        digest.update(picture.relative_to(source.root).as_posix().encode() + b"\n")
    origin = (
        f"parser {Path(parser).name}" if parser is not None else None if masks is None else str(Path(masks).absolute())
    )
    return {
        "command": "lmdb",
        "sizes": ",".join(map(str, sizes)),
        "resample": resample,
        "pictures": len(source.pictures),
        "names": digest.hexdigest(),
        "masks": origin,
    }


def _claim(target: Path, settings: dict[str, Any]) -> None:
    """Make the target, or refuse one that holds another set or was begun with other options."""
    path = make_folder(target) / SETTINGS
    if path.exists():
        before = _read_json(path)
        other = next((name for name in settings if before.get(name) != settings[name]), None)
        if other is not None:
            what = (
                "other pictures" if other == "names" else f"{other}={before.get(other)}, got {other}={settings[other]}"
            )
            raise UserError(f"{target} was begun with {what}; give the same command or choose another folder")
        return
    if (target / DATA).exists():
        raise UserError(f"{target} already holds an LMDB that this command did not make; choose another folder")
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _scaled(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    width, height = size
    if width <= height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


def _png(image: Image.Image, compression: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=compression)
    return buffer.getvalue()
