# SPDX-License-Identifier: Apache-2.0
"""Synthetic heads -> pictures that vary like photographs, with label maps that stay exact.

The labels are known, so parts can be changed one by one: hair grows, falls and gets new colours and strands, brows and
beards thicken, necklines widen, clothes and background become anything. Then light, colour, focus and noise. Every
function works on whole batches on any device and draws from ``Draws``.

Letters: N pictures, S side in pixels. Pictures are (N, 3, S, S) in 0..1, labels (N, S, S) int64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.data.classes import CLASSES
from facelab.data.labels import flip_labels
from facelab.draws import Draws
from facelab.methods.face_parser.config import AugmentConfig

BACKGROUND, SKIN, NECK, CLOTH, HAIR = (CLASSES.index(n) for n in ("background", "skin", "neck", "cloth", "hair"))
BROWS = tuple(CLASSES.index(n) for n in ("l_brow", "r_brow"))
EYES = tuple(CLASSES.index(n) for n in ("l_eye", "r_eye"))
LIPS = tuple(CLASSES.index(n) for n in ("mouth", "u_lip", "l_lip"))
EARS = tuple(CLASSES.index(n) for n in ("l_ear", "r_ear", "ear_r"))


def augment(image: Tensor, labels: Tensor, size: int, draws: Draws, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """(N, 3, S, S) uint8 heads on black and their (N, S, S) labels -> ((N, 3, size, size) in [-1, 1], labels).

    The same draws give the same pictures on the same type of device.
    """
    picture, labels = warp(image.float() / 255, labels.long(), size, draws, config)
    picture, labels = grow_brows(picture, labels, draws, config)
    picture = shade_eyes(picture, labels, draws, config)
    picture = paint_beard(picture, labels, draws, config)
    picture, labels = widen_neckline(picture, labels, draws, config)
    cloth = _chosen(draws, "cloth", len(picture), config.p_cloth_texture, picture.device) & (labels == CLOTH)[:, None]
    picture = torch.where(cloth, texture(draws, "cloth", picture), picture)
    picture, labels = grow_hair(picture, labels, draws, config)
    picture, labels = cover(picture, labels, draws, config)
    inside = _blur((labels != BACKGROUND).float()[:, None], 3)
    picture = picture * inside + texture(draws, "background", picture) * (1 - inside)
    picture = relight(picture, draws, config)
    picture = photograph(picture, draws, config)
    return picture.clamp(0, 1) * 2 - 1, labels


def warp(image: Tensor, labels: Tensor, size: int, draws: Draws, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Mirror, rotate, zoom, shift, stretch and bend; left and right classes change places in mirrored pictures."""
    count, device = len(image), image.device
    flip = draws.uniform("flip", (count,), device) < config.p_flip
    image = torch.where(flip[:, None, None, None], image.flip(3), image)
    labels = torch.where(flip[:, None, None], flip_labels(labels).flip(2), labels)
    u = draws.uniform("geometry", (count, 5), device) * 2 - 1
    angle, (low, high) = config.rotate * u[:, 0], map(math.log, config.zoom)
    zoom = torch.exp(low + (high - low) * (u[:, 1] + 1) / 2)
    stretch = torch.exp(config.stretch * u[:, 2])
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    move = 2 * config.shift * u[:, 3:5]
    move[:, 1] -= 2 * config.lower
    rows = [torch.stack([cos * stretch, -sin, move[:, 0]], 1), torch.stack([sin, cos / stretch, move[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 3, size, size], align_corners=False)
    bend = _upsampled(draws.normal("bend", (count, 2, 5, 5), device), size, "bicubic") * 2 * config.elastic
    grid = grid + bend.permute(0, 2, 3, 1)
    picture = F.grid_sample(image, grid, "bilinear", "border", align_corners=False)
    warped = F.grid_sample(labels[:, None].float(), grid, "nearest", "border", align_corners=False)[:, 0]
    return picture, warped.round().long()


def grow_brows(picture: Tensor, labels: Tensor, draws: Draws, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Brows spread over the skin by up to 2 % of the side."""
    size, chosen = picture.shape[-1], _chosen(draws, "brows", len(picture), config.p_brows, picture.device)
    reach = 1 + round(0.015 * size * float(draws.uniform("brow reach", ())))
    darkest = -F.max_pool2d(-picture, 2 * reach + 1, 1, reach)
    for brow in BROWS:
        near = F.max_pool2d((labels == brow).float()[:, None], 2 * reach + 1, 1, reach) > 0
        grown = near & chosen & (labels == SKIN)[:, None]
        picture, labels = torch.where(grown, darkest, picture), torch.where(grown[:, 0], brow, labels)
    return picture, labels


def shade_eyes(picture: Tensor, labels: Tensor, draws: Draws, config: AugmentConfig) -> Tensor:
    """Eyes and the skin close to them get darker: lashes, make-up, deep sockets, eyes too small to show any white."""
    count, size, device = len(picture), picture.shape[-1], picture.device
    u = draws.uniform("eyes", (count, 2, 1, 1, 1), device)
    eyes = _members(labels, EYES)
    rim = (_blur(eyes, _odd(0.03 * size)) * 2).clamp(max=1)
    dark = 0.8 * u[:, 0] * rim * torch.where(eyes > 0, u[:, 1], 1.0)
    return picture * (1 - dark * _chosen(draws, "eyes", count, config.p_eyes, device))


def paint_beard(picture: Tensor, labels: Tensor, draws: Draws, config: AugmentConfig) -> Tensor:
    """Dark, grainy skin around the mouth; beards are labelled skin in CelebAMask-HQ."""
    count, size, device = len(picture), picture.shape[-1], picture.device
    mouth = _members(labels, LIPS)
    near = _blur(_blur(mouth, _odd(0.22 * size)), _odd(0.12 * size)) * 6
    edge = near + 0.5 * clouds(draws, "beard edge", count, 1, size, device)
    grain = 0.5 + 0.5 * draws.uniform("beard grain", (count, 1, size, size), device)
    strength = draws.uniform("beard strength", (count, 1, 1, 1), device)
    mask = ((edge - 0.3) * 4).clamp(0, 1) * (labels == SKIN)[:, None] * grain * strength
    mask = mask * _chosen(draws, "beard", count, config.p_beard, device)
    return picture * (1 - mask) + hair_colour(draws, "beard", count, device) * 0.6 * mask


def widen_neckline(picture: Tensor, labels: Tensor, draws: Draws, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Clothes beside the neck turn into skin of the neck's colour, labelled neck."""
    count, size, device = len(picture), picture.shape[-1], picture.device
    neck = (labels == NECK).float()[:, None]
    colour = (picture * neck).sum((2, 3), keepdim=True) / neck.sum((2, 3), keepdim=True).clamp(min=1)
    near = _blur(_blur(neck, _odd(0.25 * size)), _odd(0.25 * size))
    level = 0.02 + 0.25 * draws.uniform("neckline level", (count, 1, 1, 1), device)
    has = (neck.sum((2, 3), keepdim=True) > 0.002 * size**2) & _chosen(
        draws, "neckline", count, config.p_neckline, device
    )
    where = has & (near > level) & (labels == CLOTH)[:, None]
    shade = 1 + 0.15 * clouds(draws, "neckline", count, 1, size, device)
    return torch.where(where, colour * shade, picture), torch.where(where[:, 0], NECK, labels)


def grow_hair(picture: Tensor, labels: Tensor, draws: Draws, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Longer and wilder hair with new strands and colours."""
    count, size, device = len(picture), picture.shape[-1], picture.device
    soft = (labels == BACKGROUND) | (labels == CLOTH)
    fall = _falling(labels, draws) & soft & _chosen(draws, "long hair", count, config.p_long_hair, device)[:, 0]
    hair = (labels == HAIR) | fall
    spread = _odd(size * (0.03 + 0.25 * float(draws.uniform("hair spread", ()))))
    rough = 0.5 * clouds(draws, "hair edge", count, 1, size, device)[:, 0]
    level = 0.1 + 0.8 * draws.uniform("hair level", (count, 1, 1), device)
    beside = _blur(hair.float()[:, None], spread)[:, 0]
    near = torch.where(beside > 0.02, beside + 0.4 * rough, 0.0)
    wild = _chosen(draws, "wild hair", count, config.p_wild_hair, device)[:, 0]
    ears = _members(labels, (*EARS, NECK))[:, 0] > 0
    face = (labels == SKIN) & (near > 0.75)
    hair = hair | (wild & (near > level) & (soft | ears)) | (wild & face & (level < 0.5))
    new = hair & (labels != HAIR)
    painted = hair & _chosen(draws, "hair texture", count, config.p_hair_texture, device)[:, 0]
    repaint = (new.flatten(1).any(1)[:, None, None] & hair) | painted  # old and new hair look alike
    return torch.where(repaint[:, None], strands(draws, picture), picture), torch.where(new, HAIR, labels)


def _falling(labels: Tensor, draws: Draws) -> Tensor:
    """(N, S, S) bool: hair hangs down to here, nothing but background and clothes in between."""
    count, size = len(labels), labels.shape[-1]
    rows = torch.arange(size, device=labels.device)[:, None].expand(size, size)
    last_hair = torch.where(labels == HAIR, rows, -1).cummax(1).values
    other = (labels != HAIR) & (labels != BACKGROUND) & (labels != CLOTH)
    last_other = torch.where(other, rows, -1).cummax(1).values
    reach = size * draws.uniform("hair length", (count, 1, 1), labels.device)
    ends = 0.06 * size * _upsampled(draws.normal("hair ends", (count, 1, 1, 12), labels.device), size, "bicubic")
    return (last_hair > last_other) & (last_hair >= 0) & (rows - last_hair < reach + ends[:, 0])


def strands(draws: Draws, like: Tensor) -> Tensor:
    """(N, 3, S, S) pictures of hair: one colour, strands that bend or curl, waves of light."""
    count, size, device = len(like), like.shape[-1], like.device
    fine = draws.normal("strands", (count, 1, max(2, size // 16), size), device)
    fine = F.interpolate(fine, (size, size), mode="bilinear", align_corners=False)
    curls = draws.normal("curls", (count, 1, size // 4, size // 4), device)
    curl = draws.uniform("curly", (count, 1, 1, 1), device) ** 2
    fine = fine * (1 - curl) + _upsampled(curls, size, "bilinear") * curl
    angle = (draws.uniform("strand angle", (count,), device) - 0.5) * math.pi * 0.7
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    turn = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(turn, [count, 1, size, size], align_corners=False)
    bend = _upsampled(draws.normal("strand bend", (count, 2, 6, 6), device), size, "bicubic")
    fine = F.grid_sample(fine, grid + 0.15 * bend.permute(0, 2, 3, 1), "bilinear", "reflection", align_corners=False)
    light = 1 + 0.35 * clouds(draws, "hair light", count, 1, size, device)
    contrast = 0.1 + 0.4 * draws.uniform("strand contrast", (count, 1, 1, 1), device)
    return hair_colour(draws, "hair", count, device) * light * (1 + contrast * fine) + 0.02 * fine


def hair_colour(draws: Draws, name: str, count: int, device: torch.device) -> Tensor:
    """(N, 3, 1, 1) black, brown, red, blond and grey, and a few that no one is born with."""
    u = draws.uniform(f"{name} colour", (count, 5), device)
    bright, warm = 0.03 + 0.8 * u[:, 0] ** 2, u[:, 1]
    natural = torch.stack([bright, bright * (1 - 0.35 * warm), bright * (1 - 0.65 * warm)], 1)
    colour = torch.where(u[:, 2:3] < 0.1, u[:, 2:5] * torch.tensor([10.0, 1, 1], device=device), natural)
    return colour[:, :, None, None]


def cover(picture: Tensor, labels: Tensor, draws: Draws, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """An ellipse of anything in front of some heads, labelled background."""
    count, size, device = len(picture), picture.shape[-1], picture.device
    u = draws.uniform("cover", (count, 5, 1, 1), device)
    axis = torch.linspace(-1, 1, size, device=device)
    x, y = axis[None, None, :] - (2 * u[:, 0] - 1), axis[None, :, None] - (2 * u[:, 1] - 1)
    turn = math.pi * u[:, 4]
    along, across = x * torch.cos(turn) + y * torch.sin(turn), y * torch.cos(turn) - x * torch.sin(turn)
    inside = (along / (0.1 + 0.5 * u[:, 2])) ** 2 + (across / (0.05 + 0.2 * u[:, 3])) ** 2 < 1
    inside = inside & _chosen(draws, "cover", count, config.p_occluder, device)[:, 0]
    return picture, torch.where(inside, BACKGROUND, labels)  # painted together with the background


def relight(picture: Tensor, draws: Draws, config: AugmentConfig) -> Tensor:
    """Soft shadows and coloured light."""
    count, size, device = len(picture), picture.shape[-1], picture.device
    strength = 0.5 * draws.uniform("shadow strength", (count, 1, 1, 1), device)
    strength = strength * _chosen(draws, "shadow", count, config.p_shadow, device)
    shade = _upsampled(draws.normal("shadow", (count, 1, 4, 4), device), size, "bicubic")
    tint = 1 + 0.15 * _upsampled(draws.normal("tint", (count, 3, 3, 3), device), size, "bicubic")
    return picture * torch.exp(strength * shade) * tint


def photograph(picture: Tensor, draws: Draws, config: AugmentConfig) -> Tensor:
    """Exposure, contrast, saturation, white balance, gamma, defocus, few pixels, noise."""
    count, size, device = len(picture), picture.shape[-1], picture.device
    u = draws.uniform("camera", (count, 7, 1, 1, 1), device) * 2 - 1
    strength = config.colour
    grey = picture.mean(1, keepdim=True)
    picture = grey + (picture - grey) * (1 + 1.2 * strength * u[:, 0])
    mean = picture.mean((1, 2, 3), keepdim=True)
    picture = mean + (picture - mean) * (1 + strength * u[:, 1])
    balance = draws.uniform("balance", (count, 3, 1, 1), device) * 2 - 1
    picture = picture * torch.exp(strength * (u[:, 2] + 0.3 * balance))
    picture = picture.clamp(1e-4, 1) ** torch.exp(strength * u[:, 3])
    blurred = _blur(_blur(picture, 3), 3)
    small = F.interpolate(picture, scale_factor=0.5, mode="area")
    small = _upsampled(small, size, "bilinear")
    amount = _chosen(draws, "blur", count, config.p_blur, device) * (u[:, 4] + 1) / 2
    picture = picture + (torch.where(u[:, 5] > 0, blurred, small) - picture) * amount
    deviation = config.noise * ((u[:, 6] + 1) / 2) ** 2
    return picture + deviation * draws.normal("noise", (count, 3, size, size), device)


def texture(draws: Draws, name: str, like: Tensor) -> Tensor:
    """(N, 3, S, S) anything: two colours, mixed smoothly or with edges, clouds, stripes, grain."""
    count, size, device = len(like), like.shape[-1], like.device
    colour = draws.uniform(f"{name} colours", (count, 2, 3, 1, 1), device)
    u = draws.uniform(f"{name} kind", (count, 5, 1, 1, 1), device)
    saturation = 0.2 + 0.8 * u[:, 0, None]
    grey = colour.mean(2, keepdim=True)
    colour = grey + (colour - grey) * saturation
    axis = torch.linspace(-1, 1, size, device=device)
    turn = 2 * math.pi * u[:, 1]
    ramp = axis[None, None, None, :] * torch.cos(turn) + axis[None, None, :, None] * torch.sin(turn)
    stripes = torch.sin(ramp * (3 + 40 * u[:, 2] ** 2))
    field = torch.where(u[:, 3] < 0.15, stripes, ramp * 0.7 + clouds(draws, name, count, 1, size, device))
    sharpness = torch.exp(4 * u[:, 4] - 1)
    mix = torch.sigmoid(sharpness * field)
    picture = colour[:, 0] * mix + colour[:, 1] * (1 - mix)
    rough = 0.3 * draws.uniform(f"{name} rough", (count, 1, 1, 1), device) ** 2
    return (picture + rough * clouds(draws, f"{name} detail", count, 3, size, device)).clamp(0, 1)


def clouds(draws: Draws, name: str, count: int, channels: int, size: int, device: torch.device) -> Tensor:
    """(N, C, S, S) noise of many scales with deviation about 1; how rough differs from picture to picture."""
    slope = draws.uniform(f"{name} slope", (count, 1, 1, 1), device) * 1.2 + 0.3
    total, power, cells = 0.0, 0.0, 3
    while cells <= size:
        octave = _upsampled(draws.normal(f"{name} {cells}", (count, channels, cells, cells), device), size, "bilinear")
        weight = (3 / cells) ** slope
        total, power, cells = total + octave * weight, power + weight**2, cells * 2
    return total / power**0.5 * 1.5  # type: ignore[operator]


def _chosen(draws: Draws, name: str, count: int, probability: float, device: torch.device) -> Tensor:
    return draws.uniform(f"{name} chosen", (count, 1, 1, 1), device) < probability


def _members(labels: Tensor, classes: tuple[int, ...]) -> Tensor:
    """(N, 1, S, S) float: 1 where the label is one of ``classes``."""
    return torch.isin(labels, torch.tensor(classes, device=labels.device)).float()[:, None]


def _odd(width: float) -> int:
    return 2 * round(width / 2) + 1


def _blur(x: Tensor, width: int) -> Tensor:
    """Mean over ``width`` x ``width`` pixels (odd), the border not counted."""
    rows = F.avg_pool2d(x, (width, 1), 1, (width // 2, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, width), 1, (0, width // 2), count_include_pad=False)


def _upsampled(x: Tensor, size: int, mode: str) -> Tensor:
    return F.interpolate(x, (size, size), mode=mode, align_corners=False)
