# SPDX-License-Identifier: Apache-2.0
"""Hair and hats of the procedural head: one shell whose rim, length and thickness make the styles.

Every style is the same mesh at other places, so the difference of two styles is a linear shape basis.
Lengths in centimetres.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from facelab.face_model.curves import Array, Ids, Part, curve, grid_faces, smoothstep, spline

HAIR, HAT = 13, 14
ROWS, COLUMNS = 26, 72
# height, depth at front, middle and back, half width: hair close to the head, and hair that hangs
CLOSE = np.array(
    [
        [12.75, -1.0, -1.0, -1.0, 0.00],
        [12.25, 2.9, -1.0, -4.6, 3.10],
        [10.90, 6.1, -1.1, -7.7, 5.65],
        [8.70, 8.40, -1.2, -9.8, 7.35],
        [5.80, 9.55, -1.3, -10.8, 8.10],
        [2.80, 9.80, -1.4, -10.8, 7.95],
        [0.60, 9.50, -1.4, -10.1, 7.60],
        [-3.2, 9.00, -1.3, -8.2, 7.05],
        [-6.0, 8.50, -1.2, -7.0, 6.10],
        [-9.0, 8.00, -1.5, -6.6, 5.40],
        [-12.0, 7.50, -2.0, -6.6, 5.40],
        [-15.5, 7.00, -2.0, -7.2, 6.40],
    ]
)
HANGING = CLOSE.copy()
HANGING[5:, 4] = [8.55, 9.0, 9.25, 9.2, 9.0, 9.0, 9.3]
HANGING[5:, 3] = [-11.1, -11.0, -10.6, -10.2, -10.0, -9.9, -9.9]
HANGING[5:, 1] = [9.6, 8.8, 8.0, 7.6, 7.4, 7.2, 7.0]
# height of the lower edge by angle from the middle of the face in degrees
SHORT_RIM = [
    (0, 8.1),
    (25, 8.0),
    (42, 7.1),
    (54, 5.4),
    (63, 3.0),
    (70, 0.2),
    (76, -0.6),
    (82, 1.2),
    (90, 3.1),
    (104, 2.6),
]
SHORT_RIM += [(114, -1.0), (126, -4.0), (150, -6.4), (180, -7.0)]
LONG_RIM = [
    (0, 8.1),
    (25, 7.9),
    (38, 6.9),
    (46, 4.6),
    (52, 1.0),
    (57, -4.0),
    (62, -9.0),
    (68, -13.0),
    (80, -15.2),
    (180, -15.5),
]
BOB_RIM = [
    (0, 8.1),
    (25, 7.9),
    (38, 6.9),
    (46, 4.6),
    (52, 1.0),
    (57, -3.0),
    (63, -6.5),
    (70, -8.0),
    (90, -8.6),
    (180, -8.8),
]


@dataclass(frozen=True)
class HairStyle:
    """What makes a style; every number is a length in cm or a fraction.

    Attributes:
        rim: (angle in degrees, height) knots of the lower edge.
        hanging: 0 follows skull and neck, 1 hangs straight down.
        fringe: 0 hairline, 1 down to the brows.
        lift: extra thickness everywhere, more at the top.
        recede: how far the hairline moves back.
        wave: amplitude of waves.
        sweep: hair moved to the subject's left.
        flat: thickness removed (1 = a buzz cut).
        tip: the ends spread outwards (positive) or inwards.
    """

    rim: tuple[tuple[float, float], ...] = tuple(SHORT_RIM)
    hanging: float = 0.0
    fringe: float = 0.0
    lift: float = 0.0
    recede: float = 0.0
    wave: float = 0.0
    sweep: float = 0.0
    flat: float = 0.0
    tip: float = 0.0
    quiff: float = 0.0


def hair_angles() -> Array:
    """(COLUMNS,) radians, 0 = front, denser around the face."""
    even = np.linspace(-np.pi, np.pi, COLUMNS, endpoint=False)
    return even - 0.28 * np.sin(even)


def hair_points(style: HairStyle) -> Array:
    """The shell in one style -> (ROWS * COLUMNS + 1, 3), the crown last."""
    angles = hair_angles()
    degrees = np.degrees(np.abs(angles))
    table = CLOSE + (HANGING - CLOSE) * style.hanging
    rim = curve(list(style.rim), degrees)
    front = smoothstep(58, 36, degrees)
    rim = rim + front * (-4.6 * style.fringe * (1 - 0.12 * np.cos(angles * 5)) + 1.8 * style.recede)
    rim_level = np.interp(-rim, -table[:, 0], np.arange(len(table)))
    progress = np.linspace(0.05, 1.0, ROWS - 1) ** 0.92
    level = np.concatenate([progress[:, None] * rim_level, rim_level[None]])  # (ROWS, COLUMNS)
    points = _shell(table, level, angles)
    t = np.concatenate([progress, [1.0]])[:, None]
    radial = points - np.array([0.0, 3.0, -1.2])
    radial[..., 1] *= np.where(radial[..., 1] < 0, 0.15, 1.0)
    radial /= np.linalg.norm(radial, axis=-1, keepdims=True)
    taper = 1 - smoothstep(0.72, 1.0, t) * (0.75 - 0.35 * style.hanging)
    thickness = style.lift * (0.55 + 0.6 * np.clip(radial[..., 1], 0, 1)) * (1 - 0.5 * smoothstep(0.8, 1.0, t))
    thickness = (
        thickness
        - 0.62 * style.flat * (1 - 0.25 * t)
        - 0.58 * (1 - taper) * (1 - style.flat) * (1 - 0.75 * style.fringe * front[None])
    )
    angle = angles[None, :]
    thickness = thickness + style.wave * 0.30 * np.sin(7 * angle + 9.0 * t) * np.sin(
        4 * angle - 14 * t + 1.0
    ) * smoothstep(0.1, 0.4, t)
    thickness = thickness + style.quiff * 1.5 * np.exp(-((angle - 0.15) ** 2) / 0.5) * np.exp(
        -(((t - 0.8) / 0.22) ** 2)
    )
    points = points + radial * thickness[..., None]
    points[..., 0] += style.sweep * (0.9 * np.exp(-((angle - 0.1) ** 2) / 0.6) * t)
    points[..., 1] -= style.sweep * (1.3 * np.exp(-((angle - 0.45) ** 2) / 0.12) * t**3)
    part_line = (
        np.exp(-(((points[..., 0] + 2.6) / 0.4) ** 2))
        * smoothstep(2.0, 6.0, points[..., 2])
        * smoothstep(6.5, 8.5, points[..., 1])
    )
    points[..., 1] -= 0.28 * part_line * (1 - style.flat)
    spread = smoothstep(0.6, 1.0, t) * style.tip * smoothstep(50, 70, degrees)[None]
    points[..., 0] += spread * np.sin(angle) * 1.1
    points[..., 2] += spread * np.cos(angle) * 0.8
    centre = np.stack([0 * points[-1, :, 0], points[-1, :, 1], np.full(COLUMNS, -1.3)], -1)
    inward = centre - points[-1]
    points[-1] += inward / np.linalg.norm(inward, axis=-1, keepdims=True) * (1.0 - 0.55 * style.flat)
    crown = points[0].mean(axis=0) + np.array([0.0, 0.05, 0.0])
    return np.concatenate([points.reshape(-1, 3), crown[None]])


def _shell(table: Array, level: Array, angles: Array) -> Array:
    mirrored = table[1].copy()
    mirrored[[1, 3]], mirrored[4] = table[1, [3, 1]], -table[1, 4]
    row = spline(np.concatenate([mirrored[None], table]), level + 1)
    y, z_f, z_s, z_b, width = np.moveaxis(row, -1, 0)
    cosine = np.cos(angles)[None]
    power = np.where(cosine >= 0, 0.88, 0.97)
    reach = np.abs(cosine) ** power
    x = np.sign(np.sin(angles)) * width * np.abs(np.sin(angles)) ** power
    return np.stack([x, y, z_s + np.where(cosine >= 0, z_f - z_s, z_b - z_s) * reach], -1)


def _shell_faces(rows: int, columns: int) -> Ids:
    step = np.arange(columns)
    cap = np.stack([np.full(columns, rows * columns), step, (step + 1) % columns], -1)
    return np.concatenate([grid_faces(rows, columns, wrap=True), cap])


def hair() -> Part:
    """The shell in the mean style (short); ``surface`` is (angle, row from crown 0 to rim 1)."""
    angles = hair_angles()
    rows = np.linspace(0, 1, ROWS)
    surface = np.stack(np.broadcast_arrays(angles[None, :], rows[:, None]), -1).reshape(-1, 2)
    faces = _shell_faces(ROWS, COLUMNS)
    return Part(
        "hair", hair_points(HairStyle()), faces, np.full(len(faces), HAIR), np.concatenate([surface, [[0.0, 0.0]]])
    )


def hat() -> tuple[Part, Part]:
    """A knitted cap with a turned-up brim, and a visor that makes it a baseball cap."""
    angles = np.linspace(-np.pi, np.pi, 40, endpoint=False)
    edge = 5.6 - 1.5 * (1 - np.cos(angles)) / 2 - 0.3 * np.sin(angles) ** 2
    level = np.interp(-edge, -CLOSE[:, 0], np.arange(len(CLOSE)))
    progress = np.array([0.06, 0.16, 0.28, 0.4, 0.52, 0.63, 0.72, 0.74, 0.80, 0.87, 0.94, 0.99, 1.0])
    points = _shell(CLOSE, progress[:, None] * level, angles)
    radial = points - np.array([0.0, 2.0, -1.2])
    radial /= np.linalg.norm(radial, axis=-1, keepdims=True)
    thick = np.array([0.35, 0.35, 0.35, 0.35, 0.35, 0.33, 0.3, 0.55, 0.62, 0.62, 0.6, 0.5, -0.5])
    points = points + radial * thick[:, None, None]
    crown = points[0].mean(axis=0) + np.array([0.0, 0.05, 0.0])
    faces = _shell_faces(len(progress), len(angles))
    surface = np.stack(np.broadcast_arrays(angles[None, :], progress[:, None]), -1).reshape(-1, 2)
    cap = Part(
        "hat",
        np.concatenate([points.reshape(-1, 3), crown[None]]),
        faces,
        np.full(len(faces), HAT),
        np.concatenate([surface, [[0.0, 0.0]]]),
    )
    across, out = np.meshgrid(np.linspace(-1, 1, 15), np.linspace(0, 1, 5))
    x = 6.4 * across * (1 - 0.12 * out**2)
    reach = 5.2 * out * np.sqrt(np.maximum(1 - 0.92 * across**2, 0.0))
    base_z = -1.9 + 11.1 * np.sqrt(np.maximum(1 - (x / 8.6) ** 2, 0))
    visor = np.stack([x, 5.95 - 0.9 * across**2 - 0.22 * reach, np.minimum(base_z + reach, 15.0)], -1).reshape(-1, 3)
    visor_faces = grid_faces(5, 15)[:, ::-1].copy()
    flat = np.zeros((len(visor), 2))
    return cap, Part("visor", visor, visor_faces, np.full(len(visor_faces), HAT), flat)
