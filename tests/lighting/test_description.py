# SPDX-License-Identifier: Apache-2.0
"""Lights as users write them, panoramas, and one clear line for each mistake."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facelab import lighting
from facelab.errors import UserError
from facelab.lighting.environment import read_radiance


def main(light: torch.Tensor) -> torch.Tensor:
    return lighting.main_direction(light[None])[0]


# ---------------------------------------------------------------- descriptions


def test_each_form_is_the_function_that_it_names() -> None:
    read = lighting.light_from_yaml
    lamp = read({"direction": [2, 0, 2], "strength": 0.5})
    half = math.sqrt(0.5)
    torch.testing.assert_close(lamp, lighting.directional(torch.tensor([[half, 0, half]]), 0.5)[0])
    soft = read({"azimuth_degrees": 30, "elevation_degrees": -10, "sharpness": 2, "intensity": 0.7})
    torch.testing.assert_close(soft, lighting.lobe(math.radians(30), math.radians(-10), 2.0, 0.7)[0])
    torch.testing.assert_close(read({"ambient": 0.3}), lighting.ambient(0.3)[0])
    torch.testing.assert_close(read({"preset": "left", "scale": 2}), 2 * lighting.preset("left"))
    total = read({"sum": [{"ambient": 0.3}, {"sum": [{"preset": "left"}, {"ambient": 0.1}]}]})
    torch.testing.assert_close(total, lighting.preset("left") + lighting.ambient(0.4)[0])
    assert all(light.shape == (9,) and light.dtype == torch.float32 for light in (lamp, soft, total))


def test_nine_numbers_in_each_frame() -> None:
    numbers = [0.8, -0.2, 0.3, 0.1, 0.05, -0.1, 0.07, 0.02, -0.03]
    given = torch.tensor([numbers])
    plain = lighting.light_from_yaml({"numbers": numbers})
    torch.testing.assert_close(lighting.to_dpr(plain[None]), given, atol=1e-6, rtol=0)
    torch.testing.assert_close(lighting.light_from_yaml({"numbers": numbers, "frame": "facelab"}), given[0])
    phase = lighting.light_from_yaml({"numbers": numbers, "frame": "dpr_phase", "scale": 0.7})
    torch.testing.assert_close(lighting.to_dpr(phase[None]), 0.7 * lighting.switch_phase(given), atol=1e-6, rtol=0)


def test_what_follows_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [0.8, -0.2, 0.3, 0.1, 0.05, -0.1, 0.07, 0.02, -0.03]
    expected = lighting.light_from_yaml({"numbers": numbers})
    read = lighting.light_from_text
    torch.testing.assert_close(read("right"), lighting.preset("right"))
    torch.testing.assert_close(read("{direction: [1, 0, 0]}"), lighting.directional(torch.tensor([[1.0, 0, 0]]))[0])
    torch.testing.assert_close(read(", ".join(map(str, numbers))), expected)
    torch.testing.assert_close(read(" ".join(map(str, numbers))), expected)
    (tmp_path / "dpr.txt").write_text("".join(f"{n:.18e}\n" for n in numbers))
    np.save(tmp_path / "nine.npy", np.array(numbers)[None])
    (tmp_path / "light.yaml").write_text("sum:\n- {numbers: dpr.txt}\n- ambient: 2e-1  # a little more\n")
    torch.testing.assert_close(read(str(tmp_path / "dpr.txt")), expected)
    torch.testing.assert_close(read(str(tmp_path / "nine.npy")), expected)
    monkeypatch.chdir("/")  # files are looked up beside the YAML file
    torch.testing.assert_close(read(str(tmp_path / "light.yaml")), expected + lighting.ambient(0.2)[0])


@pytest.mark.parametrize(
    "entry, words",
    [
        ({}, "expected a mapping with one of direction"),
        ({"direktion": [1, 0, 0]}, "unknown key 'direktion'.*Did you mean 'direction'"),
        ({"strength": 1}, "exactly one of .*got none of them"),
        ({"ambient": 1, "preset": "left"}, "got ambient and preset; add lights with 'sum'"),
        ({"ambient": 1, "strength": 2}, "'strength' does not go with 'ambient', which takes nothing"),
        ({"direction": [1, 0]}, "direction: expected 3 finite numbers"),
        ({"direction": [1, 0, math.nan]}, "expected 3 finite numbers"),
        ({"direction": [0, 0, 0]}, "direction has no length"),
        ({"direction": [1, 0, 0], "strength": "much"}, "strength must be a finite number, got 'much'"),
        ({"ambient": True}, "ambient must be a finite number"),
        ({"azimuth_degrees": 0, "sharpness": 0}, "sharpness must be at least 0.5, got 0"),
        ({"preset": "abvoe"}, "no light named 'abvoe'"),
        ({"numbers": [1, 2]}, "numbers: expected 9 finite numbers"),
        ({"numbers": [1] * 9, "frame": "dprr"}, "frame must be one of dpr, .*Did you mean 'dpr'"),
        ({"numbers": "none.txt"}, "no file none.txt"),
        ({"numbers": "none.csv"}, "expected a .txt or .npy file"),
        ({"environment": "none.hdr"}, "no panorama at none.hdr"),
        ({"sum": []}, "sum expects a list of lights"),
        ({"sum": [{"ambient": 1}, {"ambiant": 1}]}, r"sum\[1\]: unknown key 'ambiant'"),
    ],
)
def test_mistakes_are_one_line(entry: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        lighting.light_from_yaml(entry)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "text, words",
    [
        ("rihgt", "no light 'rihgt'.*Did you mean 'right'"),
        ("1,2,3", "expected 9 finite numbers"),
        ("{direction: [1", "not valid YAML"),
        ("{a: &x 1, b: *x}", "not valid YAML"),
        ("none.yaml", "none.yaml does not exist"),
        ("none.exr", "no panorama at none.exr"),
        ("!!python/object:os.system", "no light"),
        ("", "no light ''"),
    ],
)
def test_mistakes_after_the_option_are_one_line(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        lighting.light_from_text(text)
    assert "\n" not in str(error.value)


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("a b c")
    (tmp_path / "eight.txt").write_text("1 2 3 4 5 6 7 8")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for name, words in (("words.txt", "nine numbers"), ("eight.txt", "9 finite"), ("objects.npy", "nine numbers")):
        with pytest.raises(UserError, match=f"{name}.*{words}"):
            lighting.light_from_text(str(tmp_path / name))
    deep: dict = {"ambient": 1}
    for _ in range(30):
        deep = {"sum": [deep]}
    with pytest.raises(UserError, match="at most 20 deep"):
        lighting.light_from_yaml(deep)


# ---------------------------------------------------------------- panoramas


def test_an_even_panorama_is_even_light() -> None:
    light = lighting.environment_light(torch.full((3, 32, 64), 0.7))
    torch.testing.assert_close(light, 0.7 * lighting.ambient(1.0)[..., None].expand(1, 9, 3), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "row, column, towards",
    [
        (16, 32, (0, 0, -1)),  # the middle: behind the head
        (16, 48, (1, 0, 0)),  # right of it: the viewer's right
        (16, 0, (0, 0, 1)),  # the seam: in front
        (0, 5, (0, 1, 0)),  # the top
    ],
)
def test_a_bright_spot_lights_from_where_it_stands(row: int, column: int, towards: tuple[int, int, int]) -> None:
    panorama = torch.zeros(3, 32, 64)
    panorama[:, row, column] = 100.0
    light = lighting.grey(lighting.environment_light(panorama))[0]
    assert float(main(light) @ torch.tensor(towards).float()) > 0.98
    # the same as a directional lamp, up to its strength
    shape = lighting.directional(main(light)[None])[0]
    torch.testing.assert_close(light / light[0], shape / shape[0], atol=1e-4, rtol=0)


def test_turning_moves_what_was_behind_to_the_right_and_no_lamp_is_lost_in_a_large_panorama() -> None:
    panorama = torch.zeros(3, 300, 600)
    panorama[1, 145:155, 295:305] = 5.0
    light = lighting.environment_light(panorama, turn=math.pi / 2)
    assert float(main(light[0, :, 1]) @ torch.tensor([1.0, 0, 0])) > 0.99 and not light[..., 0].any()
    angle = 10 / 600 * 2 * math.pi  # of the lamp's sides: a small lamp of light 5 behind the head
    assert float(light[0, 0, 1]) == pytest.approx(5 * angle**2 * lighting.C0, rel=1e-3)
    for wrong in (torch.rand(1, 4, 8), torch.rand(3, 4, 8) - 1, torch.rand(3, 4, 8) / 0):
        with pytest.raises(ValueError, match="a panorama must"):
            lighting.environment_light(wrong)


def rgbe(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) positive -> (H, W, 4) uint8."""
    mantissa, exponent = np.frexp(pixels.max(-1))
    scaled = pixels * (mantissa * 256 / pixels.max(-1))[..., None]
    return np.concatenate([scaled, exponent[..., None] + 128], -1).astype(np.uint8)


def encoded(pixels: np.ndarray, runs: bool) -> bytes:
    """A Radiance file; ``runs``: each row's channels as runs where they are even, as literals elsewhere."""
    height, width, _ = pixels.shape
    body = b""
    for row in rgbe(pixels):
        if not runs:
            body += row.tobytes()
            continue
        body += bytes([2, 2, width >> 8, width & 255])
        for channel in row.T:
            if (channel == channel[0]).all():
                body += bytes([128 + width, channel[0]])
            else:
                body += bytes([width]) + channel.tobytes()
    return b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n" + f"-Y {height} +X {width}\n".encode() + body


@pytest.mark.parametrize("runs", [False, True])
def test_radiance_files(tmp_path: Path, runs: bool) -> None:
    pixels = np.random.default_rng(0).random((8, 16, 3)) * 1000 + 1
    pixels[2] = (5, 0.25, 70)
    path = tmp_path / "room.hdr"
    path.write_bytes(encoded(pixels, runs))
    found = lighting.read_panorama(path).permute(1, 2, 0).numpy()
    assert (np.abs(found - pixels) <= pixels.max(-1, keepdims=True) / 128).all()
    light = lighting.light_from_text(str(path))
    assert float(light[0]) * lighting.C0 == pytest.approx(0.6, abs=1e-5)  # scaled to a portrait's brightness
    own = lighting.light_from_yaml({"environment": "room.hdr", "brightness": "none"}, tmp_path)
    torch.testing.assert_close(own / own[0], light / light[0])
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) - 40, 60):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="damaged Radiance file"):
            read_radiance(path)
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="expected a Radiance file"):
        read_radiance(path)


def test_pictures_as_panoramas_are_linearised(tmp_path: Path) -> None:
    Image.new("RGB", (32, 16), (188, 188, 188)).save(tmp_path / "grey.png")
    assert float(lighting.read_panorama(tmp_path / "grey.png").mean()) == pytest.approx(0.503, abs=2e-3)
    Image.new("RGB", (16, 16)).save(tmp_path / "square.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "room.exr").touch()
    for name, words in (
        ("square.png", "twice as wide as high, got 16 x 16"),
        ("broken.png", "cannot be decoded"),
        ("room.exr", "convert it to Radiance .hdr"),
    ):
        with pytest.raises(UserError, match=words):
            lighting.read_panorama(tmp_path / name)
    Image.new("RGB", (32, 16)).save(tmp_path / "night.png")
    with pytest.raises(UserError, match="night.png is black"):
        lighting.light_from_text(str(tmp_path / "night.png"))
