# SPDX-License-Identifier: Apache-2.0
"""Cameras of a picture folder from the files in which they come: labels, matrices, rotations, NeRF's transforms."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from facelab.data.eg3d_labels import FOCAL, RADIUS, afhq_pose, intrinsics, make_label, to_opencv_cam2world
from facelab.data.reading import reason_of
from facelab.errors import UserError

SUFFIXES = (".npy", ".json", ".txt")
LARGEST_FOCAL = 50.0  # normalised; above it the numbers are pixels
_SHAPES = "25 numbers (label), 16 (matrix), 12 (its upper rows) or 9 (a rotation alone)"


@dataclass(frozen=True)
class CameraSource:
    """How camera files are to be read.

    Attributes:
        path: one JSON file for all pictures, or a folder with ``<stem>.npy|json|txt`` for each; None looks
            beside each picture.
        convention: of the matrices, see :data:`facelab.data.eg3d_labels.CONVENTIONS`; None takes what the file
            type means (``opengl_c2w`` for NeRF's transforms, else ``opencv_c2w``).
        focal: normalised focal length where the file states none.
        pixels: picture size in which intrinsics are given; None = they are normalised.
        radius: distance at which a bare rotation puts its camera.
    """

    path: Path | None = None
    convention: str | None = None
    focal: float | None = None
    pixels: float | None = None
    radius: float = RADIUS

    def labels_of(self, pictures: Sequence[str], folder: Path) -> dict[str, Tensor]:
        """Picture name -> (25,) float64 label, for the pictures that have a camera.

        Args:
            pictures: relative names below ``folder``.

        Raises:
            UserError: an unreadable file, numbers of another count, no focal length, intrinsics in pixels.
        """
        if self.path is not None and self.path.is_file():
            return self._from_one_file(self.path, pictures)
        if self.path is not None and not self.path.is_dir():
            raise UserError(f"no cameras at {self.path}: expected a JSON file or a folder, got no such file; check it")
        found = {}
        for name in pictures:
            base = (folder if self.path is None else self.path) / Path(name).with_suffix("")
            path = next(
                (base.with_name(base.name + s) for s in SUFFIXES if base.with_name(base.name + s).is_file()), None
            )
            if path is not None:
                found[name] = self.label(_read_one(path), str(path))
        return found

    def label(self, value: Any, origin: str, convention: str | None = None, focal: float | None = None) -> Tensor:
        """One camera of any accepted shape -> (25,) float64. UserError otherwise."""
        convention, focal = self.convention or convention or "opencv_c2w", self.focal or focal
        inner = None
        if isinstance(value, dict):
            value, inner = _pose_and_intrinsics(value, origin)
        numbers = _numbers(value, origin)
        if inner is not None:
            inner = _numbers(inner, origin).reshape(-1)
        if len(numbers) == 25:
            numbers, inner = numbers[:16], numbers[16:]
        matrix = torch.eye(4, dtype=torch.float64)[None].clone()
        if len(numbers) == 9:
            matrix = afhq_pose(numbers.reshape(1, 3, 3), self.radius)
            focal = focal or FOCAL
        elif len(numbers) in (12, 16):
            matrix[0, : len(numbers) // 4] = numbers.reshape(-1, 4)
        else:
            raise UserError(f"{origin}: expected {_SHAPES}, got {len(numbers)} numbers; mend the file")
        return make_label(to_opencv_cam2world(matrix, convention), self._intrinsics(inner, focal, origin))[0]

    def _intrinsics(self, inner: Tensor | None, focal: float | None, origin: str) -> Tensor:
        if inner is None:
            if focal is None:
                raise UserError(
                    f"{origin}: states no focal length; give --focal (normalised by the picture size) or --fov"
                )
            return intrinsics(focal)
        if inner.shape != (9,):
            raise UserError(f"{origin}: intrinsics must be 9 numbers (3 x 3), got {inner.numel()}; mend the file")
        matrix = inner.reshape(1, 3, 3).clone()
        if self.pixels:
            matrix[:, :2] /= self.pixels
        if not 0 < float(matrix[0, 0, 0]) <= LARGEST_FOCAL:
            raise UserError(
                f"{origin}: focal length {float(matrix[0, 0, 0]):g} is no normalised one (0 to {LARGEST_FOCAL:g}); "
                "if it is in pixels, say of which picture size with --pixels"
            )
        return matrix

    def _from_one_file(self, path: Path, pictures: Sequence[str]) -> dict[str, Tensor]:
        content = _read_one(path)
        convention = focal = None
        if isinstance(content, dict) and "frames" in content:
            convention = "opengl_c2w"
            if "camera_angle_x" in content:
                focal = 0.5 / math.tan(float(content["camera_angle_x"]) / 2)
            content = [[f.get("file_path", ""), f.get("transform_matrix")] for f in content["frames"]]
        elif isinstance(content, dict) and "labels" in content:
            content = content["labels"]
        if isinstance(content, dict):
            content = list(content.items())
        pairs = isinstance(content, list) and all(isinstance(e, (list, tuple)) and len(e) == 2 for e in content)
        if not pairs:
            raise UserError(f"{path}: expected labels by file name, got {type(content).__name__}; mend the file")
        table = {str(name).replace("\\", "/").removeprefix("./"): value for name, value in content}
        chosen = match_names(list(table), pictures, path)
        return {p: self.label(table[n], f"{path}: {n}", convention, focal) for p, n in chosen.items()}


def match_names(names: Sequence[str], pictures: Sequence[str], origin: Path) -> dict[str, str]:
    """Picture -> the entry that belongs to it: the same relative name, or else the same stem.

    Raises:
        UserError: stems would have to decide but are not unique.
    """
    exact = set(names)
    stems: dict[str, list[str]] = {}
    for name in names:
        stems.setdefault(Path(name).stem, []).append(name)
    by_stem = [p for p in pictures if p not in exact and Path(p).stem in stems]
    clash = next((p for p in by_stem if len(stems[Path(p).stem]) > 1), None)
    seen: dict[str, str] = {}
    for picture in by_stem if clash is None else ():
        stem = Path(picture).stem
        clash = picture if stem in seen else clash
        seen[stem] = picture
    if clash is not None:
        raise UserError(f"{origin}: several files are called {Path(clash).stem}; expected full relative names, mend it")
    return {p: p if p in exact else stems[Path(p).stem][0] for p in pictures if p in exact or Path(p).stem in stems}


def _pose_and_intrinsics(value: dict[str, Any], origin: str) -> tuple[Any, Any]:
    pose = next((value[k] for k in ("pose", "cam2world", "transform_matrix", "label", "camera") if k in value), None)
    if pose is None:
        raise UserError(f"{origin}: expected pose (and intrinsics), got the keys {', '.join(value) or 'none'}; mend it")
    return pose, value.get("intrinsics")


def _numbers(value: Any, origin: str) -> Tensor:
    try:
        numbers = torch.as_tensor(np.array(value, dtype=np.float64)).reshape(-1)
    except (ValueError, TypeError) as error:
        raise UserError(f"{origin}: expected {_SHAPES}, got something else ({error}); mend the file") from error
    if not bool(numbers.isfinite().all()):
        raise UserError(f"{origin}: holds NaN or infinite numbers; mend or remove it")
    return numbers


def _read_one(path: Path) -> Any:
    """The content of a camera file, without executing anything. UserError if it cannot be read."""
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".txt":
            return np.array([float(v) for v in path.read_text(encoding="utf-8").split()])
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError, RecursionError) as error:
        reason = reason_of(error)
        raise UserError(f"{path}: cannot be read as a camera file ({reason}); mend or remove it") from error
