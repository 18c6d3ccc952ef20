# SPDX-License-Identifier: Apache-2.0
"""EG3D's four phases on a tiny model: losses, statistics, gradients.

Needs these ``reference`` switches: conditioning partners from within the chunk, density points in the cube of side 2,
strided groups, depths clamped to the range of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.bases.eg3d.config import Eg3dConfig, ModelConfig, RenderConfig
from facelab.bases.eg3d.convert_discriminator import discriminator_to_original
from facelab.bases.eg3d.data import LabelTable
from facelab.bases.eg3d.losses import gradient_penalty
from facelab.bases.eg3d.model import TriPlaneGenerator
from facelab.bases.eg3d.originals import (
    generator_config_from_original,
    generator_from_original,
    generator_keys,
    generator_to_original,
    settings_from_original,
)
from facelab.bases.eg3d.training import Eg3d, Schedule
from facelab.bases.eg3d.training_config import (
    ConditioningConfig,
    DiscriminatorConfig,
    LossConfig,
    ReferenceConfig,
    ResolutionConfig,
    TrainConfig,
)
from facelab.cameras.camera import Camera
from facelab.draws import TapeDraws
from facelab.rendering.settings import RenderSettings
from facelab.training.phases import AfterPhase, Losses, PhaseContext, SharedResults, Sums
from facelab.training.protocol import Models
from facelab.training.schedule import Progress

from ..harness import Arrays, Meta, detfill, given
from .eg3d_training import discriminator_of, filled_discriminator

SLICE = 256  # stored entries of a gradient
BATCH = 32  # for which the fades of the case are given


@dataclass(frozen=True)
class SilentTape(TapeDraws):
    """A tape for everything but the noise of the synthesis, whose strength is zero."""

    def normal(self, name, shape, device="cpu", dtype=torch.float32) -> Tensor:
        return torch.zeros(tuple(shape)) if name.startswith("noise/") else super().normal(name, shape, device, dtype)


class GoldenEg3d(Eg3d):
    """Renders with the options of the case."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options

    def training_settings(self, config: Any, resolution: int) -> RenderSettings:
        return settings_from_original(self.options, resolution, reference=True)


@dataclass
class Run:
    """Everything of the case that the phases share."""

    meta: Meta
    arrays: Arrays
    models: Models
    method: GoldenEg3d
    config: Eg3dConfig

    def phase(
        self, name: str, tape: Arrays, config: Eg3dConfig | None = None
    ) -> tuple[Schedule, PhaseContext, Sums, Sums]:
        """A schedule and a context whose draws replay ``tape``; what is logged and counted, too."""
        config = config or self.config
        c, device = self.meta["config"], torch.device("cpu")
        schedule = Schedule(self.method, config, LabelTable(self.arrays["gen_c"]))
        places = (torch.arange(c["N"]) + 0.5) / c["N"]
        draws = SilentTape(phase=name, tape={"z": self.arrays["z"], "label": places, **tape})
        logged, counted = Sums(), Sums()
        progress = Progress(0, c["cur_nimg"], BATCH)
        real = SimpleNamespace(float_image=self.real_image, camera=Camera.from_label(self.arrays["real_c"]))
        context = PhaseContext(
            progress, config, self.models, device, c["N"], 0, 0, draws, real, SharedResults(), logged, counted,
            torch.ones(()), lambda enabled: nullcontext(),
        )  # fmt: skip
        return schedule, context, logged, counted

    def real_image(self) -> Tensor:
        side = self.meta["config"]["D"]["img_resolution"]
        shape = (self.meta["config"]["N"], 3, side, side)
        rule = [{"match": "real", "std": 0.4}]
        return detfill({"real": shape}, self.meta["detfill_seed"], rule)["real"].clamp(-1, 1)

    def gradients(self, name: str, network: str, losses: Losses) -> Arrays:
        """Norms and first entries of the gradients of all losses, under the original's keys."""
        model = self.models[network]
        model.zero_grad()
        for _, loss in losses:
            loss.backward()
        rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = (
            discriminator_to_original if network == "discriminator" else generator_keys().back_to_original
        )
        named = rename({k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()})
        keys = self.meta[f"{name}_grad_keys"]
        found = {f"{name}_grad_norms": torch.stack([named[key].norm() for key in keys])}
        return found | {f"{name}_grad:{key}": named[key].flatten()[:SLICE] for key in keys}


def setup(meta: Meta, arrays: Arrays) -> Run:
    """Networks with the weights of the case, and our configuration of its settings."""
    c, seed, rules = meta["config"], meta["detfill_seed"], meta["rules"]
    g, d, k, options = c["G"], c["D"], c["loss_kwargs"], c["G"]["rendering_kwargs"]
    arguments = {**g, "mapping_kwargs": {"num_layers": g["mapping_num_layers"]}}
    generator = TriPlaneGenerator(generator_config_from_original(arguments, options))
    shapes = {key: tuple(value.shape) for key, value in generator_to_original(generator).items()}
    original = {**generator_to_original(generator), **detfill(shapes, seed, rules)}
    generator.load_state_dict(generator_from_original(original, generator))
    kwargs = {**d, "epilogue_kwargs": {"mbstd_group_size": d["mbstd_group_size"]}}
    discriminator = filled_discriminator(discriminator_of(kwargs), seed + 1, rules)
    config = Eg3dConfig(
        model=ModelConfig(resolution=g["img_resolution"], box_side=options["box_warp"]),
        render=RenderConfig(),
        neural=ResolutionConfig(
            k["neural_rendering_resolution_initial"],
            k["neural_rendering_resolution_final"],
            k["neural_rendering_resolution_fade_kimg"],
        ),
        discriminator=DiscriminatorConfig(group_size=d["mbstd_group_size"]),
        conditioning=ConditioningConfig(
            not options["c_gen_conditioning_zero"], k["gpc_reg_prob"], k["gpc_reg_fade_kimg"]
        ),
        loss=LossConfig(
            r1_gamma=k["r1_gamma"],
            r1_raw=k["dual_discrimination"],
            raw_filter=k["filter_mode"],
            density_weight=options["density_reg"],
            density_distance=options["density_reg_p_dist"],
            density_points=meta["reg_weights"]["l1_points"],
            monotonic_points=meta["reg_weights"]["monotonic_points"],
            monotonic_weight=meta["reg_weights"]["relu_mean"],
            blur_sigma=k["blur_init_sigma"],
            blur_fade_kimg=k["blur_fade_kimg"],
        ),
        train=TrainConfig(half="none"),
        reference=ReferenceConfig(strided_groups=True, roll_partners=True, density_cube=True, batch_depth=True),
    )
    models = Models(generator=generator.train(), discriminator=discriminator.train())
    return Run(meta, arrays, models, GoldenEg3d(options), config)


def rendered(arrays: Arrays, name: str) -> Arrays:
    """The numbers of a phase that renders."""
    names = {"swap": "swap_u", "jitter": "u_coarse", "importance": "u_fine"}
    return {ours: arrays[f"{name}_{theirs}"] for ours, theirs in names.items()}


def scores(name: str, kind: str, logits: Tensor) -> Arrays:
    return {f"{name}:Loss/scores/{kind}": logits, f"{name}:Loss/signs/{kind}": logits.sign()}


def main_phases(run: Run) -> Iterator[tuple[str, Any]]:
    """g_main, d_main and d_reg: statistics per sample, then the gradients of the phases themselves."""
    schedule, ctx, _, _ = run.phase("g_main", rendered(run.arrays, "Gmain"))
    fake = schedule.judge_fakes(ctx, schedule.generate(ctx))
    yield from {**scores("Gmain", "fake", fake), "Gmain:Loss/G/loss": F.softplus(-fake)}.items()
    yield from run.gradients("Gmain", "generator", schedule.g_main(ctx)).items()

    schedule, ctx, _, counted = run.phase("d_main", rendered(run.arrays, "Dmain"))
    fake, (real, _) = schedule.judge_fakes(ctx, schedule.generate(ctx)), schedule.judge_real(ctx)
    yield from {**scores("Dmain", "fake", fake), **scores("Dmain", "real", real)}.items()
    yield "Dmain:Loss/D/loss", F.softplus(fake) + F.softplus(-real)
    yield from run.gradients("Dmain", "discriminator", schedule.d_main(ctx)).items()
    means = {key: total / counted.weights[key] for key, total in counted.totals.items()}
    schedule.after_d_main(AfterPhase(ctx.progress, ctx.config, run.models, means, torch.ones(())))
    yield "Dmain_w_avg", run.models["generator"].get_buffer("backbone.mapping.w_avg")

    schedule, ctx, _, _ = run.phase("d_reg", {})
    real, inputs = schedule.judge_real(ctx)
    penalty = gradient_penalty(inputs if run.config.loss.r1_raw else inputs[:1], real)
    yield from scores("Dreg", "real", real).items()
    yield "Dreg:Loss/r1_penalty", penalty
    yield "Dreg:Loss/D/reg", penalty * (run.config.loss.r1_gamma / 2)
    yield from run.gradients("Dreg", "discriminator", schedule.d_reg(ctx)).items()


def regularisers(run: Run) -> Iterator[tuple[str, Any]]:
    """g_reg with every kind of regulariser of the case."""
    seed, count, weights = run.meta["detfill_seed"], run.meta["config"]["N"], run.meta["reg_weights"]
    for kind in weights["l1_perturbation"]:
        name = f"reg_{kind}"
        shapes = {"points": (f"{name}.coords", weights["l1_points"])}
        shapes["points_monotonic"] = (f"{name}.coords_monotonic", weights["monotonic_points"])
        tape = {}
        for ours, (theirs, points) in shapes.items():
            source = np.random.Generator(np.random.PCG64([seed, len(theirs)]))
            tape[ours] = torch.from_numpy(source.random((count, points, 3)).astype(np.float32))
        key = f"{name}.eps"
        tape["offsets"] = detfill({key: (count, weights["l1_points"], 3)}, seed)[key]
        coins = run.arrays[f"{name}_swap_u"].reshape(-1)
        tape |= dict(zip(("swap", "swap_again"), coins, strict=False))
        config = replace(run.config, loss=replace(run.config.loss, density_type=kind))
        schedule, ctx, logged, _ = run.phase("g_reg", tape, config)
        yield from run.gradients(name, "generator", schedule.g_reg(ctx)).items()
        reported = {"difference": "l1", "monotony": "relu_mean"}
        yield from (
            (f"{name}:{reported[k]}", logged.totals[k] / logged.weights[k]) for k in reported if k in logged.totals
        )


@given("z", "gen_c", "real_c", "*_swap_u", "*_u_coarse", "*_u_fine")
def losses(meta: Meta, arrays: Arrays) -> dict[str, Any]:
    run = setup(meta, arrays)
    return {**dict(main_phases(run)), **dict(regularisers(run))}


ADAPTERS = {"eg3d/losses": losses}
