# SPDX-License-Identifier: Apache-2.0
"""Bad input gives one line that says what, expected and remedy; exit status 2; no traceback; nothing half done."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from facelab.checkpoints import tensor_files
from facelab.checkpoints.format import list_checkpoints, load_checkpoint
from facelab.data.transforms import CROP
from facelab.methods import load_method
from tests.commands.running import DEBUG, GENERATOR, ORIGINALS, QUIET, invoke, script, succeed, train
from tests.data.pictures import blocky_mask, write_pairs

IMAGES, MASKS = "celebahq_mask_img", "celebahq_mask_mask"
PICKLE_MARK = "executed_by_a_pickle"


@dataclass
class Place:
    """Where a row may put things, and the trained models it may spoil copies of."""

    folder: Path
    fenerf: Path
    pigan: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def pairs(self, spoil: Callable[[Path], Any] = lambda root: None, **options: Any) -> Path:
        root = write_pairs(self.folder / "pairs", **options)
        spoil(root)
        return root

    def copy(self, run: Path, spoil: Callable[[Path], Any]) -> Path:
        copied = Path(shutil.copytree(run, self.folder / "copy"))
        spoil(copied)
        return copied

    def file(self, name: str = "file", content: bytes = b"a file") -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path


Row = tuple[str, Callable[[Place], list[Any]], tuple[str, ...]]


def fenerf(*arguments: Any) -> list[Any]:
    return ["train_fenerf", *DEBUG, *arguments]


def setting(text: str) -> Callable[[Place], list[Any]]:
    return lambda p: fenerf("--out", p.out, "--set", text)


def data(spoil: Callable[[Path], Any]) -> Callable[[Place], list[Any]]:
    return lambda p: fenerf("--out", p.out, "--data", p.pairs(spoil))


def model(command: str, *arguments: Any) -> Callable[[Place], list[Any]]:
    return lambda p: [command, p.fenerf, "--out", p.out, *arguments]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def save_mask(root: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(root / MASKS / "00001.png")


def value_37(root: Path) -> None:
    mask = blocky_mask(40, 40)
    mask[3, 4] = 37
    save_mask(root, mask)


class Evil:
    """What a hostile file would run when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def hostile(place: Place) -> Path:
    evil = Evil(place.folder / PICKLE_MARK)
    assert pickle.loads(pickle.dumps(evil)) == 0  # noqa: S301  the trap works ...
    (place.folder / PICKLE_MARK).unlink()  # ... and is set again
    path = place.folder / "generator.pth"
    torch.save(evil, path)
    return path


def discriminator_file(place: Place) -> Path:
    """An original discriminator: its key names, in a state dict."""
    shapes = {"layers.5.network.0.weight": (8, 8, 3, 3), "fromRGB.0.model.0.weight": (8, 3, 1, 1)}
    path = place.folder / "discriminator.pth"
    torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    return path


def other_latents(place: Place) -> Path:
    """Codes of a wider model, written by the command itself."""
    wide = train(place.folder / "wide", "--set", "model.hidden=24", "--max-steps", 1)
    succeed("render_images", wide, "--seeds", 0, "--layers", "depth", "--save-latents", "--out", place.folder / "codes")
    return place.folder / "codes" / "codes_0.safetensors"


DATA: list[Row] = [
    (
        "missing data folder",
        lambda p: fenerf("--out", p.out, "--data", p.folder / "nothing"),
        ("no data set at", "nothing", "expected celebahq_mask_img/", "got no such folder", "prepare_data.py"),
    ),
    (
        "counts differ",
        data(lambda root: (root / MASKS / "00001.png").unlink()),
        ("3 pictures but 2 masks", "expected as many", "00001.jpg", "add or remove it"),
    ),
    (
        "truncated jpg",
        data(lambda root: cut(root / IMAGES / "00001.jpg")),
        ("00001.jpg", "expected a picture", "damaged", "replace it"),
    ),
    ("mask value 37", data(value_37), ("00001.png", "mask value 37", "expected class numbers 0..18", "save masks as")),
    (
        "RGB mask of other colours",
        data(lambda root: save_mask(root, np.full((40, 40, 3), (1, 2, 3), np.uint8))),
        ("00001.png", "expected a single-channel mask", "1,2,3", "convert it"),
    ),
    (
        "pi-GAN pictures missing",
        lambda p: ["train_pigan", *DEBUG, "--out", p.out, "--data", p.folder / "*.jpg"],
        ("no pictures at", "*.jpg", "expected files ending in", "check the path"),
    ),
]

SETTINGS: list[Row] = [
    (
        "curriculum misspelt",
        lambda p: ["train_fenerf", *QUIET, "--curriculum", "celebamask_hq_182", "--out", p.out],
        ("no curriculum 'celebamask_hq_182'", "Did you mean 'celebamask_hq_128'?", "debug"),
    ),
    ("setting misspelt", setting("rendr.near=1"), ("unknown setting 'rendr'", "Did you mean 'render'?")),
    ("inner name misspelt", setting("render.neer=1"), ("unknown setting 'render.neer'", "Did you mean 'near'?")),
    ("not a number", setting("render.near=abc"), ("render.near expects float", "got 'abc'")),
    ("near behind far", setting("render.near=1.2"), ("render", "0 < near < far", "near=1.2, far=1.12")),
    ("resolution no power of two", setting("render.resolution=48"), ("render.resolution", "48 px", "[2, 4, 8, 16] px")),
    ("resolution too large", setting("render.resolution=64"), ("render.resolution", "64 px", "[2, 4, 8, 16] px")),
    (
        "one of a few words",
        setting("render.density=elu"),
        ("render.density expects one of 'relu', 'softplus'", "'elu'"),
    ),
    ("unknown precision", setting("render.precision=fp8"), ("render.precision expects one of", "'autocast'", "'fp8'")),
    ("unknown pose prior", setting("camera.distribution=gausian"), ("camera.distribution expects", "'gaussian'")),
    ("unknown variant", setting("model.variant=SIRENBASELINE"), ("model.variant 'SIRENBASELINE'", "Did you mean")),
    ("unknown code", setting("loss.latent.z_goe=1"), ("loss.latent.z_goe", "z_geo, z_app", "Did you mean 'z_geo'?")),
    ("momentum of one", setting("optim.betas=[0,1]"), ("optim.betas must be 0 or more and below 1", "got (0.0, 1.0)")),
    ("batch and chunk", setting("train.batch_chunk=3"), ("a batch of 4 in chunks of 3", "multiple of 3", "change")),
    ("environment in a setting", setting("data.path=${oc.env:HOME}"), ("is refused", "write the value itself")),
    ("option misspelt", lambda p: fenerf("--curiculum", "x"), ("--curiculum", "--curriculum", "--help")),
    ("number expected", lambda p: fenerf("--max-steps", "many"), ("--max-steps", "'many'", "integer")),
    (
        "three GPUs",
        lambda p: ["train_fenerf", "--curriculum", "debug", "--gpus", 3, "--out", p.out],
        ("--gpus 3", "0 usable CUDA GPUs", "use --device cpu --processes N"),
    ),
]

FILES: list[Row] = [
    (
        "a checkpoint cut in half",
        lambda p: [
            "render_images",
            p.copy(p.fenerf, lambda run: cut(run / "checkpoints" / "00000002" / "ema.safetensors")),
            *("--out", p.out),
        ],
        ("ema.safetensors is damaged", "expected", "bytes, got", "use an earlier checkpoint"),
    ),
    (
        "resume from one cut in half",
        lambda p: fenerf(
            *("--resume", "auto", "--max-steps", 3, "--out"),
            p.copy(p.fenerf, lambda run: cut(run / "checkpoints" / "00000002" / "state.safetensors")),
        ),
        ("state.safetensors is damaged", "bytes, got", "use an earlier checkpoint"),
    ),
    (
        "an original cut in half",
        lambda p: ["convert_checkpoint", "auto", p.file("cut.pth", GENERATOR.read_bytes()[:9000]), p.out],
        ("cut.pth was not read", "cut off or damaged", "download it again"),
    ),
    (
        "a pickle that calls os.system",
        lambda p: ["convert_checkpoint", "fenerf", hostile(p), p.out],
        ("generator.pth was not read", "system", "not on the allow-list", "nothing of it was run"),
    ),
    (
        "fine-tuning from that pickle",
        lambda p: fenerf("--init-from", hostile(p), "--out", p.out),
        ("generator.pth was not read", "system", "nothing of it was run"),
    ),
    (
        "rendering that pickle",
        lambda p: ["render_images", hostile(p), "--out", p.out],
        ("is a file of an original program", "expected a facelab checkpoint", "convert_checkpoint.py"),
    ),
    (
        "the averages instead of the generator",
        lambda p: ["convert_checkpoint", "auto", ORIGINALS / "fenerf" / "checkpoint_fixture_ema.pth", p.out],
        ("checkpoint_fixture_ema.pth", "expected a generator", "got ExponentialMovingAverage"),
    ),
    (
        "a discriminator",
        lambda p: ["convert_checkpoint", "auto", discriminator_file(p), p.out],
        ("not those of a pi-GAN or FENeRF generator", "'layers.5.network.0.weight'", "is this a discriminator"),
    ),
    (
        "another method's file",
        lambda p: ["convert_checkpoint", "pigan", GENERATOR, p.out],
        ("is a fenerf generator, not pigan", "convert_checkpoint fenerf"),
    ),
    (
        "unknown method",
        lambda p: ["convert_checkpoint", "stylegan", GENERATOR, p.out],
        ("'stylegan'", "'pigan'", "'fenerf'", "--help"),
    ),
    (
        "no such model",
        lambda p: ["render_images", p.fenerf.parent / "fenref", "--out", p.out],
        ("no checkpoint at", "fenref", "check the path", "Did you mean 'fenerf'?"),
    ),
    (
        "latents of another model",
        lambda p: ["render_images", p.fenerf, "--latents", other_latents(p), "--out", p.out],
        ("codes_0.safetensors does not fit", "expected codes 'geo' of shape", "2, 192", "another model"),
    ),
    (
        "a run of another method",
        lambda p: fenerf("--init-from", p.pigan, "--out", p.out),
        ("is a pigan model, which cannot start a fenerf run",),
    ),
    (
        "resume with another configuration",
        lambda p: fenerf("--resume", "auto", "--out", p.fenerf, "--set", "loss.r1=3"),
        ("resume with another configuration", "loss.r1 was 0.2, now 3.0", "--allow-config-change"),
    ),
    (
        "a fresh run in an old folder",
        lambda p: fenerf("--out", p.fenerf),
        ("holds a run that reached step 2", "--resume auto", "another folder"),
    ),
]

RENDERING: list[Row] = [
    (
        "unknown trajectory",
        model("render_video", "--trajectory", "frnt"),
        ("unknown trajectory 'frnt'", "orbit", "CNeRF models also stylesdf, stylesdf_level", "Did you mean 'front'?"),
    ),
    ("unknown layer", model("render_images", "--layers", "imge"), ("unknown layer 'imge'", "Did you mean 'image'?")),
    ("unknown format", model("extract_mesh", "--format", "plx"), ("unknown format 'plx'", "Did you mean 'ply'?")),
    ("no format", model("extract_mesh", "--format", ","), ("no format chosen", "ply, obj, glb, mrc")),
    ("no seeds", model("render_images", "--seeds", ""), ("--seeds", "expected numbers and ranges", "0,3,8-11")),
    ("seeds backwards", model("render_images", "--seeds", "3-1"), ("--seeds", "got '3-1'")),
    ("unknown interpolation", model("render_video", "--latent-type", "goe"), ("'goe'", "'geo', 'app', 'both', 'non'")),
    ("no field of view", model("render_video", "--fov", 0), ("field of view", "0..180 degrees")),
    (
        "unknown fill colour",
        model("render_images", "--fill-color", "gray"),
        ("unknown fill colour 'gray'", "light_grey", "Did you mean 'grey'?"),
    ),
    (
        "fill colour of pi-GAN",
        lambda p: ["render_images", p.pigan, "--fill-color", "white", "--out", p.out],
        ("pigan model leaves empty rays as they are", "no fill colour"),
    ),
    ("unknown weights", model("render_images", "--weights", "emma"), ("no weights 'emma'", "ema, generator")),
    ("a GPU that is not there", model("render_images", "--device", "cuda:7"), ("cuda:7", "use --device cpu")),
    (
        "no surface",
        model("extract_mesh", "--voxel-resolution", 8, "--level", 1e9),
        ("no surface at level 1e+09", "the field goes from", "choose a level between"),
    ),
    (
        "masks of pi-GAN",
        lambda p: ["render_images", p.pigan, "--layers", "image,mask", "--out", p.out],
        ("pigan model has no labels", "no mask", "use image, depth, normals"),
    ),
    (
        "geometry code of pi-GAN",
        lambda p: ["render_video", p.pigan, "--latent-type", "geo", "--out", p.out],
        ("--latent-type geo", "one code for all", "use both or non"),
    ),
]

FOLDERS: list[Row] = [
    (
        f"{command[0]} into a file",
        lambda p, command=command: [
            *command,
            *(() if command[0].startswith("train") else (p.fenerf,)),
            "--out",
            p.file(),
        ],
        ("cannot write", "a file stands where a folder is needed", "choose another output folder"),
    )
    for command in (["train_fenerf", *DEBUG], ["render_images"], ["render_video", "--num-frames", 1], ["extract_mesh"])
] + [
    (
        "conversion of an own run",
        lambda p: ["convert_checkpoint", "fenerf", p.fenerf, p.out],
        ("is a run of facelab", "needs no conversion", "python scripts/export_model.py"),
    ),
    (
        "conversion of an own checkpoint",
        lambda p: ["convert_checkpoint", "auto", list_checkpoints(p.fenerf)[-1], p.out],
        ("is a run of facelab", "needs no conversion", "python scripts/export_model.py"),
    ),
    (
        "conversion of a folder",
        lambda p: ["convert_checkpoint", "auto", p.folder, p.out],
        ("is a folder, expected a file of an original program",),
    ),
    (
        "conversion of an own model",
        lambda p: ["convert_checkpoint", "auto", "fenerf_synthetic_64", p.out],
        ("expected a .pth, .pt or .pkl of an original program", "needs no conversion"),
    ),
    (
        "convert_checkpoint below a file",
        lambda p: ["convert_checkpoint", "auto", GENERATOR, p.file() / "models"],
        ("cannot write", "a file stands where a folder is needed", "choose another output folder"),
    ),
]

ROWS = DATA + SETTINGS + FILES + RENDERING + FOLDERS


@pytest.mark.parametrize(("arguments", "said"), [r[1:] for r in ROWS], ids=[r[0].replace(" ", "_") for r in ROWS])
def test_bad_input_is_one_line(
    arguments: Callable[[Place], list[Any]],
    said: tuple[str, ...],
    tmp_path: Path,
    fenerf_run: Path,
    pigan_run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    place = Place(tmp_path, fenerf_run, pigan_run)
    command, *options = arguments(place)
    result = invoke(command, *options)
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2, (result.exit_code, lines)
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for words in said:
        assert words in lines[0]
    assert "Traceback" not in result.output
    assert not (place.folder / PICKLE_MARK).exists()
    assert not place.out.exists() or not any(p.is_file() for p in place.out.rglob("*"))


def test_a_script_fails_without_a_traceback(tmp_path: Path) -> None:
    """The way out of a real process: status, one line on stderr, nothing on stdout."""
    done = script("train_fenerf", "--curriculum", "debgu", "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: fenerf has no curriculum 'debgu'. Did you mean 'debug'?")
    assert done.stderr.count("\n") == 1


def test_spawned_processes_tell_it_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    done = script("train_fenerf", "--curriculum", "debug", "--device", "cpu", "--processes", 2, "--out", out)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: cannot write {out}: a file stands where a folder is needed; choose another output folder"
    )


def test_oblong_small_pictures_work(tmp_path: Path) -> None:
    """100 x 80 pixels are no mistake: the middle square is taken."""
    result = succeed("train_fenerf", *DEBUG, "--data", write_pairs(tmp_path / "set", size=(100, 80)), "--out", tmp_path)
    assert "data: 3 samples, smallest 100 x 80 px, 3 decoded as a check" in result.stdout
    assert load_checkpoint(tmp_path).step == 2 and 80 * CROP >= 8


def test_pictures_smaller_than_the_samples_are_noted(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="smaller than 8 px"):
        result = succeed(
            "train_fenerf", *DEBUG, "--data", write_pairs(tmp_path / "set", size=(6, 6)), "--out", tmp_path
        )
    assert "data: some pictures are smaller than 8 px and are enlarged" in result.stdout


@pytest.mark.parametrize("kind", ["checkpoint", "pointer", "picture", "model"])
def test_full_disk_is_one_line_and_leaves_what_was_there(
    kind: str, tmp_path: Path, fenerf_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(fenerf_run, tmp_path / "run"))
    before = load_checkpoint(run)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if kind in ("checkpoint", "model"):
        monkeypatch.setattr(tensor_files, "write_file", full)
    else:
        monkeypatch.setattr("facelab.files._flush_to_disk", full)
    if kind in ("checkpoint", "pointer"):
        result = invoke("train_fenerf", *DEBUG, "--out", run, "--resume", "auto", "--max-steps", 4)
    elif kind == "picture":
        result = invoke("render_images", run, "--seeds", 0, "--out", tmp_path / "out")
    else:
        result = invoke("convert_checkpoint", "auto", GENERATOR, tmp_path / "out")
    monkeypatch.undo()
    assert result.exit_code == 2 and "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "cannot write" in errors[0] and "the disk is full; free some space" in errors[0]
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    after = load_checkpoint(run)
    if kind != "pointer":
        assert after.step == before.step == 2
        assert all(torch.equal(v, before.weights["generator"][k]) for k, v in after.weights["generator"].items())
    succeed("train_fenerf", *DEBUG, "--out", run, "--resume", "auto", "--max-steps", 4)
    assert load_checkpoint(run).step == 4


KILLED = """
import os, signal, sys
from facelab.checkpoints import tensor_files
from tests.commands.running import DEBUG, COMMANDS

written, write_file = 0, tensor_files.write_file

def write_and_die(path, chunks):
    global written
    written += ".00000002." not in str(path)
    if written == 3:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return write_file(path, chunks)

tensor_files.write_file = write_and_die
COMMANDS["train_fenerf"]([*DEBUG, "--out", sys.argv[1], "--max-steps", "4"])
"""


def test_kill_9_in_the_middle_of_a_save(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "--max-steps", 4)
    killed = tmp_path / "killed"
    done = script("", killed, code=KILLED)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name for p in list_checkpoints(killed)] == ["00000002"]
    assert any(p.name.startswith(".00000004") for p in (killed / "checkpoints").iterdir())
    train(killed, "--max-steps", 4, "--resume", "auto")
    ours, expected = load_checkpoint(killed), load_checkpoint(whole)
    assert ours.step == expected.step == 4
    for group, tensors in expected.weights.items():
        assert all(torch.equal(v, ours.weights[group][k]) for k, v in tensors.items()), group
    assert not [p.name for p in (killed / "checkpoints").iterdir() if p.name.startswith(".")]


def test_archives_are_no_pickles_in_disguise(tmp_path: Path) -> None:
    """A zip archive with a name that promises a checkpoint, and nothing in it."""
    with zipfile.ZipFile(tmp_path / "generator.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    result = invoke("convert_checkpoint", "auto", tmp_path / "generator.pth", tmp_path / "out")
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "generator.pth" in result.stderr


def test_variants_of_pigan_are_not_fenerfs() -> None:
    """The table names what belongs elsewhere, so that a copied line is understood."""
    result = invoke("train_fenerf", *DEBUG, "--dry-run", "--set", "model.variant=TALLSIREN")
    assert "model.variant 'TALLSIREN' belongs to another method" in result.stderr
    assert set(load_method("fenerf").variants).isdisjoint(load_method("pigan").variants)
