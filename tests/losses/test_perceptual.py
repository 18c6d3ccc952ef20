# SPDX-License-Identifier: Apache-2.0
"""Perceptual distances, their files, and losses of segmentations. LPIPS' numbers are checked by a golden case."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from facelab.errors import UserError
from facelab.inversion.perceptual_files import load_perceptual
from facelab.losses.perceptual import TORCHVISION, LpipsVgg, RandomPerceptual, at_most, perceptual_distance
from facelab.losses.reconstruction import picture_mse, segmentation_cross_entropy

WIDTHS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def published(kind: str) -> dict[str, Tensor]:
    """The same random weights by the names of either file."""
    source = torch.Generator().manual_seed(0)
    found = {}
    for i, (a, b) in enumerate(zip(WIDTHS[:-1], WIDTHS[1:])):
        name = f"layers.conv{i + 1}" if kind == "torchscript" else f"features.{TORCHVISION[i]}"
        found[f"{name}.weight"] = torch.randn(b, a, 3, 3, generator=source) * (2 / (9 * a)) ** 0.5
        found[f"{name}.bias"] = torch.randn(b, generator=source) / 20
    for i, width in enumerate((64, 128, 256, 512, 512)):
        value = torch.rand(width, generator=source)
        if kind == "torchscript":
            found[f"lpips{i}"] = value[:, None, None]
        else:
            found[f"lin{i}.model.1.weight"] = value[None, :, None, None]
    return found


def pictures(seed: int, side: int = 32) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_substitute() -> None:
    net = RandomPerceptual()
    a, b = pictures(0), pictures(1)
    assert net.metric == "perceptual_random" and "seed0" in net.name
    assert torch.equal(net(a, a), torch.zeros(2))
    torch.testing.assert_close(net(a, b), net(b, a))
    near, far = net(a, a + 0.02 * b), net(a, a + 0.5 * b)
    assert (near > 0).all() and (far > 10 * near).all()
    assert torch.equal(RandomPerceptual()(a, b), net(a, b)) and not torch.equal(RandomPerceptual(1)(a, b), net(a, b))
    torch.testing.assert_close(perceptual_distance(net, net.features(a), b), net(a, b))


def test_derivatives_are_finite_where_all_features_are_zero() -> None:
    """A flat picture has feature vectors of length zero somewhere; their direction has no derivative."""
    tensors = published("torchscript")
    tensors = {k: (-v.abs() if "conv" in k else v) for k, v in tensors.items()}
    for net in (LpipsVgg(tensors), RandomPerceptual()):
        flat = torch.ones(1, 3, 16, 16, requires_grad=True)
        gradient = torch.autograd.grad(net(pictures(0, 16)[:1], flat).sum(), flat)[0]
        assert gradient.isfinite().all(), net.name


def test_both_kinds_of_files_give_the_same(tmp_path: Path) -> None:
    a, b = pictures(0), pictures(1)
    expected = LpipsVgg(published("torchscript"))(a, b)
    from safetensors.torch import save_file

    split = published("torchvision")
    save_file({k: v for k, v in split.items() if k.startswith("features")}, tmp_path / "vgg.safetensors")
    torch.save({k: v for k, v in split.items() if k.startswith("lin")}, tmp_path / "lin.pth")
    net = load_perceptual(f"{tmp_path / 'vgg.safetensors'},{tmp_path / 'lin.pth'}")
    assert isinstance(net, LpipsVgg) and net.metric == "lpips_vgg" and net.name == "lpips-vgg16/0.1"
    torch.testing.assert_close(net(a, b), expected)
    old = LpipsVgg(published("torchscript"), standardise=False)
    assert old.name == "lpips-vgg16/0.0" and not torch.allclose(old(a, b), expected)
    assert isinstance(load_perceptual("random"), RandomPerceptual)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such weight file"):
        load_perceptual(str(tmp_path / "nothing.pt"))
    tensors = published("torchvision")
    torch.save({k: v for k, v in tensors.items() if k.startswith("features")}, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="vgg.pth: this is not LPIPS on VGG16: lin0.model.1.weight must be"):
        load_perceptual(str(tmp_path / "vgg.pth"))
    with pytest.raises(UserError, match="must not be negative"):
        LpipsVgg({**tensors, "lin3.model.1.weight": -tensors["lin3.model.1.weight"]})
    with pytest.raises(UserError, match=r"features.2.weight must be \(64, 64, 3, 3\), got \(64, 3, 3, 3\)"):
        LpipsVgg({**tensors, "features.2.weight": tensors["features.0.weight"]})
    (tmp_path / "noise.pt").write_bytes(b"no weights")
    with pytest.raises(UserError, match="damaged or holds more than tensors"):
        load_perceptual(str(tmp_path / "noise.pt"))


def test_pictures_of_other_kinds() -> None:
    for bad in (torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 3, 8, 8)):
        with pytest.raises(ValueError):
            RandomPerceptual()(bad, bad)
    small = at_most(pictures(0, 64), 16)
    torch.testing.assert_close(small[0, 0, 0, 0], pictures(0, 64)[0, 0, :4, :4].mean())
    assert at_most(small, 16) is small


def test_cross_entropy_and_squared_difference() -> None:
    labels = torch.tensor([[[0, 1], [2, -1]]])
    scores = torch.full((1, 3, 2, 2), -1.0)
    for (y, x), k in {(0, 0): 0, (0, 1): 1, (1, 0): 2}.items():
        scores[0, k, y, x] = 1
    wrong = float(torch.log(torch.exp(torch.tensor(-10.0)) * 2 + 1))  # both others 2 lower, times 5
    assert float(segmentation_cross_entropy(scores, labels)) == pytest.approx(wrong, rel=1e-3)
    assert float(segmentation_cross_entropy(-scores, labels)) > 5
    assert float(segmentation_cross_entropy(scores, torch.full_like(labels, -1))) == 0
    with pytest.raises(ValueError, match="0..2 or -1"):
        segmentation_cross_entropy(scores, labels + 1)
    with pytest.raises(ValueError, match="expected labels of"):
        segmentation_cross_entropy(scores, labels[..., :1])
    torch.testing.assert_close(picture_mse(scores, scores + torch.tensor(0.5)), torch.tensor([0.25]))
    with pytest.raises(ValueError, match="of one shape"):
        picture_mse(scores, scores[:, :1])
