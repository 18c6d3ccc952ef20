# SPDX-License-Identifier: Apache-2.0
"""Cameras from Deep3DFaceRecon's network: python tests/benchmarks/bench_deep3d_camera.py --data FOLDER [options]

FOLDER holds ``eg3d_portraits`` (crops with reference cameras, which come from the same network) and ``deep3d_examples``
(photos with five points). Without ``--deep3d-weights`` only time is measured, with random weights; with
``--standard-points`` also how far faces aligned to the procedural head's points lie from the official place.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from measuring import keep
from PIL import Image

from facelab.data.preprocess import Deep3dCamera, FileLandmarks, make_camera_estimator, make_detector
from facelab.data.preprocess.alignment import SIDE, align_face
from facelab.data.preprocess.faces import Face, by_size
from facelab.data.preprocess.head_points import read_standard_points, standard_points
from facelab.data.preprocess.labels import Array, view_angles
from facelab.nn.pretrained.face_reconstruction import FaceRegressor

AXES = ("yaw", "pitch", "roll")
FILE = click.Path(exists=True, path_type=Path)


def photos_with_points(folder: Path) -> list[tuple[Image.Image, Face]]:
    """RGB photos and their faces."""
    given, found = FileLandmarks(folder / "detections"), []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".png")):
        photo = Image.open(path).convert("RGB")
        found.append((photo, given.detect(np.asarray(photo), path.name)[0]))
    return found


def alignment(photos: list[tuple[Image.Image, Face]], official: Array) -> dict[str, Any]:
    """Scale and shift between faces aligned to our standard points and to the official ones."""
    ratios, shifts = [], []
    for photo, face in photos:
        ours, theirs = (align_face(photo, face.points5, points) for points in (standard_points(), official))
        ratios.append(ours.scale / theirs.scale)
        shifts.append((ours.plan.to_crop(theirs.plan.to_photo(np.array([0.5, 0.5]))) - 0.5) * SIDE)
    return {
        "scale_mean": float(np.mean(ratios)),
        "scale_std": float(np.std(ratios)),
        "shift_pixels_mean": np.mean(shifts, axis=0).tolist(),
        "shift_pixels_std": np.std(shifts, axis=0).tolist(),
        "shift_pixels_worst": float(np.abs(shifts).max()),
    }


def errors(folder: Path, camera: Deep3dCamera) -> dict[str, Any]:
    """Against the reference cameras, degrees; points from MTCNN."""
    detector, rows = make_detector("mtcnn"), {}
    for name, numbers in json.loads((folder / "dataset.json").read_text())["labels"]:
        photo = Image.open(folder / name).convert("RGB")
        faces = by_size(detector.detect(np.asarray(photo), name))
        if faces:
            pair = (camera.estimate(photo, faces[0], name).label[:16], np.asarray(numbers[:16]))
            angles = [view_angles(matrix.reshape(4, 4)) for matrix in pair]
            rows[name] = np.degrees(np.subtract(*angles)).tolist()
    table = np.array(list(rows.values()))
    medians = {axis: float(np.median(np.abs(table[:, k]))) for k, axis in enumerate(AXES)}
    return {"faces": len(rows), "median_absolute": medians, "errors_degrees": rows}


def seconds(photos: list[tuple[Image.Image, Face]], camera: Deep3dCamera) -> float:
    """Median time of one estimate."""
    times = []
    for photo, face in [photos[0], *photos]:
        begin = time.perf_counter()
        camera.coefficients(photo, face)
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))  # the first one warms up


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--deep3d-weights", "weights", type=FILE, help="epoch_20.pth.")
@click.option("--standard-points", "standard", type=FILE, help="Official standard points (.mat, .npy, .txt).")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers to this JSON file.")
def main(data: Path, weights: Path | None, standard: Path | None, out: Path | None) -> None:
    """Measure cameras from the reconstruction network."""
    torch.set_num_threads(1)
    photos = photos_with_points(data / "deep3d_examples")
    official = None if standard is None else read_standard_points(str(standard))
    if weights is None:
        camera = Deep3dCamera(FaceRegressor().eval(), official)
    else:
        camera = make_camera_estimator("deep3d", weights=weights, standard=official)
        assert isinstance(camera, Deep3dCamera)
    result = {
        "command": "python tests/benchmarks/bench_deep3d_camera.py --data FOLDER"
        + (" --deep3d-weights FILE" if weights else "")
        + (" --standard-points FILE" if standard else ""),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "photos": len(photos),
        "weights": "random" if weights is None else weights.name,
        "seconds_per_face_median_one_thread": seconds(photos, camera),
    }
    if official is not None:
        result["alignment_of_our_standard_points"] = alignment(photos, official)
    if weights is not None:
        result["portraits"] = errors(data / "eg3d_portraits", camera)
    click.echo(json.dumps(result, indent=1))
    keep(result, out)


if __name__ == "__main__":
    main()
