# SPDX-License-Identifier: Apache-2.0
"""Pictures, videos and meshes of an EG3D model through the same commands as every other model."""

from __future__ import annotations

import math
import re
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import facelab
from facelab.checkpoints.format import load_checkpoint
from facelab.cli.export import export
from facelab.errors import UserError
from facelab.mesh.io import load_mesh
from tests.commands.running import invoke, succeed, train


def test_the_interface_knows_its_cameras(eg3d_run: Path) -> None:
    model = facelab.load(eg3d_run, device="cpu")
    assert not model.has_labels and model.head_cube == model.config.model.box_side
    view = model.config.view
    side = model.camera(yaw=0.3)
    assert float(side.cam2world[0, :3, 3].norm()) == pytest.approx(view.radius, abs=1e-5)
    assert float(side.intrinsics[0, 0, 0]) == pytest.approx(view.focal, abs=1e-6)
    target = torch.tensor(view.pivot) - side.cam2world[0, :3, 3]
    assert torch.allclose(side.cam2world[0, :3, 2], target / target.norm(), atol=1e-5)
    with pytest.raises(UserError, match="within 0..180"):
        model.camera(fov=200)


def test_pictures_of_all_layers(eg3d_run: Path, tmp_path: Path) -> None:
    succeed("render_images", eg3d_run, "--seeds", "3", "--layers", "image,depth,normals", "--yaws", "-0.3,0.3", "--out",
            tmp_path, "--save-latents", "--device", "cpu")  # fmt: skip
    size = facelab.load(eg3d_run, device="cpu").config.model.resolution
    grid = iio.imread(tmp_path / "grid_3.png")
    assert grid.shape[0] >= 3 * size and grid.shape[1] >= 2 * size and grid.std() > 1
    succeed("render_images", eg3d_run, "--latents", tmp_path / "codes_3.safetensors", "--layers", "image,depth,normals",
            "--yaws", "-0.3,0.3", "--out", tmp_path / "again", "--device", "cpu")  # fmt: skip
    assert (iio.imread(tmp_path / "again" / "grid_latents.png") == grid).all()
    failed = invoke("render_images", eg3d_run, "--layers", "mask", "--out", tmp_path, "--device", "cpu")
    assert failed.exit_code == 2 and "no labels" in failed.stderr and failed.stderr.count("\n") == 1


def test_a_video_stays_on_the_models_sphere(eg3d_run: Path, tmp_path: Path) -> None:
    succeed("render_video", eg3d_run, "--seeds", "0,1", "--num-frames", "3", "--trajectory", "orbit", "--frames", "--out",
            tmp_path, "--device", "cpu")  # fmt: skip
    frames = sorted(next(tmp_path.glob("frames_*")).glob("*.png"))
    assert len(frames) == 3 and (iio.imread(frames[0]) != iio.imread(frames[-1])).any()
    view = facelab.load(eg3d_run, device="cpu").view
    around = view.cameras(torch.full((5,), math.pi / 2), torch.linspace(0, math.pi, 5), torch.full((5,), view.fov))
    assert torch.allclose(around.cam2world[:, :3, 3].norm(dim=1), torch.tensor(view.radius))


def test_a_mesh_fills_the_models_box(eg3d_run: Path, tmp_path: Path) -> None:
    model = facelab.load(eg3d_run, device="cpu")
    codes = model.codes(0, 0.5)
    level = float(model.density(codes)(torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) - 0.5).median())
    succeed(
        "extract_mesh", eg3d_run, "--voxel-resolution", "24", "--level", level, "--out", tmp_path, "--device", "cpu"
    )
    mesh = load_mesh(tmp_path / "0.ply")
    half = model.head_cube / 2
    assert len(mesh.faces) > 100 and 0.4 * half < float(abs(mesh.vertices).max()) <= half + 1e-5


def test_fast_pictures_say_what_they_cost(eg3d_run: Path, tmp_path: Path) -> None:
    common = ("render_images", eg3d_run, "--seeds", "3", "--layers", "image", "--device", "cpu")
    succeed(*common, "--out", tmp_path / "plain")
    fast = succeed(*common, "--out", tmp_path / "fast", "--fast", "--precision", "bf16")
    (worst,) = re.findall(r"fast, bf16: the first head differs from fp32 by (\S+) of 255 at most", fast.stderr)
    assert float(worst) < 0.01  # a CPU lowers nothing
    pictures = [iio.imread(tmp_path / kind / "grid_3.png").astype(int) for kind in ("fast", "plain")]
    assert abs(pictures[0] - pictures[1]).max() <= 1
    succeed(
        "render_video", eg3d_run, "--seeds", "0", "--num-frames", "2", "--fast", "--out", tmp_path, "--device", "cpu"
    )


def test_fast_labels(tmp_path: Path) -> None:
    succeed("render_images", "fenerf_synthetic_64", "--seeds", "1", "--image-size", 16, "--ray-step-multiplier", 1,
            "--layers", "image,mask", "--yaws", "0", "--fast", "--out", tmp_path, "--device", "cpu")  # fmt: skip
    assert (tmp_path / "labels_1.png").exists()


def test_exported_with_its_discriminator_it_trains_on(eg3d_run: Path, tmp_path: Path) -> None:
    model = export(eg3d_run, tmp_path / "model", dtype="fp32", with_discriminators=True)
    assert set(load_checkpoint(model).weights) == {"ema", "discriminator"}
    train(tmp_path / "on", "--init-from", model, "--max-steps", 1, method="eg3d")
    judge = load_checkpoint(eg3d_run).weights["discriminator"]
    after = load_checkpoint(tmp_path / "on").weights["discriminator"]
    moved = max(float((after[k] - v).abs().max()) for k, v in judge.items())
    assert 0 < moved < 0.02  # one step of Adam away


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--psi", "nan"), ("--psi", "finite number", "nan")),
        (("--psi", "1e9"), ("--psi", "-100<=x<=100")),
        (("--yaws", "0,nan"), ("--yaws", "0,nan")),
        (("--pitches", "inf"), ("--pitches", "inf")),
        (("--trunc", "1"), ("--trunc is a flag of the original", "--psi")),
        (("--fov-deg", "18"), ("--fov-deg is a flag of the original", "--fov")),
    ],
)
def test_numbers_that_are_none_and_flags_of_the_original(
    arguments: tuple[str, str], words: tuple[str, ...], tmp_path: Path
) -> None:
    result = invoke("render_images", "eg3d_synthetic_128", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_codes_that_hold_nan(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.full((1, 1, 128), np.nan, np.float32))
    result = invoke("render_images", "eg3d_synthetic_128", "--out", tmp_path / "out", "--latents", tmp_path / "w.npy")
    assert result.exit_code == 2 and "w.npy holds NaN" in result.stderr and result.stderr.count("\n") == 1
