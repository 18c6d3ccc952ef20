# SPDX-License-Identifier: Apache-2.0
"""FaceDNeRF's score distillation, on closed-form doubles and on tiny networks of diffusers, and its identity loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.draws import TapeDraws
from facelab.losses.identity import IdentityLoss
from facelab.losses.score_distillation import GuidanceReference, GuidanceSettings, NoiseSchedule, ScoreDistillation
from facelab.nn.pretrained.arcface import ArcFace, FaceIdentity, arcface_from_published, published_names
from tests.golden.adapters.arcface import pattern
from tests.golden.harness import Arrays, Meta, case_weights, given

INPUTS = ("image", "A", "D", "text_embeddings", "noise", "posterior_eps")


@dataclass(frozen=True)
class DoubleEncoder:
    """Averages, a mix of the channels, and a constant deviation."""

    mix: Tensor
    pool: int
    deviation: float
    scaling: float

    @property
    def config(self) -> dict[str, float]:
        return {"scaling_factor": self.scaling}

    def encode(self, pictures: Tensor) -> Any:
        mean = torch.einsum("oc,nchw->nohw", self.mix, F.avg_pool2d(pictures, self.pool))
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, self.deviation)))


@dataclass(frozen=True)
class DoubleDenoiser:
    """tanh of the latents, the text and the time."""

    mix: Tensor
    of_latents: float
    of_time: float

    def __call__(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Any:
        text = torch.einsum("od,btd->bo", self.mix, encoder_hidden_states) / encoder_hidden_states.shape[1]
        when = self.of_time * t.float()[:, None, None, None]
        return SimpleNamespace(sample=torch.tanh(self.of_latents * x + text[:, :, None, None] + when))


def schedule(meta: Meta) -> NoiseSchedule:
    """The case's, from its scheduler's settings."""
    c = meta["scheduler_config"]
    ends, prediction = (c["beta_start"], c["beta_end"], c["num_train_timesteps"]), c.get("prediction_type", "epsilon")
    if c["beta_schedule"] == "linear":
        return NoiseSchedule(torch.cumprod(1 - torch.linspace(*ends), dim=0), prediction)
    assert c["beta_schedule"] == "scaled_linear"
    return NoiseSchedule.scaled_linear(*ends, prediction)


def distilled(meta: Meta, arrays: Arrays, unet: Any, vae: Any) -> dict[str, Tensor]:
    """Everything that both cases ask for; the gradient of the picture carries the weight. Reference: interpolation."""
    reference = GuidanceReference(bilinear=True)
    settings = GuidanceSettings(guidance=meta["guidance_scale"], picture_size=meta["image_size"], reference=reference)
    tape = TapeDraws(tape={"sds/posterior": arrays["posterior_eps"].float(), "sds/noise": arrays["noise"].float()})
    guided = ScoreDistillation(unet, vae, schedule(meta), arrays["text_embeddings"], settings)
    stride, pool = meta["stored_stride"], meta["image_grad_pool"]
    outputs: dict[str, Tensor] = {}
    for time in meta["timesteps"]:
        image = arrays["image"].clone().requires_grad_()
        t = torch.full((len(image),), time)
        (gradient,) = torch.autograd.grad(meta["weight"] * guided.loss(2 * image - 1, tape, timesteps=t).sum(), image)
        found = guided.gradient(2 * image - 1, tape, timesteps=t)[1]
        latent = found.latent_gradient
        outputs[f"grad_latent_t{time}"] = latent[:, :, ::stride, ::stride]
        outputs[f"grad_latent_mean_std_t{time}"] = torch.stack([latent.mean(), latent.std()])
        outputs[f"log_t{time}"] = found.square.sum()
        outputs[f"image_grad_t{time}"] = F.avg_pool2d(gradient, pool) * pool**2
        outputs["latents"] = found.latents[:, :, ::stride, ::stride]
    return outputs


@contextlib.contextmanager
def two_threads() -> Iterator[None]:
    """As the case was recorded. Guidance multiplies float32's rounding, which depends on the number of threads, by a
    hundred: where the gradient is nearly zero even the exact value (float64) lies outside the case's tolerance."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@given(*INPUTS)
def sds_fake(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    """On doubles, at several time steps."""
    encoder, denoiser = meta["vae_double"], meta["unet_double"]
    vae = DoubleEncoder(arrays["A"], encoder["pool"], encoder["posterior_std"], meta["scaling_factor"])
    return distilled(meta, arrays, DoubleDenoiser(arrays["D"], denoiser["x"], denoiser["t"]), vae)


@given(*INPUTS)
def sds_diffusers_tiny(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    """On tiny networks of diffusers with weights of their own names."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'facelab[text]'")
    parts = diffusers.UNet2DConditionModel(**meta["unet"]), diffusers.AutoencoderKL(**meta["vae"])
    for offset, part in enumerate(parts):
        shapes = {name: tuple(value.shape) for name, value in part.state_dict().items()}
        part.load_state_dict(case_weights(meta, shapes, offset))
        part.requires_grad_(False).eval()
    with two_threads():
        return distilled(meta, arrays, *parts)


@given()
def id_loss(meta: Meta, arrays: Arrays) -> dict[str, Tensor]:
    """Loss of two pictures and its gradient with respect to the first."""
    ours = ArcFace().state_dict()
    shapes = {theirs: tuple(ours[name].shape) for name, theirs in published_names(ours).items()}
    embed = FaceIdentity(arcface_from_published(case_weights(meta, shapes)))
    amplitudes = meta["pattern_amplitudes"]
    wanted, made = (pattern(tuple(meta["input_shape"]), *meta[name], amplitudes=amplitudes) for name in ("a1", "a2"))
    made.requires_grad_()
    loss = IdentityLoss(embed, wanted)(made).mean()
    (gradient,) = torch.autograd.grad(loss, made)
    pool = meta["grad_pool"]
    pooled = F.avg_pool2d(gradient, pool) * pool**2
    return {"loss": loss, "grad_pooled": pooled, "grad_abs_sum": gradient.abs().sum()}


ADAPTERS = {
    "facednerf/id_loss": id_loss,
    "facednerf/sds_diffusers_tiny": sds_diffusers_tiny,
    "facednerf/sds_fake": sds_fake,
}
