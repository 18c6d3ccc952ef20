# SPDX-License-Identifier: Apache-2.0
"""CNeRF's first training stage: every term of one step, with its weight, and gradients.

The generator needs our ``residual_eikonal`` switch, the discriminators the original's strided groups.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from facelab.bases.stylesdf.convert_discriminators import discriminator_from_original, discriminator_to_original
from facelab.cameras.sphere import view_angles
from facelab.draws import TapeDraws
from facelab.methods.cnerf.config import LossConfig
from facelab.methods.cnerf.losses import Portraits, generator_terms, global_terms, region_terms
from facelab.nn.discriminators.coordconv import (
    RegionDiscriminator,
    RegionDiscriminatorConfig,
    ViewDiscriminator,
    ViewDiscriminatorConfig,
)
from facelab.rendering.sdf import SdfOptions

from ..harness import Arrays, Meta, detfill
from .cnerf_generator import build, cameras, image, original_gradients, settings

NAMED = re.compile(r"(?:global discriminator: )?(?P<key>[\w.]+?)(?:\[:, ::(?P<step>\d+)\])?")


def filled(meta: Meta, model, offset: int):
    """A discriminator with the weights of the case, which pass through the converter."""
    shapes = {key: tuple(value.shape) for key, value in discriminator_to_original(model).items()}
    entry = meta["detfill"]
    weights = detfill(shapes, entry["seed"] + offset, entry["discriminator_rules"])
    model.load_state_dict(discriminator_from_original(weights, model))
    return model


def judges(meta: Meta) -> tuple[ViewDiscriminator, RegionDiscriminator]:
    side, regions = meta["config"]["resolution"], meta["config"]["n_wcode"]
    whole = ViewDiscriminatorConfig(
        resolution=side, semantic_channels=regions, group_size=4, grouping="strided", joined=True
    )
    one = RegionDiscriminatorConfig(resolution=side, classes=regions, grouping="strided", joined=True)
    return filled(meta, ViewDiscriminator(whole), 1), filled(meta, RegionDiscriminator(one), 2)


def weights_of(meta: Meta) -> LossConfig:
    c = meta["config"]
    return LossConfig(
        view=c["view_lambda"],
        eikonal=c["eikonal_lambda"],
        surface=c["min_surf_lambda"],
        surface_sharpness=c["min_surf_beta"],
        semantic=c["Semantic_D_lambda"],
        r1_image=c["r1_img"],
        r1_semantics=c["r1_seg"],
    )


def train_step(meta: Meta, arrays: Arrays) -> Arrays:
    c, weights = meta["config"], weights_of(meta)
    generator, (judge, region_judge) = build(meta), judges(meta)
    camera = cameras(c, arrays["in_locations"])
    draws = TapeDraws(tape={"jitter": arrays["in_t_rand"]})
    scene = generator.scene(generator.map({"z": arrays["in_z"]}))
    options = SdfOptions(samples=True, gradient="layers")
    seen = generator.render_volume(scene, camera, settings(c, jitter=c["perturb"] > 0), draws, options)
    assert seen.sdf is not None and seen.gradient is not None
    fake = Portraits(image(2 * seen.rgb - 1, c), image(seen.semantics, c))
    real, angles = Portraits(arrays["in_real"], arrays["in_real_seg"]), view_angles(camera)
    whole = global_terms(judge, real, fake, angles, weights)
    one = region_terms(region_judge, real, fake, arrays["in_label_d"].long(), weights)
    own = generator_terms(
        judge, region_judge, fake, angles, seen.sdf, seen.gradient, arrays["in_label_g"].long(), weights
    )
    outputs = {
        "d_gan": whole.realness,
        "d_r1": whole.r1,
        "d_view": whole.view,
        "sd_class": one.classes,
        "sd_gan": one.realness,
        "sd_r1": one.r1,
        "g_gan": own.realness,
        "g_view": own.view,
        "g_eikonal": own.eikonal,
        "g_minsurf": own.surface,
        "g_class": own.classes,
        "g_gan_semantic": own.region_realness,
        "g_total": own.total,
    }
    named = dict(judge.named_parameters())
    found = torch.autograd.grad(whole.total, list(named.values()), allow_unused=True, materialize_grads=True)
    gradients = discriminator_to_original(judge, dict(zip(named, found, strict=True)))
    generator.zero_grad()
    own.total.backward()
    gradients |= original_gradients(generator)
    outputs |= {name: selected(gradients, where) for name, where in meta["gradients"].items()}
    return {f"out_{name}": value.detach() for name, value in outputs.items()}


def selected(gradients: dict[str, Tensor], where: str) -> Tensor:
    """The gradient that the case names, with the columns it keeps."""
    match = NAMED.fullmatch(where)
    assert match, f"unknown gradient {where!r}"
    return gradients[match["key"]][:, :: int(match["step"])] if match["step"] else gradients[match["key"]]


ADAPTERS = {"cnerf/train_step": train_step}
