# SPDX-License-Identifier: Apache-2.0
"""render_images, render_video and extract_mesh."""

from __future__ import annotations

from pathlib import Path

import click

from facelab.cli.common import (
    OneLineCommand,
    device_option,
    friendly,
    model_argument,
    open_model,
    quality_options,
    seeds_option,
    sized_settings,
)

FORMATS = ("ply", "obj", "glb", "mrc")
TRAJECTORIES = "front, sphere, orbit, rotation_horizontal, zoom, non_rotation ..."


@click.command("render_images", cls=OneLineCommand)
@model_argument
@seeds_option()
@click.option("--out", type=click.Path(path_type=Path), default=Path("imgs"), show_default=True, help="Output folder.")
@click.option(
    "--psi", "--truncation", "psi", type=float, default=0.7, show_default=True, help="1 = full variety, 0 = average."
)
@click.option(
    "--layers",
    default=None,
    help="Rows of the grid: image, mask, blend, depth, normals. [default: all but blend, normals]",
)
@click.option("--yaws", default="-0.5,-0.25,0,0.25,0.5", show_default=True, help="Views in radians from the front.")
@click.option(
    "--latents",
    type=click.Path(path_type=Path),
    default=None,
    help="Codes saved by --save-latents or by the original, instead of seeds.",
)
@click.option("--save-latents", is_flag=True, help="Also write the codes of each seed (.safetensors).")
@click.option("--weights", default=None, help="ema, ema_slow or generator. [default: ema]")
@quality_options
@device_option
@friendly
def render_images(
    model, seeds, out, psi, layers, yaws, latents, save_latents, weights, image_size, ray_step_multiplier,
    fill_color, lock_view_dependence, max_points, device,
):  # fmt: skip
    """Multi-view grids of colour, segmentation, depth and normals.

    MODEL is a run folder, a checkpoint, a .safetensors model or the name of a bundled one.
    """
    from facelab.cli import pictures
    from facelab.errors import UserError
    from facelab.files import make_folder
    from facelab.inference.latent_files import read_codes, save_codes
    from facelab.inference.pictures import save_label_png, save_png

    try:
        views = [float(x) for x in yaws.split(",")]
    except ValueError:
        raise UserError(f"--yaws takes numbers such as -0.5,0,0.5, got {yaws!r}") from None
    face = open_model(model, device, weights, fill_color)
    settings = sized_settings(face, image_size, ray_step_multiplier, lock_view_dependence, max_points)
    names = None if layers is None else pictures.parse_layers(layers)
    names, settings = pictures.available_layers(face, names, settings)
    folder = make_folder(out)
    heads = {"latents": read_codes(latents, face.generator)} if latents else {s: face.codes(s, psi) for s in seeds}
    for seed, codes in heads.items():
        grid = pictures.multi_view(face, codes, settings, names, views)
        path = folder / f"grid_{seed}.png"
        save_png(path, pictures.stack_rows(list(grid.values())))
        if "mask" in names:
            front = face.render(codes, face.camera(yaw=views[len(views) // 2]), settings=settings)
            save_label_png(folder / f"labels_{seed}.png", face.label_map(front)[0].cpu())
        if save_latents:
            save_codes(folder / f"codes_{seed}.safetensors", codes, face.method)
        click.echo(str(path))


@click.command("render_video", cls=OneLineCommand)
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
@click.option("--num-frames", type=click.IntRange(1), default=36, show_default=True, help="Frames per pair of seeds.")
@click.option("--fps", type=click.FloatRange(1), default=25.0, show_default=True, help="Frames per second.")
@click.option(
    "--psi", "--truncation", "psi", type=float, default=0.5, show_default=True, help="1 = full variety, 0 = average."
)
@click.option("--fov", type=float, default=None, help="Full field of view in degrees. [default: as trained]")
@click.option("--zoom", is_flag=True, help="Let the front path zoom, as the originals do.")
@click.option(
    "--layers", default=None, help="Side by side: image, mask, blend, depth, normals. [default: image,mask,blend,depth]"
)
@click.option("--frames/--no-frames", default=False, help="Also write every frame as PNG.")
@click.option(
    "--latents",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Files of codes instead of seeds; give it once per head.",
)
@click.option("--save-latents", is_flag=True, help="Also write the codes (.safetensors).")
@click.option("--reference", is_flag=True, help="Mix factors and zoom of the original's paths.")
@quality_options
@device_option
@friendly
def render_video(
    model, seeds, out, latent_type, trajectory, num_frames, fps, psi, fov, zoom, layers, frames, latents, save_latents,
    reference, image_size, ray_step_multiplier, fill_color, lock_view_dependence, max_points, device,
):  # fmt: skip
    """A video along a camera path while heads blend into each other.

    With several seeds the codes run through all of them and the path is repeated for each pair; with one
    seed only the camera moves.
    """
    from contextlib import ExitStack

    from facelab.api import mixed_codes
    from facelab.cameras.trajectories import keyframe_trajectory, read_keyframes
    from facelab.cameras.trajectories import trajectory as named_path
    from facelab.cli import pictures
    from facelab.errors import UserError
    from facelab.files import make_folder
    from facelab.inference.latent_files import read_codes, save_codes
    from facelab.inference.video import FrameFolder, open_video
    from facelab.progress import progress_bar

    face = open_model(model, device, fill_color=fill_color)
    if latent_type in ("geo", "app") and latent_type not in face.generator.latent_spec:
        raise UserError(f"--latent-type {latent_type}: this {face.method} model has one code for all; use both or non")
    settings = sized_settings(face, image_size, ray_step_multiplier, lock_view_dependence, max_points)
    wanted = None if layers is None else pictures.parse_layers(layers)
    if wanted is None and face.has_labels:
        wanted = ["image", "mask", "blend", "depth"]
    names, settings = pictures.available_layers(face, wanted, settings)
    fov = face.view.fov if fov is None else fov
    if Path(trajectory).suffix in (".yaml", ".yml", ".json"):
        path = keyframe_trajectory(read_keyframes(trajectory, fov), num_frames)
    else:
        path = named_path(trajectory, num_frames, fov, zoom=zoom, reference=reference)
    heads = [read_codes(p, face.generator) for p in latents] or [face.codes(s, psi) for s in seeds]
    title = "latents" if latents else "-".join(map(str, seeds))
    pairs = list(zip(heads, heads[1:], strict=False)) or [(heads[0], heads[0])]
    folder = make_folder(out)
    target = folder / f"interp_{latent_type}_{title}.mp4"
    cameras = face.view.cameras(path.pitch, path.yaw, path.fov).to(face.device)
    with ExitStack() as stack:
        sinks = [stack.enter_context(open_video(target, fps))]
        if frames:
            sinks.append(stack.enter_context(FrameFolder(folder / f"frames_{latent_type}_{title}")))
        bar = stack.enter_context(progress_bar(total=len(pairs) * num_frames, unit="frame"))
        for first, second in pairs:
            for i, codes in enumerate(mixed_codes(first, second, latent_type, path.t.tolist())):
                picture = pictures.frame(face, codes, cameras[i], settings, names)
                for sink in sinks:
                    sink.add(picture)
                bar.update()
    if save_latents:
        for i, codes in enumerate(heads):
            name = latents[i].stem if latents else str(seeds[i])
            save_codes(folder / f"codes_{name}.safetensors", codes, face.method)
    click.echo(str(target))


@click.command("extract_mesh", cls=OneLineCommand)
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
    help="ply, obj, glb (with vertex colours), mrc (raw density); several with commas.",
)
@click.option(
    "--voxel-resolution", type=click.IntRange(8), default=256, show_default=True, help="Lattice points per side."
)
@click.option(
    "--cube-size", type=float, default=None, help="Side of the cube, scene units. [default: what holds a head]"
)
@click.option("--level", type=float, default=10.0, show_default=True, help="Density of the surface.")
@click.option(
    "--psi", "--truncation", "psi", type=float, default=0.5, show_default=True, help="1 = full variety, 0 = average."
)
@click.option("--latents", type=click.Path(path_type=Path), default=None, help="Codes from a file instead of seeds.")
@click.option("--reference-lattice", is_flag=True, help="The original's sheared lattice, for comparison.")
@click.option(
    "--max-points", type=click.IntRange(1), default=100_000, show_default=True, help="Field evaluations at a time."
)
@device_option
@friendly
def extract_mesh(
    model, seeds, out, formats, voxel_resolution, cube_size, level, psi, latents, reference_lattice, max_points, device,
):  # fmt: skip
    """The surface of a head as a mesh with vertex colours, or its density as a volume."""
    from facelab.errors import UserError, nearest
    from facelab.files import make_folder
    from facelab.inference.latent_files import read_codes
    from facelab.mesh.io import save_mesh, save_mrc
    from facelab.mesh.marching_cubes import Lattice, sample_volume

    kinds = [k.strip().lstrip(".") for k in formats.split(",") if k.strip()]
    if not kinds:
        raise UserError(f"no format chosen, expected some of {', '.join(FORMATS)}")
    for kind in kinds:
        if kind not in FORMATS:
            raise UserError(f"unknown format {kind!r}, expected some of {', '.join(FORMATS)}.{nearest(kind, FORMATS)}")
    face = open_model(model, device)
    cube_size = face.head_cube if cube_size is None else cube_size
    folder = make_folder(out)
    heads = {"latents": read_codes(latents, face.generator)} if latents else {s: face.codes(s, psi) for s in seeds}
    for seed, codes in heads.items():
        meshes = [k for k in kinds if k != "mrc"]
        if meshes:
            mesh = face.extract_mesh(
                code=codes, resolution=voxel_resolution, cube_size=cube_size, level=level, max_points=max_points,
                reference_lattice=reference_lattice or None,
            )  # fmt: skip
            for kind in meshes:
                save_mesh(folder / f"{seed}.{kind}", mesh)
                click.echo(str(folder / f"{seed}.{kind}"))
        if "mrc" in kinds:
            sheared = reference_lattice or face.config.reference.sheared_lattice
            lattice = Lattice(voxel_resolution, cube_size, sheared)
            volume = sample_volume(face.density(codes), lattice, max_points, face.device)
            save_mrc(folder / f"{seed}.mrc", volume, lattice.voxel_size, lattice.origin)
            click.echo(str(folder / f"{seed}.mrc"))
