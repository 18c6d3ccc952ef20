# SPDX-License-Identifier: Apache-2.0
"""The photo doctor: one photo -> crop, camera, overlay, and whether it is fit for use. Every command that takes a
photo goes through :func:`prepare_photo`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from facelab.data.preprocess.cameras import CameraEstimator, Estimate, named_coefficients
from facelab.data.preprocess.crop import CropPlan, cut, plan_crop
from facelab.data.preprocess.faces import Face, FaceDetector, by_size, choose
from facelab.data.preprocess.head_points import standard_points
from facelab.data.preprocess.labels import Array, label, view_angles
from facelab.data.preprocess.pose import HeadPose, fit_pose
from facelab.data.preprocess.verdict import Check, Limits, judge, no_face
from facelab.data.preprocess.visibility import Visibility, examine
from facelab.errors import UserError
from facelab.files import atomic_path

if TYPE_CHECKING:
    from facelab.cameras.camera import Camera

SIZE = 512
FARTHEST = 100  # points this many times the photo's longer side away are no points of it


@dataclass(frozen=True)
class PreparedPhoto:
    """What the doctor found. Without a face ``face``, ``plan``, ``crop``, ``pose`` and ``label`` are None.

    Attributes:
        path: the photo.
        photo: the whole picture, upright, RGB.
        faces: all faces, largest first.
        face: the chosen one.
        plan: where the crop lies in the photo.
        crop: the aligned picture, RGB.
        pose: fit of the head to the points (also when the camera came from elsewhere).
        label: (25,) EG3D's camera numbers.
        checks: every finding, the grave ones first.
        camera_from: ``points``, ``coefficients`` or ``deep3d``.
        seen: how far the points can be trusted.
        coefficients: (257,) of the face model, from ``deep3d`` alone.
    """

    path: Path
    photo: Image.Image
    faces: tuple[Face, ...]
    face: Face | None
    plan: CropPlan | None
    crop: Image.Image | None
    pose: HeadPose | None
    label: Array | None
    checks: tuple[Check, ...]
    camera_from: str = "points"
    seen: Visibility | None = None
    coefficients: Array | None = None

    @property
    def go(self) -> bool:
        """Whether nothing speaks against using the photo."""
        return not any(check.level == "refused" for check in self.checks)

    @property
    def reasons(self) -> list[str]:
        """Why not, one sentence each; empty for a photo that may be used."""
        return [check.text for check in self.checks if check.level == "refused"]

    def require(self) -> PreparedPhoto:
        """This photo if it may be used.

        Raises:
            UserError: with the reasons.
        """
        if not self.go:
            raise UserError(f"{self.path}: not usable: {'; '.join(self.reasons)}")
        return self

    def camera(self) -> Camera:
        """The camera as one :class:`~facelab.cameras.Camera` (float32). ValueError without a face."""
        import torch

        from facelab.cameras.camera import Camera

        if self.label is None:
            raise ValueError(f"{self.path}: no face, no camera")
        return Camera.from_label(torch.from_numpy(self.label).float()[None])

    def lines(self) -> list[str]:
        """The verdict for a person."""
        head = "GO" if self.go else "NO-GO"
        if self.label is not None:
            yaw, pitch, roll = (math.degrees(angle) for angle in view_angles(self.label[:16].reshape(4, 4)))
            head += f": yaw {yaw:+.1f}, pitch {pitch:+.1f}, roll {roll:+.1f} degrees"
        marks = {"refused": "refused", "warning": "note"}
        return [head, *(f"{marks[c.level]}: {c.text}" for c in self.checks if c.level in marks)]

    def report(self) -> dict[str, Any]:
        """Everything but the pictures, for JSON."""
        report: dict[str, Any] = {"photo": self.path.name, "go": self.go, "checks": [vars(c) for c in self.checks]}
        if self.face is None or self.plan is None or self.label is None or self.pose is None:
            return report
        yaw, pitch, roll = (math.degrees(angle) for angle in view_angles(self.label[:16].reshape(4, 4)))
        if self.coefficients is not None:
            report["coefficients"] = named_coefficients(self.coefficients)
        return report | {
            "camera": self.label.tolist(),
            "camera_from": self.camera_from,
            "angles_degrees": {"yaw": yaw, "pitch": pitch, "roll": roll},
            "box": list(self.face.box),
            "points5": self.face.points5.tolist(),
            "score": self.face.score,
            "faces": len(self.faces),
            "misfit": self.pose.misfit,
            "crop": {
                "resized": list(self.plan.resized),
                "corner": list(self.plan.corner),
                "wide": self.plan.wide,
                "middle": self.plan.middle,
                "source_side": self.plan.source_side,
            },
        }

    def overlay(self) -> Image.Image:
        """Boxes, points, projected head and axes, and the verdict."""
        from facelab.data.preprocess.overlay import draw_overlay

        pose = None if self.label is None else self.label[:16].reshape(4, 4)
        return draw_overlay(self.photo, self.faces, self.face, self.plan, self.crop, pose, self.lines(), self.go)

    def outdated(self, folder: str | Path, *, force: bool = False) -> list[Path]:
        """Crop and camera that an earlier run left in ``folder`` beside its report, and :meth:`save` would not write."""
        folder, stem = Path(folder), self.path.stem
        if self.label is not None and (self.go or force):
            return []
        try:
            before = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        if not isinstance(before, dict) or before.get("go") is not True or "camera" not in before:
            return []
        paths = (folder / f"{stem}.png", folder / f"{stem}.npy")
        return [path for path in paths if path.is_file() and path.resolve() != self.path.resolve()]

    def save(self, folder: str | Path, *, force: bool = False) -> dict[str, Path]:
        """Write ``<stem>_overlay.png`` and ``<stem>.json``; of a photo that may be used (or with ``force``) also
        the crop ``<stem>.png`` and the camera ``<stem>.npy`` (25 float64). Those of an earlier run, which this
        verdict contradicts, are removed (:meth:`outdated`).

        Raises:
            UserError: the folder cannot be written, or a file would replace the photo itself.
        """
        folder = Path(folder)
        stem = self.path.stem
        files = {"overlay": folder / f"{stem}_overlay.png", "report": folder / f"{stem}.json"}
        if self.label is not None and (self.go or force):
            files |= {"crop": folder / f"{stem}.png", "camera": folder / f"{stem}.npy"}
        for path in files.values():
            if path.resolve() == self.path.resolve():
                raise UserError(f"{path}: would replace the photo itself; choose another output folder")
        for path in self.outdated(folder, force=force):
            path.unlink(missing_ok=True)
        for name, picture in (("overlay", self.overlay()), ("crop", self.crop)):
            if name in files and picture is not None:
                with atomic_path(files[name]) as temporary:
                    picture.save(temporary)
        if "camera" in files and self.label is not None:
            with atomic_path(files["camera"]) as temporary:
                np.save(temporary, self.label)
        with atomic_path(files["report"]) as temporary:
            temporary.write_text(json.dumps(self.report(), indent=1) + "\n", encoding="utf-8")
        return files


def prepare_photo(
    path: str | Path,
    detector: FaceDetector,
    *,
    face: int | None = None,
    size: int = SIZE,
    limits: Limits | None = None,
    standard: Array | None = None,
    camera: CameraEstimator | None = None,
) -> PreparedPhoto:
    """Find the face, cut EG3D's crop, estimate the camera, judge.

    Args:
        path: a picture file; its EXIF orientation is obeyed.
        detector: see :func:`facelab.data.preprocess.detectors.make_detector`.
        face: which face, 1 is the largest; None takes it.
        size: pixels a side of the crop.
        limits: what is too much; None takes the defaults.
        standard: (5, 3) official standard points of the crop; None takes the procedural head's.
        camera: where the camera comes from, see :func:`facelab.data.preprocess.cameras.make_camera_estimator`; None
            takes the fit to the points. Give it the same ``standard``.

    Raises:
        UserError: no picture, or no such face.
    """
    path = Path(path)
    photo = open_photo(path)  # before the detector, which may only now be made: a damaged photo needs none
    found = by_size(detector.detect(np.asarray(photo), path.name))
    if not found:
        return PreparedPhoto(path, photo, (), None, None, None, None, None, (no_face(path.name),))
    chosen = choose(found, face, path.name)
    if np.abs(chosen.points5).max() > FARTHEST * max(photo.size):
        raise UserError(
            f"{path}: the points lie far outside the photo of {photo.width}x{photo.height}; check their units"
        )
    try:
        plan = plan_crop(chosen.points5, photo.size, standard_points() if standard is None else standard)
    except ValueError as error:
        raise UserError(f"{path}: cannot be aligned: {error}; check the points") from error
    pose = fit_pose(plan.to_crop(chosen.points5 if chosen.points68 is None else chosen.points68))
    fitted = label(pose.label_pose())
    estimate = Estimate(fitted, "points") if camera is None else camera.estimate(photo, chosen, path.name)
    seen = examine(np.asarray(photo), chosen, detector)
    checks = judge(found, chosen, face, plan, pose, seen, limits or Limits(), estimate.label[:16].reshape(4, 4))
    return PreparedPhoto(
        path,
        photo,
        tuple(found),
        chosen,
        plan,
        cut(photo, plan, size),
        pose,
        estimate.label,
        tuple(checks),
        estimate.origin,
        seen,
        estimate.coefficients,
    )


def open_photo(path: Path) -> Image.Image:
    """A photo as people see it: upright, RGB, transparent pixels black. UserError if it is no picture."""
    from facelab.data import reading

    try:
        with Image.open(path) as image:
            turn = image.getexif().get(274, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        turn = 1  # what is wrong is said below
    image = reading.read_image(path, remove="it")
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return image.transpose(turns[turn]) if turn in turns else image
