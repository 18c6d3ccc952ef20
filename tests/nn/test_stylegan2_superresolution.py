# SPDX-License-Identifier: Apache-2.0
"""Super-resolution modules: sizes, resizing, purity, the original's raw image, number types, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.draws import Draws
from facelab.nn.stylegan2 import FULL, KINDS, Precision, Superresolution, SuperresolutionKind

W_DIM = 6
KEEPING = SuperresolutionKind(8, 1, (6, 4))  # like 2x and 4x: the first block keeps the size
GROWING = SuperresolutionKind(8, 2, (6, 4))  # like 8x and 8xdc


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def module(kind: SuperresolutionKind = KEEPING, **options: Any) -> Superresolution:
    made = Superresolution(kind, in_channels=5, w_dim=W_DIM, **options).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.3)
    return made


def inputs(side: int = 8, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return normal(batch, 3, side, side), normal(batch, 5, side, side, seed=2), normal(batch, 7, W_DIM, seed=3)


@pytest.mark.parametrize(
    ("name", "output", "channels", "noise"),
    [
        ("2x", 128, (128, 64), [64, 64, 128, 128]),
        ("4x", 256, (128, 64), [128, 128, 256, 256]),
        ("8x", 512, (128, 64), [256, 256, 512, 512]),
        ("8xdc", 512, (256, 128), [256, 256, 512, 512]),
    ],
)
def test_sizes_of_the_released_modules(name: str, output: int, channels: tuple[int, int], noise: list[int]) -> None:
    assert KINDS[name].output_resolution == output
    with torch.device("meta"):
        made = Superresolution(name)
    state = made.state_dict()
    assert [value.shape[0] for key, value in state.items() if key.endswith("noise_const")] == noise
    shapes = [tuple(state[f"blocks.{i}.conv1.weight"].shape[:2]) for i in (0, 1)]
    assert shapes == [(channels[0], channels[0]), (channels[1], channels[1])]
    assert state["blocks.0.conv0.weight"].shape[1] == 32 and state["blocks.1.to_rgb.affine.weight"].shape[1] == 512


@pytest.mark.parametrize("kind", [KEEPING, GROWING])
@pytest.mark.parametrize("side", [4, 8, 11])
def test_any_rendering_resolution_gives_the_output_resolution(kind: SuperresolutionKind, side: int) -> None:
    made = module(kind)
    rgb, features, ws = inputs(side)
    image = made(rgb, features, ws)
    assert image.shape == (2, 3, kind.output_resolution, kind.output_resolution)
    if side != 8:
        resized = [F.interpolate(x, size=(8, 8), mode="bilinear", antialias=True) for x in (rgb, features)]
        torch.testing.assert_close(image, made(*resized, ws))


def test_antialias_counts_for_larger_inputs_only() -> None:
    smooth, plain = module(), module(antialias=False)
    larger, smaller = inputs(12), inputs(6)
    assert not torch.allclose(smooth(*larger), plain(*larger), atol=1e-3)
    torch.testing.assert_close(smooth(*smaller), plain(*smaller), rtol=1e-4, atol=1e-5)


def test_only_the_last_style_code_counts() -> None:
    made = module()
    rgb, features, ws = inputs()
    image = made(rgb, features, ws)
    assert torch.equal(image, made(rgb, features, ws[:, -1:]))
    assert not torch.allclose(image, made(rgb, features, ws.flip(1)), atol=1e-3)


@pytest.mark.parametrize(("kind", "side", "changed"), [(KEEPING, 8, True), (KEEPING, 6, False), (GROWING, 8, False)])
def test_inputs_are_left_alone_and_the_originals_raw_is_told(
    kind: SuperresolutionKind, side: int, changed: bool
) -> None:
    made = module(kind)
    rgb, features, ws = inputs(side)
    kept = rgb.clone()
    image, raw = made.with_legacy_raw(rgb, features, ws)
    assert torch.equal(rgb, kept)
    assert torch.equal(image, made(rgb, features, ws))
    assert raw.shape == rgb.shape and torch.equal(raw, rgb) is not changed
    if changed:  # what the first block adds does not depend on the image it is added to
        other = made.with_legacy_raw(torch.zeros_like(rgb), features, ws)[1]
        torch.testing.assert_close(raw - rgb, other, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_input_and_weight_at_the_native_size() -> None:
    made = module().train()
    tensors = [x.requires_grad_() for x in inputs()]
    made(*tensors, noise_mode="random", draws=Draws(0)).square().mean().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in tensors)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


def test_first_order_gradients() -> None:
    made = module(SuperresolutionKind(4, 1, (3, 2))).double()
    tensors = tuple(x.double().requires_grad_() for x in inputs(4, batch=1))
    assert torch.autograd.gradcheck(made, tensors, fast_mode=True)


def test_noise_modes() -> None:
    made = module()
    args = inputs()
    none, const = made(*args), made(*args, noise_mode="const")
    assert torch.equal(none, made(*args, noise_mode="none")), "none is the default"
    assert not torch.allclose(none, const, atol=1e-3)
    random = made(*args, noise_mode="random", draws=Draws(1))
    assert not torch.allclose(random, const, atol=1e-3)
    assert torch.equal(random, made(*args, noise_mode="random", draws=Draws(1)))


def test_half_precision_limits_also_a_full_precision_run() -> None:
    clamped, free = module(num_fp16_res=4), module(num_fp16_res=0)
    rgb, features, ws = inputs()
    torch.testing.assert_close(clamped(rgb, features, ws), free(rgb, features, ws))
    large = 1e4 * features
    limited = clamped(rgb, large, ws)
    assert limited.abs().max() < free(rgb, large, ws).abs().max()
    assert limited.abs().max() <= 256 * 2 + 4 * rgb.abs().max()


def test_half_precision_and_memory_order_stay_close() -> None:
    made = module(num_fp16_res=4)
    args = inputs()
    full = made(*args, precision=FULL)
    assert torch.equal(made(*args), full), "a CPU computes in full precision unless told otherwise"
    half = made(*args, precision=Precision(on_cpu=True))
    assert half.dtype == torch.float32 and 0 < (half - full).norm() / full.norm() < 4e-3
    last = made(*args, precision=Precision(channels_last=True))
    torch.testing.assert_close(last, full, rtol=1e-4, atol=1e-5)


def test_a_batch_equals_its_samples() -> None:
    made = module()
    args = inputs(batch=3)
    alone = torch.cat([made(*(x[i : i + 1] for x in args)) for i in range(3)])
    torch.testing.assert_close(made(*args), alone, rtol=1e-4, atol=1e-5)


def test_errors() -> None:
    with pytest.raises(ValueError, match="expected one of 2x, 4x, 8x, 8xdc, got '8dc'. Did you mean '8xdc'"):
        Superresolution("8dc")
    made = module()
    rgb, features, ws = inputs()
    with pytest.raises(ValueError, match=r"rgb: expected shape \(2, 3, 8, 8\), got \(2, 3, 4, 4\)"):
        made(rgb[..., :4, :4], features, ws)
    with pytest.raises(ValueError, match=r"ws: expected shape \(N, L, 6\), got \(2, 7, 5\)"):
        made(rgb, features, ws[..., :5])
