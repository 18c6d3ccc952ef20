# SPDX-License-Identifier: Apache-2.0
"""What invert_cnerf writes into the folder of a photo."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from facelab.data.regions import REGION_PALETTE, colour_regions
from facelab.generator import GeneratorOutput
from facelab.inference import pictures as pic
from facelab.inference.latent_files import save_codes
from facelab.inference.sessions import save_noise
from facelab.inversion import session as files
from facelab.inversion.loop import Solution
from facelab.inversion.measure import measure
from facelab.inversion.problem import Problem, Target
from facelab.inversion.session import Session

if TYPE_CHECKING:
    from facelab.cli.invert_run import Job, Run

VIEWS, REACH = 5, 1.5  # pictures of views.png, and how far they go in the model's azimuths


@torch.no_grad()
def write_result(run: Run, job: Job, found: Solution, problem: Problem, prefix: str = "") -> None:
    """Codes, pictures and numbers of one photo; with ``prefix`` those of a tuned generator."""
    session, face = job.session, run.face
    generator: Any = problem.generator
    scene = generator.scene(found.codes, found.noise or None)
    output = generator.render(scene, found.camera, run.settings)
    target = job.target.to(face.device)
    start = f"{prefix}_" if prefix else ""
    pic.save_png(session / f"{start}reconstruction.png", pic.to_uint8(output.rgb)[0])
    if output.semantics is not None and output.semantics.shape[1] <= len(REGION_PALETTE):
        pic.save_label_png(session / f"{start}segmentation.png", output.semantics[0].argmax(0), REGION_PALETTE)
    row = face.config.camera.prior().row(VIEWS, REACH, 0.0).to(face.device)
    seen = GeneratorOutput.cat([generator.render(scene, row[i], run.settings) for i in range(len(row))])
    pic.save_png(session / f"{start}views.png", pic.image_grid(_rows(seen).cpu(), VIEWS))
    pic.save_png(session / f"{start}comparison.png", _comparison(target, output))
    numbers = {name: float(value[0]) for name, value in measure(output, target, run.net).items()}
    clock = problem.clock(0, 1, "")
    total, parts = problem.losses(problem.moment(found.codes, _offsets(run, found), found.noise, found.camera, clock))
    numbers |= {"loss": float(total[0]), "terms": {name: float(value[0]) for name, value in parts.items()}}
    if prefix:
        metrics = read_metrics(session)
        session.save_json(files.METRICS, {**metrics, prefix: numbers})
        return
    save_codes(session / files.LATENTS, found.codes, face.method)
    if found.noise:
        save_noise(session.folder, found.noise)
    session.save_json(files.METRICS, {"photo": job.name, **numbers, **_about(run, job, found)})


def _about(run: Run, job: Job, found: Solution) -> dict[str, Any]:
    view = torch.tensor([[job.view.azimuth, job.view.elevation]]) if found.view is None else found.view
    azimuth, elevation = (math.degrees(float(angle)) for angle in view[0])
    return {
        "perceptual_net": run.net.name,
        "steps": run.options["steps"],
        "mask": job.target.scores is not None,
        "camera": {
            "azimuth_degrees": azimuth,
            "elevation_degrees": elevation,
            "refined": found.view is not None,
            "label": found.camera.label()[0].tolist(),
        },
    }


def _offsets(run: Run, found: Solution) -> dict[str, Tensor]:
    return {name: value - run.statistics.average.values[name] for name, value in found.codes.values.items()}


def _rows(seen: GeneratorOutput) -> Tensor:
    """Views above their segmentation."""
    pictures = pic.to_uint8(seen.rgb)
    if seen.semantics is None or seen.semantics.shape[1] > len(REGION_PALETTE):
        return pictures
    return torch.cat([pictures, colour_regions(seen.semantics)])


def _comparison(target: Target, output: GeneratorOutput) -> Tensor:
    """Photo, reconstruction, and where they differ (black: equal); below, wanted and found segmentation."""
    difference = (output.rgb.clamp(-1, 1) - target.picture).abs()
    cells = [pic.to_uint8(target.picture), pic.to_uint8(output.rgb), pic.to_uint8(difference, 0, 1)]
    if output.semantics is not None and target.scores is not None and target.labels is not None:
        found, palette = output.semantics.argmax(1), REGION_PALETTE
        wrong = (found != target.labels).to(torch.uint8)[:, None].expand(-1, 3, -1, -1) * 255
        cells += [pic.labels_to_rgb(target.labels, palette), pic.labels_to_rgb(found, palette), wrong]
    return pic.image_grid(torch.cat([cell.cpu() for cell in cells]), 3)


def read_metrics(session: Session) -> dict[str, Any]:
    try:
        return dict(json.loads((session / files.METRICS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def told(job: Job) -> str:
    """A line for a person."""
    metrics = read_metrics(job.session)
    parts = []
    for title, numbers in (("", metrics), ("tuned ", metrics.get("tuned") or {})):
        for key, text in (("psnr", "PSNR {:.2f} dB"), ("ssim", "SSIM {:.3f}"), ("miou", "mIoU {:.3f}")):
            if key in numbers:
                parts.append(title + text.format(numbers[key]))
        parts += [f"{title}{key} {numbers[key]:.4f}" for key in ("lpips_vgg", "perceptual_random") if key in numbers]
    return f"{job.session.folder}: {', '.join(parts)}"
