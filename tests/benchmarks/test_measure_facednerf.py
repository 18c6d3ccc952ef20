# SPDX-License-Identifier: Apache-2.0
"""The measurement of FaceDNeRF runs on a tiny model, its truth is the truth, and its numbers tell good from bad."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "commands"))

import eg3d_models
import facednerf_tables
import known_faces
import measure_facednerf

import facelab
from facelab.inference import pictures as pic
from facelab.lighting import directional

SIDE = 64
QUICK = ["--steps", "2", "--tune-steps", "2", "--set", "render.sample_factor=1", "--set", "codes.start_samples=8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eg3d_models.make_model(tmp_path_factory.mktemp("models") / "tiny.safetensors", SIDE)


@pytest.fixture(scope="module")
def faces(model: Path) -> known_faces.KnownFaces:
    return known_faces.KnownFaces(facelab.load(model), seed=0, size=SIDE)


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The file of a run of all parts, and the folder of its sheets."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("measured")
    asked = ["--heads", "2", "--presets", "project_w_plus,pti", "--lights", "left,lamp_above", "--dpr", "random"]
    places = ["--sheets", str(folder / "sheets"), "--out", str(folder / "found.json")]
    done = CliRunner().invoke(measure_facednerf.main, [str(model), *QUICK, *asked, *places])
    assert done.exit_code == 0, done.output
    return json.loads((folder / "found.json").read_text(encoding="utf-8")), folder / "sheets"


def test_true_pictures_are_those_of_the_data_set(faces: known_faces.KnownFaces) -> None:
    target, batch = faces.target(3), faces.source.batch([3])
    assert torch.equal(target.picture, batch.image.float() / 127.5 - 1)
    torch.testing.assert_close(target.camera.label(), batch.camera.label())
    again = faces.views(3, target.camera, faces.lights(3).mean(-1)[0])
    assert float((again.picture - target.picture).abs().mean()) < 0.02, "white light of the same strength"


def test_light_figures_know_the_light(faces: known_faces.KnownFaces, model: Path) -> None:
    camera = measure_facednerf.Camera.cat([facelab.load(model).camera(yaw=yaw) for yaw in (-0.3, 0.0, 0.3)])
    left, right = (known_faces.known_light(known_faces.LIGHTS["lamp_top_left"].replace("-1", str(x))) for x in (-1, 1))
    views = faces.views(0, camera, left)
    true, wrong = (known_faces.light_figures(views.picture, views, light) for light in (left, right))
    assert true["shading_correlation"] > 0.9 and true["angle_degrees"] < 15
    assert wrong["shading_correlation"] < 0.2 and wrong["angle_degrees"] > 40
    assert true["sh_error"] < 0.5 * wrong["sh_error"]
    half = known_faces.light_figures((views.picture + 1) / 2 - 1, views, 3 * left)
    assert half == pytest.approx(true, abs=1e-3), "neither exposure nor strength counts"


def test_lights_are_six_and_apart() -> None:
    lights = torch.stack([known_faces.known_light(name) for name in known_faces.LIGHTS]).double()
    directions = known_faces.lighting.main_direction(lights)
    assert len(lights) == 6 and float((directions @ directions.T - torch.eye(6).double()).max()) < 0.9
    assert torch.equal(known_faces.known_light("{direction: [1, 0, 0]}"), directional(torch.eye(3)[:1])[0])


def test_reader_of_lights(faces: known_faces.KnownFaces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_faces, "READER_TESTS", 24)
    reader, told = known_faces.fitted_reader(faces, 160)
    assert told["median_angle_degrees"] < 30 and told["dpr_error"] < 0.9 * told["dpr_error_of_a_constant"]
    camera = faces.camera(2)
    left, right = (known_faces.known_light(f"{{direction: [{x}, 0.3, 1]}}") for x in (-1, 1))
    seen = reader(known_faces.lighting.lightness(faces.views(2, camera, left).picture / 2 + 0.5))
    errors = [
        float((seen - known_faces.lighting.to_dpr(light[None], camera)).square().sum()) for light in (left, right)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_inversion(written: tuple[dict[str, Any], Path]) -> None:
    rows = [row for row in written[0]["rows"] if row["part"] == "inversion"]
    assert [row["by"] for row in rows] == ["average head", "project_w_plus", "pti"]
    for row in rows:
        assert row["heads"] == 2 and [one["head"] for one in row["of_heads"]] == [0, 1]
        assert {"psnr", "ssim", "perceptual_random"} == set(row["photo"]) == set(row["others"])
        each = [one["photo"]["psnr"] for one in row["of_heads"]]
        assert row["photo"]["psnr"] == pytest.approx(sum(each) / 2, rel=1e-4) and each[0] != each[1]
        assert row["others"]["psnr"] == pytest.approx(sum(row["others_psnr"].values()) / 5, rel=1e-4)
    assert [row.get("steps") for row in rows] == [None, 2, 6], "codes side by side, a tuning for each"
    assert all(row["seconds"] > 0 and row["gigabytes"] > 0 for row in rows[1:])


def test_relighting(written: tuple[dict[str, Any], Path]) -> None:
    rows = [row for row in written[0]["rows"] if row["part"] == "relighting"]
    assert [(row["judge"], row["light"]) for row in rows] == [("dpr", "left"), ("dpr", "lamp_above")]
    for row in rows:
        assert row["heads"] == 2 and row["views"] == 5 and row["steps"] == 6
        figures = {"angle_degrees", "sh_error", "shading_correlation", "dpr_error", "dpr_distance"}
        assert set(row["truth"]) == figures and set(row["after"]) == set(row["before"]) == {*figures, "psnr_to_truth"}
        assert row["truth"]["shading_correlation"] > max(0.8, row["before"]["shading_correlation"])
        assert row["truth"]["angle_degrees"] < row["before"]["angle_degrees"]


def test_text_moves_codes_and_pictures(written: tuple[dict[str, Any], Path]) -> None:
    (row,) = (row for row in written[0]["rows"] if row["part"] == "text")
    assert row["codes_moved"] > 0 and row["picture_moved_by_codes"] > 0 and row["picture_moved_by_tuning"] > 0
    assert [row["losses"][stage]["steps"] for stage in ("codes", "tune")] == [[0, 1], [0, 1]]
    assert all(len(row["losses"][stage]["values"]) == 2 for stage in ("codes", "tune"))


def test_fifty_losses_of_a_long_stage_are_kept() -> None:
    found = measure_facednerf.thinned([("codes", 0.5 * k) for k in range(1000)] + [("tune", 7.0)])
    steps = found["codes"]["steps"]
    assert len(steps) == 50 and (steps[0], steps[-1]) == (0, 999)
    assert {b - a for a, b in itertools.pairwise(steps)} == {20, 21}
    assert found["codes"]["values"] == [0.5 * k for k in steps]
    assert found["tune"] == {"steps": [0], "values": [7.0]}


def test_says_what_it_ran_on(written: tuple[dict[str, Any], Path]) -> None:
    found = written[0]
    assert found["heads"] == [0, 1] and found["heads_seed"] == 1_000_000 and found["pixels"] == SIDE
    assert found["steps"] == 2 and found["settings"] == [QUICK[5], QUICK[7]] and found["dpr"][0] == "random"
    assert {"commit", "torch", "device", "perceptual", "identity"} <= set(found)


def test_sheets(written: tuple[dict[str, Any], Path]) -> None:
    sheets = written[1]
    assert {p.name for p in sheets.iterdir()} == {f"{w}_{k:03d}.png" for w in ("inverted", "relit") for k in (0, 1)}
    inverted, relit = (pic.read_picture(sheets / f"{name}_000.png") for name in ("inverted", "relit"))
    assert inverted.shape[2] > 6 * SIDE and relit.shape[2] > 7 * SIDE
    assert inverted.shape[1] > 4 * SIDE and relit.shape[1] > 3 * SIDE, "truth, average, two presets; own light and two"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--parts", "inverson"], "unknown part 'inverson', expected some of inversion, relighting, text"),
        (["--presets", "debug"], "unknown preset 'debug', expected some of project_w, project_w_plus, pti"),
        (["--lights", "lefft"], "unknown light 'lefft'"),
        (["--judges", "sfs"], "unknown judge 'sfs', expected some of dpr, reader"),
        (["--parts", "relighting"], "relighting by dpr needs --dpr FILE"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FACELAB_WEIGHTS_DIR", str(tmp_path))
    done = CliRunner().invoke(measure_facednerf.main, [str(model), *arguments])
    assert done.exit_code != 0 and message in done.output and "Traceback" not in done.output


def test_tables(written: tuple[dict[str, Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = written[0]
    source, document = tmp_path / "found.json", tmp_path / "page.md"
    source.write_text(json.dumps(found), encoding="utf-8")
    document.write_text(f"above\n{facednerf_tables.BEGIN}\nold\n{facednerf_tables.END}\nbelow\n", encoding="utf-8")
    for _ in range(2):
        facednerf_tables.main([str(source), str(document)])
        page = document.read_text(encoding="utf-8")
        assert page.startswith("above\n") and page.endswith("\nbelow\n") and "old" not in page
    pti = next(row for row in found["rows"] if row.get("by") == "pti")
    (line,) = (line for line in page.splitlines() if line.startswith("| pti |"))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[0] == f"{pti['photo']['psnr']:.1f}" and cells[3] == f"{pti['others']['psnr']:.1f}"
    (line,) = (line for line in page.splitlines() if line.startswith("| left | dpr |"))
    row = next(row for row in found["rows"] if row.get("light") == "left")
    after, before, truth = (f"{row[when]['angle_degrees']:.0f}" for when in ("after", "before", "truth"))
    assert line.split("|")[3].strip() == f"{after} ({before}; {truth})"
    document.write_text("no marks", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        facednerf_tables.main([str(source), str(document)])
    assert capsys.readouterr().err.startswith(f"error: {document}: expected the marks")


@pytest.mark.parametrize(
    "content, words",
    [(None, "cannot be read"), ("[1", "JSONDecodeError"), ("{}", "KeyError"), ("[]", "TypeError")],
)
def test_tables_of_another_file(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, document = tmp_path / "found.json", tmp_path / "page.md"
    document.write_text(f"{facednerf_tables.BEGIN}\nold\n{facednerf_tables.END}\n", encoding="utf-8")
    if content is not None:
        source.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        facednerf_tables.main([str(source), str(document)])
    line = capsys.readouterr().err
    assert line.startswith(f"error: {source}: ") and words in line and line.count("\n") == 1
    assert "old" in document.read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments, status", [(["--help"], 0), (["--he"], 2), (["one.json"], 2), ([], 2)])
def test_the_tables_command_says_how_it_is_used(arguments: list[str], status: int) -> None:
    path = Path(facednerf_tables.__file__)
    done = subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert "RESULT.json [RESULT.json ...] DOCUMENT.md" in (done.stderr if status else done.stdout)
