# SPDX-License-Identifier: Apache-2.0
"""invert_cnerf on the smallest model there is; what its pictures look like cannot be judged with random weights."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file, save_file

import facelab
from facelab.api import FaceModel
from facelab.cli import invert_run
from facelab.cli.invert import invert_cnerf, list_photos
from facelab.errors import UserError
from facelab.inference.latent_files import read_codes
from facelab.inference.pictures import read_picture, save_png, to_uint8
from facelab.inversion.problem import Target
from facelab.inversion.session import Session
from facelab.losses.perceptual import RandomPerceptual
from facelab.methods.cnerf.config import CnerfConfig
from facelab.methods.cnerf.inversion import InvertOptions, invert, make_camera, make_scene, statistics
from facelab.methods.cnerf.training import METHOD
from tests.conftest import CHECKOUT

ASTRONAUT = CHECKOUT / "test_data" / "astronaut"
SHORT = ("--aligned", "--camera", "5,-3", "--quiet", "--device", "cpu")


def make_model(path: Path, stage: str = "volume") -> Path:
    """A CNeRF of random weights; its pictures have 16 pixels a side."""
    config = CnerfConfig()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, stage=stage, resolution=16, depth=2, width=8, style_dim=6, transfer_channels=6, channel_max=8
        ),
        render=dataclasses.replace(config.render, resolution=16 if stage == "volume" else 8, inference_samples=4),
    )
    generator = METHOD.build_generator(config).eval()
    generator.update_averages()
    return FaceModel(METHOD, generator, config, {}, path).save(path)


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "volume.safetensors")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "full.safetensors", "full")


def photo(folder: Path, name: str = "me", seed: int = 0) -> Path:
    """A square picture and its mask."""
    source = np.random.default_rng(seed)
    Image.fromarray(source.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((40, 40)).save(folder / f"{name}.png")
    mask = np.repeat(np.repeat(source.integers(0, 19, (4, 4), dtype=np.uint8), 10, 0), 10, 1)
    Image.fromarray(mask).save(folder / f"{name}_mask.png")
    return folder / f"{name}.png"


def invoke(*arguments: Any) -> Result:
    result = CliRunner().invoke(invert_cnerf, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(*arguments: Any) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def refused(*arguments: Any) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stderr.strip().splitlines()[-1].startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_everything_at_once(full: Path, tmp_path: Path) -> None:
    """Mask, camera and noise found too, then tuned: all files, and other commands can use them."""
    source = photo(tmp_path)
    options = ("--steps", 6, "--refine-camera", "--noise", "--tune-steps", 4, "--tune-parts", "decoder,transfer")
    result = succeed(full, source, "--mask", tmp_path / "me_mask.png", "--out", tmp_path / "out", *options, *SHORT)
    assert "perceptual distance is perceptual_random" in result.stderr and "tuned PSNR" in result.stdout
    folder = tmp_path / "out" / "me"
    names = {p.name for p in folder.iterdir()}
    both = {f"{start}{kind}.png" for start in ("", "tuned_") for kind in ("reconstruction", "segmentation", "views")}
    assert names >= both | {"settings.yaml", "latents.safetensors", "noise.safetensors", "generator.safetensors"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"psnr", "ssim", "perceptual_random", "miou", "loss", "terms"} <= metrics.keys() & metrics["tuned"].keys()
    assert metrics["camera"]["refined"] and metrics["mask"]
    assert 0 < abs(metrics["camera"]["azimuth_degrees"] - 5) < 1
    model, tuned = facelab.load(full), facelab.load(folder / "generator.safetensors")
    same = {name for name, value in model.state.items() if torch.equal(value, tuned.state[name])}
    moved = {name.partition(".")[0] for name in model.state if name not in same}
    assert moved == {"decoder", "transfer"}
    camera = facelab.cameras.Camera.from_label(torch.tensor([metrics["camera"]["label"]]))
    noise = load_file(folder / "noise.safetensors")
    codes = read_codes(folder / "latents.safetensors", model.generator)
    for face, name in ((model, "reconstruction.png"), (tuned, "tuned_reconstruction.png")):
        scene = face.generator.scene(codes, noise)
        seen = face.generator.render(scene, camera, face.settings(ray_step_multiplier=1)).rgb
        assert (to_uint8(seen)[0].int() - read_picture(folder / name).int()).abs().max() <= 1, name


def test_its_own_picture(volume: Path, tmp_path: Path) -> None:
    """A head of the model itself: the loss falls by a factor of five, the codes leave the average."""
    model = facelab.load(volume)
    camera = METHOD.view(model.config).cameras(1.5708 + 0.05, 1.5708 - 0.1)
    codes = model.codes(7, 1.0)
    seen = model.generator.render(model.generator.scene(codes), camera, model.settings(ray_step_multiplier=1))
    save_png(tmp_path / "own.png", to_uint8(seen.rgb)[0])
    options = ("--steps", 80, "--lr", 0.2, "--prior-weight", 0, "--aligned", "--camera", "5.73,-2.86", "--quiet")
    succeed(volume, tmp_path / "own.png", "--out", tmp_path, *options, "--device", "cpu")
    rows = [json.loads(line) for line in (tmp_path / "own" / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(0, 80, 10), 79]
    found = json.loads((tmp_path / "own" / "metrics.json").read_text())
    assert found["loss"] < rows[0]["total"] / 5, (rows[0], found["loss"])


class StopAt:
    """A stop request that comes after so many questions."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __enter__(self) -> StopAt:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def requested(self) -> int:
        self.left -= 1
        return signal.SIGINT if self.left < 0 else 0


def test_a_step_that_is_not_finite(volume: Path, tmp_path: Path) -> None:
    """The state before it is kept."""
    result = invoke(volume, photo(tmp_path, "a", 1), "--out", tmp_path, "--steps", 9, "--lr", 1e30,
                    *SHORT)  # fmt: skip
    line = result.stderr.strip().splitlines()[-1]
    found = re.search(r"a: .*not finite at step (\d); .*the last good state is saved, --resume goes on", line)
    assert result.exit_code == 2 and found, line
    kept = load_file(tmp_path / "a" / "state.safetensors")
    assert int(kept["step"]) == int(found[1])
    assert all(bool(value.isfinite().all()) for name, value in kept.items() if name.startswith("value/"))


@pytest.mark.parametrize("cut", [3, 8])  # among the codes, and while tuning
def test_ctrl_c_saves_and_resume_gives_the_same(
    volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    photos = [photo(tmp_path, "a", 1), photo(tmp_path, "b", 2)]
    options = ("--mask", tmp_path, "--steps", 6, "--tune-steps", 3, "--batch", 2, "--save-every", 100, *SHORT)
    succeed(volume, *photos, "--out", tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        patch.setattr(invert_run, "StopRequest", lambda: StopAt(cut))
        result = invoke(volume, *photos, "--out", tmp_path / "cut", *options)
        assert result.exit_code == 130 and "saved, add --resume to go on" in result.stderr
    assert "holds an inversion already; add --resume" in refused(volume, *photos, "--out", tmp_path / "cut", *options)
    line = refused(volume, *photos, "--out", tmp_path / "cut", *options, "--resume", "--steps", 7)
    assert "begun with another steps: expected 6, got 7" in line
    succeed(volume, *photos, "--out", tmp_path / "cut", *options, "--resume")
    for name in ("a", "b"):
        whole, resumed = tmp_path / "whole" / name, tmp_path / "cut" / name
        for file in ("latents.safetensors", "generator.safetensors", "state.safetensors", "tuning.safetensors"):
            expected, got = load_file(whole / file), load_file(resumed / file)
            assert expected.keys() == got.keys() and all(torch.equal(v, got[k]) for k, v in expected.items()), file
        for file in ("losses.jsonl", "metrics.json", "reconstruction.png", "tuned_views.png"):
            assert (whole / file).read_bytes() == (resumed / file).read_bytes(), file


def test_side_by_side_is_as_one_by_one(volume: Path, tmp_path: Path) -> None:
    """Also where the two together keep a part of the field at a time."""
    photos = [photo(tmp_path, "a", 1), photo(tmp_path, "b", 2)]
    for batch in (1, 2):
        memory = ("--max-points", 9 * 4 * 60) if batch == 2 else ()
        options = ("--out", tmp_path / str(batch), "--batch", batch, "--steps", 8, *memory, *SHORT)
        succeed(volume, *photos, *options)
    for name in ("a", "b"):
        one, two = (load_file(tmp_path / batch / name / "latents.safetensors") for batch in ("1", "2"))
        for key, value in one.items():
            torch.testing.assert_close(value, two[key], rtol=1e-3, atol=1e-4)


def test_tuning_can_be_asked_for_later(volume: Path, tmp_path: Path) -> None:
    arguments = (volume, photo(tmp_path), "--out", tmp_path, "--steps", 4, *SHORT)
    succeed(*arguments, "--tune-steps", 2, "--out", tmp_path / "at_once")
    succeed(*arguments)
    assert not (tmp_path / "me" / "generator.safetensors").exists()
    succeed(*arguments, "--resume", "--tune-steps", 2)
    at_once, later = (load_file(f / "me" / "generator.safetensors") for f in (tmp_path / "at_once", tmp_path))
    assert all(torch.equal(value, later[name]) for name, value in at_once.items())
    assert Session(tmp_path / "me").settings()["options"]["tune_steps"] == 2
    assert "begun with another tune-steps: expected 2, got 3" in refused(*arguments, "--resume", "--tune-steps", 3)


def test_damaged_sessions(volume: Path, tmp_path: Path) -> None:
    source, out = photo(tmp_path), tmp_path / "out"
    arguments = (volume, source, "--out", out, "--steps", 2, *SHORT)
    succeed(*arguments)
    session = Session(out / "me")
    state = load_file(session / "state.safetensors")
    (session / "state.safetensors").write_bytes(b"half a file")
    assert "state.safetensors is damaged" in refused(*arguments, "--resume")
    save_file({**state, "value/code/shape": torch.zeros(1, 9, 3)}, session / "state.safetensors")
    assert "expected 'value/code/shape' of shape (1, 9, 6)" in refused(*arguments, "--resume")
    (session / "state.safetensors").unlink()
    succeed(*arguments, "--resume")  # begins anew
    (session / "target.png").write_bytes(b"")
    assert "target.png: expected a picture, got a damaged file" in refused(*arguments, "--resume")
    Image.new("RGB", (8, 8)).save(session / "target.png")
    assert "expected 16x16 pixels, got 8x8" in refused(*arguments, "--resume")
    (session / "settings.yaml").write_text("format: facelab-inversion\nversion: 1\n")
    assert "begun with another method" in refused(*arguments, "--resume")


def test_bad_input(volume: Path, full: Path, tmp_path: Path) -> None:
    source = photo(tmp_path)
    out = ("--out", tmp_path / "out")
    Image.new("RGB", (200, 200), (90, 90, 90)).save(tmp_path / "wall.png")
    cases = [
        ((volume, tmp_path / "wall.png"), "no face|no MTCNN weights"),
        ((volume, tmp_path / "wall.png", "--force"), "no face|no MTCNN weights"),
        ((volume, tmp_path / "nobody.png"), "no photo at"),
        ((volume, source, source), "two photos are called me"),
        ((tmp_path / "no_model", source), "no checkpoint at"),
        (("fenerf_synthetic_64", source), "is a fenerf model, expected a CNeRF model"),
        ((volume, source, *SHORT, "--camera", "5"), "no file 5"),
        ((volume, source, *SHORT, "--camera", "5,x"), "AZIMUTH,ELEVATION in degrees"),
        ((volume, source, *SHORT, "--camera", "95,0"), "within -90..90"),
        (
            (volume, ASTRONAUT / "astronaut.png", "--camera-from", "deep3d", "--deep3d-weights", tmp_path / "no.pth"),
            r"no\.pth|no MTCNN weights",
        ),
        ((volume, source, *SHORT, "--mask", tmp_path / "no.png"), "--mask: no file"),
        ((volume, source, *SHORT, "--mask", ASTRONAUT), "--mask: nothing for me.png in"),
        ((volume, source, *SHORT, "--mask", source), "me.png: expected a single-channel mask"),
        (
            (volume, source, *SHORT, "--mask", tmp_path / "me_mask.png", "--parser", "x"),
            "expected one of them, got both",
        ),
        ((volume, source, *SHORT, "--parser", "nothing"), "no parser at nothing"),
        ((volume, source, *SHORT, "--perceptual", tmp_path / "no.pt"), "no such weight file"),
        ((volume, source, *SHORT, "--noise"), "has no decoder, so there is no noise"),
        ((full, source, *SHORT, "--tune-parts", "decodr"), "no part 'decodr'.*Did you mean 'decoder'"),
        ((volume, source, *SHORT, "--picture-weight", 0, "--perceptual-weight", 0), "nothing to aim at"),
        ((volume, source, *SHORT, "--steps", 0), "'--steps'"),
        ((volume, source, *SHORT, "--lr", "nan"), "'--lr': expected a finite number, got nan"),
        ((volume, source, *SHORT, "--prior-weight", "inf"), "'--prior-weight': expected a finite number, got inf"),
        ((volume,), "Missing argument 'PHOTOS"),
    ]
    for arguments, expected in cases:
        line = refused(*arguments, *out)
        assert re.search(expected, line), (expected, line)
        assert not (tmp_path / "out").exists(), expected


def test_defaults_are_those_of_the_library() -> None:
    options = [param for param in invert_cnerf.params if isinstance(param, click.Option)]
    defaults = {option.name: False if option.is_flag else option.default for option in options}
    for field in dataclasses.fields(InvertOptions):
        assert defaults[field.name] == field.default, field.name


def test_in_one_call(volume: Path) -> None:
    """The library's function, two photos and their cameras; they are the model's own pictures."""
    model = facelab.load(volume)
    views, fov = torch.tensor([[0.1, 0.0], [-0.2, 0.1]]), model.config.camera.fov
    camera, settings = make_camera(views, fov), model.settings(ray_step_multiplier=1)
    output = model.generator.render(model.generator.scene(model.codes([1, 2], 1.0)), camera, settings)
    target = Target(output.rgb, camera, output.semantics, output.semantics.argmax(1))
    options = InvertOptions(steps=40, lr=0.2, mask_loss="cross_entropy", mask_weight=1e-4, prior_weight=0.0)
    solution = invert(model.generator, target, views, fov, settings, RandomPerceptual(), options)
    start = statistics(model.generator).average.map(lambda v: v.expand(2, *v.shape[1:]))
    first = model.generator.render(model.generator.scene(start), camera, settings)
    before = (first.rgb - output.rgb).square().flatten(1).mean(1)
    assert (solution.parts["picture"] < before / 2).all() and solution.codes.values["shape"].shape == (2, 9, 6)


def test_folders_of_photos(tmp_path: Path) -> None:
    """Masks beside the photos are no photos."""
    for name in ("a", "b", "my_mask"):
        photo(tmp_path, name)
    Image.new("L", (8, 8)).save(tmp_path / "a_mask_edit.png")
    assert [p.name for p in list_photos([tmp_path])] == ["a.png", "b.png", "my_mask.png"]
    with pytest.raises(UserError, match="two photos are called a"):
        list_photos([tmp_path, tmp_path / "a.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures in"):
        list_photos([tmp_path / "empty"])


def test_derivatives_reach_the_background_and_the_camera(full: Path) -> None:
    """What training leaves out: the base shape, which the background's code and the camera move."""
    model = facelab.load(full)
    codes = model.codes(1).map(lambda v: v.detach().requires_grad_())
    view = torch.tensor([[0.1, 0.1]], requires_grad=True)
    scene = make_scene(model.generator, codes, None)
    camera = facelab.cameras.sphere.sphere_camera(view[:, 0], view[:, 1])
    output = model.generator.render(scene, camera, model.settings(ray_step_multiplier=1))
    (output.rgb.square().sum() + output.semantics.square().sum()).backward()
    assert all(value.grad.abs().max() > 0 for value in (*codes.values.values(), view))
    assert codes.values["shape"].grad[0, 0].abs().max() > 0
    found = statistics(model.generator, 50)
    assert found.deviation["shape"] == pytest.approx(found.deviation["decoder"], rel=1e-5)


@pytest.mark.shared
def test_a_photo_in_the_wild(full: Path, tmp_path: Path) -> None:
    folder = Path(os.environ["FACELAB_REAL_DATA"]) / "celebamask_pairs"
    arguments = ("--mask", folder, "--steps", 2, "--quiet", "--device", "cpu", "--out", tmp_path)
    succeed(full, folder / "1.jpg", *arguments)
    metrics = json.loads((tmp_path / "1" / "metrics.json").read_text())
    assert metrics["mask"] and abs(metrics["camera"]["azimuth_degrees"]) < 15
    mask = np.asarray(Image.open(tmp_path / "1" / "target_mask.png"))
    truth = np.asarray(Image.open(folder / "1_mask.png").resize((16, 16), Image.Resampling.NEAREST))
    assert (mask == truth).mean() > 0.8
