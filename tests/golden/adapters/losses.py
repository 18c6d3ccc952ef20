# SPDX-License-Identifier: Apache-2.0
"""Training losses of pi-GAN and FENeRF, and the moving average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from facelab.bases.pigan.convert_discriminator import published_config
from facelab.losses.adversarial import d_fake_loss, d_real_loss, g_loss, r1_penalty, topk_count, topk_fraction
from facelab.losses.regularizers import latent_penalty, pose_penalty, weighted_sum
from facelab.nn.discriminators import DiscriminatorOutput, ProgressiveDiscriminator
from facelab.training.ema import Ema

from ..harness import Arrays, Meta
from .fenerf_discriminators import double_config
from .pigan_discriminators import load_discriminator

Case = dict[str, Any]


def penalties(output: DiscriminatorOutput, truth: Arrays, weights: dict[str, float]) -> Tensor:
    """Weighted latent and pose penalties; ``truth`` and ``weights`` by latent name and ``pose``."""
    assert output.pose is not None
    terms = {name: latent_penalty(guess, truth[name]) for name, guess in output.latents.items()}
    return weighted_sum({**terms, "pose": pose_penalty(output.pose, truth["pose"])}, weights)


def discriminator_loss(
    model: ProgressiveDiscriminator, real: Tensor, fake: Tensor, truth: Arrays, weights: dict[str, float], case: Case
) -> tuple[Tensor, Tensor]:
    """(whole loss, its R1 part)."""
    real = real.clone().requires_grad_()
    judged_real, judged_fake = model(real, case["alpha"]), model(fake, case["alpha"])
    r1 = 0.5 * case["r1_lambda"] * r1_penalty(real, judged_real.realness)
    adversarial = d_fake_loss(judged_fake.realness) + d_real_loss(judged_real.realness)
    return adversarial + r1 + penalties(judged_fake, truth, weights), r1


def generator_loss(
    model: ProgressiveDiscriminator, fake: Tensor, truth: Arrays, weights: dict[str, float], case: Case
) -> Tensor:
    """Top-k adversarial loss and penalties of generated images."""
    judged = model(fake, case["alpha"])
    top = topk_count(case["step"], len(fake), case["topk_interval"], case["topk_v"])
    return g_loss(judged.realness, top) + penalties(judged, truth, weights)


def topk_output(case: Case, count: int) -> Tensor:
    """[fraction, number] of kept images."""
    schedule = case["topk_interval"], case["topk_v"]
    return torch.tensor([topk_fraction(case["step"], *schedule), topk_count(case["step"], count, *schedule)])


def pigan_losses(meta: Meta, arrays: Arrays) -> Arrays:
    """R1, penalties, both losses and the gradient norm of the discriminator."""
    case = meta["config"]
    config = published_config(
        "CCSEncoderDiscriminator", in_channels=arrays["in_fake"].shape[1], latents={"z": arrays["in_z"].shape[1]}
    )
    model = load_discriminator(meta, config)
    truth = {"z": arrays["in_z"], "pose": arrays["in_position"]}
    weights = {"z": case["z_lambda"], "pose": case["pos_lambda"]}
    d_loss, r1 = discriminator_loss(model, arrays["in_real"], arrays["in_fake"], truth, weights, case)
    gradients = torch.autograd.grad(d_loss, list(model.parameters()), allow_unused=True)
    norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
    return {
        "out_r1_penalty": r1,
        "out_identity_penalty": penalties(model(arrays["in_fake"], case["alpha"]), truth, weights),
        "out_d_loss": d_loss,
        "out_g_loss": generator_loss(model, arrays["in_fake"], truth, weights, case),
        "out_topk": topk_output(case, len(arrays["in_fake"])),
        "out_d_grad_norm": norm,
    }


def fenerf_generator_losses(
    image_d: ProgressiveDiscriminator,
    semantic_d: ProgressiveDiscriminator,
    fake: Tensor,
    truth: Arrays,
    weights: dict[str, float],
    case: Case,
) -> tuple[Tensor, Tensor]:
    """(image term, weighted semantic term); the colours learn from the image discriminator alone."""
    labels, rgb = fake[:, :-3], fake[:, -3:]
    g_img = generator_loss(image_d, rgb, truth, weights, case)
    semantic_fake = torch.cat([labels, rgb.detach()], dim=1)
    return g_img, case["g_seg"] * generator_loss(semantic_d, semantic_fake, truth, weights, case)


def fenerf_losses(meta: Meta, arrays: Arrays) -> Arrays:
    """Both discriminators' losses, the generator's, and its gradient with respect to the fake images."""
    case, fake = meta["config"], arrays["in_fake"]
    truth = {"z_geo": arrays["in_z_geo"], "z_app": arrays["in_z_app"], "pose": arrays["in_position"]}
    weights = {"z_geo": case["zg_l"], "z_app": case["za_l"], "pose": case["pos_lambda"]}
    sizes = arrays["in_z_geo"].shape[1], arrays["in_z_app"].shape[1]
    image_d = load_discriminator(meta, double_config(3, *sizes))
    semantic_d = load_discriminator(meta, double_config(fake.shape[1], *sizes), seed_offset=1)
    real_semantic = torch.cat([arrays["in_real_labels"], arrays["in_real_image"]], dim=1)
    d_img, r1_img = discriminator_loss(image_d, arrays["in_real_image"], fake[:, -3:], truth, weights, case)
    d_seg, r1_seg = discriminator_loss(semantic_d, real_semantic, fake, truth, weights, case)
    g_img, g_seg = fenerf_generator_losses(image_d, semantic_d, fake, truth, weights, case)
    # The gradient jumps where a LeakyReLU changes sides, and some inputs of one lie within 1e-7 of
    # zero: float32 then picks the side by the order of its sums, which depends on the number of
    # threads. Float64 picks the right one.
    exact = fake.double().requires_grad_()
    exact_truth = {name: value.double() for name, value in truth.items()}
    losses = fenerf_generator_losses(image_d.double(), semantic_d.double(), exact, exact_truth, weights, case)
    (gradient,) = torch.autograd.grad(sum(losses, torch.zeros(())), exact)
    return {
        "out_d_img_loss": d_img,
        "out_d_seg_loss": d_seg,
        "out_r1_img": r1_img,
        "out_r1_seg": r1_seg,
        "out_g_img_loss": g_img,
        "out_g_seg_loss": g_seg,
        "out_g_loss": g_img + g_seg,
        "out_topk": topk_output(case, len(fake)),
        "out_grad_wrt_fake": gradient,
    }


def ema(meta: Meta, arrays: Arrays) -> Arrays:
    """The average after every update; the first row of the parameters starts it."""
    initial, *later = arrays["in_parameters"]
    model = nn.ParameterDict({"p": initial.clone()})
    average = Ema(model, meta["config"]["decay"])
    history = []
    for values in later:
        with torch.no_grad():
            model["p"].copy_(values)
        average.update(model)
        history.append(average.shadow["p"].clone())
    return {"out_shadow": torch.stack(history)}


ADAPTERS = {"pigan/losses": pigan_losses, "pigan/ema": ema, "fenerf/losses": fenerf_losses}
