# SPDX-License-Identifier: Apache-2.0
"""The identity loss and CLIP's, on networks whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.losses.clip_similarity import ClipSimilarity, clip_input
from facelab.losses.identity import IdentityLoss, embedding_distance
from facelab.nn.pretrained.clip import DEVIATION, MEAN, ClipVision


def means(pictures: Tensor) -> Tensor:
    """Mean colours: (N, 3)."""
    return pictures.mean(dim=(2, 3))


def coloured(*colours: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colours, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 4, 4).clone()


def test_distance_is_one_minus_the_cosine() -> None:
    loss = IdentityLoss(means, coloured((1, 0, 0), (1, 1, 0)))
    found = loss(coloured((0.5, 0, 0), (1, 0, 0)))
    torch.testing.assert_close(found, torch.tensor([0.0, 1 - 0.5**0.5]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(loss(coloured((-1, 0, 0), (0, 0, 1))), torch.tensor([2.0, 1.0]))


def test_targets_are_embedded_once_and_get_no_gradient() -> None:
    calls: list[int] = []

    def embed(pictures: Tensor) -> Tensor:
        calls.append(len(pictures))
        return means(pictures)

    target = coloured((1, 0, 0)).requires_grad_()
    loss = IdentityLoss(embed, target)
    made = coloured((1, 1, 0)).requires_grad_()
    for _ in range(2):
        loss(made).sum().backward()
    assert calls == [1, 1, 1] and target.grad is None
    assert made.grad is not None and made.grad[0, 1].min() > 0 > made.grad[0, 0].max()


def test_one_person_may_be_the_target_of_many_pictures_and_no_other_mismatch_passes() -> None:
    assert IdentityLoss(means, coloured((1, 0, 0)))(coloured((1, 0, 0), (0, 1, 0))).tolist() == pytest.approx([0, 1])
    with pytest.raises(ValueError, match="expected 2 pictures, one for each target, got 3"):
        IdentityLoss(means, torch.ones(2, 3, 4, 4))(torch.ones(3, 3, 4, 4))
    with pytest.raises(ValueError, match=r"an embedding must be \(2, D\)"):
        IdentityLoss(lambda x: x, torch.ones(2, 3, 4, 4))


def test_a_vector_of_zeros_has_no_nan() -> None:
    zero = torch.zeros(1, 3, requires_grad=True)
    distance = embedding_distance(zero, torch.ones(1, 3))
    distance.backward()
    assert float(distance.detach()) == 1.0 and zero.grad is not None and bool(zero.grad.isfinite().all())


def test_clip_sees_standardised_pictures_of_its_size() -> None:
    x = coloured((-1, 0, 1)).expand(-1, -1, 4, 4)
    seen = clip_input(x, 4)
    expected = (torch.tensor([0.0, 0.5, 1.0]) - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    torch.testing.assert_close(seen[0, :, 0, 0], expected)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    shown = F.interpolate(picture, size=(8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(clip_input(picture, 8), clip_input(shown, 8))
    with pytest.raises(ValueError, match="pictures must be float"):
        clip_input(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 4)


def test_clip_loss_falls_when_followed_and_is_what_the_score_lacks() -> None:
    vision = ClipVision(16, 8, 64, 2, 64, 12, "gelu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in vision.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    prompt = torch.randn(1, 12, generator=generator)
    judge = ClipSimilarity(vision, prompt)
    x = (torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1).requires_grad_()
    before = judge.loss(x)
    torch.testing.assert_close(judge.similarity(x), 1 - before)
    cosine = F.cosine_similarity(vision(clip_input(x, 16)), prompt)
    torch.testing.assert_close(judge.similarity(x), cosine, rtol=1e-4, atol=1e-6)
    adam = torch.optim.Adam([x], lr=0.02)
    for _ in range(20):
        adam.zero_grad()
        judge.loss(x).sum().backward()
        adam.step()
    assert bool((judge.loss(x) < before - 0.05).all())
    assert all(value.grad is None for value in vision.parameters())
