# SPDX-License-Identifier: Apache-2.0
"""The Python interface: open, sample, render, mesh, save; the same numbers whichever way they are asked for."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import facelab
from facelab.api import FaceModel, mixed_codes
from facelab.cameras import Camera
from facelab.checkpoints.format import export_model, load_checkpoint
from facelab.errors import UserError
from facelab.fields.output import FieldOutput
from facelab.generator import Codes
from tests.commands.running import GENERATOR, succeed, train

RADIUS, LEVEL = 0.08, 10.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with an average that differs from the live weights."""
    return train(
        tmp_path_factory.mktemp("api") / "fenerf", "--set", "ema.decay=0.5", "--set", "optim.generator_lr=0.01"
    )


@pytest.fixture(scope="module")
def pigan_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("api") / "pigan", method="pigan")


@pytest.fixture
def model(run: Path) -> FaceModel:
    return facelab.load(run)


def ball(points: Tensor, directions: Tensor) -> FieldOutput:
    """An opaque ball of RADIUS around the origin, of class 4, coloured by its place."""
    distance = points.norm(dim=-1, keepdim=True)
    labels = torch.zeros(*points.shape[:-1], 18)
    labels[..., 3] = 1.0
    return FieldOutput(5e4 * (RADIUS - distance) + LEVEL, (points / (2 * RADIUS) + 0.5).clamp(0, 1), labels)


def opaque(model: FaceModel, monkeypatch: pytest.MonkeyPatch) -> FaceModel:
    monkeypatch.setattr(model.generator, "field", lambda scene, count=None: ball)
    return model


# --- opening and saving


def test_load_run_checkpoint_folder_and_file(run: Path, tmp_path: Path) -> None:
    whole = facelab.load(run)
    folder = facelab.load(run / "checkpoints" / "00000002")
    file = facelab.load(whole.save(tmp_path / "model.safetensors"))
    assert whole.method == folder.method == file.method == "fenerf"
    assert whole.meta["step"] == 2 and file.meta["step"] == 2
    assert file.config == whole.config and [d.switch for d in file.deviations] == [d.switch for d in whole.deviations]
    picture = whole.sample(3).rgb
    assert picture.shape == (1, 3, 8, 8) and picture.isfinite().all()
    for other in (folder, file):
        assert torch.equal(other.sample(3).rgb, picture)
        assert other.state.keys() == whole.state.keys()
        assert all(torch.equal(value, other.state[key]) for key, value in whole.state.items())
    assert not any(p.requires_grad for p in whole.generator.parameters()) and not whole.generator.training


def test_weights_can_be_chosen(run: Path) -> None:
    checkpoint = load_checkpoint(run)
    for name in ("ema", "generator", "ema_slow"):
        state = facelab.load(run, weights=name).state
        assert torch.equal(state["field_net.rgb.weight"], checkpoint.weights[name]["field_net.rgb.weight"])
    for name in ("field_net.rgb.weight", "field_net.rgb.bias"):
        assert torch.equal(facelab.load(run).state[name], checkpoint.weights["ema"][name])
        assert not torch.equal(checkpoint.weights["ema"][name], checkpoint.weights["generator"][name])


def test_half_precision_files_load_as_float32(model: FaceModel, tmp_path: Path) -> None:
    small = model.save(tmp_path / "half.safetensors", dtype=torch.float16)
    assert small.stat().st_size < 0.7 * model.save(tmp_path / "full.safetensors").stat().st_size
    again = facelab.load(small)
    assert {t.dtype for t in again.state.values()} == {torch.float32}
    for key, value in model.state.items():
        torch.testing.assert_close(again.state[key], value, rtol=1e-3, atol=1e-6)


def test_original_files_open_after_conversion(tmp_path: Path) -> None:
    succeed("convert_checkpoint", "auto", GENERATOR, tmp_path)
    model = facelab.load(tmp_path / "fenerf.safetensors")
    settings = model.settings(8, 1)
    assert model.config.model.grid_size == [3, 4, 5] and model.meta["origin"]["file"] == GENERATOR.name
    assert model.sample(0, settings=settings).semantics.shape == (1, 19, 8, 8)
    live = facelab.load(tmp_path / "fenerf.safetensors", weights="generator")
    assert not torch.equal(live.state["field_net.grid"], model.state["field_net.grid"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r, t: t / "nothing", "no checkpoint at"),
        (lambda r, t: GENERATOR, "convert it first"),
        (
            lambda r, t: export_model(t / "m.safetensors", {"ema": {"w": torch.ones(2)}}),
            "does not say its config and.*; take a run",
        ),
        (lambda r, t: _with(r, t, groups=("d_image",)), "holds no generator, only d_image; take a run folder"),
        (
            lambda r, t: _with(r, t, drop="field_net.rgb.bias"),
            r"the stored configuration \(.*\); take another checkpoint, or",
        ),
        (lambda r, t: _with(r, t, method="fenref"), "Did you mean 'fenerf'"),
        (lambda r, t: _with(r, t, setting="rendr"), "unknown setting 'rendr'"),
        (lambda r, t: _cut(_with(r, t)), "damaged|cut off|shorter|bytes"),
    ],
    ids=["nothing", "pickle", "bare", "no generator", "a tensor less", "method", "setting", "cut"],
)
def test_what_cannot_be_opened_is_one_line(run: Path, tmp_path: Path, spoil, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        facelab.load(spoil(run, tmp_path))
    assert "\n" not in str(caught.value)


def test_unknown_weights_are_refused(run: Path) -> None:
    with pytest.raises(UserError, match="no weights 'best', it has ema, generator, ema_slow"):
        facelab.load(run, weights="best")


def _with(run: Path, folder: Path, groups=("ema",), drop: str = "", method: str = "", setting: str = "") -> Path:
    """A single file made from a run, with something wrong."""
    checkpoint = load_checkpoint(run)
    meta = json.loads(json.dumps(checkpoint.meta))
    meta["method"] = method or meta["method"]
    if setting:
        meta["config"][setting] = {}
    weights = {g: {k: v for k, v in checkpoint.weights[g].items() if k != drop} for g in groups}
    return export_model(folder / "wrong.safetensors", weights, meta)


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


# --- sampling


def test_same_seed_same_picture(model: FaceModel) -> None:
    first, again, other = model.sample(5), model.sample(5), model.sample(6)
    for name in ("rgb", "depth", "opacity", "semantics"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert not torch.equal(first.rgb, other.rgb)
    both = model.sample([5, 6])
    torch.testing.assert_close(both.rgb, torch.cat([first.rgb, other.rgb]), rtol=0, atol=1e-5)


def test_latents_are_those_of_the_originals_seeding(model: FaceModel) -> None:
    latents = model.latents(7)
    source = torch.Generator().manual_seed(7)
    assert torch.equal(latents["geo"], torch.randn(1, 8, generator=source))
    assert torch.equal(latents["app"], torch.randn(1, 8, generator=source))


def test_global_random_state_neither_matters_nor_changes(model: FaceModel) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = model.sample(2).rgb
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(model.sample(2).rgb, first)


@pytest.mark.parametrize("jitter", [False, True])
def test_chunks_of_rays_change_nothing(model: FaceModel, jitter: bool) -> None:
    settings = model.settings(8).replace(jitter=jitter)
    whole = model.sample(1, settings=settings)
    for points in (1, 100, 1111):
        part = model.sample(1, settings=settings.replace(max_points=points))
        torch.testing.assert_close(part.rgb, whole.rgb, rtol=0, atol=2e-6)
        torch.testing.assert_close(part.depth, whole.depth, rtol=0, atol=2e-6)
    if jitter:
        assert not torch.equal(model.render(model.codes(1), settings=settings, seed=1).rgb, whole.rgb)


def test_one_scene_from_many_cameras(model: FaceModel) -> None:
    codes = model.codes(4)
    scene = model.generator.scene(codes)
    cameras = [model.camera(yaw=yaw) for yaw in (-0.4, 0.0, 0.4)]
    together = model.render(scene, Camera.cat(cameras))
    assert together.rgb.shape == (3, 3, 8, 8)
    for place, camera in enumerate(cameras):
        torch.testing.assert_close(together.rgb[place], model.render(codes, camera).rgb[0], rtol=0, atol=1e-5)
    assert (together.rgb[0] - together.rgb[2]).abs().max() > 1e-4
    assert model.render(model.codes([1, 2]), cameras[0]).rgb.shape == (2, 3, 8, 8)


def test_truncation_zero_is_the_average(model: FaceModel) -> None:
    average = model.generator.average_codes()
    for seed in (0, 1):
        for name, value in model.codes(seed, truncation=0.0).values.items():
            torch.testing.assert_close(value, average.values[name])
    torch.testing.assert_close(model.sample(0, truncation=0.0).rgb, model.sample(1, truncation=0.0).rgb)
    full, half = model.codes(0, 1.0), model.codes(0, 0.5)
    for name, value in half.values.items():
        torch.testing.assert_close(value, (full.values[name] + average.values[name]) / 2)


def test_cameras_look_from_where_they_are_said_to(model: FaceModel) -> None:
    assert torch.allclose(model.camera().cam2world[0, :3, 3], torch.tensor([0.0, 0.0, 1.0]), atol=1e-5)
    assert float(model.camera(pitch=0.3).cam2world[0, 1, 3]) == pytest.approx(math.sin(0.3), abs=1e-5)
    wide = float(model.camera(fov=30).intrinsics[0, 0, 0])
    assert wide == pytest.approx(0.5 / math.tan(math.radians(15)), rel=1e-5)
    with pytest.raises(UserError, match="within 0..180 degrees, got 0"):
        model.camera(fov=0)


def test_settings(model: FaceModel) -> None:
    settings = model.settings(32, 3, lock_view=True)
    assert (settings.resolution, settings.samples_coarse, settings.samples_fine) == (32, 12, 12)
    assert settings.lock_view and not settings.jitter and settings.sigma_noise == 0
    assert model.sample(0, settings=model.settings(6, 1)).rgb.shape == (1, 3, 6, 6)


# --- labels


def test_label_map_of_a_known_scene(model: FaceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ball of class 4 before nothing: inside 4, outside background; the disc has the right size."""
    size = 64
    output = opaque(model, monkeypatch).sample(0, settings=model.settings(size, 12))
    labels = model.label_map(output)[0]
    assert set(labels.unique().tolist()) == {0, 4}
    assert output.semantics is not None and output.semantics.shape == (1, 19, size, size)
    tangent = math.asin(RADIUS)  # angle of the outline as seen from distance 1
    radius = math.tan(tangent) / math.tan(math.radians(6)) * (size - 1) / 2  # pixels; corners grid
    assert math.sqrt(int((labels == 4).sum()) / math.pi) == pytest.approx(radius, abs=0.8)
    centre = output.depth[0, 0, 31:33, 31:33].mean() / output.opacity[0, 0, 31:33, 31:33].mean()
    assert float(centre) == pytest.approx(1 - RADIUS, abs=0.006)
    raw = model.sample(0, settings=model.settings(8, 1), fill=False)
    assert raw.semantics is not None and raw.semantics.shape[1] == 18


def test_models_without_labels_say_so(pigan_run: Path) -> None:
    model = facelab.load(pigan_run)
    output = model.sample(0)
    assert output.semantics is None and output.rgb.shape == (1, 3, 8, 8)
    with pytest.raises(UserError, match="pigan model has no labels"):
        model.label_map(output)


# --- codes


def test_mixing_codes(model: FaceModel) -> None:
    first, second = model.codes(0), model.codes(1)
    ends = mixed_codes(first, second, "both", [0.0, 0.5, 1.0])
    assert _equal(ends[0], first) and _equal(ends[2], second)
    torch.testing.assert_close(ends[1].values["geo"], (first.values["geo"] + second.values["geo"]) / 2)
    (geometry,) = mixed_codes(first, second, "geo", [1.0])
    assert torch.equal(geometry.values["geo"], second.values["geo"])
    assert torch.equal(geometry.values["app"], first.values["app"])
    (appearance,) = mixed_codes(first, second, "app", [1.0])
    assert torch.equal(appearance.values["geo"], first.values["geo"])
    torch.testing.assert_close(appearance.values["app"], second.values["app"])
    assert all(_equal(codes, first) for codes in mixed_codes(first, second, "non", [0.0, 1.0]))
    before, after = model.render(first), model.render(appearance)
    assert torch.equal(before.depth, after.depth) and not torch.equal(before.rgb, after.rgb)
    with pytest.raises(ValueError, match="Did you mean 'geo'"):
        mixed_codes(first, second, "goe", [0.5])
    with pytest.raises(ValueError, match="unknown codes"):
        first.mix(second, {"z": 0.5})


def _equal(first: Codes, second: Codes) -> bool:
    return all(torch.allclose(value, second.values[name]) for name, value in first.values.items())


# --- meshes


def test_the_mesh_of_a_ball_is_a_ball(model: FaceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = opaque(model, monkeypatch).extract_mesh(resolution=40, cube_size=0.2, level=LEVEL, max_points=9000)
    vertices = torch.as_tensor(np.asarray(mesh.vertices))
    voxel = 0.2 / 39
    assert (vertices.norm(dim=1) - RADIUS).abs().max() < 0.05 * voxel  # the density is linear across the surface
    assert vertices.mean(0).abs().max() < 0.1 * voxel
    edges = np.sort(np.asarray(mesh.faces)[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    _, counts = np.unique(edges, axis=0, return_counts=True)
    assert (counts == 2).all()  # closed
    colours = torch.as_tensor(np.asarray(mesh.colors)).double()[:, :3]
    scale = 255 if colours.max() > 1.5 else 1
    torch.testing.assert_close(colours / scale, (vertices / (2 * RADIUS) + 0.5).double(), rtol=0, atol=0.03)
    sheared = model.extract_mesh(resolution=40, cube_size=0.2, level=LEVEL, reference_lattice=True)
    assert (torch.as_tensor(np.asarray(sheared.vertices)).norm(dim=1) - RADIUS).abs().max() > 0.2 * voxel


def test_chunks_of_points_do_not_change_a_mesh(model: FaceModel) -> None:
    level = float(model.density(model.codes(0, 0.5))(torch.zeros(1, 3)))
    whole = model.extract_mesh(0, resolution=12, level=level)
    parts = model.extract_mesh(0, resolution=12, level=level, max_points=100)
    np.testing.assert_allclose(parts.vertices, whole.vertices, atol=1e-5)
    assert len(whole.faces) > 0


def test_no_surface_is_an_error(model: FaceModel) -> None:
    with pytest.raises(UserError, match=r"no surface at level 1e\+06"):
        model.extract_mesh(0, resolution=8, level=1e6)


def test_density_is_that_of_the_field(model: FaceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    density = opaque(model, monkeypatch).density(model.codes(0))
    found = density(torch.tensor([[0.0, 0.0, RADIUS], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([LEVEL, 5e4 * RADIUS + LEVEL]))


def test_a_moved_run_still_opens(run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run, tmp_path / "moved")
    assert torch.equal(facelab.load(moved).sample(1).rgb, facelab.load(run).sample(1).rgb)
