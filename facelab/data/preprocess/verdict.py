# SPDX-License-Identifier: Apache-2.0
"""The photo doctor's judgement: what makes a photo unfit, in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from facelab.data.preprocess.crop import CropPlan
from facelab.data.preprocess.faces import Face
from facelab.data.preprocess.labels import Array, view_angles
from facelab.data.preprocess.pose import HeadPose
from facelab.data.preprocess.visibility import VARIANTS, Visibility

Level = Literal["ok", "warning", "refused"]
PARTS = ("eye at the left", "eye at the right", "nose", "mouth corner at the left", "mouth corner at the right")


@dataclass(frozen=True)
class Limits:
    """Beyond ``warn`` the photo may disappoint, beyond ``refuse`` it is not used. Angles in degrees.

    Attributes:
        warn_yaw, refuse_yaw: of the camera around the head.
        warn_pitch, refuse_pitch: above or below the face.
        warn_roll, refuse_roll: leaning head or turned photo.
        warn_pixels, refuse_pixels: smallest side of the crop in pixels of the photo.
        warn_score, refuse_score: certainty of the detector.
        warn_misfit, refuse_misfit: see HeadPose.
        warn_outside, refuse_outside: share of the crop outside the photo.
        warn_wander, refuse_wander: how far points move when the picture is mirrored, turned or reduced, eye distances.
        refuse_missed: variants of the picture in which the face is not found again.
        warn_contrast, refuse_contrast: around the best of the five points, grey levels.
        refuse_covered: contrast around a point as a share of the best one.
        warn_disagree, refuse_disagree: angle between a camera from elsewhere and the one fitted to the points.
    """

    warn_yaw: float = 30.0
    refuse_yaw: float = 45.0
    warn_pitch: float = 25.0
    refuse_pitch: float = 35.0
    warn_roll: float = 20.0
    refuse_roll: float = 40.0
    warn_pixels: float = 256.0
    refuse_pixels: float = 128.0
    warn_score: float = 0.97
    refuse_score: float = 0.90
    warn_misfit: float = 1.6
    refuse_misfit: float = 2.2
    warn_outside: float = 0.15
    refuse_outside: float = 0.40
    warn_wander: float = 0.12
    refuse_wander: float = 0.18
    refuse_missed: int = 2
    warn_contrast: float = 20.0
    refuse_contrast: float = 12.0
    refuse_covered: float = 0.12
    warn_disagree: float = 15.0
    refuse_disagree: float = 30.0


@dataclass(frozen=True)
class Check:
    """One finding: ``name`` (a word for programs), ``level`` and ``text`` (a sentence for people)."""

    name: str
    level: Level
    text: str


def judge(
    faces: Sequence[Face],
    face: Face,
    number: int | None,
    plan: CropPlan,
    pose: HeadPose,
    seen: Visibility,
    limits: Limits,
    camera: Array,
) -> list[Check]:
    """Every finding about a face, the grave ones first.

    Args:
        faces: all faces of the photo, largest first.
        face: the one that was chosen.
        number: what the user chose (1 = largest) or None.
        plan, pose: its crop and camera.
        seen: whether its parts can be seen.
        camera: (4, 4) the camera that is used: that of ``pose``, or one from elsewhere.
    """
    yaw, pitch, roll = (math.degrees(angle) for angle in view_angles(camera))
    turn = camera[:3, :3].T @ pose.cam2world[:3, :3]
    apart = math.degrees(math.acos(np.clip((np.trace(turn) - 1) / 2, -1.0, 1.0)))
    missing = plan.outside()
    direction = "above" if pitch > 0 else "below"
    checks = [
        _above(
            "side_view",
            abs(yaw),
            (limits.warn_yaw, limits.refuse_yaw),
            f"the head is turned {abs(yaw):.0f} degrees",
            "choose a photo seen more from the front",
        ),
        _above(
            "tilted",
            abs(pitch),
            (limits.warn_pitch, limits.refuse_pitch),
            f"seen {abs(pitch):.0f} degrees from {direction}",
            "choose a photo taken at eye level",
        ),
        _above(
            "rolled",
            abs(roll),
            (limits.warn_roll, limits.refuse_roll),
            f"the head leans {abs(roll):.0f} degrees",
            "turn the photo upright",
        ),
        _above(
            "too_small",
            -plan.source_side,
            (-limits.warn_pixels, -limits.refuse_pixels),
            f"the crop has {plan.source_side:.0f} pixels of the photo a side",
            f"use a larger picture, {limits.warn_pixels:.0f} or more",
        ),
        _above(
            "uncertain",
            -face.score,
            (-limits.warn_score, -limits.refuse_score),
            f"certainty of the face {face.score:.2f}",
            "it may be hidden, blurred or no face",
        ),
        _above(
            "misfit",
            pose.misfit,
            (limits.warn_misfit, limits.refuse_misfit),
            f"the points are {pose.misfit:.1f} times as far from a human head's as expected",
            "the face may be partly hidden, or the points are wrong",
        ),
        _above(
            "cut_off",
            missing,
            (limits.warn_outside, limits.refuse_outside),
            f"{100 * missing:.0f} % of the crop lies outside the photo",
            "use a photo with more room around the head",
        ),
        _above(
            "disagreement",
            apart,
            (limits.warn_disagree, limits.refuse_disagree),
            f"the camera is turned by {apart:.0f} degrees from the one that the points suggest",
            "look at the overlay; weights or coefficients of something else, or the points are wrong",
        ),
        _inside(face, plan.picture),
        *_visible(seen, limits),
    ]
    if len(faces) > 1 and number is None:
        text = f"{len(faces)} faces: the largest is taken; --face N chooses another"
        rival = faces[1].size / faces[0].size
        checks.append(Check("several_faces", "warning" if rival > 0.5 else "ok", text))
    order: dict[Level, int] = {"refused": 0, "warning": 1, "ok": 2}
    return sorted(checks, key=lambda check: order[check.level])


def no_face(where: str) -> Check:
    """The finding of a picture in which nothing was found."""
    return Check(
        "no_face",
        "refused",
        f"no face found in {where}: it may be an animal, a back of the head, too small, or lie on its side (turn the photo)",
    )


def _above(name: str, value: float, limits: tuple[float, float], text: str, remedy: str) -> Check:
    warn, refuse = limits
    level: Level = "refused" if value > refuse else "warning" if value > warn else "ok"
    return Check(name, level, text if level == "ok" else f"{text}; {remedy}")


def _visible(seen: Visibility, limits: Limits) -> list[Check]:
    """Findings about hidden, blurred and unsteady faces."""
    far, best = float(seen.wander.max()), float(seen.contrast.max())
    steady = _above(
        "unsteady",
        far,
        (limits.warn_wander, limits.refuse_wander),
        f"the points move by {100 * far:.0f} % of the eye distance when the picture is turned or mirrored",
        "the face may be partly hidden or blurred",
    )
    if seen.missed >= limits.refuse_missed:
        text = f"the face is lost in {seen.missed} of {len(VARIANTS)} turned, mirrored or reduced copies"
        steady = Check("unsteady", "refused", f"{text}; it may be hidden, blurred, turned or no face")
    sharp = _above(
        "blurred",
        -best,
        (-limits.warn_contrast, -limits.refuse_contrast),
        f"contrast around eyes, nose and mouth is {best:.0f} grey levels",
        "the photo is blurred, dark or bleached; use a sharper one",
    )
    covered = [name for name, value in zip(PARTS, seen.contrast) if value < limits.refuse_covered * max(best, 1e-9)]
    if covered:
        return [steady, sharp, Check("hidden", "refused", f"{', '.join(covered)} hidden behind something even")]
    return [steady, sharp, Check("hidden", "ok", "eyes, nose and mouth can be seen")]


def _inside(face: Face, picture: tuple[int, int]) -> Check:
    out = int(((face.points5 < -0.5) | (face.points5 > np.array(picture) - 0.5)).any(axis=1).sum())
    if out:
        return Check(
            "points_outside", "refused", f"{out} of the five points lie outside the photo; the face is cut off"
        )
    return Check("points_outside", "ok", "all five points lie inside the photo")
