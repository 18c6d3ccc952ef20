# SPDX-License-Identifier: Apache-2.0
"""CNeRF's generator: the protocol, truncation, subsets, chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from facelab.cameras.sphere import sphere_camera
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.generator import Codes, sample_latents
from facelab.methods.cnerf import mixing
from facelab.methods.cnerf.config import CnerfConfig, ModelConfig, ReferenceConfig, generator_config
from facelab.methods.cnerf.fusion import Subset
from facelab.methods.cnerf.model import CNerfGenerator
from facelab.methods.cnerf.training import METHOD
from facelab.rendering.sdf import SdfOptions
from tests.methods.cnerf.faces import SETTINGS, tiny

CAMERAS = sphere_camera([0.0, 0.3], [0.1, 0.0])


def latents(generator: CNerfGenerator, count: int = 2) -> dict[str, torch.Tensor]:
    return sample_latents(generator.latent_spec, Draws(5), count)


@torch.no_grad()
def test_pictures_of_both_stages() -> None:
    for decoder, side in ((False, 8), (True, 16)):
        generator = tiny(decoder)
        output = generator(latents(generator), CAMERAS, SETTINGS)
        assert output.rgb.shape == (2, 3, side, side) and output.semantics.shape == (2, 9, side, side)
        assert output.raw_rgb.shape == (2, 3, 8, 8) and output.depth.shape == (2, 1, side, side)
        assert (output.features is None) == (not decoder)
        assert output.raw_rgb.abs().max() <= 1 and 0 <= output.opacity.min() <= output.opacity.max() <= 1
        scene = generator.scene(generator.map(latents(generator)))
        volume = generator.render_volume(scene, CAMERAS, SETTINGS)
        torch.testing.assert_close(output.raw_rgb.flatten(2), 2 * volume.rgb.transpose(1, 2) - 1)
        if not decoder:
            torch.testing.assert_close(output.semantics.flatten(2), 2 * volume.semantics.transpose(1, 2) - 1)
            with pytest.raises(ValueError, match="no decoder"):
                generator.decode(output.raw_rgb, output.semantics, scene)


@torch.no_grad()
def test_one_head_from_two_cameras_and_chunks() -> None:
    generator = tiny()
    codes = generator.map(latents(generator))
    one = generator.render(generator.scene(codes[0]), CAMERAS, SETTINGS)
    same = Codes({k: v[:1].expand(2, *v.shape[1:]) for k, v in codes.values.items()})
    two = generator.render(generator.scene(same), CAMERAS, SETTINGS)
    small = generator.render(generator.scene(codes[0]), CAMERAS, SETTINGS.replace(max_points=9 * 40))
    for name in ("rgb", "semantics", "depth", "opacity", "features"):
        torch.testing.assert_close(getattr(two, name), getattr(one, name))
        torch.testing.assert_close(getattr(small, name), getattr(one, name))
    with pytest.raises(ValueError, match="2 scenes cannot be rendered from 1 cameras"):
        generator.render(generator.scene(codes), CAMERAS[0], SETTINGS)
    with pytest.raises(ValueError, match="renderings of 8 pixels, got 4"):
        generator.render(generator.scene(codes), CAMERAS, SETTINGS.replace(resolution=4))


def test_gradients_with_and_without_recomputing() -> None:
    """A stage 1 loss: recomputing chunks changes memory, not gradients."""
    generator, cameras = tiny(False).double(), CAMERAS.to(torch.float64)
    z = {"z": latents(generator)["z"].double()}
    found = []
    for changes in ({}, {"recompute": True, "max_points": 9 * 4 * 2 * 4 * 16}):
        generator.zero_grad()
        scene = generator.scene(generator.map(z))
        options = SdfOptions(samples=True, gradient="forward")
        seen = generator.render_volume(scene, cameras, SETTINGS.replace(**changes), options=options)
        loss = ((seen.gradient.norm(dim=-1) - 1) ** 2).mean() + seen.rgb.mean() + seen.semantics.square().mean()
        (loss + torch.exp(-100 * seen.sdf.abs()).mean()).backward()
        found.append({name: p.grad for name, p in generator.named_parameters()})
    for name, gradient in found[0].items():
        assert (gradient is None) == name.startswith("field_net.base."), name
        if gradient is not None:
            torch.testing.assert_close(found[1][name], gradient)
            assert gradient.abs().max() > 0, name


def test_derivatives_through_the_base_for_inversion() -> None:
    """The background's shape code moves the base only where that is asked for."""
    generator = tiny(False).double()
    camera = CAMERAS[0].to(torch.float64)
    found = []
    for wanted in (False, True):
        codes = generator.map({"z": latents(generator, 1)["z"].double()}).map(lambda v: v.detach().requires_grad_())
        scene = generator.scene(codes).replace(base_gradient=wanted)
        seen = generator.render_volume(scene, camera, SETTINGS, options=SdfOptions(samples=True))
        found.append(torch.autograd.grad(seen.sdf.sum(), codes.values["shape"])[0][0])
        if wanted:
            step = torch.zeros_like(codes.values["shape"])
            step[0, 0, 1] = 1e-6
            moved = [Codes({**codes.values, "shape": codes.values["shape"] + sign * step}) for sign in (1, -1)]
            options = SdfOptions(samples=True)
            a, b = (generator.render_volume(generator.scene(c), camera, SETTINGS, options=options).sdf for c in moved)
            torch.testing.assert_close(found[1][0, 1], (a - b).sum() / 2e-6, rtol=1e-5, atol=1e-6)
    assert (found[0][0] - found[1][0]).abs().max() > 1e-4
    torch.testing.assert_close(found[0][1:], found[1][1:])


@torch.no_grad()
def test_truncation_acts_once_and_twice_as_in_the_original() -> None:
    once = tiny()
    once.update_averages()
    twice = tiny(double_truncation=True)
    twice.load_state_dict(once.state_dict())
    psi = 0.7
    z = latents(once)
    whole, codes, doubled = once.map(z), once.map(z, truncation=psi), twice.map(z, truncation=psi)
    for name in ("shape", "texture", "decoder"):
        expected = once.average_w + psi * (whole.values[name] - once.average_w)
        torch.testing.assert_close(codes.values[name], expected)
        torch.testing.assert_close(doubled.values[name], expected)
    styles = twice.scene(doubled).parts["styles"]
    torch.testing.assert_close(
        styles[:, 3, 0], once.average_w + psi**2 * (whole.values["shape"][:, 3] - once.average_w)
    )
    style = once.decoder.style(codes.values["decoder"])
    torch.testing.assert_close(once.scene(codes).parts["ws"][:, 0], style)
    pulled = once.average_style + psi * (style - once.average_style)
    torch.testing.assert_close(twice.scene(doubled).parts["ws"][:, 0], pulled)
    mixed = doubled.mix(twice.map(z, truncation=psi)[1], 0.5)  # what is remembered survives mixing
    torch.testing.assert_close(mixed.values["truncation"], torch.full((2, 1), psi))
    average = once.scene(once.average_codes()).parts["styles"]
    torch.testing.assert_close(once.scene(once.map(z, truncation=0.0)).parts["styles"][:1], average)
    once.forget_averages()
    with pytest.raises(ValueError, match="no stored average"):
        once.map(z, truncation=psi)


@torch.no_grad()
def test_editing_a_region_and_noise() -> None:
    generator = tiny()
    codes = generator.map(latents(generator))
    a, b = codes[0], codes[1]
    scene = generator.scene(mixing.blend(a, b, "hair", parts=["texture"]))
    styles, before = scene.parts["styles"], generator.scene(a).parts["styles"]
    changed = (styles != before).any(-1)[0]
    assert changed.nonzero().tolist() == [[7, 2], [7, 3]]  # the texture layers of the hair
    torch.testing.assert_close(styles[0, 7, 2], b.values["texture"][0, 7])
    drawn = [generator.render(generator.scene(a, noise), CAMERAS[0], SETTINGS).rgb for noise in (None, None, "none")]
    noisy = [generator.render(generator.scene(a, Draws(s)), CAMERAS[0], SETTINGS).rgb for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(noisy[0], noisy[1])
    with torch.no_grad():
        for block in generator.decoder.blocks:
            block.conv1.noise_strength.fill_(1.0)
    noisy = [generator.render(generator.scene(a, Draws(s)), CAMERAS[0], SETTINGS).rgb for s in (1, 1, 2)]
    assert torch.equal(noisy[0], noisy[1]) and not torch.allclose(noisy[0], noisy[2])


@torch.no_grad()
def test_regions_by_name() -> None:
    generator = tiny()
    scene = generator.scene(generator.map(latents(generator)))
    whole = generator.render_volume(scene, CAMERAS, SETTINGS)
    carved = generator.only(scene, "eyes,nose")
    assert carved.parts["subset"] == Subset((2, 5), carve=True)
    seen = generator.render_volume(carved, CAMERAS, SETTINGS)
    assert seen.semantics[..., [0, 1, 3, 4, 6, 7, 8]].abs().max() == 0
    assert (seen.opacity <= whole.opacity + 1e-6).all()
    features = generator.render_volume(generator.only(scene, "eyes,nose", carve=False), CAMERAS, SETTINGS)
    for name in ("rgb", "semantics", "opacity"):
        torch.testing.assert_close(getattr(features, name), getattr(whole, name))
    assert not torch.allclose(features.features, whole.features)
    assert tiny(features_only=True).only(scene, "hair").parts["subset"] == Subset((7,), carve=False)
    with pytest.raises(UserError, match="unknown region 'eyess'.*Did you mean 'eyes'"):
        generator.only(scene, "eyess")
    hair = generator.field(scene).region(7)
    points = 0.05 * torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    assert (hair.distances(points) >= generator.field(scene).distances(points) - 1e-6).all()


def test_mixing_two_heads_and_the_decoder() -> None:
    generator = tiny()
    a, b = (generator.map({"z": torch.randn(2, 5, generator=torch.Generator().manual_seed(s))}) for s in (1, 2))
    choices = mixing.draw_choices(Draws(0), 9, 2)
    mixed = generator.mixed(a, b, choices)
    own = choices.T[..., None] == mixing.BOTH_SECOND
    torch.testing.assert_close(mixed.values["shape"], torch.where(own, b.values["shape"], a.values["shape"]))
    assert mixed.values["decoder"] is a.values["decoder"]


def test_configuration_builds_and_names_what_does_not_fit() -> None:
    config = CnerfConfig()
    volume, full = generator_config(config), generator_config(replace(config, model=ModelConfig(stage="full")))
    assert volume.decoder is None and full.decoder.size == 512 and full.decoder.in_channels == 256
    assert full.decoder.semantic_channels == 9 and full.field.box_side == pytest.approx(0.24)
    reference = replace(config, reference=ReferenceConfig(True, True, True))
    assert {d.switch for d in METHOD.deviations} == set(vars(reference.reference))
    switched = generator_config(reference)
    assert switched.residual_eikonal and switched.double_truncation and switched.features_only
    small = replace(config, model=ModelConfig(stage="full", resolution=32))
    with pytest.raises(UserError, match="model: size must be at least in_resolution"):
        METHOD.generator_config(small)
    settings = METHOD.inference_settings(config, ray_step_multiplier=2)
    assert settings.samples_coarse == 64 and settings.lock_view and not settings.jitter
    assert (settings.near, settings.far) == (pytest.approx(0.88), pytest.approx(1.12))
    trained = config.render.settings(0.12, training=True)
    assert trained.jitter and trained.samples_coarse == 24 and not trained.lock_view
