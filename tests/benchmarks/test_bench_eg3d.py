# SPDX-License-Identifier: Apache-2.0
"""The EG3D benchmark runs to its end on a CPU, and what it writes is complete and consistent. Times are not looked at."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_eg3d
import measuring

Row = dict[str, Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Row:
    """The file of one small run with every section."""
    path = tmp_path_factory.mktemp("bench") / "new folder" / "eg3d.json"
    arguments = [
        "--tiny",
        "--out",
        str(path),
        "--presets",
        "fp32,bf16",
        "--variants",
        "tf32,tf32+bf16_all+channels_last",
    ]
    assert bench_eg3d.main(arguments) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def rows(written: Row, case: str) -> list[Row]:
    return [row for row in written["rows"] if row["case"] == case]


def test_says_what_it_ran_on(written: Row) -> None:
    assert written["benchmark"] == "eg3d" and written["tiny"] is True
    assert written["torch"] == torch.__version__ and {"commit", "cuda", "cudnn", "triton", "device"} <= set(written)


@pytest.mark.parametrize("case", ["picture_whole", "picture_cached", "planes"])
def test_pictures(written: Row, case: str) -> None:
    found = rows(written, case)
    ways = [(row["batch"], row["preset"], row["graphs"], row["fused"]) for row in found]
    assert ways == [(1, "fp32", True, None), (1, "fp32", False, None), (1, "bf16", True, None), (2, "fp32", True, None),
                    (2, "bf16", True, None)]  # fmt: skip
    assert all(row["milliseconds"] > 0 and row["iqr"] >= 0 and row["repeats"] == 2 for row in found)
    if case == "picture_whole":
        for row in found:
            exact = row["preset"] == "fp32"
            assert (row["error"]["max_abs"] == 0) == exact and row["error"]["max_abs"] < 0.2
            assert (row["error"]["psnr"] == "inf") == exact
    # figures of the original stand beside its batches only
    original = {1: [16.9, 18.5]} if case == "picture_whole" else {1: [11.1, 8.3]} if case == "picture_cached" else {}
    assert all(row.get("original_fp32_tf32") == original.get(row["batch"]) for row in found)


def test_renderer(written: Row) -> None:
    forward, both = rows(written, "renderer_forward"), rows(written, "renderer_forward_backward")
    assert [row["implementation"] for row in forward] == ["plain", "fp32", "tf32", "fp16"]
    assert forward[0]["max_error"] == {"features": 0.0, "depth": 0.0} and forward[0]["original_milliseconds"] == 21.0
    assert all(row["failed"] == "the fused renderer needs a CUDA GPU" for row in forward[1:])
    assert [(row["precision"], row["recompute"]) for row in both] == [
        ("fp32", False), ("fp32", True), ("tf32", False), ("tf32", True)
    ]  # fmt: skip
    assert all(row["milliseconds"] > 0 and row["samples"] == [4, 4] and row["rays"] == 64 for row in both)


def test_training(written: Row) -> None:
    exact, tf32, bf16 = rows(written, "training")
    assert [row["variant"] for row in (exact, tf32, bf16)] == ["fp32", "tf32", "tf32+bf16_all+channels_last"]
    for row in (exact, tf32, bf16):
        ms = {name: part["milliseconds"] for name, part in row["phases"].items()}
        weighed = (ms["g_main"] + ms["g_reg"] / 4 + ms["d_main"] + ms["d_reg"] / 16) / row["batch"]
        assert row["s_per_kimg"] == pytest.approx(weighed, rel=1e-3)
        assert row["steps"] == 2 and row["skipped_steps"] == 0
        assert all(math.isfinite(part["fp32"]) and part["fp32"] != 0 for part in row["against_fp32"].values())
    # a CPU has no TF32: same weights and random numbers at every step give the same numbers
    names = {f"grad_norm/{phase}" for phase in bench_eg3d.PHASES} | set(bench_eg3d.LOSSES)
    assert set(tf32["against_fp32"]) == names
    assert all(part["max"] == 0 for part in tf32["against_fp32"].values())
    assert all(0 < part["max"] < 0.2 for part in bf16["against_fp32"].values())


def test_compiling_the_discriminator_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compile_(module: Any, **options: Any) -> Any:
        compiled.append(options)
        return lambda *arguments: module(*arguments)

    monkeypatch.setattr(torch, "compile", compile_)
    cpu, name = torch.device("cpu"), "tf32+fp16+channels_last"
    plain, other = (
        bench_eg3d.run_variant(bench_eg3d.VARIANTS[variant], 16, bench_eg3d.TINY, cpu)
        for variant in (name, f"{name}+compiled")
    )
    assert compiled == [{"dynamic": False}]
    assert all(part["max"] == 0 for part in bench_eg3d.compared(other, plain).values())


def test_relative_differences() -> None:
    names = [f"grad_norm/{phase}" for phase in bench_eg3d.PHASES] + bench_eg3d.LOSSES
    exact = [dict.fromkeys(names, 2.0), dict.fromkeys(names, -4.0), dict.fromkeys(names, 1.0)]
    other = [dict.fromkeys(names, 2.2), dict.fromkeys(names, -4.0), dict.fromkeys(names, 0.5)]
    found = bench_eg3d.compared(other, exact)
    assert set(found) == set(names)
    expected = {"mean": pytest.approx(-0.3), "median": pytest.approx(0.1), "max": 0.5, "fp32": 2.0}
    assert all(part == expected for part in found.values())


def test_full_size_is_the_released_configuration() -> None:
    config = bench_eg3d.Sizes().config(*bench_eg3d.VARIANTS["tf32+fp16"].settings).at(0)
    assert (config.model.resolution, config.model.plane_resolution, config.model.superresolution_kind) == (
        512,
        256,
        "8xdc",
    )
    assert (config.render.samples, config.render.importance, config.train.half) == (48, 48, "fp16")
    assert (config.loss.density_every, config.loss.r1_every) == (
        bench_eg3d.PHASES["g_reg"], bench_eg3d.PHASES["d_reg"]
    )  # fmt: skip
    assert set(bench_eg3d.USUAL) < set(bench_eg3d.VARIANTS)
    for variant in bench_eg3d.VARIANTS.values():
        bench_eg3d.Measured(variant).precision(bench_eg3d.Sizes().config(*variant.settings).at(0))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "renderes"], "unknown 'renderes', expected some of pictures, renderer, training"),
        (["--presets", "fp8"], "unknown 'fp8', expected some of fp32"),
        (["--variants", "fast"], "unknown 'fast', expected some of fp32"),
    ],
)
def test_unknown_names(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_eg3d.main(["--tiny", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_rows_are_kept_when_a_case_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def too_large() -> Row:
        raise torch.OutOfMemoryError("no memory")

    report = measuring.Report(tmp_path / "x.json", {"about": 1})
    report.attempt({"case": "a"}, lambda: {"value": 1.23456789, "nested": [math.inf]})
    report.attempt({"case": "b"}, too_large)
    assert report.broken == 0
    report.attempt({"case": "c"}, lambda: {"value": torch.zeros(2) @ torch.zeros(3)})
    assert report.broken == 1 and report.rows.pop()["failed"].startswith("RuntimeError: ")
    report.add({"case": "d"})
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "about": 1,
        "rows": [
            {"case": "a", "value": 1.2346, "nested": ["inf"]},
            {"case": "b", "failed": "out of GPU memory"},
            {"case": "d"},
        ],
    }
