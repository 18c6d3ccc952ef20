# SPDX-License-Identifier: Apache-2.0
"""edit_cnerf: regions of a head get other codes; a session folder with what was done and what it changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from facelab.cli.common import (
    LAST_SEED,
    OneLineCommand,
    device_option,
    friendly,
    hastened,
    model_argument,
    open_model,
    parse_seeds,
    quality_options,
    sized_settings,
)
from facelab.cli.regions import named_regions, views_option
from facelab.cli.render import (
    PAIR_FRAMES,
    TRAJECTORIES,
    cameras_of,
    refuse_shape_options,
    truncated,
    truncation_options,
)
from facelab.cli.shapes import FILE_RESOLUTION, MAX_POINTS, ShapeOptions, parse_formats, shape_options, write_shapes
from facelab.option_types import FiniteFloat

if TYPE_CHECKING:
    from facelab.generator import Codes

COMMAND = "edit_cnerf"
BEFORE, AFTER = "before", "after"
PARTS = ("shape", "texture")
KINDS = ("segmentation", "difference", "labels")  # of pictures beside those of the heads
SETTINGS, FILM = "settings.yaml", "edit.mp4"
MAX_EDITS = 64


@dataclass(frozen=True)
class Edit:
    """One changed head.

    Attributes:
        name: of its files: ``after``, or ``after_0.5``, ``after_seed3`` where there are several.
        codes: of one scene.
        how: for settings.yaml: the amount, or the seed of the new codes.
    """

    name: str
    codes: Codes
    how: dict[str, Any]


@click.command("edit_cnerf", cls=OneLineCommand)
@model_argument
@click.option(
    "--head",
    default="0",
    show_default=True,
    help="The head to edit: a seed, a file of codes, or a session of invert_cnerf or edit_cnerf, whose photo's camera is "
    "then the first view.",
)
@click.option("--regions", required=True, help="What to change, by name: hair, or eye,brow. Numbers are understood.")
@click.option("--parts", default="shape,texture", show_default=True, help="Codes to change: shape, texture or both.")
@click.option("--from", "donor", default=None, help="The head whose regions are taken: a seed, a file or a session.")
@click.option(
    "--amounts",
    default="1",
    show_default=True,
    help="Of --from: 1 swaps, 0.5 is half way, 1.5 exaggerates; several with commas make an edit of each.",
)
@click.option(
    "--resample", default=None, help="Instead of --from: new random codes of these seeds, an edit of each: 0,3-5."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("edits"), show_default=True, help="Session folder."
)
@truncation_options(0.7)
@click.option("--yaws", default="-0.4,0,0.4", show_default=True, help="Views in radians from the front.")
@click.option("--pitches", default="0", show_default=True, help="Radians upwards: one for all views or one for each.")
@views_option()
@click.option("--fov", type=float, default=None, help="Full field of view in degrees. [default: as trained]")
@click.option("--weights", default=None, help="ema or generator. [default: ema]")
@click.option(
    "--video",
    is_flag=True,
    help=f"Also a film, the head as it was beside the one that changes, {PAIR_FRAMES} frames from edit to edit.",
)
@click.option("--num-frames", type=click.IntRange(1), default=PAIR_FRAMES, show_default=True, help="Of --video.")
@click.option("--trajectory", default="front", show_default=True, help=f"Camera path of --video: {TRAJECTORIES}.")
@click.option("--fps", type=FiniteFloat(1, 1000), default=25.0, show_default=True, help="Frames per second of --video.")
@click.option("--mesh", default=None, help="Also meshes before and after: ply, obj, glb; several with commas.")
@shape_options
@quality_options
@device_option
@friendly
def edit_cnerf(
    model, head, regions, parts, donor, amounts, resample, out, psi, truncation_cutoff, double_truncation, yaws, pitches,
    views, fov, weights, video, num_frames, trajectory, fps, mesh, voxel_resolution, cube_size, level, image_size,
    ray_step_multiplier, fill_color, lock_view_dependence, max_points, fast, precision, device,
):  # fmt: skip
    """Change regions of a head: another head's, a mix with it, or new random ones.

    MODEL is a CNeRF model. A's hair on B: --head B --from A --regions hair. The session folder gets settings.yaml
    (options, and which share of the changed pixels lies outside the regions), latents, pictures before and after with
    their difference and segmentation, and with --video and --mesh a film and meshes.
    """
    from facelab.cli import pictures
    from facelab.files import make_folder

    check_folder(out, head, donor)
    wanted = parse_parts(parts)
    steps = parse_edits(donor, amounts, resample)
    pictures.parse_views(yaws, pitches)
    kinds = None if mesh is None else parse_formats(mesh)
    if kinds is None:
        refuse_shape_options("--mesh ply (or obj, glb, mrc)")
    stored = [text for text in (head, donor) if text is not None and not text.strip().isdigit()]
    face = truncated(open_model(model, device, weights, fill_color), double_truncation, stored)
    names = named_regions(face, regions)
    cameras = cameras_of(face, yaws, pitches, fov, views)
    face, cameras = as_inverted(face, head, cameras, model)
    settings = sized_settings(face, image_size, ray_step_multiplier, lock_view_dependence, max_points)
    pick = head_reader(face, psi, truncation_cutoff)
    source = None if donor is None else pick(donor, "--from")
    edits = make_edits(face, pick(head, "--head"), source, names, wanted, steps, psi)
    if fast:
        face = hastened(face, precision, edits[0].codes, settings)
    folder = make_folder(out)
    clear(folder)
    write_latents(face, folder, edits, source, head)
    changes = write_pictures(face, folder, edits, settings, cameras, names)
    options = {
        "model": str(model), "method": face.method, "head": head, "from": donor, "regions": list(names),
        "parts": list(wanted), "psi": psi, "double_truncation": double_truncation, "yaws": yaws, "pitches": pitches,
        "views": views, "fov": fov, "image_size": image_size, "ray_step_multiplier": ray_step_multiplier,
    }  # fmt: skip
    write_settings(folder, options, edits[1:], changes)
    for edit, change in zip(edits[1:], changes, strict=True):
        click.echo(f"{edit.name}: {told(change, names, len(cameras))}")
    if video:
        path = films_path(trajectory, num_frames, face, fov)
        write_film(face, folder / FILM, edits, settings, path, fps)
    if kinds is not None:
        options_of = ShapeOptions(
            kinds, voxel_resolution or FILE_RESOLUTION, cube_size, level, min(max_points, MAX_POINTS)
        )
        for edit in edits:
            write_shapes(face, edit.codes, folder, edit.name, options_of)
    click.echo(str(folder))


# ---------------------------------------------------------------- what is asked


def parse_parts(text: str) -> tuple[str, ...]:
    """``"shape,texture"`` -> names of :data:`PARTS`. UserError with the nearest name otherwise."""
    from facelab.errors import UserError, nearest

    found = [part.strip().lower() for part in text.split(",") if part.strip()]
    for part in found:
        if part not in PARTS:
            raise UserError(f"unknown part {part!r}, expected shape, texture or both.{nearest(part, PARTS)}")
    if not found:
        raise UserError("no part chosen, expected shape, texture or both with a comma")
    return tuple(part for part in PARTS if part in found)


def parse_edits(donor: str | None, amounts: str, resample: str | None) -> list[float] | list[int]:
    """Amounts of ``--from`` (numbers), or seeds of ``--resample`` (integers). UserError for both, neither, too many."""
    from click.core import ParameterSource

    from facelab.errors import UserError

    if (donor is None) == (resample is None):
        got = "neither" if donor is None else "both"
        raise UserError(
            f"an edit takes a head to take regions --from or seeds to --resample, expected one of them, got {got}"
        )
    if resample is not None:
        if click.get_current_context().get_parameter_source("amounts") == ParameterSource.COMMANDLINE:
            raise UserError("--amounts is how far to go towards the head of --from, expected it without --resample")
        try:
            found: list[Any] = list(dict.fromkeys(parse_seeds(resample)))
        except click.BadParameter as error:
            raise UserError(f"--resample: {error.message}") from None
    else:
        try:
            found = list(dict.fromkeys(float(x) for x in amounts.split(",") if x.strip()))
        except ValueError:
            found = []
        if not found or any(x != x or abs(x) == float("inf") for x in found):
            raise UserError(f"--amounts takes numbers such as 0,0.5,1, got {amounts!r}")
    if len(found) > MAX_EDITS:
        raise UserError(f"at most {MAX_EDITS} edits at a time, got {len(found)}; run the command again for the others")
    return found


def head_reader(face: Any, psi: float, cutoff: int | None) -> Callable[[str, str], Codes]:
    """A function that opens ``--head`` or ``--from``: a seed, a file of codes or a session folder, of one head."""
    from facelab.errors import UserError
    from facelab.inference.latent_files import read_codes

    def pick(text: str, option: str) -> Codes:
        if text.strip().isdigit() and not Path(text).exists():
            if int(text) > LAST_SEED:
                raise UserError(f"{option} {text}: expected a seed below 2^63, a file of codes or a session folder")
            return face.codes(int(text), psi, cutoff)
        codes = read_codes(text, face.generator)
        if len(codes) != 1:
            raise UserError(f"{option} {text} holds {len(codes)} heads, expected one")
        return codes

    return pick


def make_edits(
    face: Any,
    head: Codes,
    donor: Codes | None,
    names: Sequence[str],
    parts: Sequence[str],
    steps: Sequence[float],
    psi: float,
) -> list[Edit]:
    """The head as it was, then every edit. Warnings are told."""
    from facelab.methods.cnerf.editing import mix_region, resample_region

    edits = [Edit(BEFORE, head, {})]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for step in steps:
            if donor is None:
                suffix, how = f"_seed{step}", {"seed": step}
                codes = resample_region(face.generator, head, names, int(step), psi, parts)
            else:
                suffix, how = f"_{step:g}", {"amount": step}
                codes = mix_region(head, donor, names, float(step), parts)
            edits.append(Edit(AFTER + (suffix if len(steps) > 1 else ""), codes, how))
    for text in dict.fromkeys(str(warning.message) for warning in heard):
        click.echo(f"warning: {text}", err=True)
    return edits


def check_folder(out: Path, *heads: str | None) -> None:
    """UserError where one of the heads is or lies in the session folder, or that holds what this command has not made."""
    from facelab.errors import UserError
    from facelab.yaml_files import read_yaml

    places = [Path(head).resolve() for head in heads if head is not None and Path(head).exists()]
    folders = {place if place.is_dir() else place.parent for place in places}
    if folders & {out.resolve(), (out / "latents").resolve()}:
        raise UserError(f"--out {out} is the session that is edited, which would be lost; choose another folder")
    settings = out / SETTINGS
    if settings.is_file() and read_yaml(settings).get("command") != COMMAND:
        raise UserError(f"--out {out} holds the session of another command; choose another folder")


def clear(folder: Path) -> None:
    """Remove what an earlier edit left in its session folder: its camera, noise and meshes are those of other heads."""
    from facelab.cli.shapes import FORMATS
    from facelab.inference.latent_files import SESSION_FILE
    from facelab.inference.sessions import METRICS_FILE, NOISE_FILE

    if not (folder / SETTINGS).is_file():
        return
    heads = [f"{name}.{kind}" for name in (BEFORE, f"{AFTER}*") for kind in ("png", *FORMATS)]
    pictures = [f"{kind}_{name}.png" for kind in KINDS for name in (BEFORE, f"{AFTER}*")]
    whole = ("sheet.png", FILM, NOISE_FILE, METRICS_FILE, SESSION_FILE, "latents/*.safetensors", SETTINGS)
    for pattern in (*heads, *pictures, *whole):
        for path in folder.glob(pattern):
            path.unlink()


def as_inverted(face: Any, head: str, cameras: Any, model: Path) -> tuple[Any, Any]:
    """The model with the noise of ``--head`` where that is a session, and its photo's camera before the others."""
    from facelab.cameras import Camera
    from facelab.inference.sessions import read_camera, read_noise, tuned_model

    if not Path(head).is_dir():
        return face, cameras
    tuned, camera = tuned_model(head), read_camera(head)
    if tuned is not None and not (Path(model).exists() and tuned.samefile(model)):
        click.echo(f"note: this head has a model tuned to its photo, {tuned}; give it as MODEL to use it", err=True)
    face = face.with_noise(read_noise(head, face.generator))
    if camera is None:
        return face, cameras
    stripped = Camera(cameras.cam2world, cameras.intrinsics)
    return face, Camera.cat([camera.to(face.device), stripped])


# ---------------------------------------------------------------- what is written


def write_latents(face: Any, folder: Path, edits: Sequence[Edit], donor: Codes | None, head: str) -> None:
    """``latents.safetensors``, the last edit, with noise and camera of an inverted head; all heads in ``latents/``."""
    from facelab.inference.latent_files import SESSION_FILE, save_codes
    from facelab.inference.sessions import read_camera, save_camera, save_noise

    save_codes(folder / SESSION_FILE, edits[-1].codes, face.method)
    if face.noise:
        save_noise(folder, face.noise)
    if Path(head).is_dir() and (camera := read_camera(head)) is not None:
        save_camera(folder, camera)
    for edit in edits:
        save_codes(folder / "latents" / f"{edit.name}.safetensors", edit.codes, face.method)
    if donor is not None:
        save_codes(folder / "latents" / "from.safetensors", donor, face.method)


def write_pictures(
    face: Any, folder: Path, edits: Sequence[Edit], settings: Any, cameras: Any, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows of views of every head, segmentations, differences and one sheet of all; returns what every edit changed."""
    from facelab.cli import pictures
    from facelab.generator import GeneratorOutput
    from facelab.inference.pictures import save_label_png, save_png

    rows, changes, before, middle = [], [], None, len(cameras) // 2
    for edit in edits:
        scene = face.scene(edit.codes)
        look = GeneratorOutput.cat(
            [face.render(scene, cameras[i], settings=settings).map(lambda x: x.cpu()) for i in range(len(cameras))]
        )
        image, mask = (pictures.layer(face, look, name) for name in ("image", "mask"))
        parts = {"": image, "segmentation_": mask}
        rows += [image, mask]
        if before is None:
            before = replace(look, features=None)
        else:
            parts["difference_"] = difference(before.rgb, look.rgb)
            rows.append(parts["difference_"])
            changes.append(measure(face, before, look, names))
        for prefix, row in parts.items():
            save_png(folder / f"{prefix}{edit.name}.png", pictures.stack_rows([row]))
        save_label_png(folder / f"labels_{edit.name}.png", face.label_map(look)[middle], face.palette)
    save_png(folder / "sheet.png", pictures.stack_rows(rows))
    return changes


def difference(before: Any, after: Any) -> Any:
    """(N, 3, S, S) pictures in [-1, 1] -> uint8 of their absolute difference, black where equal, doubled."""
    from facelab.inference.pictures import to_uint8

    return to_uint8((after.clamp(-1, 1) - before.clamp(-1, 1)).abs(), 0, 1)


def measure(face: Any, before: Any, after: Any, names: Sequence[str]) -> dict[str, Any]:
    """What an edit changed in the pictures, inside its regions and outside, over all views."""
    from facelab.methods.cnerf.editing import count_changes

    was, became = face.label_map(before), face.label_map(after)
    report = count_changes(before.rgb, after.rgb, was, became, names, names=face.region_names).report()
    kept = ("outside_share", "leak_share", "inside_share", "changed_pixels", "region_pixels", "pixels")
    return {key: report[key] for key in kept}


def told(change: dict[str, Any], names: Sequence[str], views: int) -> str:
    """A line for people."""
    regions = ", ".join(names)
    if change["outside_share"] is None:
        return f"no pixel of {views} views changed"
    inside = change["inside_share"]
    line = f"{change['changed_pixels']} pixels of {views} views changed, {change['outside_share']:.1%} of them outside {regions}"
    return f"{line} (not to be seen)" if inside is None else f"{line}; {inside:.1%} of {regions} changed"


def write_settings(
    folder: Path, options: dict[str, Any], edits: Sequence[Edit], changes: Sequence[dict[str, Any]]
) -> None:
    """``settings.yaml``: what was asked for, and what every edit changed."""
    import facelab
    from facelab.files import atomic_path
    from facelab.metrics.region_independence import THRESHOLD
    from facelab.yaml_files import dump_yaml

    done = [{"name": e.name, **e.how, "changed": c} for e, c in zip(edits, changes, strict=True)]
    content = {
        "command": COMMAND,
        "facelab": facelab.__version__,
        **options,
        "threshold_levels": THRESHOLD,
        "edits": done,
    }
    with atomic_path(folder / SETTINGS) as temporary:
        temporary.write_text(dump_yaml(content), encoding="utf-8")


def films_path(name: str, frames: int, face: Any, fov: float | None) -> Any:
    """The camera path of the film."""
    from facelab.cli import films

    return films.camera_path(name, frames, face.view.fov if fov is None else fov, face=face)


def write_film(face: Any, path: Path, edits: Sequence[Edit], settings: Any, cameras: Any, fps: float) -> None:
    """The head as it was, beside the one that goes through all edits; picture and segmentation of each."""
    from facelab.cli import films
    from facelab.inference.video import open_video

    still = [edits[0].codes] * len(edits)
    film = films.Film([still, [edit.codes for edit in edits]], 2, "both", cameras, None)
    with open_video(path, fps) as sink:
        films.render_film(face, film, settings, ["image", "mask"], [sink], None)
