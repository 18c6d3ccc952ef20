# SPDX-License-Identifier: Apache-2.0
"""What EG3D trains with: discriminators, augmentation, resizing, schedules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from facelab.bases.eg3d.convert_discriminator import (
    config_from_original,
    discriminator_from_original,
    discriminator_shapes,
)
from facelab.bases.eg3d.data import WindowedSampler
from facelab.bases.eg3d.schedules import blur_half_width, blur_sigma, ema_decay, neural_resolution, swap_probability
from facelab.nn.augment import AugmentConfig, AugmentPipe
from facelab.nn.discriminators.stylegan2 import StyleGan2Discriminator, StyleGan2DiscriminatorConfig, minibatch_std
from facelab.nn.filtered_resizing import filtered_resizing
from facelab.training.optimizers import PhaseOptimizer
from facelab.training.phases import Phase
from facelab.training.protocol import Models, OptimizerSpec

from ..harness import Arrays, Meta, detfill, given


def discriminator_of(kwargs: dict[str, Any], network: str = "DualDiscriminator") -> StyleGan2DiscriminatorConfig:
    """Our architecture from the original's arguments; strided groups are the ``reference`` switch."""
    return replace(config_from_original(kwargs, network), grouping="strided")


def filled_discriminator(config: StyleGan2DiscriminatorConfig, seed: int, rules: Any) -> StyleGan2Discriminator:
    """A network with the weights of a case, which went through the converter."""
    model = StyleGan2Discriminator(config)
    original = detfill(discriminator_shapes(config), seed, rules)
    model.load_state_dict(discriminator_from_original(original))
    return model


@given("img", "raw", "c", "mbstd_x")
def discriminators(meta: Meta, arrays: Arrays) -> Arrays:
    """Logits and input gradients of every run of the case."""
    results: Arrays = {}
    for name, run in meta["runs"].items():
        if run.get("layer") == "minibatch_std":
            results[name] = minibatch_std(arrays["mbstd_x"], run["group_size"], run["num_channels"], "strided")
            continue
        config = discriminator_of({**meta["config"], **run.get("config", {})}, run["network"])
        model = filled_discriminator(config, meta["detfill_seed"] + run["seed_offset"], meta["rules"])
        stride = run.get("img_stride", 1)
        image = arrays["img"][:, :, ::stride, ::stride].clone().requires_grad_()
        raw = arrays["raw"].clone().requires_grad_()
        label = arrays["c"] if config.label_dim else None
        logits = model(image, raw, label, raw_weight=run.get("raw_fade", 1.0))
        results[f"{name}_logits"] = logits
        if first := run.get("grad_first"):
            gradients = torch.autograd.grad(logits.sum(), [image, raw], allow_unused=True)
            for part, gradient in zip(("dimg", "draw"), gradients, strict=True):
                if gradient is not None:
                    results[f"{name}_{part}"] = gradient[:first]
    return results


@given("x[0-9]")
def augment(meta: Meta, arrays: Arrays) -> Arrays:
    """The pipe at fixed percentiles, and its filters."""
    off = dict.fromkeys(AugmentConfig.__dataclass_fields__, 0.0)
    results: Arrays = {"Hz_geom": AugmentPipe().geometry_filter, "Hz_fbank": AugmentPipe().filter_bank}
    for combo in meta["combos"]:
        pipe = AugmentPipe(AugmentConfig(**{**off, **combo["kwargs"]}), p=1.0)
        results[combo["out"]] = pipe(arrays[combo["input"]], None, percentile=combo["debug_percentile"])
    return results


@given("x")
def resizing(meta: Meta, arrays: Arrays) -> Arrays:
    """Every mode and size."""
    from cuda_ops import setup_filter

    taps = setup_filter(meta["filter"])
    return {c["out"]: filtered_resizing(arrays["x"], c["size"], c["mode"], taps) for c in meta["combos"]}


@given()
def schedules(meta: Meta, arrays: Arrays) -> dict[str, Tensor | np.ndarray]:
    """The table of schedules, Adam with lazy phases, and the original's order of the data."""
    c = meta["config"]
    first, last = c["neural_rendering_resolution"]
    rows = []
    for images in meta["cur_nimg"]:
        sigma = blur_sigma(images, c["blur_init_sigma"], c["blur_fade_kimg"])
        swaps = [swap_probability(images, p, c["gpc_reg_fade_kimg"]) for p in c["gpc_reg_prob"]]
        size = neural_resolution(images, first, last, c["neural_rendering_resolution_fade_kimg"])
        decays = [ema_decay(images, c["batch"], c["ema_kimg"], ramp) for ramp in (c["ema_rampup"], None)]
        rows.append([sigma, blur_half_width(sigma), *swaps, size, *decays])
    results: dict[str, Any] = {"table": torch.tensor(rows, dtype=torch.float64)}
    results["opt"] = torch.tensor(
        [
            x
            for net in ("g", "d")
            for x in lazy_adam(c["opt"][f"{net}lr"], c["opt"]["betas"], c["opt"][f"{net}_interval"])
        ],
        dtype=torch.float64,
    )
    s = c["sampler"]
    sampler = WindowedSampler(s["items"], s["seed"], s["window_size"])
    for name, (replicas, rank) in meta["sampler_runs"].items():
        results[name] = np.array(sampler.indices_for_chunk(0, s["count"] * replicas)[rank::replicas])
    return results


def lazy_adam(lr: float, betas: list[float], every: int) -> list[float]:
    """[lr, beta1, beta2] of an optimiser that a main and a lazy phase share."""

    def losses(ctx):
        return iter(())

    phases = [Phase(f"p{k}", ("net",), "net", losses, every=k) for k in (1, every)]
    spec = OptimizerSpec(("net",), lr, (float(betas[0]), float(betas[1])))
    group = PhaseOptimizer("net", spec, Models(net=torch.nn.Linear(1, 1)), phases).adam.param_groups[0]
    return [group["lr"], *group["betas"]]


ADAPTERS = {
    "eg3d/discriminators": discriminators,
    "eg3d/augment": augment,
    "eg3d/filtered_resizing": resizing,
    "eg3d/schedules": schedules,
}
