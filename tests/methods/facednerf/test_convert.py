# SPDX-License-Identifier: Apache-2.0
"""Files that the original wrote: tuned pickles with doubled samples, weights alone, latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from facelab.bases.eg3d.training import METHOD
from facelab.cli.convert import open_any
from facelab.errors import UserError
from facelab.inference.latent_files import read_codes
from facelab.methods.facednerf.convert import read_original
from tests.bases.eg3d.official_files import KWARGS, OPTIONS, changed, make_networks, original_tensors
from tests.checkpoints.pickle_makers import dump, network_record


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    return make_networks()


def tuned_pickle(networks: dict[str, Any], factor: float, plain: bool = True) -> bytes:
    """``fintuned_generator.pkl``: G as it was, G_ema tuned and with more samples, as run.py leaves them."""
    tensors = original_tensors(networks)
    counts = {name: int(OPTIONS[name] * factor) for name in ("depth_resolution", "depth_resolution_importance")}
    made: dict[str, object] = {"training_set_kwargs": {"path": "faces.zip", "resolution": 128}, "augment_pipe": None}
    for name, options in (("G", OPTIONS), ("G_ema", changed(**counts)["rendering_kwargs"])):
        if name == "G" and not plain:
            continue
        shown = {"neural_rendering_resolution": 16, "rendering_kwargs": options}
        made[name] = network_record("TriPlaneGenerator", tensors[name], KWARGS, **shown)
    return dump(made)


@pytest.mark.parametrize(("factor", "plain", "samples"), [(2, True, 5), (3, True, 5), (1, True, 5), (2, False, 10)])
def test_tuned_pickles_get_the_samples_of_their_model(
    networks: dict[str, Any], tmp_path: Path, factor: float, plain: bool, samples: int
) -> None:
    path = tmp_path / "fintuned_generator.pkl"
    path.write_bytes(tuned_pickle(networks, factor, plain))
    found = read_original(path)
    assert found.method == "eg3d" and found.config.render.samples == samples
    assert any("multiplies them at every load" in note for note in found.notes) is (plain and factor > 1)
    ours = networks["G_ema"].state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in found.weights["ema"].items())
    assert open_any(path).config["render"]["samples"] == samples  # what every command opens


def test_weights_alone(networks: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tuned.pth"
    tensors = original_tensors(networks)["G_ema"]
    torch.save({"G_ema": tensors}, path)
    found = read_original(path)
    model = found.config.model
    assert (model.latent_dim, model.style_dim, model.mapping_layers, model.superresolution) == (6, 8, 3, "2x")
    assert found.config.render.samples == 48 and found.config.view.pivot == (0.0, 0.0, 0.2)
    assert any("holds weights alone" in note for note in found.notes)
    generator = METHOD.build_generator(found.config)
    generator.load_state_dict(found.weights["ema"])  # strictly
    assert read_original(path, domain="afhq").config.view.pivot == (0.0, 0.0, -0.06)
    source = open_any(path)
    assert source.method == "eg3d" and source.config["render"]["samples"] == 48
    with pytest.raises(UserError, match="unknown domain 'afq', expected one of .*Did you mean 'afhq'"):
        read_original(path, domain="afq")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone.mapping.w_avg": None}, "expected 'backbone.mapping.w_avg' with 1 dimensions in 'G_ema', got none"),
        (
            {"decoder.net.0.weight": torch.zeros(3, 3)},
            r"'decoder.net.0.weight' should have shape \(64, 32\), got \(3, 3\)",
        ),
        ({"superresolution.block0.conv0.weight": None}, "superresolution_module"),
        ({"more": torch.zeros(1)}, "more"),
    ],
)
def test_damaged_weights_are_one_line(
    networks: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tensors = {k: v for k, v in {**original_tensors(networks)["G_ema"], **change}.items() if v is not None}
    path = tmp_path / "tuned.pth"
    torch.save({"G_ema": tensors}, path)
    with pytest.raises(UserError, match=message) as caught:
        read_original(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"model": {"weight": torch.zeros(2)}}, path)
    with pytest.raises(
        UserError, match="expected an EG3D pickle or a .pth file of.*, got a dictionary of model; check"
    ):
        read_original(path)


@pytest.mark.parametrize("vectors", ["all", "one"])
def test_latents_render_with_the_converted_generator(networks: dict[str, Any], tmp_path: Path, vectors: str) -> None:
    generator = networks["G_ema"]
    layers, width = generator.backbone.num_ws, generator.config.w_dim
    w = np.random.default_rng(0).normal(size=(1, layers if vectors == "all" else 1, width)).astype(np.float32)
    np.save(tmp_path / "00018.npy", w)
    codes = read_codes(tmp_path / "00018.npy", generator)
    assert codes.values["w"].shape == (1, layers, width)
    np.testing.assert_array_equal(codes.values["w"].numpy(), np.broadcast_to(w, (1, layers, width)))
    np.save(tmp_path / "bad.npy", w[..., :-1])
    with pytest.raises(UserError, match="does not fit this generator"):
        read_codes(tmp_path / "bad.npy", generator)
