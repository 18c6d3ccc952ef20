# SPDX-License-Identifier: Apache-2.0
"""Panoramas as lights: equirectangular pictures of what surrounds a head -> nine numbers per colour.

The middle of a panorama is what a frontal viewer sees behind the head, its right is the viewer's right, its top is up.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from facelab.errors import UserError
from facelab.lighting.colour import linear
from facelab.lighting.harmonics import LOBE, basis

READABLE = (".hdr", ".png", ".jpg", ".jpeg", ".webp", ".bmp")
_ROWS = 64  # integrated at once


def environment_light(panorama: Tensor, turn: float = 0.0) -> Tensor:
    """World light of a panorama.

    Args:
        panorama: (3, H, W) linear light, finite, at least 0.
        turn: radians; the surroundings turn about the vertical so that what was behind the head moves to the right.

    Returns:
        (1, 9, 3) float32; a panorama that is 1 everywhere gives brightness 1. ValueError for another shape or values.
    """
    if panorama.ndim != 3 or panorama.shape[0] != 3 or not panorama.is_floating_point():
        raise ValueError(f"a panorama must be float (3, H, W), got {panorama.dtype} {tuple(panorama.shape)}")
    if not bool((panorama.isfinite() & (panorama >= 0)).all()):
        raise ValueError("a panorama must hold finite light, at least 0")
    height, width = panorama.shape[1:]
    numbers = torch.zeros(9, 3, dtype=torch.float64, device=panorama.device)
    around = ((_steps(width, panorama) + 0.5) / width - 0.5) * 2 * math.pi + turn
    edges = torch.arange(height + 1, dtype=torch.float64, device=panorama.device) / height * math.pi
    for rows in _steps(height, panorama).long().split(_ROWS):
        polar = (edges[rows] + edges[rows + 1])[:, None] / 2
        directions = torch.stack(
            [polar.sin() * around.sin(), polar.cos().expand(-1, width), -polar.sin() * around.cos()], dim=-1
        )
        area = (edges[rows].cos() - edges[rows + 1].cos()) * (2 * math.pi / width)
        numbers += torch.einsum("hwk,h,chw->kc", basis(directions), area, panorama[:, rows].double())
    by_order = torch.tensor([LOBE[0]] + [LOBE[1]] * 3 + [LOBE[2]] * 5, dtype=torch.float64, device=panorama.device)
    return (by_order[:, None] * numbers)[None].float()


def _steps(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.float64, device=like.device)


def read_panorama(path: str | Path) -> Tensor:
    """A panorama file -> (3, H, W) linear light, float32.

    Radiance ``.hdr`` files are linear; 8-bit pictures are taken as sRGB.

    Raises:
        UserError: missing, another format, undecodable, or not twice as wide as high (within 2 %).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no panorama at {path}; check the path")
    suffix = path.suffix.lower()
    if suffix not in READABLE:
        hint = "; convert it to Radiance .hdr" if suffix == ".exr" else ""
        raise UserError(f"{path}: expected a panorama as {', '.join(READABLE)}, got '{suffix}'{hint}")
    panorama = read_radiance(path) if suffix == ".hdr" else _read_picture(path)
    height, width = panorama.shape[1:]
    if abs(width - 2 * height) > 0.02 * width:
        raise UserError(
            f"{path}: a panorama of the whole sphere is twice as wide as high, got {width} x {height}; "
            "expected an equirectangular picture"
        )
    return panorama


def _read_picture(path: Path) -> Tensor:
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be decoded as a picture ({' '.join(str(error).split())[:100]})") from error
    return linear(torch.from_numpy(pixels).permute(2, 0, 1))


def read_radiance(path: str | Path) -> Tensor:
    """A Radiance RGBE file, run-length encoded or flat -> (3, H, W) float32.

    Raises:
        UserError: no Radiance file, another pixel order than ``-Y H +X W``, or a truncated one.
    """
    data = Path(path).read_bytes()
    header, mark, rest = data.partition(b"\n\n")
    line, _, body = rest.partition(b"\n")
    words = line.split()
    if not data.startswith(b"#?") or not mark or len(words) != 4 or words[0] != b"-Y" or words[2] != b"+X":
        raise UserError(f"{path}: expected a Radiance file with rows from top to bottom ('-Y H +X W')")
    if b"FORMAT=32-bit_rle_xyze" in header:
        raise UserError(f"{path}: expected RGB light (32-bit_rle_rgbe), got XYZ; convert it")
    try:
        height, width = int(words[1]), int(words[3])
        if not (0 < height <= 1 << 15 and 0 < width <= 1 << 15):
            raise ValueError(f"{width} x {height} pixels")
        rgbe = _decode_rows(body, height, width)
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: damaged Radiance file ({error}); copy or download it again") from error
    scale = np.ldexp(np.float32(1), rgbe[..., 3].astype(np.int32) - 136)
    light = rgbe[..., :3].astype(np.float32) * np.where(rgbe[..., 3:] > 0, scale[..., None], np.float32(0))
    return torch.from_numpy(np.ascontiguousarray(light.transpose(2, 0, 1)))


def _decode_rows(body: bytes, height: int, width: int) -> np.ndarray:
    """(height, width, 4) uint8. ValueError or IndexError when the data end too early or a run leaves its row."""
    data = np.frombuffer(body, dtype=np.uint8)
    if not 8 <= width < 1 << 15 or body[:2] != b"\x02\x02":
        if len(data) < height * width * 4:
            raise ValueError("it ends too early")
        return data[: height * width * 4].reshape(height, width, 4)
    rows = np.empty((height, 4, width), dtype=np.uint8)
    place = 0
    for row in rows:
        if body[place : place + 2] != b"\x02\x02" or body[place + 2] << 8 | body[place + 3] != width:
            raise ValueError("a row does not begin where it should")
        place += 4
        for channel in row:
            filled = 0
            while filled < width:
                count = body[place]
                run = count > 128
                count = count - 128 if run else count
                if count == 0 or filled + count > width:
                    raise ValueError("a run leaves its row")
                piece = data[place + 1 : place + 2] if run else data[place + 1 : place + 1 + count]
                if len(piece) != (1 if run else count):
                    raise ValueError("it ends too early")
                channel[filled : filled + count] = piece
                place += 2 if run else 1 + count
                filled += count
    return rows.transpose(0, 2, 1)
