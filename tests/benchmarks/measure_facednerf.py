# SPDX-License-Identifier: Apache-2.0
"""FaceDNeRF on synthetic heads, whose truth is known:

    python tests/benchmarks/measure_facednerf.py MODEL [--heads 4] [--sheets FOLDER] [--out FILE]

- inversion: held-out heads by each preset; from the photo's camera and from five others, against the true head there;
- relighting: the same heads under six lights, against the true head under that light, over the five cameras. The light in
  a picture is read by a fit to brightness and true normals, and by DPR where its file is given. The same of what was
  inverted without a light (``before``) and of the true pictures (``truth``) says what that means. What is optimised is
  DPR's light, or with ``--judges reader`` that of a regression fitted on synthetic heads, which needs no file;
- text: whether the gradient of a diffusion model of random weights reaches the codes. Nothing is said of meaning.

Every number comes with its count; a run with few ``--steps`` says so in ``about``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import measuring
import torch
from known_faces import LIGHTS, KnownFaces, Views, fitted_reader, known_light, light_figures
from torch import Tensor

import facelab
from facelab import assets
from facelab.api import FaceModel
from facelab.cameras import Camera
from facelab.cli.common import OneLineCommand, friendly, pick_device
from facelab.cli.facednerf_nets import ARCFACE, AUTO, RANDOM, load_light_judge
from facelab.cli.facednerf_results import ball
from facelab.cli.pictures import VIEW_YAWS
from facelab.config import load_config, resolve_curriculum
from facelab.draws import Draws
from facelab.errors import UserError, nearest
from facelab.generator import Codes
from facelab.inference import pictures as pic
from facelab.inversion.measure import psnr, ssim
from facelab.inversion.perceptual_files import load_perceptual
from facelab.inversion.problem import Target
from facelab.lighting import to_dpr
from facelab.losses.lighting import LightNet, light_in
from facelab.losses.perceptual import perceptual_distance
from facelab.methods.facednerf import editing
from facelab.methods.facednerf.config import FaceDNeRFConfig
from facelab.methods.facednerf.course import Course
from facelab.methods.facednerf.editing import Control, Edited, Model, Networks, Step
from facelab.rendering.settings import RenderSettings

PARTS = ("inversion", "relighting", "text")
PRESETS = ("project_w", "project_w_plus", "pti")
DPR = "dpr"  # its entry of networks/manifest.yaml
JUDGES = (DPR, "reader")
PROMPT = "a person with glasses"
KEPT_LOSSES = 50  # of a stage
TEXT_WEIGHT = 1.0  # Adam's steps do not depend on it
Cells = list[
    tuple[str, Tensor, Tensor]
]  # of one head: name, what was found, from the front or all around, and beside it


@dataclass(frozen=True)
class Study:
    """What all measurements share.

    Attributes:
        model: under measurement.
        faces: held-out heads; indices: which of them.
        networks: judges; ``light`` and ``identity`` may be None.
        fan: five cameras from left to right.
        settings: changes of every preset, ``KEY=VALUE``.
        final: settings of the pictures that are measured.
        steps, tune_steps: in place of the presets' own, None: those.
        judges: of the light, by name.
        report: takes the rows.
        sheets: folder of pictures, or None.
    """

    model: Model
    faces: KnownFaces
    indices: tuple[int, ...]
    networks: Networks
    fan: Camera
    settings: tuple[str, ...]
    final: RenderSettings
    steps: int | None
    tune_steps: int | None
    judges: dict[str, LightNet]
    report: measuring.Report
    sheets: Path | None

    def config(self, preset: str, *changes: str) -> FaceDNeRFConfig:
        """A preset with the changes; a loss whose network is missing has no weight."""
        path = resolve_curriculum("facednerf", preset)
        config = load_config(FaceDNeRFConfig, [path], [*self.settings, *changes])
        more = [] if self.steps is None else [f"codes.steps={self.steps}"]
        if self.tune_steps is not None and config.tune.steps:
            more.append(f"tune.steps={self.tune_steps}")
        if self.networks.identity is None:
            more.append("weights.identity=0")
        return load_config(FaceDNeRFConfig, [path], [*self.settings, *changes, *more])

    def target(self) -> Target:
        """The photos of all heads."""
        made = [self.faces.target(i) for i in self.indices]
        return Target(torch.cat([t.picture for t in made]), Camera.cat([t.camera for t in made]))

    @torch.no_grad()
    def render(self, generator: Any, codes: Codes, camera: Camera) -> Tensor:
        """(N, 3, S, S) on the CPU, in [-1, 1]: one head from N cameras as inference renders it."""
        scene, settings = generator.scene(codes), self.final
        seen = [
            generator.render(scene, camera[i].to(self.model.device), settings, Draws(0)) for i in range(len(camera))
        ]
        return torch.cat([one.rgb for one in seen]).clamp(-1, 1).float().cpu()

    def identity(self, first: Tensor, second: Tensor) -> float | None:
        """Mean cosine of ArcFace's vectors, None without its file."""
        net = self.networks.identity
        if net is None:
            return None
        with torch.no_grad():
            a, b = (net(p.to(self.model.device)).float() for p in (first, second))
        return float(torch.nn.functional.cosine_similarity(a, b).mean())

    def keep(self, name: str, shown: Sequence[Cells], draw: Callable[[int, Cells], Tensor]) -> None:
        """Write the sheets as far as they are."""
        if self.sheets is not None:
            self.sheets.mkdir(parents=True, exist_ok=True)
            for index, cells in zip(self.indices, shown, strict=True):
                pic.save_png(self.sheets / f"{name}_{index:03d}.png", draw(index, cells))


@contextmanager
def taken(device: torch.device) -> Iterator[dict[str, Any]]:
    """Fills in seconds and the peak of memory: of the GPU, or of the whole process on a CPU."""
    found: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    yield found
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    found["seconds"] = time.perf_counter() - begin
    if device.type == "cuda":
        found |= {"gigabytes": torch.cuda.max_memory_allocated(device) / 2**30, "gigabytes_of": "GPU"}
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found |= {"gigabytes": peak, "gigabytes_of": "process so far"}


# ---------------------------------------------------------------- inversion


def closeness(study: Study, found: Tensor, true: Tensor) -> dict[str, Any]:
    """Means over N pictures of one head."""
    net = study.networks.perceptual
    assert net is not None
    with torch.no_grad():
        apart = perceptual_distance(net, found.to(study.model.device), true.to(study.model.device))
    same = study.identity(found, true)
    return {
        "psnr": float(psnr(found, true).mean()),
        "ssim": float(ssim(found, true).mean()),
        net.metric: float(apart.mean()),
        **({} if same is None else {"identity_cosine": same}),
    }


def compared(study: Study, front: Tensor, fan: Tensor, index: int) -> dict[str, Any]:
    """A head from the photo's camera and from the five others, against the truth."""
    target, true = study.faces.target(index), study.faces.views(index, study.fan)
    return {
        "photo": closeness(study, front, target.picture),
        "others": closeness(study, fan, true.picture),
        "others_psnr": dict(zip(map(str, VIEW_YAWS), psnr(fan, true.picture).tolist(), strict=True)),
    }


def pooled(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over heads, name by name."""
    return {
        name: pooled([row[name] for row in rows]) if isinstance(value, dict) else fmean(row[name] for row in rows)
        for name, value in rows[0].items()
    }


def seen(study: Study, edited: Edited, target: Target) -> Iterator[tuple[Tensor, Tensor]]:
    """Front and fan of each head that was found."""
    for row, generator in enumerate(edited.generators):
        codes, camera = edited.codes[[row]], target.camera[row]
        yield study.render(generator, codes, camera), study.render(generator, codes, study.fan)


def inversion(study: Study, presets: Sequence[str]) -> None:
    """One row for each preset, and one for the average head."""
    target = study.target()
    shown: list[Cells] = [[] for _ in study.indices]

    def note(name: str, pictures: Sequence[tuple[Tensor, Tensor]], about: dict[str, Any]) -> None:
        heads = [compared(study, *pair, index) for pair, index in zip(pictures, study.indices, strict=True)]
        for cells, pair in zip(shown, pictures, strict=True):
            cells.append((name, *pair))
        each = [{"head": index, **head} for index, head in zip(study.indices, heads, strict=True)]
        study.keep("inverted", shown, functools.partial(inversion_sheet, study))
        study.report.add(
            {"part": "inversion", "by": name, "heads": len(heads), **pooled(heads), **about, "of_heads": each}
        )

    config = study.config(presets[0])
    average = Course(study.model, target, config, study.networks).statistics.average.to(study.model.device)
    generator = study.model.copy()
    pairs = [
        tuple(study.render(generator, average, c) for c in (target.camera[row], study.fan))
        for row in range(len(target))
    ]
    note("average head", pairs, {})  # type: ignore[arg-type]
    for preset in presets:
        config = study.config(preset)
        with taken(study.model.device) as cost:
            edited = editing.project(study.model, target, config, study.networks)
        note(preset, list(seen(study, edited, target)), {"steps": edited.steps, **cost})


# ---------------------------------------------------------------- light


def by_dpr(study: Study, pictures: Tensor, light: Tensor) -> dict[str, float]:
    """The light that DPR sees against that which each camera of the fan should see; empty without its file."""
    net = study.networks.light
    if net is None:
        return {}
    with torch.no_grad():
        found = light_in(net, pictures.to(study.model.device)).cpu()
    error = found - to_dpr(light[None].expand(len(pictures), -1), study.fan.to("cpu"))
    return {"dpr_error": float(error.abs().mean()), "dpr_distance": float(error.square().sum(1).mean())}


def light_of(study: Study, pictures: Tensor, truth: Views, light: Tensor) -> dict[str, float]:
    """Everything that is said of the light in five pictures."""
    return {
        **light_figures(pictures, truth, light),
        **by_dpr(study, pictures, light),
        "psnr_to_truth": float(psnr(pictures, truth.picture).mean()),
    }


def relighting(study: Study, lights: Sequence[str]) -> None:
    """One row for each light."""
    target = study.target()
    config = study.config("relight")
    plain = editing.project(study.model, target, config, study.networks)
    before = [fan for _, fan in seen(study, plain, target)]
    shown: list[Cells] = [
        [("before", fan, study.faces.views(index, study.fan).picture)]
        for fan, index in zip(before, study.indices, strict=True)
    ]
    for judge, name in itertools.product(study.judges, lights):
        light, networks = known_light(name), dataclasses.replace(study.networks, light=study.judges[judge])
        truths = [study.faces.views(index, study.fan, light) for index in study.indices]
        with taken(study.model.device) as cost:
            edited = editing.relight(study.model, target, config, networks, light)
        rows = []
        for k, (front, fan) in enumerate(seen(study, edited, target)):
            kept = closeness(study, front, target.picture[k : k + 1])
            figures = {
                what: light_of(study, pictures, truths[k], light)
                for what, pictures in (("after", fan), ("before", before[k]), ("truth", truths[k].picture))
            }
            figures["truth"].pop("psnr_to_truth")  # of a picture to itself
            same = study.identity(fan, before[k])
            rows.append({**figures, "photo": kept, **({} if same is None else {"identity": same})})
            shown[k].append((f"{name}, {judge}", fan, truths[k].picture))
        each = [{"head": index, **row} for index, row in zip(study.indices, rows, strict=True)]
        study.keep("relit", shown, light_sheet)
        study.report.add(
            {
                "part": "relighting", "judge": judge, "light": name, "heads": len(rows), "views": len(study.fan), **pooled(rows),
                "steps": edited.steps, **cost, "of_heads": each,
            }
        )  # fmt: skip


# ---------------------------------------------------------------- text


def text(study: Study) -> None:
    """Codes are moved by nothing but the text: how far, and what the side view becomes."""
    from facelab.losses.score_distillation import ScoreDistillation
    from facelab.nn.pretrained import random_diffusion

    device = study.model.device
    config = study.config(
        "generate", f"weights.text={TEXT_WEIGHT}", "weights.noise=0", "codes.noise_maps=false", "codes.perturbation=0"
    )
    parts, embeddings = (
        random_diffusion.tiny_diffusion(device=device),
        random_diffusion.tiny_embeddings(PROMPT).to(device),
    )
    judge = ScoreDistillation(parts.unet, parts.vae, parts.scheduler, embeddings, config.guide())
    losses: list[tuple[str, float]] = []

    def watch(step: Step) -> None:
        losses.append((step.stage, float(step.total.mean())))

    networks = Networks(text=judge)
    control = Control(on_step=watch)
    with taken(device) as cost:
        made = editing.generate(study.model, config, networks, control=control, random_start=False)
    course = Course(study.model, study.target()[0], study.config(PRESETS[0]), study.networks)
    start, camera = course.statistics.average.to(device), study.model.camera(config)
    moved = (made.codes.values["w"].to(device) - start.values["w"]).float().square().sum(-1).mean().sqrt()
    pictures = [
        study.render(generator, codes, camera)
        for generator, codes in ((study.model.copy(), start), (study.model.copy(), made.codes), (made.generators[0], made.codes))
    ]  # fmt: skip
    row = {
        "part": "text",
        "diffusion": parts.source,
        "codes_moved": float(moved),
        "codes_moved_deviations": float(moved) / course.statistics.deviation["w"],
        "picture_moved_by_codes": float((pictures[1] - pictures[0]).abs().mean()),
        "picture_moved_by_tuning": float((pictures[2] - pictures[1]).abs().mean()),
        "losses": thinned(losses),
    }
    study.report.add({**row, "steps": made.steps, **cost})


def thinned(losses: Sequence[tuple[str, float]]) -> dict[str, dict[str, list[Any]]]:
    """(stage, loss) of every step -> for each stage at most :data:`KEPT_LOSSES` evenly spaced ones, the ends among them.

    >>> thinned([("codes", 3.0), ("codes", 2.0), ("tune", 1.0)])["codes"]
    {'steps': [0, 1], 'values': [3.0, 2.0]}
    """
    found: dict[str, dict[str, list[Any]]] = {}
    for stage in dict.fromkeys(stage for stage, _ in losses):
        values = [value for of, value in losses if of == stage]
        parts = min(KEPT_LOSSES, len(values)) - 1
        steps = [round(k * (len(values) - 1) / parts) for k in range(parts + 1)] if parts else [0]
        found[stage] = {"steps": steps, "values": [values[step] for step in steps]}
    return found


# ---------------------------------------------------------------- sheets


def inversion_sheet(study: Study, index: int, cells: Cells) -> Tensor:
    """The photo's camera in front, then the fan: the truth above, what each preset found below."""
    true = study.faces.views(index, study.fan).picture
    rows = [("truth", study.faces.target(index).picture, true), *cells]
    names = [f"{yaw:+.2f} rad" for yaw in VIEW_YAWS]
    pictures = torch.cat([torch.cat([front, fan]) for _, front, fan in rows])
    captions = [caption for name, _, _ in rows for caption in (name, *names)]
    return pic.contact_sheet(pic.to_uint8(pictures), captions, 1 + len(names), f"head {index}: inverted")


def light_sheet(index: int, cells: Cells) -> Tensor:
    """For each light a ball under it, then left, front, right: what came out beside the true head under that light."""
    chosen = (0, len(VIEW_YAWS) // 2, len(VIEW_YAWS) - 1)
    pictures, captions = [], []
    for name, fan, true in cells:
        side = fan.shape[-1]
        white = torch.ones(1, 3, side, side)
        pictures += [white if name == "before" else ball(known_light(name.partition(",")[0]), side)]
        captions += ["own light" if name == "before" else name]
        for k in chosen:
            pictures += [fan[k : k + 1], true[k : k + 1]]
            captions += [f"{VIEW_YAWS[k]:+.2f} rad", "truth"]
    return pic.contact_sheet(pic.to_uint8(torch.cat(pictures)), captions, 1 + 2 * len(chosen), f"head {index}: relit")


# ---------------------------------------------------------------- command


def _judges(perceptual: str, identity: Path | None, dpr: str, side: int, norm: Any, device: Any) -> Networks:
    from facelab.metrics.features import read_tensor_file
    from facelab.nn.pretrained.arcface import FaceIdentity, arcface_from_published

    path = identity or assets.locate(ARCFACE)
    person = None if path is None else FaceIdentity(arcface_from_published(read_tensor_file(path), path)).to(device)
    light = None
    if dpr != AUTO or assets.locate(DPR) is not None:
        light, _ = load_light_judge(dpr, norm, device)
        light.side = side if dpr != RANDOM else light.side
    return Networks(perceptual=load_perceptual(perceptual).to(device), identity=person, light=light)  # type: ignore[arg-type]


def _chosen(given: str, known: Sequence[str], what: str) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"unknown {what} {name!r}, expected some of {', '.join(known)}.{nearest(name, known)}")
    if not names:
        raise UserError(f"no {what} chosen, expected some of {', '.join(known)}")
    return names


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("measure_facednerf", cls=OneLineCommand)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--parts", default=",".join(PARTS), show_default=True, help="What is measured.")
@click.option("--heads", type=click.IntRange(1), default=4, show_default=True, help="Held-out heads, all side by side.")
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="Number of the first head.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the set of heads.")
@click.option("--presets", default=",".join(PRESETS), show_default=True, help="Of the inversion.")
@click.option("--lights", default=",".join(LIGHTS), show_default=True, help="Of the relighting.")
@click.option("--judges", default=DPR, show_default=True, help=f"Of the light while relighting: {', '.join(JUDGES)}.")
@click.option("--steps", type=click.IntRange(1), help="Of the codes. [default: each preset's]")
@click.option(
    "--tune-steps", type=click.IntRange(0), help="Of the generator, where it is tuned. [default: the preset's]"
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A change of every preset.")
@click.option("--perceptual", default="auto", show_default=True, help="LPIPS file, auto or random.")
@click.option("--identity", type=FILE, help="ArcFace weights (model_ir_se50.pth). [default: where weight files lie]")
@click.option("--dpr", default=AUTO, help="trained_model_03.t7, or random: nothing is meant. [default: as above]")
@click.option("--dpr-side", type=click.IntRange(64), default=512, show_default=True, help="Pixels that DPR sees.")
@click.option("--dpr-norm", type=click.Choice(["running", "picture"]), default="running", show_default=True)
@click.option("--sheets", type=click.Path(file_okay=False, path_type=Path), help="Folder of a picture or two per head.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON file.")
@friendly
def main(
    model: Path, parts: str, heads: int, first: int, seed: int, presets: str, lights: str, judges: str, settings: tuple[str, ...],
    perceptual: str, identity: Path | None, dpr: str, dpr_side: int, dpr_norm: str, threads: int, device: str,
    out: Path | None, sheets: Path | None, steps: int | None, tune_steps: int | None,
) -> None:  # fmt: skip
    """Measure, print, keep."""
    wanted, known = _chosen(parts, PARTS, "part"), _chosen(presets, PRESETS, "preset")
    names, by = _chosen(lights, tuple(LIGHTS), "light"), _chosen(judges, JUDGES, "judge")
    torch.set_num_threads(threads)
    face: FaceModel = facelab.load(model, pick_device(device))
    made = Model.of(face)
    networks = _judges(perceptual, identity, dpr, dpr_side, dpr_norm, face.device)
    if "relighting" in wanted and DPR in by and networks.light is None:
        raise UserError("relighting by dpr needs --dpr FILE (trained_model_03.t7); --judges reader does without")
    size = made.picture_side(made.settings(FaceDNeRFConfig()))
    faces = KnownFaces(face, seed, size)
    indices = tuple(range(first, first + heads))
    assert networks.perceptual is not None
    about = {
        "benchmark": "facednerf", "model": model.name, "images": face.meta.get("images"), "pixels": size,
        "heads": list(indices), "heads_seed": faces.seed, "fan_yaws": VIEW_YAWS, "steps": steps, "tune_steps": tune_steps,
        "settings": list(settings), "perceptual": getattr(networks.perceptual, "name", None),
        "identity": networks.identity is not None,
        "dpr": networks.light and [Path(dpr).name, dpr_norm, getattr(networks.light, "side", None)],
        "threads": threads, **measuring.versions(face.device),
    }  # fmt: skip
    fan = Camera.cat([face.camera(yaw=yaw) for yaw in VIEW_YAWS]).to("cpu")
    report = measuring.Report(out, about)
    lit_by: dict[str, LightNet] = {DPR: networks.light} if DPR in by and networks.light is not None else {}
    if "relighting" in wanted and "reader" in by:
        reader, told = fitted_reader(faces)
        lit_by["reader"] = reader.to(face.device)
        report.add({"part": "reader", **told})
    study = Study(
        made, faces, indices, networks, fan, settings, face.settings(), steps, tune_steps, lit_by, report, sheets
    )
    if "inversion" in wanted:
        inversion(study, known)
    if "relighting" in wanted:
        relighting(study, names)
    if "text" in wanted:
        text(study)


if __name__ == "__main__":
    main()
