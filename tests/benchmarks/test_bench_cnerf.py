# SPDX-License-Identifier: Apache-2.0
"""The CNeRF benchmark runs to its end on a CPU, and what it writes is complete and consistent. Times are not looked at."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_cnerf
import cnerf_ways

Row = dict[str, Any]
NAMES = ["fp32", "fp32+residual", "fp32+autograd", "fp32+recompute", "tf32", "tf32+fp16"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Row:
    """The file of one small run with every section."""
    path = tmp_path_factory.mktemp("bench") / "new folder" / "cnerf.json"
    arguments = [
        "--tiny",
        "--out",
        str(path),
        "--variants",
        "fp32+autograd,fp32+recompute,tf32,tf32+fp16",
        "--presets",
        "fp32,tf32",
    ]
    assert bench_cnerf.main(arguments) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def rows(written: Row, case: str, batch: int | None = None) -> list[Row]:
    return [row for row in written["rows"] if row["case"] == case and batch in (None, row["batch"])]


def test_says_what_it_ran_on(written: Row) -> None:
    assert written["benchmark"] == "cnerf" and written["tiny"] is True
    assert written["torch"] == torch.__version__ and {"commit", "cuda", "cudnn", "triton", "device"} <= set(written)
    assert not [row for row in written["rows"] if "failed" in row]


@pytest.mark.parametrize("batch", [1, 2])
def test_renderer(written: Row, batch: int) -> None:
    forward, both = rows(written, "renderer_forward", batch), rows(written, "renderer_forward_backward", batch)
    assert [row["variant"] for row in forward] == ["fp32", "tf32", "tf32+fp16"] and [
        row["variant"] for row in both
    ] == NAMES
    for row in (*forward, *both):
        assert row["milliseconds"] > 0 and row["iqr"] >= 0 and row["repeats"] == 2 and row["samples"] == 4
    assert all(row["max_error"] == {"rgb": 0, "semantics": 0, "depth": 0} for row in forward[:2]), "a CPU has no TF32"
    assert all(0 < value < 0.01 for value in forward[2]["max_error"].values())
    error = {row["variant"]: row["relative_error"] for row in both}
    assert error["fp32"] == error["fp32+residual"] == error["tf32"] == 0
    assert 1e-5 < error["tf32+fp16"] < 0.05
    # computed otherwise, equal up to rounding
    assert 0 < error["fp32+autograd"] < 1e-5 and 0 < error["fp32+recompute"] < 1e-5
    assert all(("original_fp32_tf32" in row) == (batch == 1) for row in forward), "beside the original's batches only"


def test_sizes_of_chunks(tmp_path: Path) -> None:
    before = bench_cnerf.passes.CHUNK_NUMBERS
    arguments = ["--tiny", "--only", "chunks", "--variants", "tf32", "--out", str(tmp_path / "c.json")]
    assert bench_cnerf.main(arguments) == 0 and before == bench_cnerf.passes.CHUNK_NUMBERS
    found = rows(json.loads((tmp_path / "c.json").read_text()), "chunks")
    assert [(row["chunk_power"], row["variant"]) for row in found] == [
        (12, "fp32"),
        (12, "tf32"),
        (16, "fp32"),
        (16, "tf32"),
    ]
    assert all(row["batch"] == 2 and row["milliseconds"] > 0 for row in found)


def test_pictures(written: Row) -> None:
    found = rows(written, "picture")
    ways = [(row["batch"], row["preset"], row["graphs"]) for row in found]
    assert ways == [(n, preset, graphs) for n in (1, 2) for preset in ("fp32", "tf32") for graphs in (True, False)]
    assert all(row["milliseconds"] > 0 and row["error"]["max_abs"] == 0 and row["side"] == 16 for row in found)
    assert all(row["samples"] == 4 for row in found)
    for row in found:
        if row["batch"] == 1:
            assert row["original_fp32_tf32"] == [23.5, None]
            assert row["ratio"] == pytest.approx(row["milliseconds"] / 23.5, rel=1e-3)


def test_training(written: Row) -> None:
    for batch in (1, 2):
        found = rows(written, "training", batch)
        assert [row["variant"] for row in found] == NAMES
        for row in found:
            assert set(row["phases"]) == {*cnerf_ways.PHASES, "d"} and row["steps"] == 2 and row["skipped_steps"] == 0
            parts = row["against_exact"]
            assert {"g/eikonal", "g/classes", "d_global/r1", "d_region/realness", "grad_norm/g"} <= set(parts)
            assert all(math.isfinite(part["fp32"]) for part in parts.values()) and parts["grad_norm/g"]["fp32"] > 0
            limit = {"fp32+autograd": 1e-5, "fp32+recompute": 1e-5, "tf32+fp16": 0.1}.get(row["variant"], 0)
            assert all(part["max"] <= limit for part in parts.values()), row["variant"]
            assert row["exact"] == ("fp32+residual" if row["variant"][5:] in ("residual", "autograd") else "fp32")
        eikonal = {row["variant"]: row["against_exact"]["g/eikonal"]["fp32"] for row in found}
        assert eikonal["fp32"] != eikonal["fp32+residual"], "the base counts in one of them"


def test_discriminators_are_counted_together() -> None:
    steps = [{"seconds/d_global": a, "seconds/d_region": b, "seconds/g": 1.0, "seconds_per_step": 2.0, "memory_gib": m}
             for a, b, m in ((9, 9, 7), (1, 4, 3), (2, 2, 5))]  # fmt: skip
    found = cnerf_ways.summary(steps, 1)
    assert found["phases"]["d"]["milliseconds"] == 4500 and found["phases"]["d_global"]["milliseconds"] == 1500
    assert found["memory_gib"] == 5 and found["first_steps_gib"] == 7 and found["steps"] == 2


def test_ratios_are_of_the_same_precision() -> None:
    exact, fast = cnerf_ways.VARIANTS["fp32"], cnerf_ways.VARIANTS["tf32"]
    assert bench_cnerf.beside("g", 4, {"milliseconds": 137.0}, fast)["ratio"] == 0.5
    assert bench_cnerf.beside("g", 4, {"milliseconds": 181.0}, exact)["ratio"] == 0.5
    assert bench_cnerf.beside("g", 1, {"milliseconds": 59.5}, fast)["ratio"] == 0.5, "no TF32 figure there"
    assert "ratio" not in bench_cnerf.beside("g", 2, {"milliseconds": 1.0}, exact)


def test_compiling_the_field_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compile_(function: Any, **options: Any) -> Any:
        compiled.append(options)
        return lambda *arguments: function(*arguments)

    monkeypatch.setattr(torch, "compile", compile_)
    cnerf_ways.compiled_call.cache_clear()
    plain, other = (
        cnerf_ways.run_variant(cnerf_ways.VARIANTS[name], 2, cnerf_ways.TINY, torch.device("cpu"))
        for name in ("tf32", "tf32+compiled")
    )
    cnerf_ways.compiled_call.cache_clear()
    assert compiled == [{"dynamic": False}] * 2, "without gradient for the fakes, with it for the generator"
    assert all(part["max"] == 0 for part in cnerf_ways.compared(other, plain).values())


def test_full_size_is_the_originals() -> None:
    config = cnerf_ways.Sizes().config("model.stage=full").at(0)
    model, render = config.model, config.render
    assert (model.regions, model.depth, model.width, model.resolution) == (9, 3, 128, 512)
    assert (render.resolution, render.samples, render.inference_samples) == (64, 24, 24)
    assert set(cnerf_ways.USUAL) < set(cnerf_ways.VARIANTS)
    for variant in cnerf_ways.VARIANTS.values():
        settings = (f"train.precision={variant.precision}", *variant.settings)
        config = cnerf_ways.Sizes().config(*settings).at(0)
        net = cnerf_ways.Measured(variant).build_generator(cnerf_ways.TINY.config(*settings).at(0)).field_net
        assert (net.precision == "fp16") == (cnerf_ways.HALF in settings) and net.fused == (
            cnerf_ways.FUSED in settings
        )
        assert config.train.precision == variant.precision


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "pictres"], "unknown 'pictres', expected some of renderer, pictures, training, chunks"),
        (["--presets", "fp8"], "unknown 'fp8', expected some of fp32"),
        (["--variants", "fast"], "unknown 'fast', expected some of fp32"),
    ],
)
def test_unknown_names(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_cnerf.main(["--tiny", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_without_a_gpu_there_is_nothing_to_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_cnerf.main([]) == 0 and "--tiny" in capsys.readouterr().out
