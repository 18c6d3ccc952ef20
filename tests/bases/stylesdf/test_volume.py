# SPDX-License-Identifier: Apache-2.0
"""StyleSDF's volume generator: the protocol, truncation, the start as a sphere, the original's names, its settings."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from facelab.bases.stylesdf import config as stylesdf
from facelab.bases.stylesdf.losses import sphere_start
from facelab.bases.stylesdf.model import SdfGenerator, SdfGeneratorConfig
from facelab.bases.stylesdf.originals import (
    volume_config_from_original,
    volume_from_original,
    volume_rules,
    volume_to_original,
)
from facelab.bases.stylesdf.training_config import EMA_DECAY, LossConfig, OptimConfig, ReferenceConfig, TrainConfig
from facelab.cameras.sphere import SpherePrior, sphere_camera
from facelab.checkpoints.key_map import KeyMap
from facelab.config import load_staged, to_dict
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.fields.sdf import SdfField, SdfFieldConfig
from facelab.generator import Codes, sample_latents
from facelab.mesh.aligned_volume import align_volume, aligned_mesh
from facelab.rendering.sdf import SdfOptions
from facelab.rendering.settings import RenderSettings

CONFIG = SdfGeneratorConfig(SdfFieldConfig(width=16, layers=2, style_dim=10), latent_dim=6)
SETTINGS = RenderSettings(
    resolution=6, samples_coarse=5, samples_fine=0, grid="centers", jitter=False, background="last", lock_view=True
)
CAMERA = sphere_camera([0.0, 0.3], [0.1, 0.0])


def generator(seed: int = 0, config: SdfGeneratorConfig = CONFIG) -> SdfGenerator:
    return SdfGenerator(config, torch.Generator().manual_seed(seed))


def latents(count: int = 2) -> dict[str, Tensor]:
    return sample_latents({"z": (6,)}, Draws(3), count)


def test_pictures_of_the_protocol() -> None:
    model = generator()
    output = model(latents(), CAMERA, SETTINGS.replace(normals=True))
    assert output.rgb.shape == (2, 3, 6, 6) and output.rgb.abs().max() <= 1 and torch.equal(output.rgb, output.raw_rgb)
    assert output.depth.shape == output.opacity.shape == (2, 1, 6, 6) and output.features is None
    assert output.normals is not None and output.normals.shape == (2, 3, 6, 6)
    near = output.depth / output.opacity
    assert (near > 0.88).all() and (near < 1.12).all()
    codes = model.map(latents())
    scene = model.scene(codes)
    features = model.render_volume(scene, CAMERA, SETTINGS, features=True).features
    assert features is not None and features.shape == (2, 36, 16) and features.abs().max() <= 1
    assert model.field(scene)(torch.zeros(2, 1, 1, 3), torch.zeros(2, 1, 3)).sdf.shape == (2, 1, 1, 1)


def test_pixels_are_row_major_from_the_top_left() -> None:
    """The rendered picture shows the world's x to the right and y upwards."""
    model = generator()
    output = model.render_volume(model.scene(model.map(latents(1))), sphere_camera(0.0, 0.0), SETTINGS)
    assert output.points is not None
    xyz = output.points[0].unflatten(0, (6, 6))
    assert (xyz[:, 1:, 0] > xyz[:, :-1, 0]).all() and (xyz[1:, :, 1] < xyz[:-1, :, 1]).all()


def test_one_scene_and_many_cameras() -> None:
    model = generator()
    scene = model.scene(model.map(latents(1)))
    both = model.render(scene, CAMERA, SETTINGS)
    torch.testing.assert_close(both.rgb[1:], model.render(scene, CAMERA[1], SETTINGS).rgb)
    with pytest.raises(ValueError, match="2 scenes cannot be seen from 3 cameras"):
        model.render(model.scene(model.map(latents(2))), sphere_camera([0.0, 0.1, 0.2], 0.0), SETTINGS)


def test_truncation_moves_to_the_stored_average() -> None:
    model = generator()
    with pytest.raises(ValueError, match="no stored average"):
        model.map(latents(), truncation=0.5)
    model.update_averages({"z": latents(7)["z"]})
    mean = model.map(latents(7)).values["w"].mean(0)
    torch.testing.assert_close(model.average_codes().values["w"][0], mean)
    w = model.map(latents()).values["w"]
    torch.testing.assert_close(model.map(latents(), truncation=0.3).values["w"], mean + 0.3 * (w - mean))
    torch.testing.assert_close(model.map(latents(), truncation=1.2).values["w"], mean + 1.2 * (w - mean))
    model.forget_averages()
    assert not model.has_averages
    model.update_averages()
    many = model.map(sample_latents(model.latent_spec, Draws(0).at(phase="average"), 10_000)).values["w"].mean(0)
    torch.testing.assert_close(model.average_w, many)
    with pytest.raises(ValueError, match=r"expected the latents \['z'\]"):
        model.map({"geo": torch.zeros(1, 6)})


def test_seed_of_the_weights_decides_them() -> None:
    one, same, other = generator(4).state_dict(), generator(4).state_dict(), generator(5).state_dict()
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["field_net.view.weight"], other["field_net.view.weight"])


def test_field_learns_to_start_as_a_sphere() -> None:
    model = generator(config=SdfGeneratorConfig(SdfFieldConfig(width=32, layers=2, style_dim=10), latent_dim=6))
    settings = SETTINGS.replace(resolution=8, samples_coarse=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for step in range(200):
        draws = Draws(0, step)
        scene = model.scene(model.map(sample_latents(model.latent_spec, draws, 2)))
        rays = model.rays(SpherePrior().sample(draws, 2), settings)
        start = sphere_start(model.field(scene).distances, rays, settings, draws)
        optimizer.zero_grad()
        start.loss.backward()
        optimizer.step()
        losses.append(start.loss.item())
    assert losses[-1] < 0.3 * losses[0]
    field = model.field(model.scene(model.map(latents(1))))
    points = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.1, 0.0], [0.1, 0.0, 0.0], [0.0, 0.0, 0.1]])
    ends = field.distances(points[None, :, None]).flatten()
    assert ends[0] < -0.02 and (ends[1:] > 0.02).all()


def test_frustum_of_distances_becomes_the_shape_in_the_scene(monkeypatch) -> None:
    model, camera = generator(), sphere_camera(0.4, -0.2)
    calls = []

    def ball(self: SdfField, points: Tensor, film: object) -> Tensor:
        calls.append(points.shape[:3].numel())
        return points.norm(dim=-1, keepdim=True) - 0.06

    monkeypatch.setattr(SdfField, "distances", ball)
    settings = SETTINGS.replace(resolution=40, samples_coarse=40, max_points=9000)
    volume = model.frustum(model.scene(model.map(latents(1))), camera, settings)
    assert volume.shape == (1, 40, 40, 40) and sum(calls) == 64_000 and max(calls) <= 9000
    mesh = aligned_mesh(align_volume(volume[0]), camera=camera)
    radius = torch.as_tensor(mesh.vertices).norm(dim=-1)
    assert len(radius) > 1000 and (radius - 0.06).abs().max() < 0.002


def test_sphere_start_is_stratified_and_comes_from_the_draws() -> None:
    rays = generator().rays(CAMERA, SETTINGS)
    found = []

    def distances(points: Tensor) -> Tensor:
        found.append(points)
        return torch.zeros_like(points[..., :1])

    for seed in (0, 0, 1):
        start = sphere_start(distances, rays, SETTINGS, Draws(seed))
        torch.testing.assert_close(start.target, found[-1].norm(dim=-1, keepdim=True) - 0.06)
        torch.testing.assert_close(start.loss, start.target.abs().mean())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# ---------------------------------------------------------------- the original's files


def test_names_come_back_and_the_sizes_are_read() -> None:
    model = generator()
    original = volume_to_original(model)
    again = generator(9)
    again.load_state_dict(volume_from_original(original, again))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert volume_config_from_original(original) == CONFIG
    assert original["renderer.network.pts_linears.1.gamma.weight"].shape == (16, 10)
    raw = generator(config=dataclasses.replace(CONFIG, field=dataclasses.replace(CONFIG.field, density="raw")))
    assert volume_config_from_original(volume_to_original(raw)).field.density == "raw"
    assert volume_config_from_original(original, dist_radius=None).field.box_side is None


def test_names_are_those_of_the_released_model() -> None:
    """256 wide, 8 layers, 65 tensors and more: spot checks of the list of the released file."""
    shapes = {key: tuple(value.shape) for key, value in volume_to_original(SdfGenerator(SdfGeneratorConfig())).items()}
    expected = {
        "style.2.bias": (256,),
        "renderer.sigmoid_beta": (1,),
        "renderer.network.pts_linears.0.weight": (256, 3),
        "renderer.network.pts_linears.7.beta.weight": (256, 256),
        "renderer.network.views_linears.weight": (256, 259),
        "renderer.network.views_linears.gamma.bias": (256,),
        "renderer.network.rgb_linear.weight": (3, 256),
        "renderer.network.sigma_linear.weight": (1, 256),
    }
    assert {key: shapes.get(key) for key in expected} == expected
    assert len(shapes) == 3 * 2 + 1 + 9 * 6 + 2 * 2
    assert KeyMap(volume_rules()).to_ours("renderer.network.views_linears.bias") == "field_net.view.bias"


def test_other_files_are_refused_by_name() -> None:
    model = generator()
    original = volume_to_original(model)
    with pytest.raises(UserError, match="renderer.network.pts_linears.0.weight.*g_ema"):
        volume_config_from_original({"g_ema": torch.zeros(1)})
    with pytest.raises(UserError, match="no rule for 'decoder.conv1.bias'"):
        volume_from_original({**original, "decoder.conv1.bias": torch.zeros(1)}, model)
    missing = {key: value for key, value in original.items() if key != "style.1.bias"}
    with pytest.raises(UserError, match="mapping.linears.1.bias"):
        volume_from_original(missing, model)
    with pytest.raises(UserError, match="should have shape"):
        volume_from_original({**original, "style.1.bias": torch.zeros(3)}, model)
    with pytest.raises(UserError, match="dist_radius"):
        volume_config_from_original(original, dist_radius=-1.0)


# ---------------------------------------------------------------- settings


def test_configuration_describes_the_released_generator(tmp_path) -> None:
    config = stylesdf.StyleSdfConfig()
    assert stylesdf.generator_config(config.model, config.view, config.render) == SdfGeneratorConfig()
    assert (config.near, config.far, config.field_cube) == pytest.approx((0.88, 1.12, 0.24))
    training = config.render.settings(config.view, training=True)
    assert (training.jitter, training.background, training.lock_view) == (True, "none", False)
    inference = config.render.settings(config.view, 128, 2)
    assert (inference.jitter, inference.background, inference.lock_view) == (False, "last", True)
    assert (inference.resolution, inference.samples_coarse, inference.grid) == (128, 48, "centers")
    assert config.render.training_options() == SdfOptions("offset", samples=True, gradient="layers")
    assert pytest.approx(0.997784, abs=1e-6) == EMA_DECAY
    path = tmp_path / "run.yaml"
    path.write_text("stage: full\nview: {azimuth: 0.15}\nmodel: {resolution: 512}\n")
    loaded = load_staged(stylesdf.StyleSdfConfig, [path]).at(0)
    assert loaded.stage == "full" and loaded.view.prior.azimuth == 0.15
    assert stylesdf.decoder_config(loaded.model, loaded.render).size == 512
    assert to_dict(loaded)["render"]["sampling"] == "offset"
    path.write_text("stage: volumes\n")
    with pytest.raises(UserError, match="stage"):
        load_staged(stylesdf.StyleSdfConfig, [path])


def test_presets_differ_as_the_released_recipes_do() -> None:
    full = stylesdf.preset("afhq_full")
    assert (full.stage, full.view.azimuth, full.loss.r1, full.train.max_steps) == ("full", 0.15, 50.0, 300_000)
    assert stylesdf.preset("ffhq_volume").train.batch_chunk == 6
    with pytest.raises(UserError, match="Did you mean 'ffhq_full'"):
        stylesdf.preset("ffhq_ful")


def test_every_deviation_has_its_switch() -> None:
    switches = [deviation.switch for deviation in stylesdf.DEVIATIONS]
    assert sorted(switches) == sorted(field.name for field in dataclasses.fields(ReferenceConfig))
    assert all(deviation.method == "stylesdf" for deviation in stylesdf.DEVIATIONS)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LossConfig(eikonal=-1), "loss.eikonal must be 0 or more, got -1"),
        (lambda: LossConfig(mixing=1.5), "loss.mixing must be between 0 and 1, got 1.5"),
        (lambda: OptimConfig(full_betas=(0.0, 1.0)), "optim.full_betas must be 0 or more and below 1"),
        (lambda: TrainConfig(precision="fp16"), "expected fp32, tf32"),
        (lambda: stylesdf.ModelConfig(resolution=100), "power of two"),
        (lambda: stylesdf.ModelConfig(layers=0), "model.layers must be at least 1"),
        (lambda: stylesdf.ViewConfig(dist_radius=1.5), "view.dist_radius must lie within 0..1"),
    ],
)
def test_bad_settings_are_said(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_pictures_smaller_than_feature_maps_are_said() -> None:
    config = stylesdf.StyleSdfConfig()
    with pytest.raises(UserError, match="model.resolution 32, render.resolution 64"):
        stylesdf.decoder_config(dataclasses.replace(config.model, resolution=32), config.render)


def test_codes_mix_between_heads() -> None:
    model = generator()
    codes = model.map(latents(2))
    half = codes[0].mix(codes[1], 0.5)
    assert isinstance(half, Codes)
    torch.testing.assert_close(half.values["w"], codes.values["w"].mean(0, keepdim=True))
