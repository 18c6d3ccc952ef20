# SPDX-License-Identifier: Apache-2.0
"""Augmentation beyond its golden cases: probabilities, determinism, gradients, what each step does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from facelab.draws import Draws
from facelab.nn.augment import AugmentConfig, AugmentPipe, filter_bank

OFF = dict.fromkeys(AugmentConfig.__dataclass_fields__, 0.0)


def pipe(p: float = 1.0, **strengths: float) -> AugmentPipe:
    return AugmentPipe(AugmentConfig(**{**OFF, **strengths}), p)


def smooth(count: int = 4, channels: int = 3, size: int = 32) -> Tensor:
    """Pictures without high frequencies, which the filters of the warp would touch."""
    source = torch.Generator().manual_seed(0)
    low = torch.randn(count, channels, 4, 4, generator=source)
    return torch.nn.functional.interpolate(low, (size, size), mode="bicubic").clamp(-1, 1)


def test_probability_zero_leaves_pictures_alone() -> None:
    images = smooth()
    out = AugmentPipe(AugmentConfig(), 0.0)(images, Draws(0))
    assert (out - images).abs().max() < 0.02  # up and down again through the wavelet
    assert pipe(0.0, imgfilter=1, noise=1, cutout=1)(images, Draws(0)).sub(images).abs().max() < 1e-5


def test_mirror_happens_by_half() -> None:
    """Kept pictures come back exactly; mirrored ones up to the wavelet, which is not quite symmetric."""
    images = smooth(64, size=16)
    out = pipe(xflip=1)(images, Draws(3))
    kept = (out - images).abs().amax(dim=(1, 2, 3)) < 1e-5
    turned = (out - images.flip(3)).abs().mean(dim=(1, 2, 3)) < 0.05
    assert (kept ^ turned).all() and 15 < turned.sum() < 49


@pytest.mark.parametrize(("strength", "p", "share"), [(1.0, 0.3, 0.3), (0.5, 0.5, 0.25), (1.0, 2.0, 1.0)])
def test_steps_happen_with_strength_times_p(strength: float, p: float, share: float) -> None:
    images = smooth(500, size=8)
    out = pipe(p, brightness=strength)(images, Draws(1))
    shift = out - images
    assert shift.flatten(1).std(dim=1).max() < 1e-5  # one shift for the whole picture
    changed = (shift.mean(dim=(1, 2, 3)).abs() > 1e-6).float().mean()
    assert changed == pytest.approx(share, abs=0.07)


def test_two_pictures_of_a_pair_get_the_same() -> None:
    images = smooth()
    out = AugmentPipe(AugmentConfig(), 1.0)(torch.cat([images, images], dim=1), Draws(2))
    torch.testing.assert_close(out[:, :3], out[:, 3:])
    assert (out[:, :3] - images).abs().mean() > 0.05


def test_draws_decide_and_steps_do_not_disturb_each_other() -> None:
    images, everything = smooth(), AugmentPipe(AugmentConfig(), 1.0)
    assert everything(images, Draws(5)).equal(everything(images, Draws(5)))
    assert not everything(images, Draws(5)).equal(everything(images, Draws(6)))
    alone = pipe(contrast=1)(images, Draws(5))
    with_brightness = pipe(contrast=1, brightness=1)(images, Draws(5))
    shift = with_brightness - alone
    assert shift.flatten(1).std(dim=1).max() < 1e-5 < shift.abs().max()


def test_pictures_get_gradients_and_p_travels_in_the_state() -> None:
    images = smooth().requires_grad_()
    whole = AugmentPipe(AugmentConfig(imgfilter=1, noise=1, cutout=1), 0.7)
    whole(images, Draws(0)).square().sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and images.grad.any()
    assert set(whole.state_dict()) == {"p", "sign_sum", "sign_steps"}


def test_cutout_takes_a_quarter_and_noise_has_its_size() -> None:
    images = torch.ones(200, 3, 16, 16)
    share = (pipe(cutout=1)(images, Draws(0)) == 0).float().mean()
    assert 0.1 < share < 0.25  # a square of half the side, partly outside
    sigma = (pipe(noise=1)(images, Draws(0)) - images).flatten(1).std(dim=1)
    assert sigma.square().mean().sqrt() == pytest.approx(0.1, rel=0.2)


def test_bands_add_up_to_the_identity() -> None:
    total = filter_bank().sum(dim=0)
    middle = torch.zeros(43)
    middle[21] = 1
    torch.testing.assert_close(total, middle, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (3, 8, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="1, 3 or 6"):
        AugmentPipe()(torch.zeros(shape), Draws(0))


def test_numbers_must_come_from_somewhere() -> None:
    with pytest.raises(ValueError, match="needs draws"):
        AugmentPipe()(smooth(), None)
