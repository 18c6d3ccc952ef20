# SPDX-License-Identifier: Apache-2.0
"""FiLM-SIREN layers: folded modulation, pushed-forward derivatives, the lean backward, groups, initial values."""

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
    torch.testing.assert_close(film.sine(film.affine(x[:, None], ready.weight, ready.bias))[:, 0], expected)


@pytest.mark.parametrize("tangents", [1, 4])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_lean_backward_is_exact_to_the_second_order(tangents: int, lead: tuple[int, ...]) -> None:
    a = random(*(lead or (2,)), tangents, 3, 4).requires_grad_()
    weight, bias = random(*lead, 2, 4, seed=1).requires_grad_(), random(*lead, 2, seed=2).requires_grad_()
    torch.testing.assert_close(film.sine_affine(a, weight, bias), film.sine_affine_plain(a, weight, bias))
    assert torch.autograd.gradcheck(film.sine_affine, (a, weight, bias))
    assert torch.autograd.gradgradcheck(film.sine_affine, (a, weight, bias))


def test_lean_backward_keeps_only_its_input() -> None:
    a, weight, bias = random(1, 4, 50, 8).requires_grad_(), random(8, 8, seed=1).requires_grad_(), random(8, seed=2)

    def kept(function) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            function(a, weight, bias)
        return sum(sizes.values())

    own = a.numel() * 8 + weight.numel() * 8 + bias.numel() * 8
    assert kept(film.sine_affine) == own
    assert kept(film.sine_affine_plain) > 2 * own


def test_tangents_are_the_derivatives_of_a_chain_of_layers() -> None:
    first, second, style = layer(3, first=True), layer(4), random(2, 6, seed=1)
    one, two = first.modulate(style), second.modulate(style)
    points = random(2, 6, 3, seed=4, scale=0.3).requires_grad_()

    def chain(x: Tensor) -> Tensor:
        return film.sine_affine(film.affine(x, one.weight, one.bias), two.weight, two.bias)

    scale = 2.5
    pushed = chain(film.point_tangents(points, scale))
    plain = chain(scale * points[:, None])[:, 0]
    torch.testing.assert_close(pushed[:, 0], plain)
    for channel in range(plain.shape[-1]):
        (expected,) = torch.autograd.grad(plain[..., channel].sum(), points, retain_graph=True)
        torch.testing.assert_close(pushed[:, 1:, :, channel].movedim(1, -1), expected)


@pytest.mark.parametrize("tangents", [1, 4])
def test_groups_are_layers_side_by_side(tangents: int) -> None:
    made, style, x = layer(groups=3), random(2, 3, 6, seed=1), random(2, 3, tangents, 7, 5)
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
    expected = torch.stack([x[:, g] @ head.weight[g].T for g in range(3)], dim=1)
    expected[:, :, 0] += head.bias[:, None]
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
