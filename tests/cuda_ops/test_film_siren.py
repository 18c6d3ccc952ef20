# SPDX-License-Identifier: Apache-2.0
"""The fused FiLM-SIREN field against its float64 twin: values, gradients, shapes, errors.

On a machine without a GPU the kernels run in Triton's interpreter, in a process of their own, because
Triton decides at import.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cuda_ops import dispatch, film_siren, film_siren_backward, reference
from cuda_ops.film_siren import film_siren_field

HAVE_GPU = torch.cuda.is_available()
INTERPRETED = dispatch.interpreted()
DEVICE = "cuda" if HAVE_GPU and not INTERPRETED else "cpu"
kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")
gpu = pytest.mark.gpu

CASES = {  # hidden, geometry layers, colour layers, labels, directions, grid channels, grid in geometry, scenes
    "pigan": (128, 3, 1, 0, True, 0, False, 1),
    "fenerf": (128, 3, 3, 18, True, 32, False, 2),
    "geometry_grid": (128, 2, 1, 5, True, 16, True, 2),
    "no_direction": (128, 2, 2, 18, False, 32, False, 1),
    "bare": (128, 1, 1, 0, False, 0, False, 1),
    "density": (128, 3, 0, 0, False, 0, False, 2),
    "wide": (256, 2, 1, 18, True, 32, False, 1),
}


def leaf(*shape: int, std: float, generator: torch.Generator) -> Tensor:
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).requires_grad_()


def inputs(case: str, rays: int = 5, samples: int = 3, layers: int | None = None) -> tuple[dict, list[Tensor]]:
    """Arguments of the field in float64 and the list of its leaves; weights as SIREN initialises them."""
    h, depth, colors, labels, direction, channels, in_geometry, n = CASES[case]
    depth = layers or depth
    r = torch.Generator().manual_seed(7)
    std = (2 / h) ** 0.5 / 25

    def linear(a: int, b: int, s: float = std) -> tuple[Tensor, Tensor]:
        return leaf(b, a, std=s, generator=r), leaf(b, std=0.05, generator=r)

    grid_geometry = channels if in_geometry else 0
    grid_color = 0 if in_geometry else channels
    film = []
    for count in (depth, colors):
        film.append((30 + 5 * torch.randn(n, count, h, generator=r, dtype=torch.float64)).requires_grad_())
        film.append(leaf(n, count, h, std=1.0, generator=r))
    points = (torch.rand(n, rays, samples, 3, generator=r, dtype=torch.float64) - 0.5) * 0.26  # some outside the box
    args = {
        "points": points.requires_grad_(),
        "directions": torch.nn.functional.normalize(torch.randn(n, rays, 3, generator=r, dtype=torch.float64), dim=-1)
        .detach()
        .requires_grad_()
        if direction
        else None,
        "film": tuple(film),
        "grid": leaf(1, channels, 5, 6, 7, std=0.1, generator=r) if channels else None,
        "geometry": [linear(3 + grid_geometry, h, 0.19), *(linear(h, h) for _ in range(depth - 1))],
        "sigma": linear(h, 1),
        "color": [linear(((3 if direction else 0) + grid_color + h) if i == 0 else h, h) for i in range(colors)],
        "rgb": linear(h, 3) if colors else None,
        "labels": linear(h, labels) if labels else None,
        "scale": 2 / 0.24,
        "grid_in_geometry": in_geometry,
    }
    return args, leaves(args)


def leaves(args: dict) -> list[Tensor]:
    found = [args["points"], args["directions"], *args["film"], args["grid"]]
    for pair in [*args["geometry"], args["sigma"], *args["color"], args["rgb"], args["labels"]]:
        found += [None, None] if pair is None else list(pair)
    return [x for x in found if x is not None and x.numel()]


def single(args: dict) -> dict:
    """The same arguments as float32 leaves on the test device."""

    def move(x):
        if isinstance(x, Tensor):
            y = x.detach().float().to(DEVICE)
            return (y.contiguous(memory_format=torch.channels_last_3d) if y.ndim == 5 else y).requires_grad_()
        return type(x)(move(v) for v in x) if isinstance(x, (tuple, list)) else x

    return {name: move(value) for name, value in args.items()}


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    b = b.to(a.device, torch.float64)
    return float((a.double() - b).norm() / b.norm().clamp(min=1e-30))


def check(case: str, **sizes: int) -> None:
    args, wanted = inputs(case, **sizes)
    fast = single(args)
    expected = reference.film_siren_field(**args)
    got = film_siren_field(**fast)
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert relative(got[..., -1], expected[..., -1]) < 0.005  # the gate on the density
    assert relative(got, expected) < 0.005
    r = torch.Generator().manual_seed(3)
    weight = torch.randn(expected.shape, generator=r, dtype=torch.float64) * 1e-4  # too small for plain float16
    expected_grads = torch.autograd.grad((expected * weight).sum(), wanted)
    got_grads = torch.autograd.grad((got * weight.float().to(DEVICE)).sum(), leaves(fast))
    for i, (a, b) in enumerate(zip(got_grads, expected_grads, strict=True)):
        assert a.shape == b.shape
        assert relative(a, b) < 0.02, f"{case}: leaf {i} {tuple(b.shape)}: {relative(a, b):.4f}"
        cosine = torch.nn.functional.cosine_similarity(a.double().cpu().flatten(), b.flatten(), dim=0)
        assert cosine > 0.999


@kernels
@pytest.mark.parametrize("case", CASES)
def test_matches_the_twin(case: str) -> None:
    check(case)


@kernels
def test_no_points() -> None:
    args, _ = inputs("fenerf", rays=0)
    out = film_siren_field(**single(args))
    assert out.shape == (2, 0, 22)
    out.sum().backward()


@kernels
def test_many_slabs_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenes cut into parts, and several scenes in one slab, give the same numbers as one slab."""
    args, _ = inputs("pigan", rays=90, samples=3)  # 270 points: three tiles, the last with padding
    fast = single(args)
    whole = film_siren_field(**fast)
    weight = torch.linspace(-1, 1, whole.numel(), device=DEVICE).reshape(whole.shape)
    grads = torch.autograd.grad((whole * weight).sum(), leaves(fast))
    monkeypatch.setattr(film_siren, "FORWARD_ROWS", 64)  # in rows of width 256
    monkeypatch.setattr(film_siren_backward, "BACKWARD_ROWS", 64)
    parts = film_siren_field(**fast)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    for a, b in zip(torch.autograd.grad((parts * weight).sum(), leaves(fast)), grads, strict=True):
        assert relative(a, b) < 1e-5


def test_slabs_cover_every_point_once() -> None:
    for n, points, limit in ((3, 1, 128), (5, 300, 1024), (2, 1000, 384), (1, 129, 128)):
        seen = torch.zeros(n, points, dtype=torch.int64)
        for slab in film_siren.slabs(n, points, limit):
            assert slab.rows_per_scene % film_siren.PAD == 0 and slab.rows_per_scene >= slab.count > 0
            assert slab.rows <= max(limit, film_siren.PAD)
            seen[slab.scene0 : slab.scene0 + slab.scenes, slab.p0 : slab.p0 + slab.count] += 1
        assert bool((seen == 1).all())


@kernels
def test_small_and_negative_frequencies() -> None:
    """A frequency of zero keeps a right phase gradient; the sign of a negative one is kept."""
    args, wanted = inputs("pigan")
    with torch.no_grad():
        args["film"][0][0, 1, :3] = torch.tensor([0.0, -20.0, -1e-4])
    fast = single(args)
    expected = torch.autograd.grad(reference.film_siren_field(**args).square().sum(), wanted)
    got = torch.autograd.grad(film_siren_field(**fast).square().sum(), leaves(fast))
    for a, b in zip(got[2:4], expected[2:4], strict=True):  # geometry frequencies and phases
        assert relative(a[0, 1, :3], b[0, 1, :3]) < 0.02


@kernels
def test_infinite_gradients_are_not_hidden() -> None:
    fast = single(inputs("pigan")[0])
    out = film_siren_field(**fast)
    weight = torch.ones_like(out)
    weight[0, 0, 0] = float("inf")
    assert not torch.isfinite(torch.autograd.grad((out * weight).sum(), fast["geometry"][0][0])[0]).all()


@kernels
def test_large_density_weights_stay_finite() -> None:
    args, wanted = inputs("pigan")
    with torch.no_grad():
        args["sigma"][0].mul_(10 / args["sigma"][0].abs().max())
    fast = single(args)
    out, expected = film_siren_field(**fast)[..., -1], reference.film_siren_field(**args)[..., -1]
    assert relative(out, expected) < 0.005
    got = torch.autograd.grad(out.sum() * 1e4, leaves(fast), allow_unused=True)
    for a, b in zip(got, torch.autograd.grad(expected.sum() * 1e4, wanted, allow_unused=True), strict=True):
        if a is not None and b is not None:
            assert torch.isfinite(a).all() and relative(a, b) < 0.02


@kernels
def test_second_order_is_refused_by_name() -> None:
    fast = single(inputs("bare")[0])
    out = film_siren_field(**fast)
    with pytest.raises(RuntimeError, match="precision='fp32'"):
        torch.autograd.grad(out.sum(), fast["points"], create_graph=True)


def test_the_twin_has_right_gradients() -> None:
    """gradcheck in float64 on a field small enough for it."""
    r = torch.Generator().manual_seed(0)

    def linear(a: int, b: int) -> tuple[Tensor, Tensor]:
        return leaf(b, a, std=0.3, generator=r), leaf(b, std=0.3, generator=r)

    geometry, color = [linear(3, 4), linear(4, 4)], [linear(3 + 2 + 4, 4)]
    heads = [linear(4, 1), linear(4, 3), linear(4, 2)]
    film = [leaf(1, n, 4, std=1.0, generator=r) for n in (2, 2, 1, 1)]
    grid, points, directions = (leaf(*s, std=0.3, generator=r) for s in ((1, 2, 3, 3, 3), (1, 2, 2, 3), (1, 2, 3)))
    flat = [t for pair in [*geometry, *color, *heads] for t in pair]

    def field(points: Tensor, directions: Tensor, grid: Tensor, *rest: Tensor) -> Tensor:
        pairs = [(rest[i], rest[i + 1]) for i in range(4, len(rest), 2)]
        return reference.film_siren_field(
            points, directions, rest[:4], grid, pairs[:2], pairs[3], pairs[2:3], pairs[4], pairs[5]
        )

    assert torch.autograd.gradcheck(field, (points, directions, grid, *film, *flat))


def test_folding_a_chain_of_linears_is_exact() -> None:
    r = torch.Generator().manual_seed(0)
    chain = [(leaf(b, a, std=1.0, generator=r), leaf(b, std=1.0, generator=r)) for a, b in ((5, 7), (7, 6), (6, 2))]
    x = leaf(9, 5, std=1.0, generator=r)
    expected = x
    for weight, bias in chain:
        expected = torch.nn.functional.linear(expected, weight, bias)
    got = torch.nn.functional.linear(x, *reference.fold_linear_chain(chain))
    torch.testing.assert_close(got, expected)
    parameters = [t for pair in chain for t in pair]
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_shapes_that_do_not_fit_are_named() -> None:
    args = single(inputs("pigan")[0])
    with pytest.raises(ValueError, match=r"layer's weight has shape \(128, 3\), expected \(128, 128\)"):
        film_siren_field(**{**args, "geometry": [args["geometry"][0]] * 2})
    with pytest.raises(ValueError, match="directions"):
        film_siren_field(**{**args, "directions": args["directions"][:, :1]})


@gpu
@pytest.mark.parametrize("case", ["fenerf", "wide"])
def test_at_full_depth_on_a_gpu(case: str) -> None:
    """Eight layers and many tiles: also what a race in a software pipeline would spoil."""
    check(case, layers=8, rays=700, samples=24)


@pytest.mark.skipif(INTERPRETED or HAVE_GPU, reason="the kernels are tested in this process")
def test_kernels_in_the_interpreter() -> None:
    """Run this folder's kernel tests in a process where Triton interprets; the renderer's have one of their own."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FACELAB_OPS": "triton", "OMP_NUM_THREADS": "1"}
    here = Path(__file__).parent
    elsewhere = f"--ignore={here / 'test_triplane_render.py'}"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", elsewhere, str(here)]
    done = subprocess.run(command, env=environment, cwd=here.parents[1], capture_output=True, text=True, timeout=300)
    if "interpreter.py" in done.stdout and "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("this version of Triton interprets no loops with NumPy 2.4 or newer")
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
