# SPDX-License-Identifier: Apache-2.0
"""The fused tri-plane renderer against its plain twin, in every mode.

On a machine without a GPU the kernel runs in Triton's interpreter, in a process of its own, because
Triton decides at import.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_ops import dispatch, triplane_render
from facelab.cameras.orbit import orbit_camera
from facelab.cameras.rays import Rays, make_rays
from facelab.draws import Draws
from facelab.fields.triplane import TriplaneConfig, TriplaneField
from facelab.rendering.integrators import RenderOutput
from facelab.rendering.midpoint import render_midpoints
from facelab.rendering.settings import RenderSettings
from facelab.rendering.triplane import fused_spec, render_triplane

HAVE_GPU = torch.cuda.is_available()
INTERPRETED = dispatch.interpreted()
DEVICE = "cuda" if HAVE_GPU and not INTERPRETED else "cpu"
kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")

FIXED: dict[str, Any] = {"near": 2.25, "far": 3.3, "grid": "centers", "resolution": 2, "jitter": False}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings, field
    "plain": ({}, {}),
    "random": ({"jitter": True}, {"axes": "xy_xz_zx"}),
    "coarse_only": ({"samples_fine": 0}, {}),
    "white_disparity": ({"background": "white", "spacing": "disparity"}, {}),
    "box": ({"box_side": 0.8, "jitter": True}, {"axes": "xy_yz_zx"}),
    "concat": ({}, {"aggregation": "concat"}),
    "more_fine": ({"samples_coarse": 5, "samples_fine": 19}, {}),
    "full_tiles": ({"samples_coarse": 16, "samples_fine": 16}, {}),
}


def scene(field_options: dict[str, Any], planes: int = 2) -> tuple[TriplaneField, Tensor, Rays]:
    """A field with marked surfaces, ``planes`` sets of planes, rays of two cameras (some miss the box)."""
    r = torch.Generator().manual_seed(3)
    field = TriplaneField(TriplaneConfig(channels=16, hidden=16, features=16, **field_options))
    field.reset_parameters(r)
    with torch.no_grad():
        field.decoder.hidden_weight *= 3
        density = field.decoder.output_weight[0]
        density.sub_(density.mean()).mul_(12)  # around zero, so that there is something to see and something behind
        field.decoder.output_bias.normal_(generator=r)[0] = 1.0
    rays = make_rays(orbit_camera([1.2, 1.9], [1.5, 1.7], 2.7, focal=2.2), 2, "centers")
    values = torch.randn(planes, 3, 16, 11, 13, generator=r)
    return (
        field.requires_grad_(False).to(DEVICE),
        values.to(DEVICE),
        Rays(rays.origins.to(DEVICE), rays.directions.to(DEVICE)),
    )


def close(fused: RenderOutput, plain: RenderOutput, tolerance: float) -> None:
    for name in ("features", "rgb", "depth", "opacity", "mean_depth"):
        a, b = getattr(fused, name), getattr(plain, name)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@kernels
@pytest.mark.parametrize("case", sorted(CASES))
def test_every_mode_is_the_plain_renderer(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, field_options = CASES[case]
    settings = RenderSettings(**{**FIXED, "samples_coarse": 10, "samples_fine": 7, **options})
    field, planes, rays = scene(field_options)
    plain = render_midpoints(lambda points, _: field(points, planes), rays, settings, Draws(1))
    assert plain.opacity.std() > 0.02 and plain.features is not None and plain.features.std() > 0.1
    calls = []
    kernel = triplane_render.render_triplane
    monkeypatch.setattr(triplane_render, "render_triplane", lambda *a: calls.append(1) or kernel(*a))
    monkeypatch.setenv("FACELAB_OPS", "triton")
    close(render_triplane(planes, rays, field, settings, Draws(1)), plain, 1e-4)
    assert calls, "the fused renderer did not run"


@kernels
def test_one_set_of_planes_serves_all_cameras_and_any_memory_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELAB_OPS", "triton")
    settings = RenderSettings(**FIXED, samples_coarse=8, samples_fine=5)
    field, planes, rays = scene({}, planes=1)
    plain = render_midpoints(lambda points, _: field(points, planes), rays, settings)
    last = triplane_render.channels_last(planes)
    assert torch.equal(last, planes) and last.stride()[2] == 1
    close(render_triplane(last, rays, field, settings), plain, 1e-4)
    close(render_triplane(planes.expand(2, -1, -1, -1, -1), rays, field, settings), plain, 1e-4)


@kernels
def test_half_precision_stays_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELAB_OPS", "triton")
    settings = RenderSettings(**FIXED, samples_coarse=10, samples_fine=7)
    field, planes, rays = scene({})
    plain = render_midpoints(lambda points, _: field(points, planes), rays, settings)
    field.precision = "fp16"
    half = render_triplane(planes, rays, field, settings)
    assert half.features is not None and plain.features is not None
    difference = (half.features - plain.features).abs()
    assert difference.max() > 0 and difference.mean() < 5e-3


@kernels
def test_wrong_shapes_and_sizes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    field, planes, rays = scene({})
    spec = fused_spec(field, RenderSettings(**FIXED, samples_coarse=8, samples_fine=5))
    weights = field.decoder.effective()
    arguments = (rays.origins, rays.directions, weights, spec)
    with pytest.raises(ValueError, match=r"jitter must be \(2, 4, 8\), got \(2, 4, 7\)"):
        triplane_render.render_triplane(planes, *arguments, jitter=torch.zeros(2, 4, 7))
    with pytest.raises(ValueError, match=r"planes must be \(2 or 1, 3, C, H, W\)"):
        triplane_render.render_triplane(planes[:, :2], *arguments)
    with pytest.raises(RuntimeError, match="plane channels are 12"):
        triplane_render.render_triplane(planes[:, :, :12], *arguments)


def test_gradients_take_the_plain_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the fused renderer has no gradient")

    monkeypatch.setattr(triplane_render, "render_triplane", refuse)
    monkeypatch.setenv("FACELAB_OPS", "triton" if INTERPRETED or HAVE_GPU else "auto")
    field, planes, rays = scene({})
    planes.requires_grad_(True)
    output = render_triplane(planes, rays, field, RenderSettings(**FIXED, samples_coarse=6, samples_fine=4))
    (gradient,) = torch.autograd.grad(output.rgb.sum(), planes)
    assert gradient.abs().sum() > 0


@pytest.mark.skipif(HAVE_GPU or INTERPRETED, reason="the kernel itself is tested in this process")
def test_kernel_in_the_interpreter() -> None:
    checkout = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))],
        cwd=checkout,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    summary = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0 and "12 passed, 1 skipped" in summary, done.stdout[-3000:]
