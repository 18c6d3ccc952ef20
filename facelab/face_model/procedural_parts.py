# SPDX-License-Identifier: Apache-2.0
"""Eyes, brows, ears, mouth, clothes and glasses of the procedural head (lengths in centimetres)."""

from __future__ import annotations

import numpy as np

from facelab.face_model.curves import Array, Ids, Part, curve, grid_faces, spline
from facelab.face_model.procedural_skin import EYE_CENTRE, EYE_RADIUS, LEVELS, MOUTH_Y

GLASSES, CLOTH, MOUTH, EARRING = 3, 18, 10, 15
L_EYE, R_EYE, L_BROW, R_BROW, L_EAR, R_EAR = 4, 5, 6, 7, 8, 9
EYE_RINGS = (0.11, 0.235, 0.26, 0.36, 0.5, 0.64, 0.69, 0.85, 1.05, 1.22, 1.34, 1.44, 1.51)
PUPIL_RINGS, IRIS_RINGS = 2, 6  # rings inside the pupil and inside the iris
EYE_SEGMENTS = 20
BROW_SHAPE = (13, 5)
CLOTH_ROWS = 17
EAR_SHAPE = (12, 22)


def mirrored(part: Part, name: str, label: int) -> Part:
    """The same part on the subject's right side."""
    return Part(
        name,
        part.points * np.array([-1.0, 1.0, 1.0]),
        part.faces[:, ::-1].copy(),
        np.full(len(part.faces), label),
        part.surface * np.array([-1.0, 1.0]),
    )


def _polar_faces(rings: int, segments: int) -> Ids:
    """Disc: vertex 0 in the middle, then ``rings`` rings of ``segments`` vertices, anticlockwise seen from the front."""
    ring = 1 + grid_faces(rings, segments, wrap=True)
    step = np.arange(segments)
    fan = np.stack([np.zeros(segments, int), 1 + step, 1 + (step + 1) % segments], -1)
    return np.concatenate([fan, ring])


def eyeball() -> Part:
    """Subject's left eyeball, front half; ``surface`` is (angle, distance from the optical axis in cm)."""
    angle = 2 * np.pi * np.arange(EYE_SEGMENTS) / EYE_SEGMENTS
    radius = np.array(EYE_RINGS)[:, None]
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    z = np.sqrt(EYE_RADIUS**2 - radius**2) + 0.0 * angle
    z = z + np.where(radius < 0.66, 0.07 * (1 - (radius / 0.66) ** 2), 0.0)  # cornea
    points = np.stack([x, y, z], -1).reshape(-1, 3)
    points = np.concatenate([[[0.0, 0.0, EYE_RADIUS + 0.07]], points]) + np.array(EYE_CENTRE)
    faces = _polar_faces(len(EYE_RINGS), EYE_SEGMENTS)
    surface = np.stack([np.tile(angle, len(EYE_RINGS)), np.repeat(np.array(EYE_RINGS), EYE_SEGMENTS)], -1)
    return Part("l_eye", points, faces, np.full(len(faces), L_EYE), np.concatenate([[[0.0, 0.0]], surface]))


def drape(points_2d: Array, skin: Array, count: int = 8) -> Array:
    """(..., 2) frontal positions -> depth of the front of the skin there, by a local plane fit to its vertices."""
    front = skin[skin[:, 2] > 2.0]
    flat = points_2d.reshape(-1, 2)
    distance = ((flat[:, None] - front[None, :, :2]) ** 2).sum(-1)
    nearest = np.argpartition(distance, count, axis=1)[:, :count]
    depths = []
    for point, ids in zip(flat, nearest, strict=True):
        local = front[ids, :2] - point
        weight = np.exp(-(local**2).sum(1) / 0.15)[:, None]
        design = np.concatenate([np.ones((count, 1)), local], axis=1) * weight
        ridge = np.concatenate([design, np.diag([0.0, 0.02, 0.02])])
        target = np.concatenate([front[ids, 2] * weight[:, 0], np.zeros(3)])
        depths.append(np.linalg.lstsq(ridge, target, rcond=None)[0][0])
    return np.array(depths).reshape(points_2d.shape[:-1])


def brow(skin: Array) -> Part:
    """Subject's left eyebrow, a thin cushion on the skin; ``surface`` is (along, across) in [0, 1]."""
    along = np.linspace(0, 1, BROW_SHAPE[0])[:, None]
    across = np.linspace(0, 1, BROW_SHAPE[1])[None, :]
    middle_x = 1.30 + 4.25 * along
    middle_y = curve([(0.0, 2.55), (0.35, 2.78), (0.66, 2.92), (1.0, 2.30)], along)
    half = curve([(0.0, 0.14), (0.10, 0.28), (0.3, 0.35), (0.6, 0.29), (1.0, 0.04)], along)
    x = middle_x + 0.25 * (across - 0.5) * (1 - along)
    y = middle_y + half * (1 - 2 * across)
    height = 0.05 + 0.13 * np.sin(np.pi * across) * np.sin(np.pi * np.clip(0.08 + 0.9 * along, 0, 1)) ** 0.5
    points = np.stack([x, y, drape(np.stack([x, y + 0 * x], -1), skin) + height], -1).reshape(-1, 3)
    faces = grid_faces(*BROW_SHAPE)
    faces = faces[:, ::-1] if _faces_away(points, faces) else faces
    surface = np.stack(np.broadcast_arrays(along, across), -1).reshape(-1, 2)
    return Part("l_brow", points, faces.copy(), np.full(len(faces), L_BROW), surface)


def _faces_away(points: Array, faces: Ids) -> bool:
    a, b, c = (points[faces[:, k]] for k in range(3))
    return float(np.cross(b - a, c - a)[:, 2].mean()) < 0


def ear() -> Part:
    """Subject's left ear: concha, antihelix, rim, lobe and the back side; ``surface`` is (angle, radius)."""
    radius = np.array([0.14, 0.28, 0.42, 0.53, 0.64, 0.75, 0.85, 0.93, 0.985, 1.0, 0.9, 0.62])[:, None]
    rise = np.array([-0.5, -0.48, -0.35, 0.02, 0.3, 0.22, 0.12, 0.42, 0.42, 0.22, -0.25, -0.9])[:, None]
    angle = 2 * np.pi * (np.arange(EAR_SHAPE[1]) / EAR_SHAPE[1])[None, :]  # 0 = back, pi/2 = up, pi = front
    back, up = np.cos(angle), np.sin(angle)
    reach = 1.0 + 0.10 * np.exp(-(((angle - 1.0) / 0.6) ** 2)) - 0.16 * np.exp(-(((angle - 5.5) / 0.5) ** 2))
    a = radius * reach * back * np.where(back > 0, 2.0, 1.25)
    b = radius * reach * up * np.where(up > 0, 2.95, 3.1) - 0.25 * np.where(up < 0, back, 0.0) * radius
    lobe = np.exp(-(((angle - 4.6) / 0.55) ** 2))
    front = np.exp(-(((angle - np.pi) / 0.75) ** 2))
    height = rise * (1 - 0.65 * lobe * (radius > 0.5)) + 0.35 * front * np.exp(-(((radius - 0.55) / 0.2) ** 2))
    height = np.where(radius > 0.8, height * (1 - 0.8 * front) - 0.45 * front, height) + 0.10 * lobe
    plane = np.stack(np.broadcast_arrays(a, b, height), -1).reshape(-1, 3)
    plane = np.concatenate([[[0.0, -0.1, -0.5]], plane])
    # plane axes in head space: a points back and outwards, b up and a little back, height outwards and forward
    flare, lean = np.radians(24.0), np.radians(10.0)
    axis_a = np.array([np.sin(flare), -np.sin(lean) * np.cos(flare), -np.cos(flare)])
    axis_a /= np.linalg.norm(axis_a)
    axis_b = np.array([0.06, np.cos(lean), -np.sin(lean)])
    axis_b -= axis_a * (axis_a @ axis_b)
    axis_b /= np.linalg.norm(axis_b)
    out = np.cross(axis_b, axis_a)
    out = out if out[0] > 0 else -out
    points = plane @ np.stack([axis_a, axis_b, out]) + np.array([7.45, -0.75, -1.5])
    faces = _polar_faces(len(radius), EAR_SHAPE[1])
    normal = np.cross(points[faces[:22, 1]] - points[faces[:22, 0]], points[faces[:22, 2]] - points[faces[:22, 0]])
    faces = faces if normal[:, 0].mean() > 0 else faces[:, ::-1].copy()
    surface = np.stack(np.broadcast_arrays(angle, radius), -1).reshape(-1, 2)
    return Part("l_ear", points, faces, np.full(len(faces), L_EAR), np.concatenate([[[0.0, 0.0]], surface]))


def earring() -> Part:
    """A small ball under the subject's left ear lobe."""
    rings, segments = 5, 10
    polar = np.pi * (np.arange(rings) + 1) / (rings + 1)
    angle = 2 * np.pi * np.arange(segments) / segments
    points = np.stack(
        np.broadcast_arrays(
            np.sin(polar)[:, None] * np.cos(angle), np.cos(polar)[:, None], np.sin(polar)[:, None] * np.sin(angle)
        ),
        -1,
    ).reshape(-1, 3)
    points = 0.32 * points + np.array([8.0, -4.25, -0.75])
    faces = grid_faces(rings, segments, wrap=True)[:, ::-1].copy()
    return Part("l_earring", points, faces, np.full(len(faces), EARRING), np.zeros((len(points), 2)))


def mouth() -> Part:
    """Inside of the mouth: a dark pocket, then upper and lower teeth; ``surface[:, 1]`` is 0 dark, 1 tooth, 2 tongue."""
    pieces, kinds, faces, count = [], [], [], 0

    def add(points: Array, kind: float, rows: int, columns: int) -> None:
        nonlocal count
        triangles = grid_faces(rows, columns)
        flat = points.reshape(-1, 3)
        triangles = triangles[:, ::-1] if _faces_away(flat, triangles) else triangles
        pieces.append(flat)
        kinds.append(np.full(len(flat), kind))
        faces.append(triangles + count)
        count += len(flat)

    s, v = np.meshgrid(np.linspace(-1, 1, 13), np.linspace(1, -1, 8))
    edge = np.sqrt(1 - 0.9 * s**2)  # the pocket narrows towards the corners of the mouth
    depth = 8.35 - 0.2 * (2.0 * s) ** 2 - 3.0 * (1 - v**2) * (1 - s**2)
    pocket = np.stack([2.0 * s, MOUTH_Y + 0.9 * v * edge, depth], -1)
    add(pocket, 0.0, 8, 13)
    arc, w = np.meshgrid(np.linspace(-1, 1, 13), np.linspace(0, 1, 3))
    teeth_z = 8.72 - 0.27 * (1.75 * arc) ** 2
    add(np.stack([1.75 * arc, MOUTH_Y + 0.70 - 0.98 * w + 0.12 * arc**2, teeth_z], -1), 1.0, 3, 13)
    add(np.stack([1.6 * arc, MOUTH_Y - 0.30 - 0.5 * w, teeth_z - 0.2], -1), 1.0, 3, 13)
    tongue = np.stack([1.5 * arc, MOUTH_Y - 0.55 - 0.3 * w, 8.4 - 1.6 * (1 - w) - 0.3 * arc**2], -1)
    add(tongue, 2.0, 3, 13)
    points = np.concatenate(pieces)
    surface = np.stack([points[:, 0], np.concatenate(kinds)], -1)
    triangles = np.concatenate(faces)
    return Part("mouth", points, triangles, np.full(len(triangles), MOUTH), surface)


def cloth() -> Part:
    """Collar, shoulders and chest; ``surface`` is (angle, distance below the collar: 0 at its edge, 1 at the bottom)."""
    table = LEVELS[14:18].copy()
    table[:, 6] += np.array([0.35, 0.45, 0.5, 0.6])
    table[:, 3] += np.array([0.55, 0.55, 0.5, 0.5])
    table[:, 5] -= np.array([0.35, 0.45, 0.5, 0.5])
    table[:, :3] += np.array([0.0, 0.25, 0.35, 0.4])[:, None]
    bottom = table[-1].copy()
    bottom[:3] -= np.array([4.5, 6.5, 6.5])
    table = np.concatenate([table, bottom[None]])
    angles = np.linspace(-np.pi, np.pi, 40, endpoint=False)
    rows = np.array([0.35, 0.35, *np.linspace(0.45, 2.4, CLOTH_ROWS - 5), 2.7, 3.0, 4.0])
    points = _plain_loft(table, rows, angles)
    points[0] = points[0] * np.array([0.9, 1.0, 0.9]) - np.array([0.0, 0.45, 0.15])  # inside of the collar
    points[2:4] += 0.06 * points[2:4] * np.array([1.0, 0.0, 1.0])  # thickness of the hem
    faces = grid_faces(len(rows), len(angles), wrap=True)
    surface = np.stack(np.broadcast_arrays(angles[None, :], np.linspace(0, 1, len(rows))[:, None]), -1).reshape(-1, 2)
    return Part("cloth", points.reshape(-1, 3), faces, np.full(len(faces), CLOTH), surface)


def _plain_loft(table: Array, rows: Array, angles: Array) -> Array:
    """Loft without the crown's mirror row."""
    y_f, y_s, y_b, z_f, z_s, z_b, width, exponent = (c[:, None] for c in spline(table, rows).T)
    sine, cosine = np.abs(np.sin(angles))[None], np.cos(angles)[None]
    power = np.where(cosine >= 0, 2 / exponent, 1.0)
    reach = np.abs(cosine) ** power
    x = np.sign(np.sin(angles)) * width * sine**power
    z = z_s + np.where(cosine >= 0, z_f - z_s, z_b - z_s) * reach
    y = y_s + np.where(cosine >= 0, y_f - y_s, y_b - y_s) * reach
    return np.stack([x, y, z], -1)


def _tube(path: Array, radius: float, closed: bool, sides: int = 5) -> tuple[Array, Ids]:
    tangent = np.roll(path, -1, 0) - np.roll(path, 1, 0)
    if not closed:
        tangent[0], tangent[-1] = path[1] - path[0], path[-1] - path[-2]
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    reference = np.where(np.abs(tangent[:, 2:]) > 0.8, [[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]])
    first = np.cross(tangent, reference)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second = np.cross(tangent, first)
    angle = 2 * np.pi * np.arange(sides) / sides
    points = path[:, None] + radius * (
        first[:, None] * np.cos(angle)[:, None] + second[:, None] * np.sin(angle)[:, None]
    )
    faces = grid_faces(len(path) + int(closed), sides, wrap=True)
    return points.reshape(-1, 3), faces % (len(path) * sides)


def glasses() -> tuple[Part, Part]:
    """Frame (two rims, bridge, temples) and the two lenses; ``surface[:, 0]`` is 0."""
    angle = 2 * np.pi * np.arange(28) / 28
    pieces, faces, lenses, lens_faces, count, lens_count = [], [], [], [], 0, 0

    def add(points: Array, triangles: Ids) -> None:
        nonlocal count
        pieces.append(points)
        faces.append(triangles + count)
        count += len(points)

    for side in (1.0, -1.0):
        c, s = np.cos(angle), np.sin(angle)
        x = 3.25 + 2.45 * np.sign(c) * np.abs(c) ** 0.8
        rim = np.stack([side * x, 0.45 + 1.85 * np.sign(s) * np.abs(s) ** 0.8, 10.25 - 0.045 * x**2], -1)
        add(*_tube(rim, 0.14, closed=True))
        arm = np.array([[5.65, 1.1, 8.85], [6.7, 1.1, 7.6], [7.75, 1.0, 4.0], [7.95, 0.9, 0.5], [7.6, 0.4, -2.2]])
        add(*_tube(arm * np.array([side, 1, 1]), 0.14, closed=False))
        lenses.append(np.concatenate([rim.mean(0, keepdims=True), rim]))
        step = np.arange(28)
        fan = np.stack([np.zeros(28, int), 1 + step, 1 + (step + 1) % 28], -1)
        lens_faces.append((fan if side > 0 else fan[:, ::-1]) + lens_count)
        lens_count += 29
    bridge = np.array(
        [[0.86, 0.85, 10.2], [0.4, 1.1, 10.45], [0.0, 1.15, 10.5], [-0.4, 1.1, 10.45], [-0.86, 0.85, 10.2]]
    )
    add(*_tube(bridge, 0.14, closed=False))
    frame_faces, shade_faces = np.concatenate(faces), np.concatenate(lens_faces)
    frame, shade = np.concatenate(pieces), np.concatenate(lenses)
    return (
        Part("glasses", frame, frame_faces, np.full(len(frame_faces), GLASSES), np.zeros((len(frame), 2))),
        Part("lenses", shade, shade_faces, np.full(len(shade_faces), GLASSES), np.zeros((len(shade), 2))),
    )


__all__ = ["brow", "cloth", "ear", "earring", "eyeball", "glasses", "mirrored", "mouth"]
