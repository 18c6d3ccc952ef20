# SPDX-License-Identifier: Apache-2.0
"""StyleGAN2's networks: gradients, noise, truncation, number types, memory order, batches, state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from facelab.draws import Draws, TapeDraws
from facelab.nn.stylegan2 import (
    FULL,
    EqualizedConv2d,
    FullyConnected,
    MappingNetwork,
    Precision,
    StyleGAN2Generator,
    SynthesisBlock,
    SynthesisLayer,
    SynthesisNetwork,
    ToRGB,
    const_noise,
    draw_noise,
    noise_layers,
)

W_DIM = 6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def network(resolution: int = 16, channels: int = 5, **options: Any) -> SynthesisNetwork:
    """A small network whose noise and biases are not zero, so that they count."""
    made = SynthesisNetwork(W_DIM, resolution, channels, channel_base=128, channel_max=8, **options)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.3)
            elif name.endswith("bias"):
                parameter.add_(0.1 * normal(*parameter.shape))
    return made.eval()


# ---------------------------------------------------------------- layers


def test_fully_connected_scales_weight_and_bias_when_used() -> None:
    layer = FullyConnected(16, 3, lr_multiplier=0.01, bias_init=2.0)
    layer.reset_parameters(seeded())
    x = normal(4, 16)
    expected = x @ layer.weight.T * (0.01 / 4) + 0.02
    torch.testing.assert_close(layer(x), expected)
    assert layer.weight.std().item() == pytest.approx(100, rel=0.3)


def test_convolution_keeps_the_scale_of_its_input() -> None:
    layer = EqualizedConv2d(64, 64, 3, activation="lrelu")
    layer.reset_parameters(seeded())
    x = normal(2, 64, 16, 16)
    inner = layer(x)[:, :, 1:-1, 1:-1]
    assert inner.square().mean().sqrt().item() == pytest.approx(1.0, rel=0.1)
    torch.testing.assert_close(layer(x, gain=0.5), 0.5 * layer(x))


def test_clamp_follows_the_gain() -> None:
    layer = EqualizedConv2d(4, 4, 3, clamp=0.5)
    layer.reset_parameters(seeded())
    x = 10 * normal(1, 4, 8, 8)
    assert layer(x).abs().max() == 0.5
    assert layer(x, gain=0.5).abs().max() == 0.25


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_a_synthesis_layer(up: int, fused: bool) -> None:
    layer = SynthesisLayer(2, 3, 4, 4 * up, up=up).double()
    layer.reset_parameters(seeded())
    with torch.no_grad():
        assert layer.noise_strength is not None
        layer.noise_strength.fill_(0.2)
    x = normal(2, 2, 4, 4, dtype=torch.float64).requires_grad_()
    w = normal(2, 4, seed=2, dtype=torch.float64).requires_grad_()
    noise = normal(2, 1, 4 * up, 4 * up, seed=3, dtype=torch.float64).requires_grad_()

    def run(x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        return layer(x, w, noise, fused=fused)

    assert gradcheck(run, (x, w, noise))
    assert gradgradcheck(run, (x, w, noise), fast_mode=True)


def test_gradients_of_rgb() -> None:
    layer = ToRGB(3, 2, 4).double()
    layer.reset_parameters(seeded())
    x = normal(2, 3, 3, 3, dtype=torch.float64).requires_grad_()
    w = normal(2, 4, seed=2, dtype=torch.float64).requires_grad_()
    assert gradcheck(layer, (x, w)) and gradgradcheck(layer, (x, w))


def test_demodulation_keeps_unit_variance_whatever_the_style() -> None:
    layer = SynthesisLayer(32, 32, 4, 16, activation="linear", use_noise=False)
    layer.reset_parameters(seeded())
    x = normal(1, 32, 16, 16)
    w = normal(1, 4)
    small, large = layer(x, w)[..., 1:-1, 1:-1], layer(x, 50 * w)[..., 1:-1, 1:-1]
    assert small.std().item() == pytest.approx(1, rel=0.2) and large.std().item() == pytest.approx(1, rel=0.3)


# ---------------------------------------------------------------- mapping


def test_mapping_ignores_the_length_of_code_and_label() -> None:
    mapping = MappingNetwork(8, 3, W_DIM, 4)
    z, c = normal(5, 8), normal(5, 3, seed=2)
    torch.testing.assert_close(mapping(z, c), mapping(7 * z, 0.5 * c), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mapping(z, c), mapping(z, -c))
    ws = mapping(z, c)
    assert ws.shape == (5, 4, W_DIM)
    assert torch.equal(ws[:, 0], ws[:, 3]) and torch.equal(ws[:, 0], mapping.style(z, c))


def test_average_moves_only_when_told() -> None:
    mapping = MappingNetwork(8, 0, W_DIM, 4, w_avg_beta=0.9)
    mapping.train()
    w = mapping(normal(16, 8))
    assert mapping.w_avg is not None and torch.equal(mapping.w_avg, torch.zeros(W_DIM))
    mapping.update_w_avg(w)
    torch.testing.assert_close(mapping.w_avg, 0.1 * w[:, 0].mean(0).detach())
    mapping.update_w_avg(w[:, 0])
    torch.testing.assert_close(mapping.w_avg, 0.19 * w[:, 0].mean(0).detach())
    assert not mapping.w_avg.requires_grad


def test_truncation() -> None:
    mapping = MappingNetwork(8, 0, W_DIM, 5)
    mapping.update_w_avg(1000 * normal(1, W_DIM, seed=5))
    assert mapping.w_avg is not None
    z = normal(3, 8)
    ws = mapping(z)
    assert torch.equal(mapping(z, truncation_psi=1), ws)
    torch.testing.assert_close(mapping(z, truncation_psi=0.0), mapping.w_avg.expand(3, 5, W_DIM))
    torch.testing.assert_close(mapping(z, truncation_psi=0.25), mapping.w_avg + 0.25 * (ws - mapping.w_avg))
    cut = mapping(z, truncation_psi=0.25, truncation_cutoff=2)
    assert torch.equal(cut[:, 2:], ws[:, 2:])
    torch.testing.assert_close(cut[:, :2], mapping(z, truncation_psi=0.25)[:, :2])


def test_mapping_of_a_label_alone_and_own_widths() -> None:
    mapping = MappingNetwork(0, 3, 10, None, num_layers=3, embed_features=4, layer_features=7, w_avg_beta=None)
    assert [tuple(layer.weight.shape) for layer in mapping.layers] == [(7, 4), (7, 7), (10, 7)]
    assert mapping(None, normal(2, 3)).shape == (2, 10)
    assert "w_avg" not in mapping.state_dict()
    with pytest.raises(ValueError, match="keeps no average"):
        mapping.update_w_avg(normal(2, 10))
    with pytest.raises(ValueError, match="not truncated"):
        mapping(None, normal(2, 3), truncation_psi=0.7)


def test_mapping_says_what_it_expects() -> None:
    with pytest.raises(ValueError, match="z_dim > 0 or c_dim > 0"):
        MappingNetwork(0, 0, 4, 2)
    mapping = MappingNetwork(8, 3, W_DIM, 4)
    with pytest.raises(ValueError, match=r"c: expected shape \(N, 3\), got None"):
        mapping(normal(2, 8))
    with pytest.raises(ValueError, match=r"z: expected shape \(N, 8\), got \(2, 7\)"):
        mapping(normal(2, 7), normal(2, 3))
    with pytest.raises(ValueError, match="one label a code, got 2 and 1"):
        mapping(normal(2, 8), normal(1, 3))


# ---------------------------------------------------------------- synthesis


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_first_order_gradients_of_a_network(architecture: Any) -> None:
    made = network(8, 2, architecture=architecture).double()
    ws = normal(1, made.num_ws, W_DIM, dtype=torch.float64).requires_grad_()
    assert gradcheck(made, (ws,))


def test_each_style_code_reaches_the_layers_it_belongs_to() -> None:
    """The code after a block's convolutions serves its RGB and the first convolution of the next block."""
    made = network(16)
    assert made.num_ws == 6
    seen: dict[str, Tensor] = {}
    for name, module in made.named_modules():
        if isinstance(module, SynthesisLayer | ToRGB):
            module.register_forward_hook(lambda _, inputs, __, name=name: seen.__setitem__(name, inputs[1]))
    ws = torch.arange(6.0)[None, :, None].expand(1, 6, W_DIM)
    made(ws)
    assert {name: int(w[0, 0]) for name, w in seen.items()} == {
        "blocks.4.conv1": 0, "blocks.4.to_rgb": 1,
        "blocks.8.conv0": 1, "blocks.8.conv1": 2, "blocks.8.to_rgb": 3,
        "blocks.16.conv0": 3, "blocks.16.conv1": 4, "blocks.16.to_rgb": 5,
    }  # fmt: skip


def test_sizes_of_the_released_backbone() -> None:
    with torch.device("meta"):
        made = SynthesisNetwork(512, 256, 96, num_fp16_res=2)
    assert made.num_ws == 14
    channels = {name: block.conv1.weight.shape[0] for name, block in made.blocks.items()}
    assert channels == {"4": 512, "8": 512, "16": 512, "32": 512, "64": 512, "128": 256, "256": 128}
    assert [name for name, block in made.blocks.items() if block.use_fp16] == ["128", "256"]


def test_half_precision_is_never_marked_below_8() -> None:
    assert [name for name, block in network(16, num_fp16_res=9).blocks.items() if block.use_fp16] == ["8", "16"]


def test_noise_modes() -> None:
    made = network()
    ws = normal(2, made.num_ws, W_DIM)
    none, const = made(ws, noise_mode="none"), made(ws, noise_mode="const")
    assert not torch.allclose(none, const, atol=1e-3)
    assert torch.equal(made(ws), const), "const is the default"
    first = made(ws, noise_mode="random", draws=Draws(3))
    assert torch.equal(first, made(ws, noise_mode="random", draws=Draws(3)))
    assert not torch.allclose(first, made(ws, noise_mode="random", draws=Draws(4)), atol=1e-3)
    same_code = made(ws[:1].expand(2, -1, -1), noise_mode="random", draws=Draws(3))
    assert not torch.allclose(same_code[0], same_code[1], atol=1e-3), "each sample has its own noise"
    with pytest.raises(ValueError, match="needs draws"):
        made(ws, noise_mode="random")
    with pytest.raises(ValueError, match="'const', 'random' or 'none', got 'konst'"):
        made(ws, noise_mode="konst")  # type: ignore[arg-type]


def test_given_noise_maps_come_before_the_mode() -> None:
    made = network()
    ws = normal(2, made.num_ws, W_DIM)
    stored, drawn = const_noise(made), draw_noise(made, 2, Draws(3))
    assert list(stored) == ["blocks.4.conv1", "blocks.8.conv0", "blocks.8.conv1", "blocks.16.conv0", "blocks.16.conv1"]
    assert drawn["blocks.8.conv0"].shape == (2, 1, 8, 8)
    assert torch.equal(made(ws, noise_mode="none", noise_maps=stored), made(ws, noise_mode="const"))
    random = made(ws, noise_mode="random", draws=Draws(3))
    assert torch.equal(made(ws, noise_mode="const", noise_maps=drawn), random)
    tape = TapeDraws(tape={f"noise/{name}": value for name, value in drawn.items()})
    assert torch.equal(made(ws, noise_mode="random", draws=tape), random)
    one = {"blocks.16.conv1": torch.zeros(16, 16)}
    assert not torch.allclose(made(ws, noise_maps=one), made(ws), atol=1e-3)


def test_noise_maps_and_strengths_receive_gradients() -> None:
    made = network()
    maps = {name: value.clone().requires_grad_() for name, value in const_noise(made).items()}
    made(normal(1, made.num_ws, W_DIM), noise_maps=maps).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in maps.values())
    strengths = [layer.noise_strength for layer in noise_layers(made).values()]
    assert all(s is not None and s.grad is not None and s.grad.abs() > 0 for s in strengths)


def test_bad_noise_maps() -> None:
    made = network()
    ws = normal(2, made.num_ws, W_DIM)
    with pytest.raises(ValueError, match="no such layer. Did you mean 'blocks.8.conv0'"):
        made(ws, noise_maps={"block.8.conv0": torch.zeros(8, 8)})
    with pytest.raises(ValueError, match=r"expected shape \(8, 8\) or \(2, 1, 8, 8\), got \(3, 1, 8, 8\)"):
        made(ws, noise_maps={"blocks.8.conv0": torch.zeros(3, 1, 8, 8)})


def test_network_without_noise() -> None:
    made = network(use_noise=False)
    assert not [key for key in made.state_dict() if "noise" in key]
    ws = normal(1, made.num_ws, W_DIM)
    assert torch.equal(made(ws, noise_mode="none"), made(ws, noise_mode="random", draws=Draws(0)))
    with pytest.raises(ValueError, match="no such layer"):
        made(ws, noise_maps={"blocks.8.conv0": torch.zeros(8, 8)})


@pytest.mark.parametrize("mode", ["const", "none"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_batch_equals_its_samples(mode: Any, fused: bool) -> None:
    made = network(fused_modconv=fused)
    ws = normal(3, made.num_ws, W_DIM)
    alone = torch.cat([made(w[None], noise_mode=mode) for w in ws])
    torch.testing.assert_close(made(ws, noise_mode=mode), alone, rtol=1e-4, atol=1e-5)


def test_fused_modulation_only_rounds_differently() -> None:
    made = network(architecture="resnet", conv_clamp=256.0)
    ws = normal(2, made.num_ws, W_DIM)
    assert made.fused_modconv == "inference_only"
    evaluated, trained = made.eval()(ws), made.train()(ws)
    torch.testing.assert_close(evaluated, trained, rtol=1e-4, atol=1e-5)
    assert not torch.equal(evaluated, trained), "the two ways should not be one"


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_channels_last_changes_the_order_only(architecture: Any) -> None:
    made = network(architecture=architecture)
    seen = []
    made.blocks["16"].conv0.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    ws = normal(2, made.num_ws, W_DIM)
    plain, last = made(ws), made(ws, precision=Precision(channels_last=True))
    torch.testing.assert_close(plain, last, rtol=1e-4, atol=1e-5)
    assert seen[0].is_contiguous() and not seen[1].is_contiguous()
    assert seen[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float16, 4e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("training", [False, True])
def test_half_precision_stays_close(dtype: torch.dtype, close: float, training: bool) -> None:
    made = network(num_fp16_res=2, conv_clamp=256.0).train(training)
    kinds: dict[str, torch.dtype] = {}
    for name, block in made.blocks.items():
        block.conv1.register_forward_hook(lambda _, __, out, name=name: kinds.__setitem__(name, out.dtype))
    ws = normal(2, made.num_ws, W_DIM)
    full = made(ws)
    assert set(kinds.values()) == {torch.float32}, "a CPU computes in full precision unless told otherwise"
    for blocks, lowered in (("marked", {"8", "16"}), ("all", {"4", "8", "16"})):
        half = made(ws, precision=Precision(dtype, blocks, on_cpu=True))  # type: ignore[arg-type]
        assert {name for name, kind in kinds.items() if kind == dtype} == lowered
        assert half.dtype == torch.float32
        error = (half - full).norm() / full.norm()
        assert 0 < error < close
    assert torch.equal(made(ws, precision=FULL), full)


def test_half_precision_survives_large_styles() -> None:
    """Without the normalisation of weights and styles, the products would overflow half floats."""
    made = network(num_fp16_res=2, conv_clamp=256.0)
    ws = 3e4 * normal(1, made.num_ws, W_DIM)
    precision = Precision(on_cpu=True)
    seen: list[Tensor] = []
    made.blocks["16"].conv1.register_forward_hook(lambda _, __, out: seen.append(out))
    made(ws, precision=precision)
    made(ws)
    half, full = seen[0].float(), seen[1]
    assert half.isfinite().all() and (half - full).norm() / full.norm() < 0.02


def test_conv_clamp_limits_every_convolution() -> None:
    made = network(conv_clamp=0.4)
    out: list[Tensor] = []
    for module in made.modules():
        if isinstance(module, SynthesisLayer | ToRGB):
            module.register_forward_hook(lambda _, __, value: out.append(value))
    made(normal(1, made.num_ws, W_DIM))
    assert len(out) == 8 and all(value.abs().max() <= 0.4 for value in out)
    assert max(value.abs().max() for value in out).item() == pytest.approx(0.4)


def test_block_leaves_image_and_features_alone() -> None:
    block = SynthesisBlock(4, 6, W_DIM, 8, 3, up=1)
    block.reset_parameters(seeded())
    x, img = normal(2, 4, 8, 8), normal(2, 3, 8, 8, seed=2)
    kept = x.clone(), img.clone()
    _, added = block(x, img, normal(2, 3, W_DIM))
    assert torch.equal(x, kept[0]) and torch.equal(img, kept[1])
    assert added is not None and not torch.allclose(added, img)
    with pytest.raises(ValueError, match=r"x: expected shape \(2, 4, 8, 8\)"):
        block(normal(2, 4, 4, 4), img, normal(2, 3, W_DIM))


def test_networks_say_what_they_expect() -> None:
    with pytest.raises(ValueError, match="power of two"):
        SynthesisNetwork(4, 48, 3)
    with pytest.raises(ValueError, match="architecture: expected one of skip, resnet, orig, got 'dense'"):
        SynthesisNetwork(4, 8, 3, architecture="dense")  # type: ignore[arg-type]
    made = network()
    with pytest.raises(ValueError, match=r"ws: expected shape \(N, 6, 6\), got \(1, 5, 6\)"):
        made(normal(1, 5, W_DIM))
    with pytest.raises(ValueError, match="torch.float16 or torch.bfloat16"):
        Precision(torch.float32)


# ---------------------------------------------------------------- state


def generator(seed: int = 0, **options: Any) -> StyleGAN2Generator:
    return StyleGAN2Generator(
        8, 3, W_DIM, 16, 5,
        mapping_layers=2, channel_base=128, channel_max=8, generator=seeded(seed), **options,
    )  # fmt: skip


def test_first_weights_come_from_the_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = generator(5).state_dict()
    torch.manual_seed(2)
    same, other = generator(5).state_dict(), generator(6).state_dict()
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["synthesis.blocks.8.conv0.weight"], other["synthesis.blocks.8.conv0.weight"])
    torch.manual_seed(1)
    generator(5)(normal(1, 8), normal(1, 3), noise_mode="random", draws=Draws(0))
    assert torch.equal(before, torch.get_rng_state()), "torch's global generator was used"
    weight = one["synthesis.blocks.8.conv1.weight"]
    assert weight.mean().abs() < 0.2 and weight.std().item() == pytest.approx(1, rel=0.2)
    assert one["mapping.layers.0.weight"].std().item() == pytest.approx(100, rel=0.3)


def test_state_comes_back_and_training_goes_on_as_if_never_stopped() -> None:
    def step(made: StyleGAN2Generator, optimizer: torch.optim.Optimizer, number: int) -> None:
        z, c = normal(2, 8, seed=number), normal(2, 3, seed=number + 50)
        ws = made.mapping(z, c)
        made.mapping.update_w_avg(ws[:, 0])
        made.synthesis(ws, noise_mode="random", draws=Draws(0, step=number)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def start(seed: int) -> tuple[StyleGAN2Generator, torch.optim.Optimizer]:
        made = generator(seed).train()
        return made, torch.optim.Adam(made.parameters(), lr=1e-2, betas=(0.0, 0.99))

    straight, optimizer = start(0)
    for number in range(4):
        step(straight, optimizer, number)
    first, optimizer = start(0)
    for number in range(2):
        step(first, optimizer, number)
    second, resumed = start(9)
    second.load_state_dict(first.state_dict(), strict=True)
    resumed.load_state_dict(optimizer.state_dict())
    for number in range(2, 4):
        step(second, resumed, number)
    assert straight.state_dict().keys() == second.state_dict().keys()
    for key, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    strength = straight.get_parameter("synthesis.blocks.16.conv1.noise_strength")
    assert strength.abs() > 0, "the random noise did not train"


def test_generator_is_mapping_then_synthesis() -> None:
    made = generator().eval()
    made.mapping.update_w_avg(100 * normal(1, W_DIM))
    z, c = normal(2, 8), normal(2, 3)
    ws = made.mapping(z, c, 0.7, 3)
    assert ws.shape == (2, made.num_ws, W_DIM)
    image = made(z, c, truncation_psi=0.7, truncation_cutoff=3, noise_mode="none")
    assert torch.equal(image, made.synthesis(ws, noise_mode="none")) and image.shape == (2, 5, 16, 16)


def test_image_has_the_sum_of_the_blocks_rgb() -> None:
    """With filter gain 1 a constant stays constant, so biases of all RGB layers add up away from the border."""
    made = network(64, 1, use_noise=False)
    with torch.no_grad():
        for block in made.blocks.values():
            block.to_rgb.weight.zero_()
            block.to_rgb.bias.fill_(1.0)
    image = made(normal(1, made.num_ws, W_DIM))
    assert image[0, 0, 32, 32].item() == pytest.approx(math.log2(64) - 1, abs=1e-5)


def test_network_is_one_graph_to_the_compiler() -> None:
    made = network(8)
    ws = normal(1, made.num_ws, W_DIM)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ws), made(ws), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_mixed_precision_on_a_gpu(training: bool) -> None:
    made = network(num_fp16_res=2, conv_clamp=256.0).train(training).cuda()
    ws = normal(2, made.num_ws, W_DIM).cuda()
    full, half = made(ws, precision=FULL), made(ws)
    last = made(ws, precision=Precision(channels_last=True))
    assert 0 < (half - full).norm() / full.norm() < 4e-3
    assert (half - last).norm() / full.norm() < 4e-3
