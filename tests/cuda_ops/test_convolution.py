# SPDX-License-Identifier: Apache-2.0
"""Convolutions with resampling and modulation: equal to their definition, gradients of both orders, half precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cuda_ops
from cuda_ops import dispatch

pytestmark = pytest.mark.skipif(dispatch.interpreted(), reason="compositions: their parts are tested one by one")


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1)])
def test_resampling_equals_its_definition(up: int, down: int, kernel: int, flip: bool, groups: int) -> None:
    """Upsample with the filter, convolve, downsample with the filter, one after the other."""
    x, w, f = normal(2, 4, 6, 5), normal(6, 4 // groups, kernel, kernel, seed=2), cuda_ops.setup_filter([1, 3, 3, 1])
    got = cuda_ops.conv2d_resample(x, w, f, up, down, kernel // 2, groups, flip_weight=flip)
    p = [kernel // 2] * 4
    if up > 1:
        p = [a + b for a, b in zip(p, [(4 + up - 1) // 2, (4 - up) // 2] * 2)]
    if down > 1:
        p = [a + b for a, b in zip(p, [(4 - down + 1) // 2, (4 - down) // 2] * 2)]
    y = cuda_ops.upfirdn2d(x, f if up > 1 else None, up=up, padding=p, gain=up**2)
    y = F.conv2d(y, w if flip else w.flip([2, 3]), groups=groups)
    y = cuda_ops.upfirdn2d(y, f, down=down) if down > 1 else y
    torch.testing.assert_close(got, y)


def test_demodulation_gives_unit_variance() -> None:
    x, w, s = normal(2, 64, 16, 16), 3 * normal(8, 64, 3, 3, seed=2), 5 * normal(2, 64, seed=3)
    y = cuda_ops.modulated_conv2d(x, w, s, padding=1)
    torch.testing.assert_close(y[:, :, 1:-1, 1:-1].std(dim=[2, 3]), torch.ones(2, 8).double(), rtol=0.3, atol=0)
    w = w / (w * s[:1, :, None, None]).square().sum([1, 2, 3], keepdim=True).sqrt()
    torch.testing.assert_close(y[:1], F.conv2d(x[:1] * s[:1, :, None, None], w, padding=1))


@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize("up", [1, 2])
def test_fused_equals_unfused_in_all_gradients(up: int, demodulate: bool) -> None:
    inputs = [t.requires_grad_() for t in (normal(2, 3, 4, 4), normal(5, 3, 3, 3, seed=2), normal(2, 3, seed=3))]
    noise, f = normal(2, 1, 4 * up, 4 * up, seed=4), cuda_ops.setup_filter([1, 3, 3, 1])
    found = []
    for fused in (True, False):
        y = cuda_ops.modulated_conv2d(
            *inputs, noise, up, padding=1, resample_filter=f, demodulate=demodulate, flip_weight=up == 1, fused_modconv=fused
        )  # fmt: skip
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        found.append([y, *first, *second])
    torch.testing.assert_close(found[0], found[1])


def test_half_precision_of_large_weights_does_not_overflow() -> None:
    x, w, s = (
        normal(1, 8, 6, 6).half(),
        (3e4 * normal(4, 8, 3, 3, seed=2)).float(),
        (3e3 * normal(1, 8, seed=3)).float(),
    )
    exact = cuda_ops.modulated_conv2d(x.double(), w.double(), s.double(), padding=1)
    for fused in (True, False):
        y = cuda_ops.modulated_conv2d(x, w, s, padding=1, fused_modconv=fused)
        assert y.dtype == torch.float16
        torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit with groups=1"):
        cuda_ops.conv2d_resample(torch.ones(1, 3, 4, 4), torch.ones(2, 4, 3, 3))
    with pytest.raises(ValueError, match=r"styles have shape \(1, 2\)"):
        cuda_ops.modulated_conv2d(torch.ones(1, 3, 4, 4), torch.ones(2, 3, 3, 3), torch.ones(1, 2))


def test_grid_sample_has_two_orders(device: torch.device) -> None:
    x, grid = (
        normal(1, 2, 4, 5).to(device).requires_grad_(),
        (0.4 * normal(1, 3, 3, 2, seed=2)).to(device).requires_grad_(),
    )
    assert torch.autograd.gradcheck(cuda_ops.grid_sample_2d, (x, grid), nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(cuda_ops.grid_sample_2d, (x, grid), nondet_tol=1e-12)
    of_x = lambda x: cuda_ops.grid_sample_2d(x, grid.detach())
    assert torch.autograd.gradcheck(of_x, (x,), nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(of_x, (x,), nondet_tol=1e-12)
    wide = (1.3 * normal(1, 40, 3, 2, seed=3)).to(device)  # also outside
    torch.testing.assert_close(
        cuda_ops.grid_sample_2d(x, wide.requires_grad_()), cuda_ops.grid_sample_2d(x, wide.detach())
    )
    between = torch.tensor([[[[-0.8, -0.5]]]], dtype=torch.float64, device=device)  # column 0, row 0.5
    torch.testing.assert_close(cuda_ops.grid_sample_2d(x, between)[..., 0, 0], x[:, :, :2, 0].mean(2))


def test_one_sample_keeps_its_memory_order(device: torch.device) -> None:
    x = normal(1, 4, 6, 6).float().to(device, memory_format=torch.channels_last)  # cuDNN has no float64 in this order
    weight, styles = normal(5, 4, 3, 3, seed=2).float().to(device), normal(1, 4, seed=3).float().to(device)
    fused = cuda_ops.modulated_conv2d(x, weight, styles, padding=1)
    assert fused.is_contiguous(memory_format=torch.channels_last) and not fused.is_contiguous()
    plain = cuda_ops.modulated_conv2d(x.contiguous(), weight, styles, padding=1, fused_modconv=False)
    torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("up", [1, 2])
def test_an_empty_batch(device: torch.device, fused: bool, up: int) -> None:
    x = torch.zeros(0, 3, 4, 4, device=device, requires_grad=True)
    w = normal(5, 3, 3, 3).float().to(device).requires_grad_()
    f = cuda_ops.setup_filter([1, 3, 3, 1], device=device)
    y = cuda_ops.modulated_conv2d(
        x, w, x.new_zeros(0, 3), up=up, padding=1, resample_filter=f, flip_weight=up == 1, fused_modconv=fused
    )
    assert y.shape == (0, 5, 4 * up, 4 * up)
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert dx.shape == x.shape and not dw.any()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("zero", ["weight", "styles"])
def test_half_precision_without_signal_is_zero(device: torch.device, fused: bool, zero: str) -> None:
    """The scaling that half precision needs must not divide 0 by 0."""
    x, tensors = (
        normal(2, 3, 4, 4).half().to(device),
        {"weight": normal(5, 3, 3, 3).float(), "styles": normal(2, 3).float()},
    )
    tensors[zero] = torch.zeros_like(tensors[zero])
    tensors = {name: value.to(device).requires_grad_() for name, value in tensors.items()}
    y = cuda_ops.modulated_conv2d(x, **tensors, padding=1, fused_modconv=fused)
    assert not y.any()
    assert not any(g.isnan().any() for g in torch.autograd.grad(y.float().sum(), list(tensors.values())))


def test_arguments_of_convolutions_are_named() -> None:
    x, w, f = torch.ones(2, 4, 4, 4), torch.ones(3, 2, 3, 3), cuda_ops.setup_filter([1, 3, 3, 1])
    with pytest.raises(ValueError, match=r"up is \[2, 2\], expected a positive int"):
        cuda_ops.conv2d_resample(x, torch.ones(3, 4, 3, 3), f, up=[2, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="groups is 2, expected a positive number that divides the 3 output channels"):
        cuda_ops.conv2d_resample(x, w, f, up=2, groups=2)
    with pytest.raises(ValueError, match=r"expected \(N, I, H, W\) and \(O, I, k, k\)"):
        cuda_ops.modulated_conv2d(x, w[0], torch.ones(2, 4))
