# SPDX-License-Identifier: Apache-2.0
"""render_images, render_video and extract_mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from facelab.cli.common import (
    Command,
    OneLineCommand,
    device_option,
    friendly,
    hastened,
    model_argument,
    open_model,
    quality_options,
    seeds_option,
    sized_settings,
)
from facelab.cli.regions import named_regions, preset_cameras, region_options, showing, views_option
from facelab.cli.sdf_flags import OF_PICTURES
from facelab.cli.shapes import (
    FILE_RESOLUTION,
    MAX_POINTS,
    PICTURE_RESOLUTION,
    ShapeOptions,
    ShapePictures,
    given_shape_options,
    parse_formats,
    shape_options,
    write_shapes,
)
from facelab.option_types import FiniteFloat

TRAJECTORIES = (
    "front, eg3d, stylesdf and stylesdf_level (StyleSDF and CNeRF models), sphere, orbit, rotation_horizontal, zoom, "
    "non_rotation ..."
)
LAYERS = (
    "image, raw (before super-resolution), mask, blend, depth, normals, shape (shaded mesh, cut out of the density)"
)

# flags of the originals' programs that are not here -> what to do: StyleSDF's and CNeRF's, pi-GAN's and FENeRF's, EG3D's
OF_BOTH = OF_PICTURES | {
    "--output_dir": "--out",
    "--max_batch_size": "--max-points",
    "--lock_view_dependence": "--lock-view-dependence",
    "--image_size": "--image-size",
    "--ray_step_multiplier": "--ray-step-multiplier",
    "--curriculum": "nothing, the configuration comes with the model; leave it out",
    "--latent_path": "--latents",
    "--seed": "--seeds",
    "--network": "MODEL is the first argument, without a flag",
    "--outdir": "--out",
    "--trunc": "--psi",
    "--trunc-cutoff": "--truncation-cutoff",
    "--class": "nothing, it had no effect; leave it out",
    "--reload_modules": "nothing, no code of a file is run; leave it out",
}
OF_SAMPLES = OF_BOTH | {
    "--fov-deg": "--fov, degrees from side to side instead of along the diagonal (as trained unless given)",
    "--shapes": "scripts/extract_mesh.py with the same seeds",
    "--shape-res": "--voxel-resolution of scripts/extract_mesh.py",
    "--shape-format": "--format of scripts/extract_mesh.py",
    "--cube_size": "--cube-size",
    "--voxel_resolution": "--voxel-resolution",
}
OF_VIDEOS = OF_BOTH | {
    "--num-keyframes": "nothing, it is the number of seeds divided by the cells of --grid; leave it out",
    "--shuffle-seed": "nothing, seeds are taken in their order; leave it out",
    "--interpolate": "one seed and --num-frames: only the camera moves",
    "--image_mode": "--layers image,raw,depth",
    "--cfg": "nothing, a model knows its cameras; leave it out",
    "--sample_mult": "--ray-step-multiplier",
    "--npy_path": "--latents",
    "--nrr": "--image-size",
    "--interpolation_type": "nothing, a model knows how many codes it has; leave it out",
    "--latent_type": "--latent-type",
    "--num_frames": "--num-frames",
    "--fill_color": "--fill-color",
    "--save_with_video": "nothing, a video is always written (--frames writes its pictures too); leave it out",
    "--save_with_latent": "--save-latents",
    "--depth_map": "--layers depth",
    "--batch_size": "nothing, it had no effect; leave it out",
    "--seed_mode": "nothing, it had no effect; leave it out",
}
PAIR_FRAMES = 36  # of render_video, from seed to seed


def truncation_options(psi: float) -> Callable[[Command], Command]:
    """--psi, --truncation-cutoff and --double-truncation."""

    def add(function: Command) -> Command:
        function = click.option(
            "--double-truncation",
            is_flag=True,
            help="Truncate twice, as the originals of StyleSDF and CNeRF do: --psi acts about as its square.",
        )(function)
        function = click.option(
            "--truncation-cutoff",
            type=click.IntRange(0),
            default=None,
            help="Truncate only the first so many layers (EG3D). [default: 14]",
        )(function)
        return click.option(
            "--psi", "--truncation", "psi", type=FiniteFloat(-100, 100), default=psi, show_default=True,
            help="1 = full variety, 0 = average.",
        )(function)  # fmt: skip

    return add


def truncated(face: Any, double: bool, latents: Any = None) -> Any:
    """The model with ``--double-truncation`` applied. UserError with codes from files, which are truncated already."""
    from facelab.errors import UserError

    if double and latents:
        raise UserError(
            "--double-truncation is for codes of seeds: those of files are as they were saved; drop it or the files"
        )
    return face.truncated_twice() if double else face


def cameras_of(face: Any, yaws: str, pitches: str, fov: float | None, preset: str | None) -> Any:
    """The views of a grid. UserError for ``--views`` together with angles."""
    from facelab.cameras import Camera
    from facelab.cli import pictures
    from facelab.errors import UserError

    views = pictures.parse_views(yaws, pitches)
    if preset is None:
        return Camera.cat([face.camera(pitch, yaw, fov) for pitch, yaw in views])
    context = click.get_current_context()
    for name in ("yaws", "pitches"):
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise UserError(f"--views {preset} has its own angles, expected it without --{name}; drop one of them")
    return preset_cameras(face, preset, fov)


def heads_of(face: Any, seeds: Sequence[int], psi: float, cutoff: int | None, latents: Path | None) -> dict[Any, Any]:
    """Codes of one head each by what files are named after: seeds, or ``latents``, ``latents_0`` ... for a file's."""
    if latents:
        from facelab.inference.latent_files import read_codes

        codes = read_codes(latents, face.generator)
        if len(codes) == 1:
            return {"latents": codes}
        return {f"latents_{number}": codes[number] for number in range(len(codes))}
    return {seed: face.codes(seed, psi, cutoff) for seed in seeds}


def refuse_both(latents: Any) -> None:
    """UserError where both ``--seeds`` and ``--latents`` are given."""
    from facelab.errors import UserError

    source = click.get_current_context().get_parameter_source("seeds")
    if latents and source == ParameterSource.COMMANDLINE:
        raise UserError("--seeds and --latents both name heads, expected one of them; drop the other")


def picture_shapes(
    layers: Sequence[str], resolution: int | None, cube_size: float | None, level: float | None, max_points: int
) -> ShapeOptions | None:
    """How the meshes of the layer ``shape`` are cut out; None where it is not among the layers.

    A head without a surface is no error beside other layers, unless a level or a cube was asked for.
    """
    if "shape" not in layers:
        return None
    blank = len(layers) > 1 and level is None and cube_size is None
    points = min(max_points, MAX_POINTS)
    return ShapeOptions((), resolution or PICTURE_RESOLUTION, cube_size, level, points, blank=blank)


def refuse_shape_options(needed: str) -> None:
    """UserError where an option of shapes is given and no shape is asked for."""
    from facelab.errors import UserError

    if idle := given_shape_options():
        raise UserError(f"{idle[0]} is for shapes, expected {needed} with it; add it or drop {idle[0]}")


@click.command("render_images", cls=OneLineCommand, instead=OF_SAMPLES)
@model_argument
@seeds_option()
@click.option("--out", type=click.Path(path_type=Path), default=Path("imgs"), show_default=True, help="Output folder.")
@truncation_options(0.7)
@click.option(
    "--layers",
    default=None,
    help=f"Rows of the grid: {LAYERS}. [default: image, mask, depth]",
)
@click.option("--yaws", default="-0.5,-0.25,0,0.25,0.5", show_default=True, help="Views in radians from the front.")
@click.option("--pitches", default="0", show_default=True, help="Radians upwards: one for all views or one for each.")
@views_option()
@click.option("--fov", type=float, default=None, help="Full field of view in degrees. [default: as trained]")
@region_options
@click.option(
    "--latents",
    type=click.Path(path_type=Path),
    default=None,
    help="Codes saved by --save-latents or by the original, or a session folder, instead of seeds.",
)
@click.option("--save-latents", is_flag=True, help="Also write the codes of each seed (.safetensors).")
@click.option("--weights", default=None, help="ema, ema_slow or generator. [default: ema]")
@shape_options
@quality_options
@device_option
@friendly
def render_images(
    model, seeds, out, psi, truncation_cutoff, double_truncation, layers, yaws, pitches, views, fov, semantics,
    semantics_mode, latents, save_latents, weights,
    voxel_resolution, cube_size, level, image_size, ray_step_multiplier, fill_color, lock_view_dependence, max_points,
    fast, precision, device,
):  # fmt: skip
    """Multi-view grids of colour, segmentation, depth, normals and shape.

    MODEL is a run folder, a checkpoint, a .safetensors model or the name of a bundled one.
    """
    from facelab.cli import pictures
    from facelab.files import make_folder
    from facelab.inference.latent_files import save_codes
    from facelab.inference.pictures import save_label_png, save_png
    from facelab.inference.sessions import read_noise

    refuse_both(latents)
    pictures.parse_views(yaws, pitches)  # wrong ones are told before the model is opened
    face = open_model(model, device, weights, fill_color)
    face = showing(truncated(face, double_truncation, latents), semantics, semantics_mode)
    cameras = cameras_of(face, yaws, pitches, fov, views)
    settings = sized_settings(face, image_size, ray_step_multiplier, lock_view_dependence, max_points)
    names = None if layers is None else pictures.parse_layers(layers)
    names, settings = pictures.available_layers(face, names, settings)
    cut = picture_shapes(names, voxel_resolution, cube_size, level, max_points)
    if cut is None:
        refuse_shape_options("--layers shape")
    folder = make_folder(out)
    heads = heads_of(face, seeds, psi, truncation_cutoff, latents)
    face = face.with_noise(read_noise(latents, face.generator)) if latents else face
    if fast:
        face = hastened(face, precision, next(iter(heads.values())), settings)
    for seed, codes in heads.items():
        shapes = None if cut is None else ShapePictures.of(face, codes, cut)
        if shapes is not None and shapes.missing:
            click.echo(f"{seed}: {shapes.missing}; its shape stays white", err=True)
        grid = pictures.multi_view(face, codes, settings, names, cameras, shapes)
        path = folder / f"grid_{seed}.png"
        save_png(path, pictures.stack_rows(list(grid.values())))
        if "mask" in names:
            front = face.render(codes, cameras[len(cameras) // 2], settings=settings)
            save_label_png(folder / f"labels_{seed}.png", face.label_map(front)[0].cpu(), face.palette)
        if save_latents:
            save_codes(folder / f"codes_{seed}.safetensors", codes, face.method)
        click.echo(str(path))


@click.command("render_video", cls=OneLineCommand, instead=OF_VIDEOS)
@model_argument
@seeds_option((0, 1))
@click.option("--out", type=click.Path(path_type=Path), default=Path("vids"), show_default=True, help="Output folder.")
@click.option(
    "--latent-type",
    type=click.Choice(["geo", "app", "both", "non"]),
    default="both",
    show_default=True,
    help="What moves from one seed to the next.",
)
@click.option(
    "--trajectory",
    default="front",
    show_default=True,
    help=f"Camera path: {TRAJECTORIES} or a keyframe file (YAML, JSON).",
)
@click.option("--num-frames", type=click.IntRange(1), default=None, help="Frames per pair of seeds. [default: 36]")
@click.option(
    "--w-frames",
    type=click.IntRange(1),
    default=None,
    help="Instead of --num-frames: frames from seed to seed on a smooth closed curve through all of them, with one "
    "camera path for the whole video (EG3D).",
)
@click.option("--grid", default="1x1", show_default=True, help="Columns x rows of heads; the seeds fill cell by cell.")
@click.option("--fps", type=FiniteFloat(1, 1000), default=25.0, show_default=True, help="Frames per second.")
@truncation_options(0.5)
@click.option("--fov", type=float, default=None, help="Full field of view in degrees. [default: as trained]")
@region_options
@click.option("--zoom", is_flag=True, help="Let the front path zoom, as the originals do.")
@click.option("--layers", default=None, help=f"Side by side: {LAYERS}. [default: image, mask, blend, depth]")
@click.option("--frames/--no-frames", default=False, help="Also write every frame as PNG.")
@click.option(
    "--latents",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Files of codes or session folders instead of seeds; give it once per head.",
)
@click.option("--save-latents", is_flag=True, help="Also write the codes (.safetensors).")
@click.option("--reference", is_flag=True, help="Mix factors and zoom of the original's paths.")
@click.option("--shapes", default=None, help="Also the shape of every frame whose head is new: ply, obj, glb, mrc.")
@shape_options
@quality_options
@device_option
@friendly
def render_video(
    model, seeds, out, latent_type, trajectory, num_frames, w_frames, grid, fps, psi, truncation_cutoff,
    double_truncation, fov, semantics, semantics_mode, zoom, layers, frames, latents, save_latents, reference, shapes,
    voxel_resolution, cube_size, level, image_size,
    ray_step_multiplier, fill_color, lock_view_dependence, max_points, fast, precision, device,
):  # fmt: skip
    """A video along a camera path while heads blend into each other.

    With several seeds the codes run through all of them and the path is repeated for each pair; with one
    seed only the camera moves. With --w-frames the codes take a smooth closed curve and the path is run once.
    """
    from contextlib import ExitStack

    from facelab.cli import films, pictures
    from facelab.errors import UserError
    from facelab.files import make_folder
    from facelab.inference.latent_files import save_codes
    from facelab.inference.video import FrameFolder, open_video

    refuse_both(latents)
    if w_frames and num_frames:
        raise UserError(
            "--w-frames and --num-frames are two ways to count frames, expected one of them; drop the other"
        )
    wanted = None if layers is None else pictures.parse_layers(layers)
    shown = picture_shapes(wanted or (), voxel_resolution, cube_size, level, max_points)
    if shapes is None and shown is None:
        refuse_shape_options("--shapes ply (or obj, glb, mrc) or --layers shape")
    columns, rows = films.parse_grid(grid)
    cut = None if shapes is None else ShapeOptions(
        parse_formats(shapes), voxel_resolution or FILE_RESOLUTION, cube_size, level, min(max_points, MAX_POINTS)
    )  # fmt: skip
    face = open_model(model, device, fill_color=fill_color)
    face = showing(truncated(face, double_truncation, latents), semantics, semantics_mode)
    if latent_type in ("geo", "app") and latent_type not in face.generator.latent_spec:
        raise UserError(f"--latent-type {latent_type}: this {face.method} model has one code for all; use both or non")
    settings = sized_settings(face, image_size, ray_step_multiplier, lock_view_dependence, max_points)
    if wanted is None and face.has_labels:
        wanted = ["image", "mask", "blend", "depth"]
    names, settings = pictures.available_layers(face, wanted, settings)
    heads = films.film_heads(face, seeds, psi, truncation_cutoff, latents)
    if fast:
        face = hastened(face, precision, heads[0][1], settings)
    title = "latents" if latents else films.film_title(seeds)
    cells = films.fill_cells([codes for _, codes in heads], columns, rows)
    length = w_frames * len(cells[0]) if w_frames else num_frames or PAIR_FRAMES
    fov = face.view.fov if fov is None else fov
    path = films.camera_path(trajectory, length, fov, zoom=zoom, reference=reference, face=face)
    folder = make_folder(out)
    target = folder / f"interp_{latent_type}_{title}.mp4"
    with ExitStack() as stack:
        sinks = [stack.enter_context(open_video(target, fps))]
        if frames:
            sinks.append(stack.enter_context(FrameFolder(folder / f"frames_{latent_type}_{title}")))
        shaper = None if cut is None else films.ShapeFolder(folder / f"shapes_{latent_type}_{title}", cut)
        film = films.Film(cells, columns, latent_type, path, w_frames)
        films.render_film(face, film, settings, names, sinks, shaper, shown)
    if save_latents:
        for name, codes in heads:
            save_codes(folder / f"codes_{name}.safetensors", codes, face.method)
    click.echo(str(target))


@click.command("extract_mesh", cls=OneLineCommand, instead=OF_SAMPLES)
@model_argument
@seeds_option((0,))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("shapes"), show_default=True, help="Output folder."
)
@click.option(
    "--format",
    "formats",
    default="ply",
    show_default=True,
    help="ply, obj, glb (with vertex colours), mrc (raw density, signed distance of StyleSDF and CNeRF); several with "
    "commas.",
)
@shape_options
@truncation_options(0.5)
@click.option("--latents", type=click.Path(path_type=Path), default=None, help="Codes from a file instead of seeds.")
@click.option(
    "--region",
    "regions",
    default=None,
    help="A mesh of each of these regions instead of the whole head (<seed>_<region>): eye,nose or all (CNeRF).",
)
@click.option(
    "--aligned",
    is_flag=True,
    help="Cut along the rays of the frontal camera and resampled to a box, as StyleSDF does. [default: world axes]",
)
@click.option(
    "--largest-part", is_flag=True, help="Of each mesh its largest connected part, without what floats beside it."
)
@click.option(
    "--turntable",
    type=click.IntRange(1),
    default=None,
    help="Also a film of so many frames in which the mesh turns once (<seed>_turn.mp4).",
)
@click.option(
    "--reference-lattice",
    is_flag=True,
    help="The original's places, for comparison: pi-GAN's sheared lattice, StyleSDF's skewed box (--aligned).",
)
@click.option(
    "--max-points", type=click.IntRange(1), default=MAX_POINTS, show_default=True, help="Field evaluations at a time."
)
@device_option
@friendly
def extract_mesh(
    model, seeds, out, formats, voxel_resolution, cube_size, level, psi, truncation_cutoff, double_truncation, latents,
    regions, aligned, largest_part, turntable, reference_lattice, max_points, device,
):  # fmt: skip
    """The surface of a head as a mesh with vertex colours, or its density as a volume."""
    from facelab.errors import UserError
    from facelab.files import make_folder

    refuse_both(latents)
    if aligned and cube_size is not None:
        raise UserError("--aligned cuts out what the camera sees, expected it without --cube-size; drop one of them")
    kinds = parse_formats(formats)
    options = ShapeOptions(
        kinds,
        voxel_resolution or FILE_RESOLUTION,
        cube_size,
        level,
        max_points,
        reference_lattice or None,
        turntable or 0,
        aligned,
        largest_part=largest_part,
    )
    face = truncated(open_model(model, device), double_truncation, latents)
    parts = {"": face}
    if regions is not None:
        names = face.region_names if regions.strip() == "all" and face.region_names else named_regions(face, regions)
        parts = {f"_{name}": face.only([name], carve=True) for name in names}
    folder = make_folder(out)
    heads = heads_of(face, seeds, psi, truncation_cutoff, latents)
    several = len(heads) > 1 or (regions is not None and regions.strip() == "all")
    jobs = {f"{name}{suffix}": (part, codes) for name, codes in heads.items() for suffix, part in parts.items()}
    _shape_files(jobs, folder, options, several)


def _shape_files(jobs: Mapping[str, tuple[Any, Any]], folder: Path, options: ShapeOptions, several: bool) -> None:
    """:func:`write_shapes` for each name; of ``several``, those without a surface are passed over with a line.

    UserError where there is none at all.
    """
    from facelab.errors import NoSurface

    missing: NoSurface | None = None
    written = False
    for name, (face, codes) in jobs.items():
        try:
            paths = write_shapes(face, codes, folder, name, options)
        except NoSurface as error:
            if not several:
                raise
            click.echo(f"{name}: {str(error).partition(';')[0]}", err=True)
            missing = error
            continue
        written = True
        for path in paths:
            click.echo(str(path))
    if missing is not None and not written:
        raise missing
