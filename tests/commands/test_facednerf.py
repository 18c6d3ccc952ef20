# SPDX-License-Identifier: Apache-2.0
"""invert_eg3d and FaceDNeRF's commands on a tiny EG3D of random weights; what pictures look like cannot be judged."""

from __future__ import annotations

import json
import os
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import facelab
from facelab.cameras import Camera
from facelab.cli import facednerf_run
from facelab.cli.facednerf import slug
from facelab.inference.latent_files import read_codes
from facelab.inference.pictures import read_picture, to_uint8
from facelab.inversion.loop import Stage
from facelab.inversion.session import Session
from facelab.methods.facednerf.course import Step
from tests.commands.eg3d_models import SIDE, crop, make_model
from tests.commands.running import invoke, succeed
from tests.commands.test_invert_cnerf import StopAt
from tests.conftest import CHECKOUT
from tests.documents import page
from tests.documents import rows as table_rows
from tests.metrics.test_clip_score import folder as clip_folder  # noqa: F401 - a fixture

ASTRONAUT = CHECKOUT / "test_data" / "astronaut"
SHORT = ("--preset", "debug", "--perceptual", "random", "--identity", "none", "--video-frames", 0, "--quiet",
         "--device", "cpu")  # fmt: skip
TEXT = ("--demo-diffusion", "--text-weight", 1e-5)
LIGHT = ("--light-network", "random", "--light-weight", 0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "eg3d.safetensors")


def refused(command: str, *arguments: Any) -> str:
    result = invoke(command, *arguments)
    last = result.stderr.strip().splitlines()[-1]
    assert result.exit_code == 2 and last.startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    return last


def rows(session: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (session / "losses.jsonl").read_text().splitlines()]


def test_a_crop_with_its_camera(model: Path, tmp_path: Path) -> None:
    """Every file of a session, and that the shared commands show the same head from them."""
    photo = crop(tmp_path)
    options = ("--picture-weight", 5, "--video-frames", 2, "--picture-every", 2, "--out", tmp_path / "out")
    result = succeed("invert_eg3d", model, photo, *SHORT, *options)
    assert "its camera lies beside it" in result.stderr and "PSNR" in result.stdout
    session = tmp_path / "out" / "me"
    names = {path.name for path in session.iterdir()}
    documented = re.findall(r"`([\w/.]+)`", "".join(row[0] for row in table_rows(page("facednerf"), "files")))
    assert names == {name.strip("/") for name in documented} - {"reconstruction", "tuning.safetensors"}
    steps = {path.name for path in (session / "steps").iterdir()}
    assert steps == {f"front_{kind}.png" for kind in ("codes_00000", "codes_00002", "tune_00000", "tune_00001")}
    assert [(row["step"], row["stage"]) for row in rows(session)] == [
        (0, "codes"),
        (2, "codes"),
        (3, "tune"),
        (4, "tune"),
    ]
    metrics = json.loads((session / "metrics.json").read_text())
    assert {"psnr", "perceptual_random", "losses", "seconds", "camera"} <= metrics.keys()
    label = np.load(tmp_path / "me.npy").reshape(1, 25)
    np.testing.assert_allclose(metrics["camera"]["label"], label[0], atol=1e-6)

    tuned = facelab.load(session / "generator.safetensors")
    codes = read_codes(session, tuned.generator)
    assert np.array_equal(np.load(session / "latent.npy"), codes.values["w"].numpy())
    settings = tuned.settings(ray_step_multiplier=1)
    scene = tuned.generator.scene(codes)
    seen = tuned.generator.render(scene, Camera.from_label(torch.tensor(label).float()), settings).rgb
    assert (to_uint8(seen)[0].int() - read_picture(session / "front.png").int()).abs().max() <= 1

    common = (session / "generator.safetensors", "--layers", "image", "--yaws", "0.2", "--device", "cpu")
    for name, latents in (("a", session), ("b", session / "latent.npy")):  # the noise maps lie in both
        succeed("render_images", *common, "--latents", latents, "--out", tmp_path / name)
    assert (tmp_path / "a" / "grid_latents.png").read_bytes() == (tmp_path / "b" / "grid_latents.png").read_bytes()


def test_what_is_done_stays_and_may_be_tuned_otherwise(model: Path, tmp_path: Path) -> None:
    arguments = ("invert_eg3d", model, crop(tmp_path), *SHORT, "--resume", "--out")
    succeed(*arguments, tmp_path, "--tune-steps", 3)
    succeed(*arguments, tmp_path / "anew")
    files = ("generator.safetensors", "front.png", "metrics.json")
    before = {name: (tmp_path / "me" / name).stat().st_mtime_ns for name in files}
    assert "(done before)" in succeed(*arguments, tmp_path, "--tune-steps", 3).stdout
    assert before == {name: (tmp_path / "me" / name).stat().st_mtime_ns for name in files}
    assert "(done before)" not in succeed(*arguments, tmp_path).stdout
    one, other = (load_file(folder / "me" / "generator.safetensors") for folder in (tmp_path, tmp_path / "anew"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert [row["step"] for row in rows(tmp_path / "me")] == [0, 2, 3, 4]


def test_it_comes_nearer(model: Path, tmp_path: Path) -> None:
    """A head of the model itself: the picture's loss falls by half, most of it while codes move."""
    face = facelab.load(model)
    photo = crop(tmp_path, "own")
    camera = Camera.from_label(torch.tensor(np.load(tmp_path / "own.npy").reshape(1, 25)).float())
    seen = face.generator.render(face.generator.scene(face.codes(7, 1.0)), camera, face.settings(ray_step_multiplier=1))
    from facelab.inference.pictures import save_png

    save_png(photo, to_uint8(seen.rgb)[0])
    options = ("--picture-weight", 1, "--reconstruction-weight", 0, "--steps", 60, "--tune-steps", 20, "--set",
               "codes.lr=0.05", "--set", "codes.noise_maps=false")  # fmt: skip
    succeed("invert_eg3d", model, photo, *SHORT, *options, "--out", tmp_path)
    curve = [row["picture"] for row in rows(tmp_path / "own")]
    assert curve[-1] < curve[0] / 2, curve
    assert min(row["picture"] for row in rows(tmp_path / "own") if row["stage"] == "codes") < 0.7 * curve[0]


def test_prompt_and_light(model: Path, tmp_path: Path) -> None:
    from facelab.nn.pretrained.random_diffusion import write_tiny_folder

    photo, folder = crop(tmp_path), write_tiny_folder(tmp_path / "sd")
    prompt = ("--prompt", "A man's hat", "--diffusion", folder, "--text-weight", 1e-5)
    result = succeed(
        "edit_facednerf", model, photo, *prompt, "--light", "right", *LIGHT, "--compare", *SHORT, "--out", tmp_path
    )
    assert "random weights: its numbers mean nothing" in result.stderr
    session = tmp_path / "me-a-man-s-hat-right"
    last = rows(session)[-1]
    assert last["text"] > 0 and last["light"] > 0 and last["stage"] == "tune"
    assert {path.name.split("_")[0] for path in (session / "steps").iterdir()} == {"front", "side"}
    assert "text" not in rows(session / "reconstruction")[0]
    assert len(json.loads((session / "metrics.json").read_text())["light_error"]) == 5
    assert read_picture(session / "sheet.png").shape[2] > 5 * SIDE
    assert (session / "front.png").read_bytes() != (session / "reconstruction" / "front.png").read_bytes()

    (folder / "vae" / "config.json").unlink()
    line = refused("edit_facednerf", model, photo, *prompt, *SHORT, "--out", tmp_path / "b")
    assert "incomplete: vae: config.json is missing" in line and not (tmp_path / "b").exists()


def test_the_light_of_a_photo(model: Path, tmp_path: Path) -> None:
    """The same nine numbers given by hand find the same head."""
    photo, lamp = crop(tmp_path), crop(tmp_path, "lamp", seed=3)
    common = ("relight_facednerf", model, photo, *SHORT, "--light-network", "random", "--light-weight", 1)
    common = (*common, "--reconstruction-weight", 0, "--set", "codes.noise_maps=false", "--out", tmp_path)
    succeed(*common, "--light-of", lamp)
    task = Session(tmp_path / "me-light-of-lamp").settings()["task"]
    (tmp_path / "light.yaml").write_text(f"{{numbers: {task['light_numbers']}, frame: facelab}}\n")
    succeed(*common, "--light", tmp_path / "light.yaml")
    succeed(*common, "--light", "{direction: [1, 0, 0], strength: 9}", "--out", tmp_path / "strong")
    names = ("me-light-of-lamp", "me-light", "strong/me-light")
    found = [np.load(tmp_path / name / "latent.npy") for name in names]
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_text_alone(model: Path, tmp_path: Path) -> None:
    common = ("generate_facednerf", model, "--prompt", "An old man", *TEXT, *SHORT, "--out")
    result = succeed(*common, tmp_path, "--seeds", "0,3")
    assert "random weights" in result.stderr
    first, second = (np.load(tmp_path / f"an-old-man-{seed}" / "latent.npy") for seed in (0, 3))
    assert np.abs(first - second).max() > 0.05
    assert (
        "picture" not in rows(tmp_path / "an-old-man-0")[-1] and not (tmp_path / "an-old-man-0" / "target.png").exists()
    )
    succeed(*common, tmp_path / "alone", "--seeds", "3")
    assert np.array_equal(np.load(tmp_path / "alone" / "an-old-man-3" / "latent.npy"), second)


def test_other_codes_to_begin_with(model: Path, tmp_path: Path) -> None:
    """Without steps they are the result; a folder gives each photo its own; sessions know what they were begun with."""
    photos = [crop(tmp_path, "a", 1), crop(tmp_path, "b", 2)]
    succeed("invert_eg3d", model, *photos, *SHORT, "--out", tmp_path / "first")
    stay = (*SHORT, "--steps", 0, "--tune-steps", 0, "--batch", 2, "--out")
    succeed("invert_eg3d", model, *photos, *stay, tmp_path / "second", "--start", tmp_path / "first")
    succeed(
        "invert_eg3d", model, *photos, *stay, tmp_path / "third", "--start", tmp_path / "first" / "b" / "latent.npy"
    )

    def latent(run: str, name: str) -> np.ndarray:
        return np.load(tmp_path / run / name / "latent.npy")

    for name in ("a", "b"):
        np.testing.assert_array_equal(latent("second", name), latent("first", name))
        np.testing.assert_array_equal(latent("third", name), latent("first", "b"))
    assert not np.array_equal(latent("first", "a"), latent("first", "b"))
    relit = ("relight_facednerf", model, photos[0], "--light", "left", *LIGHT, *stay)
    succeed(*relit, tmp_path / "relit", "--start", tmp_path / "first" / "a")
    np.testing.assert_array_equal(latent("relit", "a-left"), latent("first", "a"))

    again = ("invert_eg3d", model, *photos, *stay, tmp_path / "second", "--resume", "--start")
    assert "(done before)" in succeed(*again, tmp_path / "first").stdout
    assert "was begun with another start" in refused(*again, tmp_path / "first" / "b")
    np.save(tmp_path / "two.npy", np.concatenate([latent("first", "a"), latent("first", "b")]))
    np.save(tmp_path / "other.npy", np.zeros((1, 3, 5), np.float32))
    (tmp_path / "empty").mkdir()
    for start, message in (
        ("two.npy", "holds codes of 2 heads, expected one"),
        ("other.npy", "does not fit this generator"),
        ("none", "--start: no codes at"),
        ("empty", "--start: no codes for a.png in"),
    ):
        line = refused("invert_eg3d", model, *photos, *stay, tmp_path / "bad", "--start", tmp_path / start)
        assert message in line and not (tmp_path / "bad").exists(), line


def test_cats(model: Path, tmp_path: Path) -> None:
    """ArcFace knows human faces: its file is not even asked for."""
    options = ("--domain", "cats", "--identity-weight", 1, "--identity", tmp_path / "no.pth", "--out", tmp_path)
    result = succeed("invert_eg3d", model, crop(tmp_path), *SHORT, *options)
    assert "domain cats: identity left out" in result.stderr and "identity" not in rows(tmp_path / "me")[0]


def test_clip_alone(model: Path, clip_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Its file takes the place of a diffusion model; the score of each view is written."""
    prompt = ("--prompt", "a hat", "--clip", clip_folder)
    succeed("edit_facednerf", model, crop(tmp_path), *prompt, *SHORT, "--preset", "edit", "--steps", 2, "--tune-steps",
            0, "--identity-weight", 0, "--sample-factor", 1, "--out", tmp_path)  # fmt: skip
    session = tmp_path / "me-a-hat"
    first = rows(session)[0]
    assert 0 < first["clip"] < 2 and "text" not in first
    scores = json.loads((session / "metrics.json").read_text())["clip_cosine"]
    assert len(scores) == 5 and all(abs(score) <= 1 for score in scores)
    stay = ("--steps", 1, "--tune-steps", 0, "--identity-weight", 0, "--sample-factor", 1, "--out")
    edit = ("edit_facednerf", model, tmp_path / "me.png", "--prompt", "a hat", *SHORT, "--preset", "edit", *stay)
    losses = {}
    for kind in ("gelu", "quick_gelu"):
        succeed(*edit, tmp_path / kind, "--clip", clip_folder, "--clip-activation", kind)
        losses[kind] = rows(tmp_path / kind / "me-a-hat")[0]["clip"]
    assert losses["gelu"] != losses["quick_gelu"] and first["clip"] in losses.values()
    line = refused(*edit, tmp_path / "x", "--demo-diffusion", "--clip-activation", "gelu")
    assert "but there is no --clip" in line


@pytest.mark.parametrize("cut", [2, 4])  # among the codes, and while tuning
def test_ctrl_c_saves_and_resume_gives_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    crop(tmp_path)
    common = ("edit_facednerf", model, tmp_path / "me.png", "--prompt", "a hat", *TEXT, *SHORT)
    succeed(*common, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(facednerf_run, "StopRequest", lambda: StopAt(cut))
        result = invoke(*common, "--out", tmp_path / "cut")
        assert result.exit_code == 130 and "add --resume to go on" in result.stderr
    assert "holds a session already; add --resume" in refused(*common, "--out", tmp_path / "cut")
    line = refused(*common, "--out", tmp_path / "cut", "--resume", "--steps", 7)
    assert "begun with another codes.steps: expected 3, got 7" in line
    succeed(*common, "--out", tmp_path / "cut", "--resume", "--set", "memory.max_points=4096")  # memory may change
    whole, resumed = (tmp_path / name / "me-a-hat" for name in ("whole", "cut"))
    for file in ("latents.safetensors", "generator.safetensors", "noise.safetensors"):
        expected, got = load_file(whole / file), load_file(resumed / file)
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=f"{file}: {name}")
    assert [row["step"] for row in rows(whole)] == [row["step"] for row in rows(resumed)]


def test_side_by_side_is_as_one_by_one(model: Path, tmp_path: Path) -> None:
    """Of a folder with crops and cameras, as the original has it."""
    (tmp_path / "data").mkdir()
    crop(tmp_path / "data", "a", 1)
    crop(tmp_path / "data", "b", 2, sideways=-0.3)
    for batch in (1, 2):
        options = ("--batch", batch, "--set", "render.jitter=false", "--out", tmp_path / str(batch))
        succeed("invert_eg3d", model, tmp_path / "data", *options, *SHORT)
    one, two = ([np.load(tmp_path / batch / name / "latent.npy") for name in ("a", "b")] for batch in ("1", "2"))
    apart = np.abs(one[0] - one[1]).mean()
    for alone, together in zip(one, two, strict=True):
        assert np.abs(alone - together).mean() < 0.05 * apart


def test_a_step_that_is_not_finite(model: Path, tmp_path: Path) -> None:
    arguments = (
        "invert_eg3d",
        model,
        crop(tmp_path),
        *SHORT,
        "--steps",
        9,
        "--set",
        "codes.lr=1e30",
        "--out",
        tmp_path,
    )
    line = refused(*arguments)
    assert re.search(r"not finite at step [23]", line) and "last good state is kept in" in line, line
    kept = load_file(tmp_path / "me" / "state.safetensors")
    assert all(bool(value.isfinite().all()) for name, value in kept.items() if name.startswith("value/"))
    assert len(rows(tmp_path / "me")) == 1


def test_the_step_that_ends_a_tuning_early_stands_in_the_curve(tmp_path: Path) -> None:
    run = types.SimpleNamespace(
        config=types.SimpleNamespace(codes=types.SimpleNamespace(steps=20)),
        outputs=facednerf_run.Outputs(tmp_path, save_every=100, picture_every=0),
    )
    session = Session(tmp_path)
    bar = types.SimpleNamespace(set_postfix=lambda **_: None, update=lambda: None)
    watch = facednerf_run.Watch(run, [facednerf_run.Job("a", session, None)], bar)  # type: ignore[arg-type]
    for step, steps in ((0, 30), (3, 30), (4, 4)):  # close enough before the fifth move
        watch(Step("tune", 0, step, steps, torch.ones(1), {"picture": torch.ones(1)}, None, None, 0.1))
    assert [row["step"] for row in rows(tmp_path)] == [20, 24]


def test_out_of_memory_names_what_helps(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Stage) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("facelab.inversion.loop.Inversion.advance", full)
    line = refused("invert_eg3d", model, crop(tmp_path), *SHORT, "--out", tmp_path)
    assert "out of memory" in line and "--low-memory" in line and "memory.max_points" in line


def test_a_folder_of_another_run(model: Path, tmp_path: Path) -> None:
    photo, other = crop(tmp_path), crop(tmp_path, "other", 5)
    out = ("--out", tmp_path / "out", *SHORT)
    succeed("invert_eg3d", model, photo, *out)
    cases = [
        (("relight_facednerf", model, photo, *LIGHT, "--light", "left"), "me-left", "another command"),
        (("invert_eg3d", make_model(tmp_path / "b.safetensors", rendering=SIDE // 2), photo), "me", "another"),
        (("invert_eg3d", model, other), "other", "another photo"),
    ]
    for arguments, name, expected in cases:
        target = tmp_path / "out" / name
        if name != "me":
            (tmp_path / "out" / "me").rename(target)
        line = refused(*arguments, *out, "--resume")
        assert expected in line or "pixels" in line, line
        if name != "me":
            target.rename(tmp_path / "out" / "me")
    (tmp_path / "out" / "other").mkdir()
    (tmp_path / "out" / "other" / "run.json").write_text("{}")
    assert "holds other files and no session" in refused("invert_eg3d", model, other, *out)
    settings = tmp_path / "out" / "me" / "settings.yaml"
    settings.write_text("format: facelab-inversion\nversion: 1\n")
    assert "begun with another command" in refused("invert_eg3d", model, photo, *out, "--resume")


def test_bad_input(model: Path, tmp_path: Path) -> None:
    from PIL import Image

    photo, out = crop(tmp_path), ("--out", tmp_path / "out")
    Image.new("RGB", (200, 200), (90, 90, 90)).save(tmp_path / "wall.png")
    Image.new("RGB", (64, 32)).save(tmp_path / "wide.png")
    np.save(tmp_path / "short.npy", np.zeros(24))
    label = np.load(tmp_path / "me.npy").reshape(25)
    far = label.copy()
    far[[3, 7, 11]] *= 2
    np.save(tmp_path / "far.npy", far)
    skewed = label.copy()
    skewed[:3] *= 2
    np.save(tmp_path / "skewed.npy", skewed)
    (tmp_path / "cut.pt").write_bytes(b"half a file")
    torch.save({"stem.weight": torch.zeros(3)}, tmp_path / "other.pt")
    tensors, about = load_file(model), safe_open(model, "pt").metadata()
    longest = max(tensors, key=lambda name: tensors[name].numel())
    save_file({**tensors, longest: tensors[longest][:1].clone()}, tmp_path / "sizes.safetensors", about)
    invert, relight, edit = (lambda *a, n=name: (n, model, photo, *SHORT, *a) for name in (
        "invert_eg3d", "relight_facednerf", "edit_facednerf"
    ))  # fmt: skip
    cases = [
        (("invert_eg3d", model, tmp_path / "wall.png", *SHORT), "no face|no MTCNN weights"),
        (("invert_eg3d", model, tmp_path / "nobody.png", *SHORT), "no photo at"),
        (
            ("invert_eg3d", model, tmp_path / "wide.png", *SHORT, "--camera", tmp_path / "me.npy"),
            "square crop, got 64x32",
        ),
        (("invert_eg3d", "fenerf_synthetic_64", photo, *SHORT), "is a fenerf model, expected an EG3D model"),
        (("invert_eg3d", tmp_path / "sizes.safetensors", photo, *SHORT), "weights do not fit the stored configuration"),
        (("invert_eg3d", tmp_path / "cut.pt", photo, *SHORT), "is a file of an original program"),
        (invert("--camera", tmp_path / "short.npy"), "expected 25 numbers.*got 24"),
        (invert("--camera", "1,2,3,4"), "expects 25 finite numbers .*got 4"),
        (invert("--camera", tmp_path / "far.npy"), "stands 5.4 from the head's centre, the model's 2.7"),
        (invert("--camera", tmp_path / "skewed.npy"), "holds no rotation"),
        (invert("--camera", tmp_path / "no.npy"), "no file or folder"),
        (invert("--preset", "ptt"), "no curriculum 'ptt'.*Did you mean 'pti'"),
        (invert("--set", "codes.stepps=3"), "unknown setting.*Did you mean 'steps'"),
        (invert("--tune-parts", "suprresolution"), "no part 'suprresolution'"),
        (invert("--perceptual", tmp_path / "other.pt"), "other.pt"),
        (invert("--identity", tmp_path / "other.pt", "--identity-weight", 1), "not ArcFace's IR-SE50"),
        (invert("--reconstruction-weight", 0), "all weights are 0"),
        (invert("--reconstruction-weight", "nan"), "'--reconstruction-weight': expected a finite number, got nan"),
        (invert("--sample-factor", "inf"), "'--sample-factor': expected a finite number, got inf"),
        (invert("--set", "codes.start_seed=-1"), "codes.start_seed must be 0 or more"),
        (invert("--num_steps", 3), "--num_steps is a flag of the original; here: --steps"),
        (relight(), "no light: expected --light"),
        (relight("--light", "rihgt", *LIGHT), "no light 'rihgt'.*Did you mean 'right'"),
        (relight("--light", "left", "--light-of", photo, *LIGHT), "two lights"),
        (relight("--light", "left", "--light-weight", 0), "nothing looks at it"),
        (relight("--light", "left", *LIGHT, "--domain", "cats"), "network for human faces"),
        (relight("--light", "left", *LIGHT, "--domain", "dogs"), "dogs"),
        (
            relight("--light", "left", "--light-weight", 1, "--light-network", tmp_path / "other.pt"),
            "not DPR's network",
        ),
        (
            relight("--light", "left", "--light-weight", 1, "--light-network", tmp_path / "cut.pt"),
            "damaged or holds more than tensors",
        ),
        (edit("--prompt", "  ", *TEXT), "the prompt is empty"),
        (edit(*TEXT), "Missing option '--prompt'"),
        (edit("--prompt", "a hat", "--text-weight", 1), "needs a diffusion model: give --diffusion FOLDER"),
        (edit("--prompt", "a hat", "--text-weight", 1, "--diffusion", tmp_path), "is incomplete: unet"),
        (
            edit("--prompt", "a hat", "--text-weight", 1, "--diffusion", tmp_path / "sd"),
            "no Stable Diffusion folder at",
        ),
        (edit("--prompt", "a hat", "--demo-diffusion"), "nothing reads it"),
        (edit("--prompt", "a hat", *TEXT, "--diffusion", tmp_path), "two diffusion models"),
        (edit("--prompt", "a hat", "--clip", tmp_path / "no.pt"), "no.pt"),
    ]
    for arguments, expected in cases:
        line = refused(*arguments, *out)
        assert re.search(expected, line), (expected, line)
        assert not (tmp_path / "out").exists(), expected


@pytest.mark.parametrize("light", [("--light", "right"), ("--light-of", "lamp")])
def test_a_photo_that_cannot_be_read_is_said_before_missing_weights(
    model: Path, tmp_path: Path, light: tuple[str, str]
) -> None:
    photo = crop(tmp_path)
    (tmp_path / "lamp").mkdir()
    lit = (light[0], crop(tmp_path / "lamp") if light[1] == "lamp" else light[1], "--light-weight", 1)
    missing = ("--light-network", tmp_path / "no.t7", "--out", tmp_path / "out")
    assert "no.t7" in refused("relight_facednerf", model, photo, *SHORT, *lit, *missing)
    photo.write_bytes(photo.read_bytes()[:300])
    assert "me.png" in refused("relight_facednerf", model, photo, *SHORT, *lit, *missing)
    assert not (tmp_path / "out").exists()


def test_a_photo_in_the_wild(model: Path, tmp_path: Path) -> None:
    """Through the photo doctor, with points from a file; the crop is the one that ships with its camera."""
    data = pytest.importorskip("skimage.data")
    from PIL import Image

    Image.fromarray(data.astronaut()).save(tmp_path / "astronaut.png")
    points = ("--landmarks", ASTRONAUT / "drawing.json")
    succeed("invert_eg3d", model, tmp_path / "astronaut.png", *points, *SHORT, "--out", tmp_path / "out")
    settings = Session(tmp_path / "out" / "astronaut").settings()
    np.testing.assert_allclose(settings["camera"], np.load(ASTRONAUT / "astronaut.npy"), atol=1e-6)
    target = read_picture(tmp_path / "out" / "astronaut" / "target.png").float()
    known = torch.nn.functional.interpolate(
        read_picture(ASTRONAUT / "astronaut.png").float()[None], (SIDE, SIDE), mode="area"
    )
    assert (target - known[0]).abs().mean() < 6


def test_names_of_folders() -> None:
    assert slug({"prompt": "It's `rm -rf /` & more", "light": "lights/sunset.yaml"}) == "it-s-rm-rf-more-sunset"
    assert slug({"light": "{ambient: 1}"}) == "light" and slug({}) == ""
    assert len(slug({"prompt": "a very " * 20})) <= 40


@pytest.mark.shared
@pytest.mark.parametrize("name", ["00018", "R", "cat"])
def test_crops_of_the_original(model: Path, tmp_path: Path, name: str) -> None:
    """EG3D crops with dataset.json beside them; R stands a little farther away, which is told."""
    folder = Path(os.environ["FACELAB_REAL_DATA"]) / "eg3d_portraits"
    domain = ("--domain", "cats") if name == "cat" else ()
    result = succeed("invert_eg3d", model, folder / f"{name}.png", *domain, *SHORT, "--out", tmp_path)
    labels = dict(json.loads((folder / "dataset.json").read_text())["labels"])
    metrics = json.loads((tmp_path / name / "metrics.json").read_text())
    np.testing.assert_allclose(metrics["camera"]["label"], labels[f"{name}.png"], atol=1e-5)
    assert ("stands 2.96 from" in result.stderr) == (name == "R")
