# SPDX-License-Identifier: Apache-2.0
"""The picture that shows what was found: boxes and points in the photo; head, points and axes in the crop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from facelab.data.preprocess.crop import CropPlan
from facelab.data.preprocess.faces import Face
from facelab.data.preprocess.head_points import to_scene
from facelab.data.preprocess.labels import Array, label
from facelab.data.preprocess.pose import project

PANEL = 640  # pixels a side
STRENGTH = 0.55  # of the head over the crop
FACE_CLASSES = (1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12)  # no hair, hat, glasses, neck, clothes: a photo has its own
AXIS = 0.35  # length of the drawn axes in scene units
AXES = {"x": (255, 70, 60), "y": (60, 220, 80), "z": (70, 130, 255)}
CHOSEN, OTHER, POINT = (60, 230, 90), (240, 200, 40), (255, 40, 200)
GO, NO_GO = (20, 110, 40), (150, 25, 25)
BAR, TEXT = 26, 15  # pixels of a line below the panels and of its letters


def draw_overlay(
    photo: Image.Image,
    faces: Sequence[Face],
    chosen: Face | None,
    plan: CropPlan | None,
    crop: Image.Image | None,
    pose: Array | None,
    lines: Sequence[str],
    go: bool,
) -> Image.Image:
    """Photo and crop side by side over the verdict.

    Args:
        photo: as found, RGB.
        faces: all faces, largest first; they are numbered from 1.
        chosen, plan, crop, pose: the face that was prepared, or None for each; ``pose`` is (4, 4).
        lines: the verdict and its reasons.
        go: colour of the bar.
    """
    panels = [_photo_panel(photo, faces, chosen, plan)]
    if crop is not None and pose is not None and plan is not None and chosen is not None:
        panels.append(_crop_panel(crop, plan, chosen, pose))
    width = PANEL * len(panels)
    lines = [part for line in lines for part in wrapped(line, width - 16)]
    result = Image.new("RGB", (width, PANEL + BAR * len(lines)), GO if go else NO_GO)
    for k, panel in enumerate(panels):
        result.paste(panel, (PANEL * k, 0))
    pen = ImageDraw.Draw(result)
    for k, line in enumerate(lines):
        pen.text((8, PANEL + BAR * k + 4), line, fill=(255, 255, 255), font=ImageFont.load_default(TEXT))
    return result


def wrapped(line: str, width: int) -> list[str]:
    """A line of the verdict as lines of at most ``width`` pixels, broken between words."""
    font, rows = ImageFont.load_default(TEXT), [""]
    for word in line.split():
        longer = f"{rows[-1]} {word}".strip()
        if rows[-1] and font.getlength(longer) > width:
            rows.append(word)
        else:
            rows[-1] = longer
    return rows


def draw_head(crop: Image.Image, pose: Array) -> Image.Image:
    """The procedural head's face, seen from ``pose`` (4, 4), laid over the crop."""
    import torch

    from facelab.cameras.camera import Camera
    from facelab.mesh.normals import vertex_normals
    from facelab.mesh.rasterize import interpolate, rasterize

    size = crop.size[0]
    vertices, faces = _head()
    camera = Camera.from_label(torch.from_numpy(label(pose)).float()[None])
    seen = rasterize(vertices, faces, camera, size)
    normal = torch.nn.functional.normalize(interpolate(vertex_normals(vertices, faces), faces, seen), dim=-1)
    light = (normal @ -camera.cam2world[0, :3, 2]).abs()[0].clamp(0, 1).numpy()
    hit = seen.hit[0].numpy()
    base = np.asarray(crop, dtype=np.float32)
    head = (light[..., None] ** 1.5) * np.array([120.0, 210.0, 255.0], dtype=np.float32)
    mixed = np.where(hit[..., None], (1 - STRENGTH) * base + STRENGTH * head, base)
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def _photo_panel(photo: Image.Image, faces: Sequence[Face], chosen: Face | None, plan: CropPlan | None) -> Image.Image:
    ratio = PANEL / max(photo.size)
    size = (max(1, round(photo.size[0] * ratio)), max(1, round(photo.size[1] * ratio)))
    panel = Image.new("RGB", (PANEL, PANEL), (30, 30, 30))
    panel.paste(photo.resize(size, Image.Resampling.LANCZOS), (0, 0))
    pen = ImageDraw.Draw(panel)
    for number, face in enumerate(faces, start=1):
        colour = CHOSEN if face is chosen else OTHER
        box = [float(v) * ratio for v in face.box]
        pen.rectangle(box, outline=colour, width=2)
        pen.text((box[0] + 4, box[1] + 2), f"{number}: {face.score:.2f}", fill=colour, font=ImageFont.load_default(14))
        _dots(pen, (face.points5 + 0.5) * ratio, POINT)
    if plan is not None:
        corners = (plan.to_photo(np.array([[0.0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])) + 0.5) * ratio
        pen.line([tuple(corner) for corner in corners], fill=(255, 255, 255), width=1)
    return panel


def _crop_panel(crop: Image.Image, plan: CropPlan, face: Face, pose: Array) -> Image.Image:
    panel = draw_head(crop.resize((PANEL, PANEL), Image.Resampling.LANCZOS), pose)
    pen = ImageDraw.Draw(panel)
    if face.points68 is not None:
        _dots(pen, plan.to_crop(face.points68) * PANEL, (255, 255, 0), 1)
    _dots(pen, plan.to_crop(face.points5) * PANEL, POINT)
    origin = project(pose, np.zeros(3)) * PANEL
    for k, (name, colour) in enumerate(AXES.items()):
        end = project(pose, AXIS * np.eye(3)[k]) * PANEL
        pen.line([tuple(origin), tuple(end)], fill=colour, width=4)
        pen.text(tuple(end + 4), name, fill=colour, font=ImageFont.load_default(18))
    return panel


def _dots(pen: ImageDraw.ImageDraw, points: NDArray[np.float64], colour: tuple[int, int, int], radius: int = 3) -> None:
    for x, y in points:
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour, outline=(0, 0, 0))


@lru_cache(maxsize=1)
def _head():
    """(1, V, 3) mean head in EG3D's scene and the (F, 3) triangles of its face."""
    import torch

    from facelab.face_model.procedural import ProceduralHead

    model = ProceduralHead.create()
    wanted = torch.isin(model.face_labels, torch.tensor(FACE_CLASSES))
    vertices = torch.from_numpy(to_scene(model.mean_shape.double().numpy())).float()
    return vertices[None], model.faces[wanted]
