# SPDX-License-Identifier: Apache-2.0
"""The authors' generators: their constructor arguments, rendering options and key names -> ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from facelab.bases.eg3d.keys import (
    Rules,
    backbone_rules,
    key_map,
    resample_filters,
    superresolution_kind,
    superresolution_rules,
)
from facelab.bases.eg3d.model import ConditioningCamera, TriPlaneGenerator, TriPlaneGeneratorConfig
from facelab.checkpoints.key_map import KeyMap
from facelab.errors import UserError
from facelab.fields.triplane import TriplaneConfig
from facelab.rendering.settings import RenderSettings

LABEL_STD = "dataset_label_std"  # registered by the training program, not a part of the network
OWN_AXES = "xy_xz_zx"  # of every released file
BOX_NEAR, BOX_FAR = 0.1, 10.0  # unused when every ray has limits of its own


def generator_rules() -> Rules:
    """Key names of a whole generator."""
    return [
        *backbone_rules(),
        *superresolution_rules("superresolution.", "superresolution."),
        ("decoder.net.0.{p}", "field_net.decoder.hidden_{p}"),
        ("decoder.net.2.{p}", "field_net.decoder.output_{p}"),
    ]


def generator_keys() -> KeyMap:
    """The map of :func:`generator_rules`; constant filters are dropped."""
    return key_map(generator_rules())


def generator_from_original(state: Mapping[str, Tensor], generator: TriPlaneGenerator) -> dict[str, Tensor]:
    """A state dict of the authors' generator -> ours, strictly. UserError for unknown or missing keys."""
    known = {key: value for key, value in state.items() if key != LABEL_STD}
    return generator_keys().from_original(known, generator.state_dict())


def generator_to_original(generator: TriPlaneGenerator) -> dict[str, Tensor]:
    """Our weights under the authors' names, their constant filters included."""
    state = generator_keys().back_to_original(generator.state_dict())
    return {**state, **resample_filters(list(state), generator.config.superresolution)}


def generator_config_from_original(
    init_kwargs: Mapping[str, Any], rendering_kwargs: Mapping[str, Any]
) -> TriPlaneGeneratorConfig:
    """Architecture from the constructor arguments and the rendering options stored with a generator.

    Missing options take the defaults of the authors' FFHQ models, unknown ones are not looked at.

    Raises:
        UserError: options that no released model has (another number of colours, other activations ...).
    """
    k, r = dict(init_kwargs), dict(rendering_kwargs)
    if k.get("img_channels", 3) != 3:
        raise UserError(f"img_channels is {k['img_channels']}, only pictures of 3 channels are supported")
    if r.get("clamp_mode", "softplus") != "softplus":
        raise UserError(f"clamp_mode is {r['clamp_mode']!r}, only softplus is supported")
    mapping = dict(k.get("mapping_kwargs") or {})
    kind = superresolution_kind(r.get("superresolution_module", "SuperresolutionHybrid8XDC"))
    half = k.get("sr_num_fp16_res", 0)
    pivot = tuple(float(x) for x in r.get("avg_camera_pivot", (0.0, 0.0, 0.2)))
    return TriPlaneGeneratorConfig(
        field=TriplaneConfig(
            axes=OWN_AXES,
            box_side=float(r.get("box_warp", 1.0)),
            decoder_lr_mul=float(r.get("decoder_lr_mul", 1.0)),
        ),
        z_dim=k["z_dim"],
        c_dim=k["c_dim"],
        w_dim=k["w_dim"],
        mapping_layers=mapping.get("num_layers", 8),
        channel_base=k.get("channel_base", 32768),
        channel_max=k.get("channel_max", 512),
        half_blocks=k.get("num_fp16_res", 0),
        clamp=k.get("conv_clamp"),
        fused_modulation=k.get("fused_modconv_default", "inference_only"),
        superresolution=kind,
        superresolution_half=half,
        superresolution_antialias=bool(r.get("sr_antialias", True)),
        superresolution_noise=r.get("superresolution_noise_mode", "none"),
        # without a resize the released 2x and 4x models hand on the changed raw picture
        legacy_raw=kind in ("2x", "4x"),
        pose_conditioning=not r.get("c_gen_conditioning_zero", False),
        label_scale=float(r.get("c_scale", 0.0)),
        camera=ConditioningCamera(float(r.get("avg_camera_radius", 2.7)), pivot),  # type: ignore[arg-type]
    )


def settings_from_original(
    rendering_kwargs: Mapping[str, Any], resolution: int, *, reference: bool = False, **changes: Any
) -> RenderSettings:
    """Render settings from the rendering options stored with a generator.

    Args:
        resolution: ``neural_rendering_resolution``.
        reference: the original's depth clamp and its limits for rays that miss the box.
        changes: settings that replace what the options say.

    Raises:
        UserError: one end of the rays is ``auto`` and the other is not.
    """
    r = rendering_kwargs
    auto = [r.get(name) == "auto" for name in ("ray_start", "ray_end")]
    if any(auto) and not all(auto):
        raise UserError(f"ray_start {r.get('ray_start')} and ray_end {r.get('ray_end')}: both or none may be 'auto'")
    values: dict[str, Any] = {
        "resolution": resolution,
        "near": BOX_NEAR if any(auto) else float(r.get("ray_start", 2.25)),
        "far": BOX_FAR if any(auto) else float(r.get("ray_end", 3.3)),
        "samples_coarse": r.get("depth_resolution", 48),
        "samples_fine": r.get("depth_resolution_importance", 48),
        "grid": "centers",
        "sigma_noise": float(r.get("density_noise", 0.0)),
        "density": "softplus",
        "background": "white" if r.get("white_back", False) else "none",
        "spacing": "disparity" if r.get("disparity_space_sampling", False) else "depth",
        "box_side": float(r.get("box_warp", 1.0)) if any(auto) else None,
        "reference": reference,
    }
    return RenderSettings(**{**values, **changes})


def label_std(state: Mapping[str, Tensor]) -> Tensor | None:
    """(25,) standard deviations of the data set's camera labels, if the file holds them."""
    found = state.get(LABEL_STD)
    return None if found is None else found.to(torch.float32)
