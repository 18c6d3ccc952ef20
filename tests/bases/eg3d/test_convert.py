# SPDX-License-Identifier: Apache-2.0
"""Official EG3D pickles, made here in their layout: the converted model is the same, wrong sizes are refused."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from facelab.bases.eg3d.convert import Original, read_original
from facelab.bases.eg3d.model import TriPlaneGenerator
from facelab.bases.eg3d.originals import generator_config_from_original
from facelab.bases.eg3d.training import METHOD
from facelab.cameras.orbit import orbit_camera
from facelab.checkpoints.format import load_checkpoint
from facelab.cli.convert import Initialised, convert_checkpoint, open_any
from facelab.config import from_dict
from facelab.errors import UserError
from facelab.nn.discriminators.stylegan2 import StyleGan2Discriminator
from tests.bases.eg3d.official_files import (
    D_KWARGS,
    KWARGS,
    OPTIONS,
    changed,
    make_networks,
    original_tensors,
    pickle_of,
)
from tests.checkpoints.pickle_makers import TRAP, Call, dump, lay_traps, tensor_call


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    return make_networks()


@pytest.fixture(scope="module")
def originals(networks: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    return original_tensors(networks)


@pytest.fixture
def convert(tmp_path: Path) -> Callable[[bytes], Original]:
    def run(data: bytes) -> Original:
        (tmp_path / "net.pkl").write_bytes(data)
        return read_original(tmp_path / "net.pkl")

    return run


def test_converted_networks_are_the_same(networks, originals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, architecture and pictures, with traps under every module that the file names."""
    (tmp_path / "net.pkl").write_bytes(pickle_of(originals))
    lay_traps(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = read_original("net.pkl")
    assert not (tmp_path / "PWNED").exists()
    assert set(found.weights) == {"generator", "ema", "discriminator"}
    for name, group in {"G": "generator", "G_ema": "ema", "D": "discriminator"}.items():
        expected = networks[name].state_dict()
        assert set(found.weights[group]) == set(expected)
        assert all(torch.equal(found.weights[group][key], value) for key, value in expected.items())
    built = METHOD.build_generator(found.config).eval()
    built.load_state_dict(found.weights["ema"])
    settings = METHOD.inference_settings(found.config, 8)
    camera = orbit_camera(torch.tensor(1.4), torch.tensor(1.5), 2.7, (0.0, 0.0, 0.2), 4.2647)
    latents = {"z": torch.randn(1, 6, generator=torch.Generator().manual_seed(5))}
    with torch.no_grad():
        ours = built(latents, camera, settings)
        theirs = networks["G_ema"].eval()(latents, camera, settings)
    assert (
        ours.rgb.shape == (1, 3, 128, 128)
        and torch.equal(ours.rgb, theirs.rgb)
        and torch.equal(ours.raw_rgb, theirs.raw_rgb)
    )
    discriminator = StyleGan2Discriminator(METHOD.discriminator_config(found.config))
    discriminator.load_state_dict(found.weights["discriminator"])


def test_configuration_says_what_the_file_says(originals, convert) -> None:
    found = convert(pickle_of(originals, rendering_kwargs=OPTIONS | {"box_warp": 1.25}))
    config = found.config
    m, r = config.model, config.render
    assert (m.resolution, m.superresolution, m.superresolution_half) == (128, "2x", 4)
    assert (m.latent_dim, m.style_dim, m.mapping_layers, m.channel_base, m.channel_max) == (6, 8, 3, 256, 4)
    assert m.axes == "xy_xz_zx" and m.plane_resolution == 256 and m.box_side == 1.25  # the instance's options win
    assert (r.resolution, r.samples, r.importance, r.near, r.far, r.box_limits) == (16, 5, 4, 2.25, 3.3, False)
    assert config.conditioning.pose and config.conditioning.swap == 0.8
    assert config.loss.density_weight == 0.5 and config.neural.initial == 16
    assert config.reference.legacy_raw and config.view.focal == 4.2647
    d = config.discriminator
    assert (d.dual, d.conditioned, d.group_size, d.freeze_layers, d.label_noise) == (True, True, 2, 2, 0.5)
    assert found.meta["label_std"] == pytest.approx(torch.linspace(0, 1, 25).tolist())
    assert found.meta["origin"]["augment_p"] == 0.25 and found.meta["origin"]["rendering_kwargs"]["box_warp"] == 1.25
    notes = "\n".join(found.notes)
    for words in ("codes z 6, w 8, mapping of 3 layers", "rendering 16 px with 5 + 4 samples from 2.25 to 3.3",
                  "super-resolution 2x to 128 px", "box of 1.25", f"TriPlaneGenerator ({len(TRAP)})"):  # fmt: skip
        assert words in notes


def test_options_of_the_other_data_sets(originals, convert) -> None:
    cars = changed(
        ray_start="auto", ray_end="auto", white_back=True, box_warp=1.6, avg_camera_radius=1.7, avg_camera_pivot=[0, 0, 0],
        reg_type="total-variation", c_gen_conditioning_zero=True,
    )  # fmt: skip
    config = convert(pickle_of(originals, cars, names=("G_ema",))).config
    assert config.render.box_limits and config.render.background == "white" and config.model.box_side == 1.6
    assert config.view.focal == 1.7074 and config.view.pivot == (0.0, 0.0, 0.0)
    assert not config.conditioning.pose and config.loss.density_weight == 0
    cats = convert(pickle_of(originals, changed(avg_camera_pivot=[0, 0, -0.06]), names=("G_ema",))).config
    assert cats.view.pivot == (0.0, 0.0, -0.06) and cats.view.focal == 4.2647


def test_scale_of_the_label(networks, originals, convert) -> None:
    """Without a scale the original's mapping network sees zeros; any other scale becomes a part of the weights."""
    none = convert(pickle_of(originals, changed(c_scale=None), names=("G_ema",)))
    assert not none.config.conditioning.pose and "sees no pose" in "\n".join(none.notes)
    half = convert(pickle_of(originals, changed(c_scale=0.5), names=("G_ema",)))
    built = METHOD.build_generator(half.config)
    built.load_state_dict(half.weights["ema"])
    kwargs = changed(c_scale=0.5)
    theirs = TriPlaneGenerator(generator_config_from_original(kwargs, kwargs["rendering_kwargs"]))
    theirs.load_state_dict(networks["G_ema"].state_dict())
    latents, label = {"z": torch.ones(1, 6)}, torch.linspace(-1, 1, 25)[None]
    torch.testing.assert_close(built.map(latents, label).values["w"], theirs.map(latents, label).values["w"])


def test_parts_that_are_missing(originals, convert) -> None:
    only = convert(pickle_of(originals, names=("G_ema",)))
    assert set(only.weights) == {"ema"} and only.config.discriminator.channel_base == 32768
    with pytest.raises(UserError, match="expected the generators G or G_ema, got D, augment_pipe"):
        convert(pickle_of(originals, names=("D",)))
    old = convert(pickle_of(originals, KWARGS | {"rendering_kwargs": {
        "superresolution_module": "SuperresolutionHybrid2X", "c_scale": 1}}))  # fmt: skip
    assert old.config.render.samples == 48 and old.config.render.near == 2.25 and old.config.model.box_side == 1.0


@pytest.mark.parametrize(
    "change", [{"mapping_kwargs": {"num_layers": 4}}, {"architecture": "skip"}, {"img_resolution": 256}, {"channel_max": 8},
               {"epilogue_kwargs": "none"}, {"channel_base": 0}, {"img_resolution": 2**60}],
)  # fmt: skip
def test_a_discriminator_that_does_not_fit_is_left_out(originals, convert, change: dict) -> None:
    found = convert(pickle_of(originals, d_kwargs=D_KWARGS | change))
    assert set(found.weights) == {"generator", "ema"}
    assert any(note.startswith("the discriminator is left out: D") for note in found.notes)


WRONG = {
    "z_dim": ({"z_dim": 7}, "by its arguments .z_dim and w_dim. 'backbone.mapping.fc0.weight' should have shape"),
    "w_dim": ({"w_dim": 16}, "w_dim"),
    "c_dim": ({"c_dim": 26}, "c_dim"),
    "no label": ({"c_dim": 0}, "should have shape"),
    "mapping layers": ({"mapping_kwargs": {"num_layers": 2}}, "num_layers of the mapping network is 2, the file has 3"),
    "a billion layers": ({"mapping_kwargs": {"num_layers": 10**9}}, "the file has 3"),
    "channels": ({"channel_max": 8}, "channel_base and channel_max"),
    "a trillion channels": ({"channel_base": 10**12, "channel_max": 10**12}, "channel_base and channel_max"),
    "a text for a number": ({"z_dim": "6"}, "z_dim should be a number"),
    "no z_dim": ({"z_dim": None}, "z_dim"),
    "picture": ({"img_resolution": 256}, "img_resolution is 256, but super-resolution 2x makes 128 px"),
    "colours": ({"img_channels": 4}, "img_channels is 4"),
    "another super-resolution": (changed(superresolution_module="x.SuperresolutionHybrid8XDC"), "makes 512 px"),
    "a super-resolution of one's own": (changed(superresolution_module="x.Mine"), "got 'x.Mine'"),
    "another activation": (changed(clamp_mode="relu"), "clamp_mode"),
    "a limit of rays that is text": (changed(ray_end="far"), "missing or unusual arguments"),
    "far before near": (changed(ray_start=3.3, ray_end=2.25), "missing or unusual arguments"),
    "a pivot of two numbers": (changed(avg_camera_pivot=[0, 0]), "unusual arguments|pivot"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_fit_the_tensors_are_refused(originals, tmp_path: Path, name: str) -> None:
    change, words = WRONG[name]
    (tmp_path / "net.pkl").write_bytes(pickle_of(originals, KWARGS | change, names=("G_ema",)))
    start = time.thread_time()
    with pytest.raises(UserError, match=words) as caught:
        read_original(tmp_path / "net.pkl")
    assert time.thread_time() - start < 2 and "\n" not in str(caught.value) and "net.pkl" in str(caught.value)


@pytest.mark.parametrize("rendering", [0, -1, 10**9, "64", None, True])
def test_unusual_rendering_resolutions_are_refused(originals, convert, rendering: object) -> None:
    with pytest.raises(UserError, match="neural_rendering_resolution should be 1 to 1024"):
        convert(pickle_of(originals, names=("G_ema",), neural_rendering_resolution=rendering))


def test_damaged_weights_are_refused(originals, convert) -> None:
    state = dict(originals["G_ema"])
    del state["decoder.net.2.bias"]
    with pytest.raises(UserError, match=r"net\.pkl: G_ema: .*missing 'field_net\.decoder\.output_bias'"):
        convert(pickle_of(originals | {"G_ema": state}, names=("G_ema",)))
    state = dict(originals["G_ema"]) | {"encoder.weight": torch.ones(2)}
    with pytest.raises(UserError, match=r"no rule for 'encoder\.weight'"):
        convert(pickle_of(originals | {"G_ema": state}, names=("G_ema",)))


def test_a_super_resolution_of_another_width_is_kept_apart(originals, networks, convert) -> None:
    """The original's takes codes of 512 whatever w_dim is: such a small generator can only render."""
    wide = {
        key: torch.zeros(value.shape[0], 512) if "superresolution" in key and "affine.weight" in key else value
        for key, value in originals["G_ema"].items()
    }
    found = convert(pickle_of(originals | {"G_ema": wide}, names=("G_ema",)))
    assert found.config.model.superresolution == "none" and found.config.model.resolution == 16
    assert "makes no enlarged picture" in "\n".join(found.notes)
    kept = found.weights["superresolution_ema"]
    assert kept and all(torch.equal(kept[key], wide[key]) for key in kept)
    built = METHOD.build_generator(found.config)
    built.load_state_dict(found.weights["ema"])
    assert torch.equal(built.state_dict()["field_net.decoder.output_bias"], originals["G_ema"]["decoder.net.2.bias"])


def run(*arguments: object) -> Any:
    return CliRunner().invoke(convert_checkpoint, [str(a) for a in arguments])


@pytest.mark.parametrize("method", ["eg3d", "auto"])
def test_command(originals, networks, tmp_path: Path, method: str) -> None:
    (tmp_path / "net.pkl").write_bytes(pickle_of(originals))
    result = run(method, tmp_path / "net.pkl", tmp_path / "out")
    assert result.exit_code == 0, result.output
    lines = result.output.strip().splitlines()
    target = tmp_path / "out" / "eg3d.safetensors"
    assert lines[-1] == f"written: {target}" and "G_ema is a TriPlaneGenerator" in result.output
    assert sorted(os.listdir(tmp_path / "out")) == ["eg3d.json", "eg3d.safetensors"]
    stored = load_checkpoint(target, with_state=False)
    config = from_dict(METHOD.config_type, stored.meta["config"]).at(0)
    assert json.loads((tmp_path / "out" / "eg3d.json").read_text())["config"] == stored.meta["config"]
    built = METHOD.build_generator(config)
    built.load_state_dict(stored.weights["ema"])
    assert all(
        torch.equal(a, b)
        for a, b in zip(built.state_dict().values(), networks["G_ema"].state_dict().values(), strict=True)
    )
    assert open_any(target).model == open_any(tmp_path / "net.pkl").model


@pytest.mark.parametrize("keeps", [True, False])
def test_training_starts_from_an_official_file(
    originals, networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    """The averaged generator and the discriminator go into the models of a run with the file's configuration; the
    average style code too, because EG3D says that training keeps it up to date."""
    monkeypatch.setattr(type(METHOD), "running_averages", keeps)
    path = tmp_path / "net.pkl"
    path.write_bytes(pickle_of(originals))
    models = METHOD.build(read_original(path).config)
    Initialised(METHOD, path, fresh_discriminators=False).fill(models)
    different = set()
    for name, source in {"generator": "G_ema", "discriminator": "D"}.items():
        loaded, expected = models[name].state_dict(), networks[source].state_dict()
        different |= {f"{name}.{key}" for key, value in expected.items() if not torch.equal(loaded[key], value)}
    assert different == (set() if keeps else {"generator.backbone.mapping.w_avg"})


def test_sampling_without_antialias(originals, networks, convert) -> None:
    """``sr_antialias`` reaches the built network, whose pictures of a large rendering differ by it."""
    pictures = {}
    for antialias in (True, False):
        config = convert(pickle_of(originals, changed(sr_antialias=antialias), names=("G_ema",))).config
        assert config.model.superresolution_antialias is antialias
        built = METHOD.build_generator(config).eval()
        assert built.superresolution.antialias is antialias
        built.load_state_dict(networks["G_ema"].state_dict())
        features = torch.randn(1, 32, 96, 96, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            pictures[antialias] = built.enlarge(features, torch.ones(1, built.backbone.num_ws, 8))[0]
    assert pictures[True].shape == (1, 3, 128, 128) and not torch.allclose(pictures[True], pictures[False])


def test_command_without_averages_and_with_wrong_options(originals, tmp_path: Path) -> None:
    path = tmp_path / "net.pkl"
    path.write_bytes(pickle_of(originals, names=("G", "G_ema")))
    assert run("eg3d", path, tmp_path / "live.safetensors", "--no-ema").exit_code == 0
    assert set(load_checkpoint(tmp_path / "live.safetensors", with_state=False).weights) == {"generator"}
    refused = run("pigan", path, tmp_path / "no.safetensors")
    assert refused.exit_code == 2 and not (tmp_path / "no.safetensors").exists()
    refused = run("eg3d", path, tmp_path / "no.safetensors", "--curriculum", "celeba")
    assert refused.exit_code == 2 and "leave out --ema and --curriculum" in refused.output
    path.write_bytes(pickle_of(originals, names=("G_ema",)))
    refused = run("eg3d", path, tmp_path / "no.safetensors", "--no-ema")
    assert refused.exit_code == 2 and "averages only" in refused.output


def test_command_refuses_hostile_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree = {"G": None, "D": None, "G_ema": Call("os", "system", "touch PWNED"), "w": tensor_call(torch.ones(2))}
    (tmp_path / "net.pkl").write_bytes(dump(tree))
    for method in ("eg3d", "auto"):
        result = run(method, "net.pkl", "out")
        assert result.exit_code == 2 and "'os.system'" in result.output and len(result.output.splitlines()) == 1
    assert os.listdir(tmp_path) == ["net.pkl"]


def test_values_that_are_not_finite_are_refused(originals, tmp_path: Path) -> None:
    state = copy.copy(originals["G_ema"]) | {"decoder.net.2.bias": torch.full((33,), float("nan"))}
    (tmp_path / "net.pkl").write_bytes(pickle_of(originals | {"G_ema": state}, names=("G_ema",)))
    result = run("eg3d", tmp_path / "net.pkl", tmp_path / "out.safetensors")
    assert result.exit_code == 2 and "output_bias" in result.output and not (tmp_path / "out.safetensors").exists()
