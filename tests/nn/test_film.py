# SPDX-License-Identifier: Apache-2.0
"""FiLM-SIREN layers: folded modulation, gradients pulled back, the lean backward, groups, initial values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from facelab.nn import film


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(inputs: int = 5, groups: int | None = None, first: bool = False) -> film.FilmSine:
    made = film.FilmSine(inputs, 4, 6, groups, first=first).double()
    made.reset_parameters(torch.Generator().manual_seed(3))
    return made


def test_layer_is_the_formula_written_down() -> None:
    made, x, style = layer(), random(2, 7, 5), random(2, 6, seed=1)
    frequency = 15 * (style @ made.frequency.weight.T + made.frequency.bias) + 30
    phase = 0.25 * (style @ made.phase.weight.T + made.phase.bias)
    expected = torch.sin(frequency[:, None] * (x @ made.weight.T + made.bias) + phase[:, None])
    ready = made.modulate(style)
    torch.testing.assert_close(torch.sin(film.affine(x, ready.weight, ready.bias)), expected)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("points", [(3,), (1, 3)])
def test_lean_backward_is_exact_to_the_second_order(lead: tuple[int, ...], points: tuple[int, ...]) -> None:
    a = random(*(lead or (2,)), *points, 4).requires_grad_()
    weight, bias = random(*lead, 2, 4, seed=1).requires_grad_(), random(*lead, 2, seed=2).requires_grad_()
    torch.testing.assert_close(film.sine_affine(a, weight, bias), film.sine_affine_plain(a, weight, bias))
    assert torch.autograd.gradcheck(film.sine_affine, (a, weight, bias))
    assert torch.autograd.gradgradcheck(film.sine_affine, (a, weight, bias))
    upper, down = random(*a.shape, seed=3).requires_grad_(), random(*lead, 4, 2, seed=4).requires_grad_()
    torch.testing.assert_close(film.cosine_back(a, upper, down), film.cosine_back_plain(a, upper, down))
    assert torch.autograd.gradcheck(film.cosine_back, (a, upper, down))
    assert torch.autograd.gradgradcheck(film.cosine_back, (a, upper, down))


def kept_bytes(function, *tensors: Tensor) -> int:
    """What the graph of a call holds on to."""
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = function(*tensors)
    assert kept.requires_grad
    return sum(sizes.values())


def test_lean_backward_keeps_only_its_inputs() -> None:
    a, weight, bias = random(1, 200, 8).requires_grad_(), random(8, 8, seed=1).requires_grad_(), random(8, seed=2)
    own = 8 * (a.numel() + weight.numel() + bias.numel())
    assert kept_bytes(film.sine_affine, a, weight, bias) == own
    assert kept_bytes(film.sine_affine_plain, a, weight, bias) > 1.8 * own
    upper = random(1, 200, 8, seed=3).requires_grad_()
    own = 8 * (2 * a.numel() + weight.numel())
    assert kept_bytes(film.cosine_back, a, upper, weight) == own
    assert kept_bytes(film.cosine_back_plain, a, upper, weight) > 1.8 * own


@pytest.mark.parametrize("groups", [None, 2])
def test_pulled_back_gradient_is_that_of_autograd(groups: int | None) -> None:
    first, second = layer(3, groups, first=True), layer(4, groups)
    style = random(2, 6, seed=1) if groups is None else random(2, groups, 6, seed=1)
    layers = [first.modulate(style), second.modulate(style)]
    points = random(*style.shape[:-1], 7, 3, seed=4, scale=0.3).requires_grad_()
    head = random(4, seed=5)
    a = film.affine(points, layers[0].weight, layers[0].bias)
    b = film.sine_affine(a, layers[1].weight, layers[1].bias)
    (expected,) = torch.autograd.grad((torch.sin(b) @ head).sum(), points, create_graph=True)
    pulled = film.pull_back([a, b], layers, head)
    torch.testing.assert_close(pulled, expected)
    parameters = [*first.parameters(), *second.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(pulled.square().sum(), parameters, retain_graph=True, allow_unused=True),
        torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_groups_are_layers_side_by_side() -> None:
    made, style, x = layer(groups=3), random(2, 3, 6, seed=1), random(2, 3, 7, 5)
    ready = made.modulate(style)
    together = film.affine(x, ready.weight, ready.bias)
    for group in range(3):
        alone = layer()
        alone.load_state_dict({key: value[group] for key, value in made.state_dict().items()})
        single = alone.modulate(style[:, group])
        torch.testing.assert_close(together[:, group], film.affine(x[:, group], single.weight, single.bias))
    head = film.StackedLinear(5, 2, "freq", 3).double()
    head.reset_parameters(torch.Generator().manual_seed(5))
    of_scenes = head.of_scenes(2)
    expected = torch.stack([x[:, g] @ head.weight[g].T + head.bias[g] for g in range(3)], dim=1)
    torch.testing.assert_close(film.affine(x, of_scenes.weight, of_scenes.bias), expected)


def test_one_scene_for_several_cameras() -> None:
    ready = layer().modulate(random(1, 6))
    assert ready.expand(3).weight.shape == (3, 4, 5) and ready.expand(1) is ready
    with pytest.raises(ValueError, match="2 scenes cannot be seen from 3 cameras"):
        layer().modulate(random(2, 6)).expand(3)


def test_initial_values_have_the_spread_of_their_rules() -> None:
    source = torch.Generator().manual_seed(0)
    normal, freq = film.StackedLinear(400, 300, "normal"), film.StackedLinear(400, 300, "freq", 2)
    normal.reset_parameters(source)
    freq.reset_parameters(source)
    kaiming = math.sqrt(2 / 1.04 / 400)
    assert normal.weight.std().item() == pytest.approx(0.25 * kaiming, rel=0.02)
    bound = math.sqrt(6 / 400) / 25
    assert 0.99 * bound < freq.weight.abs().max().item() <= bound
    assert freq.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert 0.95 / 20 < freq.bias.abs().max().item() <= 1 / 20
    assert not torch.equal(freq.weight[0], freq.weight[1])
    first = film.FilmSine(3, 500, 8, first=True)
    first.reset_parameters(source)
    assert 0.99 / 3 < first.weight.abs().max().item() <= 1 / 3
    mapping = film.StyleMapping(400, 400)
    mapping.reset_parameters(source)
    assert mapping.linears[2].weight.std().item() == pytest.approx(kaiming, rel=0.02)


def test_mapping_has_no_gain_and_no_normalisation() -> None:
    mapping = film.StyleMapping(2, 2, layers=1)
    with torch.no_grad():
        mapping.linears[0].weight.copy_(torch.eye(2))
    assert mapping(torch.tensor([[3.0, -5.0]])).tolist() == [[3.0, -1.0]]
