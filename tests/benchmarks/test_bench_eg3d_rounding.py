# SPDX-License-Identifier: Apache-2.0
"""The study of rounding runs to its end on a CPU, writes all its rows and leaves convolutions as they were."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_eg3d_rounding as program

from cuda_ops import convolution_derivatives as derivatives


def test_writes_a_row_for_every_way(tmp_path: Path) -> None:
    assert program.main(["--tiny", "--steps", "2", "--out", str(tmp_path / "rounding.json")]) == 0
    rows = {row["way"]: row["against_fp32"] for row in json.loads((tmp_path / "rounding.json").read_text())["rows"]}
    assert list(rows) == list(program.WAYS)
    for way in ("fp32", "fp32, again", "tf32"):  # a CPU has no TF32
        assert all(set(found["steps"]) == {0.0} for found in rows[way].values())
    halves = rows["fp32+fp16+channels_last"]
    assert 0 < abs(halves["g_main"]["mean"]) < 0.1 and 0 < abs(halves["d_main"]["mean"]) < 0.01


def test_exactness_travels_to_the_derivatives(monkeypatch) -> None:
    """Inside a watched network the flag is off in the convolution, its gradients and theirs; outside it is on."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen: list[bool] = []
    network = torch.nn.Module()
    network.forward = lambda x, weight: derivatives.conv2d(x, weight, padding=1)
    before = derivatives.Geometry.apply
    monkeypatch.setattr(
        derivatives.Geometry, "apply", lambda *args: (seen.append(torch.backends.cudnn.allow_tf32), before(*args))[1]
    )
    x, weight = torch.randn(1, 2, 5, 5, requires_grad=True), torch.randn(3, 2, 3, 3, requires_grad=True)
    convolutions = program.ExactConvolutions()
    with convolutions.patched():
        derivatives.conv2d(x, weight, padding=1)
        assert seen == [True]
        convolutions.watch(network)
        y = network(x, weight)
        torch.testing.assert_close(y, F.conv2d(x, weight, padding=1))
        assert torch.backends.cudnn.allow_tf32
        (by_x,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        by_x.square().sum().backward()
    assert seen[1:] and not any(seen[1:])
    assert (
        derivatives.Geometry.apply(derivatives.Geometry((1, 1), (1, 1), (0, 0), 1, False), x, weight).shape == y.shape
    )
