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
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from cnerf_ways import (
    RECOMPUTE,
    RESIDUAL,
    TINY,
    USUAL,
    VARIANTS,
    Measured,
    Sizes,
    Variant,
    cameras,
    compared,
    own_scale,
    run_variant,
    summary,
    with_exact,
)
from measuring import Report, Row, chosen, timed, versions

from facelab.cameras.camera import Camera
from facelab.draws import Draws
from facelab.generator import Codes, sample_latents
from facelab.inference.fast import PRESETS, FastGenerator, accelerate, measure_error
from facelab.methods.cnerf import passes
from facelab.methods.cnerf.model import CNerfGenerator
from facelab.rendering.sdf import SdfOptions, SdfRenderOutput
from facelab.training.precision import device_switches

ORIGINAL: dict[str, Any] = {  # batch -> ms of the original, fp32 and TF32; GiB
    "renderer_forward": {1: (17.6, None), 4: (57.0, 48.0)},
    "picture": {1: (23.5, None), 4: (77.0, 59.0)},
    "g": {1: (119.0, None), 4: (362.0, 274.0)},
    "d": {1: (122.0, None), 4: (226.0, 175.0)},
    "memory_gib": {1: 17.8, 4: 70.0},
}


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


def bench_chunks(report: Report, sizes: Sizes, device: torch.device, variants: Sequence[str]) -> None:
    """The renderer's forward and backward by the size of the pieces in which points go through the layers."""
    usual = passes.CHUNK_NUMBERS
    try:
        for power in sizes.chunk_powers:
            passes.CHUNK_NUMBERS = 2**power
            for name in dict.fromkeys(("fp32", *variants)):

                def measured(name: str = name) -> Row:
                    variant = VARIANTS[name]
                    with device_switches(variant.precision, device):
                        case = RendererCase.make(sizes, variant, sizes.batches[-1], device)
                        work = functools.partial(case.gradients, variant.gradient)
                        return timed(work, device, sizes.repeats, sizes.warmup)

                about = {"batch": sizes.batches[-1], "variant": name, "chunk_power": power}
                report.attempt({"case": "chunks", **about}, measured)
    finally:
        passes.CHUNK_NUMBERS = usual


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
    usual = ("renderer", "pictures", "training")
    sections = (*usual, "chunks")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--only", help=f"parts of {', '.join(sections)} [{','.join(usual)}]")
    parser.add_argument("--presets", help=f"of pictures, of {', '.join(PRESETS)} [fp32,tf32,fp16]")
    parser.add_argument("--variants", help=f"beside fp32, of {', '.join(VARIANTS)} [{','.join(USUAL)}]")
    parser.add_argument("--batches", help="images at a time [1,4]")
    parser.add_argument("--steps", type=int, help="counted steps of a training run [10]")
    parser.add_argument("--tiny", action="store_true", help="tiny networks on the CPU, to test this program")
    options = parser.parse_args(arguments)
    parts = chosen(options.only, sections, usual, parser)
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
        if "chunks" in parts:
            bench_chunks(report, sizes, device, variants)
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
