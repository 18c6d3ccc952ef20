# SPDX-License-Identifier: Apache-2.0
"""Terms of CNeRF's first stage: what reaches which network (numbers: golden case train_step)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from facelab.losses.adversarial import r1_penalty
from facelab.methods.cnerf.config import LossConfig
from facelab.methods.cnerf.losses import Portraits, generator_terms, global_terms, portrait_r1, region_terms
from facelab.nn.discriminators.coordconv import (
    RegionDiscriminator,
    RegionDiscriminatorConfig,
    ViewDiscriminator,
    ViewDiscriminatorConfig,
)

REGIONS, SIDE, COUNT = 3, 8, 4
LABELS = torch.tensor([2, 0, 1, 2])


@pytest.fixture(scope="module")
def judges() -> tuple[ViewDiscriminator, RegionDiscriminator]:
    whole = ViewDiscriminatorConfig(resolution=SIDE, semantic_channels=REGIONS, group_size=4, channel_max=6)
    one = RegionDiscriminatorConfig(resolution=SIDE, classes=REGIONS, channel_max=6)
    return ViewDiscriminator(whole), RegionDiscriminator(one)


def portraits(seed: int) -> Portraits:
    source = torch.Generator().manual_seed(seed)
    image = torch.rand(COUNT, 3, SIDE, SIDE, generator=source, requires_grad=True)
    return Portraits(image, torch.rand(COUNT, REGIONS, SIDE, SIDE, generator=source, requires_grad=True))


def angles() -> Tensor:
    return torch.tensor([[0.1, 0.2]] * COUNT)


def test_discriminators_do_not_reach_the_generator(judges: tuple[ViewDiscriminator, RegionDiscriminator]) -> None:
    whole, one = judges
    real, fake, weights = portraits(0), portraits(1), LossConfig()
    (
        global_terms(whole, real, fake, angles(), weights).total + region_terms(one, real, fake, LABELS, weights).total
    ).backward()
    assert all(x.grad is None for x in (real.image, real.masks, fake.image, fake.masks))
    assert all(p.grad is not None and p.grad.isfinite().all() for judge in judges for p in judge.parameters())


def test_regions_judge_only_their_channel(judges: tuple[ViewDiscriminator, RegionDiscriminator]) -> None:
    whole, one = judges
    fake = portraits(1)
    torch.testing.assert_close(fake.channel(LABELS)[3, 0], fake.masks[3, 2])
    only_regions = LossConfig(view=0, eikonal=0, surface=0)
    sdf, gradient = torch.zeros(1, 1), torch.ones(1, 3)
    terms = generator_terms(whole, one, fake, angles(), sdf, gradient, LABELS, only_regions)
    assert terms.view == 0 and terms.eikonal == 0 and terms.surface == 0
    (slope,) = torch.autograd.grad(terms.classes + terms.region_realness, fake.masks)
    touched = slope.abs().sum((2, 3)) > 0
    assert touched.nonzero().tolist() == [[n, k] for n, k in enumerate(LABELS.tolist())]


def test_weights_and_total(judges: tuple[ViewDiscriminator, RegionDiscriminator]) -> None:
    whole, one = judges
    real, fake = portraits(0), portraits(1)
    once, twice = LossConfig(), LossConfig(semantic=2.0, view=30.0, r1_image=20.0, r1_semantics=2000.0)
    a, b = (region_terms(one, real, fake, LABELS, w) for w in (once, twice))
    torch.testing.assert_close(b.classes, 2 * a.classes)
    torch.testing.assert_close(b.r1, 4 * a.r1)
    c, d = (global_terms(whole, real, fake, angles(), w) for w in (once, twice))
    torch.testing.assert_close(d.view, 2 * c.view)
    torch.testing.assert_close(c.total, c.realness + c.r1 + c.view)
    leaves = real.leaves()
    said = whole(leaves.image, leaves.masks)
    expected = 5 * r1_penalty(leaves.image, said.realness) + 500 * r1_penalty(leaves.masks, said.realness)
    torch.testing.assert_close(portrait_r1(said.realness, leaves.image, leaves.masks, once), expected)
    torch.testing.assert_close(c.r1, expected)
