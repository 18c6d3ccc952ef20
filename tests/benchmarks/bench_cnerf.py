# SPDX-License-Identifier: Apache-2.0
"""CNeRF on one GPU, random weights: the volume renderer, pictures of 512 px, the steps of the first training stage.

    python tests/benchmarks/bench_cnerf.py [--out FILE] [--only renderer,pictures,training] [--presets fp32,tf32,fp16]
                                           [--variants tf32,tf32+fused] [--batches 1,4] [--steps 12] [--tiny]

The rendering has 64 x 64 rays of 24 samples and nine regions, as the original's recipe. Training runs through the
Trainer with its phases: ``g`` is the generator's step, ``d_global`` (which renders the one batch of fakes) and
``d_region`` together are the discriminators'. Learning rates are 0, so that every variant sees the same weights and the
same random numbers at every step and its losses and gradient norms can be held against those of fp32. Times are medians
and interquartile ranges by CUDA events after warm-up; memory is the peak that the allocator handed out. ``ORIGINAL``
holds the figures of the original program on the same kind of GPU (H200, torch 2.11, random weights); a figure without a
counterpart there stands alone. ``--tiny`` runs all of it on a CPU with tiny networks, to see that it works; its times
mean nothing. The file is written after every row.

What a sample costs. Nine generators of 3 x 128, four times 128 x 128 and small heads are 0.6 MMAC a point: forward; the
distance's gradient pulled back through the layers as much again; the backward of both twice their sum: 3.5 MMAC or 7
MFLOP a point, 2.8 TFLOP for four images of 98 304 points. The rest is passes over tensors of 9 x 128 floats a point,
1.8 GB each for four images.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from measuring import Report, Row, chosen, spread, timed, versions

from facelab.cameras.camera import Camera
from facelab.cameras.sphere import sphere_camera
from facelab.config import from_dict
from facelab.data.batch import Batch
from facelab.draws import Draws
from facelab.generator import Codes, sample_latents
from facelab.inference.fast import PRESETS, FastGenerator, accelerate, measure_error
from facelab.methods.cnerf.config import CnerfConfig
from facelab.methods.cnerf.field import BoundCNerf
from facelab.methods.cnerf.model import CNerfGenerator
from facelab.methods.cnerf.training import Cnerf
from facelab.methods.cnerf.volume_stage import VolumeStage
from facelab.rendering.sdf import SdfOptions, SdfRenderOutput
from facelab.training.distributed import Distributed
from facelab.training.loop import Callback, Trainer
from facelab.training.precision import device_switches
from facelab.training.protocol import TrainStage

ORIGINAL: dict[str, Any] = {  # batch -> ms of the original, fp32 and TF32; GiB
    "renderer_forward": {1: (17.6, None), 4: (57.0, 48.0)},
    "picture": {1: (23.5, None), 4: (77.0, 59.0)},
    "g": {1: (119.0, None), 4: (362.0, 274.0)},
    "d": {1: (122.0, None), 4: (226.0, 175.0)},
    "memory_gib": {1: 17.8, 4: 70.0},
}
PHASES = ("d_global", "d_region", "g")


@dataclass(frozen=True)
class Sizes:
    """How large, how often; ``settings`` of all runs."""

    batches: tuple[int, ...] = (1, 4)
    picture: int = 512
    repeats: int = 15
    warmup: int = 3
    steps: int = 10
    first_steps: int = 3  # not counted: kernels are compiled, cuDNN searches
    samples: int = 24
    settings: tuple[str, ...] = ()

    def config(self, *overrides: str) -> Any:
        """The resolved configuration."""
        return from_dict(CnerfConfig, {}, [*self.settings, f"render.inference_samples={self.samples}", *overrides])


TINY = Sizes(
    (1, 2), 16, 2, 1, 2, 0, 4,
    (
        "model.width=8", "model.style_dim=8", "model.depth=1", "model.transfer_channels=8", "model.channel_max=8",
        "discriminator.channel_max=8", "render.resolution=8", "render.samples=4", "render.max_points=2304",
    ),
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


# ---------------------------------------------------------------- the renderer alone


@dataclass(frozen=True)
class RendererCase:
    """One generator and the heads, cameras and random numbers of a batch."""

    generator: CNerfGenerator
    config: Any
    codes: Codes
    camera: Camera

    @classmethod
    def make(cls, sizes: Sizes, variant: Variant, batch: int, device: torch.device) -> RendererCase:
        config = sizes.config(*variant.settings).at(0)
        generator = Measured(variant).build_generator(config).to(device)
        latents = sample_latents(generator.latent_spec, Draws(0), batch, device)
        return cls(generator, config, generator.map(latents).map(Tensor.detach), cameras(batch, device))

    def render(self, options: SdfOptions | None = None) -> SdfRenderOutput:
        """With random depths, as in training, of 24 samples."""
        settings = self.config.render.settings(self.config.camera.radius, training=True)
        scene = self.generator.scene(self.codes)
        return self.generator.render_volume(scene, self.camera, settings, Draws(0), options)

    @torch.no_grad()
    def forward(self) -> SdfRenderOutput:
        return self.render()

    def gradients(self, gradient: str) -> list[Tensor]:
        """Of what the generator's losses look at: picture, masks, distances, their gradients."""
        seen = self.render(SdfOptions(samples=True, gradient=gradient))  # type: ignore[arg-type]
        assert seen.gradient is not None and seen.sdf is not None and seen.semantics is not None
        loss = (seen.gradient.norm(dim=-1) - 1).square().mean() + torch.exp(-100 * seen.sdf.abs()).mean()
        loss = loss + seen.rgb.square().mean() + seen.semantics.square().mean()
        wanted = [p for name, p in self.generator.field_net.named_parameters() if not name.startswith("base.")]
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        return [g for g in found if g is not None]


def bench_renderer(report: Report, sizes: Sizes, device: torch.device, variants: Sequence[str]) -> None:
    """Volume rendering without gradient, and with the gradients of the generator's own terms; against fp32."""
    for batch in sizes.batches:
        pictures: dict[str, dict[str, Tensor]] = {}
        gradients: dict[str, Tensor] = {}

        def forward(name: str, batch: int = batch, exact: Any = pictures) -> Row:
            variant = VARIANTS[name]
            with device_switches(variant.precision, device):
                case = RendererCase.make(sizes, variant, batch, device)
                row = timed(case.forward, device, sizes.repeats, sizes.warmup)
                seen = case.forward()
            assert seen.semantics is not None
            got = {"rgb": seen.rgb, "semantics": seen.semantics, "depth": seen.depth}
            against = exact.setdefault("fp32", got)
            row["max_error"] = {key: float((value - against[key]).abs().max()) for key, value in got.items()}
            return beside("renderer_forward", batch, row, variant)

        def backward(name: str, batch: int = batch, exact: Any = gradients) -> Row:
            variant = VARIANTS[name]
            with device_switches(variant.precision, device):
                case = RendererCase.make(sizes, variant, batch, device)
                work = functools.partial(case.gradients, variant.gradient)
                row = timed(work, device, sizes.repeats, sizes.warmup)
                got = torch.cat([g.flatten() for g in work()])
            exact[name] = got
            against = exact.get(own_scale(variant), got)
            return {**row, "relative_error": float((got - against).norm() / against.norm())}

        for name in with_exact(variants):
            variant = VARIANTS[name]
            about = {"batch": batch, "variant": name, "samples": sizes.config().at(0).render.samples}
            if not {RECOMPUTE, RESIDUAL} & set(variant.settings):
                report.attempt({"case": "renderer_forward", **about}, functools.partial(forward, name))
            report.attempt({"case": "renderer_forward_backward", **about}, functools.partial(backward, name))


def beside(name: str, batch: int, row: Row, variant: Variant) -> Row:
    """The row with the original's times and the ratio to that of fp32, or, below fp32, of TF32 where it was measured."""
    pair = ORIGINAL[name].get(batch)
    if pair is None:
        return row
    row["original_fp32_tf32"] = pair
    row["ratio"] = row["milliseconds"] / (pair[0] if variant.precision == "fp32" or pair[1] is None else pair[1])
    return row


# ---------------------------------------------------------------- pictures


def bench_pictures(report: Report, sizes: Sizes, device: torch.device, presets: Sequence[str]) -> None:
    """A whole picture of the full model from latents on: mapping, volume rendering, decoder."""
    config = sizes.config("model.stage=full", f"model.resolution={sizes.picture}").at(0)
    generator = Measured().build_generator(config).to(device).eval().requires_grad_(False)
    settings = config.render.settings(config.camera.radius)
    for batch in sizes.batches:
        camera, latents = cameras(batch, device), sample_latents(generator.latent_spec, Draws(0), batch, device)
        for preset in presets:
            for graphs in (True, False):
                fast = accelerate(generator, preset, graphs=graphs, on_cpu=device.type == "cpu")

                def measured(fast: FastGenerator = fast, camera: Camera = camera, latents: Any = latents) -> Row:
                    work = functools.partial(picture, fast, latents, camera, settings)
                    row = timed(work, device, sizes.repeats, sizes.warmup)
                    row["error"] = asdict(measure_error(fast, fast.map(latents), camera, settings))
                    return beside("picture", len(camera), row, Variant("tf32" if fast.preset.tf32 else "fp32"))

                about = {"case": "picture", "batch": batch, "preset": preset, "graphs": graphs, "side": sizes.picture}
                report.attempt({**about, "samples": settings.samples_coarse}, measured)
                fast.forget_graphs()


def picture(fast: FastGenerator, latents: Any, camera: Camera, settings: Any) -> Any:
    """From latents to pictures."""
    return fast.render(fast.scene(fast.map(latents)), camera, settings)


# ---------------------------------------------------------------- training


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


class Unsaved(Trainer):
    """A run that leaves no checkpoint."""

    def save(self) -> Path:
        return self.run_dir


class Readings(Callback):
    """Keeps what each line of the log says."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.rows.append(dict(metrics))


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
    readings = Readings()
    with tempfile.TemporaryDirectory() as folder:
        config = sizes.config(*overrides)
        Unsaved(Measured(variant), config, folder, Distributed(device=device), [readings]).run()
    return readings.rows


def summary(rows: Sequence[dict[str, float]], first: int) -> dict[str, Any]:
    """Times and memory of a run; ``d`` is the sum of both discriminators' phases, step by step."""
    counted = rows[first:]
    times = {name: [1e3 * row[f"seconds/{name}"] for row in counted] for name in PHASES}
    times["d"] = [a + b for a, b in zip(times["d_global"], times["d_region"], strict=True)]
    return {
        "phases": {name: spread(values) for name, values in times.items()},
        "step_wall_ms": statistics.median(1e3 * row["seconds_per_step"] for row in counted),
        "steps": len(counted),
        "memory_gib": max(row.get("memory_gib", 0.0) for row in rows),
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


def bench_training(report: Report, sizes: Sizes, device: torch.device, variants: Sequence[str]) -> None:
    """Every variant; those that they are compared with run always."""
    for batch in sizes.batches:
        known: dict[str, list[dict[str, float]]] = {}

        def measured(name: str, batch: int = batch, known: Any = known) -> Row:
            variant = VARIANTS[name]
            rows = known[name] = run_variant(variant, batch, sizes, device)
            row = summary(rows, sizes.first_steps)
            for phase in ("g", "d"):
                row["phases"][phase] = beside(phase, batch, row["phases"][phase], variant)
            if batch in ORIGINAL["memory_gib"]:
                row["original_gib"] = ORIGINAL["memory_gib"][batch]
                row["memory_ratio"] = row["memory_gib"] / row["original_gib"]
            exact = own_scale(variant)
            return {**row, "exact": exact, "against_exact": compared(rows, known[exact])} if exact in known else row

        for name in with_exact(variants):
            report.attempt({"case": "training", "batch": batch, "variant": name}, functools.partial(measured, name))
            if device.type == "cuda":
                torch.cuda.empty_cache()


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> int:
    sections = ("renderer", "pictures", "training")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--only", help=f"parts, comma-separated, of {', '.join(sections)}")
    parser.add_argument("--presets", help=f"of pictures, of {', '.join(PRESETS)} [fp32,tf32,fp16]")
    parser.add_argument("--variants", help=f"beside fp32, of {', '.join(VARIANTS)} [{','.join(USUAL)}]")
    parser.add_argument("--batches", help="images at a time [1,4]")
    parser.add_argument("--steps", type=int, help="counted steps of a training run [10]")
    parser.add_argument("--tiny", action="store_true", help="tiny networks on the CPU, to test this program")
    options = parser.parse_args(arguments)
    parts = chosen(options.only, sections, sections, parser)
    presets = chosen(options.presets, list(PRESETS), ("fp32", "tf32", "fp16"), parser)
    variants = chosen(options.variants, list(VARIANTS), USUAL, parser)
    if not options.tiny and not torch.cuda.is_available():
        print("bench_cnerf: no CUDA GPU, nothing to measure; --tiny tests the program on the CPU")
        return 0
    device = torch.device("cpu" if options.tiny else "cuda")
    sizes = TINY if options.tiny else Sizes()
    sizes = replace(sizes, steps=options.steps) if options.steps else sizes
    if options.batches:
        sizes = replace(sizes, batches=tuple(int(batch) for batch in options.batches.split(",")))
    report = Report(options.out, {"benchmark": "cnerf", "tiny": options.tiny, **versions(device)})
    with device_switches("fp32", device):
        if "training" in parts:
            bench_training(report, sizes, device, variants)
        if "pictures" in parts:
            bench_pictures(report, sizes, device, presets)
        if "renderer" in parts:
            bench_renderer(report, sizes, device, variants)
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
