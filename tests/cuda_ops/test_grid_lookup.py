# SPDX-License-Identifier: Apache-2.0
"""The grid lookup kernel against its twin and against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from cuda_ops import dispatch, reference
from cuda_ops.grid_lookup import grid_lookup

DEVICE = "cuda" if torch.cuda.is_available() and not dispatch.interpreted() else "cpu"
kernels = pytest.mark.skipif(DEVICE == "cpu" and not dispatch.interpreted(), reason="needs a GPU or TRITON_INTERPRET=1")


def tensors(channels: int = 16, points: int = 70) -> tuple[torch.Tensor, torch.Tensor]:
    r = torch.Generator().manual_seed(1)
    grid = torch.randn(1, channels, 3, 4, 5, generator=r).contiguous(memory_format=torch.channels_last_3d)
    where = torch.rand(points, 3, generator=r) * 2.6 - 1.3  # a third outside
    where[0] = torch.tensor([-1.0, -1.0, -1.0])
    where[1] = torch.tensor([1.0, 1.0, 1.0])
    where[2] = torch.tensor([1e9, 0.0, 0.0])
    return grid.to(DEVICE).requires_grad_(), where.to(DEVICE).requires_grad_()


def test_values_by_hand() -> None:
    """Two cells along x with values 1 and 3: half way lies 2; half a cell outside, half of the border value."""
    grid = torch.tensor([1.0, 3.0]).reshape(1, 1, 1, 1, 2).expand(1, 16, 1, 1, 2).contiguous()
    where = torch.tensor([[0.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    got = grid_lookup(grid.to(DEVICE), where.to(DEVICE)).cpu()
    torch.testing.assert_close(got[:, 0], torch.tensor([2.0, 1.0, 1.5, 0.0]))


@kernels
@pytest.mark.parametrize("channels", [16, 32])
def test_matches_the_twin(channels: int) -> None:
    grid, where = tensors(channels)
    got, expected = grid_lookup(grid, where), reference.grid_lookup(grid, where)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), (grid, where)),
        torch.autograd.grad((expected * weight).sum(), (grid, where)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_twin_has_right_gradients() -> None:
    grid, where = tensors(2, 6)
    where = where.detach()[3:].double().cpu().requires_grad_()
    assert torch.autograd.gradcheck(reference.grid_lookup, (grid.detach().double().cpu().requires_grad_(), where))


@kernels
def test_shape_dtype_and_empty() -> None:
    grid, where = tensors()
    assert grid_lookup(grid, where.reshape(2, 5, 7, 3)).shape == (2, 5, 7, 16)
    assert grid_lookup(grid, where[:0]).shape == (0, 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert grid_lookup(grid, where).dtype == torch.float32


@kernels
def test_second_order_is_refused() -> None:
    grid, where = tensors()
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        torch.autograd.grad(grid_lookup(grid, where).sum(), where, create_graph=True)
