# SPDX-License-Identifier: Apache-2.0
"""Distances between pictures as a network sees them.

:class:`LpipsVgg` is the perceptual metric of arXiv 1801.03924 in its VGG16 form, from published weights.
:class:`RandomPerceptual` has the same form on fixed random convolutions; it needs no file, and its numbers are called
``perceptual_random``: they steer an optimisation, and compare with nothing published.

Shape legend: N pictures, C channels of a tap, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facelab.errors import UserError

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation for values in -1..1
EPSILON = 1e-10
VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # halved between stages
TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # its places of the convolutions
SMALLEST = 16  # pixels: four halvings must leave something


class PerceptualNet(Protocol):
    """A distance made of features.

    Attributes:
        name: identifies weights and preprocessing, stored beside every number.
        metric: what its distance is called.
    """

    name: str
    metric: str

    def features(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, S, S) in [-1, 1] -> taps whose squared differences, summed, are the distance."""
        ...


def perceptual_distance(net: PerceptualNet, first: Tensor | Sequence[Tensor], second: Tensor) -> Tensor:
    """(N,) distances of pictures in [-1, 1]; ``first`` may be features that were computed once."""
    known = net.features(first) if isinstance(first, Tensor) else first
    seen = net.features(second)
    return sum((F.mse_loss(b, a, reduction="none").flatten(1).sum(1) for a, b in zip(known, seen, strict=True)), _zero)


_zero = torch.zeros(())


class LpipsVgg(nn.Module):
    """LPIPS, VGG16 form: unit feature vectors after five ReLUs, squared differences weighted by channel, averaged over
    the picture, summed over the taps (arXiv 1801.03924, equation 1).

    Pictures are taken as they are: no resizing.

    Args:
        tensors: by published names, see :func:`lpips_tensors`.
        standardise: bring pictures to ImageNet's statistics first (version 0.1); off: version 0.0, whose weights are
            others.

    Raises:
        UserError: tensors are missing or of another shape, or a channel weight is negative.
    """

    metric = "lpips_vgg"

    def __init__(self, tensors: Mapping[str, Tensor], standardise: bool = True) -> None:
        super().__init__()
        self.standardise = standardise
        self.name = f"lpips-vgg16/{'0.1' if standardise else '0.0'}"
        widths = [3, *(width for stage in VGG_STAGES for width in stage)]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, 1, 1) for a, b in zip(widths[:-1], widths[1:]))
        for tap, stage in enumerate(VGG_STAGES):
            self.register_buffer(f"weight_{tap}", torch.zeros(1, stage[-1], 1, 1))
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.load_state_dict(lpips_tensors(tensors, self.state_dict()))
        self.requires_grad_(False).eval()

    def taps(self, pictures: Tensor) -> list[Tensor]:
        """(N, 3, S, S) in [-1, 1] -> features after the last ReLU of each of the five stages, not normalised."""
        x = _checked(pictures)
        if self.standardise:
            x = (x - self.get_buffer("shift")) / self.get_buffer("scale")
        found, convolutions = [], iter(self.convolutions)
        for number, stage in enumerate(VGG_STAGES):
            x = F.max_pool2d(x, 2) if number else x
            for _ in stage:
                x = F.relu(next(convolutions)(x))
            found.append(x)
        return found

    def features(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """See :class:`PerceptualNet`: five taps (N, C, S, S)."""
        weights = [self.get_buffer(f"weight_{tap}") for tap in range(len(VGG_STAGES))]
        return tuple(_unit(x) * (w / (x.shape[2] * x.shape[3])).sqrt() for x, w in zip(self.taps(pictures), weights))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """(N,) distances of two batches of pictures in [-1, 1]."""
        return perceptual_distance(self, first, second)


def lpips_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors -> the state of :class:`LpipsVgg`.

    Known are the file of StyleGAN's metrics (``layers.conv1.weight`` ... ``lpips0``), and torchvision's VGG16
    (``features.0.weight`` ...) together with the weights of the ``lpips`` package (``lin0.model.1.weight`` ...).

    Raises:
        UserError: a tensor is missing, of another shape, or a channel weight is negative.
    """
    ours: dict[str, Tensor] = {}
    torchscript = "layers.conv1.weight" in tensors
    for name, wanted in expected.items():
        if name.startswith("weight_"):
            tap = name.removeprefix("weight_")
            theirs = f"lpips{tap}" if torchscript else f"lin{tap}.model.1.weight"
        else:
            _, number, kind = name.split(".")
            place = f"layers.conv{int(number) + 1}" if torchscript else f"features.{TORCHVISION[int(number)]}"
            theirs = f"{place}.{kind}"
        value = tensors.get(theirs)
        if value is None or value.numel() != wanted.numel() or (value.ndim == 4 and value.shape != wanted.shape):
            got = "nothing of that name" if value is None else str(tuple(value.shape))
            raise UserError(
                f"this is not LPIPS on VGG16: {theirs} must be {tuple(wanted.shape)}, got {got}; expected vgg16.pt of "
                "StyleGAN's metrics, or torchvision's vgg16 with the linear weights of the lpips package"
            )
        ours[name] = value.detach().float().reshape(wanted.shape)
        if name.startswith("weight_") and not bool((ours[name] >= 0).all()):
            raise UserError(f"this is not LPIPS on VGG16: {theirs} must not be negative or NaN")
    return ours


class RandomPerceptual(nn.Module):
    """A substitute for LPIPS without a file: four stages of fixed random convolutions, compared as LPIPS compares.

    Weights are a pure function of ``seed`` (numpy's PCG64, whose stream does not change). Every stage halves the
    picture; each tap counts the same. Untrained features see edges and colours, not what a person finds alike.
    """

    metric = "perceptual_random"
    channels = (24, 48, 64, 64)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.name = f"random-conv-perceptual-v1/seed{seed}"
        width = 3
        for number, channels in enumerate(self.channels):
            numbers = np.random.Generator(np.random.PCG64([seed, number]))
            weight = numbers.standard_normal((channels, width, 3, 3)) * np.sqrt(2 / (9 * width))
            bias = numbers.standard_normal(channels) * 0.1
            self.register_buffer(f"weight_{number}", torch.from_numpy(weight.astype(np.float32)))
            self.register_buffer(f"bias_{number}", torch.from_numpy(bias.astype(np.float32)))
            width = channels

    def features(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """See :class:`PerceptualNet`: four taps."""
        x, found = _checked(pictures), []
        for number in range(len(self.channels)):
            x = F.avg_pool2d(x, 2) if number else x
            x = F.relu(F.conv2d(x, self.get_buffer(f"weight_{number}"), self.get_buffer(f"bias_{number}"), padding=1))
            found.append(_unit(x) / (len(self.channels) * x.shape[2] * x.shape[3]) ** 0.5)
        return tuple(found)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """(N,) distances of two batches of pictures in [-1, 1]."""
        return perceptual_distance(self, first, second)


def at_most(pictures: Tensor, side: int) -> Tensor:
    """Pictures (N, C, S, S) brought down to ``side`` by area averages; smaller ones stay."""
    if max(pictures.shape[2:]) <= side:
        return pictures
    return F.interpolate(pictures, size=(side, side), mode="area")


def _unit(x: Tensor) -> Tensor:
    """Feature vectors divided by their length; a vector of zeros stays zero, also in the derivative."""
    square = x.square().sum(1, keepdim=True)
    safe = torch.where(square > 0, square, torch.ones_like(square))
    return x / (torch.where(square > 0, safe.sqrt(), torch.zeros_like(square)) + EPSILON)


def _checked(pictures: Tensor) -> Tensor:
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.is_floating_point():
        raise ValueError(f"pictures must be float (N, 3, H, W) in [-1, 1], got {pictures.dtype} {pictures.shape}")
    if min(pictures.shape[2:]) < SMALLEST:
        raise ValueError(f"a perceptual distance needs pictures of {SMALLEST} pixels a side, got {pictures.shape[2:]}")
    return pictures
