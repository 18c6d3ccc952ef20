# SPDX-License-Identifier: Apache-2.0
"""EG3D's discriminator beyond its golden case: groups and chunks, freezing, half precision, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from facelab.bases.eg3d.convert_discriminator import discriminator_from_original, discriminator_to_original
from facelab.errors import UserError
from facelab.nn.discriminators.stylegan2 import StyleGan2Discriminator, StyleGan2DiscriminatorConfig, minibatch_std
from facelab.nn.stylegan2.precision import Precision

SMALL = {"resolution": 16, "channel_base": 128, "channel_max": 8, "group_size": 2}


def small(**changes) -> StyleGan2Discriminator:
    config = StyleGan2DiscriminatorConfig(**{**SMALL, **changes})
    return StyleGan2Discriminator(config, torch.Generator().manual_seed(1))


def inputs(count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(2)
    shapes = ((count, 3, 16, 16), (count, 3, 8, 8), (count, 25))
    image, raw, label = (torch.randn(shape, generator=source) for shape in shapes)
    return image, raw, label


def test_chunks_of_whole_groups_equal_the_batch() -> None:
    """Contiguous groups: yes. The original's strided groups: no."""
    image, raw, label = inputs()

    def gap(**changes) -> float:
        model = small(**changes)
        whole = model(image, raw, label)
        parts = torch.cat([model(image[i : i + 2], raw[i : i + 2], label[i : i + 2]) for i in (0, 2)])
        return ((whole - parts).abs().max() / whole.std()).item()

    assert gap() < 1e-4 < 1e-3 < gap(grouping="strided")


def test_group_of_one_judges_every_sample_alone() -> None:
    image, raw, label = inputs()
    model = small(group_size=1)
    torch.testing.assert_close(model(image, raw, label)[:1], model(image[:1], raw[:1], label[:1]))


def test_statistic_by_hand() -> None:
    x = torch.tensor([0.0, 2.0, 5.0, 5.0])[:, None, None, None].expand(4, 1, 2, 2)
    assert minibatch_std(x, 2)[:, 1, 0, 0].tolist() == pytest.approx([1, 1, 1e-4, 1e-4], rel=1e-4)
    strided = minibatch_std(x, 2, grouping="strided")[:, 1, 0, 0]
    assert strided.tolist() == pytest.approx([2.5, 1.5, 2.5, 1.5])


def test_second_derivatives_reach_every_weight() -> None:
    """R1 by autograd against a finite difference of the gradient norm along one weight."""
    image, raw, label = inputs()
    model = small().double()
    image, raw, label = image.double().requires_grad_(), raw.double().requires_grad_(), label.double()

    def penalty() -> Tensor:
        grads = torch.autograd.grad(model(image, raw, label).sum(), [image, raw], create_graph=True)
        return torch.stack([g.square().sum() for g in grads]).sum()

    weight = model.blocks["16"].conv0.weight
    (analytic,) = torch.autograd.grad(penalty(), weight)
    place, step = (0, 0, 1, 1), 1e-6
    with torch.no_grad():
        weight[place] += step
    above = penalty()
    with torch.no_grad():
        weight[place] -= 2 * step
    numeric = (above - penalty()) / (2 * step)
    torch.testing.assert_close(analytic[place], numeric, rtol=1e-4, atol=1e-12)


def test_frozen_layers_are_the_first_ones() -> None:
    model = small(freeze_layers=4)
    frozen = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"blocks.16.fromrgb", "blocks.16.conv0", "blocks.16.conv1", "blocks.16.skip"}


@pytest.mark.parametrize("architecture", ["resnet", "skip", "orig"])
def test_layers_that_can_be_frozen_are_those_of_the_blocks(architecture: str) -> None:
    count = small(architecture=architecture).config.freezable
    for freeze, left in ((count - 1, True), (count, False)):
        model = small(architecture=architecture, freeze_layers=freeze)
        assert any(p.requires_grad for p in model.blocks.parameters()) == left


def test_half_precision_blocks_stay_close() -> None:
    """Forced on the CPU; the epilogue and the logits are full precision."""
    image, raw, label = inputs()
    model = small(half_blocks=1)
    full = model(image, raw, label)
    model.precision = Precision(torch.bfloat16, on_cpu=True)
    lowered = model(image, raw, label)
    assert lowered.dtype == torch.float32 and not lowered.equal(full)
    torch.testing.assert_close(lowered, full, rtol=0.05, atol=0.05 * full.std().item())


def test_names_go_both_ways_and_unknown_ones_are_refused() -> None:
    state = small().state_dict()
    original = discriminator_to_original(state)
    assert {"b16.fromrgb.weight", "b4.out.bias", "mapping.fc7.weight", "mapping.embed.bias"} <= set(original)
    back = discriminator_from_original({**original, "b16.skip.resample_filter": torch.zeros(4, 4)}, state)
    assert back.keys() == state.keys() and all(back[k].equal(state[k]) for k in state)
    with pytest.raises(UserError, match="c16"):
        discriminator_from_original({**original, "c16.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 8, 8), None, None), r"expected \(N, 3, 16, 16\)"),
        ((torch.zeros(2, 3, 16, 16), None, torch.zeros(2, 25)), "raw is missing"),
        ((torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 8, 8), None), "with their camera"),
        ((torch.zeros(3, 3, 16, 16), torch.zeros(3, 3, 8, 8), torch.zeros(3, 25)), "3 samples in groups of 2"),
    ],
)
def test_wrong_inputs_are_refused(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small()(*arguments)


@pytest.mark.parametrize(
    "changes", [{"resolution": 20}, {"architecture": "resent"}, {"grouping": "x"}, {"group_size": 0}]
)
def test_wrong_configurations_are_refused(changes) -> None:
    with pytest.raises(ValueError):
        StyleGan2DiscriminatorConfig(**{**SMALL, **changes})
