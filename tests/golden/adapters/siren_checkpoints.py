# SPDX-License-Identifier: Apache-2.0
"""The converter on miniature pickles written by the original classes."""

from __future__ import annotations

import torch
from torch import Tensor

from facelab.bases.pigan.convert import derive_config
from facelab.bases.pigan.model import SirenGenerator
from facelab.bases.pigan.originals import read_raw
from tests.golden.harness import Arrays, Meta


@torch.no_grad()
def checkpoint_fixture(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    generator_file, ema_file = (meta["folder"] / name for name in meta["files"])
    raw = read_raw(generator_file, ema_file)
    assert raw.class_name == meta["config"]["original_classes"][1].rpartition(".")[2]
    assert raw.attributes["step"] == meta["config"]["step"]
    outputs = {f"ema_state/{key}": value for key, value in raw.states["ema"].items()}
    latents = {
        name: arrays[key] for name, key in (("z", "in_z"), ("geo", "in_z_geo"), ("app", "in_z_app")) if key in arrays
    }
    for name, label in (("generator", "raw"), ("ema", "ema")):
        generator = SirenGenerator(derive_config(raw.states[name], raw.class_name))
        generator.load_state_dict(raw.converted(name), strict=False)
        field = generator.field(generator.scene(generator.map(latents)))
        values = field(arrays["in_points"][:, :, None], arrays["in_ray_directions"])
        outputs[f"out_field_{label}_weights"] = torch.cat([values.channels(), values.sigma], dim=-1).squeeze(2)
    return outputs


ADAPTERS = {"pigan/checkpoint_fixture": checkpoint_fixture, "fenerf/checkpoint_fixture": checkpoint_fixture}
