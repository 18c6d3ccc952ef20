# SPDX-License-Identifier: Apache-2.0
"""What invert_eg3d and FaceDNeRF's commands write into the folder of a head."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.api import FaceModel
from facelab.cameras import Camera
from facelab.cli import pictures
from facelab.cli.facednerf_run import FRONT, Found, Job, Run
from facelab.files import atomic_path
from facelab.generator import Codes
from facelab.inference import pictures as pic
from facelab.inference.latent_files import save_codes
from facelab.inference.sessions import save_noise
from facelab.inversion import session as files
from facelab.inversion.measure import measure
from facelab.inversion.problem import Target
from facelab.lighting import main_direction, shade, sphere_picture

ORIGINAL_LATENT, VIEWS, SHEET, VIDEO = "latent.npy", "views.png", "sheet.png", "video.mp4"
VIDEO_PATH, FPS = "eg3d", 30.0  # of the original's videos
CELL = 256  # pixels of a picture of the sheet at most


@dataclass(frozen=True)
class Head:
    """What was found for one photo, ready to be rendered.

    Attributes:
        face: the model with that head's generator.
        codes: (1, ...).
        camera: the photo's, or the one in front.
        front: (1, 3, S, S) from there, in about [-1, 1].
    """

    face: FaceModel
    codes: Codes
    camera: Camera
    front: Tensor


def head_of(run: Run, found: Found, job: Job) -> Head:
    """One head of a group."""
    edited, row = found.edited, found.row
    face = run.face
    made = FaceModel(face._method, edited.generators[row], face.config, {**face.meta, "tuned_to": job.name}, face.path)
    return Head(made, edited.codes[row], edited.camera[row], edited.front.rgb[row : row + 1])


@torch.no_grad()
def write_result(run: Run, job: Job, found: Found, compared: Tensor | None = None) -> None:
    """Codes, generator, pictures, numbers, video of one head.

    Args:
        compared: (1, 3, S, S) a reconstruction of the same photo for the sheet.
    """
    session, edited, row = job.session, found.edited, found.row
    head = head_of(run, found, job)
    save_codes(session / files.LATENTS, head.codes, run.face.method)
    with atomic_path(session / ORIGINAL_LATENT) as temporary, temporary.open("wb") as file:
        np.save(file, head.codes.values["w"].float().cpu().numpy())
    if edited.noise:
        save_noise(session.folder, {name: value[row : row + 1] for name, value in edited.noise.items()})
    if edited.noise or run.config.tune.steps:
        head.face.generator.requires_grad_(False)
        head.face.save(session / files.GENERATOR)
    pic.save_png(session / FRONT, pic.to_uint8(head.front)[0])
    fan = fan_of(head)
    pic.save_png(session / VIEWS, pic.image_grid(pic.to_uint8(fan).cpu(), len(fan)))
    light = None if run.light is None else ball(run.light, head.front.shape[-1])
    title = run.task.get("prompt")
    pic.save_png(session / SHEET, sheet(head, job.target, fan, compared, light, title))
    if run.outputs.video_frames:
        write_video(head, session / VIDEO, run.outputs.video_frames, run.outputs.progress)
    session.save_json(files.METRICS, {"photo": job.name, **numbers(run, job, head, found, fan)})  # says: done
    job.finish()


def fan_cameras(face: FaceModel) -> Camera:
    """Five views from left to right."""
    return Camera.cat([face.camera(yaw=yaw) for yaw in pictures.VIEW_YAWS])


def fan_of(head: Head) -> Tensor:
    """(5, 3, S, S) pictures of :func:`fan_cameras`, in about [-1, 1]."""
    face, cameras = head.face, fan_cameras(head.face)
    scene = face.scene(head.codes)
    return torch.cat([face.render(scene, cameras[i]).rgb for i in range(len(cameras))])


def ball(light: Tensor, side: int) -> Tensor:
    """(9,) world light -> (1, 3, side, side) a ball under it, from the front; no brighter than white where it peaks."""
    peak = float(shade(main_direction(light[None])[:, None], light[None]))
    return sphere_picture(light[None] / max(1.0, peak), side) * 2 - 1


def sheet(
    head: Head,
    target: Target | None,
    fan: Tensor,
    compared: Tensor | None = None,
    light: Tensor | None = None,
    title: str | None = None,
) -> Tensor:
    """Input, reconstruction, result, how far it is from the input, a ball under the wanted light; below, five views.

    Args:
        head: what was found.
        target, compared, light: (1, 3, S, S) in [-1, 1], left out where None.
        fan: (5, 3, S, S), see :func:`fan_of`.
        title: above all.
    """
    cells, captions = [], []

    def add(picture: Tensor, caption: str) -> None:
        cells.append(picture)
        captions.append(caption)

    if target is not None:
        wanted = target.picture.to(head.front.device)
        add(wanted, "input")
        if compared is not None:
            add(compared.to(wanted), "reconstruction")
        add(head.front, "result")
        add((head.front.clamp(-1, 1) - wanted).abs() * 2 - 1, "difference")
    else:
        add(head.front, "front")
    if light is not None:
        add(light.to(head.front), "wanted light")
    while len(cells) < len(fan):
        add(torch.ones_like(head.front), "")
    for picture, yaw in zip(fan, pictures.VIEW_YAWS, strict=True):
        add(picture[None], f"{yaw:+.2f} rad")
    shown = torch.cat(cells)
    if shown.shape[-1] > CELL:
        shown = F.interpolate(shown, (CELL, CELL), mode="bilinear", antialias=True)
    return pic.contact_sheet(pic.to_uint8(shown).cpu(), captions, len(fan), title)


def numbers(run: Run, job: Job, head: Head, found: Found, fan: Tensor) -> dict[str, Any]:
    """How near the head is to photo, prompt and light; what it took."""
    result: dict[str, Any] = {}
    networks = run.judges.networks
    if job.target is not None:
        rows = slice(found.row, found.row + 1)
        output = found.edited.front.map(lambda value: value[rows])
        target = job.target.to(head.front.device)
        result |= {name: float(value[0]) for name, value in measure(output, target, networks.perceptual).items()}
        if networks.identity is not None:
            pair = [F.normalize(networks.identity(p.clamp(-1, 1)).float(), dim=1) for p in (head.front, target.picture)]
            result["identity_cosine"] = float((pair[0] * pair[1]).sum())
    if networks.clip is not None:
        result["clip_cosine"] = [float(value) for value in 1 - networks.clip.loss(fan)]
    if networks.light is not None and run.light is not None:
        result["light_error"] = light_errors(run, fan, fan_cameras(head.face))
    losses = {name: float(value[found.row]) for name, value in found.edited.losses.items()}
    return {
        **result,
        "losses": losses,
        "judges": run.judges.names,
        "steps": [run.config.codes.steps, run.config.tune.steps],
        "seconds": round(found.seconds, 2),
        "seconds_are_of": {"heads": found.heads, "steps": found.edited.steps},
        "gpu_gigabytes": found.gigabytes,
        "camera": {"label": head.camera.label()[0].tolist()},
    }


def light_errors(run: Run, fan: Tensor, cameras: Camera) -> list[float]:
    """Mean absolute difference of the nine numbers that the judge sees from those wanted, for each view."""
    from facelab.lighting import to_dpr
    from facelab.losses.lighting import light_in

    assert run.light is not None and run.judges.networks.light is not None
    seen = light_in(run.judges.networks.light, fan.clamp(-1, 1))
    wanted = to_dpr(run.light[None].to(fan), cameras.to(fan))
    return [float(value) for value in (seen - wanted).abs().mean(1)]


def write_video(head: Head, path: Any, frames: int, show: bool = True) -> None:
    """The head along the camera path of EG3D's and FaceDNeRF's videos."""
    from facelab.cli import films
    from facelab.inference.video import open_video

    face = head.face
    path_of = films.camera_path(VIDEO_PATH, frames, face.view.fov)
    film = films.Film([[head.codes]], 1, "non", path_of, None)
    with open_video(path, FPS) as sink:
        films.render_film(face, film, face.settings(), ["image"], [sink], None, show=show)


def told(job: Job) -> str:
    """A line for a person."""
    try:
        found = json.loads((job.session / files.METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return str(job.session.folder)
    parts = [
        text.format(found[key])
        for key, text in (
            ("psnr", "PSNR {:.2f} dB"),
            ("lpips_vgg", "LPIPS {:.4f}"),
            ("perceptual_random", "perceptual_random {:.4f}"),
            ("identity_cosine", "identity {:.3f}"),
        )
        if key in found
    ]
    for key, name in (("light_error", "light error"), ("clip_cosine", "CLIP")):
        if key in found:
            parts.append(f"{name} {sum(found[key]) / len(found[key]):.3f}")
    return f"{job.session.folder}: {', '.join([*parts, '{:.0f} s'.format(found['seconds'])])}"
