# SPDX-License-Identifier: Apache-2.0
"""EG3D's whole generator, built from the original's arguments and filled by its key names.

The cases need our ``reference`` switch (depths clamped to the range of the batch).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from facelab.bases.eg3d.model import TriPlaneGenerator
from facelab.bases.eg3d.originals import (
    generator_config_from_original,
    generator_from_original,
    generator_to_original,
    settings_from_original,
)
from facelab.cameras import Camera
from facelab.draws import TapeDraws
from tests.golden.harness import Arrays, Meta, detfill, given


def build(meta: Meta) -> TriPlaneGenerator:
    """Our generator of the case's architecture with the case's weights, which pass through the renaming."""
    c: dict[str, Any] = dict(meta["config"])
    kwargs = c.pop("rendering_kwargs")
    c["mapping_kwargs"] = {"num_layers": c.pop("mapping_num_layers")}
    config = generator_config_from_original(c, kwargs)
    assert config.image_resolution(c["neural_rendering_resolution"]) == c["img_resolution"]
    generator = TriPlaneGenerator(config).eval()
    shapes = {key: tuple(value.shape) for key, value in generator_to_original(generator).items()}
    weights = detfill(shapes, meta["detfill_seed"], meta["rules"])
    generator.load_state_dict(generator_from_original(weights, generator))
    return generator


@given("z", "c", "c_cond", "u_coarse", "u_fine", "points")
@torch.no_grad()
def triplane(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    c, run = meta["config"], meta["runs"]
    generator = build(meta)
    codes = generator.map({"z": arrays["z"]}, arrays["c_cond"], run["truncation_psi"], run["truncation_cutoff"])
    scene = generator.scene(codes, run["noise_mode"])
    camera = Camera.from_label(arrays["c"])
    settings = settings_from_original(c["rendering_kwargs"], c["neural_rendering_resolution"], reference=True)
    tape = TapeDraws(tape={"jitter": arrays["u_coarse"], "importance": arrays["u_fine"]})
    output = generator.render(scene, camera, settings, tape)
    depth = generator.render_volume(scene, camera, settings, tape).mean_depth
    points = generator.field(scene)(arrays["points"][:, :, None], arrays["points"])
    assert output.raw_rgb is not None and points.features is not None and depth is not None
    side, crop, stride = output.rgb.shape[-1], run["image_crop"], c["stride"]
    low = (side - crop) // 2
    strides = run["planes_strides"]
    return {
        "ws_first": codes.values["w"][:, 0],
        "ws_last": codes.values["w"][:, -1],
        "planes_strided": scene.parts["planes"].flatten(1, 2)[:, :: strides[0], :: strides[1], :: strides[2]],
        "image_strided": output.rgb[:, :, ::stride, ::stride],
        "image_crop": output.rgb[:, :, low : low + crop, low : low + crop],
        "image_raw": output.raw_rgb,
        "image_depth": depth.transpose(1, 2).unflatten(2, output.depth.shape[-2:]),
        "sample_sigma": points.sigma[:, :, 0],
        "sample_rgb": points.features[:, :, 0, : run["sample_rgb_channels"]],
    }


ADAPTERS = {f"eg3d/triplane_{kind}": triplane for kind in ("2x", "4x", "8xdc")}
