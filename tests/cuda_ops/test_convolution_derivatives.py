# SPDX-License-Identifier: Apache-2.0
"""Convolutions with derivatives of our own against torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cuda_ops import convolution_derivatives as conv

CASES: list[dict[str, Any]] = [  # of conv2d
    {"stride": 1, "padding": 1},
    {"stride": 2, "padding": 0},
    {"stride": 2, "padding": (1, 0)},
    {"stride": (1, 2), "padding": (0, 2)},
    {"stride": 1, "padding": 1, "groups": 2},
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def numbers(*shape: int, device: str = "cpu") -> Tensor:
    source = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=source, dtype=torch.float64).to(device).requires_grad_()


def inputs(case: dict[str, Any], device: str = "cpu", transposed: bool = False) -> tuple[Tensor, Tensor]:
    groups = case.get("groups", 1)
    shape = (4, 2 // groups, 3, 2) if transposed else (2, 4 // groups, 3, 2)
    return numbers(2, 4, 7, 6, device=device), numbers(*shape, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_first_and_second_derivatives(case: dict[str, Any], device: str) -> None:
    x, w = inputs(case, device)
    bias = numbers(2, device=device)
    assert torch.autograd.gradcheck(lambda *a: conv.conv2d(*a, **case), (x, w, bias))
    assert torch.autograd.gradgradcheck(lambda *a: conv.conv2d(*a, **case), (x, w, bias))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_transposed(case: dict[str, Any], device: str) -> None:
    x, w = inputs(case, device, transposed=True)
    assert torch.autograd.gradcheck(lambda *a: conv.conv_transpose2d(*a, **case), (x, w))
    assert torch.autograd.gradgradcheck(lambda *a: conv.conv_transpose2d(*a, **case), (x, w))


def penalty(function: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """R1 of two layers, and its derivatives."""
    first, bias, second = weights
    y = F.leaky_relu(function(x, first, bias, padding=1), 0.2)
    logits = function(y.square(), second, None, stride=2).sum()
    (slope,) = torch.autograd.grad(logits, x, create_graph=True)
    return (slope, *torch.autograd.grad(slope.square().sum(), (x, *weights), allow_unused=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_r1_is_torchs(layout: torch.memory_format, device: str) -> None:
    x = numbers(3, 4, 8, 8, device=device).float().detach().to(memory_format=layout).requires_grad_()
    weights = [
        numbers(*shape, device=device).float().detach().requires_grad_() for shape in ((6, 4, 3, 3), (6,), (5, 6, 3, 3))
    ]
    ours, theirs = penalty(conv.conv2d, x, *weights), penalty(F.conv2d, x, *weights)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-3)


def test_autocast_and_no_gradient() -> None:
    x, w = (t.detach().float() for t in inputs(CASES[0]))
    assert torch.equal(conv.conv2d(x, w, padding=1), F.conv2d(x, w, padding=1))
    w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = conv.conv2d(x, w, padding=1), F.conv2d(x, w, padding=1)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)
    (a,), (b,) = (torch.autograd.grad(y.float().sum(), w) for y in (ours, theirs))
    assert a.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
