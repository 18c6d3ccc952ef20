# SPDX-License-Identifier: Apache-2.0
"""The result of a check as one picture: where the cameras stand, how poses are distributed, the extreme pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from facelab.cameras.camera import Camera
from facelab.data.checking import SetReport, pose_angles
from facelab.data.eg3d_dataset import Eg3dDataset
from facelab.data.eg3d_labels import to_opencv_cam2world
from facelab.data.labels import colorize
from facelab.data.synthetic import project_points
from facelab.errors import UserError
from facelab.files import atomic_path

WIDTH, MARGIN, PLOT = 1200, 20, 380
INK, FAINT, BAR, WARN = (30, 30, 30), (205, 205, 205), (70, 110, 170), (190, 60, 30)
AXES = ((220, 50, 50), (40, 160, 60), (60, 90, 220))  # x, y, z
COLUMNS, LINE = 6, 19
AXIS_SHARE = 0.09  # length of the drawn world axes over the distance of the camera


def draw_report(dataset: Eg3dDataset, report: SetReport, path: Path) -> Path:
    """Write the picture of a report (format by the ending of ``path``). UserError if it cannot be written."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"a picture is a .png, .jpg or .webp file, got {path.name!r}; choose another name")
    lines = _wrapped([report.root, *report.lines()], 150)
    tiles = _tiles(dataset)
    tile = (WIDTH - 2 * MARGIN) // COLUMNS
    rows = math.ceil(len(tiles) / COLUMNS)
    plots = 0 if dataset.labels is None else PLOT + 50
    text_height = LINE * len(lines) + 2 * MARGIN
    canvas = Image.new("RGB", (WIDTH, text_height + plots + rows * (tile + 24) + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        colour = WARN if line.startswith(("warning", "problem")) else INK
        draw.text((MARGIN, MARGIN + LINE * number), line, fill=colour, font=_font(14))
    if dataset.labels is not None:
        cam2world = _opencv(dataset.labels, report)
        angles = torch.rad2deg(pose_angles(cam2world)).numpy()
        _draw_poses(draw, (MARGIN + 40, text_height), angles, report)
        _draw_rig(draw, (2 * MARGIN + 40 + PLOT, text_height), cam2world, (0, 2), "from above: x right, z down")
        _draw_rig(draw, (3 * MARGIN + 40 + 2 * PLOT, text_height), cam2world, (2, 1), "from the side: z left, y up")
    for number, (caption, picture) in enumerate(tiles):
        x = MARGIN + (number % COLUMNS) * tile
        y = text_height + plots + (number // COLUMNS) * (tile + 24)
        canvas.paste(picture.resize((tile - 6, tile - 6), Image.Resampling.BILINEAR), (x, y))
        draw.text((x, y + tile - 4), _shortened(caption), fill=INK, font=_font(13))
    with atomic_path(path) as temporary:
        canvas.save(temporary)
    return path


def draw_axes(image: Image.Image, label: Tensor) -> Image.Image:
    """World axes (x red, y green, z blue) at the origin, drawn into a picture with its (25,) label."""
    camera = Camera.from_label(label[None].double())
    length = AXIS_SHARE * float(camera.cam2world[0, :3, 3].norm())
    points = torch.cat([torch.zeros(1, 3), length * torch.eye(3)])[None].double()
    place = project_points(points, camera)[0] * image.width
    image, origin = image.copy(), tuple(place[0].tolist())
    draw = ImageDraw.Draw(image)
    for end, colour in zip(place[1:].tolist(), AXES, strict=True):
        draw.line([origin, tuple(end)], fill=colour, width=max(2, image.width // 100))
    return image


def _tiles(dataset: Eg3dDataset) -> list[tuple[str, Image.Image]]:
    """The pictures with the extreme and middle poses, axes drawn in; masks laid over; the first ones without labels."""
    chosen: list[tuple[str, int]] = []
    if dataset.labels is not None:
        angles = torch.rad2deg(pose_angles(dataset.labels[:, :16].reshape(-1, 4, 4)))
        for axis, name in ((0, "yaw"), (1, "pitch")):
            order = angles[:, axis].argsort().tolist()
            for share in (0.0, 0.5, 1.0):
                index = order[round(share * (len(order) - 1))]
                chosen.append((f"{name} {angles[index, axis]:+.0f}: {Path(dataset.names[index]).name}", index))
    else:
        chosen = [(Path(n).name, i) for i, n in enumerate(dataset.names[:COLUMNS])]
    tiles = []
    for caption, index in chosen:
        try:
            image = dataset.read_picture(index)
            overlaid = None if dataset.mask_names is None else _overlaid(image, dataset.read_mask(index))
        except UserError:
            tiles.append((f"{caption} (damaged)", Image.new("RGB", (64, 64), WARN)))
            continue
        image = image.resize((360, 360), Image.Resampling.LANCZOS)
        tiles.append((caption, image if dataset.labels is None else draw_axes(image, dataset.labels[index])))
        if overlaid is not None:
            tiles.append(("its mask, laid over", overlaid))
    return tiles


def _overlaid(image: Image.Image, mask: np.ndarray) -> Image.Image:
    colours = colorize(torch.from_numpy(mask.astype(np.int64))[None])[0].permute(1, 2, 0).numpy()
    palette = Image.fromarray(colours.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image, palette, 0.5)


def _opencv(labels: Tensor, report: SetReport) -> Tensor:
    matrix = labels.double()[:, :16].reshape(-1, 4, 4)
    convention = report.poses.convention if report.poses is not None else None
    return to_opencv_cam2world(matrix, convention or "opencv_c2w")


def _draw_poses(draw: ImageDraw.ImageDraw, corner: tuple[int, int], angles: np.ndarray, report: SetReport) -> None:
    """Yaw against pitch as points, with both histograms along the sides."""
    x0, y0 = corner
    side, bars = PLOT - 100, 60
    limit = max(15.0, math.ceil(float(np.abs(angles[:, :2]).max()) / 15) * 15)
    left, top = x0, y0 + bars + 10

    def place(yaw: float, pitch: float) -> tuple[float, float]:
        return left + (yaw / limit + 1) / 2 * side, top + (1 - pitch / limit) / 2 * side

    draw.rectangle([left, top, left + side, top + side], outline=FAINT)
    for tick in np.linspace(-limit, limit, 5):
        (x, _), (_, y) = place(tick, 0), place(0, tick)
        draw.line([x, top, x, top + side], fill=FAINT)
        draw.line([left, y, left + side, y], fill=FAINT)
        draw.text((x - 10, top + side + 3), f"{tick:.0f}", fill=INK, font=_font(12))
        draw.text((left - 32, y - 7), f"{tick:.0f}", fill=INK, font=_font(12))
    for yaw, pitch in angles[:: max(1, len(angles) // 5000), :2]:
        x, y = place(yaw, pitch)
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=BAR)
    for axis in (0, 1):
        counts, edges = np.histogram(angles[:, axis], bins=31, range=(-limit, limit))
        for count, first, last in zip(counts / max(1, counts.max()) * bars, edges[:-1], edges[1:], strict=True):
            if axis == 0:
                draw.rectangle([place(first, 0)[0], top - 4 - count, place(last, 0)[0] - 1, top - 4], fill=BAR)
            else:
                x = left + side + 4
                draw.rectangle([x, place(0, last)[1] + 1, x + count, place(0, first)[1]], fill=BAR)
    draw.text(
        (left, top + side + 20), "yaw to the right, pitch upwards, degrees from frontal", fill=INK, font=_font(12)
    )
    if report.poses is not None:
        text = f"h {math.degrees(report.poses.h_stddev):.1f}, v {math.degrees(report.poses.v_stddev):.1f} stddev"
        draw.text((left, top + side + 36), text, fill=INK, font=_font(12))


def _draw_rig(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], cam2world: Tensor, axes: tuple[int, int], title: str
) -> None:
    """Cameras as points with their viewing direction, around the head at the origin, seen along one world axis."""
    x0, y0 = corner
    side = PLOT - 60
    position, forward = cam2world[:, :3, 3].numpy(), cam2world[:, :3, 2].numpy()
    reach = 1.15 * float(np.abs(position).max()) or 1.0
    middle = (x0 + side / 2, y0 + 20 + side / 2)
    signs = {(0, 2): (1, 1), (2, 1): (-1, -1)}[axes]  # picture y grows downwards

    def place(point: np.ndarray) -> tuple[float, float]:
        x, y = (signs[k] * point[axes[k]] / reach * side / 2 for k in (0, 1))
        return middle[0] + x, middle[1] + y

    draw.rectangle([x0, y0 + 20, x0 + side, y0 + 20 + side], outline=FAINT)
    for axis in axes:
        draw.line([place(np.zeros(3)), place(0.35 * reach * np.eye(3)[axis])], fill=AXES[axis], width=3)
    for p, f in list(zip(position, forward, strict=True))[:: max(1, len(position) // 800)]:
        x, y = place(p)
        draw.line([place(p), place(p + 0.18 * reach * f)], fill=FAINT)
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=BAR)
    draw.text((x0, y0 + 24 + side), f"{title}; lines show where they look", fill=INK, font=_font(12))


def _wrapped(lines: Sequence[str], width: int) -> list[str]:
    import textwrap

    return [part for line in lines for part in textwrap.wrap(line, width, subsequent_indent="    ") or [""]]


def _shortened(caption: str, most: int = 26) -> str:
    return caption if len(caption) <= most else f"{caption[: most - 3]}..."


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
