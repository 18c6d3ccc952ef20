# SPDX-License-Identifier: Apache-2.0
"""The decoder behind a volume renderer, beyond its golden cases: which code goes where, noise, derivatives, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.draws import Draws, TapeDraws
from facelab.nn.skip_decoder import SkipDecoder, SkipDecoderConfig, decoder_channels
from facelab.nn.stylegan2.precision import Precision

TINY = {"size": 16, "in_resolution": 4, "in_channels": 3, "style_dim": 4, "channel_max": 4}


def tiny(**changes) -> SkipDecoder:
    return SkipDecoder(SkipDecoderConfig(**{**TINY, **changes}), torch.Generator().manual_seed(1))


def inputs(model: SkipDecoder, count: int = 2) -> tuple[Tensor, Tensor, Tensor | None]:
    source, c = torch.Generator().manual_seed(2), model.config
    features = torch.randn(count, c.in_channels, c.in_resolution, c.in_resolution, generator=source)
    ws = torch.randn(count, c.num_ws, c.width, generator=source)
    labels = torch.rand(count, c.semantic_channels, c.in_resolution, c.in_resolution, generator=source)
    return features, ws, labels if c.semantic_channels else None


@pytest.mark.parametrize(("multiplier", "expected"), [(1, 256), (2, 512), (4, 1024)])
def test_channels_follow_the_published_table(multiplier: int, expected: int) -> None:
    assert decoder_channels(32, multiplier) == 512
    assert decoder_channels(64, multiplier) == expected
    assert decoder_channels(1024, multiplier) == 16 * multiplier


def test_each_code_reaches_its_layers() -> None:
    """By finite influence: code i of L changes what conv i draws, heads share the code of the next convolution."""
    model = tiny()
    features, ws, _ = inputs(model, 1)
    assert model.num_ws == 6
    seen: dict[str, list[int]] = {}
    layers = {n: m for n, m in model.named_modules() if n.endswith((".conv0", ".conv1", ".to_rgb"))}
    for name, layer in layers.items():
        recorded: list[Tensor] = []
        hook = layer.affine.register_forward_pre_hook(lambda _, args, r=recorded: r.append(args[0].clone()))
        model(features, ws)
        hook.remove()
        seen[name] = [i for i in range(model.num_ws) if torch.equal(recorded[0], ws[:, i])]
    assert seen == {
        "blocks.0.conv1": [0], "blocks.0.to_rgb": [1],
        "blocks.1.conv0": [1], "blocks.1.conv1": [2], "blocks.1.to_rgb": [3],
        "blocks.2.conv0": [3], "blocks.2.conv1": [4], "blocks.2.to_rgb": [5],
    }  # fmt: skip


def test_one_layer_against_the_formula() -> None:
    """A plain layer by hand: scale the weight, modulate, demodulate, convolve, noise, bias, leaky ReLU times sqrt 2."""
    model = tiny(size=4).double()
    features, ws, _ = (None if x is None else x.double() for x in inputs(model, 1))
    layer = model.blocks[0].conv1
    with torch.no_grad():
        layer.noise_strength.fill_(0.7)
        layer.bias.copy_(torch.arange(4.0))
        layer.affine.bias.mul_(1e-4)  # small styles, where the 1e-8 of the demodulation counts
        layer.affine.weight.mul_(1e-4)
    style = ws[:, 0] @ layer.affine.weight.t() / math.sqrt(ws.shape[-1]) + layer.affine.bias
    w = layer.weight / math.sqrt(layer.weight[0].numel()) * style[0][None, :, None, None]
    w = w * (w.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).rsqrt()
    x = F.conv2d(features, w, padding=1) + 0.7 * layer.stored_noise() + layer.bias[:, None, None]
    expected = F.leaky_relu(x, 0.2) * math.sqrt(2)
    torch.testing.assert_close(layer(features, ws[:, 0], layer.stored_noise()), expected)


def test_style_mixing_exchanges_the_later_layers() -> None:
    model = tiny()
    first, second = torch.zeros(1, 8), torch.ones(1, 8)
    assert model.broadcast(first, second, 2)[0, :, 0].tolist() == [0, 0, 1, 1, 1, 1]
    for inject in (0, 6, None):
        with pytest.raises(ValueError, match="style mixing"):
            model.broadcast(first, second, inject)


def test_noise_is_stored_drawn_given_or_left_out() -> None:
    model = tiny()
    with torch.no_grad():
        for block in model.blocks:
            block.conv1.noise_strength.fill_(1.0)
    features, ws, _ = inputs(model)

    def rgb(**options) -> Tensor:
        return model(features, ws, **options).rgb

    assert torch.equal(rgb(), rgb())
    assert torch.equal(rgb(noise_mode="random", draws=Draws(3)), rgb(noise_mode="random", draws=Draws(3)))
    assert not torch.equal(rgb(noise_mode="random", draws=Draws(3)), rgb(noise_mode="random", draws=Draws(4)))
    sides = [(0, "conv1", 4), (1, "conv0", 8), (1, "conv1", 8), (2, "conv0", 16), (2, "conv1", 16)]
    tape = {f"noise/blocks.{i}.{name}": torch.zeros(2, 1, side, side) for i, name, side in sides}
    torch.testing.assert_close(rgb(noise_mode="random", draws=TapeDraws(tape=tape)), rgb(noise_mode="none"))
    with pytest.raises(ValueError, match="needs draws"):
        rgb(noise_mode="random")


def test_semantics_start_from_the_rendered_ones_and_the_picture_does_not() -> None:
    model = tiny(semantic_channels=5)
    features, ws, labels = inputs(model)
    before, after = model(features, ws, labels), model(features, ws, labels + 1)
    assert torch.equal(before.rgb, after.rgb)
    assert before.semantics.shape == (2, 5, 16, 16)
    inner = (after.semantics - before.semantics)[..., 4:-4, 4:-4]
    torch.testing.assert_close(inner, torch.ones_like(inner))  # upsampling keeps a constant, away from the border


def test_codes_have_second_derivatives() -> None:
    model = tiny(size=8, semantic_channels=2).double().train()
    features, ws, labels = (x.double() for x in inputs(model, 1))

    def drawn(ws: Tensor, features: Tensor) -> Tensor:
        out = model(features, ws, labels)
        return torch.cat([out.rgb.flatten(), out.semantics.flatten()])[::17]

    ws.requires_grad_(), features.requires_grad_()
    assert torch.autograd.gradcheck(drawn, (ws, features), atol=1e-6)
    assert torch.autograd.gradgradcheck(drawn, (ws, features), atol=1e-5)


def test_fused_and_plain_modulation_agree() -> None:
    model = tiny(half_blocks=1)
    features, ws, _ = inputs(model)
    torch.testing.assert_close(model.train()(features, ws).rgb, model.eval()(features, ws).rgb, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
def test_half_precision_is_close_and_leaves_the_sum_whole(channels_last: bool) -> None:
    model = tiny(half_blocks=1, clamp=256.0).eval()
    features, ws, _ = inputs(model)
    whole = model(features, ws).rgb
    model.precision = Precision(torch.bfloat16, on_cpu=True, channels_last=channels_last)
    low = model(features, ws).rgb
    assert low.dtype == torch.float32
    assert 0 < (low - whole).abs().max() < 0.05 * whole.abs().max()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 12}, "power of two"),
        ({"size": 4, "in_resolution": 8}, "at least in_resolution"),
        ({"in_channels": 0}, "at least 1"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny(**changes)


def test_other_inputs_are_refused() -> None:
    model = tiny(semantic_channels=2)
    features, ws, labels = inputs(model)
    with pytest.raises(ValueError, match="semantics: expected"):
        model(features, ws)
    with pytest.raises(ValueError, match="features: expected"):
        model(features[:, :2], ws, labels)
    with pytest.raises(ValueError, match="ws: expected"):
        model(features, ws[:, :3], labels)
    with pytest.raises(ValueError, match="code: expected"):
        model.style(ws[:, 0])
