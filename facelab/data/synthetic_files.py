# SPDX-License-Identifier: Apache-2.0
"""Synthetic heads as files: FENeRF's folders, EG3D's label file, the truth behind them, contact sheets."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from facelab.data.labels import colorize
from facelab.data.synthetic import SyntheticBatch, SyntheticHeads
from facelab.errors import Interrupted, UserError, nearest
from facelab.files import atomic_path, make_folder
from facelab.progress import progress_bar

IMAGE_FOLDER, MASK_FOLDER = "celebahq_mask_img", "celebahq_mask_mask"
FORMATS = ("jpg", "png")
CHUNK = 32  # heads drawn at a time
UNFINISHED = ".unfinished"  # folder of what an interrupted run has done
TRUTH = ("identity", "expression", "albedo", "shown", "light", "landmarks_3d", "landmarks_2d", "index")


@dataclass(frozen=True)
class _Job:
    out: str
    start: int
    stop: int
    size: int
    seed: int
    picture_format: str
    threads: int
    background: str


def write_dataset(
    out: str | Path,
    count: int,
    size: int = 128,
    seed: int = 0,
    *,
    workers: int | None = None,
    picture_format: str = "jpg",
    background: str = "black",
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write heads 0 .. count - 1 of ``seed`` as ``out/celebahq_mask_img`` and ``out/celebahq_mask_mask``.

    Beside them ``dataset.json`` (``labels``: [[name, 25 camera numbers]], ``sh``: [[name, 9 grey light numbers]])
    and ``truth.npz`` (coefficients, RGB lights, landmarks, camera angles). The same arguments give the same files,
    whatever the number of workers. ``dataset.json`` is written last: where it is, the set is complete. Until then
    ``.unfinished`` keeps the truth of the heads that are done, and the same arguments go on from there.

    Args:
        out: folder to write.
        count: number of heads.
        size: pixels per side.
        seed: of the set.
        workers: processes; the default, 1, draws with a thread on each core and is best below a few thousand heads.
        picture_format: ``jpg`` (quality 95) or ``png``.
        background: behind the heads: ``black``, ``grey`` or ``white``.
        overwrite: replace a data set that is already there.
        progress: show a progress bar.

    Returns:
        The folder. UserError on bad arguments, an occupied folder or a disk that cannot be written; Interrupted (one
        of them) on Ctrl-C.
    """
    if count < 1:
        raise UserError(f"count must be at least 1 head, got {count}")
    if picture_format not in FORMATS:
        hint = nearest(picture_format, FORMATS)
        raise UserError(f"picture format must be one of {', '.join(FORMATS)}, got {picture_format!r}.{hint}")
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1 process, got {workers}")
    SyntheticHeads(seed, size, threads=1, background=background)  # tells about bad arguments before anything is written
    out = Path(out)
    _prepare_folders(out, overwrite, {"size": size, "seed": seed, "format": picture_format, "background": background})
    workers = min(workers or 1, (count + CHUNK - 1) // CHUNK)
    threads = len(os.sched_getaffinity(0)) if workers == 1 else 1
    starts = range(0, count, CHUNK)
    jobs = [_Job(str(out), s, min(s + CHUNK, count), size, seed, picture_format, threads, background) for s in starts]
    todo = [job for job in jobs if not _part(job).is_file()]
    try:
        for _ in progress_bar(_run(todo, workers), total=len(todo), unit="chunk", show=progress):
            pass
    except KeyboardInterrupt:
        raise Interrupted("interrupted; what is done is kept, give the same command again to go on") from None
    parts = [_read_part(_part(job)) for job in jobs]
    truth = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    _remove_others(out, count)
    _write_truth(out, truth, size, seed, picture_format, background)
    shutil.rmtree(out / UNFINISHED)
    return out


def _part(job: _Job) -> Path:
    """Where the truth of a chunk waits for the others."""
    return Path(job.out) / UNFINISHED / f"{job.start}_{job.stop}.npz"


def _read_part(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as part:
        return {name: part[name] for name in part.files}


def _remove_others(out: Path, count: int) -> None:
    """Heads beyond the last one, of an interrupted run that was to make more."""
    for folder in (out / IMAGE_FOLDER, out / MASK_FOLDER):
        for path in folder.iterdir():
            if path.stem.isdigit() and int(path.stem) >= count:
                path.unlink()


def _prepare_folders(out: Path, overwrite: bool, settings: dict[str, Any]) -> None:
    """Make the folders, or go on in those that an interrupted run with the same settings left."""
    make_folder(out)
    stated, text = out / UNFINISHED / "settings.json", json.dumps(settings, sort_keys=True)
    if stated.is_file() and not overwrite:
        if stated.read_text(encoding="utf-8") == text:
            return
        raise UserError(f"{out} was begun with other settings; give the same command, or choose another folder")
    for folder in (out / IMAGE_FOLDER, out / MASK_FOLDER):
        make_folder(folder)
        old = [path for path in folder.iterdir() if path.suffix in (".jpg", ".png")]
        if old and not overwrite:
            raise UserError(
                f"{folder} already holds {len(old)} pictures; choose another folder, or empty it "
                "(make_synthetic_heads.py: --overwrite)"
            )
        for path in old:
            path.unlink()
    (out / "dataset.json").unlink(missing_ok=True)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    with atomic_path(stated) as path:
        path.write_text(text, encoding="utf-8")


def _run(jobs: list[_Job], workers: int) -> Iterator[None]:
    if workers == 1:
        yield from map(_write_chunk, jobs)
        return
    import multiprocessing

    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_write_chunk, jobs)


def _write_chunk(job: _Job) -> None:
    """Draw and write a few heads, and last what goes into the truth file."""
    if job.threads == 1:
        torch.set_num_threads(1)
    heads = SyntheticHeads(job.seed, job.size, threads=job.threads, background=job.background)
    batch = heads.batch(range(job.start, job.stop))
    images = batch.image.permute(0, 2, 3, 1).numpy()
    masks = batch.mask.to(torch.uint8).numpy()

    def write(k: int) -> None:
        options = {"quality": 95, "subsampling": 0} if job.picture_format == "jpg" else {}
        name = f"{job.start + k:05d}"
        with atomic_path(Path(job.out) / IMAGE_FOLDER / f"{name}.{job.picture_format}") as path:
            Image.fromarray(images[k]).save(path, **options)
        with atomic_path(Path(job.out) / MASK_FOLDER / f"{name}.png") as path:
            Image.fromarray(masks[k]).save(path)

    with ThreadPoolExecutor(2) as pool:  # most of the time is spent waiting for the disk
        list(pool.map(write, range(len(batch))))
    truth = {name: getattr(batch, name).numpy() for name in TRUTH}
    assert batch.camera.angles is not None
    truth |= {"camera": batch.camera.label().numpy(), "angles": batch.camera.angles.numpy()}
    with atomic_path(_part(job)) as path:
        np.savez(path, **truth)


def _write_truth(
    out: Path, truth: dict[str, np.ndarray], size: int, seed: int, picture_format: str, background: str
) -> None:
    from facelab.face_model.procedural import OPTIONAL, ProceduralHead

    model = ProceduralHead.create()
    names = {f"{kind}_names": getattr(model, f"{kind}_names") for kind in ("identity", "expression", "albedo")}
    with atomic_path(out / "truth.npz") as path, open(path, "wb") as file:
        np.savez_compressed(
            file, **truth, **{k: np.array(v) for k, v in names.items()}, shown_names=np.array(list(OPTIONAL))
        )
    files = [f"{IMAGE_FOLDER}/{index:05d}.{picture_format}" for index in truth["index"]]
    grey = truth["light"].mean(axis=-1)
    content = {
        "labels": [[name, [float(v) for v in row]] for name, row in zip(files, truth["camera"], strict=True)],
        "sh": [[name, [float(v) for v in row]] for name, row in zip(files, grey, strict=True)],
        "synthetic_heads": {
            "size": size,
            "seed": seed,
            "count": len(files),
            "grid": "corners",
            "background": background,
        },
    }
    with atomic_path(out / "dataset.json") as path:
        path.write_text(json.dumps(content))


def contact_sheet(batch: SyntheticBatch, columns: int = 8, masks: bool = False) -> Tensor:
    """All heads of a batch in one picture, (H, W, 3) uint8; with ``masks`` each row is followed by its palette masks."""
    images = batch.image.cpu()
    colours = colorize(batch.mask.cpu())
    missing = -len(images) % columns
    rows = []
    for pictures in (images, colours) if masks else (images,):
        padded = torch.cat([pictures, torch.zeros(missing, *pictures.shape[1:], dtype=torch.uint8)])
        rows.append(padded.view(-1, columns, *pictures.shape[1:]).permute(0, 3, 1, 4, 2).flatten(2, 3))
    return torch.stack(rows, dim=1).flatten(0, 2).contiguous()


def write_sheet(
    path: str | Path,
    count: int = 32,
    size: int = 128,
    seed: int = 0,
    columns: int = 8,
    masks: bool = False,
    background: str = "black",
) -> Path:
    """Draw heads 0 .. count - 1 into one picture file (format by its ending)."""
    if Path(path).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"a contact sheet is a .png, .jpg or .webp file, got {Path(path).name!r}")
    batch = SyntheticHeads(seed, size, background=background).batch(range(count))
    with atomic_path(path) as temporary:
        Image.fromarray(contact_sheet(batch, columns, masks).numpy()).save(temporary)
    return Path(path)
