# SPDX-License-Identifier: Apache-2.0
"""Adaptive discriminator augmentation (ADA; Karras et al., arXiv 2006.06676, appendix B).

Every transformation happens to a sample with probability ``strength * p``; ``p`` is a buffer that the training
adapts (:mod:`facelab.training.ada`). The geometric ones are collected in one matrix and applied once, between an
upsampling and a downsampling with a sym6 wavelet filter, so that no aliasing tells the discriminator of them.
The pipe is differentiable in the images. All random numbers come from one :class:`~facelab.draws.Draws`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cuda_ops import downsample2d, grid_sample_2d, setup_filter, upsample2d
from facelab.draws import Draws
from facelab.tensors import constant

SYM6 = (
    0.0108923493, 0.002468305873, -0.08343160152, -0.03416156024, 0.3472289443, 0.5569463968,
    0.2389521748, -0.05136248097, -0.01489187405, 0.03162527829, 0.001249960973, -0.005515933502,
)  # fmt: skip
SYM2 = (-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025)
BAND_POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)  # expected power of natural images in the four bands
GEOMETRIC = ("xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac")
COLOURS = ("brightness", "contrast", "lumaflip", "hue", "saturation")
# step -> (uniform, normal) numbers per sample, the coins (one each, four for the bands) first among the uniform ones
NUMBERS = {
    "xflip": (2, 0), "rotate90": (2, 0), "xint": (3, 0), "scale": (1, 1), "rotate": (2, 0), "aniso": (1, 1),
    "rotate_after": (2, 0), "xfrac": (1, 2), "brightness": (1, 1), "contrast": (1, 1), "lumaflip": (2, 0),
    "hue": (2, 0), "saturation": (1, 1), "imgfilter": (4, 4), "noise": (1, 1), "cutout": (3, 0),
}  # fmt: skip


@dataclass(frozen=True)
class AugmentConfig:
    """Strength of each transformation, a factor on its probability; 0 = off. Defaults are EG3D's set (``bgc``)."""

    xflip: float = 1.0  # mirror
    rotate90: float = 1.0  # quarter turns
    xint: float = 1.0  # shift by whole pixels, up to 1/8 of the side
    scale: float = 1.0  # zoom by 2^(0.2 N)
    rotate: float = 1.0  # any angle
    aniso: float = 1.0  # stretch by 2^(0.2 N)
    xfrac: float = 1.0  # shift by 1/8 N of the side
    brightness: float = 1.0  # + 0.2 N
    contrast: float = 1.0  # * 2^(0.5 N)
    lumaflip: float = 1.0  # mirror the luma axis
    hue: float = 1.0  # turn about the luma axis
    saturation: float = 1.0  # * 2^N off the luma axis
    imgfilter: float = 0.0  # gain of each of four frequency bands by 2^N
    noise: float = 0.0  # RGB noise of deviation 0.1 |N|
    cutout: float = 0.0  # a square of half the side becomes 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 <= getattr(self, field.name) <= 1e3:
                raise ValueError(f"strength {field.name} must be 0 or more, got {getattr(self, field.name)}")


class Numbers(Protocol):
    """Where the numbers of one call come from."""

    def uniform(self, step: str) -> Tensor:
        """(N, k) parameters in [0, 1)."""
        ...

    def normal(self, step: str) -> Tensor:
        """(N, k) standard normal parameters."""
        ...

    def happens(self, step: str, probability: Tensor) -> Tensor:
        """(N,) bool, or (N, 4) for the bands."""
        ...


class RandomNumbers:
    """All numbers of a call, drawn on the CPU by step, whether it is on or not, and moved in two pieces."""

    def __init__(self, draws: Draws, count: int, device: torch.device) -> None:
        columns = [sum(pair[kind] for pair in NUMBERS.values()) for kind in (0, 1)]
        self._all = (
            draws.host(lambda own: own.uniform("augment/uniform", (count, columns[0])), device),
            draws.host(lambda own: own.normal("augment/normal", (count, columns[1])), device),
        )

    def _columns(self, step: str, kind: int) -> Tensor:
        names = list(NUMBERS)
        start = sum(NUMBERS[name][kind] for name in names[: names.index(step)])
        return self._all[kind][:, start : start + NUMBERS[step][kind]]

    def uniform(self, step: str) -> Tensor:
        return self._columns(step, 0)[:, 1:]

    def normal(self, step: str) -> Tensor:
        return self._columns(step, 1)

    def happens(self, step: str, probability: Tensor) -> Tensor:
        coins = self._columns(step, 0)
        return (coins if step == "imgfilter" else coins[:, 0]) < probability


class PercentileNumbers:
    """Every step happens, with the ``q``-quantile of its parameter (of its erf, without the factor sqrt 2)."""

    def __init__(self, percentile: float, count: int, device: torch.device) -> None:
        if not 0 < percentile < 1:
            raise ValueError(f"the percentile must lie in (0, 1), got {percentile}")
        self._q = torch.full((count, 4), percentile, device=device)

    def uniform(self, step: str) -> Tensor:
        # the second rotation stays out: 0.5 is no rotation
        return torch.full_like(self._q, 0.5) if step == "rotate_after" else self._q

    def normal(self, step: str) -> Tensor:
        return torch.erfinv(2 * self._q - 1)

    def happens(self, step: str, probability: Tensor) -> Tensor:
        return torch.ones_like(self._q if step == "imgfilter" else self._q[:, 0], dtype=torch.bool)


class AugmentPipe(nn.Module):
    """Images -> augmented images of the same shape; labels are not changed.

    Attributes:
        p: 0-d buffer, the overall probability; above 1 more and more steps are certain.
        sign_sum, sign_steps: 0-d buffers of the controller: what it has collected since it last changed p.
        config: strengths.
    """

    p: Tensor
    sign_sum: Tensor
    sign_steps: Tensor
    geometry_filter: Tensor
    filter_bank: Tensor

    def __init__(self, config: AugmentConfig | None = None, p: float = 0.0) -> None:
        super().__init__()
        self.config = config or AugmentConfig()
        self.register_buffer("p", torch.tensor(float(p)))
        self.register_buffer("sign_sum", torch.tensor(0.0))
        self.register_buffer("sign_steps", torch.tensor(0.0))
        self.register_buffer("geometry_filter", setup_filter(list(SYM6)), persistent=False)
        self.register_buffer("filter_bank", filter_bank(), persistent=False)

    def forward(self, images: Tensor, draws: Draws | None, percentile: float | None = None) -> Tensor:
        """Augment (N, C, H, W) images, C 1, 3 or 6 (two pictures that get the same transformation).

        Args:
            images: values about [-1, 1].
            draws: random numbers, named ``augment/...``; may be None with ``percentile``.
            percentile: instead of random numbers, the same quantile of every parameter (tests).

        Raises:
            ValueError: another number of channels, or neither draws nor percentile.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3, 6):
            raise ValueError(f"augmentation expects (N, 1, 3 or 6, H, W) images, got {tuple(images.shape)}")
        count, device, c = len(images), images.device, self.config
        if percentile is None and draws is None:
            raise ValueError("augmentation needs draws (or a percentile, for tests)")
        numbers: Numbers = (
            RandomNumbers(draws, count, device)
            if percentile is None and draws is not None
            else PercentileNumbers(percentile or 0.0, count, device)
        )
        with torch.autocast(device.type, enabled=False):
            images = images.float()
            if any(getattr(c, name) for name in GEOMETRIC):
                if draws is not None:
                    draws.unrepeatable("augments pictures, whose margins depend on random numbers")
                images = self._warp(images, self._geometry(numbers, count, images.shape[2:]))
            if any(getattr(c, name) for name in COLOURS):
                images = recolour(images, self._colour(numbers, count, images.shape[1]))
            if c.imgfilter:
                images = self._filter(images, numbers)
            if c.noise and draws is not None:
                images = self._noise(images, numbers, draws)
            if c.cutout:
                images = self._cutout(images, numbers)
        return images

    def _choose(self, numbers: Numbers, step: str, strength: float, value: Tensor, neutral: float) -> Tensor:
        """``value`` (N, ...) where the step happens, else ``neutral``."""
        happens = numbers.happens(step, self.p * strength)
        return torch.where(happens.reshape(happens.shape + (1,) * (value.ndim - happens.ndim)), value, neutral)

    def _turn(self, numbers: Numbers, step: str) -> Tensor:
        """(N,) angle; both rotations together happen with probability strength * p."""
        angle = (2 * numbers.uniform(step)[:, 0] - 1) * math.pi
        probability = 1 - torch.sqrt((1 - self.config.rotate * self.p).clamp(0, 1))
        return torch.where(numbers.happens(step, probability), angle, 0.0)

    def _geometry(self, numbers: Numbers, count: int, size: torch.Size) -> Tensor:
        """(N, 3, 3): output pixel -> input pixel, origin in the middle, x right, y down."""
        height, width = size
        side = constant([width, height], self.p.device)
        c, m = self.config, torch.eye(3, device=self.p.device).repeat(count, 1, 1)
        if c.xflip:
            i = self._choose(numbers, "xflip", c.xflip, torch.floor(numbers.uniform("xflip")[:, 0] * 2), 0.0)
            m = m @ scale2d(1 / (1 - 2 * i), torch.ones_like(i))
        if c.rotate90:
            i = self._choose(numbers, "rotate90", c.rotate90, torch.floor(numbers.uniform("rotate90")[:, 0] * 4), 0.0)
            m = m @ rotate2d(math.pi / 2 * i)
        if c.xint:
            shift = (numbers.uniform("xint")[:, :2] * 2 - 1) * 0.125
            m = m @ translate2d(-torch.round(self._choose(numbers, "xint", c.xint, shift, 0.0) * side))
        if c.scale:
            s = self._choose(numbers, "scale", c.scale, torch.exp2(0.2 * numbers.normal("scale")[:, 0]), 1.0)
            m = m @ scale2d(1 / s, 1 / s)
        if c.rotate:
            m = m @ rotate2d(self._turn(numbers, "rotate"))
        if c.aniso:
            s = self._choose(numbers, "aniso", c.aniso, torch.exp2(0.2 * numbers.normal("aniso")[:, 0]), 1.0)
            m = m @ scale2d(1 / s, s)
        if c.rotate:
            m = m @ rotate2d(self._turn(numbers, "rotate_after"))
        if c.xfrac:
            shift = self._choose(numbers, "xfrac", c.xfrac, 0.125 * numbers.normal("xfrac")[:, :2], 0.0)
            m = m @ translate2d(-shift * side)
        return m

    def _warp(self, images: Tensor, m: Tensor) -> Tensor:
        """Resample with a matrix of :meth:`_geometry`; reflected at the borders."""
        _, channels, height, width = images.shape
        taps = len(self.geometry_filter)
        half = taps // 4
        # One margin for the batch: what the matrices reach beyond the picture, and room for the filter.
        middle = torch.tensor([(width - 1) / 2, (height - 1) / 2], device=images.device)
        signs = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]], device=images.device)
        corners = torch.cat([signs * middle, torch.ones_like(signs[:, :1])], dim=1)
        reached = (m @ corners.t())[:, :2].transpose(0, 1).flatten(1)  # x and y of all corners
        margin = torch.cat([-reached, reached]).amax(dim=1) + 2 * half - middle.repeat(2)
        limit = torch.tensor([width - 1.0, height - 1.0] * 2, device=images.device)
        # sizes of tensors: the one place where the pipe waits for the device
        left, top, right, bottom = margin.clamp(min=0).minimum(limit).ceil().int().tolist()
        images = F.pad(images, (left, right, top, bottom), mode="reflect")
        shift = torch.tensor([[(left - right) / 2, (top - bottom) / 2]], device=images.device)
        m = translate2d(shift) @ m
        images = upsample2d(images, self.geometry_filter, up=2)
        one, corner = torch.ones(1, device=images.device), torch.full((1, 2), 0.5, device=images.device)
        m = scale2d(2 * one, 2 * one) @ m @ scale2d(0.5 * one, 0.5 * one)
        m = translate2d(-corner) @ m @ translate2d(corner)
        wide, high = 2 * (width + 2 * half), 2 * (height + 2 * half)
        inner = scale2d(2 / images.shape[3] * one, 2 / images.shape[2] * one)
        m = inner @ m @ scale2d(wide / 2 * one, high / 2 * one)
        grid = F.affine_grid(m[:, :2], [len(images), channels, high, wide], align_corners=False)
        images = grid_sample_2d(images, grid)
        return downsample2d(images, self.geometry_filter, down=2, padding=-2 * half, flip_filter=True)

    def _colour(self, numbers: Numbers, count: int, channels: int) -> Tensor:
        """(N, 4, 4) on homogeneous RGB."""
        c, device = self.config, self.p.device
        identity = torch.eye(4, device=device)
        m = identity.repeat(count, 1, 1)
        luma = constant([1.0, 1.0, 1.0, 0.0], device) / math.sqrt(3)
        onto = torch.outer(luma, luma)
        if c.brightness:
            b = self._choose(numbers, "brightness", c.brightness, 0.2 * numbers.normal("brightness")[:, 0], 0.0)
            shift = identity.repeat(count, 1, 1)
            shift[:, :3, 3] = b[:, None]
            m = shift @ m
        if c.contrast:
            s = torch.exp2(0.5 * numbers.normal("contrast")[:, 0])
            s = self._choose(numbers, "contrast", c.contrast, s, 1.0)
            m = torch.diag_embed(torch.stack([s, s, s, torch.ones_like(s)], dim=1)) @ m
        if c.lumaflip:
            i = torch.floor(numbers.uniform("lumaflip")[:, 0] * 2)
            i = self._choose(numbers, "lumaflip", c.lumaflip, i, 0.0)
            m = (identity - 2 * i[:, None, None] * onto) @ m
        if c.hue and channels > 1:
            angle = (2 * numbers.uniform("hue")[:, 0] - 1) * math.pi
            m = turn_about_luma(self._choose(numbers, "hue", c.hue, angle, 0.0)) @ m
        if c.saturation and channels > 1:
            s = torch.exp2(numbers.normal("saturation")[:, 0])
            s = self._choose(numbers, "saturation", c.saturation, s, 1.0)
            m = (onto + (identity - onto) * s[:, None, None]) @ m
        return m

    def _filter(self, images: Tensor, numbers: Numbers) -> Tensor:
        """Gains of the frequency bands, normalised to keep the power of a natural image."""
        count, channels, height, width = images.shape
        power = constant(BAND_POWER, images.device)
        amplitude = self._choose(
            numbers, "imgfilter", self.config.imgfilter, torch.exp2(numbers.normal("imgfilter")), 1.0
        )
        gain = torch.ones(count, len(BAND_POWER), device=images.device)
        for band in range(len(BAND_POWER)):
            t = torch.ones_like(gain)
            t[:, band] = amplitude[:, band]
            gain = gain * t / (power * t.square()).sum(dim=1, keepdim=True).sqrt()
        taps = (gain @ self.filter_bank).repeat_interleave(channels, dim=0)
        half, rows = self.filter_bank.shape[1] // 2, count * channels
        padded = F.pad(images.reshape(1, rows, height, width), (half,) * 4, mode="reflect")
        filtered = F.conv2d(padded, taps[:, None, None, :], groups=rows)
        return F.conv2d(filtered, taps[:, None, :, None], groups=rows).reshape(images.shape)

    def _noise(self, images: Tensor, numbers: Numbers, draws: Draws) -> Tensor:
        sigma = 0.1 * numbers.normal("noise")[:, 0].abs()
        sigma = self._choose(numbers, "noise", self.config.noise, sigma, 0.0)
        return images + sigma[:, None, None, None] * draws.normal("augment/noise", images.shape, images.device)

    def _cutout(self, images: Tensor, numbers: Numbers) -> Tensor:
        centre = numbers.uniform("cutout")[:, :2]
        size = self._choose(numbers, "cutout", self.config.cutout, torch.full_like(centre[:, 0], 0.5), 0.0)
        height, width = images.shape[2:]
        x = (torch.arange(width, device=images.device) + 0.5) / width
        y = (torch.arange(height, device=images.device) + 0.5) / height
        inside_x = (x - centre[:, :1]).abs() < size[:, None] / 2
        inside_y = (y - centre[:, 1:]).abs() < size[:, None] / 2
        return images.masked_fill((inside_y[:, :, None] & inside_x[:, None, :])[:, None], 0.0)


def recolour(images: Tensor, matrix: Tensor) -> Tensor:
    """Apply (N, 4, 4) colour matrices to (N, 1, 3 or 6, H, W) images, the same to both halves of 6 channels."""
    channels = images.shape[1]
    if channels == 1:
        m = matrix[:, :3].mean(dim=1)[:, :, None, None]
        return images * m[:, :3].sum(dim=1, keepdim=True) + m[:, 3:]
    pixels = images.unflatten(1, (channels // 3, 3)).flatten(3)
    return (matrix[:, None, :3, :3] @ pixels + matrix[:, None, :3, 3:]).reshape(images.shape)


def translate2d(shift: Tensor) -> Tensor:
    """(N, 2) -> (N, 3, 3)."""
    m = torch.eye(3, device=shift.device, dtype=shift.dtype).repeat(len(shift), 1, 1)
    m[:, :2, 2] = shift
    return m


def scale2d(x: Tensor, y: Tensor) -> Tensor:
    """(N,), (N,) -> (N, 3, 3)."""
    return torch.diag_embed(torch.stack([x, y, torch.ones_like(x)], dim=1))


def rotate2d(angle: Tensor) -> Tensor:
    """(N,) radians -> (N, 3, 3), [[cos, -sin], [sin, cos]]."""
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=1).reshape(-1, 3, 3)


def turn_about_luma(angle: Tensor) -> Tensor:
    """(N,) radians -> (N, 4, 4): right-handed rotation about (1, 1, 1) (Rodrigues' formula)."""
    v = 1 / math.sqrt(3)
    cross = constant([[0, -v, v], [v, 0, -v], [-v, v, 0]], angle.device, angle.dtype)
    eye = torch.eye(3, device=angle.device, dtype=angle.dtype)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    m = torch.eye(4, device=angle.device, dtype=angle.dtype).repeat(len(angle), 1, 1)
    m[:, :3, :3] = cos * eye + sin * cross + (1 - cos) * torch.full_like(eye, 1 / 3)
    return m


def filter_bank() -> Tensor:
    """(4, 43): band-pass filters of an octave each, from the sym2 wavelet; they add up to the identity."""
    low = torch.tensor(SYM2, dtype=torch.float64)
    high = low * torch.tensor([(-1.0) ** k for k in range(len(SYM2))], dtype=torch.float64)

    def convolve(rows: Tensor, taps: Tensor) -> Tensor:
        return F.conv1d(rows[:, None], taps.flip(0)[None, None], padding=len(taps) - 1)[:, 0]

    low2, high2 = (convolve(t[None], t.flip(0))[0] / 2 for t in (low, high))
    bank = torch.eye(4, 1, dtype=torch.float64)
    for row in range(1, 4):
        spread = torch.zeros(4, 2 * bank.shape[1] - 1, dtype=torch.float64)
        spread[:, ::2] = bank
        bank = convolve(spread, low2)
        start = (bank.shape[1] - len(high2)) // 2
        bank[row, start : start + len(high2)] += high2
    return bank.float()
