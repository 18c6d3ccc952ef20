# SPDX-License-Identifier: Apache-2.0
"""The same light in other axes: rotations, cameras, DPR."""

from __future__ import annotations

import math

import pytest
import torch

from facelab import lighting
from facelab.cameras.camera import Camera
from facelab.cameras.orbit import orbit_camera


def rotations(count: int, seed: int = 0) -> torch.Tensor:
    """(count, 3, 3) proper rotations, float64."""
    q, r = torch.linalg.qr(torch.randn(count, 3, 3, generator=torch.Generator().manual_seed(seed)).double())
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]
    return q * torch.linalg.det(q).sign()[:, None, None]


def some_lights(count: int) -> torch.Tensor:
    return torch.randn(count, 9, generator=torch.Generator().manual_seed(3)).double()


def test_a_turned_light_shades_a_turned_ball_alike() -> None:
    light, turn = some_lights(4), rotations(4)
    normals = torch.nn.functional.normalize(torch.randn(4, 50, 3, dtype=torch.float64), dim=-1)
    before = (lighting.basis(normals) @ light[..., None])[..., 0]
    turned = lighting.rotate(light, turn)
    after = (lighting.basis(normals @ turn.transpose(1, 2)) @ turned[..., None])[..., 0]
    torch.testing.assert_close(after, before)
    assert (turned - light).abs().max() > 0.1


def test_rotations_compose_keep_the_power_of_each_order_and_take_colours() -> None:
    light, (first, second) = some_lights(3), rotations(2)
    once = lighting.rotate(light, second @ first)
    torch.testing.assert_close(lighting.rotate(lighting.rotate(light, first), second), once)
    for order in (slice(0, 1), slice(1, 4), slice(4, 9)):
        torch.testing.assert_close(once[:, order].norm(dim=1), light[:, order].norm(dim=1))
    colours = torch.stack([light, 2 * light, -light], dim=-1)
    torch.testing.assert_close(lighting.rotate(colours, second @ first)[..., 1], 2 * once)


def test_one_light_seen_by_many_cameras_and_back() -> None:
    camera = orbit_camera(torch.tensor([1.2, 1.5, 1.9]), torch.tensor([1.4, 1.6, 1.7]), 2.7, (0, 0, 0.2))
    light = some_lights(1).float()
    seen = lighting.seen_by(light, camera)
    assert seen.shape == (3, 9) and not torch.allclose(seen[0], seen[2], atol=1e-2)
    torch.testing.assert_close(lighting.from_viewer(seen, camera), light.expand(3, 9), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        lighting.from_dpr(lighting.to_dpr(light, camera), camera), light.expand(3, 9), atol=1e-5, rtol=0
    )
    with pytest.raises(ValueError, match="rotation must be"):
        lighting.rotate(some_lights(2), rotations(3))


def test_a_frontal_viewers_axes_are_the_worlds() -> None:
    frontal = Camera.on_sphere(math.pi / 2, math.pi / 2, 12.0)
    torch.testing.assert_close(lighting.viewer_axes(frontal)[0], torch.eye(3), atol=1e-6, rtol=0)
    light = some_lights(1).float()
    torch.testing.assert_close(lighting.to_dpr(light, frontal), lighting.to_dpr(light), atol=1e-5, rtol=0)


def test_a_camera_that_goes_round_to_the_lamp_sees_it_in_front() -> None:
    lamp = torch.tensor([[1.0, 0.0, 0.0]])  # at the subject's left
    camera = Camera.on_sphere(math.pi / 2, 0.0, 12.0)  # on the +x axis
    torch.testing.assert_close(camera.cam2world[0, :3, 3], lamp[0], atol=1e-6, rtol=0)
    seen = lighting.main_direction(lighting.seen_by(lighting.directional(lamp), camera))
    torch.testing.assert_close(seen, torch.tensor([[0.0, 0.0, 1.0]]), atol=1e-5, rtol=0)


def test_dprs_axes_and_scale() -> None:
    """x right, y into the scene, z up; order 1, Y, Z, X; brightness is pi (1, 2/3, 1/4) times its numbers."""
    for direction, index, sign in (((1, 0, 0), 3, 1), ((0, 1, 0), 2, 1), ((0, 0, 1), 1, -1)):
        numbers = lighting.to_dpr(lighting.directional(torch.tensor([direction]).float()))[0]
        first = numbers[1:4]
        assert int(first.abs().argmax()) + 1 == index and float(first[index - 1]) * sign > 0.1
        assert float(first.abs().sum()) == pytest.approx(abs(float(first[index - 1])), abs=1e-6)
    even = lighting.to_dpr(lighting.ambient(0.7))[0]
    assert float(even[0]) * math.pi * lighting.C0 == pytest.approx(0.7, abs=1e-6)


@pytest.mark.parametrize("name", list(lighting.PRESETS))
@pytest.mark.parametrize("moved", [-0.2, 0.15])
def test_horizontal_moves_are_the_originals_offsets(name: str, moved: float) -> None:
    """A camera that goes round the origin sees what FaceDNeRF's azimuth offset projects: an exact rotation."""
    camera = orbit_camera(math.pi / 2 + moved, math.pi / 2, 2.7)
    ours = lighting.to_dpr(lighting.preset(name)[None], camera)[0].double()
    reference = lighting.reference_light(name, (0.0, moved))
    torch.testing.assert_close(ours, reference, atol=2e-3, rtol=0)
    assert (ours - lighting.reference_light(name)).abs().max() > 0.02


def test_vertical_moves_turn_the_light_where_the_originals_offset_does_not() -> None:
    """A lamp keeps its power of each order when the camera rises; the original's offset changes it."""
    light = lighting.preset("top_right")[None]
    camera = orbit_camera(math.pi / 2, math.pi / 2 - 0.2, 2.7)
    ours, front = (lighting.to_dpr(light, c)[0] for c in (camera, None))
    assert float(ours[1:4].norm()) == pytest.approx(float(front[1:4].norm()), rel=1e-4)
    offset, none = (lighting.reference_light("top_right", (d, 0.0)) for d in (-0.2, 0.0))
    assert abs(float(offset[1:4].norm() / none[1:4].norm()) - 1) > 0.02
    # from above, the lamp stands lower and nearer to the front
    low, high = lighting.main_direction(lighting.seen_by(light, camera))[0], lighting.main_direction(light)[0]
    assert low[1] < high[1]


def test_switching_the_phase_turns_a_dpr_light_about_the_vertical() -> None:
    numbers = some_lights(2)
    half_turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0])).double()
    torch.testing.assert_close(lighting.switch_phase(numbers), lighting.rotate(numbers, half_turn))
    torch.testing.assert_close(lighting.switch_phase(lighting.switch_phase(numbers)), numbers)


def test_grey_weighs_colours_as_eyes_do() -> None:
    light = some_lights(2)
    torch.testing.assert_close(lighting.grey(light[..., None].expand(-1, -1, 3)), light)
    green = torch.zeros(1, 9, 3)
    green[..., 1] = 1
    assert lighting.grey(green)[0].tolist() == pytest.approx([0.7152] * 9)
    for function in (lighting.grey, lighting.from_dpr, lighting.to_dpr, lighting.switch_phase):
        with pytest.raises(ValueError, match=r"light must be \(N, 9\)"):
            function(torch.zeros(9))


def test_agreement_of_known_relations() -> None:
    known = some_lights(400)
    noise = torch.randn(400, 9, generator=torch.Generator().manual_seed(8)).double()
    found = 0.5 * known + 0.1
    exact = lighting.light_agreement(found, known)
    torch.testing.assert_close(exact.correlation, torch.ones(9).double())
    torch.testing.assert_close(exact.slope, torch.full((9,), 0.5).double())
    assert exact.fitted_error.max() < 1e-9 < exact.mean_error.min()
    blurred = lighting.light_agreement(known + noise, known)
    assert (blurred.correlation - 0.5**0.5).abs().max() < 0.12 and blurred.angle > 0.3
    assert (lighting.light_agreement(known, known).angle, len(exact.summary())) == (pytest.approx(0, abs=1e-6), 6)
    constant = lighting.light_agreement(found, known * torch.tensor([0.0] + [1.0] * 8))
    assert constant.correlation[0].isnan() and not constant.correlation[1:].isnan().any()
    with pytest.raises(ValueError, match="N at least 3"):
        lighting.light_agreement(known[:2], known[:2])
