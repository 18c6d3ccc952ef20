# SPDX-License-Identifier: Apache-2.0
"""Numbers of a reconstruction."""

from __future__ import annotations

import pytest
import torch

from facelab.generator import GeneratorOutput
from facelab.inversion.measure import measure, psnr, ssim
from facelab.inversion.problem import Target
from facelab.losses.perceptual import RandomPerceptual
from tests.inversion.doubles import Double, own_pictures


def pictures(seed: int, side: int = 24) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_by_hand() -> None:
    target = pictures(0)
    torch.testing.assert_close(psnr(target + 0.2, target), torch.full((2,), 20.0, dtype=torch.float64))
    assert psnr(target, target).isinf().all()


def test_ssim_is_that_of_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    a, b = pictures(1), pictures(1) * 0.5 + pictures(2) * 0.3
    for x, y, got in zip(a, b, ssim(b, a), strict=True):
        first, second = (v.double().numpy() / 2 + 0.5 for v in (x, y))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        expected = metrics.structural_similarity(first, second, data_range=1.0, channel_axis=0, **options)
        assert float(got) == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(ssim(a, a), torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(a[..., :8, :8], a[..., :8, :8])


def test_all_numbers_of_a_perfect_and_a_worse_picture() -> None:
    target, _ = own_pictures(Double(), torch.zeros(2, 2))
    assert target.scores is not None
    labels = target.scores.argmax(1)
    labels[:, :4] = -1
    target = Target(target.picture, target.camera, target.scores, labels)
    ones = torch.ones(2, 1, 16, 16)
    same = measure(GeneratorOutput(target.picture, ones, ones, target.scores), target, RandomPerceptual())
    assert set(same) == {"psnr", "ssim", "perceptual_random", "miou"}
    assert same["psnr"].isinf().all() and float(same["perceptual_random"].max()) == 0 and (same["miou"] == 1).all()
    other = measure(GeneratorOutput(-target.picture, ones, ones, -target.scores), target, RandomPerceptual())
    assert (other["psnr"] < 30).all() and (other["ssim"] < 0.5).all() and (other["perceptual_random"] > 0.05).all()
    assert (other["miou"] < 0.6).all()
    assert set(measure(GeneratorOutput(target.picture, ones, ones), target)) == {"psnr", "ssim"}
