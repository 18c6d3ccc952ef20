# SPDX-License-Identifier: Apache-2.0
"""FaceDNeRF's steps on one GPU: EG3D of FFHQ at 512 px, every network of its real size and of random weights.

    python tests/benchmarks/bench_facednerf.py [--out FILE] [--tasks edit,relight] [--ways tf32,bf16,plain]
                                               [--repeats 20] [--tiny]

A row for each task and way: milliseconds and memory of a step of the first stage (codes) and of the second (tuning), the
minutes of 1000 + 400 such steps, and the seconds from nothing computed to the first picture. ``edit`` has all losses
(identity, reconstruction, text, light, noise maps), ``relight`` all but the text.

Judges: LPIPS on VGG16, ArcFace's IR-SE50, DPR at 512 px, denoiser and encoder of Stable Diffusion 2.1 base's sizes. The
rendering has 128 x 128 rays of twice the model's samples, as the original asks for.

``plain`` is the same step without what makes ours fast: the plain renderer, planes drawn once for each of the two views,
styles folded into the weights, no TF32. The original's loop that projects its light is timed alone (``projection``) and
then added, in ``minutes_with_loop``: its numbers do not depend on the rest of a step. That the original also judges the
photo anew at every step is not in it.

``eager`` is ``tf32`` without CUDA graphs (``memory.cuda_graphs=false``); all other ways but the plain ones play their
steps back. ``played`` counts such steps of a stage, ``said`` holds the reason where there are none.

Times are medians and interquartile ranges by CUDA events after warm-up; ``memory_gib`` is the peak with all networks,
without the first steps, in which cuDNN tries what fits into free memory (``first_steps_gib``); with graphs it is what the
process has reserved, for their memory is no part of the allocator's peak.
``losses`` are those of the first step, which every way computes from the same random numbers; ``waits`` counts by line
where a step makes the CPU wait for the GPU. ``first_picture_seconds`` goes from loaded networks to the first step's
picture in the CPU's memory; in the first row (``cold``) kernels are compiled in it. Weights are not read from a disk.
``--tiny`` runs all of it on a CPU with a tiny generator and diffusion model, to see that it works; its times mean nothing.
"""

from __future__ import annotations

import argparse
import collections
import functools
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_eg3d import Sizes as ModelSizes
from measuring import Report, Row, chosen, spread, timed, versions

from facelab.bases.eg3d.training import Eg3d
from facelab.cameras import Camera
from facelab.cameras.rays import make_rays
from facelab.cli.facednerf_options import LOW_MEMORY
from facelab.config import load_config, resolve_curriculum
from facelab.draws import Draws
from facelab.generator import Codes, GeneratorOutput, Scene
from facelab.inversion.problem import Problem, Target, Weighted
from facelab.lighting.projection import PRESETS, REFERENCE_GRID, PolarFunction
from facelab.losses.perceptual import VGG_STAGES, LpipsVgg
from facelab.losses.score_distillation import ScoreDistillation
from facelab.methods.facednerf.config import FaceDNeRFConfig
from facelab.methods.facednerf.course import Control, Course, Step, one_of
from facelab.methods.facednerf.editing import Model, Networks, light_goal
from facelab.methods.facednerf.terms import make_terms, noise_weight
from facelab.nn.pretrained.arcface import ArcFace, FaceIdentity
from facelab.nn.pretrained.diffusion import recompute_encoder
from facelab.nn.pretrained.light_estimator import LightEstimator
from facelab.nn.pretrained.random_diffusion import full_size_diffusion, tiny_diffusion, tiny_embeddings
from facelab.rendering.integrators import RenderOutput
from facelab.rendering.midpoint import render_midpoints
from facelab.rendering.settings import RenderSettings

CODES_STEPS, TUNE_STEPS = 1000, 400  # of a whole run
TASKS = {"edit": "edit_and_relight", "relight": "relight"}  # and their presets
LAMP = "right"
EAGER = "memory.cuda_graphs=false"


@dataclass(frozen=True)
class Way:
    """Settings of a run; ``plain``: see the module; ``folded``: styles folded into weights; ``diffusion_last``:
    channels-last networks of the text."""

    settings: tuple[str, ...] = ()
    plain: bool = False
    folded: bool = False
    diffusion_last: bool = True


WAYS = {
    "tf32": Way(),
    "eager": Way((EAGER,)),
    "fp32": Way(("memory.precision=fp32",)),
    "bf16": Way(("memory.superresolution=bf16",)),
    "bf16+eager": Way(("memory.superresolution=bf16", EAGER)),
    "as_built": Way(("memory.superresolution=as_built",)),
    "low_memory": Way(LOW_MEMORY),
    "samples_1": Way(("render.sample_factor=1",)),
    "bf16+samples_1": Way(("memory.superresolution=bf16", "render.sample_factor=1")),
    "folded": Way(folded=True),
    "diffusion_nchw": Way(diffusion_last=False),
    "plain": Way(("memory.precision=fp32", EAGER), plain=True),
    "plain+tf32": Way((EAGER,), plain=True),
}
USUAL = ("tf32", "eager", "fp32", "bf16", "low_memory", "samples_1", "plain")  # the others run when named


@dataclass(frozen=True)
class Sizes:
    """How large, how often."""

    model: ModelSizes = field(default_factory=ModelSizes)
    rendering: int = 128
    light_side: int = 512
    tiny: bool = False
    repeats: int = 20
    warmup: int = 5
    loops: int = 3


TINY = Sizes(ModelSizes("debug"), 16, 32, True, 2, 0, 1)


# ---------------------------------------------------------------- networks of random weights


def random_lpips() -> LpipsVgg:
    """LPIPS's architecture."""
    source, width, tensors = torch.Generator().manual_seed(1), 3, {}
    for number, channels in enumerate((c for stage in VGG_STAGES for c in stage), start=1):
        weight = torch.randn(channels, width, 3, 3, generator=source) * math.sqrt(2 / (9 * width))
        tensors |= {f"layers.conv{number}.weight": weight, f"layers.conv{number}.bias": torch.zeros(channels)}
        width = channels
    tensors |= {f"lpips{tap}": torch.rand(stage[-1], generator=source) for tap, stage in enumerate(VGG_STAGES)}
    return LpipsVgg(tensors)


def drawn(make: Callable[[], nn.Module]) -> nn.Module:
    """A network as torch initialises it, from a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return make().requires_grad_(False).eval()


def make_networks(sizes: Sizes, device: torch.device) -> Networks:
    """All judges."""
    if sizes.tiny:
        parts, embeddings = tiny_diffusion(device=device), tiny_embeddings("a hat")
    else:
        parts, embeddings = full_size_diffusion("bf16", device)
    config = load_config(FaceDNeRFConfig)
    return Networks(
        perceptual=random_lpips().to(device),
        identity=FaceIdentity(drawn(ArcFace)).to(device),  # type: ignore[arg-type]
        text=ScoreDistillation(parts.unet, parts.vae, parts.scheduler, embeddings.to(device), config.guide()),
        light=drawn(lambda: LightEstimator(side=sizes.light_side)).to(device),
    )


def make_model(sizes: Sizes, device: torch.device) -> Model:
    """A generator whose noise maps matter; a new one gives them strength 0."""
    config = sizes.model.config().stages[-1]
    generator = Eg3d().build_generator(config).eval().requires_grad_(False)
    for name, value in generator.named_parameters():
        if name.endswith("noise_strength"):
            value.fill_(0.1)
    return Model(generator.to(device), config.view, config.render)


def make_target(model: Model, config: FaceDNeRFConfig) -> Target:
    """A random picture, a little from the side."""
    side = model.picture_side(model.settings(config))
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    large = nn.functional.interpolate(picture, size=(side, side), mode="bicubic", align_corners=False)
    return Target(large.clamp(-1, 1), model.camera(config, 0.1, -0.05))


# ---------------------------------------------------------------- the plain twin


class FoldedCourse(Course):
    """The same steps with styles folded into the weights."""

    def _problem(self, generator: Any, target: Target, terms: dict[str, Weighted]) -> Problem:
        for module in generator.modules():
            if hasattr(module, "fused_modconv"):
                module.fused_modconv = True
        return super()._problem(generator, target, terms)


class PlainCourse(FoldedCourse):
    """The same steps by the plain renderer, with planes drawn anew for each view."""

    def _problem(self, generator: Any, target: Target, terms: dict[str, Weighted]) -> Problem:
        super()._problem(generator, target, terms)
        generator.render_volume = functools.partial(plain_volume, generator)

        def promise(codes: Codes, noise: Any) -> Scene:
            return Scene({"w": codes.values["w"], "make": lambda: generator.scene(codes, noise)}, len(target))

        def output(scene: Scene, camera: Camera, settings: RenderSettings, draws: Draws) -> GeneratorOutput:
            return generator.render(scene.parts["make"](), camera, settings, draws)

        return Problem(generator, target, terms, self.settings, self.draws, make_scene=promise, make_output=output)


def plain_volume(
    generator: Any, scene: Scene, camera: Camera, settings: RenderSettings, draws: Draws | None = None
) -> RenderOutput:
    """``generator.render_volume`` without the fused kernels."""
    rays = make_rays(camera, settings.resolution, settings.grid)
    return render_midpoints(generator.field(scene, len(camera)), rays, settings, draws)


def looped_projection(function: PolarFunction, grid: int = REFERENCE_GRID) -> list[float]:
    """Nine numbers of a light, cell by cell in Python: twice two angles, nine functions of them, one sum each."""
    found = [0.0] * 9
    for a in range(grid):
        for b in range(grid):
            x, y = (a + 0.5) / grid, (b + 0.5) / grid
            theta, phi = 2 * math.acos(math.sqrt(1 - x)), 2 * math.pi * y
            light = float(function(torch.tensor(theta, dtype=torch.float64), torch.tensor(phi, dtype=torch.float64)))
            for k in range(9):
                found[k] += light * harmonic(k, theta, phi)
    return [4 * math.pi / grid**2 * value for value in found]


def harmonic(k: int, theta: float, phi: float) -> float:
    """The k-th of the first nine real spherical harmonics, with the Condon-Shortley sign."""
    degree = math.isqrt(k)
    order = k - degree * (degree + 1)
    m = abs(order)
    ratio = math.factorial(degree - m) / math.factorial(degree + m)
    size = math.sqrt((2 * degree + 1) / (4 * math.pi) * ratio)
    value = size * legendre(degree, m, math.cos(theta), math.sin(theta))
    if order == 0:
        return value
    return math.sqrt(2) * value * (math.cos(m * phi) if order > 0 else math.sin(m * phi))


def legendre(degree: int, m: int, c: float, s: float) -> float:
    """Associated Legendre functions up to degree 2, with the sign."""
    return {
        (0, 0): 1.0, (1, 0): c, (1, 1): -s, (2, 0): (3 * c * c - 1) / 2, (2, 1): -3 * c * s, (2, 2): 3 * s * s,
    }[degree, m]  # fmt: skip


def loop_milliseconds(sizes: Sizes) -> Row:
    """Time of :func:`looped_projection` on one core."""
    times = []
    for _ in range(sizes.loops):
        begin = time.perf_counter()
        looped_projection(PRESETS[LAMP])
        times.append(1e3 * (time.perf_counter() - begin))
    return {**spread(times), "repeats": sizes.loops}


# ---------------------------------------------------------------- steps


def settings_of(task: str, way: Way, sizes: Sizes) -> FaceDNeRFConfig:
    """Of a whole run."""
    fixed = [f"codes.steps={CODES_STEPS}", f"tune.steps={TUNE_STEPS}", f"render.resolution={sizes.rendering}"]
    return load_config(FaceDNeRFConfig, [resolve_curriculum("facednerf", TASKS[task])], [*fixed, *way.settings])


def make_course(
    model: Model, networks: Networks, config: FaceDNeRFConfig, way: Way, control: Control | None = None
) -> Course:
    """At its beginning; the photo is judged here."""
    kind = PlainCourse if way.plain else FoldedCourse if way.folded else Course
    return kind(model, make_target(model, config), config, networks, light_goal(LAMP, config), control)


def prepare_text(networks: Networks, config: FaceDNeRFConfig, way: Way) -> None:
    """The networks of the text as a way has them."""
    text: Any = networks.text
    for part in (text.unet, text.vae):
        part.to(memory_format=torch.channels_last if way.diffusion_last else torch.contiguous_format)
    if config.memory.recompute:
        recompute_encoder(text.vae)
    else:
        text.vae.disable_gradient_checkpointing()


def first_picture(
    model: Model, networks: Networks, config: FaceDNeRFConfig, way: Way, device: torch.device
) -> tuple[float, dict[str, float]]:
    """Seconds from loaded networks to a picture on the CPU, and the losses of that step."""

    class Enough(Exception):
        pass

    seen: dict[str, float] = {}

    def look(step: Step) -> None:
        assert step.front is not None
        step.front.cpu()
        seen.update({name: float(value[0]) for name, value in step.parts.items()})
        raise Enough

    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    course = make_course(model, networks, config, way, Control(on_step=look))
    try:
        with course.switches():
            course.find()
    except Enough:
        pass
    return time.perf_counter() - begin, seen


def waits(work: Callable[[], Any], device: torch.device) -> dict[str, int] | None:
    """How often each line made the CPU wait for the GPU in one call; None on a CPU."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = [f"{Path(w.filename).name}:{w.lineno}" for w in told if "synchroniz" in str(w.message)]
    return dict(collections.Counter(lines))


def steps_of(stage: Any, sizes: Sizes, device: torch.device) -> Row:
    """Time, memory and waits of a stage's steps after the first ones, whose memory stands apart."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(sizes.warmup):
        stage.advance()
    first = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    row = timed(stage.advance, device, sizes.repeats, 0)
    graphs = stage.graphs
    if graphs is not None and graphs.played:
        row["memory_gib"] = row["reserved_gib"]
    waiting = waits(stage.advance, device)
    return {**row, "first_steps_gib": first, "waits": waiting, "played": 0 if graphs is None else graphs.played}


def bench_run(
    model: Model, networks: Networks, task: str, way: Way, sizes: Sizes, device: torch.device, loop: float | None
) -> Row:
    """Both stages of one task; ``loop``: milliseconds of the original's projection of the light."""
    config = settings_of(task, way, sizes)
    prepare_text(networks, config, way)
    seconds, losses = first_picture(model, networks, config, way, device)
    said: list[str] = []
    course = make_course(model, networks, config, way, Control(say=said.append))
    row: Row = {"first_picture_seconds": seconds, "losses": losses, "said": said}
    with course.switches():
        inversion = course.inversion()
        row["codes"] = steps_of(inversion, sizes, device)
        found = one_of(inversion.present(), 0)
        del inversion
        tuning = course.tuning(found, 0)
        row["tune"] = steps_of(tuning, sizes, device)
    codes, tune = (row[stage]["milliseconds"] for stage in ("codes", "tune"))
    row["minutes"] = (CODES_STEPS * codes + TUNE_STEPS * tune) / 60_000
    if way.plain and loop is not None:
        row["minutes_with_loop"] = row["minutes"] + (CODES_STEPS + TUNE_STEPS) * loop / 60_000
    if device.type == "cuda":
        row["memory_gib"] = max(row[stage]["memory_gib"] for stage in ("codes", "tune"))
    return row


def about(model: Model, networks: Networks, sizes: Sizes) -> Row:
    """What every row is of."""
    config = settings_of("edit", WAYS["tf32"], sizes)
    settings = model.settings(config)
    size = {name: sum(p.numel() for p in part.parameters()) for name, part in parts_of(model, networks).items()}
    return {
        "picture": model.picture_side(settings),
        "rays": settings.resolution**2,
        "samples": [settings.samples_coarse, settings.samples_fine],
        "weights_millions": {name: count / 1e6 for name, count in size.items()},
        "losses_of_edit": sorted(
            {**make_terms(model, make_target(model, config).to(model.device), config, networks,
                          light_goal(LAMP, config)), **noise_weight(config)}
        ),
        "steps": [CODES_STEPS, TUNE_STEPS],
    }  # fmt: skip


def parts_of(model: Model, networks: Networks) -> dict[str, nn.Module]:
    """All networks by name."""
    text: Any = networks.text
    named: dict[str, Any] = {"generator": model.generator, "lpips": networks.perceptual, "arcface": networks.identity}
    return {**named, "dpr": networks.light, "denoiser": text.unet, "encoder": text.vae}


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--tasks", help=f"comma-separated, of {', '.join(TASKS)}")
    parser.add_argument("--ways", help=f"comma-separated, of {', '.join(WAYS)} [{','.join(USUAL)}]")
    parser.add_argument("--repeats", type=int, help=f"counted steps of a stage [{Sizes.repeats}]")
    parser.add_argument("--tiny", action="store_true", help="tiny networks on the CPU, to test this program")
    options = parser.parse_args(arguments)
    tasks = chosen(options.tasks, list(TASKS), list(TASKS), parser)
    ways = chosen(options.ways, list(WAYS), USUAL, parser)
    if not options.tiny and not torch.cuda.is_available():
        print("bench_facednerf: no CUDA GPU, nothing to measure; --tiny tests the program on the CPU")
        return 0
    device = torch.device("cpu" if options.tiny else "cuda")
    sizes = TINY if options.tiny else Sizes()
    sizes = replace(sizes, repeats=options.repeats) if options.repeats else sizes
    report = Report(options.out, {"benchmark": "facednerf", "tiny": options.tiny, **versions(device)})
    model, networks = make_model(sizes, device), make_networks(sizes, device)
    report.about["about"] = about(model, networks, sizes)
    loop: list[float] = []

    def projection() -> Row:
        row = loop_milliseconds(sizes)
        loop.append(row["milliseconds"])
        return row

    report.attempt({"case": "projection", "cells": REFERENCE_GRID**2}, projection)
    for number, (task, name) in enumerate((task, name) for task in tasks for name in ways):
        way, case = WAYS[name], {"case": "run", "task": task, "way": name, "cold": number == 0}
        work = functools.partial(bench_run, model, networks, task, way, sizes, device, loop[0] if loop else None)
        report.attempt({**case, "settings": list(way.settings)}, work)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
