# SPDX-License-Identifier: Apache-2.0
"""EG3D's generator: scenes are independent of cameras, nothing is remembered, conditioning as configured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from facelab.bases.eg3d.config import ModelConfig, RenderConfig, ViewConfig, generator_config, preset
from facelab.bases.eg3d.model import TriPlaneGenerator, TriPlaneGeneratorConfig
from facelab.bases.eg3d.originals import (
    generator_config_from_original,
    generator_from_original,
    generator_to_original,
    label_std,
    settings_from_original,
)
from facelab.bases.eg3d.shapes import OUTSIDE, trim_border
from facelab.cameras import Camera
from facelab.cameras.orbit import orbit_camera
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.fields.triplane import TriplaneConfig
from facelab.generator import sample_latents
from facelab.mesh.marching_cubes import extract_mesh

TINY = TriPlaneGeneratorConfig(
    field=TriplaneConfig(channels=4, hidden=8, features=6),
    z_dim=8,
    w_dim=12,
    plane_resolution=16,
    channel_base=64,
    channel_max=8,
    superresolution="2x",
    superresolution_half=0,
)
SETTINGS = RenderConfig(samples=6, importance=5).settings(1.0, 12)
VIEWS = orbit_camera([math.pi / 2 - 0.3, math.pi / 2, math.pi / 2 + 0.3], math.pi / 2, 2.7, (0.0, 0.0, 0.2))


@pytest.fixture(scope="module")
def generator() -> Iterator[TriPlaneGenerator]:
    model = TriPlaneGenerator(TINY, torch.Generator().manual_seed(1)).eval()
    model.update_averages()
    yield model


def latents(count: int = 1) -> dict[str, Tensor]:
    return sample_latents({"z": (TINY.z_dim,)}, Draws(5), count)


@torch.no_grad()
def test_one_scene_is_rendered_from_many_cameras(generator: TriPlaneGenerator) -> None:
    codes = generator.map(latents())
    assert codes.values["w"].shape == (1, generator.backbone.num_ws, TINY.w_dim)
    scene = generator.scene(codes)
    assert scene.parts["planes"].shape == (1, 3, 4, 16, 16)
    together = generator.render(scene, VIEWS, SETTINGS)
    assert together.rgb.shape == (3, 3, 128, 128) and together.depth.shape == together.opacity.shape == (3, 1, 128, 128)
    volume = generator.render_volume(scene, VIEWS, SETTINGS)
    assert volume.depth.shape == (3, 144, 1) and volume.mean_depth is not None
    torch.testing.assert_close(volume.depth, volume.mean_depth * volume.opacity)
    torch.testing.assert_close(together.depth.mean(), volume.depth.mean(), rtol=1e-2, atol=0)
    assert together.features is not None and together.features.shape == (3, 6, 12, 12)
    for i in range(3):
        alone = generator.render(scene, VIEWS[i], SETTINGS)
        torch.testing.assert_close(alone.rgb, together.rgb[i : i + 1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together.raw_rgb[0], together.raw_rgb[1])  # type: ignore[index]
    with pytest.raises(ValueError, match="2 scenes cannot be rendered from 3 cameras"):
        generator.render(generator.scene(generator.map(latents(2))), VIEWS, SETTINGS)


@torch.no_grad()
def test_a_call_leaves_nothing_behind(generator: TriPlaneGenerator) -> None:
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    attributes = set(vars(generator))
    first = generator.render(generator.scene(generator.map(latents())), VIEWS[0], SETTINGS.replace(resolution=8))
    again = generator.render(generator.scene(generator.map(latents())), VIEWS[0], SETTINGS.replace(resolution=8))
    assert torch.equal(first.rgb, again.rgb) and set(vars(generator)) == attributes
    assert all(torch.equal(before[key], value) for key, value in generator.state_dict().items())


@torch.no_grad()
def test_random_depths_come_from_the_draws_alone(generator: TriPlaneGenerator) -> None:
    scene, settings = generator.scene(generator.map(latents())), SETTINGS.replace(jitter=True)
    one, same, other = (generator.render_volume(scene, VIEWS[0], settings, Draws(seed)).rgb for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    with pytest.raises(ValueError, match="need draws"):
        generator.render(scene, VIEWS[0], settings)


@torch.no_grad()
def test_noise_of_the_backbone_is_stored_drawn_given_or_none(generator: TriPlaneGenerator) -> None:
    noisy = TriPlaneGenerator(TINY).eval()
    for name, parameter in noisy.named_parameters():
        if name.endswith("noise_strength"):
            parameter.fill_(1.0)
    codes = noisy.map(latents())
    planes = {str(noise): noisy.scene(codes, noise).parts["planes"] for noise in (None, "none", Draws(1), Draws(2))}
    values = list(planes.values())
    assert all(not torch.allclose(a, b) for i, a in enumerate(values) for b in values[:i])
    torch.testing.assert_close(noisy.scene(codes).parts["planes"], values[0])


@torch.no_grad()
def test_the_camera_is_seen_with_pose_conditioning_only() -> None:
    told = TriPlaneGenerator(TINY)
    blind = TriPlaneGenerator(replace(TINY, pose_conditioning=False))
    doubled = TriPlaneGenerator(replace(TINY, label_scale=2.0))
    labels = VIEWS.label()
    z = {"z": latents()["z"].expand(3, -1)}
    w = told.map(z, labels).values["w"]
    assert not torch.allclose(w[0], w[1])
    front = orbit_camera(math.pi / 2, math.pi / 2, 2.7, (0.0, 0.0, 0.2)).label()
    torch.testing.assert_close(told.map(z).values["w"], told.map(z, front).values["w"])
    unseen = blind.map(z, labels).values["w"]
    torch.testing.assert_close(unseen[0], unseen[1])
    torch.testing.assert_close(doubled.map(z, labels).values["w"], told.map(z, 2 * labels).values["w"])
    with pytest.raises(ValueError, match=r"conditioning must be \(3 or 1, 25\)"):
        told.map(z, labels[:2])


@torch.no_grad()
def test_truncation_moves_the_first_codes_to_the_average(generator: TriPlaneGenerator) -> None:
    full, cut = generator.map(latents()), generator.map(latents(), truncation=0.0, cutoff=2)
    average = generator.average_codes().values["w"]
    torch.testing.assert_close(cut.values["w"][:, :2], average[:, :2])
    torch.testing.assert_close(cut.values["w"][:, 2:], full.values["w"][:, 2:])
    fresh = TriPlaneGenerator(TINY)
    with pytest.raises(ValueError, match="no stored average"):
        fresh.map(latents(), truncation=0.5)
    with pytest.raises(ValueError, match=r"expected the latents \['z'\]"):
        fresh.map({"w": torch.zeros(1, 8)})


@torch.no_grad()
def test_the_field_is_asked_for_at_most_max_points(generator: TriPlaneGenerator, monkeypatch) -> None:
    asked, forward = [], generator.field_net.forward
    monkeypatch.setattr(
        generator.field_net, "forward", lambda p, planes: asked.append(p[..., 0].numel()) or forward(p, planes)
    )
    scene = generator.scene(generator.map(latents()))
    whole = generator.render_volume(scene, VIEWS, SETTINGS)
    assert max(asked) == 3 * 144 * 6
    asked.clear()
    parts = generator.render_volume(scene, VIEWS, SETTINGS.replace(max_points=200))
    assert max(asked) <= 200 and sum(asked) == 3 * 144 * 11
    torch.testing.assert_close(parts.features, whole.features)


def test_recomputing_gives_the_same_gradients(generator: TriPlaneGenerator) -> None:
    gradients = []
    watched = {n: p for n, p in generator.named_parameters() if n.startswith(("backbone.mapping", "field_net"))}
    for settings in (SETTINGS, SETTINGS.replace(recompute=True, max_points=200)):
        output = generator.render(generator.scene(generator.map(latents())), VIEWS[1], settings)
        gradients.append(torch.autograd.grad(output.rgb.square().mean() + output.depth.mean(), list(watched.values())))
    for name, a, b in zip(watched, *gradients, strict=True):
        assert a.abs().sum() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=name)


@torch.no_grad()
def test_legacy_raw_adds_the_first_rgb_where_nothing_is_resized(generator: TriPlaneGenerator) -> None:
    legacy = TriPlaneGenerator(replace(TINY, legacy_raw=True)).eval()
    legacy.load_state_dict(generator.state_dict())
    plain = TriPlaneGenerator(TINY).eval()
    plain.load_state_dict(generator.state_dict())
    for module in (plain, legacy):
        module.superresolution.blocks[0].to_rgb.bias.fill_(0.25)  # type: ignore[union-attr]
    for side, changed in ((64, True), (12, False)):
        settings = SETTINGS.replace(resolution=side, samples_coarse=4, samples_fine=0)
        pure, quirk = (m.render(m.scene(m.map(latents())), VIEWS[0], settings) for m in (plain, legacy))
        torch.testing.assert_close(pure.rgb, quirk.rgb)
        torch.testing.assert_close(pure.features, quirk.features)
        torch.testing.assert_close(pure.raw_rgb, pure.features[:, :3])  # type: ignore[index]
        assert torch.allclose(pure.raw_rgb, quirk.raw_rgb) != changed  # type: ignore[arg-type]


@torch.no_grad()
def test_a_mesh_and_normals_come_from_the_field(generator: TriPlaneGenerator) -> None:
    scene = generator.scene(generator.map(latents()))
    field = generator.field(scene)

    def density(points: Tensor) -> Tensor:
        return field(points[None, :, None], points[None]).sigma.reshape(-1)

    grid = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    level = float(density(grid).median())
    mesh = extract_mesh(density, 16, 1.0, level, color=lambda p: field(p[None, :, None], p[None]).rgb.reshape(-1, 3))
    assert len(mesh.faces) > 50 and mesh.colors is not None
    error = density(torch.from_numpy(mesh.vertices)) - level
    assert error.abs().mean() < 0.1 * density(grid).std()
    # this random field has no opaque surface: thicken it, so that rays see one
    generator_dense = TriPlaneGenerator(TINY).eval()
    generator_dense.load_state_dict(generator.state_dict())
    generator_dense.field_net.decoder.output_bias[0] += 30
    seen = generator_dense.render(scene, VIEWS[1], SETTINGS.replace(normals=True))
    assert seen.normals is not None and (seen.opacity > 0.99).all()
    torch.testing.assert_close(seen.normals.norm(dim=1), torch.ones(1, 128, 128), rtol=1e-3, atol=1e-3)


def test_original_names_and_back(generator: TriPlaneGenerator) -> None:
    original = {**generator_to_original(generator), "dataset_label_std": torch.ones(25)}
    assert {"decoder.net.0.weight", "backbone.mapping.w_avg", "superresolution.block1.torgb.weight"} <= set(original)
    again = generator_from_original(original, generator)
    assert all(torch.equal(again[key], value) for key, value in generator.state_dict().items())
    assert torch.equal(label_std(original), torch.ones(25))  # type: ignore[arg-type]
    with pytest.raises(UserError):
        generator_from_original({**original, "decoder.net.1.weight": torch.zeros(1)}, generator)


def test_original_arguments() -> None:
    arguments = {"z_dim": 512, "c_dim": 25, "w_dim": 512, "mapping_kwargs": {"num_layers": 2}, "sr_num_fp16_res": 4}
    options = {
        "superresolution_module": "training.superresolution.SuperresolutionHybrid2X",
        "box_warp": 1.6,
        "c_scale": 1.0,
        "avg_camera_radius": 1.7,
        "avg_camera_pivot": [0, 0, 0],
        "an_unknown_option": 3,
    }
    config = generator_config_from_original(arguments, options)
    assert config.field.axes == "xy_xz_zx" and config.field.box_side == 1.6 and config.superresolution == "2x"
    assert config.legacy_raw and config.pose_conditioning and config.camera.radius == 1.7 and config.mapping_layers == 2
    assert generator_config_from_original(arguments, {}).label_scale == 0  # as the original: missing means a zero label
    with pytest.raises(UserError, match="clamp_mode is 'relu'"):
        generator_config_from_original(arguments, {"clamp_mode": "relu"})
    auto = settings_from_original({"ray_start": "auto", "ray_end": "auto", "box_warp": 1.6, "white_back": True}, 64)
    assert auto.box_side == 1.6 and auto.background == "white" and auto.grid == "centers"
    with pytest.raises(UserError, match="both or none"):
        settings_from_original({"ray_start": "auto", "ray_end": 3.3}, 64)


def test_the_view_s_camera_turns_around_the_face() -> None:
    view = ViewConfig(pivot=(0.0, 0.0, 0.0))
    level, front = math.pi / 2, math.pi / 2
    torch.testing.assert_close(
        view.cameras(level, front).cam2world[0, :3, 3], torch.tensor([0.0, 0.0, 2.7]), atol=1e-5, rtol=0
    )
    assert view.cameras(level, front + 0.3).cam2world[0, 0, 3] < -0.5
    assert view.cameras(level - 0.3, front).cam2world[0, 1, 3] > 0.3
    plain = Camera.on_sphere(level, front + 0.3, 12.0, 2.7)
    torch.testing.assert_close(view.cameras(level, front + 0.3, 12.0).label(), plain.label(), atol=1e-5, rtol=0)


def test_presets_and_bad_names() -> None:
    model, render, view = preset("shapenet")
    config = generator_config(model, view, pose_conditioning=False)
    assert (config.superresolution, config.field.box_side, config.camera.radius) == ("2x", 1.6, 1.7)
    assert (render.near, render.far, render.background) == (0.1, 2.6, "white")
    assert preset("afhq")[2] == ViewConfig(pivot=(0.0, 0.0, -0.06))
    assert RenderConfig().settings(1.0, sample_factor=2).samples_coarse == 96
    with pytest.raises(UserError, match="Did you mean 'ffhq'"):
        preset("fhq")
    with pytest.raises(ValueError, match="super-resolution 2x makes 128"):
        ModelConfig(superresolution="2x")
    with pytest.raises(ValueError, match="no super-resolution makes that"):
        ModelConfig(resolution=100)


def test_without_superresolution_the_rendering_is_the_picture() -> None:
    plain = TriPlaneGenerator(replace(TINY, superresolution=None)).eval()
    with torch.no_grad():
        output = plain(latents(3), VIEWS, SETTINGS)
    assert torch.equal(output.rgb, output.raw_rgb) and output.rgb.shape == (3, 3, 12, 12)  # type: ignore[arg-type]


def test_a_volume_loses_its_border() -> None:
    volume = torch.rand(17, 17, 17, generator=torch.Generator().manual_seed(0)).numpy()
    trimmed = trim_border(volume)
    assert (trimmed[1:-1, 1:-1, 1:-1] == volume[1:-1, 1:-1, 1:-1]).all() and (trimmed == OUTSIDE).sum() == 17**3 - 15**3


def test_cameras_on_the_orbit_look_at_their_target() -> None:
    camera = orbit_camera(math.pi / 2, math.pi / 2, 2.7)
    expected = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
    expected[2, 3] = 2.7
    torch.testing.assert_close(camera.cam2world[0], expected, atol=1e-5, rtol=0)
    side = orbit_camera(0.3, 1.2, 2.0, (0.1, 0.2, 0.3))
    target = torch.tensor([[0.1, 0.2, 0.3, 1.0]]) @ torch.linalg.inv(side.cam2world[0]).T
    torch.testing.assert_close(target[0, :2], torch.zeros(2), atol=1e-5, rtol=0)
    assert target[0, 2] > 0 and isinstance(side, Camera)
    torch.testing.assert_close(torch.linalg.det(side.cam2world[0, :3, :3]).item(), 1.0)
