# SPDX-License-Identifier: Apache-2.0
"""Skin of the procedural head: skull, face, neck and upper chest as one lofted grid with slits for eyes and mouth.

Lengths in centimetres, proportions of an adult head (22.5 high without hair). Rows run from the crown
down the face, around the jaw to the chest, columns around the head starting at the middle of the face.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from facelab.face_model.curves import Array, Part, bump, curve, grid_faces, smooth_max, smoothstep, spline

EYE_CENTRE = (3.2, 0.72, 6.95)  # of the subject's left eyeball
EYE_RADIUS = 1.55
EYE_CORNERS = (1.65, 4.75)  # x of inner and outer corner
MOUTH_Y = -6.1
MOUTH_HALF_WIDTH = 2.55
SKIN, NOSE, UPPER_LIP, LOWER_LIP, NECK = 1, 2, 11, 12, 17

# One line per anatomical level: height at front, side and back; depth at front, side and back; half width;
# exponent of the front half of the cross-section (2 = ellipse, more = flatter face).
LEVELS = np.array(
    [
        # yF      yS     yB     zF    zS    zB     W     p
        [11.90, 11.90, 11.90, -1.0, -1.0, -1.0, 0.00, 2.0],  # 0 crown
        [11.42, 11.42, 11.42, 2.5, -1.0, -4.1, 2.75, 2.0],  # 1
        [10.18, 10.18, 10.10, 5.5, -1.1, -7.0, 5.10, 2.0],  # 2
        [8.25, 8.25, 8.00, 7.75, -1.2, -9.0, 6.80, 2.1],  # 3 hairline
        [5.60, 5.60, 5.20, 8.95, -1.3, -10.1, 7.55, 2.25],  # 4 forehead
        [2.70, 2.70, 2.20, 9.25, -1.4, -10.2, 7.45, 2.35],  # 5 brow
        [0.70, 0.70, 0.00, 8.75, -1.4, -9.6, 7.15, 2.35],  # 6 eye
        [-3.70, -3.00, -3.50, 8.85, -1.3, -7.6, 6.65, 2.15],  # 7 nose base
        [-6.10, -4.70, -5.60, 8.75, -1.0, -6.6, 6.00, 2.0],  # 8 mouth
        [-7.75, -5.70, -6.80, 8.30, -0.8, -6.2, 5.50, 2.0],  # 9 below the lips
        [-9.25, -6.55, -7.80, 8.35, -0.8, -6.0, 5.08, 2.05],  # 10 chin
        [-10.55, -7.30, -8.60, 7.45, -1.0, -5.9, 4.75, 2.1],  # 11 jaw line
        [-10.95, -8.20, -9.40, 5.60, -1.2, -5.8, 4.60, 2.1],  # 12 under the jaw
        [-11.15, -9.30, -10.2, 3.90, -1.6, -5.8, 4.65, 2.1],  # 13 throat
        [-12.30, -10.9, -11.1, 3.30, -1.9, -6.1, 5.00, 2.1],  # 14 neck
        [-13.90, -12.4, -12.2, 3.50, -2.2, -6.7, 6.30, 2.1],  # 15 neck base
        [-16.00, -13.9, -13.6, 4.60, -2.3, -7.5, 10.5, 2.2],  # 16 collar bone
        [-20.00, -16.8, -16.8, 6.20, -2.3, -8.0, 16.5, 2.3],  # 17 chest
    ]
)
ROWS = np.array(
    [0.25, 0.7, 1.2, 1.7, 2.2, 2.6, 3.0, 3.4, 3.75, 4.05, 4.35, 4.6, 4.8, 4.95, 5.1, 5.25, 5.4, 5.53, 5.65, 5.76, 5.86]
    + [5.94, 6.0, 6.035, 6.07, 6.11, 6.16, 6.22, 6.29, 6.37, 6.45, 6.53, 6.6, 6.66, 6.72, 6.77, 6.82, 6.87, 6.91, 6.95]
    + [7.0, 7.07, 7.16, 7.27, 7.4, 7.55, 7.69, 7.77, 7.85, 7.93, 8.0, 8.12, 8.26, 8.42, 8.6, 8.76, 8.95, 9.2, 9.5]
    + [9.8, 10.1, 10.4, 10.7, 11.0, 11.3, 11.6, 12.0, 12.5, 13.0, 13.5, 14.0, 14.5, 15.0, 15.5, 16.0, 16.5, 17.0]
)
EYE_ROW = int(np.argmin(np.abs(ROWS - 6.0)))
MOUTH_ROW = int(np.argmin(np.abs(ROWS - 8.0)))
LIP_TOP_ROW = int(np.argmin(np.abs(ROWS - 7.69)))
LIP_BOTTOM_ROW = int(np.argmin(np.abs(ROWS - 8.6)))
JAW_ROW = int(np.argmin(np.abs(ROWS - 11.3)))
EYE_LEVEL_X = np.array(
    [0.33, 0.66, 0.99, 1.32, *np.linspace(*EYE_CORNERS, 11), 5.15, 5.55, 5.95, 6.3, 6.6, 6.85, 7.03, 7.12, 7.15]
)
BACK_ANGLES = np.array([100.0, 112, 125, 139, 153, 167])
EYE_COLUMNS = (5, 15)  # columns of the eye corners on the left (+x) side
MOUTH_COLUMN = 9  # column of the left mouth corner


@dataclass(frozen=True)
class SkinGrid:
    """Where the rows and columns of the skin ended up.

    Attributes:
        part: the mesh.
        rows, columns: size of the regular grid; vertex ``row * columns + column``, the crown pole comes after it.
        lower: lower copies of slit vertices: (``l_eye`` | ``r_eye`` | ``mouth``) -> (columns, vertex ids).
    """

    part: Part
    rows: int
    columns: int
    lower: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]

    def vertex(self, row: int, column: int) -> int:
        """Vertex id; negative columns are on the subject's right side."""
        return row * self.columns + column % self.columns


def column_angles() -> Array:
    """(C,) angles around the head in radians: 0 = middle of the face, positive to the subject's left."""
    width, exponent = LEVELS[6, 6], LEVELS[6, 7]
    front = np.arcsin(np.minimum(EYE_LEVEL_X / width, 1.0) ** (exponent / 2))
    half = np.concatenate([front, np.radians(BACK_ANGLES)])
    return np.concatenate([[0.0], half, [np.pi], -half[::-1]])


def loft(rows: Array, angles: Array, levels: Array = LEVELS) -> Array:
    """Smooth head without features: (R,) level numbers x (C,) angles -> (R, C, 3)."""
    y_f, y_s, y_b, z_f, z_s, z_b, width, exponent = (c[:, None] for c in _level(rows, levels).T)
    sine, cosine = np.abs(np.sin(angles))[None], np.cos(angles)[None]
    front = cosine >= 0
    power = np.where(front, 2 / exponent, 1.0)
    x = np.sign(np.sin(angles)) * width * sine**power
    reach = np.abs(cosine) ** power
    z = z_s + np.where(front, z_f - z_s, z_b - z_s) * reach
    y = np.where(front, y_s + (y_f - y_s) * reach, y_s + (y_b - y_s) * reach)
    return np.stack([x, y, z], axis=-1)


def _level(rows: Array, levels: Array) -> Array:
    mirrored = levels[1].copy()  # continue over the crown to the other side, so that the top is round
    mirrored[[3, 5]] = levels[1][[5, 3]]
    mirrored[6] = -levels[1][6]
    return spline(np.concatenate([mirrored[None], levels]), np.asarray(rows) + 1)


def build_skin() -> SkinGrid:
    """The skin at rest: neutral expression, mean identity."""
    angles = column_angles()
    grid = loft(ROWS, angles)
    rows, columns = grid.shape[:2]
    points = np.concatenate([grid.reshape(-1, 3), [[0.0, LEVELS[0, 0] + 0.02, LEVELS[0, 3]]]])
    row_of = np.append(np.repeat(np.arange(rows), columns), 0)
    faces = grid_faces(rows, columns, wrap=True)
    cap = np.arange(columns)
    faces = np.concatenate([faces, np.stack([np.full(columns, rows * columns), cap, (cap + 1) % columns], -1)])
    points, faces, row_of, column_of, lower, is_lower = _cut_slits(points, faces, row_of, rows, columns)
    front = smoothstep(0.5, 3.0, points[:, 2])
    points = _lips(points, row_of, is_lower["mouth"], front)
    points = _relief(points, front)
    points = _nose(points, front)
    points = _lids(points, row_of, is_lower["eye"], front)
    points = _smooth_corners(points, faces, row_of, column_of)
    surface = np.stack([angles[column_of], row_of.astype(float)], axis=-1)
    labels = _labels(points, faces, row_of, rows, columns)
    return SkinGrid(Part("skin", points, faces, labels, surface), rows, columns, lower)


def _cut_slits(points: Array, faces: NDArray[np.int64], row_of: NDArray[np.int64], rows: int, columns: int):
    """Double the vertices along eyes and mouth; triangles below a slit use the lower copy."""
    spans = {
        "l_eye": (EYE_ROW, np.arange(EYE_COLUMNS[0] + 1, EYE_COLUMNS[1])),
        "r_eye": (EYE_ROW, columns - np.arange(EYE_COLUMNS[0] + 1, EYE_COLUMNS[1])),
        "mouth": (MOUTH_ROW, np.arange(-MOUTH_COLUMN + 1, MOUTH_COLUMN) % columns),
    }
    faces = faces.copy()
    below = row_of[faces].max(axis=1)
    lower, count = {}, len(points)
    copies, copy_rows, copy_columns = [points], [row_of], [np.append(np.tile(np.arange(columns), rows), 0)]
    flags = {"eye": np.zeros(count, bool), "mouth": np.zeros(count, bool)}
    for name, (row, span) in spans.items():
        upper_ids = row * columns + span
        new_ids = count + np.arange(len(span))
        lookup = np.arange(count + len(span))
        lookup[upper_ids] = new_ids
        under = (below == row + 1) & (faces < rows * columns).all(axis=1)
        faces[under] = lookup[faces[under]]
        copies.append(points[upper_ids])
        copy_rows.append(np.full(len(span), row))
        copy_columns.append(span)
        for key in flags:
            flags[key] = np.append(flags[key], np.full(len(span), key in name))
        lower[name] = (span, new_ids)
        count += len(span)
    return np.concatenate(copies), faces, np.concatenate(copy_rows), np.concatenate(copy_columns), lower, flags


def _lips(points: Array, row_of: NDArray[np.int64], is_lower: NDArray[np.bool_], front: Array) -> Array:
    """Shape of the vermilion: outline with cupid's bow, volume, and a closed line between the lips."""
    x = np.abs(points[:, 0])
    t = np.clip(x / MOUTH_HALF_WIDTH, 0, 1)
    rest = spline(LEVELS[:, :1], ROWS)[row_of, 0]  # height of the row in the middle of the face
    line = MOUTH_Y + 0.10 * t**2 - 0.05 * np.exp(-((x / 0.35) ** 2))
    top = line + (0.80 - 0.10 * np.exp(-((x / 0.28) ** 2)) + 0.06 * np.exp(-(((x - 0.6) / 0.35) ** 2))) * (1 - t**2.2)
    bottom = line - 0.98 * np.sqrt(np.maximum(1 - t**2.4, 0.0))
    lower = (row_of > MOUTH_ROW) | is_lower
    rest_top, rest_bottom = spline(LEVELS[:, :1], ROWS[[LIP_TOP_ROW, LIP_BOTTOM_ROW]])[:, 0]
    edge = np.where(lower, bottom, top)
    edge_rest = np.where(lower, rest_bottom, rest_top)
    inside = np.clip((rest - MOUTH_Y) / (edge_rest - MOUTH_Y), 0, 1)
    beyond = np.maximum(np.abs(rest - MOUTH_Y) - np.abs(edge_rest - MOUTH_Y), 0)
    target = np.where(beyond > 0, rest + (edge - edge_rest) * np.exp(-beyond / 0.8), line + (edge - line) * inside)
    pull = front * np.exp(-np.maximum(x - MOUTH_HALF_WIDTH, 0) / 0.7) * smoothstep(3.6, 2.0, np.abs(rest - MOUTH_Y))
    points = points.copy()
    points[:, 1] += pull * (target - rest)
    on_lip = (beyond <= 0) & (x < MOUTH_HALF_WIDTH + 0.4)
    profile = np.sin(np.pi * np.clip(inside, 0, 1) ** 0.8) * np.where(lower, 0.42, 0.34) - 0.30 * np.exp(-inside / 0.12)
    points[:, 2] += front * on_lip * profile * (1 - t**3)
    return points


def _relief(points: Array, front: Array) -> Array:
    """Brow ridge, eye sockets, cheeks, muzzle, chin and the like: gentle hills and hollows."""
    hills = [  # centre, sigma, push along (outwards x, y, z)
        ((2.6, 2.75), (1.7, 0.55), (0.0, 0.0, 0.40)),  # brow ridge
        ((0.0, 2.6), (1.0, 0.7), (0.0, 0.0, 0.20)),  # glabella
        ((3.1, 0.75), (1.55, 0.95), (0.0, 0.0, -1.00)),  # socket
        ((1.7, 0.9), (0.55, 0.8), (0.0, 0.0, -0.45)),  # inner corner
        ((4.7, -1.5), (1.6, 1.15), (0.30, 0.0, 0.50)),  # cheek bone
        ((2.9, -2.6), (1.2, 1.3), (0.0, 0.0, 0.22)),  # front of the cheek
        ((4.6, -5.4), (1.4, 1.7), (-0.12, 0.0, -0.30)),  # hollow below it
        ((0.0, -5.6), (2.2, 1.5), (0.0, 0.0, 0.55)),  # muzzle
        ((0.0, -4.5), (0.22, 0.55), (0.0, 0.0, -0.13)),  # philtrum
        ((2.75, -6.0), (0.35, 0.5), (0.0, 0.0, -0.22)),  # mouth corner
        ((0.0, -7.75), (1.5, 0.42), (0.0, 0.0, -0.30)),  # groove below the lips
        ((0.0, -9.2), (1.35, 0.85), (0.0, 0.0, 0.55)),  # chin
        ((6.3, 3.6), (1.1, 1.7), (-0.18, 0.0, -0.1)),  # temple
        ((0.0, 6.0), (3.0, 2.0), (0.0, 0.0, 0.12)),  # forehead
    ]
    points = points.copy()
    base = points.copy()
    for centre, sigma, push in hills:
        weight = bump(base, centre, sigma) * front
        side = np.tanh(points[:, 0])
        points += weight[:, None] * np.stack(
            [side * push[0], np.full_like(side, push[1]), np.full_like(side, push[2])], -1
        )
    fold = np.abs(
        np.abs(base[:, 0]) - (1.75 + 0.32 * (-3.0 - base[:, 1]))
    )  # nasolabial fold, from wing to mouth corner
    points[:, 2] -= (
        0.13
        * front
        * np.exp(-((fold / 0.3) ** 2))
        * smoothstep(-6.2, -5.2, base[:, 1])
        * smoothstep(-2.4, -3.2, base[:, 1])
    )
    return points


def nose_ridge(y: Array) -> Array:
    """Depth of the nose along the middle of the face, by height."""
    knots = [(-4.1, 0.0), (-3.72, 0.35), (-3.5, 0.95), (-3.25, 1.85), (-2.95, 2.45), (-2.6, 2.62), (-2.2, 2.45)]
    knots += [(-1.2, 1.75), (0.0, 1.05), (0.9, 0.62), (1.8, 0.35), (3.0, 0.0)]
    return curve(knots, y)


def _nose(points: Array, front: Array) -> Array:
    """Bridge, tip, wings and the steep underside, raised from the face along z."""
    x, y = np.abs(points[:, 0]), points[:, 1]
    half = curve([(-4.0, 1.5), (-3.2, 1.22), (-2.5, 1.15), (-1.2, 0.92), (0.2, 0.78), (1.2, 0.8), (2.5, 1.3)], y)
    body = nose_ridge(y) * np.exp(-((x / half) ** 2.3))
    wing = 1.28 * np.exp(-(np.abs((x - 1.20) / 0.50) ** 2.6) - np.abs((y + 3.02) / 0.56) ** 2.6)
    lift = smooth_max(body, wing, 0.22) - 0.5 * 0.22 * np.exp(-(body + wing) * 3)
    crease = bump(points, (1.78, -2.95), (0.16, 0.55)) * 0.16
    points = points.copy()
    points[:, 2] += front * (np.where(body + wing > 1e-3, lift, 0.0) - crease)
    nostril = bump(points, (0.68, -3.5), (0.33, 0.22))
    points[:, 2] -= front * nostril * 0.30
    points[:, 1] += front * nostril * 0.16
    points[:, 1] -= front * 0.10 * bump(points, (0.0, -3.1), (0.45, 0.35))
    return points


def lid_openings(t: Array) -> tuple[Array, Array]:
    """Height of the upper and depth of the lower lid edge in cm; t = 0 at the inner, 1 at the outer corner."""
    t = np.clip(t, 0, 1)
    upper = 0.48 * np.sin(np.pi * t**0.88) ** 0.75
    lower = 0.34 * np.sin(np.pi * t**1.15) ** 0.85
    return upper, lower


def _lids(points: Array, row_of: NDArray[np.int64], is_lower: NDArray[np.bool_], front: Array) -> Array:
    """Open the eye slits and drape the lids over the eyeballs."""
    x = np.abs(points[:, 0])
    t = (x - EYE_CORNERS[0]) / (EYE_CORNERS[1] - EYE_CORNERS[0])
    upper, lower = lid_openings(t)
    tilt = 0.14 * (np.clip(t, -0.3, 1.3) - 0.4)
    rest = 0.7 - points[:, 1]  # positive below the slit
    below = (row_of > EYE_ROW) | is_lower
    near = np.exp(-np.maximum(np.maximum(EYE_CORNERS[0] - x, x - EYE_CORNERS[1]), 0) / 0.35)
    move = np.where(below, -lower * np.exp(-np.maximum(rest, 0) / 0.8), upper * np.exp(-np.maximum(-rest, 0) / 0.85))
    points = points.copy()
    points[:, 1] += front * near * (move + tilt * np.exp(-np.abs(rest) / 1.2))
    offset = np.stack([x - EYE_CENTRE[0], points[:, 1] - EYE_CENTRE[1]], -1)
    distance2 = (offset**2).sum(-1)
    thick = EYE_RADIUS + 0.13
    sphere = EYE_CENTRE[2] + np.sqrt(np.maximum(thick**2 - distance2, 0.0))
    drape = smooth_max(points[:, 2], sphere, 0.18)
    on_edge = (row_of == EYE_ROW) & (t > -0.02) & (t < 1.02)
    drape = np.where(on_edge, np.maximum(sphere - 0.02, points[:, 2] * 0 + sphere - 0.02), drape)
    inside = (distance2 < (thick * 0.995) ** 2) & (front > 0.5)
    points[:, 2] = np.where(inside, drape, points[:, 2])
    fold = np.exp(-(((points[:, 1] - (EYE_CENTRE[1] + upper + 0.30)) / 0.09) ** 2))  # crease of the upper lid
    points[:, 2] -= front * 0.10 * fold * ((t > 0.02) & (t < 0.98)) * (row_of < EYE_ROW)
    return points


def _smooth_corners(
    points: Array, faces: NDArray[np.int64], row_of: NDArray[np.int64], column_of: NDArray[np.int64]
) -> Array:
    """Even out the skin beside and around the eyes, where lid and socket surfaces meet; lid edges stay."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    edges = np.unique(np.concatenate([edges, edges[:, ::-1]]), axis=0)
    same_row, same_column = (of[edges[:, 0]] == of[edges[:, 1]] for of in (row_of, column_of))
    edges = edges[same_row | same_column]  # no diagonals: they lean to one side
    degree = np.bincount(edges[:, 0], minlength=len(points))[:, None].clip(1)
    around = np.maximum(bump(points, (4.95, 0.7), (0.75, 0.85)), 0.35 * bump(points, (3.2, 0.7), (1.6, 1.3)))
    x = np.abs(points[:, 0])
    on_edge = (row_of == EYE_ROW) & (x > EYE_CORNERS[0] - 0.05) & (x < EYE_CORNERS[1] + 0.05)
    weight = (around * (points[:, 2] > 0) * ~on_edge)[:, None]
    for _ in range(8):
        total = np.zeros_like(points)
        np.add.at(total, edges[:, 0], points[edges[:, 1]])
        points = points + 0.6 * weight * (total / degree - points)
    offset2 = (np.abs(points[:, 0]) - EYE_CENTRE[0]) ** 2 + (points[:, 1] - EYE_CENTRE[1]) ** 2
    floor = EYE_CENTRE[2] + np.sqrt(np.maximum((EYE_RADIUS + 0.15) ** 2 - offset2, 0.0))
    near = (offset2 < EYE_RADIUS**2) & (points[:, 2] > 4)
    points[:, 2] = np.where(near, np.maximum(points[:, 2], floor), points[:, 2])
    return points


def _labels(
    points: Array, faces: NDArray[np.int64], row_of: NDArray[np.int64], rows: int, columns: int
) -> NDArray[np.int64]:
    centre = points[faces].mean(axis=1)
    top = row_of[faces].min(axis=1)
    x, y, z = np.abs(centre[:, 0]), centre[:, 1], centre[:, 2]
    labels = np.full(len(faces), SKIN)
    outline = curve([(-3.85, 0.7), (-3.6, 1.4), (-3.2, 1.82), (-2.7, 1.82), (-1.9, 1.25), (-0.5, 0.85), (1.4, 0.7)], y)
    labels[(z > 5) & (y < 1.5) & (y > -3.85) & (x < outline)] = NOSE
    lip = (x < MOUTH_HALF_WIDTH) & (z > 4)
    labels[lip & (top >= LIP_TOP_ROW) & (top < MOUTH_ROW)] = UPPER_LIP
    labels[lip & (top >= MOUTH_ROW) & (top < LIP_BOTTOM_ROW)] = LOWER_LIP
    labels[top >= JAW_ROW] = NECK
    labels[(top == 0) & (faces >= rows * columns).any(axis=1) & (y > 11)] = SKIN
    return labels
