# SPDX-License-Identifier: Apache-2.0
"""Files of StyleSDF's authors: exact names and shapes of the released ones, small ones converted and opened, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import facelab
from facelab import assets
from facelab.bases.stylesdf.config import preset
from facelab.bases.stylesdf.convert import convert_states, is_stylesdf, read_original
from facelab.bases.stylesdf.convert_discriminators import (
    discriminator_of,
    discriminator_shapes,
    discriminator_to_original,
)
from facelab.bases.stylesdf.full_model import FullGenerator, FullGeneratorConfig
from facelab.bases.stylesdf.full_originals import (
    build_generator,
    generator_config_from_original,
    generator_from_original,
    generator_to_original,
)
from facelab.bases.stylesdf.model import SdfGenerator, SdfGeneratorConfig
from facelab.bases.stylesdf.training import METHOD
from facelab.checkpoints.format import export_model
from facelab.checkpoints.recognise import describe, digest_of
from facelab.cli.convert import convert_checkpoint
from facelab.config import to_dict
from facelab.errors import UserError
from facelab.fields.sdf import SdfFieldConfig
from facelab.nn.discriminators.coordconv import (
    RegionDiscriminator,
    RegionDiscriminatorConfig,
    ViewDiscriminator,
    ViewDiscriminatorConfig,
)
from facelab.nn.discriminators.skip_residual import ResidualDiscriminator, ResidualDiscriminatorConfig
from facelab.nn.skip_decoder import SkipDecoderConfig

States = dict[str, dict[str, Tensor]]

# digests (see facelab.checkpoints.recognise.digest_of) of the names and shapes that the authors' networks have
DISCRIMINATORS = {
    "4b6cf3f0c61445f3": lambda: ViewDiscriminator(ViewDiscriminatorConfig()),
    "ea0ca0b353b9692e": lambda: ResidualDiscriminator(ResidualDiscriminatorConfig()),
    "3dd310b7358f2638": lambda: ResidualDiscriminator(ResidualDiscriminatorConfig(resolution=512)),
    # CNeRF's: global, of one region, of the picture
    "d4ff09e88178408f": lambda: ViewDiscriminator(ViewDiscriminatorConfig(semantic_channels=9, group_size=4)),
    "0203a46cb286dc13": lambda: RegionDiscriminator(RegionDiscriminatorConfig()),
    "45748c6b39646e1c": lambda: ResidualDiscriminator(ResidualDiscriminatorConfig(resolution=512, semantic_channels=9)),
}


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def noisy(module: torch.nn.Module, seed: int) -> None:
    """Every parameter and stored buffer random, so that no two can be exchanged unseen; averages stay zero."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not name.startswith("average_"):
                value.copy_(value + 0.1 * torch.randn(value.shape, generator=source))


def small_generator(full: bool, seed: int = 1) -> SdfGenerator:
    field = SdfFieldConfig(width=6, layers=2, style_dim=5)
    config = SdfGeneratorConfig(field, latent_dim=4)
    if full:
        tail = SkipDecoderConfig(size=16, in_resolution=8, in_channels=6, style_dim=5, channel_max=4)
        config = FullGeneratorConfig(field, latent_dim=4, decoder=tail)
    generator = build_generator(config)
    noisy(generator, seed)
    return generator.eval()


def small_states(full: bool) -> States:
    """What a file of the authors' program holds."""
    judge = (
        ResidualDiscriminator(ResidualDiscriminatorConfig(resolution=16, channel_max=4))
        if full
        else ViewDiscriminator(ViewDiscriminatorConfig(resolution=8, channel_max=4))
    )
    noisy(judge, 3)
    live, averaged = (generator_to_original(small_generator(full, seed)) for seed in (2, 1))
    return {"g": live, "d": discriminator_to_original(judge), "g_ema": averaged}


def saved(states: States, path: Path) -> Path:
    torch.save(states, path)
    return path


# ---------------------------------------------------------------- the released files


@pytest.mark.parametrize(
    ("recipe", "entry"),
    [("ffhq_volume", "stylesdf_ffhq_renderer"), ("afhq_full", "stylesdf_afhq512"), ("ffhq_full", "stylesdf_ffhq1024")],
)
def test_a_recipe_has_the_names_and_shapes_of_the_released_file(recipe: str, entry: str) -> None:
    config = METHOD.generator_config(preset(recipe))
    state = generator_to_original(build_generator(config))
    structure = assets.get(entry).structure
    assert structure is not None and structure.group == "g_ema"
    assert len(state) == structure.tensors
    assert digest_of(shapes_of(state)) == structure.digest
    assert generator_config_from_original(state) == config


@pytest.mark.parametrize("digest", DISCRIMINATORS)
def test_discriminators_have_the_names_and_shapes_of_the_released_ones(digest: str) -> None:
    model = DISCRIMINATORS[digest]()
    assert digest_of(discriminator_shapes(model)) == digest
    found = discriminator_of(discriminator_to_original(model))
    assert type(found) is type(model) and found.config == model.config


def test_sizes_of_the_released_files_follow_from_their_tensors() -> None:
    """Four bytes for each number of g, g_ema and d; the rest of the known size is the container."""
    g = generator_to_original(build_generator(METHOD.generator_config(preset("ffhq_volume"))))
    d = discriminator_to_original(ViewDiscriminator(ViewDiscriminatorConfig()))
    expected = 4 * sum(2 * v.numel() for v in g.values()) + 4 * sum(v.numel() for v in d.values())
    size = assets.get("stylesdf_ffhq_renderer").size
    assert size is not None and 0 < size - expected < 100_000


# ---------------------------------------------------------------- small files of the same layout


@pytest.mark.parametrize("full", [False, True])
def test_a_file_is_converted_whole_and_opens(full: bool, tmp_path: Path) -> None:
    states = small_states(full)
    path = saved(states, tmp_path / "models_0000100.pt")
    original = read_original(path)
    assert set(original.weights) == {"generator", "ema", "discriminator"}
    assert original.config.stage == ("full" if full else "volume")
    assert original.config.render.resolution == 8  # told by the noise maps, or by the discriminator
    assert original.model["width"] == 6 and original.model["latent_dim"] == 4
    text = "\n".join(original.notes)
    assert f"g_ema: all {len(states['g_ema'])} tensors accounted for" in text
    assert f"d: all {len(states['d'])} tensors accounted for" in text

    target = tmp_path / "model.safetensors"
    export_model(target, original.weights, {**original.meta, "config": to_dict(original.config)})
    model = facelab.load(target)
    assert model.method == "stylesdf"
    expected = small_generator(full)
    expected.update_averages()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(model.state[key], value, rtol=0, atol=0)
    picture = model.sample(seed=3, settings=model.settings(ray_step_multiplier=1))
    assert picture.rgb.shape == ((1, 3, 16, 16) if full else (1, 3, 8, 8))


@pytest.mark.parametrize("full", [False, True])
def test_every_number_comes_back(full: bool) -> None:
    states = small_states(full)
    generator = small_generator(full, seed=9)
    generator.load_state_dict(generator_from_original(states["g"], generator))
    again = generator_to_original(generator)
    assert set(again) == set(states["g"])
    for key, value in states["g"].items():
        assert torch.equal(again[key], value), key


@pytest.mark.parametrize("full", [False, True])
def test_the_command_tells_what_it_found(full: bool, tmp_path: Path) -> None:
    path = saved(small_states(full), tmp_path / "model.pt")
    for method in ("auto", "stylesdf"):
        done = CliRunner().invoke(convert_checkpoint, [method, str(path), str(tmp_path / method)])
        assert done.exit_code == 0, done.output
        assert "2 + 1 layers of 6, codes of 5" in done.output and "tensors accounted for" in done.output
        assert facelab.load(tmp_path / method / "stylesdf.safetensors").method == "stylesdf"
    for method in ("cnerf", "eg3d"):
        done = CliRunner().invoke(convert_checkpoint, [method, str(path), str(tmp_path)])
        assert done.exit_code == 2 and done.output.count("\n") == 1, done.output


def test_cameras_are_those_of_the_data_set(tmp_path: Path) -> None:
    path = saved(small_states(False), tmp_path / "afhq_vol_renderer.pt")
    assert read_original(path).config.view.azimuth == 0.15
    assert read_original(path, data_set="ffhq").config.view.azimuth == 0.3
    with pytest.raises(UserError, match="unknown data set"):
        read_original(path, data_set="cats")
    nameless = read_original(saved(small_states(False), tmp_path / "model.pt"))
    assert nameless.config.view.azimuth == 0.3 and "nothing tells them" in nameless.notes[-1]


def test_a_bare_state_dict_is_the_averaged_generator(tmp_path: Path) -> None:
    path = saved(small_states(True)["g_ema"], tmp_path / "g.pt")  # type: ignore[arg-type]
    assert set(read_original(path).weights) == {"ema"}


def test_a_strange_discriminator_is_left_out_with_a_note() -> None:
    states = small_states(True)
    states["d"] = small_states(False)["d"]
    original = convert_states(states, Path("x.pt"))
    assert "discriminator" not in original.weights
    assert any("belongs to the other training stage" in note for note in original.notes)


def test_files_are_told_apart_by_their_tensors(tmp_path: Path) -> None:
    for full in (False, True):
        path = saved(small_states(full), tmp_path / f"{full}.pt")
        found = describe(path)
        assert found.methods == ("stylesdf",) and found.best[0].certainty == "kind"
        wanted = {"stylesdf_ffhq1024", "stylesdf_afhq512"}
        assert ({match.asset.name for match in found.best} == wanted) is full
    assert is_stylesdf(small_states(True)) and not is_stylesdf({"g": {"weight": torch.zeros(2)}})


# ---------------------------------------------------------------- what does not fit is named


@pytest.mark.parametrize("group", ["g", "g_ema"])
def test_unknown_tensors_are_named(group: str) -> None:
    states = small_states(True)
    states[group]["decoder.convs.0.conv.modulation.wieght"] = torch.zeros(1)
    states[group]["extra"] = torch.zeros(1)
    with pytest.raises(UserError, match=f"x.pt: {group}.*'extra'"):
        convert_states(states, Path("x.pt"))


@pytest.mark.parametrize(
    "key",
    [
        "decoder.convs.0.conv.weight",
        "decoder.style.3.bias",
        "decoder.noises.noise_1",
        "renderer.network.views_linears.gamma.bias",
        "style.1.weight",
    ],
)
def test_missing_tensors_are_named(key: str) -> None:
    states = small_states(True)
    del states["g_ema"][key]
    with pytest.raises(UserError, match="missing|no tensor|no rule|expected|belong together") as caught:
        convert_states(states, Path("x.pt"))
    assert "x.pt" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("decoder.conv1.noise.weight", (2,)),
        ("decoder.to_rgb1.bias", (1, 4, 1, 1)),
        ("decoder.convs.1.conv.weight", (2, 4, 4, 3, 3)),
        ("decoder.noises.noise_0", (1, 2, 8, 8)),
        ("renderer.network.rgb_linear.weight", (4, 6)),
    ],
)
def test_other_shapes_are_named(key: str, shape: tuple[int, ...]) -> None:
    states = small_states(True)
    states["g_ema"][key] = torch.zeros(shape)
    with pytest.raises(UserError, match="should have shape"):
        convert_states(states, Path("x.pt"))


def test_other_filters_are_refused() -> None:
    states = small_states(True)
    states["g_ema"]["decoder.convs.0.conv.blur.kernel"] = torch.ones(4, 4) / 4
    with pytest.raises(UserError, match=r"decoder\.convs\.0\.conv\.blur\.kernel.*other filters"):
        convert_states(states, Path("x.pt"))


def test_a_model_that_no_configuration_describes_is_refused() -> None:
    field = SdfFieldConfig(width=6, layers=2, style_dim=5)
    tail = SkipDecoderConfig(size=16, in_resolution=8, in_channels=6, style_dim=5, channel_max=4, latent_dim=7)
    state = generator_to_original(FullGenerator(FullGeneratorConfig(field, 4, decoder=tail)))
    with pytest.raises(UserError, match="its decoder is .*cannot be converted"):
        convert_states({"g_ema": state}, Path("x.pt"))


def test_sizes_out_of_all_proportion_are_refused_before_anything_is_built() -> None:
    states = small_states(True)
    states["g_ema"] |= {f"decoder.to_rgbs.{n}.bias": torch.zeros(1) for n in range(40)}
    with pytest.raises(UserError, match="40 levels from 8 pixels"):
        convert_states(states, Path("x.pt"))
    wide = discriminator_to_original(ResidualDiscriminator(ResidualDiscriminatorConfig(resolution=16, channel_max=4)))
    with pytest.raises(UserError, match="60 blocks"):
        discriminator_of({**wide, **{f"convs.{n}.skip.1.weight": torch.zeros(1) for n in range(61)}})
    with pytest.raises(UserError, match="channels would fit the others"):
        discriminator_of({**wide, "final_conv.0.weight": torch.zeros(100_000, 1, 1, 1)})


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected the StyleSDF generators"):
        read_original(saved({"d": {"w": torch.zeros(1)}}, tmp_path / "d.pt"))
    with pytest.raises(UserError, match="no matrix"):
        read_original(saved({"g_ema": {"style.0.weight": torch.zeros(2, 2)}}, tmp_path / "g.pt"))


def test_the_switch_reaches_the_generator() -> None:
    config = preset("afhq_full")
    twice = dataclasses.replace(config, reference=dataclasses.replace(config.reference, double_truncation=True))
    assert not METHOD.generator_config(config).double_truncation  # type: ignore[attr-defined]
    assert METHOD.generator_config(twice).double_truncation  # type: ignore[attr-defined]
