# SPDX-License-Identifier: Apache-2.0
"""EG3D: mapping network, synthesis network and super-resolution by themselves, with weights by official key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from facelab.bases.eg3d.keys import (
    Rules,
    key_map,
    mapping_rules,
    superresolution_kind,
    superresolution_rules,
    synthesis_rules,
)
from facelab.nn.stylegan2 import MappingNetwork, Superresolution, SynthesisNetwork
from tests.golden.harness import Arrays, Meta, detfill, given

RENAMED = {"fused_modconv_default": "fused_modconv"}
NOT_OURS = ("num_ws", "fp16_channels_last")  # follows from the resolution; an argument of the call with us


def fill(module: nn.Module, rules: Rules, meta: Meta, seed_offset: int = 0) -> nn.Module:
    """Detfill weights by official key, through the renaming and back; evaluation mode."""
    keys = key_map(rules)
    own = module.state_dict()
    shapes = {key: tuple(value.shape) for key, value in keys.back_to_original(own).items()}
    weights = detfill(shapes, int(meta["detfill_seed"]) + seed_offset, meta["rules"])
    module.load_state_dict(keys.from_original(weights, own), strict=True)
    return module.eval()


@given("z", "c", "u_z")
@torch.no_grad()
def mapping(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    outputs = {}
    for name, run in meta["runs"].items():
        config = dict(meta[run["network"]])
        if run.get("w_avg_beta") is not None:
            config["w_avg_beta"] = run["w_avg_beta"]
        network = MappingNetwork(**config)
        fill(network, mapping_rules(), meta, run["seed_offset"])
        z, c = (None if given_as is None else arrays[given_as] for given_as in run["inputs"])
        if run.get("update_emas"):
            network.update_w_avg(network.style(z, c))
        if "output" in run:
            assert network.w_avg is not None
            outputs[name] = network.w_avg.clone()
        else:
            outputs[name] = network(z, c, run.get("truncation_psi", 1.0), run.get("truncation_cutoff"))
    return outputs


@given("*_ws")
@torch.no_grad()
def backbone(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    networks: dict[str, SynthesisNetwork] = {}
    for name, config in meta["config"].items():
        options = {RENAMED.get(key, key): value for key, value in config.items() if key not in NOT_OURS}
        network = SynthesisNetwork(**options)
        assert network.num_ws == config.get("num_ws", network.num_ws)
        fill(network, synthesis_rules(), meta)
        networks[name] = network
    outputs = {}
    for name, run in meta["runs"].items():
        planes = networks[run["variant"]](arrays[run["input"]], noise_mode=run["noise_mode"])
        outputs[name] = planes[:, :, :: run["stride"], :: run["stride"]]
    return outputs


def superresolution_of(meta: Meta, variant: str) -> tuple[Superresolution, dict[str, Tensor]]:
    """The module of a variant and its inputs, by name."""
    config = meta["config"][variant]
    module = Superresolution(
        superresolution_kind(config["cls"]),
        in_channels=meta["inputs"]["x"][1],
        w_dim=meta["inputs"]["ws"][2],
        num_fp16_res=config["sr_num_fp16_res"],
        antialias=config["sr_antialias"],
    )
    fill(module, superresolution_rules(), meta)
    shapes = {
        f"{variant}.{name}": [config[side] if isinstance(side, str) else side for side in shape]
        for name, shape in meta["inputs"].items()
    }
    drawn = detfill(shapes, meta["detfill_seed"], meta["input_rules"])
    return module, {name: drawn[f"{variant}.{name}"] for name in meta["inputs"]}


@given()
@torch.no_grad()
def superresolution(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    images: dict[tuple[str, str], Tensor] = {}
    outputs = {}
    for name, run in meta["runs"].items():
        key = (run["variant"], run["noise_mode"])
        if key not in images:
            module, inputs = superresolution_of(meta, run["variant"])
            images[key] = module(inputs["x"][:, :3], inputs["x"], inputs["ws"], noise_mode=run["noise_mode"])
        outputs[name] = _stored(images[key], run)
    return outputs


def _stored(image: Tensor, run: Mapping[str, Any]) -> Tensor:
    """The part of an image that a run stored."""
    if "stride" in run:
        return image[:, :, :: run["stride"], :: run["stride"]]
    return image[:, :, slice(*run["rows"]), slice(*run["columns"])]


@given()
@torch.no_grad()
def superresolution_native(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    """Ours leaves the raw image alone; what the original makes of it comes from ``with_legacy_raw``."""
    outputs = {}
    for variant, config in meta["config"].items():
        module, inputs = superresolution_of(meta, variant)
        x, ws = inputs["x"], inputs["ws"]
        rgb = x[:, :3].clone()
        image, after = module.with_legacy_raw(rgb, x, ws, noise_mode=config["noise_mode"])
        assert torch.equal(rgb, x[:, :3])
        raw, step = slice(None, None, config["rgb_stride"]), slice(None, None, config["out_stride"])
        outputs[f"{variant}_out_strided"] = image[:, :, step, step]
        outputs[f"{variant}_rgb_after_strided"] = after[:, :, raw, raw]
        outputs[f"{variant}_rgb_delta_strided"] = (after - rgb)[:, :, raw, raw]
    return outputs


ADAPTERS = {
    "eg3d/mapping": mapping,
    "eg3d/backbone": backbone,
    "eg3d/superresolution": superresolution,
    "eg3d/superresolution_native": superresolution_native,
}
