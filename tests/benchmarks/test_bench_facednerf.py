# SPDX-License-Identifier: Apache-2.0
"""FaceDNeRF's benchmark runs to its end on a CPU, and what it writes is complete and consistent. Times are not looked at."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_facednerf as bench

from facelab.generator import Scene
from facelab.lighting.projection import PRESETS, project
from facelab.methods.facednerf.config import FaceDNeRFConfig
from facelab.nn.pretrained.random_diffusion import FULL_UNET, FULL_VAE

Row = dict[str, Any]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Row:
    """The file of a small run: both tasks, ours and the plain twin."""
    path = tmp_path_factory.mktemp("bench") / "new folder" / "facednerf.json"
    assert bench.main(["--tiny", "--out", str(path), "--ways", "tf32,plain", "--repeats", "1"]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def runs(written: Row) -> list[Row]:
    return [row for row in written["rows"] if row["case"] == "run"]


def test_says_what_it_ran_on_and_of_which_sizes(written: Row) -> None:
    assert written["benchmark"] == "facednerf" and written["tiny"] is True
    assert {"commit", "cuda", "device"} <= set(written) and written["torch"] == torch.__version__
    about = written["about"]
    assert about["rays"] == 16**2 and about["samples"] == [8, 8] and about["steps"] == [1000, 400]
    assert about["losses_of_edit"] == ["identity", "light", "noise", "reconstruction", "text"]
    # these two have their real sizes here, too: 14.71 million convolution weights of VGG16, 43.8 of IR-SE50
    assert about["weights_millions"]["lpips"] == pytest.approx(14.715, abs=1e-3)
    assert about["weights_millions"]["arcface"] == pytest.approx(43.798, abs=1e-3)


def test_every_task_in_every_way(written: Row) -> None:
    found = runs(written)
    assert [(row["task"], row["way"], row["cold"]) for row in found] == [
        ("edit", "tf32", True), ("edit", "plain", False), ("relight", "tf32", False), ("relight", "plain", False)
    ]  # fmt: skip
    for row in found:
        codes, tune = row["codes"], row["tune"]
        assert codes["milliseconds"] > 0 < tune["milliseconds"] and codes["repeats"] == tune["repeats"] == 1
        assert row["minutes"] == pytest.approx((codes["milliseconds"] + 0.4 * tune["milliseconds"]) / 60, rel=1e-3)
        assert row["first_picture_seconds"] > 0
        assert set(row["losses"]) == {"identity", "reconstruction", "light", "noise"} | (
            {"text"} if row["task"] == "edit" else set()
        )


def test_the_loop_is_added_to_the_plain_twin_alone(written: Row) -> None:
    loop = written["rows"][0]
    assert loop["case"] == "projection" and loop["cells"] == 100**2
    for row in runs(written):
        if row["way"] == "plain":
            assert row["minutes_with_loop"] == pytest.approx(row["minutes"] + 1.4 * loop["milliseconds"] / 60, rel=1e-3)
        else:
            assert "minutes_with_loop" not in row


def test_every_way_computes_the_same(written: Row) -> None:
    for task in bench.TASKS:
        ours, plain = (row["losses"] for row in runs(written) if row["task"] == task)
        assert ours == pytest.approx(plain, rel=1e-3)


def test_the_plain_twin_draws_planes_for_each_view(monkeypatch: pytest.MonkeyPatch) -> None:
    from facelab.bases.eg3d.model import TriPlaneGenerator

    drawn: list[int] = []
    scene = TriPlaneGenerator.scene

    def counted(self: Any, *arguments: Any) -> Scene:
        drawn.append(1)
        return scene(self, *arguments)

    model, networks = bench.make_model(bench.TINY, CPU), bench.make_networks(bench.TINY, CPU)
    monkeypatch.setattr(TriPlaneGenerator, "scene", counted)
    for name, number in (("tf32", 1), ("plain", 2)):
        way = bench.WAYS[name]
        inversion = bench.make_course(model, networks, bench.settings_of("relight", way, bench.TINY), way).inversion()
        drawn.clear()
        inversion.advance()
        assert len(drawn) == number


def test_the_loop_is_the_projection() -> None:
    for name in ("right", "top_right"):
        expected = project(PRESETS[name], grid=10, phase=True)
        torch.testing.assert_close(torch.tensor(bench.looped_projection(PRESETS[name], 10)).double(), expected,
                                   rtol=1e-6, atol=1e-6)  # fmt: skip


def test_full_size_is_that_of_the_published_networks() -> None:
    config = bench.Sizes().model.config().stages[-1]
    assert (config.model.resolution, config.model.plane_resolution, config.render.samples) == (512, 256, 48)
    assert FULL_UNET["block_out_channels"] == (320, 640, 1280, 1280) and FULL_VAE["sample_size"] == 512
    assert set(bench.USUAL) < set(bench.WAYS)
    for task in bench.TASKS:
        for way in bench.WAYS.values():
            made = bench.settings_of(task, way, bench.Sizes())
            assert isinstance(made, FaceDNeRFConfig) and (made.codes.steps, made.tune.steps) == (1000, 400)


def test_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--tiny", "--ways", "fast"])
    assert stopped.value.code == 2 and "unknown 'fast', expected some of tf32" in capsys.readouterr().err
