# SPDX-License-Identifier: Apache-2.0
"""How good a reconstruction is: (N,) numbers for N pictures in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.generator import GeneratorOutput
from facelab.inversion.problem import Target
from facelab.losses.perceptual import PerceptualNet, at_most, perceptual_distance
from facelab.metrics.segmentation import mean_iou

RANGE = 2.0  # of values
WINDOW, DEVIATION = 11, 1.5  # pixels, of the SSIM's Gaussian
K1, K2 = 0.01, 0.03


def psnr(picture: Tensor, target: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB, peak 2; infinite for equal pictures."""
    square = (picture.double() - target.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(RANGE**2 / square)


def ssim(picture: Tensor, target: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004): Gaussian windows of 11 pixels inside the picture, mean over channels.

    ValueError for pictures smaller than a window.
    """
    if min(picture.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of {WINDOW} pixels a side, got {tuple(picture.shape[2:])}")
    channels = picture.shape[1]
    x = torch.arange(WINDOW, dtype=torch.float64, device=picture.device) - WINDOW // 2
    row = torch.exp(-x.square() / (2 * DEVIATION**2))
    row = row / row.sum()
    kernel = (row[:, None] * row).expand(channels, 1, WINDOW, WINDOW)

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, kernel, groups=channels)

    a, b = picture.double() / 2 + 0.5, target.double() / 2 + 0.5  # means must not be negative
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a.square(), mean(b * b) - mean_b.square()
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    return (luminance * (2 * covariance + c2) / (var_a + var_b + c2)).flatten(1).mean(1)


@torch.no_grad()
def measure(
    output: GeneratorOutput, target: Target, net: PerceptualNet | None = None, side: int = 256
) -> dict[str, Tensor]:
    """Numbers of N reconstructions.

    Args:
        output: renderings from the target's cameras; values outside [-1, 1] are cut off, as a file would.
        target: the photos.
        net: of the perceptual distance, which is named after it (``lpips_vgg``, ``perceptual_random``).
        side: pixels to which pictures are brought down for it.

    Returns:
        ``psnr``, ``ssim`` (where pictures are large enough), the perceptual distance, and ``miou`` where both sides have
        a segmentation: mean over the channels that occur in either; pixels of unknown label count as right.
    """
    picture = output.rgb.clamp(-1, 1)
    found = {"psnr": psnr(picture, target.picture)}
    if min(picture.shape[2:]) >= WINDOW:
        found["ssim"] = ssim(picture, target.picture)
    if net is not None:
        found[net.metric] = perceptual_distance(net, at_most(target.picture, side), at_most(picture, side))
    if target.labels is not None and output.semantics is not None:
        labels = output.semantics.argmax(1)
        wanted = torch.where(target.labels < 0, labels, target.labels.long())
        found["miou"] = mean_iou(labels, wanted, output.semantics.shape[1])
    return found
