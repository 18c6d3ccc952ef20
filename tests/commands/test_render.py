# SPDX-License-Identifier: Apache-2.0
"""render_images, render_video, extract_mesh and convert_checkpoint: the files, their sizes, the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import facelab
from facelab.bases.pigan.originals import read_original
from facelab.cameras.trajectories import NAMES
from facelab.data.labels import PALETTE
from facelab.inference.video import read_video
from facelab.mesh.io import load_mesh, load_mrc
from tests.commands.running import GENERATOR, ORIGINALS, QUIET, invoke, script, succeed

SMALL = ("--device", "cpu", "--ray-step-multiplier", 1)
VIDEO = (*SMALL, "--image-size", 16, "--num-frames", 3)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def spread(run: Path) -> float:
    """A density that the field of a barely trained model crosses."""
    model = facelab.load(run)
    return float(model.density(model.codes(0, 0.5))(torch.zeros(1, 3)))


# --- pictures


def test_grids_of_every_layer(fenerf_run: Path, tmp_path: Path) -> None:
    layers = "image,mask,blend,depth,normals"
    options = ("--seeds", "0,2-3", "--yaws", "-0.4,0,0.4", "--layers", layers, "--image-size", 12)
    result = succeed("render_images", fenerf_run, *options, *SMALL, "--out", tmp_path)
    assert files(tmp_path) == sorted(f"{kind}_{seed}.png" for kind in ("grid", "labels") for seed in (0, 2, 3))
    assert result.stdout.split() == [str(tmp_path / f"grid_{seed}.png") for seed in (0, 2, 3)]
    assert size_of(tmp_path / "grid_2.png") == (3 * 12, 5 * 12)
    with Image.open(tmp_path / "labels_0.png") as labels:
        assert labels.mode == "P" and labels.size == (12, 12)
        assert np.asarray(labels).max() < 19 and labels.getpalette()[: 3 * len(PALETTE)] == [
            c for p in PALETTE for c in p
        ]  # type: ignore[index]
    with Image.open(tmp_path / "grid_0.png") as grid:
        mask_row = np.asarray(grid)[12:24].reshape(-1, 3)
        assert {tuple(map(int, c)) for c in np.unique(mask_row, axis=0)} <= {tuple(c) for c in PALETTE}


def test_default_layers_fit_the_method(fenerf_run: Path, pigan_run: Path, tmp_path: Path) -> None:
    for run, rows in ((fenerf_run, 3), (pigan_run, 2)):
        out = tmp_path / run.name
        succeed("render_images", run, "--seeds", 0, *SMALL, "--out", out)
        assert size_of(out / "grid_0.png") == (5 * 8, rows * 8)  # five views, as trained
    assert files(tmp_path / "pigan") == ["grid_0.png"]


def test_two_runs_give_identical_files(fenerf_run: Path, tmp_path: Path) -> None:
    for name, points in (("a", 2_400_000), ("b", 2_400_000), ("c", 500)):
        options = ("--seeds", "1", "--image-size", 16, "--max-points", points, *SMALL)
        succeed("render_images", fenerf_run, *options, "--out", tmp_path / name)
    for name in files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    with Image.open(tmp_path / "a" / "grid_1.png") as a, Image.open(tmp_path / "c" / "grid_1.png") as c:
        assert np.abs(np.asarray(a, int) - np.asarray(c, int)).max() <= 1  # --max-points bounds the memory alone


def test_saved_latents_give_the_same_picture(fenerf_run: Path, tmp_path: Path) -> None:
    common = ("--image-size", 16, *SMALL)
    succeed("render_images", fenerf_run, "--seeds", 7, "--save-latents", *common, "--out", tmp_path / "seed")
    codes = tmp_path / "seed" / "codes_7.safetensors"
    result = succeed("render_images", fenerf_run, "--latents", codes, *common, "--out", tmp_path / "codes")
    again = Path(result.stdout.split()[0])
    assert again.read_bytes() == (tmp_path / "seed" / "grid_7.png").read_bytes()
    videos = [
        ("--seeds", "7", "--psi", 0.7, "--out", tmp_path / "v1"),
        ("--latents", codes, "--out", tmp_path / "v2"),
    ]
    frames = [
        list(read_video(Path(succeed("render_video", fenerf_run, *options, *VIDEO).stdout.split()[-1])))
        for options in videos
    ]
    assert len(frames[0]) == 3 and all(np.array_equal(a, b) for a, b in zip(*frames, strict=True))


def test_latents_of_the_original_scripts(fenerf_run: Path, tmp_path: Path) -> None:
    """Both dictionaries that FENeRF's programs call ``freq_phase_offset_*.pth``."""
    model = facelab.load(fenerf_run)
    codes = model.codes(7, 0.7).values
    parts = {
        f"{kind}_{name}": codes[name][:, row]
        for name in codes
        for row, kind in enumerate(("frequencies", "phase_shifts"))
    }
    video = {f"truncated_{key}": value for key, value in parts.items()}
    inversion = {}
    for key, value in parts.items():
        kind, name = key.rsplit("_", 1)
        inversion[f"w_{name}_{kind}"] = value - 0.25
        inversion[f"w_{name}_{kind.removesuffix('ies') + 'y' if kind == 'frequencies' else 'phase_shift'}_offsets"] = (
            torch.full_like(value, 0.25)
        )
    expected = model.render(model.codes(7, 0.7), settings=model.settings(16, 1)).rgb
    for name, content in (("video", video), ("inversion", inversion)):
        torch.save(content, tmp_path / f"{name}.pth")
        options = ("--latents", tmp_path / f"{name}.pth", "--layers", "image", "--yaws", 0, "--image-size", 16, *SMALL)
        path = Path(succeed("render_images", fenerf_run, *options, "--out", tmp_path / name).stdout.split()[0])
        with Image.open(path) as picture:
            got = torch.as_tensor(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
        assert (got - expected[0]).abs().max() < 1.5 / 127.5


@pytest.mark.parametrize(("color", "value"), [("black", 0), ("white", 255), ("grey", 128), ("light_grey", 207)])
def test_fill_color(color: str, value: int, fenerf_run: Path, tmp_path: Path) -> None:
    """Empty rays get the colour and the background class, the others stay."""
    model = facelab.load(fenerf_run)
    raw = model.sample(0, settings=model.settings(8, 1), fill=False)
    empty = (raw.opacity[0, 0] < 0.9).numpy()
    assert 0 < empty.sum() < empty.size
    options = ("--seeds", 0, "--yaws", 0, "--layers", "image,mask", "--fill-color", color)
    succeed("render_images", fenerf_run, *options, *SMALL, "--out", tmp_path)
    with Image.open(tmp_path / "grid_0.png") as grid, Image.open(tmp_path / "labels_0.png") as labels:
        picture, classes = np.asarray(grid, int)[:8], np.asarray(labels)
    assert (np.abs(picture[empty] - value) <= 1).all() and (classes[empty] == 0).all() and (classes[~empty] > 0).all()
    inside = ((raw.rgb[0].permute(1, 2, 0).numpy() + 1) * 127.5)[~empty]
    assert np.abs(picture[~empty] - inside).max() <= 1


def test_truncation_zero_is_one_head(fenerf_run: Path, tmp_path: Path) -> None:
    succeed("render_images", fenerf_run, "--seeds", "0,1", "--psi", 0, *SMALL, "--out", tmp_path / "zero")
    succeed("render_images", fenerf_run, "--seeds", "0,1", "--psi", 1, *SMALL, "--out", tmp_path / "one")
    zero, one = (
        [np.asarray(Image.open(tmp_path / name / f"grid_{s}.png"), int) for s in (0, 1)] for name in ("zero", "one")
    )
    assert np.abs(zero[0] - zero[1]).max() <= 1
    assert np.abs(one[0] - one[1]).max() > 1


# --- videos


@pytest.mark.parametrize(
    ("options", "frames", "width", "name"),
    [
        (("--seeds", "0"), 3, 4 * 16, "interp_both_0"),
        (("--seeds", "0-2", "--latent-type", "app"), 6, 4 * 16, "interp_app_0-1-2"),
        (("--latent-type", "geo", "--layers", "image,depth", "--trajectory", "orbit"), 3, 2 * 16, "interp_geo_0-1"),
        (("--latent-type", "non", "--layers", "image", "--trajectory", "front", "--zoom"), 3, 16, "interp_non_0-1"),
        (("--layers", "normals", "--fov", 20, "--trajectory", "zoom", "--reference"), 3, 16, "interp_both_0-1"),
    ],
)
def test_videos(options: tuple[Any, ...], frames: int, width: int, name: str, fenerf_run: Path, tmp_path: Path) -> None:
    result = succeed("render_video", fenerf_run, *options, *VIDEO, "--out", tmp_path)
    assert result.stdout.split() == [str(tmp_path / f"{name}.mp4")]
    assert [frame.shape for frame in read_video(tmp_path / f"{name}.mp4")] == [(16, width, 3)] * frames
    assert files(tmp_path) == [f"{name}.mp4"]


def test_frames_codes_and_odd_sizes(pigan_run: Path, tmp_path: Path) -> None:
    options = (*SMALL, "--image-size", 9, "--num-frames", 2, "--frames", "--save-latents", "--seeds", "3,5")
    succeed("render_video", pigan_run, *options, "--out", tmp_path)
    assert [f.shape for f in read_video(tmp_path / "interp_both_3-5.mp4")] == [(10, 18, 3)] * 2  # yuv420p is even
    pictures = [name for name in files(tmp_path) if name.endswith(".png")]
    assert len(pictures) == 2 and all(size_of(tmp_path / name) == (18, 9) for name in pictures)
    assert {"codes_3.safetensors", "codes_5.safetensors"} <= set(files(tmp_path))


@pytest.mark.parametrize("trajectory", NAMES)
def test_every_trajectory_renders(trajectory: str, fenerf_run: Path, tmp_path: Path) -> None:
    succeed("render_video", fenerf_run, *VIDEO, "--layers", "image", "--trajectory", trajectory, "--out", tmp_path)
    assert len(list(read_video(tmp_path / "interp_both_0-1.mp4"))) == 3


def test_keyframes_from_a_file(fenerf_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "path.yaml"
    path.write_text("- {t: 0, pitch: 1.57, yaw: 1.2}\n- {t: 1, pitch: 1.57, yaw: 1.9, fov: 14}\n")
    succeed("render_video", fenerf_run, *VIDEO, "--trajectory", path, "--out", tmp_path)
    assert len(list(read_video(tmp_path / "interp_both_0-1.mp4"))) == 3


def test_a_failed_video_leaves_nothing(fenerf_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facelab.cli.pictures.frame", lambda *a: (_ for _ in ()).throw(MemoryError()))
    result = invoke("render_video", fenerf_run, *VIDEO, "--out", tmp_path)
    assert result.exit_code == 2 and "error: out of memory" in result.stderr
    assert files(tmp_path) == []


# --- shapes


def test_meshes_and_volumes(fenerf_run: Path, tmp_path: Path) -> None:
    level = spread(fenerf_run)
    shape = ("--voxel-resolution", 12, "--cube-size", 0.24, "--level", level, "--format", "ply,obj,glb,mrc")
    result = succeed("extract_mesh", fenerf_run, *shape, "--out", tmp_path)
    assert files(tmp_path) == ["0.glb", "0.mrc", "0.obj", "0.ply"]
    assert sorted(result.stdout.split()) == sorted(str(tmp_path / name) for name in files(tmp_path))
    meshes = [load_mesh(tmp_path / f"0.{kind}") for kind in ("ply", "obj", "glb")]
    for mesh in meshes:
        assert len(mesh.faces) == len(meshes[0].faces) > 0 and mesh.colors is not None
        np.testing.assert_allclose(mesh.vertices, meshes[0].vertices, atol=1e-5)
        assert np.abs(mesh.vertices).max() <= 0.12 + 1e-6
    volume, voxel, origin = load_mrc(tmp_path / "0.mrc")
    model = facelab.load(fenerf_run)
    density = model.density(model.codes(0, 0.5))
    corner = density(torch.tensor([[-0.12, -0.12, -0.12]]))
    assert volume.shape == (12, 12, 12) and voxel == pytest.approx(0.24 / 11) and origin == pytest.approx(-0.12)
    assert volume[0, 0, 0] == pytest.approx(float(corner), abs=1e-5)
    assert volume[11, 0, 0] == pytest.approx(float(density(torch.tensor([[0.12, -0.12, -0.12]]))), abs=1e-5)


def test_mrc_files_are_read_by_others(fenerf_run: Path, tmp_path: Path) -> None:
    mrcfile = pytest.importorskip("mrcfile", reason="the reader of MRC files is not installed")
    succeed("extract_mesh", fenerf_run, "--voxel-resolution", 8, "--format", "mrc", "--out", tmp_path)
    with mrcfile.open(tmp_path / "0.mrc") as file:
        assert file.data.shape == (8, 8, 8) and file.data.dtype == np.float32
        assert float(file.voxel_size.x) == pytest.approx(0.3 / 7, rel=1e-4)
    assert mrcfile.validate(str(tmp_path / "0.mrc"))


def test_reference_lattice_shears_meshes_and_volumes(fenerf_run: Path, tmp_path: Path) -> None:
    shape = ("--voxel-resolution", 10, "--level", spread(fenerf_run), "--format", "ply,mrc")
    succeed("extract_mesh", fenerf_run, *shape, "--out", tmp_path / "straight")
    succeed("extract_mesh", fenerf_run, *shape, "--reference-lattice", "--out", tmp_path / "sheared")
    first, second = (load_mrc(tmp_path / name / "0.mrc")[0] for name in ("straight", "sheared"))
    assert first[0, 0, 0] == second[0, 0, 0] and not np.allclose(first, second)
    meshes = [(tmp_path / name / "0.ply").read_bytes() for name in ("straight", "sheared")]
    assert meshes[0] != meshes[1]


# --- conversion


@pytest.mark.parametrize("method", ["fenerf", "pigan"])
def test_converted_originals_render(method: str, tmp_path: Path) -> None:
    source = ORIGINALS / method / "checkpoint_fixture_generator.pth"
    result = succeed("convert_checkpoint", method, source, tmp_path / "model.safetensors")
    lines = result.stdout.strip().splitlines()
    assert lines[0].startswith("checkpoint_fixture_generator.pth: ") and "view direction" in lines[0]
    assert "averages, decay 0.999" in lines[1] and lines[-1] == f"written: {tmp_path / 'model.safetensors'}"
    succeed("render_images", tmp_path / "model.safetensors", "--image-size", 8, *SMALL, "--out", tmp_path)
    assert len([name for name in files(tmp_path) if name.startswith("grid_")]) == 3


def test_no_ema_and_curriculum(tmp_path: Path) -> None:
    options = ("--no-ema", "--curriculum", "celebamask_hq_128_no_grid")
    succeed("convert_checkpoint", "auto", GENERATOR, tmp_path, *options)
    model = facelab.load(tmp_path / "fenerf.safetensors")
    assert model.meta["curriculum"] == "celebamask_hq_128_no_grid" and model.config.render.resolution == 128
    live = read_original(GENERATOR, use_ema=False).weights["generator"]
    assert all(torch.equal(model.state[key], value) for key, value in live.items())


# --- the scripts themselves


def test_scripts_list_and_resolve(tmp_path: Path) -> None:
    listed = succeed("train_fenerf", "--list-curricula").stdout
    assert "CelebA_double_semantic_texture_embedding_256_dim_96" in listed and "ffhq_128" in listed
    alias = succeed("train_fenerf", *QUIET, "--curriculum", "CelebA_double_semantic", "--dry-run", "--out", tmp_path)
    assert "variant: SIRENBASELINESEMANTICDISENTANGLE" in alias.stdout
    assert "deviates from the original: reference.sum_chunks" in alias.stdout
    assert files(tmp_path) == []


def test_a_script_in_a_process_of_its_own(fenerf_run: Path, tmp_path: Path) -> None:
    done = script("render_images", fenerf_run, "--seeds", 0, *SMALL, "--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    succeed("render_images", fenerf_run, "--seeds", 0, *SMALL, "--out", tmp_path / "here")
    assert (tmp_path / "grid_0.png").read_bytes() == (tmp_path / "here" / "grid_0.png").read_bytes()
