# SPDX-License-Identifier: Apache-2.0
"""upfirdn2d: numbers by hand, gradients, torch.library contracts, kernels against the twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops import dispatch, filter_launch
from cuda_ops import reference_filters as reference

DEVICE = "cuda" if torch.cuda.is_available() and not dispatch.interpreted() else "cpu"
kernels = pytest.mark.skipif(DEVICE == "cpu" and not dispatch.interpreted(), reason="needs a GPU or TRITON_INTERPRET=1")
plain = pytest.mark.skipif(dispatch.interpreted(), reason="the interpreter is slow: kernels are tested one by one")
gpu = pytest.mark.gpu
LAST = torch.channels_last
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}

CASES: dict[str, dict[str, Any]] = {
    "filter": {"padding": [2, 1, 2, 1]},
    "up": {"up": 2, "padding": [2, 1, 2, 1], "gain": 4.0},
    "down": {"down": 2, "padding": 1},
    "crop": {"up": [3, 1], "down": [1, 2], "padding": [4, -1, -1, 3], "flip_filter": True},
    "rational": {"up": 2, "down": [3, 2], "padding": [2, 4, 1, 3], "gain": 0.7},
    "mixed": {"up": [1, 2], "down": [2, 1], "padding": [4, 4, -1, 8]},
}


def taps(name: str) -> Tensor | None:
    r = torch.Generator().manual_seed(3)
    filters = {
        "bilinear": cuda_ops.setup_filter([1, 3, 3, 1]),
        "asymmetric": torch.randn(3, 5, generator=r),
        "separable": cuda_ops.setup_filter(torch.randn(4, generator=r), separable=True, normalize=False),
        "long": torch.randn(70, generator=r) / 8,
        "none": None,
    }
    found = filters[name]
    return None if found is None else found.to(DEVICE)


def picture(*shape: int, dtype: torch.dtype = torch.float64, device: str = DEVICE, last: bool = False) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device, dtype)
    return x.to(memory_format=LAST) if last else x


def test_by_hand() -> None:
    """[1, 2] convolved with [1, 10]: 1, 2 + 10, 20; upsampled: zeros in between."""
    x = torch.tensor([1.0, 2.0], device=DEVICE).reshape(1, 1, 1, 2)
    f = torch.tensor([[1.0, 10.0]], device=DEVICE)
    assert cuda_ops.upfirdn2d(x, f, padding=[1, 1, 0, 0]).flatten().tolist() == [1, 12, 20]
    assert cuda_ops.upfirdn2d(x, f, padding=[1, 1, 0, 0], flip_filter=True).flatten().tolist() == [10, 21, 2]
    assert cuda_ops.upfirdn2d(x, f, up=[2, 1], padding=[1, 0, 0, 0]).flatten().tolist() == [1, 10, 2, 20]
    assert cuda_ops.upfirdn2d(x, f, down=[2, 1], padding=[1, 1, 0, 0]).flatten().tolist() == [1, 20]
    assert cuda_ops.upfirdn2d(x, None, padding=[-1, 1, 0, 0], gain=3).flatten().tolist() == [6, 0]


def test_helpers_keep_a_constant_picture() -> None:
    x, f = torch.ones(1, 2, 8, 6, device=DEVICE), taps("bilinear")
    for y, size in (
        (cuda_ops.filter2d(x, f), (8, 6)),
        (cuda_ops.upsample2d(x, f), (16, 12)),
        (cuda_ops.downsample2d(x, f), (4, 3)),
    ):
        assert y.shape == (1, 2, *size)
        torch.testing.assert_close(y[:, :, 2:-2, 2:-2], torch.ones_like(y[:, :, 2:-2, 2:-2]))


@pytest.mark.parametrize(
    ("f", "options", "words"),
    [
        (torch.ones(4, 4), {}, "smaller than the 4x4 filter"),
        (torch.ones(2, 2, 2), {"padding": 4}, "expected \\(taps,\\) or"),
        (torch.ones(2), {"up": 0}, "up is 0, expected a positive int"),
        (torch.ones(2), {"down": [1, 2, 3]}, "down is"),
        (torch.ones(2), {"padding": [1, 2, 3]}, "padding is"),
        (torch.ones(2, requires_grad=True), {}, "expected a constant"),
    ],
)
def test_bad_arguments(f: Tensor, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cuda_ops.upfirdn2d(torch.ones(1, 1, 3, 3), f, **options)


def test_setup_filter_refuses() -> None:
    with pytest.raises(ValueError, match="expected \\(\\), \\(taps,\\)"):
        cuda_ops.setup_filter(torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match="needs 1-D taps"):
        cuda_ops.setup_filter(torch.ones(2, 2), separable=True)


@plain
@pytest.mark.parametrize("name", ["bilinear", "asymmetric", "separable", "none"])
@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str, name: str) -> None:
    x, f = picture(1, 2, 6, 5).requires_grad_(), taps(name)
    run = lambda x: cuda_ops.upfirdn2d(x, f, **CASES[case])
    assert torch.autograd.gradcheck(run, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, x, fast_mode=True)


@plain
@pytest.mark.parametrize("last", [False, True])
def test_op_contract(last: bool) -> None:
    x = picture(2, 3, 6, 5, last=last).requires_grad_()
    arguments = (x, taps("bilinear"), [2, 1], [1, 2], [2, 1, 1, 3], False, 1.5)
    torch.library.opcheck(torch.ops.facelab.upfirdn2d.default, arguments)


@plain
def test_compiles_without_graph_breaks() -> None:
    f = taps("bilinear")

    def work(x: Tensor) -> Tensor:
        return cuda_ops.downsample2d(cuda_ops.upsample2d(x, f).tanh(), f).square().sum()

    x = picture(1, 2, 4, 4).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (4, 6):
        x = picture(1, 2, size, size).requires_grad_()
        (got,), (expected,) = torch.autograd.grad(compiled(x), x), torch.autograd.grad(work(x), x)
        torch.testing.assert_close(got, expected)


def test_layouts_strides_and_empty_batches() -> None:
    f = taps("bilinear")
    expected = cuda_ops.upsample2d(picture(2, 4, 6, 6), f)
    last = cuda_ops.upsample2d(picture(2, 4, 6, 6, last=True), f)
    assert last.is_contiguous(memory_format=LAST) and not last.is_contiguous()
    torch.testing.assert_close(last, expected)
    wide = picture(2, 4, 6, 6).repeat_interleave(2, 3).repeat_interleave(2, 1)[:, ::2, :, ::2]
    turned = picture(2, 4, 6, 6).transpose(2, 3).contiguous().transpose(2, 3)
    sliced = torch.cat([picture(2, 4, 6, 6, last=True)] * 2, dim=1).to(memory_format=LAST)[:, :4]
    for x in (wide, turned, sliced):
        assert not x.is_contiguous()
        torch.testing.assert_close(cuda_ops.upsample2d(x, f), expected)
    assert cuda_ops.upsample2d(sliced, f).is_contiguous(memory_format=LAST)
    assert cuda_ops.upsample2d(picture(0, 4, 6, 6), f).shape == (0, 4, 12, 12)


def test_autocast_leaves_it_alone() -> None:
    x, f = picture(1, 2, 8, 8, dtype=torch.float32), taps("bilinear")
    with torch.autocast(DEVICE, torch.bfloat16):
        y = cuda_ops.filter2d(x, f)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, cuda_ops.filter2d(x, f), rtol=0, atol=0)


@kernels
@pytest.mark.parametrize(
    ("name", "last"), [("bilinear", False), ("bilinear", True), ("asymmetric", True), ("separable", False)]
)
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_twin(case: str, name: str, last: bool) -> None:
    f = taps(name)
    x = picture(1, 4, 7, 6, last=last).requires_grad_()
    got, expected = cuda_ops.upfirdn2d(x, f, **CASES[case]), reference.upfirdn2d(x, f, **CASES[case])
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn(got.shape, generator=torch.Generator().manual_seed(5), dtype=got.dtype).to(DEVICE)
    (dx,), (expected_dx,) = torch.autograd.grad(got, x, dy), torch.autograd.grad(expected, x, dy)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-12, atol=1e-12)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", ["filter", "up", "down"])
def test_kernel_dtypes(case: str, last: bool, dtype: torch.dtype) -> None:
    x, f = picture(1, 6, 8, 9, dtype=dtype, last=last), taps("bilinear")
    got, expected = cuda_ops.upfirdn2d(x, f, **CASES[case]), reference.upfirdn2d(x, f, **CASES[case])
    assert got.dtype == dtype and got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@kernels
@pytest.mark.parametrize(
    ("width", "first", "together", "dtype"),
    [
        (8, 0, 4, torch.float16),
        (8, 0, 4, torch.bfloat16),
        (12, 4, 4, torch.float16),
        (6, 0, 2, torch.float16),
        (8, 2, 2, torch.float16),
        (8, 1, 1, torch.float16),
    ],
)
@pytest.mark.parametrize(
    "options",
    [{"padding": [2, 1, 2, 1]}, {"down": 2, "padding": [1, 1, -1, 3]}, {"down": [4, 1], "padding": [-3, 4, 0, 3]}],
)
def test_halves_are_read_together_where_addresses_allow(
    options: dict[str, Any], width: int, first: int, together: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of ``width`` numbers that begin at number ``first`` of rows of 16 are read by 1, 2 or 4."""
    used = []
    word = filter_launch.word
    monkeypatch.setattr(filter_launch, "word", lambda *a: used.append(word(*a)) or used[-1])
    x, f = picture(1, 2, 5, 16, dtype=dtype)[..., first : first + width], taps("bilinear")
    got, expected = cuda_ops.upfirdn2d(x, f, **options), reference.upfirdn2d(x, f, **options)
    assert used == [together]
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@kernels
def test_kernel_of_large_filters() -> None:
    """70 taps go through the plain loops, in two passes; a 2-D filter of that size in one."""
    long = taps("long")
    assert long is not None and filter_launch.plan((70, 70), (1, 1), (1, 1), (0,) * 4, 8, False) is None
    x = picture(1, 2, 5, 6)
    for f, padding in ((long, 69), (long[None, :65], [64, 64, 0, 0])):
        got = cuda_ops.upfirdn2d(x, f, padding=padding, down=[2, 1])
        torch.testing.assert_close(got, reference.upfirdn2d(x, f, padding=padding, down=[2, 1]), rtol=1e-12, atol=1e-12)


@gpu
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["bilinear", "long"])
def test_gradients_on_a_gpu(name: str, last: bool) -> None:
    x, f = picture(1, 2, 6, 5, device="cuda", last=last).requires_grad_(), taps(name)
    for case in CASES.values():
        options = {**case, "padding": 70} if name == "long" else case
        run = lambda x: cuda_ops.upfirdn2d(x, f, **options)  # noqa: B023
        assert torch.autograd.gradcheck(run, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, x, fast_mode=True)
    arguments = (x, f, [2, 1], [1, 2], [70, 70, 70, 70], False, 1.5)
    torch.library.opcheck(torch.ops.facelab.upfirdn2d.default, arguments)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", ["filter", "up", "down", "rational"])
@pytest.mark.parametrize("size", [4, 17, 64, 257])
def test_sizes_on_a_gpu(size: int, case: str, last: bool, dtype: torch.dtype) -> None:
    x, f = picture(3, 40, size, size + 1, dtype=dtype, device="cuda", last=last), taps("bilinear")
    got, expected = cuda_ops.upfirdn2d(x, f, **CASES[case]), reference.upfirdn2d(x.double(), f, **CASES[case])
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@gpu
@pytest.mark.parametrize("last", [False, True])
def test_more_than_two_to_the_31_elements_on_a_gpu(last: bool) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    x = torch.zeros(2, 1 << 14, 257, 256, dtype=torch.float16, device="cuda")
    x = x.to(memory_format=LAST) if last else x
    x[-1, -1, -1, -1] = 64.0
    y = cuda_ops.filter2d(x, taps("bilinear"))
    assert y.numel() > 2**31 and y[-1, -1, -2:, -2:].flatten().tolist() == [1.0, 3.0, 3.0, 9.0]
    assert y[-1].count_nonzero() == 4 and y[0].count_nonzero() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"f": [1, 3, 3, 1]}, "the filter is a list, expected a tensor: use cuda_ops.setup_filter"),
        ({"up": 1.5}, "up is 1.5, expected a positive int"),
        ({"up": [2]}, r"up is \[2\], expected a positive int"),
        ({"down": "2"}, "down is '2', expected a positive int"),
        ({"padding": "same"}, "padding is 'same', expected an int"),
        ({"padding": 1.5}, "padding is 1.5, expected an int"),
        ({"padding": [0.5, 1]}, r"padding is \[0.5, 1\], expected an int"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cuda_ops.upfirdn2d(torch.ones(1, 1, 8, 8), **{"f": cuda_ops.setup_filter([1, 3, 3, 1]), **change})


def test_shapes_without_numbers() -> None:
    """Tensors on the meta device, by which large networks are sized before they are built."""
    x, f = torch.empty(2, 3, 8, 8, device="meta"), cuda_ops.setup_filter([1, 3, 3, 1]).to("meta")
    assert cuda_ops.upsample2d(x, f).shape == (2, 3, 16, 16)
    y = cuda_ops.bias_act(x.half().to(memory_format=torch.channels_last), torch.empty(3, device="meta"), act="lrelu")
    assert y.is_meta and y.dtype == torch.float16 and y.is_contiguous(memory_format=torch.channels_last)
