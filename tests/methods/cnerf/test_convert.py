# SPDX-License-Identifier: Apache-2.0
"""Files of CNeRF's authors, in miniature: names, shapes, order of the regions."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import facelab
from facelab.bases.stylesdf.convert_discriminators import discriminator_from_original, discriminator_to_original
from facelab.bases.stylesdf.keys import filter_kernel
from facelab.checkpoints.format import export_model
from facelab.checkpoints.recognise import describe
from facelab.cli.convert import convert_checkpoint
from facelab.config import to_dict
from facelab.errors import UserError
from facelab.methods.cnerf import order
from facelab.methods.cnerf.convert import convert_states, is_cnerf, read_original
from facelab.methods.cnerf.model import CNerfGenerator
from facelab.methods.cnerf.originals import (
    generator_config_from_original,
    generator_from_original,
    generator_to_original,
)
from facelab.nn.discriminators.coordconv import (
    RegionDiscriminator,
    RegionDiscriminatorConfig,
    ViewDiscriminator,
    ViewDiscriminatorConfig,
)
from facelab.tensors import tensors_of
from tests.methods.cnerf.faces import SETTINGS, tiny, with_face


@pytest.fixture(scope="module")
def volume_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CNerfGenerator]:
    """A checkpoint of the first stage, as the authors' program saves it."""
    generator = with_face(tiny(decoder=False))
    path = tmp_path_factory.mktemp("cnerf") / "models_0000100.pt"
    gd = ViewDiscriminator(ViewDiscriminatorConfig(resolution=8, semantic_channels=9, group_size=4))
    sd = RegionDiscriminator(RegionDiscriminatorConfig(resolution=8, classes=9))
    state = generator_to_original(generator)
    other = {key: value + 1 for key, value in state.items()}
    judges = {"gd": discriminator_to_original(gd), "sd": discriminator_to_original(sd)}
    torch.save({"g": other, "g_ema": state, **judges}, path)
    return path, generator


def test_a_file_of_the_first_stage(volume_file: tuple[Path, CNerfGenerator]) -> None:
    path, generator = volume_file
    original = read_original(path)
    assert set(original.weights) == {"generator", "ema", "d_global", "d_region"}
    assert original.config.model.stage == "volume" and original.model["width"] == 6 and original.model["depth"] == 2
    for key, value in generator.state_dict().items():
        torch.testing.assert_close(original.weights["ema"][key], value, rtol=0, atol=0)
    beta = original.weights["generator"]["field_net.beta"] - original.weights["ema"]["field_net.beta"]
    assert beta.item() == pytest.approx(1.0)
    text = "\n".join(original.notes)
    assert "CNeRF, 9 regions, 2 + 2 layers of 6, codes of 5, rendered at 64 px" in text
    assert "6 as named, 0 exchanged, 0 unclear; channel 3 is the mouth" in text
    assert original.meta["method"] == "cnerf" and original.meta["origin"]["file"] == path.name


def test_a_converted_file_opens(volume_file: tuple[Path, CNerfGenerator], tmp_path: Path) -> None:
    path, generator = volume_file
    original = read_original(path)
    target = tmp_path / "cnerf.safetensors"
    export_model(target, original.weights, {**original.meta, "config": to_dict(original.config)})
    model = facelab.load(target)
    assert model.method == "cnerf"
    codes = generator.map(model.latents(3))
    expected = generator.render(generator.scene(codes), model.camera(), SETTINGS)
    got = model.generator.render(model.generator.scene(codes), model.camera(), SETTINGS)
    torch.testing.assert_close([*tensors_of(got)], [*tensors_of(expected)])
    picture = model.sample(seed=3, settings=model.settings(8, 1))
    assert picture.rgb.shape == (1, 3, 8, 8)
    assert picture.semantics.shape == (1, 9, 8, 8)  # no class is put in front: the background is a region
    inside = model.head_field(model.codes(3)).distance(torch.zeros(5, 3))
    mesh = model.extract_mesh(3, resolution=12, level=float(inside[0]))
    assert len(mesh.faces) > 0 and mesh.vertices.shape[1] == 3


def test_the_command_tells_what_it_found(volume_file: tuple[Path, CNerfGenerator], tmp_path: Path) -> None:
    path, _ = volume_file
    for method in ("auto", "cnerf"):
        done = CliRunner().invoke(convert_checkpoint, [method, str(path), str(tmp_path / method)])
        assert done.exit_code == 0, done.output
        assert "channel 3 is the mouth" in done.output and "gd: all" in done.output
        assert facelab.load(tmp_path / method / "cnerf.safetensors").method == "cnerf"
    done = CliRunner().invoke(convert_checkpoint, ["eg3d", str(path), str(tmp_path)])
    assert done.exit_code == 2 and done.output.count("\n") == 1


def exchanged_channels(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same head as a program trained on masks in the README's order would store it."""
    names = {3: 4, 4: 3}
    found = {}
    for key, value in state.items():
        parts = key.split(".")
        if key.startswith("renderer.network."):
            parts[2] = str(names.get(int(parts[2]), int(parts[2])))
        if "to_seg" in key and value.ndim > 2 and 9 in value.shape[:2]:
            value = value.index_select(1, torch.tensor([0, 1, 2, 4, 3, 5, 6, 7, 8]))
        found[".".join(parts)] = value
    return found


@torch.no_grad()
def test_exchanged_channels_are_found_and_put_right(volume_file: tuple[Path, CNerfGenerator]) -> None:
    generator = with_face(tiny(channel_max=None))
    state = exchanged_channels(generator_to_original(generator))
    original = convert_states({"g_ema": state}, Path("final_model.pt"))
    assert any("0 as named, 6 exchanged, 0 unclear; channels 3 and 4 were exchanged" in n for n in original.notes)
    assert original.config.model.stage == "full" and original.config.model.resolution == 16
    for key, value in generator.state_dict().items():
        torch.testing.assert_close(original.weights["ema"][key], value, rtol=0, atol=0)
    # discriminators of such a model must see the channels in the new order too
    path, _ = volume_file
    states = torch.load(path, weights_only=True)
    straight = read_original(path).weights
    turned = convert_states({**states, "g_ema": exchanged_channels(states["g_ema"])}, path).weights
    masks = torch.rand(4, 9, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = masks[:, [0, 1, 2, 4, 3, 5, 6, 7, 8]]
    picture = torch.zeros(4, 3, 8, 8)
    judge = ViewDiscriminator(ViewDiscriminatorConfig(resolution=8, semantic_channels=9, group_size=4))
    results = []
    for weights, seen in ((straight, masks), (turned, moved)):
        judge.load_state_dict(weights["d_global"])
        results.append(judge(picture, seen))
    torch.testing.assert_close([*tensors_of(results[0])], [*tensors_of(results[1])])
    classes = [w["d_region"]["classes.1.bias"] for w in (straight, turned)]
    torch.testing.assert_close(classes[0][[0, 1, 2, 4, 3, 5, 6, 7, 8]], classes[1])


def test_faces_that_tell_nothing() -> None:
    source = torch.Generator().manual_seed(0)
    assert order.judge(torch.rand(4, 9, 2, 2, generator=source)).verdict == "undecided"
    masks = torch.zeros(2, 9, 16, 16)
    for region, row in ((order.BROW, 2), (order.EYE, 5), (order.NOSE, 8), (order.MOUTH, 12)):
        masks[:, region, row, 4:10] = 1
    report = order.judge(masks)
    assert report.verdict == "as named" and report.faces == (2, 0, 0)
    rows = order.region_rows(masks)[0]
    assert rows[order.BROW] == 2 and rows[order.MOUTH] == 12 and rows[order.BROW - 3].isnan()
    masks[1] = masks[1].flip(1).roll(1, 0)  # another set of regions: says nothing
    assert order.judge(masks).faces[0] == 1
    with pytest.raises(ValueError, match=r"expected scores \(N, 9"):
        order.judge(masks[:, :5])


def test_untrained_weights_are_converted_with_a_note() -> None:
    state = generator_to_original(tiny(decoder=False))
    original = convert_states({"g": state}, Path("x.pt"))
    assert any("could not be told" in note for note in original.notes) and set(original.weights) == {"generator"}


@pytest.mark.parametrize("kind", ["full512_g", "vol_renderer_g"])
def test_every_name_of_the_released_structure(kind: str) -> None:
    """Names and shapes of the published generators, there and back."""
    shapes = released_shapes(kind)
    state = {key: filter_kernel(4) if key.endswith("kernel") else torch.zeros(shape) for key, shape in shapes.items()}
    config = generator_config_from_original(state)
    assert (config.field.regions, config.field.depth, config.field.width, config.field.style_dim) == (9, 3, 128, 256)
    assert (config.decoder is None) == (kind == "vol_renderer_g")
    generator = CNerfGenerator(config)
    source = generator_to_original(generator)
    assert {key: tuple(value.shape) for key, value in source.items()} == shapes
    converted = generator_from_original(source, generator)
    for key, value in generator.state_dict().items():
        assert torch.equal(converted[key], value), key


def released_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """From ``released_shapes.json``: a name with ``#`` stands for all nine regions."""
    lines = json.loads((Path(__file__).parent / "released_shapes.json").read_text(encoding="utf-8"))[kind]
    shapes: dict[str, tuple[int, ...]] = {}
    for key, shape in lines.items():
        for name in [key.replace("#", str(k)) for k in range(9)] if "#" in key else [key]:
            shapes[name] = tuple(shape)
    return shapes


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    state = generator_to_original(tiny(decoder=False))
    path = Path("bad.pt")

    def refused(changed: dict[str, Tensor], words: str) -> None:
        with pytest.raises(UserError, match=words) as caught:
            convert_states({"g_ema": changed}, path)
        assert "\n" not in str(caught.value)

    refused(
        {k: v for k, v in state.items() if "network.3.rgb_linear.bias" not in k},
        r"missing 'field_net.regions.rgb.bias@3'",
    )
    refused({**state, "renderer.network.3.extra": torch.zeros(1)}, "renderer.network.3.extra")
    refused({**state, "renderer.sigmoid_beta": torch.zeros(2)}, "field_net.beta.*should have shape")
    refused({k: v for k, v in state.items() if not k.startswith("renderer.network.0.")}, "has no tensor")
    with pytest.raises(UserError, match="expected the CNeRF generators g or g_ema, got other"):
        convert_states({"other": state}, path)
    assert is_cnerf({"g_ema": state}) and is_cnerf(dict(state)) and not is_cnerf({"g_ema": {"a": torch.zeros(1)}})
    nan = {**state, "renderer.sigmoid_beta": torch.full((1,), torch.nan)}
    assert any("not checked" in note for note in convert_states({"g_ema": nan}, path).notes)


def test_damaged_files_are_refused_in_one_line() -> None:
    """Tensors of other shapes, missing, exchanged: a message, never a crash."""
    source = random.Random(0)
    for whole in (generator_to_original(tiny(decoder=False)), generator_to_original(tiny(channel_max=None))):
        for _ in range(60):
            state = dict(whole)
            for key in source.sample(sorted(state), 2):
                kind = source.choice(["drop", "flat", "longer", "scalar", "huge", "other"])
                value = state.pop(key)
                if kind != "drop":
                    state[key] = {
                        "flat": value.reshape(-1),
                        "longer": torch.zeros(*value.shape, 2),
                        "scalar": torch.zeros(()),
                        "huge": torch.zeros(1).expand(*(value.shape[:-1] or (1,)), 10**9),
                        "other": state[source.choice(sorted(state))],
                    }[kind]
            if all(
                torch.equal(state[k], v) if k in state and state[k].shape == v.shape else False
                for k, v in whole.items()
            ):
                continue
            try:
                generator_from_original(state, CNerfGenerator(generator_config_from_original(state)))
            except UserError as error:
                assert "\n" not in str(error)


def test_the_manifest_knows_the_released_file(tmp_path: Path) -> None:
    shapes = released_shapes("full512_g")
    path = tmp_path / "download (1).pt"
    torch.save({"g_ema": {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}}, path)
    found = describe(path)
    assert [m.asset.name for m in found.best] == ["cnerf_ffhq512"] and found.best[0].certainty == "structure"
    assert found.methods == ("cnerf",)


def test_discriminators_come_back(volume_file: tuple[Path, CNerfGenerator]) -> None:
    path, _ = volume_file
    state = torch.load(path, weights_only=True)["sd"]
    judge = RegionDiscriminator(RegionDiscriminatorConfig(resolution=8, classes=9))
    converted = discriminator_from_original(state, judge)
    assert all(torch.equal(converted[k], v) for k, v in read_original(path).weights["d_region"].items())
