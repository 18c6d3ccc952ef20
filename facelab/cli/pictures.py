# SPDX-License-Identifier: Apache-2.0
"""Pictures of a model: what render_images and render_video compose. Tensors are uint8 (N, 3, S, S)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.cameras import Camera
from facelab.cli.shapes import ShapePictures
from facelab.errors import UserError, nearest
from facelab.generator import Codes, GeneratorOutput, Scene
from facelab.inference import pictures as pic

VIEW_YAWS = (-0.5, -0.25, 0.0, 0.25, 0.5)  # radians, the originals' five views
LAYERS = ("image", "raw", "mask", "blend", "depth", "normals", "shape")


def parse_layers(text: str) -> list[str]:
    """``"image,mask"`` -> names of :data:`LAYERS`. UserError with the nearest name otherwise."""
    names = [name.strip() for name in text.replace("|", ",").split(",") if name.strip()]
    for name in names:
        if name not in LAYERS:
            raise UserError(f"unknown layer {name!r}, expected some of {', '.join(LAYERS)}.{nearest(name, LAYERS)}")
    if not names:
        raise UserError(f"no layer chosen, expected some of {', '.join(LAYERS)}")
    return names


def parse_views(yaws: str, pitches: str = "0") -> list[tuple[float, float]]:
    """``"-0.5,0,0.5"`` and one pitch for all or one for each -> (pitch, yaw) of each view, radians.

    Raises:
        UserError: what is not numbers, or another number of pitches.
    """
    numbers = {}
    for name, text in (("yaws", yaws), ("pitches", pitches)):
        try:
            numbers[name] = [float(x) for x in text.split(",")]
            if not all(map(math.isfinite, numbers[name])):
                raise ValueError
        except ValueError:
            raise UserError(f"--{name} takes numbers such as -0.5,0,0.5, got {text!r}") from None
    count, up = len(numbers["yaws"]), numbers["pitches"]
    if len(up) not in (1, count):
        raise UserError(f"--pitches takes one number or one for each of the {count} views, got {len(up)}")
    return list(zip(up * count if len(up) == 1 else up, numbers["yaws"], strict=True))


def available_layers(model: Any, names: Sequence[str] | None, settings: Any) -> tuple[list[str], Any]:
    """The layers this model can show, and settings that compute them; named but missing ones are an error."""
    labelled = model.has_labels
    if names is None:
        names = ["image", "mask", "depth"] if labelled else ["image", "depth"]
    missing = [name for name in names if name in ("mask", "blend") and not labelled]
    if missing:
        raise UserError(
            f"this {model.method} model has no labels, so there is no {missing[0]}; use image, depth, normals, shape"
        )
    if "raw" in names and not model.has_raw:
        raise UserError(f"this {model.method} model has no super-resolution, so there is no raw picture; use image")
    return list(names), settings.replace(normals="normals" in names)


def layer(model: Any, output: GeneratorOutput, name: str) -> Tensor:
    """One layer of rendered pictures as uint8 RGB."""
    if name == "image":
        return pic.to_uint8(output.rgb).cpu()
    if name in ("mask", "blend"):
        mask = pic.labels_to_rgb(model.label_map(output).cpu(), model.palette)
        return mask if name == "mask" else pic.blend(layer(model, output, "image"), mask)
    if name == "depth":
        return pic.depth_picture(output.depth, output.opacity, *model.depth_range).cpu()
    if name == "raw":
        assert output.raw_rgb is not None
        return pic.to_uint8(F.interpolate(output.raw_rgb, output.rgb.shape[-2:], mode="nearest")).cpu()
    assert output.normals is not None
    return pic.normals_to_rgb(output.normals, output.opacity[:, 0] > 0.5).cpu()


def multi_view(
    model: Any,
    codes: Codes,
    settings: Any,
    layers: Sequence[str],
    cameras: Camera,
    shapes: ShapePictures | None = None,
) -> dict[str, Tensor]:
    """One head from several cameras: {layer: (views, 3, S, S)}; the scene is computed once.

    ``shapes``: of the same head, for the layer ``shape``.
    """
    scene = model.scene(codes)
    outputs = [model.render(scene, cameras[i], settings=settings, seed=i) for i in range(len(cameras))]
    return _layers(model, GeneratorOutput.cat(outputs), layers, cameras, shapes)


def frame(
    model: Any,
    scene: Scene | Codes,
    camera: Camera,
    settings: Any,
    layers: Sequence[str],
    columns: int = 1,
    shapes: ShapePictures | None = None,
) -> Tensor:
    """One video frame: a cell for each head in ``columns``, its layers side by side, (3, rows * S, ...) uint8.

    ``shapes``: of the same heads, for the layer ``shape``.
    """
    output = model.render(scene, camera, settings=settings)
    parts = _layers(model, output, layers, camera, shapes)
    return pic.image_grid(pic.side_by_side(*(parts[name] for name in layers)), columns)


def _layers(
    model: Any, output: GeneratorOutput, names: Sequence[str], camera: Camera, shapes: ShapePictures | None
) -> dict[str, Tensor]:
    pictures = {}
    for name in names:
        if name == "shape":
            assert shapes is not None
            pictures[name] = shapes.picture(camera, output.rgb.shape[-1])
        else:
            pictures[name] = layer(model, output, name)
    return pictures


def sample_grids(
    model: Any, seeds: Sequence[int], settings: Any, truncation: float, yaw: float, columns: int
) -> dict[str, Tensor]:
    """Image and mask grids of many heads from one view, for training logs."""
    output = GeneratorOutput.cat(
        [model.sample(seed, camera=model.camera(yaw=yaw), truncation=truncation, settings=settings) for seed in seeds]
    )
    names, _ = available_layers(model, None, settings)
    return {n: pic.image_grid(layer(model, output, n), columns) for n in names if n != "depth"}


def stack_rows(rows: Sequence[Tensor]) -> Tensor:
    """Rows (views, 3, S, S) below each other -> (3, rows * S, views * S)."""
    return pic.image_grid(torch.cat(list(rows)), rows[0].shape[0])
