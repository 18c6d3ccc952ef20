# SPDX-License-Identifier: Apache-2.0
"""The fused FiLM-SIREN field against its float64 twin: values, gradients, shapes, errors.

On a machine without a GPU the kernels run in Triton's interpreter, in a process of their own, because
Triton decides at import.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cuda_ops import dispatch, reference
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
