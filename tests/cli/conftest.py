# SPDX-License-Identifier: Apache-2.0
"""A tiny untrained FENeRF run folder, as training leaves it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from facelab.checkpoints.format import checkpoint_folder, save_checkpoint
from facelab.config import load_staged, resolve_curriculum, to_dict
from facelab.deviations import active, describe
from facelab.methods import load_method

STAGES = """
base: {debug}
stages:
  - from_step: 0
  - from_step: 10
    render.resolution: 16
  - from_step: 100
    render.resolution: 8
loss: {{fade_steps: 20}}
train: {{max_steps: 200}}
"""


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 15 of a curriculum of three stages: 8 px, from step 10 on 16 px; the log says 0.5 s a step."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    file = folder / "tiny.yaml"
    file.write_text(STAGES.format(debug=resolve_curriculum("fenerf", "debug")))
    method = load_method("fenerf")
    staged = load_staged(method.config_type, [file])
    config = staged.at(15)
    models = method.build(config)
    weights = {name: model.state_dict() for name, model in models.items()}
    weights["ema"] = {name: tensor * 1.25 for name, tensor in weights["generator"].items()}
    meta = {
        "method": "fenerf",
        "curriculum": "tiny",
        "config": to_dict(staged),
        "step": 15,
        "images": 60,
        "deviations": describe(active(method.deviations, config.reference)),
    }
    save_checkpoint(checkpoint_folder(folder, 15), weights, {"position": {"step": 15, "processes": 2}}, meta)
    lines = [{"step": 5, "seconds_per_step": 0.5}, {"step": 15, "seconds_per_step": 0.25}]
    later = {"step": 20, "seconds_per_step": 99.0}  # of a run that went on after the checkpoint
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, later]))
    return folder
