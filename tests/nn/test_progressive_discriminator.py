# SPDX-License-Identifier: Apache-2.0
"""The discriminators of pi-GAN and FENeRF, and the CoordConv they are made of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from facelab.losses.adversarial import r1_penalty
from facelab.nn.discriminators import DiscriminatorConfig, ProgressiveDiscriminator
from facelab.nn.discriminators.progressive import BLOCKS, SLIM_CHANNELS
from facelab.nn.layers import Conv2d, CoordConv2d, coordinate_channels

LATENTS = {"z_geo": 4, "z_app": 3}


def small(block: str = "coord_strided", **changes) -> DiscriminatorConfig:
    return DiscriminatorConfig(
        **{"in_channels": 2, "channels": (3, 5, 5, 6), "block": block, "latents": LATENTS, "pose": True, **changes}
    )


def make(config: DiscriminatorConfig, seed: int = 1) -> ProgressiveDiscriminator:
    return ProgressiveDiscriminator(config, torch.Generator().manual_seed(seed))


def images(count: int = 2, size: int = 16, channels: int = 2, seed: int = 2) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def everything(output) -> Tensor:
    return torch.cat([output.realness, *output.latents.values(), output.pose], dim=1)


def reference(model: ProgressiveDiscriminator, image: Tensor, alpha: float) -> Tensor:
    """The published network written out plainly: concatenated coordinates, interpolated half size."""
    kind, count = model.config.block, len(model.blocks)
    start = count - int(math.log2(image.shape[-1] // 2))

    def conv(layer, x: Tensor, stride: int) -> Tensor:
        weight = layer.weight
        if kind != "strided":
            n, _, h, w = x.shape
            row = torch.linspace(-1, 1, h).view(1, 1, h, 1).expand(n, 1, h, w)
            column = torch.linspace(-1, 1, w).view(1, 1, 1, w).expand(n, 1, h, w)
            x, weight = torch.cat([x, row, column], 1), torch.cat([weight, layer.coord_weight], 1)
        return F.leaky_relu(F.conv2d(x, weight, layer.bias, stride, 1), 0.2)

    def adapt(index: int, x: Tensor) -> Tensor:
        return F.leaky_relu(F.conv2d(x, model.adapters[index].weight, model.adapters[index].bias), 0.2)

    x = adapt(start, image)
    for index in range(start, count):
        if index == start + 1:
            half = F.interpolate(image, scale_factor=0.5, mode="nearest")
            x = alpha * x + (1 - alpha) * adapt(index, half)
        block = model.blocks[index]
        stride = 1 if kind == "coord_pool" else 2
        main = conv(block.conv1, conv(block.conv0, x, 1), stride)
        skip = x if block.skip is None else F.conv2d(x, block.skip.weight, block.skip.bias, stride)
        if kind == "coord_pool":
            main, skip = F.avg_pool2d(main, 2), F.avg_pool2d(skip, 2)
        x = (main + skip) / math.sqrt(2)
    return F.conv2d(x, model.head.weight, model.head.bias).flatten(1)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("size", [2, 4, 8, 16])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_matches_the_plain_network(block: str, size: int, alpha: float) -> None:
    model, image = make(small(block)), images(size=size)
    torch.testing.assert_close(everything(model(image, alpha)), reference(model, image, alpha), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block", BLOCKS)
def test_alpha_fades_from_the_half_size_image(block: str) -> None:
    model, image = make(small(block)), images(size=16)
    half = everything(model(image[..., ::2, ::2], 1.0))
    torch.testing.assert_close(everything(model(image, 0.0)), half)
    assert not torch.allclose(everything(model(image, 0.5)), half, atol=1e-3)


@pytest.mark.parametrize("size", [2, 4])
def test_the_last_two_sizes_have_nothing_to_fade(size: int) -> None:
    model, image = make(small()), images(size=size)
    assert torch.equal(everything(model(image, 0.1)), everything(model(image, 1.0)))


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_alpha_may_be_a_tensor(alpha: float) -> None:
    model, image = make(small()), images()
    torch.testing.assert_close(everything(model(image, torch.tensor(alpha))), everything(model(image, alpha)))


def test_head_layout_and_optional_parts() -> None:
    output = make(small())(images(3))
    assert output.realness.shape == (3, 1) and output.pose.shape == (3, 2)
    assert {name: value.shape for name, value in output.latents.items()} == {"z_geo": (3, 4), "z_app": (3, 3)}
    bare = make(small(latents={}, pose=False))(images(3))
    assert bare.realness.shape == (3, 1) and bare.latents == {} and bare.pose is None


def test_samples_do_not_see_each_other() -> None:
    model, batch = make(small()), images(3)
    torch.testing.assert_close(everything(model(batch))[1:2], everything(model(batch[1:2])), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 2, 12, 12), (1, 2, 32, 32), (1, 2, 1, 1)])
def test_unsupported_size_names_the_sizes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[2, 4, 8, 16\]"):
        make(small())(torch.zeros(shape))


@pytest.mark.parametrize(
    ("shape", "alpha"), [((1, 3, 8, 8), 1.0), ((1, 2, 8, 4), 1.0), ((2, 8, 8), 1.0), ((1, 2, 8, 8), 1.5)]
)
def test_bad_input(shape: tuple[int, ...], alpha: float) -> None:
    with pytest.raises(ValueError, match="expected square images|alpha"):
        make(small())(torch.zeros(shape), alpha)


@pytest.mark.parametrize(
    "changes",
    [
        {"block": "coord_stride"},
        {"channels": (4,)},
        {"in_channels": 0},
        {"initialisation": "xavier"},
        {"latents": {"pose": 2}},
    ],
)
def test_bad_configuration(changes: dict) -> None:
    with pytest.raises(ValueError, match="block must|at least|initialisation|taken"):
        small(**changes)


def test_published_sizes() -> None:
    assert DiscriminatorConfig().sizes == (2, 4, 8, 16, 32, 64, 128, 256)
    assert DiscriminatorConfig(block="coord_pool").sizes[-1] == 512
    assert [DiscriminatorConfig().start(size) for size in (256, 64, 2)] == [0, 2, 7]


def test_slim_discriminators_are_slim() -> None:
    config = DiscriminatorConfig(
        in_channels=21, channels=SLIM_CHANNELS, latents={"z_geo": 256, "z_app": 256}, pose=True
    )
    assert config.sizes[-1] == 128
    assert sum(p.numel() for p in make(config).parameters()) <= 500_000


@pytest.mark.parametrize("block", BLOCKS)
def test_gradients_of_first_and_second_order(block: str) -> None:
    model = make(
        DiscriminatorConfig(in_channels=1, channels=(2, 2, 3), block=block, latents={"z": 1}, pose=True)
    ).double()
    image = images(2, 8, 1).double().requires_grad_()
    weight = model.blocks[0].conv1.weight
    coordinates = [] if block == "strided" else [model.blocks[0].conv1.coord_weight]

    def forward(x: Tensor, *_: Tensor) -> Tensor:
        return everything(model(x, 0.4))

    inputs = (image, weight, *coordinates)
    assert torch.autograd.gradcheck(forward, inputs)
    assert torch.autograd.gradgradcheck(forward, inputs, atol=1e-4)


def test_channels_last_changes_nothing_but_the_layout() -> None:
    plain, last = make(small()), make(small(channels_last=True))
    last.load_state_dict(plain.state_dict())
    assert last.blocks[0].conv0.weight.is_contiguous(memory_format=torch.channels_last)
    image = images()
    torch.testing.assert_close(everything(last(image, 0.3)), everything(plain(image, 0.3)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block", BLOCKS)
def test_bfloat16_autocast_with_r1(block: str) -> None:
    model, image = make(small(block)), images().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(image, 0.6)
    assert output.realness.dtype == torch.bfloat16
    exact = model(image, 0.6)
    torch.testing.assert_close(everything(output).float(), everything(exact), rtol=0.05, atol=0.05)
    r1_penalty(image, output.realness).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert "blocks.0.conv0.weight" in gradients
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())


def test_compiles_as_one_graph_and_alpha_does_not_recompile() -> None:
    model, image = make(small()), images()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for alpha in (0.1, 0.5, 0.9):
        got = everything(compiled(image, torch.tensor(alpha)))
        torch.testing.assert_close(got, everything(model(image, alpha)))
    assert counter.frame_count == 1


def test_weights_come_from_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = make(small(), 1), make(small(), 1), make(small(), 2)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name]), name
    assert not any("coordinates" in name for name in first.state_dict())


@pytest.mark.parametrize(("block", "kaiming"), [("coord_strided", True), ("strided", True), ("coord_pool", False)])
def test_published_initialisation(block: str, kaiming: bool) -> None:
    model = make(DiscriminatorConfig(channels=(64, 96), block=block))
    layer, fan_in = model.blocks[0].conv1, (96 + (block != "strided") * 2) * 9
    std = math.sqrt(2 / 1.04 / fan_in) if kaiming else 1 / math.sqrt(3 * fan_in)
    assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
    bound = 1 / math.sqrt(fan_in)
    assert (layer.weight.abs().max().item() > bound) == kaiming
    assert layer.bias.abs().max().item() == pytest.approx(bound, rel=0.1) and layer.bias.abs().max() <= bound
    if block != "strided":
        assert layer.coord_weight.std().item() == pytest.approx(std, rel=0.1)
    for other in (model.blocks[0].skip, model.adapters[0], model.head):
        limit = 1 / math.sqrt(other.weight[0].numel())
        assert 0.9 * limit < other.weight.abs().max() <= limit


def test_coordinates_are_rows_then_columns() -> None:
    rows, columns = coordinate_channels(2, 3)[0]
    assert rows.tolist() == [[-1, -1, -1], [1, 1, 1]]
    assert columns.tolist() == [[-1, 0, 1], [-1, 0, 1]]


@pytest.mark.parametrize("stride", [1, 2])
def test_coord_conv_is_a_convolution_of_concatenated_channels(stride: int) -> None:
    layer = CoordConv2d(3, 4, 3, stride=stride, padding=1)
    layer.reset(torch.Generator().manual_seed(0))
    x, coordinates = images(2, 6, 3), coordinate_channels(6, 6)
    whole = torch.cat([x, coordinates.expand(2, -1, -1, -1)], 1)
    expected = F.conv2d(whole, torch.cat([layer.weight, layer.coord_weight], 1), layer.bias, stride, 1)
    torch.testing.assert_close(layer(x, coordinates), expected)


def test_conv2d_is_torchs_own_with_its_default_range() -> None:
    layer = Conv2d(8, 16, 3, padding=1)
    layer.reset(torch.Generator().manual_seed(0))
    assert layer.weight.abs().max() <= 1 / math.sqrt(72) and layer.weight.device.type == "cpu"
    assert layer.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 72), rel=0.05)
