# SPDX-License-Identifier: Apache-2.0
"""StyleSDF and CNeRF: discriminators of thumbnails and of whole pictures, with weights by original key and R1.

The originals group minibatch statistics with a stride (``grouping="strided"``); we group neighbours by default.
``joined``: a rounding that differs may turn an activation near zero round, which second derivatives show.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.bases.stylesdf.convert_discriminators import (
    Discriminator,
    discriminator_from_original,
    discriminator_shapes,
    discriminator_to_original,
)
from facelab.losses.adversarial import r1_penalty
from facelab.nn.discriminators.coordconv import (
    RegionDiscriminator,
    RegionDiscriminatorConfig,
    ViewDiscriminator,
    ViewDiscriminatorConfig,
)
from facelab.nn.discriminators.skip_residual import ResidualDiscriminator, ResidualDiscriminatorConfig

from ..harness import Arrays, Meta, case_weights

Model = TypeVar("Model", bound=Discriminator)


def filled(meta: Meta, model: Model) -> Model:
    """The model with the weights of the case, which went through the converter."""
    original = discriminator_to_original(model)
    weights = {**original, **case_weights(meta, discriminator_shapes(model))}
    model.load_state_dict(discriminator_from_original(weights, model))
    return model


def gradients(meta: Meta, model: Discriminator, loss: Tensor) -> Arrays:
    """The gradients that the case names by original key."""
    wanted = meta.get("gradients", {})
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    renamed = discriminator_to_original(model, dict(zip(named, found, strict=True)))
    return {f"out_{output}": renamed[key] for output, key in wanted.items()}


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def disc_volume(meta: Meta, arrays: Arrays) -> Arrays:
    case = meta["config"]
    config = ViewDiscriminatorConfig(
        resolution=case["renderer_spatial_output_dim"], view=case.get("viewpoint_loss", True), joined=True
    )
    model, image = filled(meta, ViewDiscriminator(config)), leaf(arrays["in_img"])
    said = model(image)
    r1 = r1_penalty(image, said.realness)
    view = {} if said.view is None else {"out_view": said.view}
    return {"out_pred": said.realness, **view, "out_r1": r1, **gradients(meta, model, r1)}


def disc_full(meta: Meta, arrays: Arrays) -> Arrays:
    case = meta["config"]
    config = ResidualDiscriminatorConfig(
        resolution=case["size"], channel_multiplier=case["channel_multiplier"], grouping="strided"
    )
    model, image = filled(meta, ResidualDiscriminator(config)), leaf(arrays["in_img"])
    said = model(image)
    r1 = r1_penalty(image, said)
    return {"out_pred": said, "out_r1": r1, **gradients(meta, model, r1)}


def cnerf_disc_global(meta: Meta, arrays: Arrays) -> Arrays:
    case = meta["config"]
    config = ViewDiscriminatorConfig(
        resolution=case["renderer_spatial_output_dim"],
        semantic_channels=case["n_wcode"],
        view=case.get("viewpoint_loss", True),
        group_size=4,
        grouping="strided",
        joined=True,
    )
    model = filled(meta, ViewDiscriminator(config))
    image, semantics = leaf(arrays["in_img"]), leaf(arrays["in_seg"])
    said = model(image, semantics)
    r1 = {"out_r1_img": r1_penalty(image, said.realness), "out_r1_seg": r1_penalty(semantics, said.realness)}
    view = {} if said.view is None else {"out_view": said.view}
    return {"out_pred": said.realness, **view, **r1, **gradients(meta, model, r1["out_r1_img"] + r1["out_r1_seg"])}


def cnerf_disc_semantic(meta: Meta, arrays: Arrays) -> Arrays:
    case = meta["config"]
    config = RegionDiscriminatorConfig(
        resolution=case["renderer_spatial_output_dim"], classes=case["n_wcode"], grouping="strided", joined=True
    )
    model = filled(meta, RegionDiscriminator(config))
    image, region, label = leaf(arrays["in_img"]), leaf(arrays["in_seg"]), arrays["in_label"].long()
    said = model(image, region)
    assert said.classes is not None
    own = F.cross_entropy(said.classes, label)
    results = {
        "out_pred": said.realness,
        "out_cls": said.classes,
        "out_r1_img": r1_penalty(image, said.realness),
        "out_r1_seg": r1_penalty(region, said.realness),
        "out_d_classify": own + F.cross_entropy(said.classes.flip(0), label),
        "out_g_classify": own,
    }
    return {**results, **gradients(meta, model, results["out_r1_img"] + results["out_r1_seg"])}


def cnerf_disc_full(meta: Meta, arrays: Arrays) -> Arrays:
    case = meta["config"]
    config = ResidualDiscriminatorConfig(
        resolution=case["size"],
        semantic_channels=case["n_wcode"],
        channel_multiplier=case["channel_multiplier"],
        grouping="strided",
    )
    model = filled(meta, ResidualDiscriminator(config))
    image, semantics = leaf(arrays["in_img"]), leaf(arrays["in_seg"])
    said = model(image, semantics)
    r1 = {"out_r1_img": r1_penalty(image, said), "out_r1_seg": r1_penalty(semantics, said)}
    return {"out_pred": said, **r1, **gradients(meta, model, r1["out_r1_img"] + r1["out_r1_seg"])}


ADAPTERS = {
    "stylesdf/disc_volume": disc_volume,
    "stylesdf/disc_full": disc_full,
    "cnerf/disc_global": cnerf_disc_global,
    "cnerf/disc_semantic": cnerf_disc_semantic,
    "cnerf/disc_full": cnerf_disc_full,
}
