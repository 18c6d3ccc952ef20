# SPDX-License-Identifier: Apache-2.0
"""CNeRF's field: grouped evaluation, gradients of the distance, subsets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from facelab.fields.output import FieldOutput
from facelab.methods.cnerf.field import (
    CNerfField,
    CNerfFieldConfig,
    LocalGenerators,
    distance_gradient,
    pull_back_plain,
)
from facelab.methods.cnerf.fusion import CARVE_WIDTH, RegionValues, Subset, fuse, kept_share
from facelab.nn.film import FilmLinear

CONFIG = CNerfFieldConfig(regions=4, depth=2, width=7, style_dim=5)
SCENES, RAYS, SAMPLES = 2, 3, 2


def make(dtype: torch.dtype = torch.float64, config: CNerfFieldConfig = CONFIG) -> CNerfField:
    field = CNerfField(config)
    field.reset_parameters(torch.Generator().manual_seed(0))
    return field.to(dtype)


def inputs(dtype: torch.dtype = torch.float64, config: CNerfFieldConfig = CONFIG) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    points = 0.1 * torch.randn(SCENES, RAYS, SAMPLES, 3, generator=source, dtype=dtype)
    directions = torch.nn.functional.normalize(torch.randn(SCENES, RAYS, 3, generator=source, dtype=dtype), dim=-1)
    styles = torch.randn(SCENES, config.regions, config.depth + 2, config.style_dim, generator=source, dtype=dtype)
    return points, directions, styles


def one_by_one(net: LocalGenerators, branch: int, x: Tensor, v: Tensor, styles: Tensor) -> dict[str, Tensor]:
    """One local generator of one scene, layer by layer from the formulas; x (P, 3) scaled, v (P, 3), styles (L, W)."""
    mask = None
    for number, (layer, style) in enumerate(zip(net.layers, styles, strict=True), start=1):
        frequency = 15 * (layer.frequency.weight[branch] @ style + layer.frequency.bias[branch]) + 30
        phase = 0.25 * (layer.phase.weight[branch] @ style + layer.phase.bias[branch])
        x = torch.sin(frequency * (x @ layer.weight[branch].T + layer.bias[branch]) + phase)
        if number == net.depth:
            mask = torch.cat([x, v], -1) @ net.mask.weight[branch].T + net.mask.bias[branch]
    feature = torch.cat([x, v], -1) @ net.feature.weight[branch].T + net.feature.bias[branch]
    rgb = feature @ net.rgb.weight[branch].T + net.rgb.bias[branch]
    assert mask is not None
    return {"mask": mask, "sdf": x @ net.sdf.weight[branch].T + net.sdf.bias[branch], "feature": feature, "rgb": rgb}


def test_grouped_layers_equal_one_generator_after_the_other() -> None:
    field, (points, directions, styles) = make(), inputs()
    output = field.bind(styles)(points, directions)
    for n in range(SCENES):
        x = points[n].reshape(-1, 3) / 0.12
        v = directions[n][:, None].expand(-1, SAMPLES, -1).reshape(-1, 3)
        parts = [one_by_one(field.regions, k, x, v, styles[n, k]) for k in range(CONFIG.regions)]
        sdf = one_by_one(field.base, 0, x, v, styles[n, 0])["sdf"] + sum(p["sdf"] for p in parts)
        beta = field.beta
        expected = {
            "sdf": sdf,
            "sigma": torch.sigmoid(-sdf / beta) / beta,
            "rgb": torch.sigmoid(sum(p["mask"] * p["rgb"] for p in parts)),
            "semantics": torch.cat([p["mask"] for p in parts], -1),
            "features": sum(p["mask"] * p["feature"] for p in parts),
        }
        for name, value in expected.items():
            torch.testing.assert_close(getattr(output, name)[n].flatten(0, 1), value)


def total(field: CNerfField, gradient: Tensor, output: FieldOutput) -> Tensor:
    return ((gradient.norm(dim=-1) - 1) ** 2).mean() + output.sdf.abs().mean() + output.rgb.square().mean()


@pytest.mark.parametrize("residual", [True, False])
def test_gradient_equals_double_backward(residual: bool) -> None:
    """Values, and derivatives of an eikonal loss by every parameter and code."""
    field, (points, directions, styles) = make(), inputs()
    styles.requires_grad_(True)
    parameters = [styles, *field.parameters()]
    options = {"residual_gradient": residual, "base_gradient": not residual, "features": False}
    output, gradient = field.bind(styles, **options).with_gradient(points, directions)
    ours = torch.autograd.grad(total(field, gradient, output), parameters, allow_unused=True)

    leaf = points.clone().requires_grad_(True)
    again = field.bind(styles, **options)(leaf, directions)
    (expected,) = torch.autograd.grad(again.sdf.sum(), leaf, create_graph=True)
    theirs = torch.autograd.grad(total(field, expected, again), parameters, allow_unused=True)
    torch.testing.assert_close(gradient, expected)
    used = 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None) or (a if b is None else b).abs().max() == 0
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)
            used += bool(a.abs().max() > 0)
    assert used > 20


def test_base_is_in_the_gradient_but_not_trained() -> None:
    field, (points, directions, styles) = make(), inputs()
    bound = field.bind(styles)
    output, gradient = bound.with_gradient(points, directions)
    step = 1e-6
    for axis in range(3):
        shift = torch.zeros(3, dtype=points.dtype)
        shift[axis] = step
        difference = (bound(points + shift, directions).sdf - bound(points - shift, directions).sdf) / (2 * step)
        torch.testing.assert_close(gradient[..., axis : axis + 1], difference, rtol=1e-5, atol=1e-6)
    total(field, gradient, output).backward()
    assert all(p.grad is None for p in field.base.parameters())
    assert field.regions.sdf.weight.grad.abs().max() > 0
    _, residual = field.bind(styles, residual_gradient=True).with_gradient(points, directions)
    assert (residual - gradient).abs().max() > 1e-2


@pytest.mark.parametrize("count", [1, 2, 4])
def test_pulling_back_through_sines(count: int) -> None:
    """One function for all layers: values and derivatives of the same steps one by one."""
    source = torch.Generator().manual_seed(0)

    def leaf(*size: int) -> Tensor:
        return torch.randn(*size, generator=source, dtype=torch.float64, requires_grad=True)

    head = leaf(3, 1, 4)
    arguments = [leaf(2, 3, 1, 5, 4) for _ in range(count)]
    layers = [FilmLinear(leaf(2, 3, 4, 3 if i == 0 else 4), leaf(2, 3, 4)) for i in range(count)]
    weights = [layer.weight for layer in layers]
    ours = distance_gradient(arguments, layers, head)
    plain = pull_back_plain(head[:, None], arguments, weights[1:])
    expected = torch.einsum("nkpc,nkci->npi", plain[:, :, 0], weights[0])
    torch.testing.assert_close(ours, expected)
    inputs = [head, *arguments, *weights]
    factors = torch.randn(ours.shape, generator=source, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((ours * factors).sum(), inputs),
        torch.autograd.grad((expected * factors).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_one_scene_from_several_cameras() -> None:
    field, (points, directions, styles) = make(), inputs()
    many = field.bind(styles[:1].expand(SCENES, -1, -1, -1)).with_gradient(points, directions)
    one = field.bind(styles[:1]).with_gradient(points, directions)
    torch.testing.assert_close(one[1], many[1])
    for name in ("sigma", "rgb", "semantics", "features", "sdf"):
        torch.testing.assert_close(getattr(one[0], name), getattr(many[0], name))
    torch.testing.assert_close(field.bind(styles[:1]).distances(points), many[0].sdf)
    with pytest.raises(ValueError, match="2 scenes cannot be seen from 1 cameras"):
        field.bind(styles)(points[:1], directions[:1])
    with pytest.raises(ValueError, match=r"styles must be \(N, 4, 4, 5\), got \(2, 4, 3, 5\)"):
        field.bind(styles[:, :, 1:])


def test_subset_of_the_original_changes_features_only() -> None:
    field, (points, directions, styles) = make(), inputs()
    whole = field.bind(styles)(points, directions)
    parts = [field.bind(styles, subset=Subset((k,), carve=False))(points, directions) for k in range(CONFIG.regions)]
    for part in parts:
        for name in ("sigma", "rgb", "semantics", "sdf"):
            torch.testing.assert_close(getattr(part, name), getattr(whole, name), rtol=0, atol=0)
    torch.testing.assert_close(sum(p.features for p in parts), whole.features)
    with pytest.raises(ValueError, match="expected regions 0 to 3"):
        field.bind(styles, subset=Subset((4,)))


def values(mask: list[float]) -> RegionValues:
    m = torch.tensor(mask).reshape(1, -1, 1, 1)
    return RegionValues(torch.ones(1, len(mask), 1, 1, 3), torch.full_like(m, -0.01), m)


def test_carving_takes_away_what_others_claim() -> None:
    beta, base = torch.tensor([0.01]), torch.zeros(1, 1, 1)
    whole = fuse(values([0.9, 0.1, -3.0]), base, beta)
    for channels, share in (((0,), 0.9), ((1,), 0.1), ((2,), 0.0), ((0, 1), 1.0)):
        carved = fuse(values([0.9, 0.1, -3.0]), base, beta, Subset(channels))
        torch.testing.assert_close(carved.sigma, share * whole.sigma, rtol=1e-4, atol=1e-4)
        edge = CARVE_WIDTH * (0.5 - share)
        torch.testing.assert_close(carved.sdf.item(), max(whole.sdf.item(), edge), rtol=1e-4, atol=1e-6)
        hidden = [k for k in range(3) if k not in channels]
        assert carved.semantics[..., hidden].abs().max() == 0
        torch.testing.assert_close(carved.semantics[..., list(channels)], whole.semantics[..., list(channels)])
    field, (points, directions, styles) = make(), inputs()
    hair = field.bind(styles).region(2)
    torch.testing.assert_close(
        hair.distances(points), hair(points, directions * 0 + torch.tensor([0.0, 0.0, -1.0])).sdf
    )
    assert (
        hair(points, directions).features is not None and hair.without_features()(points, directions).features is None
    )
    everything = fuse(values([0.9, 0.1, -3.0]), base, beta, Subset((2, 0, 1)))
    for name in ("sigma", "rgb", "semantics"):
        torch.testing.assert_close(getattr(everything, name), getattr(whole, name), rtol=0, atol=0)
    unclaimed = kept_share(torch.full((1, 4, 1, 1), -1.0), Subset((1, 2)))
    assert unclaimed.item() == pytest.approx(0.5)


def test_initial_values_and_state() -> None:
    field = make(torch.float32, CNerfFieldConfig(regions=3, width=64, style_dim=32))
    state = field.state_dict()
    assert state["regions.layers.1.weight"].shape == (3, 64, 64) and state["base.layers.0.weight"].shape == (1, 64, 3)
    assert 0.32 < state["regions.layers.0.weight"].abs().max() <= 1 / 3
    assert 0.95 < state["regions.layers.2.weight"].abs().max() * 25 / (6 / 64) ** 0.5 <= 1
    assert state["beta"].tolist() == pytest.approx([0.1])
    a, b = (make(config=CONFIG).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["regions.layers.1.weight"][0], a["regions.layers.1.weight"][1])
