# SPDX-License-Identifier: Apache-2.0
"""The fused tri-plane renderer against its plain twin, in every mode.

On a machine without a GPU the kernel runs in Triton's interpreter, in a process of its own, because
Triton decides at import.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_ops import dispatch, triplane_launch, triplane_render
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


def loss(output: RenderOutput) -> Tensor:
    """Depends on every output."""
    r = torch.Generator().manual_seed(5)
    parts = [getattr(output, name) for name in ("features", "depth", "opacity", "mean_depth")]
    return torch.stack([(x * torch.randn(x.shape, generator=r).to(x)).sum() for x in parts]).sum()


def gradients(settings: RenderSettings, field: TriplaneField, planes: Tensor, rays: Rays, fused: bool) -> list[Tensor]:
    """Of planes, decoder and, where the depths do not depend on them, rays."""
    leaves = [planes.detach().requires_grad_(), rays.origins.detach().clone(), rays.directions.detach().clone()]
    if settings.box_side is None:
        leaves[1].requires_grad_()
        leaves[2].requires_grad_()
    rays = Rays(leaves[1], leaves[2])
    if fused:
        output = render_triplane(leaves[0], rays, field, settings, Draws(1))
    else:
        output = render_midpoints(lambda points, _: field(points, leaves[0]), rays, settings, Draws(1))
    return list(torch.autograd.grad(loss(output), [x for x in (*leaves, *field.parameters()) if x.requires_grad]))


@kernels
@pytest.mark.parametrize("case", sorted({*CASES} - {"plain", "more_fine"}))
def test_gradients_are_the_plain_renderers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of samples, the last one partly empty; all programs but the last have several rays."""
    monkeypatch.setattr(triplane_launch, "TUNING", triplane_launch.Tuning(block=16, programs=3))
    monkeypatch.setenv("FACELAB_OPS", "triton")
    calls = []
    kernel = triplane_launch.backward
    monkeypatch.setattr(triplane_launch, "backward", lambda *a: calls.append(1) or kernel(*a))
    options, field_options = CASES[case]
    settings = RenderSettings(**{**FIXED, "samples_coarse": 10, "samples_fine": 7, **options})
    field, planes, rays = scene(field_options)
    field.requires_grad_(True)
    rays = Rays(rays.origins[:, 1:3], rays.directions[:, 1:3])
    got = gradients(settings, field, planes, rays, fused=True)
    assert calls, "the fused backward did not run"
    expected = gradients(settings, field, planes, rays, fused=False)
    for a, b in zip(got, expected, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@kernels
def test_gradient_is_the_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against differences of the plain renderer, in a direction of the space of planes and rays."""
    monkeypatch.setenv("FACELAB_OPS", "triton")
    settings = RenderSettings(**FIXED, samples_coarse=8, samples_fine=0)  # importance samples would move
    field, planes, rays = scene({}, planes=1)
    rays = Rays(rays.origins[:, 1:3], rays.directions[:, 1:3])
    got = gradients(settings, field, planes, rays, fused=True)
    r = torch.Generator().manual_seed(7)
    # planes read in float32 by the plain field: steps large enough for it, small enough for a straight line
    way = [torch.randn(x.shape, generator=r).to(x) for x in got]
    step = 2e-3
    values = []
    for sign in (-1, 1):
        moved = Rays(rays.origins + sign * step * 0.02 * way[1], rays.directions + sign * step * 0.02 * way[2])
        moved_planes = planes + sign * step * way[0]
        output = render_midpoints(lambda points, _: field(points, moved_planes), moved, settings, Draws(1))  # noqa: B023
        values.append(float(loss(output).double()))
    found = sum(float((a * b).sum()) * factor for a, b, factor in zip(got, way, (1, 0.02, 0.02), strict=True))
    assert abs(found) > 0.1
    assert abs((values[1] - values[0]) / (2 * step) - found) < 0.02 * abs(found)


@kernels
def test_gradients_of_one_set_of_planes_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """One scene seen by two cameras; planes stay float32 and so do their gradients."""
    monkeypatch.setenv("FACELAB_OPS", "triton")
    settings = RenderSettings(**FIXED, samples_coarse=10, samples_fine=7)
    field, planes, rays = scene({}, planes=1)
    rays = Rays(rays.origins[:, 1:3], rays.directions[:, 1:3])
    expected = gradients(settings, field, planes, rays, fused=False)[0]
    field.precision = "fp16"
    got = gradients(settings, field, planes, rays, fused=True)[0]
    assert got.dtype == torch.float32 and got.shape == planes.shape
    difference = (got - expected).norm() / expected.norm()
    assert 0 < difference < 0.05, difference


@kernels
def test_a_second_derivative_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELAB_OPS", "triton")
    field, planes, rays = scene({}, planes=1)
    planes.requires_grad_(True)
    output = render_triplane(planes, rays, field, RenderSettings(**FIXED, samples_coarse=6, samples_fine=0))
    (gradient,) = torch.autograd.grad(output.rgb.square().sum(), planes, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of first order, but a second one is asked for"):
        gradient.square().sum().backward()


@kernels
def test_op_contract() -> None:
    field, planes, rays = scene({}, planes=1)
    spec = fused_spec(field, RenderSettings(**FIXED, samples_coarse=5, samples_fine=0))
    weights = [x.detach() for x in field.decoder.effective()]
    inputs = (planes.requires_grad_(), rays.origins[:, :1], rays.directions[:, :1], *weights)
    arguments = (*inputs, None, None, None, *spec.arguments(), True)
    # the last digits of the planes' gradient depend on the order of the additions: no comparison of two runs
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.facelab.triplane_render.default, arguments, test_utils=tests)
    depths = torch.linspace(2.3, 3.2, 5, device=planes.device).expand(2, 1, 5).contiguous()
    d = torch.ones(2, 1, 16, device=planes.device), torch.ones(3, 2, 1, 1, device=planes.device)
    inputs = tuple(x.detach() for x in inputs)
    for wanted in ((True, True), (False, False)):
        arguments = (*d, *inputs, depths, *spec.arguments(), *wanted)
        torch.library.opcheck(torch.ops.facelab.triplane_render_backward.default, arguments, test_utils=tests[:2])


@kernels
def test_a_renderer_without_rays_or_gradient_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELAB_OPS", "triton")
    field, planes, rays = scene({})
    planes.requires_grad_(True)
    settings = RenderSettings(**FIXED, samples_coarse=6, samples_fine=4)
    none = Rays(rays.origins[:, :0], rays.directions[:, :0])
    (gradient,) = torch.autograd.grad(render_triplane(planes, none, field, settings).rgb.sum(), planes)
    assert gradient.shape == planes.shape and not gradient.any()


@pytest.mark.parametrize(
    "what", ["coarse without gradient", "moving limits", "deterministic", "reference", "asked for"]
)
def test_what_the_fused_gradient_lacks_takes_the_plain_renderer(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the fused renderer has no such gradient")

    monkeypatch.setattr(triplane_render, "render_triplane", refuse)
    monkeypatch.setenv("FACELAB_OPS", "triton" if INTERPRETED or HAVE_GPU else "auto")
    settings = RenderSettings(**FIXED, samples_coarse=6, samples_fine=4)
    field, planes, rays = scene({})
    planes.requires_grad_(True)
    if what == "coarse without gradient":
        settings = settings.replace(coarse_gradient=False)
    elif what == "moving limits":
        settings = settings.replace(box_side=0.8)
        rays.origins.requires_grad_(True)
    elif what == "reference":
        settings = settings.replace(reference=True)
    elif what == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    else:
        monkeypatch.setenv("FACELAB_OPS", "reference")
    output = render_triplane(planes, rays, field, settings)
    (gradient,) = torch.autograd.grad(output.rgb.sum(), planes)
    assert gradient.abs().sum() > 0


def test_automatic_precision_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    field, _, _ = scene({})
    settings = RenderSettings(**FIXED)
    found = []
    for allowed in (False, True):
        switches = SimpleNamespace(matmul=SimpleNamespace(allow_tf32=allowed))
        monkeypatch.setattr(torch.backends, "cuda", switches)
        found.append(fused_spec(field, settings).precision)
    field.precision = "fp16"
    assert [*found, fused_spec(field, settings).precision] == ["fp32", "tf32", "fp16"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_released_size_on_a_gpu(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients at 48 + 48 samples, 32 channels, hidden width 64, planes of 256 px."""
    monkeypatch.setenv("FACELAB_OPS", "triton")
    r = torch.Generator().manual_seed(0)
    field = TriplaneField(TriplaneConfig())
    field.reset_parameters(r)
    field.cuda()
    planes = torch.randn(2, 3, 32, 256, 256, generator=r).cuda()
    rays = make_rays(orbit_camera([1.2, 1.9], [1.5, 1.7], 2.7).to("cuda"), 32, "centers")
    settings = RenderSettings(near=2.25, far=3.3, samples_coarse=48, samples_fine=48, grid="centers", resolution=32)
    expected = gradients(settings, field, planes, rays, fused=False)
    field.precision = precision  # type: ignore[assignment]
    got = gradients(settings, field, planes, rays, fused=True)
    # a step of the importance samples' cdf may be passed or not: a few rays differ by more than rounding
    limit = {"fp32": 2e-3, "tf32": 2e-2, "fp16": 5e-2}[precision]
    for a, b in zip(got, expected, strict=True):
        if a.shape == rays.origins.shape:  # planes and decoder do not notice those rays, their own gradients do
            found = ((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-6)).flatten().quantile(0.95)
        else:
            found = (a - b).norm() / b.norm()
        assert found <= limit, float(found)


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
    if "interpreter.py" in done.stdout and "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("this version of Triton interprets no loops with NumPy 2.4 or newer")
    passed = re.search(r"(\d+) passed", summary)
    assert done.returncode == 0 and passed is not None and int(passed[1]) > 20, done.stdout[-3000:]
