# SPDX-License-Identifier: Apache-2.0
"""Official EG3D files in miniature: networks of our classes under the original names, in the original layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from facelab.bases.eg3d.convert_discriminator import discriminator_to_original
from facelab.bases.eg3d.model import TriPlaneGenerator
from facelab.bases.eg3d.originals import LABEL_STD, generator_config_from_original, generator_to_original
from facelab.nn.discriminators.stylegan2 import StyleGan2Discriminator, StyleGan2DiscriminatorConfig
from tests.checkpoints.pickle_makers import dump, network_record

OPTIONS = {
    "clamp_mode": "softplus",
    "superresolution_module": "training.superresolution.SuperresolutionHybrid2X",
    "c_gen_conditioning_zero": False,
    "gpc_reg_prob": 0.8,
    "c_scale": 1.0,
    "superresolution_noise_mode": "none",
    "density_reg": 0.5,
    "reg_type": "l1",
    "depth_resolution": 5,
    "depth_resolution_importance": 4,
    "ray_start": 2.25,
    "ray_end": 3.3,
    "box_warp": 1.1,
    "avg_camera_radius": 2.7,
    "avg_camera_pivot": [0, 0, 0.2],
}
KWARGS = {
    "z_dim": 6,
    "c_dim": 25,
    "w_dim": 8,
    "img_resolution": 128,
    "img_channels": 3,
    "sr_num_fp16_res": 4,
    "mapping_kwargs": {"num_layers": 3},
    "rendering_kwargs": OPTIONS,
    "sr_kwargs": {"channel_base": 256, "channel_max": 4, "fused_modconv_default": "inference_only"},
    "channel_base": 256,
    "channel_max": 4,
    "num_fp16_res": 0,
    "conv_clamp": None,
    "fused_modconv_default": "inference_only",
}
D_KWARGS = {
    "c_dim": 25, "img_resolution": 128, "img_channels": 3, "channel_base": 256, "channel_max": 4, "num_fp16_res": 4,
    "conv_clamp": 256, "disc_c_noise": 0.5, "block_kwargs": {"freeze_layers": 2}, "mapping_kwargs": {},
    "epilogue_kwargs": {"mbstd_group_size": 2},
}  # fmt: skip


def noisy(module: torch.nn.Module, seed: int) -> Any:
    """Every parameter and stored buffer random, so that no two can be exchanged unseen."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=source))
    return module


def generator(seed: int, kwargs: dict[str, Any] = KWARGS) -> TriPlaneGenerator:
    return noisy(TriPlaneGenerator(generator_config_from_original(kwargs, kwargs["rendering_kwargs"])), seed)


def make_networks() -> dict[str, Any]:
    """A generator, its average and a discriminator, in our classes."""
    config = StyleGan2DiscriminatorConfig(resolution=128, channel_base=256, channel_max=4, group_size=2)
    return {"G": generator(1), "G_ema": generator(2), "D": noisy(StyleGan2Discriminator(config), 3)}


def original_tensors(networks: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Their tensors under the original names."""
    std = {LABEL_STD: torch.linspace(0, 1, 25)}
    return {
        "G": {**generator_to_original(networks["G"]), **std},
        "G_ema": {**generator_to_original(networks["G_ema"]), **std},
        "D": discriminator_to_original(networks["D"].state_dict()),
    }


def pickle_of(
    originals: dict[str, dict[str, Tensor]],
    kwargs: dict[str, Any] = KWARGS,
    d_kwargs: dict[str, Any] = D_KWARGS,
    names: tuple[str, ...] = ("G", "D", "G_ema"),
    **attributes: Any,
) -> bytes:
    """A whole file."""
    shown = {"neural_rendering_resolution": 16, "rendering_kwargs": kwargs["rendering_kwargs"], **attributes}
    made: dict[str, object] = {"training_set_kwargs": {"path": "faces.zip", "resolution": 128}}
    for name in names:
        if name == "D":
            made[name] = network_record("DualDiscriminator", originals[name], d_kwargs)
        else:
            made[name] = network_record("TriPlaneGenerator", originals[name], kwargs, **shown)
    return dump({**made, "augment_pipe": network_record("AugmentPipe", {"p": torch.tensor(0.25)}, {"xflip": 1})})


def changed(**options: Any) -> dict[str, Any]:
    """KWARGS with other rendering options; None removes one."""
    kept = {key: value for key, value in (OPTIONS | options).items() if value is not None}
    return KWARGS | {"rendering_kwargs": kept}
