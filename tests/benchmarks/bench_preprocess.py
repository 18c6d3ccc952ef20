# SPDX-License-Identifier: Apache-2.0
"""How good cameras from photos are: python tests/benchmarks/bench_preprocess.py --data FOLDER [--detector dlib]

FOLDER holds ``eg3d_portraits`` (crops with reference cameras in dataset.json) and ``deep3d_examples`` (photos with
five points). The constant rotation is found on synthetic heads before any photograph is opened.
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
from scipy.spatial.transform import Rotation

from facelab.data.preprocess import FileLandmarks, make_detector, prepare_photo
from facelab.data.preprocess.crop import plan_crop
from facelab.data.preprocess.faces import Face, FaceDetector, by_size
from facelab.data.preprocess.head_points import standard_points
from facelab.data.preprocess.labels import Array, view_angles
from facelab.data.preprocess.pose import fit_pose
from facelab.data.synthetic import SyntheticHeads

AXES = ("yaw", "pitch", "roll")


def pose_of(face: Face, size: tuple[int, int]) -> tuple[Array, Array]:
    """(4, 4) pose of a face in a picture of (width, height), and its fit to the official crop (2, 2) corners."""
    plan = plan_crop(face.points5, size, standard_points())
    points = face.points5 if face.points68 is None else face.points68
    return fit_pose(plan.to_crop(points)).label_pose(), plan.to_photo(np.array([[0.0, 0.0], [1.0, 1.0]]))


def on_synthetic_heads(detector: FaceDetector, count: int, size: int) -> tuple[Array, dict[str, Any]]:
    """Median rotation vector from fitted to true camera (radians, world axes), and what was measured."""
    heads = SyntheticHeads(seed=0, size=size, grid="centers", fov=13.37, background="grey")
    turns, errors = [], []
    for start in range(0, count, 16):
        batch = heads.batch(range(start, min(start + 16, count)))
        for image, truth in zip(batch.image, batch.camera.cam2world.double().numpy(), strict=True):
            faces = by_size(detector.detect(image.permute(1, 2, 0).numpy()))
            if faces:
                pose, _ = pose_of(faces[0], (size, size))
                turns.append(Rotation.from_matrix(truth[:3, :3] @ pose[:3, :3].T).as_rotvec())
                errors.append(np.degrees(np.subtract(view_angles(pose), view_angles(truth))))
    constant = np.median(turns, axis=0)
    found = {"heads": count, "found": len(turns), "constant_rotation_degrees": np.degrees(constant).tolist()}
    return constant, found | {"error": summary(np.array(errors))}


def summary(errors: Array) -> dict[str, Any]:
    """(N, 3) degrees -> medians of the absolute error, means, deviations, worst."""
    table: dict[str, Any] = {}
    for k, axis in enumerate(AXES):
        column = errors[:, k]
        table[axis] = {
            "median_absolute": float(np.median(np.abs(column))),
            "mean": float(column.mean()),
            "std": float(column.std()),
            "worst": float(np.abs(column).max()),
        }
    return table


def on_portraits(folder: Path, detector: FaceDetector, constant: Array) -> dict[str, Any]:
    """Errors against the reference cameras, as fitted and after the constant rotation."""
    raw, turned, positions, corners, rows, refused = [], [], [], [], {}, []
    correction = Rotation.from_rotvec(constant).as_matrix()
    for name, numbers in json.loads((folder / "dataset.json").read_text())["labels"]:
        image = np.asarray(Image.open(folder / name).convert("RGB"))
        faces = by_size(detector.detect(image, name))
        if not faces:
            refused.append(name)
            continue
        reference = np.reshape(numbers[:16], (4, 4))
        pose, square = pose_of(faces[0], image.shape[1::-1])
        raw.append(np.degrees(np.subtract(view_angles(pose), view_angles(reference))))
        turned.append(np.degrees(np.subtract(view_angles(correction @ pose[:3, :3]), view_angles(reference))))
        cosine = pose[:3, 3] @ reference[:3, 3] / np.linalg.norm(pose[:3, 3]) / np.linalg.norm(reference[:3, 3])
        positions.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
        corners.append([*(square.mean(axis=0) - 255.5), (square[1] - square[0]).mean() / 512])
        rows[name] = raw[-1].round(2).tolist()
    offsets = np.array(corners)
    return {
        "faces": len(raw),
        "no_face": refused,
        "raw": summary(np.array(raw)),
        "after_constant_rotation": summary(np.array(turned)),
        "camera_position_degrees_median": float(np.median(positions)),
        "crop_shift_pixels_median": float(np.median(np.linalg.norm(offsets[:, :2], axis=1))),
        "crop_scale_median": float(np.median(offsets[:, 2])),
        "crop_scale_std": float(offsets[:, 2].std()),
        "errors_degrees": rows,
    }


def on_photos(folder: Path, detector: FaceDetector) -> dict[str, Any]:
    """The doctor on photos with five points: verdicts, distance of the points, difference of the cameras."""
    given = FileLandmarks(folder / "detections")
    verdicts, distances, differences, seconds, go_given = {}, [], [], [], 0
    photos = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".png"))
    for photo in photos:
        begin = time.perf_counter()
        found = prepare_photo(photo, detector)
        seconds.append(time.perf_counter() - begin)
        reference = prepare_photo(photo, given)
        go_given += reference.go
        verdicts[photo.name] = found.lines()
        if found.face is None or reference.face is None or found.label is None or reference.label is None:
            continue
        distance = np.linalg.norm(found.face.points5 - reference.face.points5, axis=-1).mean()
        distances.append(distance / reference.face.eye_distance)
        pair = [view_angles(label[:16].reshape(4, 4)) for label in (found.label, reference.label)]
        differences.append(np.degrees(np.subtract(*pair)))
    return {
        "photos": len(photos),
        "go": sum(lines[0].startswith("GO") for lines in verdicts.values()),
        "go_with_given_points": go_given,
        "faces_found": len(distances),
        "point_distance_in_eye_distances_mean": float(np.mean(distances)),
        "camera_against_given_points": summary(np.array(differences)),
        "seconds_per_photo_median": float(np.median(seconds)),
        "verdicts": verdicts,
    }


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--detector", "name", default="mtcnn", show_default=True)
@click.option("--heads", default=96, show_default=True, help="Synthetic heads for the constant rotation.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers to this JSON file.")
def main(data: Path, name: str, heads: int, out: Path | None) -> None:
    """Measure cameras from photos."""
    torch.set_num_threads(1)
    detector = make_detector(name)
    constant, synthetic = on_synthetic_heads(detector, heads, 256)
    result = {
        "command": f"python tests/benchmarks/bench_preprocess.py --data FOLDER --detector {name} --heads {heads}",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "synthetic_heads": synthetic,
        "portraits": on_portraits(data / "eg3d_portraits", detector, constant),
        "photos": on_photos(data / "deep3d_examples", detector),
    }
    click.echo(json.dumps(result, indent=1))
    keep(result, out)


if __name__ == "__main__":
    main()
