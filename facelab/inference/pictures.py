# SPDX-License-Identifier: Apache-2.0
"""Tensors -> pictures for people: fixed ranges, palettes, grids, captions and PNG files.

Every range is fixed by the caller, never taken from the frame at hand, so that contrast and
colours are the same in all frames of a video and in all cells of a sheet. Pictures are uint8
tensors (N, 3, H, W) until they are written; files and frames are (H, W, 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from facelab.data.labels import PALETTE
from facelab.errors import UserError
from facelab.files import atomic_path

if TYPE_CHECKING:
    from PIL import Image, ImageFont

Color = tuple[int, int, int]
CAPTION_MARGIN = 4  # pixels above and below a caption


def to_uint8(image: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Float values of any shape -> uint8: ``low`` becomes 0, ``high`` 255, the rest is clamped.

    Raises:
        ValueError: an empty range.
        UserError: NaN, which no picture can show.

    >>> to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0])).tolist()
    [0, 0, 128, 255]
    """
    if not high > low:
        raise ValueError(f"the range must have high > low, got {low}..{high}")
    if image.isnan().any():
        raise UserError(
            f"a picture of shape {tuple(image.shape)} holds NaN, expected colours: the weights are damaged, or a number "
            "that was given is far out of range"
        )
    return (((image.float() - low) / (high - low)) * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def from_uint8(image: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return image.float() / 127.5 - 1


def labels_to_rgb(labels: Tensor, palette: Tensor | Sequence[Color] = PALETTE) -> Tensor:
    """Class maps -> palette pictures.

    Args:
        labels: (N, H, W) integers.
        palette: (K, 3) colours in 0..255; by default those of the CelebAMask-HQ classes.

    Returns:
        (N, 3, H, W) uint8.

    Raises:
        ValueError: a label outside 0..K-1.
    """
    table = torch.as_tensor(palette, dtype=torch.uint8, device=labels.device)
    _check_labels(labels, len(table))
    return table[labels.long()].permute(0, 3, 1, 2).contiguous()


def depth_to_rgb(
    depth: Tensor, near: float, far: float, opacity: Tensor | None = None, background: Color = (0, 0, 0)
) -> Tensor:
    """Depths -> colours of :func:`depth_colors`: near is bright yellow, far dark violet.

    Args:
        depth: (N, 1, H, W) or (N, H, W) in scene units.
        near, far: the fixed ends of the colour range, scene units; depths beyond are clamped.
        opacity: same shape in [0, 1]; what is transparent fades to the background.
        background: colour behind, 0..255.

    Returns:
        (N, 3, H, W) uint8.
    """
    depth = depth[:, 0] if depth.ndim == 4 else depth
    index = to_uint8(depth, near, far).long()
    colors = depth_colors().to(depth.device)[index].permute(0, 3, 1, 2)
    if opacity is None:
        return colors.contiguous()
    alpha = (opacity if opacity.ndim == 4 else opacity[:, None]).float().clamp(0, 1)
    behind = torch.tensor(background, dtype=torch.float32, device=depth.device).view(1, 3, 1, 1)
    return to_uint8(colors * alpha + behind * (1 - alpha), 0, 255)


def depth_picture(depth: Tensor, opacity: Tensor, near: float, far: float) -> Tensor:
    """Rendered depths in colours: near is bright yellow, far dark violet, empty black; (N, 3, H, W) uint8.

    Args:
        depth: (N, 1, H, W) weighted sums of the ray parameter, scene units.
        opacity: (N, 1, H, W) the sums of those weights.
        near, far: see :func:`depth_to_rgb`.
    """
    return depth_to_rgb(depth / opacity.clamp_min(1e-4), near, far, opacity)


def normals_to_rgb(normals: Tensor, mask: Tensor | None = None) -> Tensor:
    """(N, 3, H, W) unit normals -> uint8, each component -1..1 to 0..255; black where ``mask`` (N, H, W) is false."""
    colors = to_uint8(normals)
    return colors if mask is None else colors * mask.to(torch.uint8)[:, None]


def blend(first: Tensor, second: Tensor, weight: float = 0.5) -> Tensor:
    """uint8 pictures of one shape -> ``(1 - weight) * first + weight * second``, rounded, uint8."""
    if first.shape != second.shape:
        raise ValueError(f"pictures to blend must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    return to_uint8(torch.lerp(first.float(), second.float(), weight), 0, 255)


def side_by_side(*pictures: Tensor) -> Tensor:
    """uint8 pictures (N, 3, H, W) of one height -> one picture per N, left to right."""
    return torch.cat(pictures, dim=-1)


def image_grid(pictures: Tensor, columns: int | None = None, gap: int = 0, background: Color = (0, 0, 0)) -> Tensor:
    """(N, 3, H, W) uint8 -> (3, rows * H, columns * W) with ``gap`` pixels between the cells.

    Cells fill row by row; ``columns`` defaults to the smallest square that holds all.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.dtype != torch.uint8 or len(pictures) == 0:
        raise ValueError(f"expected uint8 (N, 3, H, W), N > 0, got {pictures.dtype} {tuple(pictures.shape)}")
    count, _, height, width = pictures.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    if columns < 1 or gap < 0:
        raise ValueError(f"a grid needs columns >= 1 and gap >= 0, got {columns} and {gap}")
    rows = math.ceil(count / columns)
    size = (rows * (height + gap) - gap, columns * (width + gap) - gap)
    canvas = torch.tensor(background, dtype=torch.uint8, device=pictures.device).view(3, 1, 1).repeat(1, *size)
    for number, picture in enumerate(pictures):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = picture
    return canvas


def contact_sheet(
    pictures: Tensor,
    captions: Sequence[str],
    columns: int | None = None,
    title: str | None = None,
    font_size: int = 13,
) -> Tensor:
    """A captioned grid on white: pictures (N, 3, H, W) uint8 -> (3, height, width) uint8.

    Each caption stands below its picture and is shortened where it is wider than the picture.
    """
    if len(captions) != len(pictures):
        raise ValueError(f"expected one caption per picture, got {len(captions)} for {len(pictures)}")
    width, height = pictures.shape[-1], pictures.shape[-2]
    strip = font_size + 2 * CAPTION_MARGIN
    cells = torch.full((len(pictures), 3, height + strip, width), 255, dtype=torch.uint8)
    cells[:, :, :height] = pictures.cpu()
    for cell, caption in zip(cells, captions, strict=True):
        cell[:, height:] = _text_strip(caption, width, strip, font_size)
    sheet = image_grid(cells, columns, gap=CAPTION_MARGIN, background=(255, 255, 255))
    if title is None:
        return sheet
    heading = _text_strip(title, sheet.shape[-1], 2 * strip, 2 * font_size - CAPTION_MARGIN)
    return torch.cat([heading, sheet], dim=1)


def save_png(path: str | Path, picture: Tensor | np.ndarray) -> None:
    """Write one uint8 picture, (3, H, W) or (1, H, W) tensor or (H, W, 3) or (H, W) array, atomically.

    Raises:
        UserError: the folder cannot be written.
    """
    _write_png(path, _pil_image(picture))


def save_label_png(path: str | Path, labels: Tensor | np.ndarray, palette: Tensor | Sequence[Color] = PALETTE) -> None:
    """Write one (H, W) class map as an index PNG: pixels are class numbers, shown in palette colours."""
    from PIL import Image

    array = labels if isinstance(labels, np.ndarray) else labels.detach().cpu().numpy()
    table = np.asarray(palette, dtype=np.uint8)
    _check_labels(torch.as_tensor(array), len(table))
    image = Image.fromarray(array.astype(np.uint8))
    image.putpalette(table.reshape(-1).tolist())
    _write_png(path, image)


def read_picture(path: str | Path) -> Tensor:
    """A picture file -> (3, H, W) uint8 RGB. UserError if it is missing, cut or not a picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not a picture that can be read") from error
    except OSError as error:
        raise UserError(f"cannot read picture {path}: {error.strerror or error}") from error


@lru_cache(maxsize=1)
def depth_colors() -> Tensor:
    """(256, 3) uint8 colours, bright yellow (near) to dark violet (far), perceptually even.

    In OKLab (B. Ottosson 2020) lightness falls linearly and the hue turns evenly from yellow
    through green and blue to violet; the chroma is what sRGB allows, at most 0.14, smoothed so
    that the gamut's corners do not show as edges.
    """
    position = np.linspace(0, 1, 256)
    lightness, hue = 0.95 - 0.73 * position, np.deg2rad(105 + 195 * position)
    inside, outside = np.zeros(256), np.full(256, 0.14)
    for _ in range(20):  # bisect the largest chroma within the gamut
        middle = (inside + outside) / 2
        linear = _oklch_to_linear_rgb(lightness, middle, hue)
        fits = ((linear >= 0) & (linear <= 1)).all(axis=1)
        inside, outside = np.where(fits, middle, inside), np.where(fits, outside, middle)
    linear = _oklch_to_linear_rgb(lightness, _smooth_below(inside, 61), hue).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    return torch.from_numpy((encoded * 255 + 0.5).astype(np.uint8))


def _smooth_below(limit: np.ndarray, window: int) -> np.ndarray:
    """A smooth curve that stays under ``limit``: the running minimum, then its running mean."""
    lowest = np.lib.stride_tricks.sliding_window_view(np.pad(limit, window - 1, mode="edge"), window).min(axis=1)
    return np.lib.stride_tricks.sliding_window_view(lowest, window).mean(axis=1)


def _oklch_to_linear_rgb(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    to_lms = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    return (lab @ to_lms.T) ** 3 @ to_rgb.T


def _check_labels(labels: Tensor, classes: int) -> None:
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise ValueError(
            f"labels must be 0..{classes - 1} for a palette of {classes} colours, "
            f"got {int(labels.min())}..{int(labels.max())}"
        )


def _pil_image(picture: Tensor | np.ndarray) -> Image.Image:
    from PIL import Image

    if isinstance(picture, np.ndarray):
        array = picture
    else:
        array = (picture.permute(1, 2, 0) if picture.ndim == 3 else picture).detach().cpu().numpy()
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise ValueError(f"a picture must be uint8 with 1 or 3 channels, got {array.dtype} {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array))


def _write_png(path: str | Path, image: Image.Image) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def _text_strip(text: str, width: int, height: int, font_size: int) -> Tensor:
    """Black text, centred on white -> (3, height, width) uint8."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(font_size)
    image = Image.new("RGB", (width, height), "white")
    shortened = _shorten(text, font, width)
    ImageDraw.Draw(image).text((width / 2, height / 2), shortened, fill="black", font=font, anchor="mm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
