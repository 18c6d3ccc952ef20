# SPDX-License-Identifier: Apache-2.0
"""Official downloads -> the folder layout that training reads.

Each pair is written whole (image, then mask, each renamed into place), so a run that was
interrupted or killed goes on where it stopped when the same command is given again. Damaged and
missing files are counted and named in ``report.json``, and do not stop the others.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from facelab.data import reading
from facelab.data.classes import CLASSES, NUM_CLASSES, PAINT_ORDER, SOFGAN_TO_CELEBA
from facelab.data.processes import in_processes
from facelab.data.transforms import resize_mask
from facelab.errors import Interrupted, UserError
from facelab.files import atomic_path, make_folder
from facelab.progress import progress_bar

IMAGES, MASKS = "celebahq_mask_img", "celebahq_mask_mask"
OFFICIAL_IMAGES, OFFICIAL_PARTS = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno"
SETTINGS, REPORT = "prepare.json", "report.json"
SCHEMES = ("celebamask", "sofgan")
JPEG_QUALITY = 95
_PART_FILE = re.compile(r"(\d+)_(\w+)\.png")
_MASK_ENDING = re.compile(r"_(mask|seg|label)$")


@dataclass(frozen=True)
class Job:
    """One pair to make: a picture and either part masks (class, file) in painting order or one mask file."""

    name: str
    image: Path
    target: Path
    size: int
    parts: tuple[tuple[int, Path], ...] = ()
    mask: Path | None = None
    scheme: str = "celebamask"


@dataclass
class Outcome:
    """What became of a job: ``written``, ``kept`` (done by an earlier run) or ``damaged``."""

    name: str
    state: str
    reason: str = ""
    counts: np.ndarray | None = None


@dataclass
class PrepareReport:
    """Result of a run; stored as ``report.json``.

    Attributes:
        pairs: complete pairs in the target folder; ``kept`` of them came from earlier runs.
        missing_masks, missing_images: names without a partner in the source.
        damaged: name -> reason, one line each.
        pixels, images: per class, pixels over all masks and masks that contain it.
        finished: False if the run was interrupted.
    """

    command: str
    size: int
    pairs: int = 0
    kept: int = 0
    missing_masks: list[str] = field(default_factory=list)
    missing_images: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    pixels: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0))
    images: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0))
    finished: bool = False

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        if outcome.state == "damaged":
            self.damaged[outcome.name] = outcome.reason
            return
        self.pairs += 1
        self.kept += outcome.state == "kept"
        if outcome.counts is not None:
            for name, count in zip(CLASSES, outcome.counts.tolist(), strict=True):
                self.pixels[name] += count
                self.images[name] += count > 0

    def lines(self) -> list[str]:
        """The report for a person."""
        text = [f"{self.pairs} pairs ({self.kept} from earlier runs)" + ("" if self.finished else ", not finished")]
        for title, names in (
            ("pictures without mask", self.missing_masks),
            ("masks without picture", self.missing_images),
        ):
            if names:
                text.append(f"{len(names)} {title}: {_some(names)}")
        if self.damaged:
            name, reason = next(iter(self.damaged.items()))
            text.append(f"{len(self.damaged)} damaged, left out: {_some(self.damaged)}; {name}: {reason}")
        return text + histogram_lines(self.pixels.values(), self.images.values(), self.pairs)


def prepare_celebamask_hq(
    source: Path, target: Path, size: int = 512, workers: int | None = None, progress: bool = True
) -> PrepareReport:
    """CelebAMask-HQ as downloaded -> FENeRF's layout.

    Args:
        source: holds ``CelebA-HQ-img/<k>.jpg`` and ``CelebAMask-HQ-mask-anno/*/<k>_<part>.png``.
        target: gets ``celebahq_mask_img``, ``celebahq_mask_mask``, ``report.json``.
        size: short side of the pictures in pixels; masks are never enlarged beyond their own size.
        workers: processes; None takes the CPUs at hand, 1 works in this process.
        progress: show a progress bar.

    Raises:
        UserError: the source is not laid out so, nothing could be made, or the target cannot be used.
        Interrupted: Ctrl-C.
    """
    source = _official_root(Path(source))
    parts = _official_parts(source / OFFICIAL_PARTS)
    pictures = {int(p.stem): p for p in reading.list_images(source / OFFICIAL_IMAGES) if p.stem.isdigit()}
    report = PrepareReport("celebamask-hq", size)
    report.missing_masks = [pictures[k].name for k in sorted(pictures.keys() - parts.keys())]
    report.missing_images = [f"{k}.jpg" for k in sorted(parts.keys() - pictures.keys())]
    jobs = [
        Job(f"{k:05d}", pictures[k], Path(target), size, parts=_in_painting_order(parts[k]))
        for k in sorted(pictures.keys() & parts.keys())
    ]
    return _run(jobs, report, Path(target), workers, progress)


def prepare_ffhq(
    images: Path,
    masks: Path,
    target: Path,
    size: int = 512,
    workers: int | None = None,
    progress: bool = True,
    scheme: str = "celebamask",
) -> PrepareReport:
    """FFHQ, or any other pictures, with masks made elsewhere -> FENeRF's layout.

    Args:
        images, masks: folders, searched with their subfolders; a mask belongs to the picture with
            the same relative path, or else the same name (an ending ``_mask``, ``_seg`` or
            ``_label`` is ignored). Masks hold class numbers or palette colours.
        scheme: class numbers of the masks, ``"celebamask"`` or ``"sofgan"`` (20 classes, translated).

    Other arguments, result and errors as :func:`prepare_celebamask_hq`.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}")
    images, masks = Path(images), Path(masks)
    for folder in (images, masks):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: expected pictures and masks in two folders; check the path")
    pictures, by_path, by_name = _index(images), _index(masks), {}
    for key, path in by_path.items():
        by_name.setdefault(key.rsplit("/", 1)[-1], []).append(path)
    plain_names = len({key.rsplit("/", 1)[-1] for key in pictures}) == len(pictures)
    report = PrepareReport("ffhq", size)
    jobs, used = [], set()
    for key, picture in pictures.items():
        base = key.rsplit("/", 1)[-1]
        same_name = by_name.get(base, []) if plain_names else []
        mask = by_path.get(key) or (same_name[0] if len(same_name) == 1 else None)
        if mask is None:
            report.missing_masks.append(key)
            continue
        used.add(mask)
        name = base if plain_names else key.replace("/", "_")
        jobs.append(Job(name, picture, Path(target), size, mask=mask, scheme=scheme))
    report.missing_images = [key for key, path in by_path.items() if path not in used]
    return _run(jobs, report, Path(target), workers, progress)


def merge_parts(parts: Sequence[tuple[int, Path]]) -> np.ndarray:
    """Paint part masks (non-zero = member) in the order given, later ones over earlier ones -> (H, W) uint8.

    Raises:
        UserError: a part cannot be decoded or the parts differ in size.
    """
    merged: np.ndarray | None = None
    for number, path in parts:
        member = np.asarray(reading.read_image(path)).any(-1)
        if merged is None:
            merged = np.zeros(member.shape, np.uint8)
        if merged.shape != member.shape:
            raise UserError(f"{path}: part mask is {member.shape}, expected {merged.shape} as the others; replace it")
        merged[member] = number
    if merged is None:
        raise ValueError("no part masks to merge")
    return merged


def make_pair(job: Job) -> Outcome:
    """Make one pair, unless both its files are there. UserError only if the target cannot be written."""
    mask_target = job.target / MASKS / f"{job.name}.png"
    folder = job.target / IMAGES
    if mask_target.exists() and any((folder / f"{job.name}{end}").exists() for end in (".jpg", ".png")):
        try:
            mask, _ = reading.read_mask(mask_target)
            return Outcome(job.name, "kept", counts=_histogram(mask))
        except UserError:
            pass  # not ours or spoiled: make it again
    try:
        image = reading.read_image(job.image)
        mask = _source_mask(job)
        shape_problem = reading.aspect_problem(job.image, image.size, job.mask or job.image, mask.shape[::-1])
        if shape_problem:
            raise UserError(shape_problem)
    except UserError as error:
        return Outcome(job.name, "damaged", str(error))
    _write_image(job, image, folder)
    width, height = _scaled((mask.shape[1], mask.shape[0]), job.size)
    mask = resize_mask(mask, width, height)
    with atomic_path(mask_target) as temporary:
        Image.fromarray(mask).save(temporary, optimize=True)
    return Outcome(job.name, "written", counts=_histogram(mask))


def histogram_lines(pixels: Iterable[int], images: Iterable[int], masks: int) -> list[str]:
    """A table of classes: share of pixels and number of masks that contain the class."""
    pixels, images = list(pixels), list(images)
    total = max(1, sum(pixels))
    rows = [
        f"  {number:2d} {name:<10s} {100 * count / total:6.2f} % of pixels, in {seen} of {masks} masks"
        for number, (name, count, seen) in enumerate(zip(CLASSES, pixels, images, strict=True))
    ]
    return ["classes:", *rows]


def _run(jobs: list[Job], report: PrepareReport, target: Path, workers: int | None, progress: bool) -> PrepareReport:
    if report.size < 1:
        raise UserError(f"--size {report.size}: expected a positive number of pixels; 512 is usual")
    if not jobs:
        raise UserError(
            f"nothing to prepare: {len(report.missing_masks)} pictures without masks and "
            f"{len(report.missing_images)} masks without pictures, expected pairs; check that both folders are of one data set"
        )
    _claim(target, {"command": report.command, "size": report.size, "scheme": jobs[0].scheme})
    workers = _cpus() if workers is None else max(1, workers)
    try:
        with closing(in_processes(make_pair, jobs, workers)) as outcomes:
            for outcome in progress_bar(outcomes, total=len(jobs), unit="pair", show=progress, smoothing=0.05):
                report.add(outcome)
        report.finished = True
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted after {report.pairs + len(report.damaged)} of {len(jobs)} pairs; "
            "what is done is kept, give the same command again to go on"
        ) from None
    finally:
        report.damaged = dict(sorted(report.damaged.items()))
        with atomic_path(target / REPORT) as temporary:
            temporary.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    if not report.pairs:
        name, reason = next(iter(report.damaged.items()))
        raise UserError(f"none of {len(jobs)} pairs could be made; {name}: {reason}")
    return report


def _claim(target: Path, settings: dict[str, object]) -> None:
    """Make the target folders, or refuse a folder that another command or size has begun to fill."""
    make_folder(target)
    path = target / SETTINGS
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); choose another target folder") from error
        if before != settings:
            was, now = (" ".join(f"{key}={value}" for key, value in dict(d).items()) for d in (before, settings))
            raise UserError(f"{target} was begun with {was}, got {now}; give the same options or choose another folder")
    elif any((target / name).exists() for name in (IMAGES, MASKS)):
        raise UserError(f"{target} already holds a data set that was not made by this command; choose another folder")
    else:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    for name in (IMAGES, MASKS):
        make_folder(target / name)


def _write_image(job: Job, image: Image.Image, folder: Path) -> None:
    size = _scaled(image.size, job.size)
    suffix = {".jpeg": ".jpg"}.get(job.image.suffix.lower(), job.image.suffix.lower())
    if size == image.size and suffix in (".jpg", ".png"):
        with atomic_path(folder / f"{job.name}{suffix}") as temporary:
            shutil.copyfile(job.image, temporary)  # as it is: no second JPEG compression
        return
    with atomic_path(folder / f"{job.name}.jpg") as temporary:
        image.resize(size, Image.Resampling.LANCZOS).save(temporary, quality=JPEG_QUALITY, subsampling=0)


def _source_mask(job: Job) -> np.ndarray:
    if job.mask is None:
        return merge_parts(job.parts)
    if job.scheme == "sofgan":
        mask, translated = reading.read_mask(job.mask, classes=len(SOFGAN_TO_CELEBA))
        return mask if translated else np.array(SOFGAN_TO_CELEBA, np.uint8)[mask]
    return reading.read_mask(job.mask)[0]


def _scaled(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Bring the short side down to ``short_side``; never enlarge."""
    width, height = size
    scale = min(1.0, short_side / min(size))
    return round(width * scale), round(height * scale)


def _histogram(mask: np.ndarray) -> np.ndarray:
    return np.bincount(mask.ravel(), minlength=NUM_CLASSES)


def _official_root(source: Path) -> Path:
    for root in (source, source / "CelebAMask-HQ"):
        if (root / OFFICIAL_IMAGES).is_dir() and (root / OFFICIAL_PARTS).is_dir():
            return root
    absent = [name for name in (OFFICIAL_IMAGES, OFFICIAL_PARTS) if not (source / name).is_dir()]
    raise UserError(
        f"{source}: expected the folders {OFFICIAL_IMAGES}/ and {OFFICIAL_PARTS}/ of the CelebAMask-HQ download, "
        f"got no {' and no '.join(absent)}; unpack the archive and name its folder"
    )


def _official_parts(folder: Path) -> dict[int, dict[str, Path]]:
    """Picture number -> part name -> file, over all subfolders."""
    parts: dict[int, dict[str, Path]] = {}
    for directory, _, names in os.walk(folder):
        for name in names:
            match = _PART_FILE.fullmatch(name)
            if match and match[2] in PAINT_ORDER:
                parts.setdefault(int(match[1]), {})[match[2]] = Path(directory, name)
    return parts


def _in_painting_order(parts: dict[str, Path]) -> tuple[tuple[int, Path], ...]:
    return tuple((CLASSES.index(name), parts[name]) for name in PAINT_ORDER if name in parts)


def _index(folder: Path) -> dict[str, Path]:
    """Relative path without endings -> file."""
    table: dict[str, Path] = {}
    for path in reading.list_images(folder, recursive=True):
        key = _MASK_ENDING.sub("", path.relative_to(folder).with_suffix("").as_posix())
        if key in table:
            raise UserError(
                f"{path} and {table[key].name} share a name; expected one file for each picture; remove one"
            )
        table[key] = path
    return table


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (" ..." if len(names) > limit else "")


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
