# SPDX-License-Identifier: Apache-2.0
"""Albedo of the procedural head: mean colour, colour bases, and where little light arrives."""

from __future__ import annotations

import numpy as np

from facelab.face_model.curves import Array, blob, bump, smoothstep
from facelab.face_model.procedural_fields import RestHead, lid_weights
from facelab.face_model.procedural_parts import CLOTH_ROWS, EYE_RINGS, IRIS_RINGS, PUPIL_RINGS
from facelab.face_model.procedural_skin import LIP_BOTTOM_ROW, LIP_TOP_ROW, MOUTH_HALF_WIDTH, MOUTH_ROW, MOUTH_Y

MEAN_SKIN = np.array([0.88, 0.67, 0.555])
STEP = 0.25  # change of a painted colour channel (hair, iris, clothes ...) for one unit of its coefficient
MIDDLE = 0.5  # painted colours at coefficient 0


def skin_mask(head: RestHead) -> Array:
    """(V,) 1 on everything that has the skin's colour."""
    return head.is_part("skin", "l_ear", "r_ear").astype(float)


def lip_mask(head: RestHead) -> Array:
    """(V,) 1 on the lips with a soft edge."""
    row = head.surface[:, 1]
    x = np.abs(head.points[:, 0])
    inside = smoothstep(LIP_TOP_ROW - 0.9, LIP_TOP_ROW + 0.8, row) * smoothstep(
        LIP_BOTTOM_ROW + 0.9, LIP_BOTTOM_ROW - 0.5, row
    )
    return (
        inside
        * smoothstep(MOUTH_HALF_WIDTH + 0.1, MOUTH_HALF_WIDTH - 0.35, x)
        * head.is_part("skin")
        * (head.points[:, 2] > 4)
    )


def _iris(head: RestHead) -> tuple[Array, Array, Array]:
    """Weights of pupil, iris and white on the eyeballs; (V,) each."""
    radius = head.surface[:, 1]
    eye = head.is_part("l_eye", "r_eye")
    pupil = 1.0 * eye * (radius <= EYE_RINGS[PUPIL_RINGS - 1] + 1e-6)
    iris = 1.0 * eye * (radius <= EYE_RINGS[IRIS_RINGS - 1] + 1e-6) * (1 - pupil)
    white = eye * (1.0 - pupil - iris)
    return np.asarray(pupil, np.float64), np.asarray(iris, np.float64), np.asarray(white, np.float64)


def stubble_mask(head: RestHead) -> Array:
    """(V,) where a beard grows."""
    p = head.points
    x, y, z = np.abs(p[:, 0]), p[:, 1], p[:, 2]
    cheek_line = -4.3 - 0.9 * np.cos(np.clip((x - 4.5) / 2.5, -1, 1) * np.pi / 2) + 0.55 * np.clip(x - 4.2, 0, 3)
    beard = smoothstep(0.6, -0.6, y - cheek_line) * smoothstep(-0.5, 1.5, z) * smoothstep(-12.0, -10.8, y)
    around_mouth = bump(p, (0.0, MOUTH_Y - 0.05), (2.2, 1.05))
    moustache = bump(p, (1.1, -4.75), (1.2, 0.42)) * (x < 3.2)
    clear = 1 - 0.85 * around_mouth * (1 - moustache)
    weight = np.maximum(beard * clear, 0.95 * moustache) * (1 - lip_mask(head))
    return weight * head.is_part("skin") * (z > -1)


def mean_albedo(head: RestHead) -> Array:
    """(V, 3) RGB."""
    skin = skin_mask(head)
    colour = skin[:, None] * MEAN_SKIN
    lips = lip_mask(head)[:, None]
    colour = colour * (1 - lips) + lips * np.array([0.72, 0.40, 0.37])
    colour *= 1 - (skin * bump(head.points, (3.0, -0.6), (1.3, 0.45)) * 0.07 * (head.points[:, 2] > 4))[:, None]
    above, under = lid_weights(head)
    lash = skin * np.clip(0.62 * smoothstep(0.80, 1.0, above) + 0.22 * smoothstep(0.85, 1.0, under), 0, 1)
    colour *= 1 - lash[:, None]
    pupil, iris, white = (m[:, None] for m in _iris(head))
    radius = head.surface[:, 1:]
    limbus = 1 - 0.55 * smoothstep(EYE_RINGS[IRIS_RINGS - 2], EYE_RINGS[IRIS_RINGS - 1], radius)
    rim_red = np.array([0.05, -0.03, -0.04]) * smoothstep(1.0, 1.5, radius)
    colour = colour + pupil * 0.02 + iris * limbus * MIDDLE + white * (np.array([0.90, 0.88, 0.86]) + rim_red)
    kind = head.surface[:, 1]
    inside = head.is_part("mouth")[:, None]
    teeth = np.where(kind == 1, 1.0, 0.0)[:, None]
    tongue = np.where(kind == 2, 1.0, 0.0)[:, None]
    dark = 1 - teeth - tongue
    colour = colour + inside * (
        dark * np.array([0.16, 0.05, 0.05])
        + teeth * np.array([0.90, 0.87, 0.80])
        + tongue * np.array([0.6, 0.28, 0.28])
    )
    for names in (("hair",), ("l_brow", "r_brow"), ("cloth",), ("hat", "visor"), ("glasses",)):
        colour = colour + head.is_part(*names)[:, None] * MIDDLE
    colour = colour + head.is_part("lenses")[:, None] * np.array([0.06, 0.06, 0.07])
    return colour + head.is_part("l_earring", "r_earring")[:, None] * np.array([0.85, 0.75, 0.45])


def albedo_fields(head: RestHead) -> dict[str, Array]:
    """Name -> (V, 3) colour change for one unit of the coefficient.

    ``*_red``, ``*_green``, ``*_blue`` paint hair, brows, iris, clothes, hat and frame (0 = mid grey); the rest
    are changes of the skin.
    """
    p = head.points
    skin, lips = skin_mask(head), lip_mask(head)
    front = smoothstep(3.0, 6.0, p[:, 2]) * skin
    bare = skin * (1 - 0.55 * lips)
    above, _ = lid_weights(head)
    shadow = bump(p, (3.2, 1.75), (1.35, 0.45)) * front
    bags = bump(p, (3.0, -0.55), (1.1, 0.35)) * front
    blush = bump(p, (4.2, -2.4), (1.3, 1.0)) * front + 0.8 * bump(p, (0.0, -2.7), (0.9, 0.6)) * front
    blush = blush + 0.7 * head.is_part("l_ear", "r_ear")
    freckle = np.sin(p[:, 0] * 9.7 + 3 * np.sin(p[:, 1] * 5.1)) * np.sin(p[:, 1] * 8.9 + 2 * np.sin(p[:, 0] * 4.3))
    freckle = np.clip(freckle - 0.45, 0, 1) * bump(p, (2.8, -1.8), (2.4, 1.2)) * front

    def tint(mask: Array, red: float, green: float, blue: float) -> Array:
        return mask[:, None] * np.array([red, green, blue])

    fields = {
        "skin_dark": tint(bare, -0.155, -0.140, -0.128),
        "skin_warm": tint(bare, 0.035, 0.0, -0.045),
        "skin_pink": tint(bare, 0.02, -0.03, -0.012),
        "blush": tint(blush, 0.035, -0.055, -0.045),
        "lip_red": tint(lips, 0.02, -0.09, -0.07),
        "lip_dark": tint(lips, -0.10, -0.07, -0.06),
        "stubble": tint(stubble_mask(head), -0.18, -0.155, -0.13),
        "eye_shadow": tint(shadow, -0.09, -0.11, -0.07),
        "eye_liner": tint(skin * smoothstep(0.75, 0.95, above), -0.15, -0.15, -0.15),
        "eye_bags": tint(bags, -0.07, -0.07, -0.045),
        "freckles": tint(freckle, -0.20, -0.22, -0.20),
    }
    iris = _iris(head)[1]
    radius = head.surface[:, 1]
    iris = iris * (1 - 0.55 * smoothstep(EYE_RINGS[IRIS_RINGS - 2], EYE_RINGS[IRIS_RINGS - 1], radius))
    stripes = head.is_part("cloth") * np.where(np.round(head.surface[:, 1] * (CLOTH_ROWS - 1)) % 4 < 2, 1.0, -1.0)
    painted = {
        "hair": head.is_part("hair") * 1.0,
        "brow": head.is_part("l_brow", "r_brow") * 1.0,
        "iris": iris * (1 + 0.25 * np.sin(5 * head.surface[:, 0])),
        "cloth": head.is_part("cloth") * 1.0,
        "hat": head.is_part("hat", "visor") * 1.0,
        "frame": head.is_part("glasses") * 1.0,
    }
    for name, mask in painted.items():
        for channel, colour in enumerate(("red", "green", "blue")):
            fields[f"{name}_{colour}"] = tint(mask, *(STEP if k == channel else 0.0 for k in range(3)))
    fields["cloth_stripes"] = tint(stripes, 0.10, 0.10, 0.10)
    return fields


def occlusion(head: RestHead) -> Array:
    """(V, 3) share of the light that reaches each vertex, 0..1: sockets, nostrils, lip line, ears, throat.

    On skin, red is held back less than blue, as light that has been under the skin is red.
    """
    p = head.points
    row = head.surface[:, 1]
    skin = head.is_part("skin")
    front = smoothstep(3.0, 6.0, p[:, 2]) * skin
    shade = np.zeros(len(p))
    shade += 0.27 * bump(p, (1.75, 1.35), (0.65, 0.75)) * front
    shade += 0.12 * bump(p, (3.3, 1.75), (1.3, 0.4)) * front
    shade += 0.72 * bump(p, (0.70, -3.56), (0.36, 0.16)) * front
    shade += 0.20 * bump(p, (0.0, -3.75), (0.9, 0.22)) * front
    shade += 0.32 * bump(p, (1.95, -2.95), (0.18, 0.5)) * front
    shade += 0.14 * bump(p, (0.0, -7.55), (1.3, 0.3)) * front
    shade += 0.30 * bump(p, (2.62, -6.0), (0.22, 0.22)) * front
    lip_line = np.exp(-(np.abs(row - MOUTH_ROW) ** 2) / 0.6) * smoothstep(2.75, 2.3, np.abs(p[:, 0])) * front
    shade += 0.55 * lip_line
    shade += (
        0.50
        * skin
        * smoothstep(-9.6, -11.3, p[:, 1])
        * smoothstep(9.0, 5.5, p[:, 2])
        * (1 - 0.5 * smoothstep(-11.5, -15.0, p[:, 1]))
    )
    ear = head.is_part("l_ear", "r_ear")
    shade += ear * np.where(row < 0.45, 0.5, 0.0) + ear * 0.25 * np.exp(-(((row - 0.83) / 0.06) ** 2))
    shade += 0.25 * skin * blob(p, (7.0, -1.0, -2.8), (1.2, 2.5, 1.2))
    eye = head.is_part("l_eye", "r_eye")
    shade += eye * (0.22 * smoothstep(0.9, 1.3, p[:, 1]) + 0.2 * smoothstep(0.9, 1.45, row))
    shade += head.is_part("mouth") * np.where(row == 1, 0.15, 0.4)
    hair = head.is_part("hair")
    shade += hair * (0.30 * (row > 0.999) + 0.12 * smoothstep(0.8, 1.0, row))
    shade += head.is_part("cloth") * 0.35 * (row < 0.05)
    warm = np.where(skin_mask(head)[:, None] > 0, np.array([0.85, 1.03, 1.10]), 1.0)
    return (1 - np.clip(shade, 0, 0.92))[:, None] ** warm
