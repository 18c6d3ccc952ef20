# SPDX-License-Identifier: Apache-2.0
"""Settings of FaceDNeRF: presets, domains, what is refused, reference switches."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from facelab.config import list_curricula, load_config, save_resolved
from facelab.deviations import active, switched_back
from facelab.errors import UserError
from facelab.methods.facednerf.config import (
    DEVIATIONS,
    FaceDNeRFConfig,
    ReferenceConfig,
    meaningless,
)
from tests.methods.facednerf.doubles import tiny_model

PRESETS = {c.name: c.path for c in list_curricula("facednerf")}


def test_presets_load_and_say_what_they_are_for(tmp_path: Path) -> None:
    wanted = {"edit", "relight", "edit_and_relight", "project_w", "project_w_plus", "pti", "generate", "debug"}
    assert set(PRESETS) == wanted
    for entry in list_curricula("facednerf"):
        assert entry.description
        config = load_config(FaceDNeRFConfig, [entry.path])
        save_resolved(config, tmp_path / "settings.yaml")
        assert load_config(FaceDNeRFConfig, [tmp_path / "settings.yaml"]) == config
    found = {name: load_config(FaceDNeRFConfig, [path]) for name, path in PRESETS.items()}
    assert found["project_w"].codes.space == "w" and found["project_w"].tune.steps == 0
    assert found["pti"].tune.losses == "photo" and found["pti"].tune.stop_at == 0.06
    assert found["relight"].weights.text == 0 and found["relight"].weights.light == 0.02
    assert found["edit"].weights.text == 1.3e-5 and found["edit_and_relight"].weights.light == 0.01
    assert found["generate"].weights.identity == found["generate"].weights.reconstruction == 0


@pytest.mark.parametrize(
    ("domain", "off"), [("faces", ()), ("cats", ("identity", "light")), ("other", ("identity", "light"))]
)
def test_domains_switch_off_what_means_nothing_there(domain: str, off: tuple[str, ...]) -> None:
    config = load_config(FaceDNeRFConfig, overrides=[f"domain={domain}", "weights.light=0.02"])
    for entry in dataclasses.fields(config.weights):
        expected = 0.0 if entry.name in off else getattr(config.weights, entry.name)
        assert getattr(config.active, entry.name) == expected
    with pytest.raises(
        UserError, match="unknown domain 'cat', expected one of faces, cats, other. Did you mean 'cats'"
    ):
        meaningless("cat")


@pytest.mark.parametrize(
    "override",
    [
        "weights.identity=-1",
        "weights.text=.nan",
        "codes.lr=0",
        "codes.start_samples=1",
        "tune.stop_at=-0.1",
        "tune.locality_samples=0",
        "side.width=-0.4",
        "render.sample_factor=0",
        "memory.max_points=0",
        "guidance.t_min=0.99",
        "guidance.samples=0",
        "guidance.guidance=.inf",
        "codes.lr=.inf",
        "codes.perturbation=.inf",
        "codes.rampup=-0.1",
        "codes.rampdown=2",
        "codes.start_seed=-1",
        "codes.start_seed=4294967296",
        "tune.lr=.inf",
        "side.horizontal=.inf",
        "side.vertical=0",
        "side.height=.inf",
        "render.sample_factor=.inf",
    ],
)
def test_values_that_cannot_be_are_refused(override: str) -> None:
    with pytest.raises(UserError, match="must|need 0|expects") as caught:
        load_config(FaceDNeRFConfig, overrides=[override, "memory.recompute=true"])
    assert override.split(".")[0] in str(caught.value) and "recompute" not in str(caught.value)  # the culprit is named


def test_reference_switches() -> None:
    switches = {entry.name for entry in dataclasses.fields(ReferenceConfig)}
    assert {d.switch for d in DEVIATIONS} == switches and len(DEVIATIONS) == len(switches)
    ours = FaceDNeRFConfig()
    assert len(active(DEVIATIONS, ours.reference)) == len(switches)
    assert ours.centre == (math.pi / 2, math.pi / 2) and ours.light_norm == "running"
    assert not any(dataclasses.asdict(ours.guide().reference).values())
    theirs = load_config(FaceDNeRFConfig, overrides=switched_back(DEVIATIONS))
    assert active(DEVIATIONS, theirs.reference) == []
    assert theirs.centre == (1.57, 1.57) and theirs.light_norm == "picture"
    assert all(dataclasses.asdict(theirs.guide().reference).values())


def test_too_few_samples_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(
        UserError, match=r"sample_factor 0.5 leaves 2 of the model's 5 samples per ray.*take 0.8 or more"
    ):
        model.settings(load_config(FaceDNeRFConfig, overrides=["render.sample_factor=0.5"]))
    assert model.settings(load_config(FaceDNeRFConfig, overrides=["render.sample_factor=0.8"])).samples_coarse == 4
