# SPDX-License-Identifier: Apache-2.0
"""The data sets of EG3D's paper from what their owners publish: FFHQ, rebalanced FFHQ, AFHQ, ShapeNet cars, mirroring.

Nothing is detected here: landmarks, crop parameters and labels come from files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from facelab.data import reading
from facelab.data.eg3d_cameras import CameraSource, match_names
from facelab.data.eg3d_dataset import Eg3dDataset
from facelab.data.eg3d_labels import crop_of, weak_perspective
from facelab.data.eg3d_prepare import Item, Loaded, SetWriter, WriteReport
from facelab.errors import UserError

WIDER = 1.8  # EG3D cuts FFHQ this much wider than FFHQ's own recipe
ALIGNED_SIZE, TRANSFORM_SIZE = 1500, 4096
TARGET, CENTRE, RESCALE, OUTPUT = 1024, 700, 300.0, 512


# ------------------------------------------------------------------ FFHQ


def ffhq_quad(landmarks: np.ndarray, wider: float = WIDER) -> np.ndarray:
    """(68, 2) landmarks in pixels -> (4, 2) corners of FFHQ's oriented square: top left, bottom left, bottom right, top right.

    ValueError for another shape.
    """
    if landmarks.shape != (68, 2):
        raise ValueError(f"expected (68, 2) landmarks, got {landmarks.shape}")
    left, right = landmarks[36:42].mean(0), landmarks[42:48].mean(0)
    eyes, mouth = (left + right) / 2, (landmarks[48] + landmarks[54]) / 2
    across, down = right - left, mouth - eyes
    x = across - _turned(down)
    x *= wider * max(2.0 * np.hypot(*across), 1.8 * np.hypot(*down)) / np.hypot(*x)
    y, centre = _turned(x), eyes + 0.1 * down
    return np.stack([centre - x - y, centre - x + y, centre + x + y, centre + x - y])


def realign(image: Image.Image, landmarks: np.ndarray, size: int = ALIGNED_SIZE, wider: float = WIDER) -> Image.Image:
    """FFHQ's alignment of an in-the-wild picture: shrink, cut, pad by reflection with a soft fade, turn upright."""
    quad = ffhq_quad(landmarks, wider)
    side = float(np.hypot(*(quad[3] - quad[0])))
    shrink = math.floor(side / size * 0.5)
    if shrink > 1:
        image = image.resize((round(image.width / shrink), round(image.height / shrink)), Image.Resampling.LANCZOS)
        quad, side = quad / shrink, side / shrink
    border = max(round(side * 0.1), 3)
    low, high = np.floor(quad.min(0)).astype(int) - border, np.ceil(quad.max(0)).astype(int) + border
    box = (max(low[0], 0), max(low[1], 0), min(high[0], image.width), min(high[1], image.height))
    if box[2] <= box[0] or box[3] <= box[1]:
        raise UserError("the landmarks lie outside the picture; expected pixels of this very picture; check both files")
    image, quad = image.crop(box), quad - np.array(box[:2])
    low, high = np.floor(quad.min(0)).astype(int), np.ceil(quad.max(0)).astype(int)
    pad = np.maximum(
        [-low[0] + border, -low[1] + border, high[0] - image.width + border, high[1] - image.height + border], 0
    )
    if pad.max() > border - 4:
        pad = np.maximum(pad, round(side * 0.3))
        image, quad = _faded(image, pad, side * 0.02), quad + pad[:2]
    turned = image.transform(
        (TRANSFORM_SIZE, TRANSFORM_SIZE),
        Image.Transform.QUAD,
        tuple((quad + 0.5).flatten()),
        Image.Resampling.BILINEAR,
    )
    return turned.resize((size, size), Image.Resampling.LANCZOS)


def crop_face(
    image: Image.Image,
    points: np.ndarray,
    model_points: np.ndarray,
    rescale: float = RESCALE,
    centre: int = CENTRE,
    output: int = OUTPUT,
) -> Image.Image:
    """The crop that belongs to EG3D's labels.

    Args:
        points: (5, 2) landmarks in pixels, y downwards.
        model_points: (5, 3) standard points of the face model.
        rescale, centre, output: scale of the face, side of the part that is kept of 1024, side of the result.

    ValueError for points of another shape.
    """
    flipped = np.stack([points[:, 0], image.height - 1 - points[:, 1]], -1)
    fit = weak_perspective(torch.from_numpy(flipped), torch.from_numpy(np.asarray(model_points, float)))
    crop = crop_of(image.size, fit, TARGET, rescale)
    if max(crop.width, crop.height) > 20000:
        raise UserError(f"the face is too small to be cropped: it would have to grow to {crop.width}x{crop.height}")
    image = image.resize((crop.width, crop.height), Image.Resampling.BICUBIC)
    margin = (TARGET - centre) // 2
    left, up = crop.left + margin, crop.up + margin
    return image.crop((left, up, left + centre, up + centre)).resize((output, output), Image.Resampling.LANCZOS)


def ffhq_items(folder: Path, crops: Path, landmarks: Path | None, labels: Path | None, size: int) -> list[Item]:
    """FFHQ's pictures as EG3D trains on them.

    Args:
        folder: pictures, with their subfolders; in-the-wild if ``landmarks`` are given, else already 1500 px aligned.
        crops: ``cropping_params.json``: per file ``lm`` (5, 2), ``lm3d_std`` (5, 3), and optionally
            ``rescale_factor``, ``center_crop_size``, ``output_size``.
        landmarks: FFHQ's metadata JSON (``in_the_wild.face_landmarks`` per entry), or ``{file: 68 points}``.
        labels: ``dataset.json`` with the cameras; without it the set has no labels.

    Raises:
        UserError: files that cannot be read, or no picture with crop parameters (and landmarks).
    """
    names = _pictures(folder)
    parameters = _table(crops)
    crop_names = match_names(list(parameters), names, crops)
    points = None if landmarks is None else _landmark_table(landmarks)
    point_names = {} if points is None or landmarks is None else match_names(list(points), names, landmarks)
    cameras = None if labels is None else CameraSource(labels).labels_of(names, folder)
    if not crop_names:
        raise UserError(f"{crops}: none of its files is among the {len(names)} pictures of {folder}; check both paths")

    def load(name: str) -> Loaded:
        if name not in crop_names:
            raise UserError(f"{folder / name}: no crop parameters for it in {crops}")
        if points is not None and name not in point_names:
            raise UserError(f"{folder / name}: no landmarks for it in {landmarks}")
        if cameras is not None and name not in cameras:
            raise UserError(f"{folder / name}: no label for it in {labels}")
        image, entry = reading.read_image(folder / name), parameters[crop_names[name]]
        try:
            if points is not None:
                image = realign(image, points[point_names[name]])
            options = (float(entry.get("rescale_factor", RESCALE)), int(entry.get("center_crop_size", CENTRE)))
            points_2d, points_3d = (np.asarray(entry[k], float) for k in ("lm", "lm3d_std"))
            image = crop_face(image, points_2d, points_3d, *options, output=size)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{crops}: the entry of {crop_names[name]} is unusable ({error}); mend it") from error
        return Loaded(image, None if cameras is None else cameras[name])

    return [Item(name, lambda name=name: load(name)) for name in names]


# ------------------------------------------------------------------ ShapeNet cars


def shapenet_items(folder: Path, pixels: float = 512.0, convention: str = "opencv_c2w") -> list[Item]:
    """Scene representation network renders: ``OBJECT/rgb/*.png``, ``OBJECT/pose/*.txt`` (16 numbers), ``OBJECT/intrinsics.txt``.

    The first line of the intrinsics is focal length and centre in pixels of a ``pixels`` wide picture.
    Transparent pixels become white. UserError for another layout; pictures of an object without intrinsics, and those
    whose pose cannot be read, say so when they are loaded.
    """
    objects = sorted(p.parent for p in folder.glob("*/intrinsics.txt")) if folder.is_dir() else []
    if not objects:
        raise UserError(
            f"{folder}: expected OBJECT/intrinsics.txt, OBJECT/rgb and OBJECT/pose, got none; check the path"
        )
    items = [_without_intrinsics(home, folder, p) for home in _incomplete(folder, objects) for p in _renders(home)]
    for home in objects:
        inner = _first_line(home / "intrinsics.txt", pixels)
        source = CameraSource(home / "pose", convention)

        def load(picture: Path, inner: list[float] = inner, source: CameraSource = source) -> Loaded:
            text = _text(picture.parent.parent / "pose" / f"{picture.stem}.txt")
            try:
                pose = {"pose": [float(v) for v in text.split()], "intrinsics": inner}
            except ValueError as error:
                raise UserError(f"pose of {picture}: expected 16 numbers, got {error}; mend the file") from error
            return Loaded(reading.read_image(picture, "white"), source.label(pose, f"pose of {picture}"))

        for picture in _renders(home):
            items.append(Item(picture.relative_to(folder).as_posix(), lambda p=picture, load=load: load(p)))
    if not items:
        raise UserError(f"{folder}: {len(objects)} objects but no pictures in OBJECT/rgb; check the path")
    return items


def _renders(home: Path) -> list[Path]:
    return reading.list_images(home / "rgb") if (home / "rgb").is_dir() else []


def _incomplete(folder: Path, objects: list[Path]) -> list[Path]:
    return sorted({path.parent for path in folder.glob("*/rgb")} - set(objects))


def _without_intrinsics(home: Path, folder: Path, picture: Path) -> Item:
    def load() -> Loaded:
        raise UserError(f"{home}/intrinsics.txt is missing; restore it or remove {home.name}")

    return Item(picture.relative_to(folder).as_posix(), load)


# ------------------------------------------------------------------ sets out of sets


def dataset_items(dataset: Eg3dDataset) -> list[Item]:
    """The pictures of a set under their old stems, to be transformed or mirrored."""
    labels = dataset.labels

    def load(index: int) -> Loaded:
        mask = None if dataset.mask_names is None else dataset.read_mask(index)
        return Loaded(dataset.read_picture(index), None if labels is None else labels[index].double(), mask)

    return [Item(n, lambda i=i: load(i), _stem(n)) for i, n in enumerate(dataset.names)]


def replicas_by_yaw(labels: Tensor, step: float = 15.0, most: int = 4) -> list[int]:
    """Copies of each picture for a flatter distribution of poses: one more for every ``step`` degrees of |yaw|.

    >>> from facelab.cameras.camera import Camera
    >>> import torch, math
    >>> yaw = math.pi / 2 + torch.deg2rad(torch.tensor([0.0, -14.0, 16.0, -31.0, 80.0]))
    >>> replicas_by_yaw(Camera.on_sphere(math.pi / 2, yaw, 13.0, 2.7).label())
    [1, 1, 2, 3, 4]
    """
    if step <= 0 or most < 1:
        raise ValueError(f"expected a positive step and at least 1 copy, got {step} and {most}")
    yaw = torch.rad2deg(torch.atan2(labels[:, 3], labels[:, 11])).abs()
    return (1 + torch.floor(yaw / step)).clamp(max=most).int().tolist()


def rebalance(dataset: Eg3dDataset, target: Path, copies: Sequence[int] | Mapping[int, int]) -> WriteReport:
    """Repeat pictures: copy k of ``NAME.png`` is called ``NAME_kk.png``; files are copied as they are.

    Args:
        dataset: opened with labels and without mirroring.
        copies: per picture, or picture number -> copies, where pictures that are not listed are left out.

    Raises:
        UserError: numbers of pictures that the set does not have, or nothing left.
    """
    table = dict(copies) if isinstance(copies, Mapping) else dict(enumerate(copies))
    bad = [index for index, count in table.items() if not 0 <= index < len(dataset.names) or count < 0]
    if bad:
        raise UserError(f"copies of picture {bad[0]}: the set has the pictures 0 to {len(dataset.names) - 1}; check it")
    report, labels = WriteReport(), dataset.labels
    with SetWriter(target, dataset.mask_names is not None) as writer:
        for index in sorted(table):
            name = dataset.names[index]
            picture = dataset.store.read(name)
            if not picture.startswith(b"\x89PNG"):
                raise UserError(f"{name}: expected a PNG as prepare_data.py eg3d writes it; make the set with it first")
            mask = None if dataset.mask_names is None else dataset.store.read(dataset.mask_names[index])
            for number in range(table[index]):
                label = None if labels is None else labels[index]
                writer.add(picture, label, mask, f"{_stem(name)}_{number:02d}")
                report.written += 1
        if not report.written:
            raise UserError("nothing is left: expected at least one picture with one copy; check the table of copies")
    return report


def read_copies(path: Path) -> dict[int, int]:
    """A JSON object ``{"picture number": copies}``. UserError for anything else."""
    content = _table(path)
    try:
        return {int(index): int(count) for index, count in content.items()}
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: expected picture numbers and counts, got {error}; mend the file") from error


# ------------------------------------------------------------------ helpers


def _turned(vector: np.ndarray) -> np.ndarray:
    """A quarter turn: (x, y) -> (-y, x)."""
    return np.array([-vector[1], vector[0]])


def _faded(image: Image.Image, pad: np.ndarray, blur: float) -> Image.Image:
    """Pad by reflection; towards the rim the picture turns blurred, then into its median colour."""
    left, up, right, down = (int(v) for v in pad)
    pixels = np.pad(np.asarray(image, np.float32), ((up, down), (left, right), (0, 0)), "reflect")
    height, width = pixels.shape[:2]
    rows, columns = np.ogrid[:height, :width]

    def inside(place: np.ndarray, first: int, last: int, length: int) -> np.ndarray:
        near = np.where(first > 0, place / max(first, 1), np.inf)
        far = np.where(last > 0, (length - 1 - place) / max(last, 1), np.inf)
        return np.minimum(near, far)

    depth = np.minimum(inside(columns, left, right, width), inside(rows, up, down, height))
    rim = (1.0 - depth)[..., None]  # 1 at the very rim, 0 where the picture begins, negative inside
    whole = Image.fromarray(np.uint8(np.clip(np.rint(pixels), 0, 255)))
    small = whole.resize((max(1, width // 10), max(1, height // 10)), Image.Resampling.BOX)
    soft = small.filter(ImageFilter.GaussianBlur(max(blur / 10, 0.1))).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    pixels += (np.asarray(soft, np.float32) - pixels) * np.clip(rim * 3.0 + 1.0, 0.0, 1.0)
    pixels += (np.median(np.asarray(small, np.float32), axis=(0, 1)) - pixels) * np.clip(rim, 0.0, 1.0)
    return Image.fromarray(np.uint8(np.clip(np.rint(pixels), 0, 255)))


def _pictures(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"no pictures at {folder}: expected a folder, got no such folder; check the path")
    names = [p.relative_to(folder).as_posix() for p in reading.list_images(folder, recursive=True)]
    if not names:
        raise UserError(f"no pictures in {folder}: expected {', '.join(reading.IMAGE_SUFFIXES)}, got none; check it")
    return names


def _table(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got {' '.join(str(error).split())}; mend the file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object by file name, got {type(content).__name__}; mend the file")
    return content


def _landmark_table(path: Path) -> dict[str, np.ndarray]:
    """FFHQ's metadata or ``{file: points}`` -> file name -> (68, 2)."""
    found = {}
    for name, entry in _table(path).items():
        if isinstance(entry, dict):
            wild = entry.get("in_the_wild", entry)
            name, entry = wild.get("file_path", name), wild.get("face_landmarks")
        points = np.asarray(entry, float) if isinstance(entry, list) else np.zeros(0)
        if points.shape != (68, 2):
            raise UserError(f"{path}: {name} must have 68 points (x, y), got shape {points.shape}; mend the file")
        found[str(name)] = points
    return found


def _first_line(path: Path, pixels: float) -> list[float]:
    """``focal cx cy`` of a ``pixels`` wide picture -> 9 normalised intrinsics."""
    line = _text(path).splitlines()
    try:
        focal, x, y = (float(v) / pixels for v in line[0].split()[:3])
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: expected 'focal cx cy' in the first line, got {line[:1]}; mend the file") from error
    return [focal, 0.0, x, 0.0, focal, y, 0.0, 0.0, 1.0]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it or check the path") from error


def _stem(name: str) -> str:
    """``images/00000/img00000000.png`` -> ``00000/img00000000``."""
    return name.rsplit(".", 1)[0].removeprefix("images/")
