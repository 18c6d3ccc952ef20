# SPDX-License-Identifier: Apache-2.0
"""The procedural head: sizes, labels, sides, landmarks, and that each coefficient does what its name says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from facelab.cameras.camera import Camera
from facelab.data.classes import CLASSES
from facelab.face_model import ProceduralHead
from facelab.face_model.curves import curve, grid_faces, spline
from facelab.face_model.landmarks import GROUPS, mirror_order
from facelab.face_model.procedural import UNIT
from facelab.mesh import rasterize, vertex_normals

MODEL = ProceduralHead.create()
REST = MODEL.vertices(torch.zeros(1, MODEL.identity_dim), torch.zeros(1, MODEL.expression_dim))
BARE = dict.fromkeys(("hair", "hat", "visor", "glasses", "sunglasses", "earrings"), torch.tensor([False]))


def with_expression(**values: float) -> torch.Tensor:
    """Vertices of the mean head with some expression coefficients, in centimetres."""
    coefficients = torch.zeros(1, MODEL.expression_dim)
    for name, value in values.items():
        coefficients[0, MODEL.expression_names.index(name)] = value
    return MODEL.vertices(torch.zeros(1, MODEL.identity_dim), coefficients)[0] / UNIT


def with_identity(**values: float) -> torch.Tensor:
    coefficients = torch.zeros(1, MODEL.identity_dim)
    for name, value in values.items():
        coefficients[0, MODEL.identity_names.index(name)] = value
    return MODEL.vertices(coefficients)[0] / UNIT


def test_sizes() -> None:
    assert 5_000 <= len(MODEL.mean_shape) <= 10_000
    assert MODEL.identity_dim >= 40 and MODEL.expression_dim >= 20 and MODEL.albedo_dim >= 20
    assert len(MODEL.identity_names) == MODEL.identity_dim == len(set(MODEL.identity_names))
    assert MODEL.faces.min() == 0 and MODEL.faces.max() == len(MODEL.mean_shape) - 1
    assert torch.isfinite(MODEL.identity_basis).all() and torch.isfinite(MODEL.expression_basis).all()


def test_no_coefficient_is_idle() -> None:
    for basis in (MODEL.identity_basis, MODEL.expression_basis, MODEL.albedo_basis):
        assert (basis.abs().amax(dim=(1, 2)) > 1e-4).all()


def test_labels_present() -> None:
    present = {CLASSES[i] for i in MODEL.face_labels.unique().tolist()}
    assert present == set(CLASSES) - {"background", "neck_l"}


def test_left_is_the_subjects_left() -> None:
    """l_ classes are at positive x, the right side of a frontal picture, as in CelebAMask-HQ."""
    centre = MODEL.mean_shape[MODEL.faces].mean(dim=1)
    for left, right in (("l_eye", "r_eye"), ("l_brow", "r_brow"), ("l_ear", "r_ear")):
        assert (centre[MODEL.face_labels == CLASSES.index(left), 0] > 0).all()
        assert (centre[MODEL.face_labels == CLASSES.index(right), 0] < 0).all()
    camera = Camera.on_sphere(math.pi / 2, math.pi / 2, 12)
    seen = rasterize(MODEL.hide(REST, BARE), MODEL.faces, camera, 64, "corners")
    labels = torch.where(seen.hit, MODEL.face_labels[seen.face.clamp(min=0)], 0)[0]
    columns = (labels == CLASSES.index("l_eye")).nonzero()[:, 1]
    assert len(columns) > 3 and columns.float().mean() > 32


def test_mirror_symmetry() -> None:
    """The mean head without its parting is symmetric; so is every symmetric coefficient."""
    skin = MODEL.part == MODEL.part_names.index("skin")
    points = MODEL.mean_shape[skin] / UNIT
    mirrored = points * torch.tensor([-1.0, 1, 1])
    assert torch.cdist(mirrored, points).min(dim=1).values.max() < 0.02


def test_front_faces_outwards() -> None:
    """Most visible triangles are anticlockwise, so normals point to the camera."""
    normals = vertex_normals(REST, MODEL.faces)[0]
    for name, axis in (("skin", 2), ("l_eye", 2), ("hair", 1), ("cloth", 2), ("mouth", 2)):
        part = MODEL.part == MODEL.part_names.index(name)
        front = part & (MODEL.mean_shape[:, 2] > 0.02) if axis == 2 else part & (MODEL.mean_shape[:, 1] > 0.07)
        assert normals[front, axis].mean() > 0.2, name


def test_landmarks_in_order() -> None:
    points = MODEL.landmark_positions(REST)[0] / UNIT
    assert len(set(MODEL.landmarks.tolist())) == 68
    mirrored = points[torch.from_numpy(mirror_order())] * torch.tensor([-1.0, 1, 1])
    assert (mirrored - points).norm(dim=-1).max() < 0.25
    contour = points[slice(*GROUPS["contour"][:2])]
    assert (contour[1:, 0] > contour[:-1, 0]).all() and contour[:, 1].argmin() == 8
    assert points[27, 1] > points[28, 1] > points[29, 1] > points[30, 1] > points[33, 1]
    assert points[30, 2] == points.amax(dim=0)[2]  # tip of the nose
    assert points[37, 1] > points[41, 1] and points[44, 1] > points[46, 1]  # upper above lower lids
    assert points[51, 1] > points[62, 1] >= points[66, 1] > points[57, 1]  # lips from top to bottom
    for first, last, _ in GROUPS.values():
        assert first < last
    assert sum(last - first for first, last, _ in GROUPS.values()) == 68


def test_expressions_do_what_they_say() -> None:
    rest = with_expression()
    landmark = MODEL.landmarks
    opened = with_expression(jaw_open=2.0)
    assert opened[landmark[66], 1] < rest[landmark[66], 1] - 1.0  # lower lip falls by more than a centimetre
    assert torch.allclose(opened[landmark[62]], rest[landmark[62]], atol=0.05)  # the upper lip stays
    smile = with_expression(smile=1.5)
    for corner, side in ((48, -1), (54, 1)):
        assert (smile - rest)[landmark[corner], 1] > 0.3 and side * (smile - rest)[landmark[corner], 0] > 0.3
    blink = with_expression(blink_left=1.0)
    gap = rest[landmark[43], 1] - rest[landmark[47], 1]
    assert gap > 0.5
    assert (blink[landmark[43], 1] - blink[landmark[47], 1]).abs() < 0.15 * gap
    assert torch.allclose(blink[landmark[37]], rest[landmark[37]])  # the other eye stays open
    raised = with_expression(brow_inner_up=1.0, brow_outer_up=1.0)
    assert ((raised - rest)[landmark[17:27], 1] > 0.1).all()


def test_closed_lids_cover_the_eyeball() -> None:
    camera = Camera.on_sphere(math.pi / 2, math.pi / 2, 6)
    areas = []
    for blink in (0.0, 1.0):
        vertices = with_expression(blink_left=blink, blink_right=blink)[None] * UNIT
        seen = rasterize(MODEL.hide(vertices, BARE), MODEL.faces, camera, 128, "corners")
        labels = torch.where(seen.hit, MODEL.face_labels[seen.face.clamp(min=0)], 0)
        areas.append(((labels == 4) | (labels == 5)).sum().item())
    assert areas[0] > 200 and areas[1] < 0.08 * areas[0], areas


def test_identity_does_what_it_says() -> None:
    rest, landmark = with_identity(), MODEL.landmarks
    wide = with_identity(jaw_width=2.0)
    assert wide[landmark[13], 0] > rest[landmark[13], 0] + 0.3
    nose = with_identity(nose_forward=2.0)
    assert nose[landmark[30], 2] > rest[landmark[30], 2] + 0.4
    eyes = with_identity(eye_distance=1.0)
    assert eyes[landmark[42], 0] > rest[landmark[42], 0] + 0.1
    hair = MODEL.part == MODEL.part_names.index("hair")
    assert with_identity(hair_long=1.0)[hair, 1].min() < rest[hair, 1].min() - 5
    assert torch.equal(with_identity(hair_long=1.0)[~hair], rest[~hair])


def test_hidden_parts_cover_no_pixel() -> None:
    camera = Camera.on_sphere(math.pi / 2, math.pi / 2, 12)
    found = {}
    for name in BARE:
        shown = BARE | {name: torch.tensor([True])}
        seen = rasterize(MODEL.hide(REST, shown), MODEL.faces, camera, 96, "corners")
        found[name] = set(torch.where(seen.hit, MODEL.face_labels[seen.face.clamp(min=0)], 0).unique().tolist())
    assert {13, 14, 3, 15} & found["hair"] == {13} and {13, 14, 3, 15} & found["hat"] == {14}
    assert {13, 14, 3, 15} & found["glasses"] == {3} and {13, 14, 3, 15} & found["earrings"] == {15}


def test_wrong_width() -> None:
    with pytest.raises(ValueError, match="identity coefficients must be"):
        MODEL.vertices(torch.zeros(1, 3))


def test_curves() -> None:
    table = np.array([[0.0], [1.0], [4.0]])
    assert spline(table, np.array([0.0, 1.0, 2.0]))[:, 0] == pytest.approx([0.0, 1.0, 4.0])
    knots = [(0.0, 0.0), (1.0, 1.0), (2.0, 1.0), (3.0, 5.0)]
    values = curve(knots, np.linspace(-1, 4, 200))
    assert values.min() == 0 and values.max() == 5 and (np.diff(values) >= -1e-12).all()
    assert len(grid_faces(3, 4)) == 12 and len(grid_faces(3, 4, wrap=True)) == 16
