# SPDX-License-Identifier: Apache-2.0
"""compute_metrics on StyleSDF and CNeRF, volume and full: everything runs, cameras and sizes are the model's own."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from facelab.api import FaceModel, load
from facelab.cameras.camera import Camera
from facelab.cameras.rays import make_depth_rays, make_rays
from facelab.cli import measure
from facelab.cli.metrics import compute_metrics
from facelab.cli.sight import sight_of, synthetic_heads
from facelab.config import from_dict
from facelab.data.parsing import save_small_parser
from facelab.data.regions import REGIONS
from facelab.data.synthetic import SyntheticHeads
from facelab.methods import load_method
from facelab.metrics.evaluate import GeneratedHeads
from facelab.nn.pretrained.face_parsing import SmallParser

CNERF = {
    "model": {"width": 8, "style_dim": 8, "depth": 1},
    "render": {"resolution": 16, "samples": 6, "inference_samples": 6},
}
STYLESDF = {
    "model": {"width": 8, "style_dim": 8, "latent_dim": 8, "layers": 2, "channel_max": 8},
    "render": {"resolution": 16, "samples": 6},
}
SMALL = ("--num-images", "4", "--batch", "3", "--depth-heads", "2", "--depth-candidates", "3", "--device", "cpu")


def saved(name: str, folder: Path, settings: dict[str, Any]) -> Path:
    """An untrained model whose head is a ball."""
    method = load_method(name)
    config = from_dict(method.config_type, settings).at(0)
    generator = method.build_generator(config)
    with torch.no_grad():
        generator.field_net.beta.fill_(0.004)  # a sharp surface
    generator.update_averages()
    return FaceModel(method, generator, config, {"config": settings, "step": 0}, folder).save(folder / "m.safetensors")


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {k: {**first.get(k, {}), **second[k]} if isinstance(second.get(k), dict) else second.get(k, first.get(k))
            for k in {**first, **second}}  # fmt: skip


@pytest.fixture(scope="module")
def cnerf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("cnerf", tmp_path_factory.mktemp("cnerf"), CNERF)


@pytest.fixture(scope="module")
def parser_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = SmallParser((8, 8), 19)
    return save_small_parser(tmp_path_factory.mktemp("parser") / "parser.safetensors", net, 16)


def compute(model: Path, tmp_path: Path, metrics: str, *more: str) -> dict[str, Any]:
    out = tmp_path / "m.json"
    arguments = [str(model), "--metrics", metrics, *SMALL, "--out", str(out), *more]
    result = CliRunner().invoke(compute_metrics, arguments)
    assert result.exit_code == 0, result.output
    return {**json.loads(out.read_text()), "table": result.output}


def refused(model: Path, *arguments: str) -> str:
    result = CliRunner().invoke(compute_metrics, [str(model), *arguments])
    assert result.exit_code == 2, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.output
    return lines[0]


ALL = "frechet_random,pose,depth,consistency"


def test_all_metrics_of_cnerf(cnerf: Path, parser_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "READER_HEADS", 64)
    more = ("--parser", str(parser_file), "--region-heads", "2", "--change-threshold", "0.5")
    found = compute(cnerf, tmp_path, f"{ALL},segmentation,regions", *more)
    metrics = found["metrics"]
    assert metrics["frechet_random"]["image_size"] == 16 and metrics["pose"]["encoder"].startswith("ridge")
    assert metrics["pose"]["generated"]["count"] == 4 == metrics["pose"]["held_out"]["count"]
    assert metrics["depth"]["image_size"] == 16 and 0.02 < metrics["depth"]["depth_range"] < 0.3
    assert metrics["consistency"]["exact_depth"]["without_overlap"] == 0
    segmentation, regions = metrics["segmentation"], metrics["regions"]
    assert segmentation["labels"] == list(REGIONS) and segmentation["value"] == segmentation["parser"]["value"]
    assert segmentation["parser"]["count"] == 4 and segmentation["parser"]["network"] == "facelab parser at 16 px"
    known = segmentation["known_heads"]
    assert known["heads"] == 2 and known["candidates"] == 3 and known["value"] < known["perfect_generator"] < 1
    assert set(regions["edits"]) == set(REGIONS) and set(regions["edits"]["hair"]) == {"shape", "texture", "both"}
    assert regions["heads"] == 2 and regions["threshold_levels"] == 0.5
    assert all(cell["pixels"] == 2 * 16**2 for edits in regions["edits"].values() for cell in edits.values())
    assert sum(edits["both"]["changed_pixels"] for edits in regions["edits"].values()) > 0
    for line in ("segmentation.parser ", "regions.by_region.nose", "regions.overall.texture.outside_share"):
        assert line in found["table"]
    assert "edits" not in found["table"]


def test_full_models_make_pictures_of_one_size(parser_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "READER_HEADS", 64)
    settings = merged(CNERF, {"model": {"stage": "full", "resolution": 32, "transfer_channels": 8, "channel_max": 8}})
    model = saved("cnerf", tmp_path, settings)
    found = compute(model, tmp_path, "frechet_random,consistency,segmentation,regions", "--region-heads", "1")
    metrics = found["metrics"]
    assert metrics["frechet_random"]["image_size"] == 32 == metrics["regions"]["image_size"]
    assert metrics["consistency"]["image_size"] == 32 == metrics["segmentation"]["known_heads"]["image_size"]
    assert "parser" not in metrics["segmentation"]
    line = refused(model, "--metrics", "depth", "--geometry-size", "16")
    assert "decoder" in line and "--geometry-size 16" in line
    assert "makes pictures of 32 pixels" in refused(model, "--image-size", "16")


@pytest.mark.parametrize("full", [False, True])
def test_all_metrics_of_stylesdf(full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "READER_HEADS", 64)
    stage = {"stage": "full", "model": {"resolution": 32}} if full else {"stage": "volume"}
    model = saved("stylesdf", tmp_path, merged(STYLESDF, stage))
    found = compute(model, tmp_path, ALL)["metrics"]
    side = 32 if full else 16
    assert found["frechet_random"]["image_size"] == side == found["pose"]["image_size"] == found["depth"]["image_size"]
    assert found["depth"]["perfect_generator"]["rmse"] < found["depth"]["plane_rmse"]
    assert "makes one (fenerf, cnerf)" in refused(model, "--metrics", "segmentation")
    assert "expected a model with such codes (cnerf)" in refused(model, "--metrics", "regions")


@pytest.mark.parametrize("axis_depth", [True, False])
def test_depths_are_distances(axis_depth: bool, cnerf: Path):
    """From an oblique, wide camera the depths are where the signed distance first turns negative along unit rays."""
    model = load(cnerf)
    model.generator.field_net.beta.data.fill_(1e-5)
    sight = sight_of(model.config)
    assert sight.sphere
    settings = model.settings(16, 1).replace(samples_coarse=300)
    heads = GeneratedHeads(model.generator, settings, sight.prior, 40.0, axis_depth=axis_depth)
    camera = Camera.on_sphere(1.4, 1.2, 40.0)
    views = next(iter(heads.chunks(1)))(camera)
    rays, lengths = make_rays(camera, 16, "centers"), make_depth_rays(camera, 16).directions.norm(dim=-1)
    t = torch.linspace(0.88, 1.12, 600) * lengths[..., None]
    points = rays.origins[:, :, None] + rays.directions[:, :, None] * t[..., None]
    field = model.generator.field(model.generator.scene(heads.codes([0])))
    inside = field.distances(points)[..., 0] < 0
    first = t.gather(2, inside.int().argmax(2, keepdim=True))[..., 0]
    enters = (inside.any(2) & ~inside[..., :3].any(2)).view(-1, 16, 16) & views.foreground
    assert int(enters.sum()) > 20
    error = (views.depth - first.view(-1, 16, 16))[enters].abs().median()
    assert (error < 0.002) == axis_depth, float(error)


def test_the_cameras_are_the_models_own():
    config = load_method("cnerf").config_type
    changed = replace(config(), camera=replace(config().camera, mode="uniform", azimuth=0.5, elevation=0.2, fov=15.0))
    changed = replace(changed, data=replace(changed.data, heads_azimuth_std=0.1, heads_elevation_std=0.05))
    sight = sight_of(changed)
    assert (sight.prior.mode, sight.prior.yaw_std, sight.prior.pitch_std, sight.fov) == ("uniform", 0.5, 0.2, 15.0)
    angles = synthetic_heads(sight, 0, 16, "centers", "cpu").batch(range(40)).camera.angles - math.pi / 2
    assert angles[:, 1].std() == pytest.approx(0.1, rel=0.4) and angles[:, 0].std() == pytest.approx(0.05, rel=0.4)


def test_other_pictures_need_a_parser(cnerf: Path, tmp_path: Path):
    (tmp_path / "a").mkdir()
    line = refused(cnerf, "--metrics", "segmentation", "--data", str(tmp_path / "a"))
    assert "segmentation needs --parser FILE" in line
    line = refused(cnerf, "--metrics", "segmentation", "--parser", str(cnerf))
    assert "is not a face parser that facelab knows" in line


def test_a_folder_of_pictures_is_compared(cnerf: Path, tmp_path: Path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, image in enumerate(SyntheticHeads(9, 20).batch(range(3)).image):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(pictures / f"{i}.png")
    found = compute(cnerf, tmp_path, "frechet_random", "--data", str(pictures))
    assert found["data"] == {"source": str(pictures), "real_count": 3}
    assert found["metrics"]["frechet_random"]["real_count"] == 3
    assert "fitted on synthetic heads" in refused(cnerf, "--metrics", "pose", "--data", str(pictures))
