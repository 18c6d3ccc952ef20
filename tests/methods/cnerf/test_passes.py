# SPDX-License-Identifier: Apache-2.0
"""The layers in few passes: equal to autograd's, in chunks, compiled, and in half precision within stated bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from facelab.config import from_dict
from facelab.methods.cnerf import passes
from facelab.methods.cnerf.config import CnerfConfig
from facelab.methods.cnerf.field import CNerfField, CNerfFieldConfig, distance_gradient, run_layers
from facelab.methods.cnerf.fusion import Subset
from facelab.methods.cnerf.passes import Evaluation, Plan, evaluate
from facelab.methods.cnerf.training import Cnerf
from facelab.nn.film import FilmLinear

SCENES, REGIONS, POINTS, WIDTH = 2, 3, 11, 8


class Case:
    """Random layers, heads and points."""

    def __init__(self, layers: int = 4, dtype: torch.dtype = torch.float64) -> None:
        source = torch.Generator().manual_seed(layers)

        def leaf(*shape: int, gain: float = 1.0) -> Tensor:
            return (gain * torch.randn(*shape, generator=source, dtype=dtype)).requires_grad_()

        inputs = [3, *[WIDTH] * (layers - 1)]
        self.layers = [
            FilmLinear(leaf(SCENES, REGIONS, WIDTH, i, gain=4 / WIDTH**0.5), leaf(SCENES, REGIONS, WIDTH))
            for i in inputs
        ]
        self.mask, self.head = leaf(REGIONS, 1, WIDTH), leaf(REGIONS, 4, WIDTH)
        self.points = torch.randn(SCENES, POINTS, 3, generator=source, dtype=dtype)
        self.leaves = [self.mask, self.head, *(x.weight for x in self.layers), *(x.bias for x in self.layers)]

    def plain(self, depth: int) -> Evaluation:
        """By autograd's own derivatives."""
        shape, texture, _ = run_layers(self.points, self.layers, depth)

        def read(sines: Tensor, weight: Tensor) -> Tensor:
            return torch.einsum("nkpc,koc->nkpo", torch.sin(sines[:, :, 0]), weight)

        values = read(texture.tensor, self.head)
        points = self.points.clone().requires_grad_()
        last = run_layers(points, self.layers, depth)[1]
        distance = read(last.tensor, self.head)[..., 0].sum()
        (gradient,) = torch.autograd.grad(distance, points, create_graph=True)
        return Evaluation(read(shape.tensor, self.mask), values, gradient)


def loss(found: Evaluation) -> Tensor:
    eikonal = (found.gradient.norm(dim=-1) - 1).square().mean()
    return eikonal + 3 * found.values.sin().mean() + (found.mask * found.mask.detach().cos()).mean()


def compare(ours: Evaluation, plain: Evaluation, case: Case) -> tuple[dict[str, float], float]:
    """Largest error of each value by its largest number, and the worst relative error of a gradient."""
    values = {
        name: float((getattr(ours, name) - value).detach().abs().max() / value.detach().abs().max())
        for name, value in vars(plain).items()
    }
    pairs = zip(*(torch.autograd.grad(loss(x), case.leaves) for x in (ours, plain)), strict=True)
    return values, max(float((a - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("layers, depth", [(2, 1), (4, 2), (5, 3)])
@pytest.mark.parametrize("chunk", [None, 1, 5, 11])
def test_equals_autograd(layers: int, depth: int, chunk: int | None) -> None:
    case = Case(layers)
    ours = evaluate(case.points, case.layers, case.mask, case.head, Plan(depth, chunk=chunk))
    assert ours.mask.shape == (SCENES, REGIONS, POINTS, 1) and ours.values.shape == (SCENES, REGIONS, POINTS, 4)
    values, gradient = compare(ours, case.plain(depth), case)
    assert max(values.values()) < 1e-12 and gradient < 1e-11


def test_what_a_loss_does_not_use_is_nothing() -> None:
    case = Case()
    found = evaluate(case.points, case.layers, case.mask, case.head, Plan(2, chunk=4))
    mask, head, *_ = torch.autograd.grad(found.values[..., 1].sum(), case.leaves)
    assert not mask.any() and head[:, 1].any() and not head[:, [0, 2, 3]].any()


def test_half_operands_are_as_exact_as_they_should_be() -> None:
    case = Case(4, torch.float32)
    ours = evaluate(case.points, case.layers, case.mask, case.head, Plan(2, chunk=4, half=True))
    assert ours.values.dtype == ours.gradient.dtype == torch.float32
    values, gradient = compare(ours, case.plain(2), case)
    assert 1e-5 < max(values.values()) < 0.02 and 1e-4 < gradient < 0.05


def test_fused_passes_are_the_same_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler is given the four functions as they stand; what it makes of them is its own affair."""
    given: list[Callable[..., Any]] = []

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        given.append(function)
        return function

    monkeypatch.setattr(passes, "_compiled", compiled)
    case = Case()
    fused = evaluate(case.points, case.layers, case.mask, case.head, Plan(2, fused=True))
    torch.autograd.grad(loss(fused), case.leaves)
    assert set(given) == {passes.sine, passes.cosine_times, passes.turn, passes.straight}
    given.clear()
    torch.autograd.grad(loss(evaluate(case.points, case.layers, case.mask, case.head, Plan(2))), case.leaves)
    assert not given


def test_what_does_not_fit_is_refused() -> None:
    case = Case()
    with pytest.raises(ValueError, match="may not require derivatives"):
        evaluate(case.points.requires_grad_(), case.layers, case.mask, case.head, Plan(2))
    with pytest.raises(ValueError, match="behind layer 1 to 3, got 4"):
        evaluate(case.points.detach(), case.layers, case.mask, case.head, Plan(4))


def test_memory_kept_is_one_tensor_a_layer_but_the_first() -> None:
    case, kept = Case(5), {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        evaluate(case.points, case.layers, case.mask, case.head, Plan(3, chunk=4))
    own = {x.untyped_storage().data_ptr() for x in (case.points, *case.leaves)}
    assert sum(size for place, size in kept.items() if place not in own) == 4 * SCENES * REGIONS * POINTS * WIDTH * 8


# ---------------------------------------------------------------- the field that uses them


def bound(precision: str = "fp32", features: bool = False, width: int = 32) -> Any:
    field = CNerfField(CNerfFieldConfig(9, 3, width, 16))
    field.reset_parameters(torch.Generator().manual_seed(0))
    field.precision = precision  # type: ignore[assignment]
    source = torch.Generator().manual_seed(1)
    styles = torch.randn(2, 9, 5, 16, generator=source)
    points = 0.08 * torch.randn(2, 6, 8, 3, generator=source)
    directions = torch.nn.functional.normalize(torch.randn(2, 6, 3, generator=source), dim=-1)
    return field.bind(styles, features=features), points, directions


def test_the_field_says_the_same_with_and_without_its_gradient() -> None:
    net, points, directions = bound()
    alone = net(points, directions)
    output, gradient = net.with_gradient(points, directions)
    for name in ("sigma", "rgb", "semantics", "sdf"):
        torch.testing.assert_close(getattr(output, name), getattr(alone, name), rtol=1e-5, atol=1e-6)
    # with features, or derivatives by the points, layers are run one by one: the same gradient
    longer, _, _ = bound(features=True)
    for other in (
        longer.with_gradient(points, directions)[1],
        net.with_gradient(points.requires_grad_(), directions)[1],
    ):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kept", [None, (1, 4)])
def test_features_of_pictures_are_those_of_training(kept: tuple[int, ...] | None) -> None:
    """Without derivatives all regions go through one product."""
    net, points, directions = bound(features=True)
    net = replace(net, subset=None if kept is None else Subset(kept))
    slowly = net(points, directions).features.detach()
    with torch.no_grad():
        at_once = net(points, directions).features
    assert at_once.shape == (2, 6, 8, 32) and not at_once.equal(slowly)
    torch.testing.assert_close(at_once, slowly, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", [False, True])
@torch.no_grad()
def test_half_precision_of_pictures(features: bool) -> None:
    """Distances of a fresh field of full width are off by less than half a percent of their spread."""
    (exact, points, directions), (half, _, _) = bound(width=128, features=features), bound("fp16", features, 128)
    a, b = exact(points, directions), half(points, directions)
    assert not a.sdf.equal(b.sdf)
    assert float((a.sdf - b.sdf).abs().max()) < 0.005 * float(a.sdf.std())
    assert float((a.rgb - b.rgb).abs().max()) < 2e-3
    if features:
        assert float((a.features - b.features).norm() / a.features.norm()) < 5e-3
    else:
        gradient, other = (net.with_gradient(points, directions) for net in (exact, half))
        torch.testing.assert_close(other[0].sdf, b.sdf, rtol=1e-5, atol=1e-6)  # training renders what pictures show
        assert float((gradient[1] - other[1]).norm() / gradient[1].norm()) < 5e-3


def test_settings_reach_the_field() -> None:
    small = ["model.width=8", "model.style_dim=8", "model.depth=1"]
    for more, wanted in (([], ("fp32", False)), (["render.precision=fp16", "render.fused=true"], ("fp16", True))):
        net = Cnerf().build_generator(from_dict(CnerfConfig, {}, [*small, *more]).at(0)).field_net
        assert (net.precision, net.fused) == wanted


def test_half_precision_trains_alike() -> None:
    def gradients(precision: str) -> list[Tensor]:
        net, points, directions = bound(precision, width=64)
        output, slope = net.with_gradient(points, directions)
        total = (slope.norm(dim=-1) - 1).square().mean() + output.rgb.square().mean() + output.sigma.mean()
        wanted = [p for name, p in net.net.regions.named_parameters() if "feature.bias" not in name]
        return list(torch.autograd.grad(total, wanted))

    for exact, half in zip(gradients("fp32"), gradients("fp16"), strict=True):
        assert exact.norm() == 0 or float((exact - half).norm() / exact.norm()) < 0.02


def test_the_gradient_of_a_field_is_that_of_its_layers() -> None:
    net, points, directions = bound()
    gradient = net.with_gradient(points, directions)[1]
    scaled = points.flatten(1, 2) / 0.12
    arguments = run_layers(scaled, net.layers, 3, keep=True)[2]
    slope = distance_gradient(arguments, net.layers, net.net.regions.sdf.weight)
    arguments = run_layers(scaled, net.base, 5, keep=True)[2]
    slope = (slope + distance_gradient(arguments, net.base, net.net.base.sdf.weight)) / 0.12
    torch.testing.assert_close(gradient, slope.unflatten(1, (6, 8)), rtol=1e-4, atol=1e-4)
