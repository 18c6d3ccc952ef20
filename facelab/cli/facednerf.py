# SPDX-License-Identifier: Apache-2.0
"""invert_eg3d, edit_facednerf, relight_facednerf and generate_facednerf: an EG3D model fitted to a photo, a prompt, a
light (FaceDNeRF, arXiv 2306.00783)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from facelab.cli.common import OneLineCommand, device_option, friendly, model_argument, parse_seeds
from facelab.cli.facednerf_options import (
    light_options,
    method_options,
    run_options,
    settings_of,
    source_options,
    text_options,
)
from facelab.cli.photo_input import PATH, PHOTO_SOURCES

if TYPE_CHECKING:
    from facelab.api import FaceModel
    from facelab.cli.facednerf_run import Run

# flags of the original's programs that are not here -> what to do
INSTEAD = {
    "--network": "MODEL is the first argument, without a flag",
    "--outdir": "--out",
    "--image_path": "photos follow MODEL, without a flag",
    "--c_path": "--camera",
    "--sample_mult": "--sample-factor",
    "--num_steps": "--steps",
    "--num_steps_pti": "--tune-steps",
    "--nrr": "--image-size",
    "--description": "--prompt of edit_facednerf and generate_facednerf",
    "--lamda_id": "--identity-weight",
    "--lamda_origin": "--reconstruction-weight",
    "--lamda_diffusion": "--text-weight of edit_facednerf and generate_facednerf",
    "--lamda_illumination": "--light-weight of edit_facednerf, relight_facednerf and generate_facednerf",
    "--latent_space_type": "--space",
}
LAMP_SIDE = 512  # pixels of the photo of --light-of
SLUG = 40  # letters of a prompt in the name of a folder
PHOTOS = click.argument("photos", nargs=-1, required=True, type=PATH)
START = click.option(
    "--start",
    type=PATH,
    default=None,
    help="Begin with these codes instead of the average: a file (.safetensors, .npy), the folder of a head, or a folder "
    "with one of these for each photo (NAME, NAME.npy ...).",
)
COMPARE = click.option(
    "--compare", is_flag=True, help="First the photo as it is, into reconstruction/; the sheet shows it, too."
)


@click.command("invert_eg3d", cls=OneLineCommand, instead=INSTEAD)
@model_argument
@PHOTOS
@source_options
@method_options(side=False)
@START
@run_options("inversions")
@device_option
@friendly
def invert_eg3d(model: Path, photos: tuple[Path, ...], **options: Any) -> None:
    """Find the codes of an EG3D model that give PHOTOS, and tune the model to each.

    Presets: project_w, project_w_plus (codes alone) and pti (then the generator, the default). Each photo gets a folder
    in --out: settings.yaml, target.png, latents.safetensors, latent.npy, generator.safetensors, sheet.png, metrics.json,
    video.mp4. Ctrl-C saves; the same command with --resume goes on.
    """
    _on_photos("invert_eg3d", model, photos, "pti", options)


@click.command("edit_facednerf", cls=OneLineCommand, instead=INSTEAD)
@model_argument
@PHOTOS
@click.option("--prompt", required=True, help="What the head should become: 'a man with short blue hair'.")
@source_options
@text_options
@light_options
@method_options(side=True)
@COMPARE
@START
@run_options("edits")
@device_option
@friendly
def edit_facednerf(model: Path, photos: tuple[Path, ...], **options: Any) -> None:
    """Change the heads of PHOTOS as a prompt says, and their light with --light.

    Each photo and prompt gets a folder in --out, with the files of invert_eg3d. Ctrl-C saves; the same command with
    --resume goes on.
    """
    lit = options["light"] is not None or options["light_of"] is not None
    _on_photos("edit_facednerf", model, photos, "edit_and_relight" if lit else "edit", options)


@click.command("relight_facednerf", cls=OneLineCommand, instead=INSTEAD)
@model_argument
@PHOTOS
@source_options
@light_options
@method_options(side=True)
@COMPARE
@START
@run_options("relit")
@device_option
@friendly
def relight_facednerf(model: Path, photos: tuple[Path, ...], **options: Any) -> None:
    """Put the heads of PHOTOS under another light: --light or --light-of.

    Each photo and light gets a folder in --out, with the files of invert_eg3d. Ctrl-C saves; the same command with
    --resume goes on.
    """
    from facelab.errors import UserError

    if options["light"] is None and options["light_of"] is None:
        raise UserError("no light: expected --light (right, left, below, top_right, a file ...) or --light-of PHOTO")
    _on_photos("relight_facednerf", model, photos, "relight", options)


@click.command("generate_facednerf", cls=OneLineCommand, instead=INSTEAD)
@model_argument
@click.option("--prompt", required=True, help="What the head should be: 'a smiling old man'.")
@click.option(
    "--seeds",
    default="0",
    show_default=True,
    callback=lambda _c, _p, value: parse_seeds(value),
    help="A head for each, for example 0,3,8-11.",
)
@click.option("--from-average", is_flag=True, help="Start from the average head instead of a random one.")
@text_options
@light_options
@method_options(side=True)
@run_options("generated", photos=False)
@device_option
@friendly
def generate_facednerf(model: Path, seeds: list[int], from_average: bool, **options: Any) -> None:
    """Make heads from a prompt (and a light) alone.

    Each seed gets a folder in --out, with the files of invert_eg3d. Ctrl-C saves; the same command with --resume goes
    on.
    """
    from facelab.cli import facednerf_run as runs
    from facelab.cli.facednerf_results import told, write_result

    resume, task = options.pop("resume"), {"from_average": from_average}
    names = [f"{slug(options)}-{seed}" for seed in seeds]
    runs.usable_sessions([options["out"] / name for name in names], resume)  # before anything large is read
    run = _prepare("generate_facednerf", model, "generate", options, task, _portrait_as_it_is)
    jobs = runs.open_seeds(run, seeds, names, resume)
    for job in jobs:
        if job.done:
            click.echo(f"{told(job)} (done before)")

    def finish(job: runs.Job, found: runs.Found) -> None:
        write_result(run, job, found)
        click.echo(told(job))

    runs.run_seeds(run, jobs, from_average, finish)


# ---------------------------------------------------------------- shared


def _on_photos(command: str, model: Path, given: Sequence[Path], preset: str, options: dict[str, Any]) -> None:
    """A command that takes photos, from its options to the last file."""
    from facelab.cli import facednerf_run as runs
    from facelab.cli.common import pick_device
    from facelab.cli.facednerf_results import told, write_result
    from facelab.cli.photo_input import lazy_cameras, lazy_detector, list_photos
    from facelab.cli.portraits import Portrait, PortraitChoices, camera_of, take_portrait

    photos = list_photos(given)
    camera = options.pop("camera")
    cameras = {photo: camera_of(camera, photo, photos) for photo in photos}
    sources = {name: options.pop(name) for name in PHOTO_SOURCES}
    aligned, face, force = (options.pop(name) for name in ("aligned", "face", "force"))
    batch, resume, compare = options.pop("batch"), options.pop("resume"), options.pop("compare", False)
    latents = {photo: start_of(options["start"], photo) for photo in photos}
    del options["start"]
    device = pick_device(options["device"])
    detector, estimator = lazy_detector(sources, device), lazy_cameras(sources, device)

    def take(photo: Path, choices: PortraitChoices) -> Portrait:
        taken = take_portrait(photo, choices, detector, cameras[photo], estimator)
        beside = camera is None and cameras[photo] is not None
        note = "note: its camera lies beside it, so it counts as a crop; --camera face finds both anew"
        return dataclasses.replace(taken, notes=(note, *taken.notes)) if beside else taken

    def lamp(path: Path) -> tuple[Any, Any]:
        seen_as = PortraitChoices(LAMP_SIDE, aligned=aligned, force=True)
        taken = take_portrait(path, seen_as, detector, camera_of(None, path, [path]), estimator)
        return taken.picture, taken.label

    ending = slug(options)
    names = [f"{photo.stem}-{ending}" if ending else photo.stem for photo in photos]
    folders = [options["out"] / name for name in names]
    begun = runs.usable_sessions(folders, resume)  # before anything large is read
    portraits: dict[Path, Portrait] = {}

    def look(model: FaceModel, side: int) -> None:
        choices = PortraitChoices(side, model.view.radius, model.view.pivot, aligned, face, force)
        new = [photo for photo, folder in zip(photos, folders, strict=True) if folder not in begun]
        portraits.update({photo: take(photo, choices) for photo in new})

    run = _prepare(command, model, preset, options, {}, lamp, look)
    starts = {photo: runs.read_start(run, path) for photo, path in latents.items() if path is not None}
    jobs = runs.open_photos(run, photos, names, portraits.__getitem__, resume, starts)
    for job in jobs:
        if job.done:
            click.echo(f"{told(job)} (done before)")
    compared = runs.reconstructions(run, jobs, batch) if compare else {}

    def finish(job: runs.Job, found: runs.Found) -> None:
        write_result(run, job, found, compared.get(job.name))
        click.echo(told(job))

    runs.run_photos(run, jobs, batch, finish)


def _prepare(
    command: str,
    model: Path,
    preset: str,
    options: dict[str, Any],
    task: dict[str, Any],
    take: Callable[[Path], tuple[Any, Any]],
    look: Callable[[FaceModel, int], None] | None = None,
) -> Run:
    """A model, what is wanted of it, and the judges.

    Args:
        take: gives the picture and the camera label (or None) of ``--light-of``.
        look: takes in the photos for a model and its pixels a side, before the judges' files are asked for; None: there
            are no photos.

    Raises:
        UserError: for what cannot be, before anything is computed.
    """
    from facelab.cli import facednerf_nets as nets
    from facelab.cli.common import open_model, pick_device
    from facelab.cli.facednerf_run import Outputs, Run
    from facelab.errors import UserError
    from facelab.inversion.tuning import tunable
    from facelab.lighting import PRESETS
    from facelab.methods.facednerf.editing import light_goal
    from facelab.methods.facednerf.model import Model, tuned_parts

    prompt = options.get("prompt")
    if prompt is not None and not prompt.strip():
        raise UserError("the prompt is empty: expected a description such as --prompt 'a man with a beard'")
    device = pick_device(options.pop("device"))
    names = ("out", "save_every", "picture_every", "video_frames")
    outputs = Outputs(*(options.pop(name) for name in names), progress=not options.pop("quiet"))
    if device == "cpu" and not options.get("diffusion_device") and "diffusion_precision" in options:
        options["diffusion_precision"] = options["diffusion_precision"] or "fp32"
    config = settings_of(options, preset)
    light, wanted, lamp = _wanted_light(options, take)
    face = open_model(model, device, options.pop("weights"))
    made = Model.of(face)
    tunable(made.generator, tuned_parts(made.generator, config.tune.parts))  # a misspelt part is said at once
    if look is not None:
        look(face, made.picture_side(made.settings(config)))
    told = {**task, "prompt": prompt, "negative": options.get("negative"), "light": light}
    if lamp is not None:
        told["light_of"], seen = lamp
        wanted = nets.light_in_picture(*seen, options["light_network"], config.light_norm)
    told["light_numbers"] = None if wanted is None else [round(float(v), 6) for v in wanted]
    goal = light_goal(light if light in PRESETS else wanted, config)
    judges = nets.make_judges(options, config, device, look is not None, wanted is not None)
    nets.require_aim(judges.config, look is not None)
    for note in judges.notes:
        click.echo(note, err=True)
    where = str(model.resolve() if model.exists() else model)
    kept = {name: value for name, value in told.items() if value not in (None, "", False)}
    return Run(command, face, where, judges.config, judges, wanted, goal, kept, outputs)


def _wanted_light(
    options: dict[str, Any], take: Callable[[Path], tuple[Any, Any]]
) -> tuple[str | None, Any, tuple[str, tuple[Any, Any]] | None]:
    """Text of ``--light`` and its (9,) world light, or None; path, picture and camera of ``--light-of``, or None."""
    from facelab.errors import UserError
    from facelab.lighting import light_from_text

    light, light_of = options.pop("light", None), options.pop("light_of", None)
    if light is not None and light_of is not None:
        raise UserError("--light and --light-of are two lights, expected one of them; drop one")
    lamp = None if light_of is None else (str(light_of.resolve()), take(light_of))
    return light, None if light is None else light_from_text(light), lamp


def start_of(given: Path | None, photo: Path) -> Path | None:
    """The file or session folder of ``--start`` that belongs to a photo. UserError where there is none."""
    from facelab.errors import UserError
    from facelab.inversion.session import LATENTS

    if given is None or given.is_file() or (given / LATENTS).is_file():
        return given
    if not given.is_dir():
        raise UserError(f"--start: no codes at {given}; expected a file, the folder of a head or a folder of these")
    for place in (given / photo.stem, *(given / f"{photo.stem}{kind}" for kind in (".safetensors", ".npy"))):
        if place.is_file() or (place / LATENTS).is_file():
            return place
    raise UserError(
        f"--start: no codes for {photo.name} in {given}, expected {photo.stem}/{LATENTS} or {photo.stem}.npy"
    )


def _portrait_as_it_is(path: Path) -> tuple[Any, Any]:
    """The picture of a crop and the camera beside it, or None."""
    import numpy as np

    from facelab.cli.portraits import camera_of
    from facelab.data.preprocess.doctor import open_photo

    return np.array(open_photo(path)), camera_of(None, path, [path])


def slug(task: Mapping[str, Any]) -> str:
    """A name for a folder from prompt and light: letters, digits and dashes.

    >>> slug({"prompt": "A man's  short, blue hair", "light": "right"})
    'a-man-s-short-blue-hair-right'
    """
    words = [task.get("prompt") or ""]
    if task.get("light"):
        name = str(task["light"])
        words.append(Path(name).stem if re.fullmatch(r"[\w./-]+", name) else "light")
    elif task.get("light_of"):
        words.append(f"light of {Path(task['light_of']).stem}")
    return "-".join(
        part
        for part in (re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-")[:SLUG].rstrip("-") for word in words)
        if part
    )
