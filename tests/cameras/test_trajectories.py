# SPDX-License-Identifier: Apache-2.0
"""Camera paths against hand-computed frames, the spline against scipy, and bad keyframe files."""

from __future__ import annotations

import json
import math

import pytest
import torch

from facelab.cameras.trajectories import (
    NAMES,
    Keyframe,
    keyframe_trajectory,
    natural_cubic_spline,
    read_keyframes,
    trajectory,
)
from facelab.errors import UserError

HALF_PI = math.pi / 2


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), atol=1e-6, rtol=1e-6)


def test_front_is_an_ellipse_and_zooms_only_when_asked():
    path = trajectory("front", 5, fov=12)  # u = 0, 1/4, 1/2, 3/4, 1
    close(path.pitch - HALF_PI, [0.2, 0, -0.2, 0, 0.2])
    close(path.yaw - HALF_PI, [0, 0.4, 0, -0.4, 0])
    close(path.fov, [12] * 5)
    close(trajectory("front", 5, fov=12, zoom=True).fov, [17, 22, 17, 12, 17])
    close(trajectory("front", 5, fov=12, reference=True).fov, [17, 22, 17, 12, 17])


def test_reference_mix_factors_are_the_curve_parameters():
    close(trajectory("orbit", 3, reference=True).t, [0, 0.25, 0.5])
    close(trajectory("rotation_horizontal", 3, reference=True).t, [-1, 0, 1])
    for name in NAMES:
        close(trajectory(name, 3).t, [0, 0.5, 1])


@pytest.mark.parametrize(
    ("name", "pitch", "yaw"),
    [
        ("sphere", [HALF_PI + 0.2, HALF_PI - 0.2, HALF_PI + 0.2], [HALF_PI] * 3),
        ("inverse_sphere", [HALF_PI, HALF_PI + 0.4, HALF_PI], [HALF_PI] * 3),
        ("orbit", [HALF_PI] * 3, [0, HALF_PI, math.pi]),
        ("orbit_raised", [math.pi / 4] * 3, [0, math.pi, 2 * math.pi]),
        ("orbit_nodding", [math.pi / 4 + 0.2, math.pi / 4 - 0.2, math.pi / 4 + 0.2], [0, math.pi, 2 * math.pi]),
        ("rotation_horizontal", [HALF_PI] * 3, [HALF_PI - 0.5, HALF_PI, HALF_PI + 0.5]),
        ("rotation_linear", [HALF_PI] * 3, [HALF_PI - 0.4, HALF_PI, HALF_PI + 0.4]),
        ("non_rotation", [HALF_PI] * 3, [HALF_PI] * 3),
    ],
)
def test_three_frames_of_each_path(name, pitch, yaw):
    path = trajectory(name, 3, fov=20)
    close(path.pitch, pitch)
    close(path.yaw, yaw)
    close(path.fov, [20] * 3)


def test_zoom_breathes_without_moving():
    path = trajectory("zoom", 5, fov=12)
    close(path.fov, [12, 17, 12, 7, 12])
    close(path.yaw, [HALF_PI] * 5)


def test_cameras_look_at_the_origin_from_the_unit_sphere():
    for name in NAMES:
        camera = trajectory(name, 9).camera()
        position, forward = camera.cam2world[:, :3, 3], camera.cam2world[:, :3, 2]
        torch.testing.assert_close(forward, -position, atol=1e-5, rtol=0)
    close(trajectory("non_rotation", 1).camera().cam2world[0, :3, 3], [0, 0, 1])


def test_spline_equals_scipy_natural_spline():
    interpolate = pytest.importorskip("scipy.interpolate")
    knots = torch.tensor([0.0, 0.5, 2.0, 2.25, 4.0], dtype=torch.float64)
    values = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = torch.linspace(0, 4, 37, dtype=torch.float64)
    expected = interpolate.CubicSpline(knots.numpy(), values.numpy(), bc_type="natural")(at.numpy())
    torch.testing.assert_close(natural_cubic_spline(knots, values, at), torch.from_numpy(expected))


def test_keyframes_are_passed_exactly_and_two_give_a_line():
    keys = [Keyframe(0, 1.5, 1.0, 12), Keyframe(1, 1.6, 2.0, 14), Keyframe(3, 1.4, 1.5, 18)]
    path = keyframe_trajectory(keys, 7)  # t = 0, 0.5, ... 3
    for frame, key in ((0, keys[0]), (2, keys[1]), (6, keys[2])):
        close(torch.stack([path.t, path.pitch, path.yaw, path.fov])[:, frame], [key.t, key.pitch, key.yaw, key.fov])
    close(keyframe_trajectory(keys[:2], 3).yaw, [1.0, 1.5, 2.0])


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_keyframe_files_in_radians_and_degrees(tmp_path, suffix):
    rows = [{"t": 0, "pitch": 1.5, "yaw_degrees": 90}, {"t": 1, "pitch_degrees": 80, "yaw": 1.0, "fov": 20}]
    path = tmp_path / f"path.{suffix}"
    path.write_text(json.dumps(rows))  # JSON is YAML
    first, second = read_keyframes(path, fov=15)
    assert first == Keyframe(0, 1.5, pytest.approx(HALF_PI), 15)
    assert second == Keyframe(1, pytest.approx(math.radians(80)), 1.0, 20)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- {t: 0, pich: 1.5, yaw: 1}", "Did you mean 'pitch'"),
        ("- {t: 0, pitch: 1.5, yaw: 1}", "at least 2 keyframes"),
        ("- {t: 0, pitch: 1.5, yaw: 1}\n- {t: 0, pitch: 1.5, yaw: 1}", "t must increase"),
        ("- {t: 0, pitch: 90, yaw: 1}\n- {t: 1, pitch: 1.5, yaw: 1}", "radians"),
        ("- {t: 0, pitch: left, yaw: 1}", "must be a number, got 'left'"),
        ("- {t: true, pitch: 1.5, yaw: 1}", "must be a number, got True"),
        ("- {pitch: 1.5, yaw: 1}", "time t is missing"),
        ("- {t: 0, pitch: 1.5, pitch_degrees: 90, yaw: 1}", "either pitch"),
        ("- {t: 0, pitch: .nan, yaw: 1}\n- {t: 1, pitch: 1.5, yaw: 1}", "finite"),
        ("t: 0", "list of keyframes"),
        ("- {t: 0", "not valid YAML"),
    ],
)
def test_bad_keyframe_files_give_one_line(tmp_path, text, words):
    path = tmp_path / "path.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_keyframes(path)
    assert "\n" not in str(caught.value) and "path.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: trajectory("frnt", 3), "Did you mean 'front'"),
        (lambda: trajectory("front", 0), "at least 1 frame"),
        (lambda: trajectory("sphere", 3, zoom=True), "has no zoom"),
        (lambda: trajectory("zoom", 5, fov=4), "0..180"),
        (lambda: read_keyframes("/nonexistent/path.yaml"), "No such file"),
    ],
)
def test_bad_calls_give_one_line(call, words):
    with pytest.raises(UserError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
