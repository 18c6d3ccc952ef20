# SPDX-License-Identifier: Apache-2.0
"""bias_act: numbers by hand, gradients of both orders, torch.library contracts, kernels against the twin."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops import dispatch
from cuda_ops import reference_activations as reference

DEVICE = "cuda" if torch.cuda.is_available() and not dispatch.interpreted() else "cpu"
kernels = pytest.mark.skipif(DEVICE == "cpu" and not dispatch.interpreted(), reason="needs a GPU or TRITON_INTERPRET=1")
plain = pytest.mark.skipif(dispatch.interpreted(), reason="the interpreter is slow: kernels are tested one by one")
gpu = pytest.mark.gpu
LAST = torch.channels_last
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
CLAMPED = {"gain": 1.7, "clamp": 0.75, "alpha": 0.13}  # 0.75 is exact in every dtype
TURNED = {"gain": -1.2, "clamp": 0.75, "alpha": -0.3}  # the sign of the result tells nothing


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64, device: str = DEVICE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def test_by_hand() -> None:
    x, b = torch.tensor([[-2.0, 0.5, 200.0]], device=DEVICE), torch.tensor([1.0, 0.5, 100.0], device=DEVICE)
    assert cuda_ops.bias_act(x, b).tolist() == [[-1, 1, 300]]
    root = math.sqrt(2)
    expected = torch.tensor([[-0.2 * root, root, 256]], device=DEVICE)
    torch.testing.assert_close(cuda_ops.bias_act(x, b, act="lrelu", clamp=256), expected)
    assert cuda_ops.bias_act(x, act="relu", gain=2).tolist() == [[0, 1, 400]]
    assert cuda_ops.bias_act(x) is x
    assert cuda_ops.activation_gain("swish") == root and cuda_ops.activation_gain("tanh") == 1


@pytest.mark.parametrize("act", cuda_ops.ACTIVATIONS)
def test_extreme_inputs_stay_finite(act: str) -> None:
    x = torch.tensor([-1e4, -80.0, -1e-6, 0.0, 1e-6, 80.0, 1e4], device=DEVICE, requires_grad=True)
    y = cuda_ops.bias_act(x, act=act, gain=1.0)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert y.isfinite().all() and dx.isfinite().all() and (y.abs() <= 2e4).all() and (dx.abs() <= 2).all()
    exact = cuda_ops.ACTIVATIONS[act].function(x.detach().double(), 0.2)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-9)
    assert cuda_ops.bias_act(torch.full((2,), math.nan, device=DEVICE), act=act, gain=2, clamp=1).isnan().all()


def test_nothing_passes_the_clamp_backwards() -> None:
    """Also for linear, also exactly on the bound, and where the bound itself is rounded (0.9 in bfloat16)."""
    for act in ("linear", "lrelu"):
        for dtype, bound in ((torch.float32, 2.0), (torch.bfloat16, 0.9), (torch.float16, 0.9)):
            x = torch.tensor([5.0, bound, bound / 2], device=DEVICE, dtype=dtype, requires_grad=True)
            (dx,) = torch.autograd.grad(cuda_ops.bias_act(x, act=act, gain=1, clamp=bound).sum(), x)
            assert dx.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"act": "gelu"}, "act is 'gelu', expected one of linear, relu"),
        ({"clamp": -1}, "clamp is -1"),
        ({"b": torch.ones(3)}, r"bias has shape \(3,\), expected \(2,\) for dim 1"),
        ({"b": torch.ones(2), "dim": 4}, "dim is 4"),
    ],
)
def test_bad_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cuda_ops.bias_act(torch.ones(1, 2, 2, 2), **options)


@plain
@pytest.mark.parametrize("options", [{}, CLAMPED, TURNED], ids=["default", "clamped", "turned"])
@pytest.mark.parametrize("act", cuda_ops.ACTIVATIONS)
def test_gradients(act: str, options: dict[str, float]) -> None:
    x, b = normal(2, 3, 2).requires_grad_(), normal(3, seed=2).requires_grad_()
    run = lambda x, b: cuda_ops.bias_act(x, b, act=act, **options)
    assert torch.autograd.gradcheck(run, (x, b))
    assert torch.autograd.gradgradcheck(run, (x, b), fast_mode=True)


def test_third_order_of_a_curved_activation_is_refused() -> None:
    x = normal(3).requires_grad_()
    (first,) = torch.autograd.grad(cuda_ops.bias_act(x, act="tanh").sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first and second order"):
        torch.autograd.grad(second.sum(), x)


@plain
def test_op_contracts() -> None:
    x, b = normal(2, 3, 4, 5).requires_grad_(), normal(3, seed=2).requires_grad_()
    ops, last = torch.ops.facelab, normal(2, 3, 4, 5).to(memory_format=LAST).requires_grad_()
    torch.library.opcheck(ops.bias_act.default, (x, b, 1, "lrelu", 0.2, 1.3, 0.75))
    torch.library.opcheck(ops.bias_act.default, (last, None, 0, "swish", 0.2, 1.3, None))
    torch.library.opcheck(ops.bias_act_grad.default, (x, last, b, 1, "swish", 0.2, 1.3, 0.75, False))
    detached = [t.detach() for t in (x, last, x, b)]
    torch.library.opcheck(ops.bias_act_grad2.default, (*detached, 1, "swish", 0.2, 1.3, 0.75))


@plain
def test_compiles_without_graph_breaks() -> None:
    def work(x: Tensor, b: Tensor) -> Tensor:
        return cuda_ops.bias_act(cuda_ops.bias_act(x, b, act="lrelu", clamp=0.75), act="swish").square().sum()

    torch._dynamo.reset()
    inputs = (normal(2, 3, 4, 4).requires_grad_(), normal(3, seed=2).requires_grad_())
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, work))
    torch.testing.assert_close(got, expected)


def test_layouts_strides_and_empty_batches() -> None:
    b = normal(4, seed=2)
    run = lambda x: cuda_ops.bias_act(x, b, act="lrelu", **CLAMPED)
    expected = run(normal(2, 4, 6, 6))
    last = normal(2, 4, 6, 6).to(memory_format=LAST)
    assert run(last).is_contiguous(memory_format=LAST)
    sparse = normal(2, 4, 6, 6).repeat_interleave(2, 3)[..., ::2]
    turned = normal(2, 4, 6, 6).permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    for x in (last, sparse, turned):
        assert not x.is_contiguous()
        torch.testing.assert_close(run(x), expected)
    torch.testing.assert_close(run(normal(1, 1, 1, 6).expand(2, 4, 6, 6)), run(normal(1, 1, 1, 6).repeat(2, 4, 6, 1)))
    x = normal(0, 4, 6, 6).requires_grad_()
    assert run(x).shape == x.shape and torch.autograd.grad(run(x).sum(), x)[0].shape == x.shape


def test_autocast_leaves_it_alone() -> None:
    x = normal(2, 3, dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert cuda_ops.bias_act(x, act="softplus").dtype == torch.float32


def check(x: Tensor, b: Tensor | None, dim: int, act: str, options: dict[str, float]) -> None:
    """Result and gradients of both orders, against the twin differentiated by autograd."""
    tolerance = {"rtol": TOLERANCE[x.dtype], "atol": TOLERANCE[x.dtype]}
    inputs = [t.requires_grad_() for t in (x, b) if t is not None]
    dy, v = (normal(*x.shape, seed=s, dtype=x.dtype, device=x.device.type).requires_grad_() for s in (5, 6))
    found = []
    for run in (cuda_ops.bias_act, reference.bias_act):
        y = run(x, b, dim, act, **options)
        first = torch.autograd.grad(y, inputs, dy, create_graph=True)
        second = torch.autograd.grad(first[0], [dy, *inputs], v, allow_unused=True)
        found.append([y, *first, *(torch.zeros(()) if g is None else g for g in second)])
        assert y.stride() == x.stride()
    for got, expected in zip(*found, strict=True):
        if got.ndim == 0:  # no dependence here: the twin must have none either
            assert not expected.any()
        else:
            torch.testing.assert_close(got, expected.expand_as(got).to(got), **tolerance)


@kernels
@pytest.mark.parametrize("options", [{}, CLAMPED, TURNED], ids=["default", "clamped", "turned"])
@pytest.mark.parametrize("act", cuda_ops.ACTIVATIONS)
def test_kernel_equals_the_twin(act: str, options: dict[str, float]) -> None:
    check(normal(2, 5, 3, 7), normal(5, seed=2), 1, act, options)
    check(normal(2, 5, 3, 7).to(memory_format=LAST), None, 1, act, options)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", ["linear", "lrelu", "swish"])
def test_kernel_dtypes(act: str, dtype: torch.dtype) -> None:
    # the interpreter truncates to bfloat16, which moves values over the clamp
    options = {} if dtype == torch.bfloat16 and dispatch.interpreted() else CLAMPED
    for shape, dim in (((2, 5, 3, 7), 1), ((3, 6), 1), ((2, 3, 5, 6), 3), ((4, 3), 0), ((2, 1, 4, 4), 1)):
        check(normal(*shape, dtype=dtype), normal(shape[dim], seed=2, dtype=dtype), dim, act, options)
    last = normal(2, 6, 8, 8, dtype=dtype).to(memory_format=LAST)
    check(last, normal(6, seed=2, dtype=dtype), 1, act, options)


@gpu
@pytest.mark.parametrize("act", cuda_ops.ACTIVATIONS)
def test_gradients_on_a_gpu(act: str) -> None:
    x, b = normal(2, 3, 4, device="cuda").requires_grad_(), normal(3, seed=2, device="cuda").requires_grad_()
    run = lambda x, b: cuda_ops.bias_act(x, b, act=act, **CLAMPED)
    assert torch.autograd.gradcheck(run, (x, b)) and torch.autograd.gradgradcheck(run, (x, b))
    torch.library.opcheck(torch.ops.facelab.bias_act.default, (x, b, 1, act, 0.2, 1.3, 0.75))


@gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(4, 512, 4, 4), (3, 96, 33, 31), (2, 3, 128, 128), (1, 48, 257, 257)])
def test_sizes_on_a_gpu(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    x, b = normal(*shape, dtype=dtype, device="cuda"), normal(shape[1], seed=2, dtype=dtype, device="cuda")
    x = x.to(memory_format=LAST) if last else x
    for act in ("linear", "lrelu", "swish"):
        got = cuda_ops.bias_act(x, b, act=act, clamp=0.75)
        expected = reference.bias_act(x, b, act=act, clamp=0.75)
        assert got.stride() == expected.stride()
        torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@gpu
@pytest.mark.parametrize("last", [False, True])
def test_more_than_two_to_the_31_elements_on_a_gpu(last: bool) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    x = torch.zeros(2, 1 << 14, 257, 256, dtype=torch.float16, device="cuda")
    x = x.to(memory_format=LAST) if last else x
    b = torch.arange(1 << 14, device="cuda").half().requires_grad_()
    y = cuda_ops.bias_act(x, b, act="lrelu", gain=1.0, clamp=1e4)
    assert y[1, :, -1, -1].tolist() == b.clamp(max=1e4).tolist()
