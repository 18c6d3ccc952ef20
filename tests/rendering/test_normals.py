# SPDX-License-Identifier: Apache-2.0
"""Normals of density fields by every renderer: those of the surface, whatever lies behind it, in chunks of any size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from facelab.cameras.camera import Camera
from facelab.cameras.rays import make_rays
from facelab.fields.output import FieldOutput
from facelab.rendering.integrators import RenderOutput
from facelab.rendering.midpoint import render_midpoints
from facelab.rendering.ray_samplers import points_along
from facelab.rendering.sdf import render_sdf
from facelab.rendering.settings import RenderSettings
from facelab.rendering.volume_renderer import render_rays

RADIUS = 0.5
VIEWS = make_rays(Camera.on_sphere(torch.pi / 2, torch.pi / 2 + 0.3, 18.0, 2.7), 15, "centers")
SETTINGS = RenderSettings(near=2.0, far=3.4, samples_coarse=96, samples_fine=0, jitter=False, normals=True)
RENDERERS = {
    "midpoint": (render_midpoints, {"samples_fine": 96}),
    "points": (render_rays, {"samples_fine": 96}),
    "points, last": (render_rays, {"samples_fine": 96, "background": "last"}),
    "signed distance": (render_sdf, {}),  # of raw densities, as this renderer takes them too
    "signed distance, last": (render_sdf, {"background": "last"}),
}


def ball_with_rind(points: Tensor, directions: Tensor) -> FieldOutput:
    """A ball that is thick at its surface and thinner within: at the mean depth its density falls inwards."""
    depth = RADIUS - points.norm(dim=-1, keepdim=True)
    density = 30 * torch.sigmoid(depth / 0.01) * torch.exp(-depth.clamp_min(0) / 0.1)
    return FieldOutput(density - 10 * (depth < -0.1), torch.ones_like(points))


class WithGradient:
    """The same as fields of signed distances offer it: with the gradient of the raw density."""

    __call__ = staticmethod(ball_with_rind)

    @staticmethod
    def with_gradient(points: Tensor, directions: Tensor) -> tuple[FieldOutput, Tensor]:
        with torch.enable_grad():
            leaf = points.detach().requires_grad_(True)
            values = ball_with_rind(leaf, directions)
            return values, torch.autograd.grad(values.sigma.sum(), leaf)[0]


@pytest.mark.parametrize("name", RENDERERS)
@pytest.mark.parametrize("field", [ball_with_rind, WithGradient()])
def test_normals_are_those_of_the_surface(name: str, field: Callable[[Tensor, Tensor], FieldOutput]) -> None:
    render, changes = RENDERERS[name]
    output: RenderOutput = render(field, VIEWS, SETTINGS.replace(**changes))
    assert output.normals is not None
    seen = output.opacity[..., 0] > 0.9
    points = points_along(VIEWS, output.depth / output.opacity.clamp_min(1e-6))[..., 0, :]
    outward = torch.nn.functional.normalize(points, dim=-1)
    assert seen.sum() > 20
    assert ((output.normals * outward).sum(-1)[seen] > 0.9).all()
    assert not output.normals[output.opacity[..., 0] < 0.4].any()


@pytest.mark.parametrize("name", RENDERERS)
def test_memory_does_not_change_the_normals(name: str) -> None:
    render, changes = RENDERERS[name]
    settings = SETTINGS.replace(**changes)
    asked: list[int] = []

    def counted(points: Tensor, directions: Tensor) -> FieldOutput:
        if points.requires_grad:
            asked.append(points.shape[:3].numel())
        return ball_with_rind(points, directions)

    with torch.no_grad():
        whole, small = (render(counted, VIEWS, settings.replace(max_points=m)) for m in (10_000_000, 6_400))
    assert whole.normals is not None and small.normals is not None
    torch.testing.assert_close(small.normals, whole.normals)
    assert max(asked[:1]) > 5_000 and min(asked) <= 6_400 // 32  # without gradient 32 times as many fit
