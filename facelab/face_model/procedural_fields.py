# SPDX-License-Identifier: Apache-2.0
"""Identity and expression of the procedural head: displacement fields over its rest position.

Each field is a formula over the rest positions of all parts, so eyeballs, brows, hair and glasses move with the
skin below them. One unit of a coefficient is one standard deviation; lengths in centimetres.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from facelab.face_model.curves import Array, blob, bump, smoothstep
from facelab.face_model.procedural_hair import BOB_RIM, LONG_RIM, HairStyle, hair_points
from facelab.face_model.procedural_skin import (
    EYE_CENTRE,
    EYE_CORNERS,
    EYE_RADIUS,
    EYE_ROW,
    JAW_ROW,
    MOUTH_HALF_WIDTH,
    MOUTH_ROW,
    MOUTH_Y,
    lid_openings,
)

JAW_HINGE = (-1.5, 0.0)  # y, z of the axis the jaw turns about


@dataclass(frozen=True)
class RestHead:
    """Rest positions with what the fields need to know about each vertex.

    Attributes:
        points: (V, 3) centimetres.
        part: (V,) name of each vertex's part.
        surface: (V, 2) coordinates on the part (skin: angle and row).
        below_slit: (V,) skin vertices that belong to a lower lid or the lower lip although they lie on the slit.
    """

    points: Array
    part: NDArray[np.str_]
    surface: Array
    below_slit: NDArray[np.bool_]

    def is_part(self, *names: str) -> NDArray[np.bool_]:
        return np.isin(self.part, names)

    @property
    def side(self) -> Array:
        """-1 .. 1: right to left half of the face, smooth across the middle."""
        return np.tanh(self.points[:, 0] / 0.5)


def identity_fields(head: RestHead) -> dict[str, Array]:
    """Name -> (V, 3) displacement for one unit of the coefficient."""
    return {
        **_skull_fields(head),
        **_face_fields(head),
        **_eye_fields(head),
        **_nose_mouth_fields(head),
        **_hair_fields(head),
    }


def _field(x: Array | float, y: Array | float, z: Array | float, like: Array) -> Array:
    return np.stack([np.broadcast_to(np.asarray(v, dtype=float), like.shape[:1]) for v in (x, y, z)], axis=-1)


def _skull_fields(head: RestHead) -> dict[str, Array]:
    p = head.points
    x, y, z = p.T
    body = smoothstep(-14.5, -10.5, y)  # the shoulders stay where they are
    below = np.clip(0.7 - y, 0, 11.3)
    above = np.clip(y - 2.5, 0, 12)
    back = smoothstep(2.0, -4.0, z)
    return {
        "face_width": _field(0.038 * x * smoothstep(5.0, 1.0, y) * body, 0, 0, p),
        "skull_width": _field(0.035 * x * smoothstep(-1.0, 5.0, y), 0, 0, p),
        "skull_length": _field(0, 0, 0.035 * (z - 2.0) * back * smoothstep(-8.0, -2.0, y), p),
        "face_length": _field(0, -0.045 * below * body, 0, p),
        "forehead_height": _field(0, 0.045 * above, 0, p),
        "forehead_slope": _field(0, 0, -0.10 * np.clip(y - 3.0, 0, 6) * smoothstep(2.0, 6.0, z), p),
        "neck_width": _field(
            0.055 * x * smoothstep(-8.6, -11.5, y) * smoothstep(-14.5, -12.5, y),
            0,
            0.05 * (z + 1.8) * smoothstep(-10.6, -12.0, y) * smoothstep(-14.5, -12.5, y),
            p,
        )
        * ~head.is_part("hair", "hat", "visor")[:, None],
    }


def _face_fields(head: RestHead) -> dict[str, Array]:
    p = head.points
    side = head.side
    own = ~head.is_part(
        "hair", "hat", "visor", "cloth", "glasses", "lenses", "l_ear", "r_ear", "l_earring", "r_earring"
    )
    front = smoothstep(0.0, 4.0, p[:, 2]) * own
    jaw = blob(p, (4.9, -7.0, 1.0), (2.4, 2.0, 4.0)) * own
    chin = bump(p, (0.0, -9.3), (2.0, 1.5)) * front
    cheek_bone = bump(p, (4.7, -1.5), (1.7, 1.1)) * front
    cheek = bump(p, (4.2, -4.6), (1.7, 1.8)) * front
    ridge = bump(p, (2.4, 2.7), (2.0, 0.7)) * front
    return {
        "jaw_width": _field(0.38 * side * jaw, 0, 0, p),
        "jaw_angle": _field(0, -0.42 * jaw, 0.1 * jaw, p),
        "chin_width": _field(0.35 * np.clip(p[:, 0] / 2.0, -1, 1) * chin, 0, 0, p),
        "chin_length": _field(0, -0.32 * bump(p, (0, -10.0), (3.2, 1.9)) * front, 0, p),
        "chin_forward": _field(0, 0, 0.42 * chin, p),
        "cheek_bones": _field(0.22 * side * cheek_bone, 0.05 * cheek_bone, 0.28 * cheek_bone, p),
        "cheek_fullness": _field(0.33 * side * cheek, 0, 0.26 * cheek, p),
        "brow_ridge": _field(0, -0.05 * ridge, 0.24 * ridge, p),
        "double_chin": _field(0, -0.55 * blob(p, (0.0, -11.0, 4.6), (3.0, 1.2, 2.6)) * own, 0, p),
    }


def _eye_fields(head: RestHead) -> dict[str, Array]:
    p = head.points
    side = head.side
    eyeball = head.is_part("l_eye", "r_eye")
    own = head.is_part("skin", "l_eye", "r_eye", "l_brow", "r_brow")
    brow = head.is_part("l_brow", "r_brow")
    front = smoothstep(3.0, 6.0, p[:, 2]) * own
    # flat over the lids, so that they and the eyeball move as one
    distance2 = ((np.abs(p[:, 0]) - EYE_CENTRE[0]) / 2.2) ** 2 + ((p[:, 1] - EYE_CENTRE[1]) / 1.45) ** 2
    near = np.where(eyeball, 1.0, np.exp(-0.7 * distance2**2.5) * front)
    centre = np.stack([np.sign(p[:, 0]) * EYE_CENTRE[0], *(np.full(len(p), c) for c in (0.72, 7.9))], -1)
    ramp = np.where(eyeball, 0.0, np.abs(p[:, 0]) - EYE_CENTRE[0]) * near
    above = np.where(eyeball, 0.0, lid_weights(head)[0])
    brow_near = bump(p, (3.2, 2.7), (2.4, 0.9)) * front
    along, across = head.surface[:, 0], head.surface[:, 1]
    half = 0.34 * (1 - 2 * across) * brow
    arch = np.sin(np.pi * np.clip(along, 0, 1)) * brow
    tilt = (np.abs(p[:, 0]) - 3.2) * brow_near
    return {
        "eye_distance": _field(0.16 * side * near, 0, 0, p),
        "eye_size": near[:, None] * (p - centre) * np.array([0.06, 0.06, 0.02]),
        "eye_height": _field(0, 0.16 * near, 0, p),
        "eye_tilt": _field(0, 0.09 * ramp, 0, p),
        "eye_depth": _field(0, 0, -0.16 * np.minimum(near, 0.9), p),
        "lid_height": _field(0, 0.09 * above, 0, p),
        "brow_height": _field(0, 0.17 * np.where(brow, 1.0, 0.6 * brow_near), 0, p),
        "brow_tilt": _field(0, -0.055 * tilt, 0, p),
        "brow_thickness": _field(0, 0.18 * half, 0, p),
        "brow_arch": _field(0, 0.15 * (arch - 0.5 * brow), 0, p),
        "brow_length": _field(0.16 * side * (along - 0.4) * brow, 0, -0.07 * along * brow, p),
    }


def _nose_mouth_fields(head: RestHead) -> dict[str, Array]:
    p = head.points
    side = head.side
    own = head.is_part("skin", "mouth")
    front = smoothstep(3.0, 6.0, p[:, 2]) * own
    nose = bump(p, (0.0, -1.6), (1.5, 1.9)) * front * smoothstep(-4.3, -3.5, p[:, 1])
    tip = bump(p, (0.0, -2.7), (1.0, 0.8)) * front
    wing = bump(p, (1.45, -3.0), (0.7, 0.75)) * front
    ridge = bump(p, (0.0, -0.2), (0.8, 1.1)) * front
    lower_nose = smoothstep(1.5, -3.0, p[:, 1]) * bump(p, (0.0, -2.8), (1.9, 1.5)) * front
    mouth = bump(p, (0.0, MOUTH_Y), (3.0, 1.4)) * front
    t = np.clip(np.abs(p[:, 0]) / MOUTH_HALF_WIDTH, 0, 1)
    row = head.surface[:, 1]
    lower = ((row > MOUTH_ROW) | head.below_slit) & head.is_part("skin")
    upper = ~lower & head.is_part("skin")
    above, under = p[:, 1] - MOUTH_Y, MOUTH_Y - p[:, 1]
    top = upper * np.clip(above / 0.8, 0, 1) * np.exp(-np.clip(above - 0.8, 0, None) / 0.5) * (1 - t**2) * front
    bottom = lower * np.clip(under / 0.95, 0, 1) * np.exp(-np.clip(under - 0.95, 0, None) / 0.5) * (1 - t**2) * front
    lips = bump(p, (0.0, MOUTH_Y), (2.0, 0.85)) * front * head.is_part("skin")
    ear = head.is_part("l_ear", "r_ear", "l_earring", "r_earring")
    offset = p - np.stack([np.sign(p[:, 0]) * 7.3, np.full(len(p), -0.75), np.full(len(p), -1.0)], -1)
    return {
        "nose_length": _field(0, -0.22 * lower_nose, 0, p),
        "nose_width": _field(0.19 * side * wing + 0.05 * side * nose, 0, 0, p),
        "nose_forward": _field(0, 0, 0.26 * nose + 0.12 * tip, p),
        "nose_bridge": _field(0, 0, 0.20 * ridge, p),
        "nose_bridge_width": _field(0.16 * side * bump(p, (0.8, -0.6), (0.5, 1.4)) * front, 0, 0, p),
        "nose_hump": _field(0, 0, 0.17 * bump(p, (0.0, -0.9), (0.6, 0.6)) * front, p),
        "nose_tip_up": _field(0, 0.20 * tip, 0.04 * tip, p),
        "nose_tip_width": _field(0.17 * side * bump(p, (0.7, -2.7), (0.5, 0.6)) * front, 0, 0, p),
        "mouth_width": _field(0.09 * p[:, 0] * mouth, 0, -0.05 * np.abs(p[:, 0]) * mouth, p),
        "mouth_height": _field(0, 0.19 * mouth, 0, p),
        "mouth_forward": _field(0, 0, 0.20 * mouth, p),
        "upper_lip": _field(0, 0.15 * top, 0.10 * lips * upper, p),
        "lower_lip": _field(0, -0.16 * bottom, 0.10 * lips * lower, p),
        "ear_size": ear[:, None] * 0.09 * offset,
        "ear_flare": _field(0.12 * np.sign(p[:, 0]) * ear * np.clip(-offset[:, 2], 0, 3), 0, 0, p),
    }


def _hair_fields(head: RestHead) -> dict[str, Array]:
    """Styles as differences from the short mean style; one unit is the whole step to the other style."""
    styles = {
        "hair_long": HairStyle(rim=tuple(LONG_RIM), hanging=1.0),
        "hair_bob": HairStyle(rim=tuple(BOB_RIM), hanging=1.0, tip=-0.2),
        "hair_fringe": HairStyle(fringe=1.0),
        "hair_volume": HairStyle(lift=1.2),
        "hair_recede": HairStyle(recede=1.0),
        "hair_waves": HairStyle(wave=1.0),
        "hair_sweep": HairStyle(sweep=1.0),
        "hair_flat": HairStyle(flat=1.0),
        "hair_quiff": HairStyle(quiff=1.0),
        "hair_flip": HairStyle(tip=1.0),
    }
    mask = head.is_part("hair")
    rest = hair_points(HairStyle())
    fields = {}
    for name, style in styles.items():
        fields[name] = np.zeros_like(head.points)
        fields[name][mask] = hair_points(style) - rest
    return fields


def lid_weights(head: RestHead) -> tuple[Array, Array]:
    """(V,) weights that are 1 on the edge of the upper (lower) lids and fade above (below) them."""
    p = head.points
    row = head.surface[:, 1]
    t = (np.abs(p[:, 0]) - EYE_CORNERS[0]) / (EYE_CORNERS[1] - EYE_CORNERS[0])
    upper, lower = lid_openings(t)
    tilt = 0.14 * (np.clip(t, 0, 1) - 0.4)
    shape = np.sin(np.pi * np.clip(t, 0, 1)) ** 0.6 * head.is_part("skin") * smoothstep(4.0, 5.5, p[:, 2])
    is_below = (row > EYE_ROW) | head.below_slit
    above = ~is_below * np.exp(-np.clip(p[:, 1] - (0.7 + upper + tilt), 0, None) / 0.6)
    under = is_below * np.exp(-np.clip((0.7 - lower + tilt) - p[:, 1], 0, None) / 0.6)
    return shape * above, shape * under


def _jaw_weight(head: RestHead) -> Array:
    """(V,) how far each vertex follows the jaw."""
    p = head.points
    row = head.surface[:, 1]
    skin = head.is_part("skin")
    lower = (row > MOUTH_ROW) | head.below_slit
    opening = np.sqrt(np.clip(1 - (np.abs(p[:, 0]) / (MOUTH_HALF_WIDTH + 0.05)) ** 2, 0, 1))
    beside = smoothstep(-3.6, -8.2, p[:, 1])
    weight = opening * np.where(lower, 1.0, 0.0) + (1 - opening) * beside
    weight = weight * smoothstep(-1.5, 3.0, p[:, 2]) * (1 - smoothstep(JAW_ROW, JAW_ROW + 5.0, row))
    upper_teeth_end = np.where(head.surface[:, 1] == 1, MOUTH_Y - 0.29, MOUTH_Y - 0.1)
    inside = np.where(p[:, 1] < upper_teeth_end, 1.0, 0.0)
    return np.where(skin, weight, np.where(head.is_part("mouth"), inside, 0.0))


def expression_fields(head: RestHead) -> dict[str, Array]:
    """Name -> (V, 3) displacement for one unit of the coefficient; 1 is a clear, 2 a strong expression."""
    return {**_mouth_expressions(head), **_upper_expressions(head)}


def _mouth_expressions(head: RestHead) -> dict[str, Array]:
    p = head.points
    side = head.side
    jaw = _jaw_weight(head)
    skin = head.is_part("skin")
    front = smoothstep(2.0, 5.0, p[:, 2]) * skin
    row = head.surface[:, 1]
    lower = ((row > MOUTH_ROW) | head.below_slit) & skin
    upper = ~lower & skin
    corner = bump(p, (2.75, MOUTH_Y), (1.15, 1.1)) * front
    cheek = bump(p, (4.0, -3.2), (1.5, 1.4)) * front
    middle = bump(p, (0.0, MOUTH_Y), (1.4, 0.8)) * front
    lips = bump(p, (0.0, MOUTH_Y), (2.0, 0.9)) * front
    t = np.clip(np.abs(p[:, 0]) / MOUTH_HALF_WIDTH, 0, 1)
    open_up = lips * upper * np.sqrt(1 - t**2)
    open_down = lips * lower * np.sqrt(1 - t**2)
    y, z = p[:, 1] - JAW_HINGE[0], p[:, 2] - JAW_HINGE[1]
    return {
        "jaw_open": _field(0, -0.11 * z * jaw, 0.11 * y * jaw, p),
        "jaw_left": _field(0.30 * jaw, 0, 0, p),
        "jaw_forward": _field(0, 0, 0.30 * jaw, p),
        "smile": _field(
            0.42 * side * corner + 0.1 * side * cheek,
            0.42 * corner + 0.16 * cheek,
            -0.22 * corner + 0.18 * cheek - 0.05 * p[:, 0] ** 2 * head.is_part("mouth"),
            p,
        ),
        "mouth_down": _field(0.05 * side * corner, -0.36 * corner, -0.08 * corner, p),
        "pucker": _field(-0.45 * side * corner - 0.16 * p[:, 0] * head.is_part("mouth"), 0, 0.40 * middle, p),
        "lips_part": _field(0, 0.20 * open_up - 0.26 * open_down, 0, p),
        "upper_lip_up": _field(0, 0.30 * open_up, 0.05 * open_up, p),
        "lower_lip_down": _field(0, -0.32 * open_down, 0, p),
        "lips_press": _field(
            0, -0.20 * lips * upper * (p[:, 1] - MOUTH_Y) + 0.20 * lips * lower * (MOUTH_Y - p[:, 1]), 0.0, p
        ),
        "mouth_stretch": _field(0.38 * side * corner, -0.08 * corner, -0.16 * corner, p),
        "mouth_left": _field(0.32 * bump(p, (0.0, MOUTH_Y), (2.8, 1.3)) * front, 0, 0, p),
        "cheek_puff": _field(
            0.38 * side * bump(p, (4.0, -5.0), (1.3, 1.4)) * front,
            0,
            0.30 * bump(p, (3.6, -5.0), (1.3, 1.4)) * front,
            p,
        ),
    }


def _upper_expressions(head: RestHead) -> dict[str, Array]:
    p = head.points
    side = head.side
    own = head.is_part("skin", "l_brow", "r_brow")
    front = smoothstep(3.0, 6.0, p[:, 2]) * own
    inner = bump(p, (1.6, 2.7), (1.2, 0.85)) * front
    outer = bump(p, (4.4, 2.8), (1.3, 0.85)) * front
    above, under = lid_weights(head)
    left = p[:, 0] > 0
    squint = bump(p, (3.4, -0.7), (1.6, 0.6)) * front * head.is_part("skin")
    wrinkle = bump(p, (0.9, -0.6), (0.8, 1.0)) * front
    blink = _blink(head)
    offset = p - np.stack([np.sign(p[:, 0]) * EYE_CENTRE[0], *(np.full(len(p), c) for c in EYE_CENTRE[1:])], -1)
    offset = offset * head.is_part("l_eye", "r_eye")[:, None]
    return {
        "brow_inner_up": _field(0, 0.36 * inner, 0.05 * inner, p),
        "brow_outer_up": _field(0, 0.36 * outer, 0.03 * outer, p),
        "brow_lower": _field(-0.12 * side * inner, -0.20 * (inner + 0.6 * outer), 0.08 * inner, p),
        "blink_left": blink * left[:, None],
        "blink_right": blink * ~left[:, None],
        "eyes_wide": _field(0, 0.14 * above - 0.05 * under, 0, p),
        "squint": _field(0, 0.14 * under + 0.16 * squint - 0.08 * above, 0.08 * squint, p),
        "nose_wrinkle": _field(0, 0.18 * wrinkle, 0.05 * wrinkle, p),
        "gaze_left": _field(0.16 * offset[:, 2], 0, -0.16 * offset[:, 0], p),
        "gaze_up": _field(0, 0.14 * offset[:, 2], -0.14 * offset[:, 1], p),
    }


def _blink(head: RestHead) -> Array:
    """Upper lids closed over the eyeball: edges meet, the skin slides on a sphere."""
    p = head.points
    above, under = lid_weights(head)
    t = (np.abs(p[:, 0]) - EYE_CORNERS[0]) / (EYE_CORNERS[1] - EYE_CORNERS[0])
    upper, lower = lid_openings(t)
    shape = np.maximum(np.sin(np.pi * np.clip(t, 0, 1)) ** 0.6, 1e-6)
    y = (
        p[:, 1]
        - (upper + 0.80 * lower) * above / shape * (shape > 1e-3)
        + 0.20 * lower * under / shape * (shape > 1e-3)
    )
    distance2 = (np.abs(p[:, 0]) - EYE_CENTRE[0]) ** 2 + (y - EYE_CENTRE[1]) ** 2
    sphere = EYE_CENTRE[2] + np.sqrt(np.maximum((EYE_RADIUS + 0.13) ** 2 - distance2, 0.0))
    moved = (above + under > 0.02) & (distance2 < EYE_RADIUS**2)
    return _field(0, y - p[:, 1], np.where(moved, np.maximum(sphere - p[:, 2], 0.0), 0.0), p)
