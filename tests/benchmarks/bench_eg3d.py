# SPDX-License-Identifier: Apache-2.0
"""EG3D on one GPU, FFHQ at 512 px, random weights: pictures, the renderer alone, the phases of training.

    python tests/benchmarks/bench_eg3d.py [--out FILE] [--only pictures,renderer,training] [--presets fp16,bf16]
                                          [--variants tf32,tf32+fp16+channels_last] [--rays 64,128] [--tiny]
    python tests/benchmarks/bench_eg3d.py --only renderer --sweep [--precisions tf32,fp16]

Everything runs as users run it: pictures through :func:`facelab.inference.fast.accelerate`, phases through the
Trainer. Learning rates are 0 in training, so that every variant sees the same weights and the same random numbers at
every step and its losses and gradient norms can be held against those of fp32; regularisers run at every step here
and are weighed by their intervals in ``s_per_kimg``. Times are medians and interquartile ranges by CUDA events after
warm-up; memory is the peak that the allocator handed out. ``ORIGINAL`` holds the figures of the original program on
the same kind of GPU (H200, torch 2.11, random weights). ``--tiny`` runs all of it on a CPU with tiny networks, to see
that it works; its times mean nothing. The file is written after every row.

What an image costs, in multiply-adds (MAC) and bytes, and what to try first in training at batch 4:

- Forward: backbone 47 GMAC, super-resolution 98, discriminator 62, decoder 6.5 at 128^2 rays. g_main takes 560 an
  image, d_main 515, R1 370 (a sixteenth of the time), g_reg 140 (a quarter): 1.1 TMAC an image. Full precision
  without tensor cores is bound by these products; TF32 comes first, halves in the large blocks second.
- After that, bytes. One activation of the discriminator's first block is 64 x 512^2 halves, 134 MB at batch 4, and
  the block passes over some fourteen of them (convolution, bias and activation, low-pass, skip); each further
  resolution costs half of the one before. A forward moves about 3.5 GB, R1 several times that. So filters and
  activations decide d_reg, not convolutions: channels-last third, for cuDNN turns half-precision NCHW tensors round
  before and after its kernels; then fewer passes (the skip's low-pass reads the same tensor as the other one).
- A compiled discriminator can merge passes in g_main and d_main only: compiled graphs have no second derivative, so
  R1 stays as it is (variant ``compiled``, runs when named).
- Folding styles into the weights (``fused``) means a copy of every weight per sample, forward and backward, and grouped
  kernels: off in training. For one picture it is a plain convolution and saves two passes over the features.
- The plain renderer's backward needs at least 32 + 64 + 33 numbers of every sample point, 516 bytes; a batch of 4 at 128^2
  rays has 6.3 M points. It adds 3 x 4 x 32 floats a point to the planes with atomics. ``recompute`` trades the
  memory for another forward. The fused one keeps the depths alone, 4 bytes a point.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import eg3d_renderer
from measuring import Report, Row, chosen, spread, timed, versions
from short_runs import readings_of

from facelab.bases.eg3d.config import Eg3dConfig
from facelab.bases.eg3d.model import TriPlaneGeneratorConfig
from facelab.bases.eg3d.training import Eg3d, Schedule
from facelab.cameras.camera import Camera
from facelab.cameras.orbit import orbit_camera
from facelab.config import load_staged, resolve_curriculum
from facelab.data.batch import Batch
from facelab.draws import Draws
from facelab.generator import sample_latents
from facelab.inference.fast import PRESETS, FastGenerator, accelerate, measure_error
from facelab.nn.stylegan2.precision import Precision
from facelab.training.precision import device_switches
from facelab.training.protocol import TrainStage

ORIGINAL: dict[str, Any] = {  # ms; GiB; of the original, fp32 and TF32
    "picture_whole": {1: (16.9, 18.5), 4: (45.4, 41.5), 8: (83.0, 70.1)},
    "picture_cached": {1: (11.1, 8.3), 4: (28.2, 27.6), 8: (54.5, 53.3)},
    "renderer_forward": (21.0, 4.2),
    "renderer_forward_backward": (66.5, 10.1),
    "training": {
        64: {"fp32": (100, 48, 71, 159, 48.4), "tf32": (95, 42, 68, 155, 45.8)},
        128: {"fp32": (147, 49, 88, 156, 64.3), "tf32": (126, 37, 75, 152, 55.0)},
    },
}
PHASES = {"g_main": 1, "g_reg": 4, "d_main": 1, "d_reg": 16}  # and their intervals
PIVOT = (0.0, 0.0, 0.2)


@dataclass(frozen=True)
class Sizes:
    """How large, how often."""

    curriculum: str = "ffhq_512"
    rendering: int = 128  # side, of pictures and of the renderer alone
    batches: tuple[int, ...] = (1, 4, 8)
    renderer_batch: int = 4
    train_batch: int = 4
    repeats: int = 30
    warmup: int = 5
    steps: int = 12
    first_steps: int = 6  # not counted: kernels are compiled, cuDNN searches, graphs are recorded
    settings: tuple[str, ...] = ()

    def config(self, *overrides: str) -> Any:
        """The resolved configuration with all its rows."""
        path = resolve_curriculum("eg3d", self.curriculum)
        return load_staged(Eg3dConfig, [path], [*self.settings, *overrides])


TINY = Sizes("debug", 8, (1, 2), 2, 2, 2, 1, 2, 0, ("discriminator.group_size=2",))


def cameras(count: int, device: torch.device | str = "cpu") -> Camera:
    """Around the frontal view."""
    yaw = math.pi / 2 + torch.linspace(-0.4, 0.4, count)
    return orbit_camera(yaw, math.pi / 2 + torch.linspace(0.2, -0.2, count), 2.7, PIVOT).to(device)


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Way:
    """How pictures are drawn: ``fused`` as in :func:`accelerate`."""

    preset: str
    graphs: bool = True
    fused: bool | None = None


def ways(presets: Sequence[str], batch: int) -> Iterator[Way]:
    """Each preset as graphs; some also without, or with the other modulation."""
    for preset in presets:
        yield Way(preset)
        if preset in ("fp32", "fp16") and batch == 1:
            yield Way(preset, graphs=False)
        if preset in ("tf32", "fp16") and batch <= 4:
            yield Way(preset, fused=batch > 1)


def bench_pictures(report: Report, sizes: Sizes, device: torch.device, presets: Sequence[str]) -> None:
    """A whole picture (mapping, planes, rendering), one with its planes at hand, and planes alone."""
    config = sizes.config().stages[-1]
    generator = Eg3d().build_generator(config).to(device).eval().requires_grad_(False)
    settings = config.render.settings(config.model.box_side, sizes.rendering)
    for batch in sizes.batches:
        camera, latents = cameras(batch, device), sample_latents(generator.latent_spec, Draws(0), batch, device)
        for way in ways(presets, batch):
            fast = accelerate(generator, way.preset, graphs=way.graphs, fused=way.fused, on_cpu=device.type == "cpu")
            codes = fast.map(latents, camera.label())
            scene = fast.scene(codes)
            works: dict[str, Callable[[], Any]] = {
                "picture_whole": functools.partial(picture, fast, latents, camera, settings),
                "picture_cached": functools.partial(fast.render, scene, camera, settings),
                "planes": functools.partial(fast.scene, codes),
            }

            def measured(
                name: str, works: Any = works, fast: Any = fast, codes: Any = codes, batch: int = batch
            ) -> Row:
                row = timed(works[name], device, sizes.repeats, sizes.warmup)
                row["images_per_second"] = 1e3 * batch / row["milliseconds"]
                if name == "picture_whole":
                    row["error"] = asdict(measure_error(fast, codes, cameras(batch, device), settings))
                original = ORIGINAL.get(name, {}).get(batch)
                return row if original is None else {**row, "original_fp32_tf32": original}

            for name in works:
                report.attempt({"case": name, "batch": batch, **asdict(way)}, functools.partial(measured, name))
            fast.forget_graphs()


def picture(fast: FastGenerator, latents: Any, camera: Camera, settings: Any) -> Any:
    """From latents to pictures."""
    return fast.render(fast.scene(fast.map(latents, camera.label())), camera, settings)


# ---------------------------------------------------------------- the renderer alone


def bench_renderer(report: Report, sizes: Sizes, device: torch.device, sweep: bool, precisions: Sequence[str]) -> None:
    """The renderer alone; ``sweep``: the shapes of the fused kernels' work instead."""
    camera = cameras(sizes.renderer_batch, device)
    case = eg3d_renderer.RendererCase.make(sizes.config().stages[-1], sizes.rendering, camera, device)
    if sweep:
        eg3d_renderer.sweep_renderer(report, case, device, tuple(precisions))
    else:
        eg3d_renderer.bench_renderer(report, case, device, sizes.repeats, sizes.warmup, ORIGINAL)


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Variant:
    """A way to compute a training step.

    Attributes:
        settings: of the run.
        fused: styles are folded into the weights.
        compiled: the discriminator is, where it is differentiated once.
    """

    settings: tuple[str, ...]
    fused: bool = False
    compiled: bool = False


def _lowered(half: str, *more: str) -> tuple[str, ...]:
    return ("train.precision=tf32", f"train.half={half}", *more)


LAST, GRAPHS = "train.channels_last=true", "train.cuda_graphs=true"
VARIANTS: dict[str, Variant] = {
    "fp32": Variant(("train.precision=fp32", "train.half=none")),
    "fp32+fp16": Variant(("train.precision=fp32", "train.half=fp16")),
    "tf32": Variant(_lowered("none")),
    "tf32+channels_last": Variant(_lowered("none", LAST)),
    "tf32+fp16": Variant(_lowered("fp16")),
    "tf32+fp16+channels_last": Variant(_lowered("fp16", LAST)),
    "tf32+graphs": Variant(_lowered("none", GRAPHS)),
    "tf32+fp16+graphs": Variant(_lowered("fp16", GRAPHS)),
    "tf32+fp16+channels_last+graphs": Variant(_lowered("fp16", LAST, GRAPHS)),
    "tf32+fp16+channels_last+graphs+unscaled": Variant(_lowered("fp16", LAST, GRAPHS, "train.loss_scale=1")),
    "tf32+bf16+channels_last": Variant(_lowered("bf16", LAST)),
    "tf32+bf16_all+channels_last": Variant(_lowered("bf16", LAST, "train.half_everywhere=true")),
    "tf32+fp16+channels_last+recompute": Variant(_lowered("fp16", LAST, "render.recompute=true")),
    "tf32+fp16+channels_last+fused": Variant(_lowered("fp16", LAST), fused=True),
    "tf32+fp16+channels_last+compiled": Variant(_lowered("fp16", LAST), compiled=True),
}
USUAL = ("tf32", "tf32+fp16", "tf32+fp16+channels_last", "tf32+bf16+channels_last", "tf32+bf16_all+channels_last")


class Patterns:
    """Smooth random pictures with cameras; nothing is read and nothing drawn while the clock runs."""

    def __init__(self, size: int, count: int = 16) -> None:
        source = torch.Generator().manual_seed(3)
        coarse = torch.rand(count, 3, 8, 8, generator=source)
        smooth = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
        self.image = (255 * smooth.clamp(0, 1)).round().byte()
        self.camera = cameras(count)
        self.labels = self.camera.label()

    def batch(self, first_image: int, count: int, /) -> Batch:
        place = torch.arange(first_image, first_image + count) % len(self.image)
        return Batch(image=self.image[place], camera=self.camera[place])


class CompiledSchedule(Schedule):
    """The discriminator is compiled where it is differentiated once."""

    _compiled: Any = None

    def judge(self, ctx: Any, image: Tensor, raw: Tensor | None, label: Tensor, draws: Draws) -> Tensor:
        if draws.phase.startswith("d_reg"):
            return super().judge(ctx, image, raw, label, draws)
        discriminator: Any = ctx.models["discriminator"]
        discriminator.precision = self.method.precision(ctx.config)
        if self._compiled is None:
            self._compiled = torch.compile(discriminator, dynamic=False)
        return self._compiled(image, raw, label)


class Measured(Eg3d):
    """EG3D with the pictures above, computed in a variant's way."""

    def __init__(self, variant: Variant, on_cpu: bool = False) -> None:
        self.variant, self.on_cpu = variant, on_cpu

    def precision(self, config: Any) -> Precision:
        return replace(super().precision(config), on_cpu=self.on_cpu)

    def generator_config(self, config: Any) -> TriPlaneGeneratorConfig:
        return replace(super().generator_config(config), fused_modulation=self.variant.fused)

    def dataset(self, config: Any) -> Any:
        return Patterns(config.model.resolution)

    def stages(self, config: Any) -> list[TrainStage]:
        kind = CompiledSchedule if self.variant.compiled else Schedule
        return [TrainStage("main", tuple(kind(self, config).phases()))]


def run_variant(variant: Variant, rays: int, sizes: Sizes, device: torch.device) -> list[dict[str, float]]:
    """What every step of a short run said."""
    batch = sizes.train_batch
    overrides = [
        *variant.settings,
        f"neural.initial={rays}",
        f"train.batch_size={batch}",
        f"train.batch_chunk={batch}",
        f"train.max_steps={sizes.first_steps + sizes.steps}",
        "train.workers=0",
        "optim.generator_lr=0.0",
        "optim.discriminator_lr=0.0",
        "loss.density_every=1",
        "loss.r1_every=1",
        "loss.blur_fade_kimg=0",
        "log.every=1",
        "log.samples_every=0",
        "log.progress=false",
    ]
    return readings_of(Measured(variant, on_cpu=device.type == "cpu"), sizes.config(*overrides), device)


def summary(rows: Sequence[dict[str, float]], first: int, batch: int) -> dict[str, Any]:
    """Times, memory, losses of a run."""
    counted = rows[first:]
    phases = {name: spread([1e3 * row[f"seconds/{name}"] for row in counted]) for name in PHASES}
    per_image = sum(phases[name]["milliseconds"] / every for name, every in PHASES.items()) / batch
    return {
        "phases": phases,
        "s_per_kimg": per_image,  # milliseconds an image
        "step_wall_ms": statistics.median(1e3 * row["seconds_per_step"] for row in counted),
        "steps": len(counted),
        "memory_gib": max(row.get("memory_gib", 0.0) for row in counted),
        "first_steps_gib": max(row.get("memory_gib", 0.0) for row in rows[:first] or rows),  # cuDNN tries what is free
        "skipped_steps": sum(row[name] for row in rows for name in row if name.startswith("skipped/")),
    }


def compared(rows: Sequence[dict[str, float]], exact: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Losses and gradient norms against fp32: relative difference of their means over the steps (with its sign),
    median and largest one of the steps.

    The norms of single steps differ by a per cent in any arithmetic of ten or eleven bits: of activations near 0 the
    leaky ReLU takes the other slope, and the gradients of biases and of colours, which are sums over all pixels, all but
    cancel.
    """
    result = {}
    for name in [f"grad_norm/{phase}" for phase in PHASES] + LOSSES:
        parts = [abs(a[name] - b[name]) / max(abs(b[name]), 1e-12) for a, b in zip(rows, exact, strict=True)]
        total = sum(row[name] for row in exact)
        mean = (sum(row[name] for row in rows) - total) / max(abs(total), 1e-12)
        result[name] = {"mean": mean, "median": statistics.median(parts), "max": max(parts), "fp32": exact[0][name]}
    return result


LOSSES = ["g_main/adversarial", "g_reg/density", "d_main/fake", "d_main/real", "d_reg/r1"]


def bench_training(
    report: Report, sizes: Sizes, device: torch.device, variants: Sequence[str], sides: Sequence[int]
) -> None:
    """Every variant; fp32 runs always, to be compared with."""
    for rays in sides:
        exact: list[dict[str, float]] = []
        original = ORIGINAL["training"].get(rays, {})

        def measured(name: str, rays: int = rays, exact: Any = exact, original: Any = original) -> Row:
            rows = run_variant(VARIANTS[name], rays, sizes, device)
            if name == "fp32":
                exact.extend(rows)
            row = summary(rows, sizes.first_steps, sizes.train_batch)
            if exact:
                row["against_fp32"] = compared(rows, exact)
            for kind, values in original.items():
                row[f"original_{kind}"] = dict(zip((*PHASES, "s_per_kimg"), values, strict=True))
                row[f"ratio_{kind}"] = row["s_per_kimg"] / values[-1]
            return row

        for name in dict.fromkeys(("fp32", *variants)):
            case = {"case": "training", "variant": name, "batch": sizes.train_batch, "rays_side": rays}
            report.attempt(case, functools.partial(measured, name))
            if device.type == "cuda":
                torch.cuda.empty_cache()


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> int:
    sections = ("pictures", "renderer", "training")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--only", help=f"parts, comma-separated, of {', '.join(sections)}")
    parser.add_argument("--presets", help=f"of pictures, of {', '.join(PRESETS)}")
    parser.add_argument("--variants", help=f"of training beside fp32, of {', '.join(VARIANTS)} [{','.join(USUAL)}]")
    parser.add_argument("--rays", help="sides of the rendering in training [64,128]")
    parser.add_argument("--steps", type=int, help="counted steps of a training run [12]")
    parser.add_argument("--sweep", action="store_true", help="renderer: try how the kernels share their work out")
    parser.add_argument("--precisions", help="of --sweep [tf32,fp16]")
    parser.add_argument("--tiny", action="store_true", help="tiny networks on the CPU, to test this program")
    options = parser.parse_args(arguments)
    parts = chosen(options.only, sections, sections, parser)
    presets = chosen(options.presets, list(PRESETS), list(PRESETS), parser)
    variants = chosen(options.variants, list(VARIANTS), USUAL, parser)
    precisions = chosen(options.precisions, eg3d_renderer.PRECISIONS, ("tf32", "fp16"), parser)
    sides = [int(side) for side in options.rays.split(",")] if options.rays else [16] if options.tiny else [64, 128]
    if not options.tiny and not torch.cuda.is_available():
        print("bench_eg3d: no CUDA GPU, nothing to measure; --tiny tests the program on the CPU")
        return 0
    device = torch.device("cpu" if options.tiny else "cuda")
    sizes = TINY if options.tiny else Sizes()
    sizes = replace(sizes, steps=options.steps) if options.steps else sizes
    report = Report(options.out, {"benchmark": "eg3d", "tiny": options.tiny, **versions(device)})
    with device_switches("fp32", device):
        if "renderer" in parts:
            bench_renderer(report, sizes, device, options.sweep, precisions)
        if "pictures" in parts:
            bench_pictures(report, sizes, device, presets)
        if "training" in parts:
            bench_training(report, sizes, device, variants, sides)
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
