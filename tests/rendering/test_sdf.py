# SPDX-License-Identifier: Apache-2.0
"""Rendering of signed distances: known shapes, depths of samples, chunks, what is kept, bad settings."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from facelab.cameras.rays import make_depth_rays
from facelab.cameras.sphere import sphere_camera
from facelab.draws import Draws
from facelab.fields.output import FieldOutput
from facelab.fields.sdf import BoundSdf, SdfField, SdfFieldConfig, laplace_density
from facelab.rendering.sdf import SdfIntegrator, SdfOptions, even_depths, ray_depths, render_sdf, stratify_depths
from facelab.rendering.settings import RenderSettings

RADIUS = 0.07
SETTINGS = RenderSettings(resolution=9, samples_coarse=96, samples_fine=0, grid="centers", jitter=False)
CAMERA = sphere_camera([0.0, 0.3], [0.1, -0.2])


class Ball:
    """A ball with a thin surface; its colour tells the position, its features twice that."""

    def __init__(self, beta: float = 1e-4) -> None:
        self.beta = torch.tensor([beta])
        self.calls: list[int] = []

    def __call__(self, points: Tensor, directions: Tensor) -> FieldOutput:
        self.calls.append(points.shape[:3].numel())
        sdf = points.norm(dim=-1, keepdim=True) - RADIUS
        return FieldOutput(laplace_density(sdf, self.beta), points + 0.5, features=2 * points, sdf=sdf)

    def with_gradient(self, points: Tensor, directions: Tensor) -> tuple[FieldOutput, Tensor]:
        return self(points, directions), torch.nn.functional.normalize(points, dim=-1)


def network(dtype: torch.dtype = torch.float64) -> BoundSdf:
    field = SdfField(SdfFieldConfig(width=8, layers=2, style_dim=4))
    field.reset_parameters(torch.Generator().manual_seed(2))
    with torch.no_grad():
        field.beta.fill_(0.02)
    field = field.to(dtype)
    return BoundSdf(field, field.film(torch.randn(2, 4, generator=torch.Generator().manual_seed(3), dtype=dtype)))


def test_ball_is_seen_where_it_is() -> None:
    rays = make_depth_rays(CAMERA, SETTINGS.resolution)
    output = render_sdf(Ball(), rays, SETTINGS.replace(normals=True, samples_coarse=400, background="last"))
    # |o + t d|^2 = r^2
    a = rays.directions.square().sum(-1)
    b = (rays.origins * rays.directions).sum(-1)
    root = b.square() - a * (rays.origins.square().sum(-1) - RADIUS**2)
    inside = root > 2e-4
    t = (-b - root.clamp_min(0).sqrt()) / a
    assert 20 < int(inside.sum()) < inside.numel() - 20
    assert output.mask is not None and output.points is not None and output.normals is not None
    torch.testing.assert_close(output.opacity[..., 0], (root > 0).float(), atol=0.02, rtol=0)
    assert torch.allclose((output.depth / output.opacity)[..., 0][inside], t[inside], atol=0.24 / 400)
    surface = rays.origins + t[..., None] * rays.directions
    assert (output.points - surface)[inside].abs().max() < 0.24 / 400
    assert (output.rgb - 0.5 - surface)[inside].abs().max() < 0.24 / 400
    assert (output.normals - surface / RADIUS)[inside].abs().max() < 0.02
    assert (output.normals[root < 0] == 0).all()
    torch.testing.assert_close(output.mask, 1 - output.opacity, atol=1e-4, rtol=0)
    # background is at the far end
    far = rays.origins + rays.directions * even_depths(torch.tensor(0.88), torch.tensor(1.12), 400, "offset")[-1]
    assert (output.points - far)[root < -1e-3].abs().max() < 1e-3


def test_lengths_are_measured_along_the_ray_not_along_the_axis() -> None:
    t, density = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[[0.3], [0.0]]]])
    for length in (1.0, 2.5):
        weights = SdfIntegrator().weights(t, density, torch.tensor([[[0.0, 0.0, length]]]))
        assert weights[0, 0, 0].item() == pytest.approx(1 - torch.tensor(-0.3 * length).exp().item())


def test_background_last_takes_what_is_missing() -> None:
    t, density = torch.linspace(0, 1, 4)[None, None], torch.full((1, 1, 4, 1), 0.5)
    density[..., -1, :] = 0
    directions = torch.ones(1, 1, 3)
    plain, forced = (SdfIntegrator(b).weights(t, density, directions) for b in ("none", "last"))
    assert plain[0, 0, -1] == 0 and plain.sum() < 0.9
    assert forced.sum().item() == pytest.approx(1) and torch.equal(plain[..., :-1], forced[..., :-1])


def test_raw_densities_go_through_a_softplus_with_noise() -> None:
    t = torch.linspace(0.9, 1.1, 4)[None, None]
    values = FieldOutput(torch.full((1, 1, 4, 1), 2.0), torch.ones(1, 1, 4, 3))
    points, directions = torch.zeros(1, 1, 4, 3), torch.tensor([[[0.0, 0.0, -1.0]]])
    noise = torch.full((1, 1, 4, 1), 0.5)
    output = SdfIntegrator()(t, points, values, directions, noise)
    sigma = torch.nn.functional.softplus(torch.tensor(2.5))
    assert output.opacity.item() == pytest.approx(1 - torch.exp(-sigma * 0.2).item(), rel=1e-4)
    rays = make_depth_rays(CAMERA, 3)
    settings = SETTINGS.replace(sigma_noise=1.0, samples_coarse=4)

    def raw(points: Tensor, directions: Tensor) -> FieldOutput:
        return FieldOutput(10 * (RADIUS - points.norm(dim=-1, keepdim=True)), points)

    assert not torch.equal(render_sdf(raw, rays, settings, Draws(0)).rgb, render_sdf(raw, rays, settings, Draws(1)).rgb)
    assert torch.equal(
        render_sdf(Ball(), rays, settings, Draws(0)).rgb, render_sdf(Ball(), rays, settings, Draws(1)).rgb
    )


def test_offset_depths_move_together_and_stratified_ones_alone() -> None:
    rays = make_depth_rays(CAMERA, 4)
    settings = SETTINGS.replace(samples_coarse=6)
    u = torch.rand(2, 16, 6, generator=torch.Generator().manual_seed(0))
    even = ray_depths(rays, settings, "offset")
    moved = ray_depths(rays, settings, "offset", u[..., :1])
    torch.testing.assert_close(moved - even, (u[..., :1] * 0.04).expand_as(moved), atol=1e-6, rtol=0)
    assert even[0, 0].tolist() == pytest.approx([0.88, 0.92, 0.96, 1.0, 1.04, 1.08])
    strata = ray_depths(rays, settings, "stratified", u)
    assert strata.min() >= 0.88 and strata.max() <= 1.12 and (strata.diff(dim=-1) > 0).all()
    assert (strata.diff(dim=-1).std(dim=-1) > 1e-4).all()
    assert stratify_depths(even, torch.ones_like(u))[..., -1].unique().tolist() == pytest.approx(
        [even[0, 0, -1].item()]
    )
    own = replace(rays, limits=torch.tensor([0.5, 0.8]).expand(2, 16, 2))
    assert ray_depths(own, settings, "stratified")[0, 0, [0, -1]].tolist() == pytest.approx([0.5, 0.8])


def test_chunks_change_nothing_and_bound_what_is_evaluated() -> None:
    rays = make_depth_rays(CAMERA, SETTINGS.resolution)
    settings = SETTINGS.replace(jitter=True, normals=True)
    whole, parts = Ball(), Ball()
    with torch.no_grad():
        a = render_sdf(whole, rays, settings, Draws(5), SdfOptions(samples=True))
        b = render_sdf(parts, rays, settings.replace(max_points=1500), Draws(5), SdfOptions(samples=True))
    assert max(whole.calls) == 2 * 81 * 96 and max(parts.calls) <= 1500
    for field in fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert (left is None) == (right is None), field.name
        if left is not None:
            torch.testing.assert_close(left, right, msg=lambda text, name=field.name: f"{name}: {text}")


def test_without_gradient_nothing_of_the_size_of_the_samples_is_kept() -> None:
    rays = make_depth_rays(CAMERA, SETTINGS.resolution)
    with torch.no_grad():
        sizes = [
            sum(x.numel() for x in vars(render_sdf(network(torch.float32), rays, settings)).values() if x is not None)
            for settings in (SETTINGS.replace(samples_coarse=8), SETTINGS.replace(samples_coarse=64))
        ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("gradient", ["layers", "autograd"])
def test_recomputed_chunks_give_the_same_gradients(gradient: str) -> None:
    rays = make_depth_rays(CAMERA, 4)
    rays = replace(rays, **{k: v.double() for k, v in vars(rays).items() if v is not None})
    settings = SETTINGS.replace(resolution=4, samples_coarse=6)
    found = []
    for changes in ({}, {"recompute": True, "max_points": 160}):
        bound = network()
        options = SdfOptions(samples=True, gradient=gradient)
        output = render_sdf(bound, rays, settings.replace(**changes), options=options)
        assert output.gradient is not None and output.sdf is not None and output.features is not None
        loss = output.rgb.square().mean() + (output.gradient.norm(dim=-1) - 1).square().mean()
        loss = loss + torch.exp(-100 * output.sdf.abs()).mean() + output.features.mean()
        parameters = [p for p in bound.network.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for left, right in zip(*found, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right)


def test_the_field_sees_the_views_of_the_rays() -> None:
    seen: list[Tensor] = []

    def field(points: Tensor, directions: Tensor) -> FieldOutput:
        seen.append(directions)
        return Ball()(points, directions)

    for static in (False, True):
        render_sdf(field, make_depth_rays(CAMERA, 3, static_views=static), SETTINGS)
    assert torch.allclose(seen[1][0], seen[1][1]) and not torch.allclose(seen[0][0], seen[0][1], atol=0.1)
    assert seen[1][0, 4].tolist() == pytest.approx([0, 0, -1], abs=1e-6)
    assert seen[0][0, 4].tolist() == pytest.approx((-CAMERA.cam2world[0, :3, 3]).tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"background": "white"}, "background none or last, got 'white'"), ({"samples_fine": 4}, "no importance samples")],
)
def test_settings_that_are_not_there(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        render_sdf(Ball(), make_depth_rays(CAMERA, 3), SETTINGS.replace(**changes))


def test_missing_draws_and_gradients_are_said() -> None:
    rays = make_depth_rays(CAMERA, 3)
    with pytest.raises(ValueError, match="need draws="):
        render_sdf(Ball(), rays, SETTINGS.replace(jitter=True))
    with pytest.raises(ValueError, match="no with_gradient"):
        render_sdf(lambda p, d: Ball()(p, d), rays, SETTINGS, options=SdfOptions(gradient="layers"))
