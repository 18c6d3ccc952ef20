# SPDX-License-Identifier: Apache-2.0
"""The terms of CNeRF's first training stage, each with its weight (arXiv 2302.01579, section 3.4).

Two discriminators judge the rendered thumbnail with its masks: the global one sees all channels and reads off the view,
the one of regions sees one channel, the thumbnail through it, and reads off which region it is.

Shape legend: N samples, K regions, R side of the thumbnails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.losses.adversarial import at_least_float32, d_fake_loss, d_real_loss, g_loss
from facelab.losses.sdf import eikonal_loss, minimal_surface_loss, viewpoint_loss
from facelab.methods.cnerf.config import LossConfig
from facelab.nn.discriminators.coordconv import Judgement

Judge = Callable[[Tensor, Tensor], Judgement]


@dataclass(frozen=True)
class Portraits:
    """Pictures with their masks.

    Attributes:
        image: (N, 3, R, R) in [-1, 1].
        masks: (N, K, R, R) raw values of about 0..1.
    """

    image: Tensor
    masks: Tensor

    def channel(self, regions: Tensor) -> Tensor:
        """(N, 1, R, R): the mask of region ``regions`` (N,) of each."""
        return self.masks[torch.arange(len(regions), device=regions.device), regions][:, None]

    def detach(self) -> Portraits:
        """The same numbers without their graph."""
        return Portraits(self.image.detach(), self.masks.detach())

    def leaves(self) -> Portraits:
        """The same numbers as inputs that gradients are asked for."""
        return Portraits(self.image.detach().requires_grad_(), self.masks.detach().requires_grad_())


@dataclass(frozen=True)
class Terms:
    """Weighted terms of one loss; 0-d tensors."""

    @property
    def total(self) -> Tensor:
        """Their sum."""
        return torch.stack([getattr(self, entry.name) for entry in fields(self)]).sum()


@dataclass(frozen=True)
class GlobalTerms(Terms):
    """Of the global discriminator: realness, R1 on picture and masks, the view of fakes."""

    realness: Tensor
    r1: Tensor
    view: Tensor


@dataclass(frozen=True)
class RegionTerms(Terms):
    """Of the discriminator of regions: realness, R1 on picture and channel, the region of reals and fakes."""

    realness: Tensor
    r1: Tensor
    classes: Tensor


@dataclass(frozen=True)
class GeneratorTerms(Terms):
    """Of the generator: what both discriminators say, and the regularity of the distance."""

    realness: Tensor
    view: Tensor
    eikonal: Tensor
    surface: Tensor
    region_realness: Tensor
    classes: Tensor


def global_terms(judge: Judge, real: Portraits, fake: Portraits, angles: Tensor, weights: LossConfig) -> GlobalTerms:
    """Terms of the global discriminator.

    Args:
        judge: picture and masks -> judgement with the view.
        real, fake: as many samples each; graphs of them are cut.
        angles: (N, 2) azimuth and elevation that the fakes are seen from, radians.
    """
    leaves, fake = real.leaves(), fake.detach()
    on_fake, on_real = judge(fake.image, fake.masks), judge(leaves.image, leaves.masks)
    assert on_fake.view is not None
    return GlobalTerms(
        d_fake_loss(on_fake.realness) + d_real_loss(on_real.realness),
        portrait_r1(on_real.realness, leaves.image, leaves.masks, weights),
        weights.view * viewpoint_loss(on_fake.view, angles),
    )


def region_terms(judge: Judge, real: Portraits, fake: Portraits, regions: Tensor, weights: LossConfig) -> RegionTerms:
    """Terms of the discriminator of regions; arguments as in :func:`global_terms`.

    Args:
        judge: picture and one channel -> judgement with the region.
        regions: (N,) the region that is judged of each sample, real and fake.
    """
    fake = fake.detach()
    image, channel = real.image.detach().requires_grad_(), real.detach().channel(regions).requires_grad_()
    on_fake, on_real = judge(fake.image, fake.channel(regions)), judge(image, channel)
    return RegionTerms(
        weights.semantic * (d_fake_loss(on_fake.realness) + d_real_loss(on_real.realness)),
        weights.semantic * portrait_r1(on_real.realness, image, channel, weights),
        weights.semantic * (_class_loss(on_real, regions) + _class_loss(on_fake, regions)),
    )


def generator_terms(
    judge: Judge,
    region_judge: Judge,
    fake: Portraits,
    angles: Tensor,
    sdf: Tensor,
    gradient: Tensor,
    regions: Tensor,
    weights: LossConfig,
) -> GeneratorTerms:
    """Terms of the generator.

    Args:
        fake: with their graph.
        angles: (N, 2) that the fakes are seen from.
        sdf, gradient: (..., 1) and (..., 3) of the samples of their rays.
        regions: (N,) the region that is judged of each.
    """
    said, of_region = judge(fake.image, fake.masks), region_judge(fake.image, fake.channel(regions))
    assert said.view is not None
    return GeneratorTerms(
        g_loss(said.realness),
        weights.view * viewpoint_loss(said.view, angles),
        weights.eikonal * eikonal_loss(gradient),
        weights.surface * minimal_surface_loss(sdf, weights.surface_sharpness),
        weights.semantic * g_loss(of_region.realness),
        weights.semantic * _class_loss(of_region, regions),
    )


def portrait_r1(realness: Tensor, image: Tensor, masks: Tensor, weights: LossConfig) -> Tensor:
    """R1 on pictures and masks, weighted; both gradients come from one pass back through the discriminator."""
    with torch.autocast(image.device.type, enabled=False):
        logits = at_least_float32(realness).sum()
        gradients = torch.autograd.grad(logits, (image, masks), create_graph=True)
        of_image, of_masks = (at_least_float32(g).square().flatten(1).sum(1).mean() for g in gradients)
    return weights.r1_image / 2 * of_image + weights.r1_semantics / 2 * of_masks


def _class_loss(said: Judgement, regions: Tensor) -> Tensor:
    assert said.classes is not None
    return F.cross_entropy(at_least_float32(said.classes), regions)
