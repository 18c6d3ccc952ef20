# SPDX-License-Identifier: Apache-2.0
"""A folder of photos -> a data set in EG3D's layout: crops and ``dataset.json`` with 25 camera numbers each.

Each photo is finished by its record ``records/<name>.json``, written last, so that a run that was interrupted goes
on where it stopped; photos that could not be read are tried again. ``dataset.json`` and ``report.json`` are made from
the records at the end of every run.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from facelab.data import reading
from facelab.data.preprocess.cameras import CameraEstimator, make_camera_estimator
from facelab.data.preprocess.detectors import make_detector
from facelab.data.preprocess.doctor import prepare_photo
from facelab.data.preprocess.faces import FaceDetector
from facelab.data.preprocess.head_points import read_standard_points
from facelab.data.preprocess.labels import Array
from facelab.data.processes import in_processes
from facelab.errors import Interrupted, UserError
from facelab.files import atomic_path, make_folder
from facelab.progress import progress_bar

RECORDS, SETTINGS, LABELS, REPORT = "records", "prepare.json", "dataset.json", "report.json"


@dataclass(frozen=True)
class PhotoSettings:
    """What decides the result; a folder that was begun with other settings is refused.

    Attributes:
        detector: ``mtcnn`` or ``dlib``.
        landmarks: file or folder of points, or "".
        weights: of the detector, or "" for the installed package.
        size: pixels a side of the crops.
        standard: file of official standard points, or "".
        mirror: also write the mirrored crop and camera.
        force: also take photos that the doctor refuses, if there is a face.
        camera_from: ``points`` or ``deep3d``.
        deep3d_weights: file of the reconstruction network, or "" for the one that was imported.
    """

    detector: str = "mtcnn"
    landmarks: str = ""
    weights: str = ""
    size: int = 512
    standard: str = ""
    mirror: bool = False
    force: bool = False
    camera_from: str = "points"
    deep3d_weights: str = ""

    def make_detector(self) -> FaceDetector:
        return make_detector(self.detector, landmarks=self.landmarks or None, weights=self.weights or None)

    def make_camera(self) -> CameraEstimator | None:
        return make_camera_estimator(
            self.camera_from, weights=self.deep3d_weights or None, standard=self.standard_points()
        )

    def standard_points(self) -> Array | None:
        return read_standard_points(self.standard) if self.standard else None


@dataclass
class PhotosReport:
    """Result of a run; stored as ``report.json``.

    Attributes:
        photos: photos with a record; ``kept`` of them are from earlier runs.
        used: photos in the data set; ``pictures`` counts their files with mirrored ones.
        refused: photo -> why the doctor refused it.
        damaged: photo -> why it could not be read.
        finished: False if the run was interrupted.
    """

    photos: int = 0
    kept: int = 0
    used: int = 0
    pictures: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    finished: bool = False

    def lines(self) -> list[str]:
        """The report for a person."""
        state = "" if self.finished else ", not finished"
        lines = [f"{self.used} of {self.photos} photos used, {self.pictures} pictures ({self.kept} done before){state}"]
        for title, group in (("refused", self.refused), ("damaged", self.damaged)):
            lines += [f"{title}: {name}: {reason}" for name, reason in list(group.items())[:20]]
            if len(group) > 20:
                lines.append(f"{title}: {len(group) - 20} more, see {REPORT}")
        return lines


def prepare_photos(
    source: str | Path,
    target: str | Path,
    settings: PhotoSettings | None = None,
    *,
    overlays: str | Path | None = None,
    workers: int = 1,
    progress: bool = True,
) -> PhotosReport:
    """Make a data set from all photos of a folder and its subfolders.

    Args:
        source: photos.
        target: gets the crops, ``dataset.json``, ``records/``, ``report.json``.
        settings: see :class:`PhotoSettings`.
        overlays: folder for the doctor's pictures, outside of ``target``; None writes none.
        workers: processes; 1 works in this one.
        progress: show a progress bar.

    Raises:
        UserError: no photos, unusable folders, other settings than before, or no photo was usable.
        Interrupted: Ctrl-C; what is done is kept.
    """
    source, target, settings = Path(source), Path(target), settings or PhotoSettings()
    jobs = _jobs(source, target, settings.mirror)
    for folder, what in ((target, "data set"), (source, "photos")):
        if overlays is not None and Path(overlays).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--overlays {overlays} lies inside the {what} {folder}; choose a folder outside of it")
    _detector.cache_clear()  # files of points may have changed
    _camera.cache_clear()
    _camera(settings)
    _detector(settings)  # a missing package or file is said once, here
    _claim(target, settings)
    seen = None if overlays is None else Path(overlays)
    open_jobs = [job for job in jobs if not _is_done(target, job[1], seen)]
    report = PhotosReport(kept=len(jobs) - len(open_jobs))
    work = functools.partial(_work, target=target, settings=settings, overlays=seen)
    try:
        with closing(in_processes(work, open_jobs, workers, _start_worker)) as done:
            for _ in progress_bar(done, total=len(open_jobs), unit="photo", show=progress, smoothing=0.05):
                pass
        report.finished = True
    except KeyboardInterrupt:
        raise Interrupted("interrupted; what is done is kept, give the same command again to go on") from None
    finally:
        _summarise(target, [name for _, name in jobs], report)
    if not report.used:
        name, reason = next(iter({**report.refused, **report.damaged}.items()))
        raise UserError(f"none of {len(jobs)} photos could be used; {name}: {reason}")
    return report


def make_one(
    photo: Path,
    name: str,
    target: Path,
    settings: PhotoSettings,
    overlays: Path | None,
    detector: FaceDetector,
    camera: CameraEstimator | None = None,
) -> dict[str, Any]:
    """Prepare one photo: picture files, then its record. Returns the record."""
    try:
        found = prepare_photo(photo, detector, size=settings.size, standard=settings.standard_points(), camera=camera)
    except UserError as error:
        return _write_record(target, name, {"photo": photo.name, "damaged": str(error), "labels": []})
    record = found.report() | {"labels": []}
    if overlays is not None:
        with atomic_path(_overlay_path(overlays, name)) as temporary:
            found.overlay().save(temporary, quality=92)
    if found.crop is not None and found.label is not None and (found.go or settings.force):
        from facelab.data.preprocess.labels import mirror_label

        record["labels"].append([f"{name}.png", found.label.tolist()])
        _write_png(target / f"{name}.png", found.crop)
        if settings.mirror:
            record["labels"].append([f"{name}_mirror.png", mirror_label(found.label).tolist()])
            _write_png(target / f"{name}_mirror.png", ImageOps.mirror(found.crop))
    return _write_record(target, name, record)


def _jobs(source: Path, target: Path, mirror: bool) -> list[tuple[Path, str]]:
    """(photo, its name in the data set: relative path without ending)."""
    if source.is_file():
        raise UserError(f"{source}: expected a folder of photos, got a file; prepare_photo.py takes one photo")
    if not source.is_dir():
        raise UserError(f"no folder {source}: expected photos; check the path")
    if source.resolve().is_relative_to(target.resolve()):
        raise UserError(f"the data set {target} lies over the photos {source}; choose another folder")
    jobs: dict[str, Path] = {}
    for photo in reading.list_images(source, recursive=True):
        if photo.resolve().is_relative_to(target.resolve()):
            continue  # a crop of an earlier run: the data set may lie in a folder of the photos'
        name = photo.relative_to(source).with_suffix("").as_posix()
        if name in jobs:
            raise UserError(f"{photo} and {jobs[name].name} share a name; expected one photo of a name; rename one")
        jobs[name] = photo
    for name in jobs if mirror else ():
        if f"{name}_mirror" in jobs:
            raise UserError(
                f"{jobs[name + '_mirror']} has the name that the mirror image of {jobs[name].name} gets; expected other "
                "names with --mirror; rename it"
            )
    if not jobs:
        raise UserError(f"no photos in {source}: expected files ending in {', '.join(reading.IMAGE_SUFFIXES)}")
    return [(photo, name) for name, photo in jobs.items()]


def _claim(target: Path, settings: PhotoSettings) -> None:
    make_folder(target)
    path, now = target / SETTINGS, {"command": "photos", **vars(settings)}
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); choose another target folder") from error
        if isinstance(before, dict):  # options that are younger than the folder had their defaults
            before = vars(PhotoSettings()) | before
        if before != now:
            changed = ", ".join(key for key in now if not isinstance(before, dict) or before.get(key) != now[key])
            raise UserError(
                f"{target} was begun with another {changed}; give the same options or choose another folder"
            )
    elif (target / LABELS).exists():
        raise UserError(f"{target} already holds a data set that was not made by this command; choose another folder")
    else:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(now) + "\n", encoding="utf-8")


@functools.lru_cache(maxsize=1)
def _detector(settings: PhotoSettings) -> FaceDetector:
    """The detector of this process, made once."""
    return settings.make_detector()


@functools.lru_cache(maxsize=1)
def _camera(settings: PhotoSettings) -> CameraEstimator | None:
    """The source of cameras of this process, made once."""
    return settings.make_camera()


def _work(job: tuple[Path, str], target: Path, settings: PhotoSettings, overlays: Path | None) -> dict[str, Any]:
    return make_one(*job, target, settings, overlays, _detector(settings), _camera(settings))


def _start_worker() -> None:
    import torch

    torch.set_num_threads(1)


def _summarise(target: Path, names: list[str], report: PhotosReport) -> None:
    """Fill the report from the records; write it and ``dataset.json``."""
    labels: list[Any] = []
    counts: Counter[str] = Counter()
    for name in names:
        path = _record_path(target, name)
        if not path.is_file():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        report.photos += 1
        labels += record["labels"]
        if record["labels"]:
            report.used += 1
        elif "damaged" in record:
            report.damaged[name] = record["damaged"]
        else:
            grave = [check for check in record["checks"] if check["level"] == "refused"]
            counts.update(check["name"] for check in grave)
            report.refused[name] = "; ".join(check["text"] for check in grave)
    report.pictures, report.reasons = len(labels), dict(counts.most_common())
    for file, value in ((LABELS, {"labels": labels}), (REPORT, vars(report))):
        with atomic_path(target / file) as temporary:
            temporary.write_text(json.dumps(value, indent=None if file == LABELS else 1) + "\n", encoding="utf-8")


def _record_path(target: Path, name: str) -> Path:
    return target / RECORDS / f"{name}.json"


def _overlay_path(overlays: Path, name: str) -> Path:
    return Path(overlays) / f"{name}.jpg"


def _is_done(target: Path, name: str, overlays: Path | None) -> bool:
    """Whether a photo has its record (and its overlay, where these are wanted); what was damaged may be mended now."""
    try:
        record = json.loads(_record_path(target, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if "damaged" in record:
        return False
    return overlays is None or _overlay_path(overlays, name).is_file()


def _write_record(target: Path, name: str, record: dict[str, Any]) -> dict[str, Any]:
    with atomic_path(_record_path(target, name)) as temporary:
        temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return record


def _write_png(path: Path, image: Image.Image) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary)
