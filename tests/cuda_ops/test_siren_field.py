# SPDX-License-Identifier: Apache-2.0
"""SirenField(precision='fp16') goes through the kernels and agrees with the plain path."""

from __future__ import annotations

import warnings

import pytest
import torch

from cuda_ops import dispatch
from facelab.fields.siren import Film, SirenConfig, SirenField

DEVICE = "cuda" if torch.cuda.is_available() and not dispatch.interpreted() else "cpu"
kernels = pytest.mark.skipif(DEVICE == "cpu" and not dispatch.interpreted(), reason="needs a GPU or TRITON_INTERPRET=1")
CONFIGS = {
    "fenerf": SirenConfig(
        hidden=128, geometry_layers=2, color_layers=3, label_layers=3, grid_branch="color", grid_size=(3, 3, 3)
    ),
    "pigan": SirenConfig(hidden=128, geometry_layers=2),
    "grid_in_geometry": SirenConfig(
        hidden=128, geometry_layers=2, label_layers=2, grid_branch="geometry", use_direction=False, grid_size=(3, 3, 3)
    ),
}


def build(config: SirenConfig) -> tuple[SirenField, torch.Tensor, torch.Tensor, Film]:
    r = torch.Generator().manual_seed(0)
    field = SirenField(config)
    field.reset_parameters(r)
    codes = []
    for layers in (config.geometry_layers, config.color_layers):
        codes += [
            30 + 4 * torch.randn(2, layers, config.hidden, generator=r),
            torch.randn(2, layers, config.hidden, generator=r),
        ]
    points = torch.rand(2, 3, 4, 3, generator=r) * 0.24 - 0.12
    directions = torch.nn.functional.normalize(torch.randn(2, 3, 3, generator=r), dim=-1)
    film = Film(*(c.to(DEVICE).requires_grad_() for c in codes))
    return field.to(DEVICE), points.to(DEVICE), directions.to(DEVICE), film


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach() - b.detach()).norm() / b.detach().norm())


@kernels
@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_the_plain_path(name: str) -> None:
    field, points, directions, film = build(CONFIGS[name])
    plain = field(points, directions, film)
    weight = torch.linspace(-1, 1, plain.channels().numel(), device=DEVICE).reshape(plain.channels().shape)
    wanted = [*field.parameters(), *film.tensors()]
    expected = torch.autograd.grad((plain.channels() * weight).sum() + plain.sigma.sum(), wanted)
    field.precision = "fp16"
    fast = field(points, directions, film)
    assert fast.sigma.shape == plain.sigma.shape and relative(fast.sigma, plain.sigma) < 0.005
    assert relative(fast.channels(), plain.channels()) < 0.005
    assert (fast.semantics is None) == (plain.semantics is None)
    got = torch.autograd.grad((fast.channels() * weight).sum() + fast.sigma.sum(), wanted)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < 0.02
    with torch.no_grad():
        assert relative(field.density(points, film), plain.sigma) < 0.005


def test_precision_is_checked_and_no_state() -> None:
    field, points, directions, film = build(CONFIGS["pigan"])
    assert field.precision == "fp32" and not any("precision" in name for name in field.state_dict())
    field.precision = "fp8"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="'fp8', expected 'fp32', 'tf32' or 'fp16'"):
        field(points, directions, film)


def test_unsupported_width_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACELAB_OPS", "auto")
    dispatch.forget_warnings()
    field, points, directions, film = build(SirenConfig(hidden=32, geometry_layers=2, label_layers=2))
    plain = field(points, directions, film)
    field.precision = "fp16"
    with pytest.warns(RuntimeWarning, match="the hidden width is 32, the kernels take"):
        fast = field(points, directions, film)
    torch.testing.assert_close(fast.channels(), plain.channels(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast.sigma, plain.sigma, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        field(points, directions, film)
    dispatch.forget_warnings()
