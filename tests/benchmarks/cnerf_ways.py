# SPDX-License-Identifier: Apache-2.0
"""Ways to compute CNeRF's training step, and short runs of them: what bench_cnerf measures."""

from __future__ import annotations

import functools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from measuring import spread
from short_runs import readings_of

from facelab.cameras.camera import Camera
from facelab.cameras.sphere import sphere_camera
from facelab.config import from_dict
from facelab.data.batch import Batch
from facelab.draws import Draws
from facelab.methods.cnerf.config import CnerfConfig
from facelab.methods.cnerf.field import BoundCNerf
from facelab.methods.cnerf.model import CNerfGenerator
from facelab.methods.cnerf.training import Cnerf
from facelab.methods.cnerf.volume_stage import VolumeStage
from facelab.rendering.sdf import SdfOptions
from facelab.training.protocol import TrainStage

PHASES = ("d_global", "d_region", "g")


@dataclass(frozen=True)
class Sizes:
    """How large, how often; ``settings`` of all runs."""

    batches: tuple[int, ...] = (1, 4)
    picture: int = 512
    repeats: int = 15
    warmup: int = 3
    steps: int = 10
    first_steps: int = 8  # not counted: kernels are compiled, cuDNN searches, graphs are recorded
    samples: int = 24
    settings: tuple[str, ...] = ()
    chunk_powers: tuple[int, ...] = (21, 22, 23, 24, 25, 26)

    def config(self, *overrides: str) -> Any:
        """The resolved configuration."""
        return from_dict(CnerfConfig, {}, [*self.settings, f"render.inference_samples={self.samples}", *overrides])


TINY = Sizes(
    (1, 2), 16, 2, 1, 2, 0, 4,
    (
        "model.width=8", "model.style_dim=8", "model.depth=1", "model.transfer_channels=8", "model.channel_max=8",
        "discriminator.channel_max=8", "render.resolution=8", "render.samples=4", "render.max_points=2304",
    ),
    (12, 16),
)  # fmt: skip


def cameras(count: int, device: torch.device | str = "cpu") -> Camera:
    """Around the frontal view."""
    across = torch.linspace(-0.3, 0.3, count)
    return sphere_camera(across, across.flip(0) / 2).to(device)


# ---------------------------------------------------------------- ways to compute a step


@dataclass(frozen=True)
class Variant:
    """A way to compute the renderer and a training step.

    Attributes:
        precision: of the run, ``train.precision``.
        settings: of a run.
        gradient: how the distance's gradient is found.
        compiled: the whole field is.
    """

    precision: str = "fp32"
    settings: tuple[str, ...] = ()
    gradient: str = "layers"
    compiled: bool = False


RESIDUAL = "reference.residual_eikonal=true"  # derivatives by autograd do not see the base
RECOMPUTE = "render.recompute=true"
LAST = "discriminator.channels_last=true"
FUSED = "render.fused=true"  # the field's passes are compiled
GRAPHS = "train.cuda_graphs=true"
HALF = "render.precision=fp16"  # what the field's products take
VARIANTS: dict[str, Variant] = {
    "fp32": Variant(),
    "fp32+residual": Variant(settings=(RESIDUAL,)),
    "fp32+autograd": Variant(settings=(RESIDUAL,), gradient="autograd"),
    "fp32+fused": Variant(settings=(FUSED,)),
    "fp32+recompute": Variant(settings=(RECOMPUTE,)),
    "fp32+compiled": Variant(compiled=True),
    "tf32": Variant("tf32"),
    "tf32+autograd": Variant("tf32", (RESIDUAL,), gradient="autograd"),
    "tf32+channels_last": Variant("tf32", (LAST,)),
    "tf32+fused": Variant("tf32", (FUSED,)),
    "tf32+fused+channels_last": Variant("tf32", (FUSED, LAST)),
    "tf32+fused+recompute": Variant("tf32", (FUSED, RECOMPUTE)),
    "tf32+compiled": Variant("tf32", compiled=True),
    "tf32+fp16": Variant("tf32", (HALF,)),
    "tf32+fp16+fused+channels_last": Variant("tf32", (HALF, FUSED, LAST)),
    "fp32+fused+graphs": Variant(settings=(FUSED, GRAPHS)),
    "tf32+fused+channels_last+graphs": Variant("tf32", (FUSED, LAST, GRAPHS)),
    "tf32+fp16+fused+channels_last+graphs": Variant("tf32", (HALF, FUSED, LAST, GRAPHS)),
}
USUAL = (
    "fp32+autograd",
    "fp32+fused",
    "tf32",
    "tf32+fused+channels_last",
    "tf32+fp16+fused+channels_last",
)


def with_exact(names: Sequence[str]) -> list[str]:
    """fp32, and each variant behind the one that it is compared with."""
    order = ["fp32"]
    for name in names:
        order += [own_scale(VARIANTS[name]), name]
    return list(dict.fromkeys(order))


def own_scale(variant: Variant) -> str:
    """The variant of full precision whose loss is the same."""
    return "fp32+residual" if RESIDUAL in variant.settings else "fp32"


@functools.cache
def compiled_call(gradient: bool) -> Callable[..., Any]:
    """The field's evaluation as one compiled graph, for any scene."""
    return torch.compile(BoundCNerf.with_gradient if gradient else BoundCNerf.__call__, dynamic=False)


@dataclass(frozen=True)
class CompiledBound:
    """A bound field whose evaluations are compiled."""

    bound: BoundCNerf

    def __call__(self, points: Tensor, directions: Tensor) -> Any:
        return compiled_call(False)(self.bound, points, directions)

    def with_gradient(self, points: Tensor, directions: Tensor) -> Any:
        return compiled_call(True)(self.bound, points, directions)


class CompiledGenerator(CNerfGenerator):
    """The field is compiled."""

    def field(self, *arguments: Any, **options: Any) -> Any:
        return CompiledBound(super().field(*arguments, **options))


class Measured(Cnerf):
    """CNeRF computed in a variant's way, on smooth random pictures."""

    def __init__(self, variant: Variant | None = None) -> None:
        self.variant = Variant() if variant is None else variant

    def build_generator(self, config: Any) -> CNerfGenerator:
        generator = super().build_generator(config)
        if self.variant.compiled:
            generator.__class__ = CompiledGenerator
        return generator

    def dataset(self, config: Any) -> Any:
        return Patterns(config.render.resolution)

    def stages(self, config: Any) -> list[TrainStage]:
        return [MeasuredStage(config, self.variant.gradient).stage()]


class Patterns:
    """Smooth random pictures and label maps; nothing is read and nothing drawn while the clock runs."""

    def __init__(self, size: int, count: int = 16) -> None:
        source = torch.Generator().manual_seed(3)
        coarse = torch.rand(count, 3 + 19, 8, 8, generator=source)
        smooth = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
        self.image = (255 * smooth[:, :3].clamp(0, 1)).round().byte()
        self.label_map = smooth[:, 3:].argmax(1).byte()
        self.camera = cameras(count)

    def batch(self, first_image: int, count: int, /) -> Batch:
        place = torch.arange(first_image, first_image + count) % len(self.image)
        return Batch(image=self.image[place], label_map=self.label_map[place], camera=self.camera[place])


class MeasuredStage(VolumeStage):
    """The first stage, which finds the distance's gradient in the variant's way."""

    def __init__(self, config: CnerfConfig, gradient: str) -> None:
        super().__init__(config)
        self.gradient = gradient

    def render(self, ctx: Any, draws: Draws, options: SdfOptions) -> Any:
        if options.gradient != "none":
            options = replace(options, gradient=self.gradient)  # type: ignore[arg-type]
        return super().render(ctx, draws, options)


def run_variant(variant: Variant, batch: int, sizes: Sizes, device: torch.device) -> list[dict[str, float]]:
    """What every step of a short run said."""
    overrides = [
        *variant.settings,
        f"train.precision={variant.precision}",
        f"train.batch_per_gpu={batch}",
        f"train.batch_chunk={batch}",
        f"discriminator.group_size={math.gcd(batch, 4)}",
        f"train.max_steps={sizes.first_steps + sizes.steps}",
        "train.workers=0",
        "sphere.steps=0",
        "optim.volume_generator_lr=0.0",
        "optim.volume_discriminator_lr=0.0",
        "log.every=1",
        "log.samples_every=0",
        "log.progress=false",
    ]
    return readings_of(Measured(variant), sizes.config(*overrides), device)


def summary(rows: Sequence[dict[str, float]], first: int) -> dict[str, Any]:
    """Times and memory of a run; ``d`` is the sum of both discriminators' phases, step by step."""
    counted = rows[first:]
    times = {name: [1e3 * row[f"seconds/{name}"] for row in counted] for name in PHASES}
    times["d"] = [a + b for a, b in zip(times["d_global"], times["d_region"], strict=True)]
    return {
        "phases": {name: spread(values) for name, values in times.items()},
        "step_wall_ms": statistics.median(1e3 * row["seconds_per_step"] for row in counted),
        "steps": len(counted),
        "memory_gib": max(row.get("memory_gib", 0.0) for row in counted),
        "first_steps_gib": max(row.get("memory_gib", 0.0) for row in rows[:first] or rows),  # cuDNN tries what is free
        "skipped_steps": sum(row[name] for row in rows for name in row if name.startswith("skipped/")),
    }


def compared(rows: Sequence[dict[str, float]], exact: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Losses and gradient norms against fp32: the largest relative difference over the steps, and the median."""
    result = {}
    names = [n for n in exact[0] if n.startswith("grad_norm/") or n.split("/")[0] in PHASES]
    for name in names:
        parts = [abs(a[name] - b[name]) / max(abs(b[name]), 1e-12) for a, b in zip(rows, exact, strict=True)]
        result[name] = {"median": statistics.median(parts), "max": max(parts), "fp32": exact[0][name]}
    return result
