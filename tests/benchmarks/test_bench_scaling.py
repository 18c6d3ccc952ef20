# SPDX-License-Identifier: Apache-2.0
"""The scaling benchmark runs to its end on CPU processes, and what it writes is consistent. Times are not looked at."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_scaling
import measuring

from facelab.methods import load_method
from facelab.training.config import check_shares


def test_one_and_two_processes(tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    assert bench_scaling.main(["--tiny", "--methods", "fenerf", "--parallel", "--out", str(path)]) == 0
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["benchmark"] == "scaling" and written["tiny"] is True and written["torch"] == torch.__version__
    two, one = written["rows"]
    assert (two["gpus"], one["gpus"], one["efficiency"], one["reduction_ms"]) == (2, 1, 1.0, 0.0)
    assert two["efficiency"] == pytest.approx(two["images_per_second"] / (2 * one["images_per_second"]), rel=1e-3)
    assert 0 < two["reduction_share"] < 1 and two["reduction_ms"] < two["milliseconds"]
    for row in (one, two):
        assert row["images_per_second"] == pytest.approx(1e3 * 2 * row["gpus"] / row["milliseconds"], rel=1e-3)
        assert set(row["phases_ms"]) == {"d_image", "d_semantic", "generator"} and row["beside"] == 0
        assert row["windows"] == 2 and row["skipped_steps"] == 0 and "notes" not in row


@pytest.mark.parametrize("method", bench_scaling.CASES)
def test_full_sizes_can_be_shared(method: str) -> None:
    case = bench_scaling.CASES[method]
    for gpus in (1, 2, 4):
        config, trainable = case.config(method, gpus).at(0), load_method(method)
        assert config.train.batch_size == case.batch * gpus and config.train.cuda_graphs
        check_shares(case.batch * gpus, config.train.batch_chunk, gpus)
        for phase in trainable.stages(config)[0].phases:
            assert case.window % phase.every == 0, "lazy phases run equally often in all windows"
            if phase.chunk is not None:
                check_shares(case.batch * gpus, phase.chunk(config), gpus)


def test_rows_share_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side, never two on one GPU; one that fails is a row too."""
    taken: list[tuple[str, ...]] = []
    busy: set[str] = set()

    def measure(method: str, gpus: int, tiny: bool, visible: list[str]) -> measuring.Row:
        assert not busy & set(visible) and len(visible) == gpus
        busy.update(visible)
        taken.append(tuple(visible))
        busy.difference_update(visible)
        if method == "cnerf" and gpus == 4:
            raise RuntimeError("out of luck")
        return {"images_per_second": 90.0 * gpus if gpus > 1 else 100.0, "efficiency": None}

    monkeypatch.setattr(bench_scaling, "measure", measure)
    for parallel in (False, True):
        report = measuring.Report(tmp_path / "rows.json", {})
        rows = [(method, gpus) for method in ("eg3d", "cnerf") for gpus in (1, 2, 4)]
        bench_scaling.measure_all(report, rows, ["4", "5", "6", "7"], False, parallel)
        assert len(report.rows) == 6 and report.broken == 1
        assert {row["gpus"]: row.get("efficiency") for row in report.rows if row["method"] == "eg3d"} == {
            4: 0.9, 2: 0.9, 1: 1.0,
        }  # fmt: skip
        assert next(row for row in report.rows if "failed" in row)["failed"] == "RuntimeError: out of luck"
    assert set().union(*taken) == {"4", "5", "6", "7"}


def test_unknown_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_scaling.main(["--tiny", "--gpus", "3"])
    assert "expected numbers from 1 to 2" in capsys.readouterr().err
