# SPDX-License-Identifier: Apache-2.0
"""StyleSDF's whole generator beyond its golden case: codes, truncation, noise, derivatives, refusals."""

from __future__ import annotations

import pytest
import torch

from facelab.bases.stylesdf.full_model import FullGenerator, FullGeneratorConfig
from facelab.cameras.sphere import sphere_camera
from facelab.draws import Draws
from facelab.fields.sdf import SdfFieldConfig
from facelab.generator import Codes, sample_latents
from facelab.losses.path_length import path_length
from facelab.nn.skip_decoder import SkipDecoderConfig
from facelab.rendering.settings import RenderSettings

SETTINGS = RenderSettings(8, 0.88, 1.12, 4, 0, grid="centers", jitter=False, background="last")
CAMERA = sphere_camera([0.0, 0.3], [0.1, 0.0])


def tiny(**changes) -> FullGenerator:
    decoder = SkipDecoderConfig(size=16, in_resolution=8, in_channels=6, style_dim=5, channel_max=4)
    config = FullGeneratorConfig(
        SdfFieldConfig(width=6, layers=2, style_dim=5), latent_dim=3, decoder=decoder, **changes
    )
    model = FullGenerator(config, torch.Generator().manual_seed(1)).eval()
    with torch.no_grad():
        for layer in (model.decoder.blocks[0].conv1, model.decoder.blocks[1].conv0):
            layer.noise_strength.fill_(0.5)
    return model


def codes(model: FullGenerator, count: int = 2, seed: int = 0, truncation: float = 1.0) -> Codes:
    return model.map(sample_latents(model.latent_spec, Draws(seed), count), truncation=truncation)


def test_a_scene_is_rendered_from_many_cameras() -> None:
    model = tiny()
    many = model.render(model.scene(codes(model, 1)), CAMERA, SETTINGS)
    one = model.render(model.scene(codes(model, 1)), CAMERA[1], SETTINGS)
    assert many.rgb.shape == (2, 3, 16, 16) and many.depth.shape == (2, 1, 16, 16)
    assert many.raw_rgb.shape == (2, 3, 8, 8) and many.features.shape == (2, 6, 8, 8)
    torch.testing.assert_close(many.rgb[1:], one.rgb, atol=1e-5, rtol=1e-4)


def test_same_seed_same_weights_and_picture() -> None:
    first, second = tiny(), tiny()
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(
        first({"z": torch.ones(1, 3)}, CAMERA[0], SETTINGS).rgb,
        second({"z": torch.ones(1, 3)}, CAMERA[0], SETTINGS).rgb,
    )


def test_the_picture_depends_on_rendering_and_styles() -> None:
    model = tiny()
    first, second = codes(model, 1), codes(model, 1, seed=5)
    swapped = Codes({"w": first.values["w"], "styles": second.values["styles"]})
    a, b = (model.render(model.scene(c), CAMERA[0], SETTINGS) for c in (first, swapped))
    assert torch.equal(a.raw_rgb, b.raw_rgb) and not torch.allclose(a.rgb, b.rgb)


def test_truncation_acts_once_and_with_the_switch_twice() -> None:
    once, twice = tiny(), tiny(double_truncation=True)
    for model in (once, twice):
        model.update_averages()
        whole, half, none = (codes(model, truncation=psi) for psi in (1.0, 0.5, 0.0))
        middle = (whole.values["w"] + model.average_w) / 2
        torch.testing.assert_close(half.values["w"], middle)
        torch.testing.assert_close(none.values["styles"], model.average_codes().values["styles"].expand(2, -1, -1))
        seen = whole.values["styles"] if model is once else model.codes_of(middle).values["styles"]
        torch.testing.assert_close(half.values["styles"], (seen + model.average_style) / 2)


def test_averages_are_asked_for_kept_and_dropped() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="update_averages"):
        codes(model, truncation=0.5)
    z = torch.randn(7, 3, generator=torch.Generator().manual_seed(3))
    model.update_averages({"z": z})
    w = model.mapping(z)
    torch.testing.assert_close(model.average_w, w.mean(0))
    torch.testing.assert_close(model.average_style, model.decoder.style(w).mean(0))
    model.forget_averages()
    assert not model.has_averages and not model.average_style.any()


def test_style_mixing_keeps_the_head() -> None:
    model = tiny()
    first, second = codes(model), codes(model, seed=5)
    mixed = model.mixed(first, second, 2)
    assert torch.equal(mixed.values["w"], first.values["w"])
    assert torch.equal(mixed.values["styles"][:, :2], first.values["styles"][:, :2])
    assert torch.equal(mixed.values["styles"][:, 2:], second.values["styles"][:, 2:])
    with pytest.raises(ValueError, match="from 1 to 3"):
        model.mixed(first, second, 4)


def test_noise_belongs_to_the_scene() -> None:
    model = tiny()

    def rgb(noise=None) -> torch.Tensor:
        return model.render(model.scene(codes(model, 1), noise), CAMERA[0], SETTINGS).rgb

    assert torch.equal(rgb(), rgb()) and torch.equal(rgb(Draws(3)), rgb(Draws(3)))
    assert not torch.equal(rgb(Draws(3)), rgb(Draws(4))) and not torch.equal(rgb("none"), rgb())
    stored = {"blocks.0.conv1": model.decoder.blocks[0].conv1.stored_noise()}
    assert torch.equal(rgb(stored), rgb())
    with pytest.raises(ValueError, match="noise"):
        rgb("nothing")


def test_decoder_learns_on_a_frozen_renderer() -> None:
    """What stage two does: the renderer without a graph, path lengths of the styles, gradients in the decoder alone."""
    model = tiny().train()
    made = codes(model)
    with torch.no_grad():
        volume = model.render_volume(model.scene(made), CAMERA, SETTINGS, features=True)
    styles = made.values["styles"].detach().requires_grad_()
    scene = model.scene(Codes({"w": made.values["w"].detach(), "styles": styles}))
    image = model.picture(volume, scene, 8).rgb
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(2))
    found = path_length(image, styles, noise, torch.tensor(0.0))
    (found.penalty + image.mean()).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("decoder.blocks.1.conv0") for name in trained)
    assert not any(name.startswith(("field_net", "mapping")) for name in trained)


def test_gradients_reach_the_field_through_the_decoder() -> None:
    model = tiny().train()
    model.render(model.scene(codes(model)), CAMERA, SETTINGS).rgb.square().mean().backward()
    for name in ("field_net.beta", "field_net.layers.0.weight", "mapping.linears.0.weight"):
        assert model.get_parameter(name).grad.abs().max() > 0, name


def test_misfits_are_refused() -> None:
    with pytest.raises(ValueError, match="codes of 5 and 6 features"):
        FullGeneratorConfig(SdfFieldConfig(width=6, style_dim=5))
    model = tiny()
    scene = model.scene(codes(model, 1))
    with pytest.raises(ValueError, match="renderings of 8 pixels, got 4"):
        model.render(scene, CAMERA[0], SETTINGS.replace(resolution=4))
    with pytest.raises(ValueError, match="features=True"):
        model.picture(model.render_volume(scene, CAMERA[0], SETTINGS), scene, 8)
