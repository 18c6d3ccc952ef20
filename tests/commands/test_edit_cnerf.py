# SPDX-License-Identifier: Apache-2.0
"""edit_cnerf: A's hair on B, mixes and new codes; what lies in the session folder is what the model shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import facelab
from facelab.cli.edit_cnerf import edit_cnerf
from facelab.data.regions import REGION_PALETTE
from facelab.generator import Codes
from facelab.inference.latent_files import read_codes, save_codes
from facelab.inference.sessions import read_camera, read_noise, save_camera, save_noise
from facelab.inference.video import read_video
from facelab.mesh.io import load_mesh
from facelab.methods.cnerf.editing import mix_region, resample_region, swap_region
from facelab.nn.stylegan2.noise import const_noise
from facelab.yaml_files import read_yaml
from tests.commands.running import succeed
from tests.commands.sdf_models import make_model

SMALL = ("--device", "cpu", "--yaws", "-0.3,0.3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("cnerf", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("cnerf_volume", tmp_path_factory.mktemp("models"))


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(edit_cnerf, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def edit(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def row(face: facelab.api.FaceModel, codes: Codes, *yaws: float) -> torch.Tensor:
    return torch.cat([face.render(codes, face.camera(yaw=yaw)).rgb for yaw in yaws])


def as_row(rgb: torch.Tensor) -> np.ndarray:
    """(V, 3, S, S) in [-1, 1] -> (S, V * S, 3) levels."""
    levels = ((rgb + 1) * 127.5 + 0.5).clamp(0, 255).floor()
    return torch.cat(list(levels), dim=-1).permute(1, 2, 0).int().numpy()


def same(a: Codes, b: Codes) -> bool:
    return set(a.values) == set(b.values) and all(torch.equal(v, b.values[n]) for n, v in a.values.items())


def test_the_hair_of_another(volume: Path, tmp_path: Path) -> None:
    out = tmp_path / "swap"
    result = edit(volume, "--head", 3, "--from", 7, "--regions", "hair", *SMALL, "--out", out)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    both = ("before", "after")
    assert names == {
        "settings.yaml", "sheet.png", "latents.safetensors", "latents/from.safetensors", "difference_after.png",
        *(f"{kind}{name}.png" for kind in ("", "segmentation_", "labels_") for name in both),
        *(f"latents/{name}.safetensors" for name in both),
    }  # fmt: skip
    face = facelab.load(volume)
    b, a = face.codes(3), face.codes(7)
    made = swap_region(b, a, "hair")
    assert same(read_codes(out, face.generator), made)
    assert same(read_codes(out / "latents" / "before.safetensors", face.generator), b)
    assert same(read_codes(out / "latents" / "from.safetensors", face.generator), a)
    before, after = row(face, b, -0.3, 0.3), row(face, made, -0.3, 0.3)
    assert np.abs(pixels(out / "before.png") - as_row(before)).max() <= 1
    assert np.abs(pixels(out / "after.png") - as_row(after)).max() <= 1
    difference = pixels(out / "difference_after.png")
    # the range 0..1 of the absolute difference, of which -1..1 can have 2
    expected = np.minimum(np.abs(as_row(after) - as_row(before)) * 2, 255)
    assert np.abs(difference - expected).max() <= 4 and difference.max() > 20
    changed = read_yaml(out / "settings.yaml")["edits"][0]["changed"]
    moved = ((after - before).abs() * 127.5 > 8).any(1)
    hair = sum(
        (pixels(out / f"segmentation_{name}.png") == REGION_PALETTE[7]).all(-1).astype(int) for name in both
    ).astype(bool)
    inside = torch.from_numpy(np.stack(np.split(hair, 2, axis=1)))
    assert changed["changed_pixels"] == int(moved.sum()) > 0
    assert changed["outside_share"] == pytest.approx(float((moved & ~inside).sum() / moved.sum()))
    assert changed["region_pixels"] == int(inside.sum()) and changed["pixels"] == 2 * 64
    assert f"{int(moved.sum())} pixels of 2 views changed" in result.stdout
    with Image.open(out / "labels_after.png") as labels:
        assert labels.mode == "P" and labels.size == (8, 8)
    assert pixels(out / "sheet.png").shape == (5 * 8, 2 * 8, 3)


def test_amounts_parts_and_codes_from_files(volume: Path, tmp_path: Path) -> None:
    face = facelab.load(volume)
    save_codes(tmp_path / "mine.safetensors", face.codes(1), "cnerf")
    save_codes(tmp_path / "session" / "latents.safetensors", face.codes(2), "cnerf")
    options = ("--head", tmp_path / "mine.safetensors", "--from", tmp_path / "session", "--regions", "eye,4")
    result = edit(volume, *options, "--amounts", "0,0.5,1", "--parts", "texture", *SMALL, "--out", tmp_path / "out")
    assert result.stderr.startswith("warning: regions by number: 4 = brow (CNeRF's README calls 4 mouth)")
    lines = result.stdout.splitlines()
    assert lines[0] == "after_0: no pixel of 2 views changed" and lines[-1] == str(tmp_path / "out")
    for amount in ("0", "0.5", "1"):
        stored = read_codes(tmp_path / "out" / "latents" / f"after_{amount}.safetensors", face.generator)
        assert same(stored, mix_region(face.codes(1), face.codes(2), ["eye", "brow"], float(amount), ["texture"]))
    assert np.array_equal(pixels(tmp_path / "out" / "after_0.png"), pixels(tmp_path / "out" / "before.png"))
    settings = read_yaml(tmp_path / "out" / "settings.yaml")
    assert settings["regions"] == ["eye", "brow"] and settings["parts"] == ["texture"]
    assert [e["amount"] for e in settings["edits"]] == [0.0, 0.5, 1.0]


def test_new_codes_of_the_background(volume: Path, tmp_path: Path) -> None:
    options = ("--head", 1, "--resample", "4-5", "--regions", "background", "--psi", 0.9)
    result = edit(volume, *options, *SMALL, "--out", tmp_path)
    assert result.stderr.count("warning:") == 1 and "also drive the base shape" in result.stderr
    face = facelab.load(volume)
    for seed in (4, 5):
        stored = read_codes(tmp_path / "latents" / f"after_seed{seed}.safetensors", face.generator)
        with pytest.warns(UserWarning, match="base shape"):
            expected = resample_region(face.generator, face.codes(1, 0.9), "background", seed, 0.9)
        assert same(stored, expected)
    assert not np.array_equal(pixels(tmp_path / "after_seed4.png"), pixels(tmp_path / "after_seed5.png"))


def test_film_and_meshes(model: Path, tmp_path: Path) -> None:
    options = ("--head", 0, "--from", 1, "--regions", "hair,face,neck", "--amounts", "0.5,1", "--num-frames", 2)
    edit(model, *options, *SMALL, "--video", "--mesh", "ply", "--voxel-resolution", 10, "--out", tmp_path)
    frames = list(read_video(tmp_path / "edit.mp4"))
    assert [frame.shape for frame in frames] == [(16, 4 * 16, 3)] * 4  # two heads, each with its segmentation
    meshes = [load_mesh(tmp_path / f"{name}.ply") for name in ("before", "after_0.5", "after_1")]
    assert all(len(mesh.faces) for mesh in meshes)
    face = facelab.load(model)
    expected = face.extract_mesh(code=read_codes(tmp_path, face.generator), resolution=10)
    np.testing.assert_allclose(meshes[2].vertices, expected.vertices, atol=1e-6)


def test_inverted_heads_keep_noise_and_camera(model: Path, tmp_path: Path) -> None:
    face = facelab.load(model)
    session = tmp_path / "photo"
    with torch.no_grad():
        for block in face.generator.decoder.blocks:
            block.conv1.noise_strength.fill_(1.0)
    noisy = face.save(tmp_path / "noisy.safetensors")
    save_codes(session / "latents.safetensors", face.codes(5), "cnerf")
    save_noise(session, {name: value + 1 for name, value in const_noise(face.generator.decoder).items()})
    save_camera(session, face.camera(yaw=0.2, pitch=0.1))
    face.save(session / "generator.safetensors")
    out = tmp_path / "out"
    result = edit(noisy, "--head", session, "--from", 1, "--regions", "face", *SMALL, "--out", out)
    assert "note: this head has a model tuned to its photo" in result.stderr
    found = facelab.load(noisy).with_noise(read_noise(session, face.generator))
    rgb = torch.cat(
        [
            found.render(found.codes(5), camera).rgb
            for camera in (face.camera(yaw=0.2, pitch=0.1), face.camera(yaw=-0.3))
        ]
    )
    before = pixels(out / "before.png")
    assert before.shape == (16, 3 * 16, 3) and np.abs(before[:, :32] - as_row(rgb)).max() <= 1
    plain = facelab.load(noisy).render(face.codes(5), face.camera(yaw=0.2, pitch=0.1)).rgb
    assert np.abs(before[:, :16] - as_row(plain)).max() > 5
    camera = read_camera(out)  # goes on with the edited head
    assert camera is not None and torch.allclose(camera.label(), face.camera(yaw=0.2, pitch=0.1).label())
    assert read_noise(out, face.generator).keys() == read_noise(session, face.generator).keys()
    succeed("render_images", noisy, "--latents", out, "--yaws", "0.3", "--layers", "image", "--device", "cpu",
            "--psi", 1, "--out", tmp_path / "again")  # fmt: skip
    assert np.array_equal(pixels(tmp_path / "again" / "grid_latents.png"), pixels(out / "after.png")[:, 32:])
    quiet = edit(session / "generator.safetensors", "--head", session, "--from", 1, "--regions", "face", *SMALL,
                 "--out", tmp_path / "tuned")  # fmt: skip
    assert "note:" not in quiet.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from", 1), "Missing option '--regions'; see --help"),
        (("--regions", "hair"), "an edit takes a head to take regions --from or seeds to --resample"),
        (("--regions", "hair", "--from", 1, "--resample", 2), "an edit takes a head to take regions --from or seeds"),
        (("--regions", "hiar", "--from", 1), "unknown region 'hiar', expected background, face"),
        (("--regions", "hair", "--from", "nothing"), "no codes at nothing: expected"),
        (("--regions", "hair", "--from", 1, "--parts", "textur"), "unknown part 'textur', expected shape"),
        (("--regions", "hair", "--from", 1, "--parts", ","), "no part chosen"),
        (("--regions", "hair", "--from", 1, "--amounts", "half"), "--amounts takes numbers such as 0,0.5,1"),
        (("--regions", "hair", "--from", 1, "--amounts", "nan"), "--amounts takes numbers such as 0,0.5,1"),
        (("--regions", "hair", "--resample", "x"), "--resample: expected numbers and ranges"),
        (("--regions", "hair", "--resample", "0-99"), "at most 64 edits at a time, got 100"),
        (("--regions", "hair", "--resample", 1, "--amounts", "1"), "--amounts is how far to go"),
        (("--regions", "hair", "--from", 1, "--mesh", "stl"), "unknown format 'stl', expected"),
        (("--regions", "hair", "--from", 1, "--level", 0.1), "--level is for shapes, expected --mesh ply"),
        (("--regions", "hair", "--from", 1, "--views", "row", "--yaws", "0"), "--views row has its own angles"),
        (("--regions", "hair", "--from", 1, "--image-size", 4), "the decoder of this cnerf model reads"),
        (("--regions", "hair", "--from", 1, "--truncation-cutoff", 2), "a cnerf model has one code for all layers"),
    ],
)
def test_refusals(arguments: tuple, message: str, model: Path, tmp_path: Path) -> None:
    failed = run(model, *arguments, "--device", "cpu", "--out", tmp_path / "out")
    assert failed.exit_code == 2 and failed.stderr.startswith(f"error: {message}"), failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.png"))


def test_the_next_edit_in_a_folder_leaves_nothing_of_the_last(model: Path, tmp_path: Path) -> None:
    """Noise and camera of one photo are not given to another head, meshes of one head do not lie beside another's."""
    face, photo, out = facelab.load(model), tmp_path / "photo", tmp_path / "out"
    save_codes(photo / "latents.safetensors", face.codes(5), "cnerf")
    save_noise(photo, const_noise(face.generator.decoder))
    save_camera(photo, face.camera(yaw=0.2))
    small = ("--regions", "hair", *SMALL, "--out", out)
    edit(model, "--head", photo, "--resample", "3,4", "--mesh", "ply", "--voxel-resolution", 10, *small)
    (out / "notes.txt").write_text("mine")
    edit(model, "--head", 0, "--from", 1, *small)
    assert read_camera(out) is None and not read_noise(out, face.generator)
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    edit(model, "--head", 0, "--from", 1, *small[:-1], tmp_path / "fresh")
    fresh = sorted(
        str(path.relative_to(tmp_path / "fresh")) for path in (tmp_path / "fresh").rglob("*") if path.is_file()
    )
    assert found == sorted([*fresh, "notes.txt"])
    for head in (out / "latents.safetensors", out / "latents" / "before.safetensors"):
        failed = run(model, "--head", head, "--from", 1, *small)
        assert failed.exit_code == 2 and "is the session that is edited" in failed.stderr


def test_what_exists_is_not_overwritten(model: Path, volume: Path, tmp_path: Path) -> None:
    face = facelab.load(model)
    save_codes(tmp_path / "two.safetensors", Codes.cat([face.codes(0), face.codes(1)]), "cnerf")
    save_codes(tmp_path / "mine" / "latents.safetensors", face.codes(0), "cnerf")
    (tmp_path / "photo").mkdir()
    (tmp_path / "photo" / "settings.yaml").write_text("command: invert_cnerf\n")
    options = (model, "--regions", "hair", *SMALL)
    for arguments, message in (
        (("--head", tmp_path / "mine", "--from", 1, "--out", tmp_path / "mine"), "is the session that is edited"),
        (("--from", 1, "--out", tmp_path / "photo"), "holds the session of another command"),
        (("--head", tmp_path / "two.safetensors", "--from", 1), "holds 2 heads, expected one"),
        (
            ("--head", tmp_path / "mine", "--from", 1, "--double-truncation"),
            "--double-truncation is for codes of seeds",
        ),
    ):
        failed = run(*options, "--out", tmp_path / "out", *arguments)
        assert failed.exit_code == 2 and message in failed.stderr, failed.stderr
    other = run("fenerf_synthetic_64", "--regions", "hair", "--from", 1, "--device", "cpu", "--out", tmp_path / "x")
    assert other.exit_code == 2 and "heads of a fenerf model are not composed of regions" in other.stderr
