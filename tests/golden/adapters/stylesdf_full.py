# SPDX-License-Identifier: Apache-2.0
"""StyleSDF: the whole generator as at inference. Weights pass through the converter, which finds the architecture.

The original truncates twice: the switch ``double_truncation``.
"""

from __future__ import annotations

import torch

from facelab.bases.stylesdf.full_model import FullGenerator, FullGeneratorConfig
from facelab.bases.stylesdf.full_originals import (
    generator_config_from_original,
    generator_from_original,
    generator_to_original,
)
from facelab.cameras.sphere import sphere_camera
from facelab.fields.sdf import SdfFieldConfig
from facelab.nn.skip_decoder import SkipDecoderConfig
from facelab.rendering.settings import RenderSettings

from ..harness import Arrays, Meta, case_weights


def build(meta: Meta) -> FullGenerator:
    """Our generator of the sizes and with the weights of the case."""
    c = meta["config"]
    offset = c.get("offset_sampling", True)
    config = FullGeneratorConfig(
        SdfFieldConfig(c["width"], c["depth"], c["style_dim"], box_side=2 * c["dist_radius"]),
        latent_dim=c["style_dim"],
        sampling="offset" if offset else "stratified",
        decoder=SkipDecoderConfig(
            size=c["size"],
            in_resolution=c["resolution"],
            in_channels=c["width"],
            style_dim=c["style_dim"],
            channel_multiplier=c["channel_multiplier"],
            lr_mapping=c["lr_mapping"],
        ),
        double_truncation=True,
    )
    original = generator_to_original(FullGenerator(config))
    weights = {**original, **case_weights(meta, {key: tuple(value.shape) for key, value in original.items()})}
    small = c["size"] <= 32  # where the multiplier changes nothing
    found = generator_config_from_original(
        weights,
        dist_radius=c["dist_radius"],
        offset_sampling=offset,
        lr_mapping=c["lr_mapping"],
        channel_multiplier=c["channel_multiplier"] if small else None,
        double_truncation=True,
    )
    assert found == config, f"the converter found {found}, the case is {config}"
    generator = FullGenerator(config).eval()
    generator.load_state_dict(generator_from_original(weights, generator))
    return generator


@torch.no_grad()
def generator_full(meta: Meta, arrays: Arrays) -> Arrays:
    c, generator = meta["config"], build(meta)
    assert c["perturb"] == 0, "the case has no random numbers"
    settings = RenderSettings(
        resolution=c["resolution"],
        near=1 - c["dist_radius"],
        far=1 + c["dist_radius"],
        samples_coarse=c["N_samples"],
        samples_fine=0,
        grid="centers",
        jitter=False,
        background="last" if c["force_background"] else "none",
        lock_view=c["static_viewdirs"],
    )
    generator.update_averages({"z": arrays["in_mean_z"]})
    azimuth, elevation = arrays["in_locations"].unbind(1)
    scene = generator.scene(generator.map({"z": arrays["in_z"]}, truncation=c["truncation_ratio"]))
    output = generator.render(scene, sphere_camera(azimuth, elevation, 2 * c["fov"]), settings)
    assert output.raw_rgb is not None
    return {
        "out_img": output.rgb,
        "out_thumb": output.raw_rgb,
        "out_mean_w": generator.average_w[None],
        "out_mean_decoder": generator.average_style[None],
    }


ADAPTERS = {"stylesdf/generator_full": generator_full}
