# SPDX-License-Identifier: Apache-2.0
"""EG3D's data sets in prepare_data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from facelab.cli.common import OneLineCommand, friendly
from facelab.cli.photos import FINDING, optional_finding_options, prepare_folder
from facelab.errors import UserError
from facelab.option_types import FiniteFloat

if TYPE_CHECKING:
    from facelab.data.eg3d_prepare import Item

PATH = click.Path(path_type=Path)
SYNTHETIC = "synthetic"
CONVENTIONS = ("opencv_c2w", "opengl_c2w", "opencv_w2c", "opengl_w2c")


def _writing(command: Callable[..., None]) -> Callable[..., None]:
    """Options of every command that encodes pictures."""
    options = (
        click.option(
            "--compression", type=click.IntRange(0, 9), default=1, show_default=True, help="Of PNG; 0 reads fastest."
        ),
        click.option("--workers", type=click.IntRange(1), default=4, show_default=True, help="Threads."),
        click.option("--quiet", is_flag=True, help="No progress bar."),
    )
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


@click.command("eg3d", cls=OneLineCommand)
@click.argument("src")
@click.argument("dst", type=PATH)
@click.option(
    "--cameras", type=PATH, help="One JSON for all pictures, or a folder of NAME.npy|json|txt.  [default: beside each]"
)
@click.option(
    "--convention",
    type=click.Choice(CONVENTIONS),
    help="Of the matrices.  [default: opencv_c2w; NeRF transforms: opengl_c2w]",
)
@click.option("--focal", type=FiniteFloat(0, min_open=True), help="Normalised focal length where the files state none.")
@click.option("--fov", type=FiniteFloat(1, 170), help="The same as a full field of view in degrees.")
@click.option("--pixels", type=FiniteFloat(1), help="Intrinsics are in pixels of a picture this wide.")
@click.option("--radius", type=FiniteFloat(0, min_open=True), help="Move every camera to this distance (EG3D: 2.7).")
@click.option("--no-labels", is_flag=True, help="Make a set without cameras.")
@click.option(
    "--size",
    type=click.IntRange(4),
    help="Side in pixels (Lanczos).  [default: as they are; synthetic: 128; photographs: 512]",
)
@click.option("--center-crop", is_flag=True, help="Cut the middle square of oblong pictures; the intrinsics follow.")
@click.option("--mirror", is_flag=True, help="Append mirror images with mirrored cameras.")
@click.option("--masks", is_flag=True, help="Take masks along (masks/ beside images/; synthetic heads have them).")
@click.option("--max-images", type=click.IntRange(1), help="The first so many only.")
@click.option(
    "--alpha",
    type=click.Choice(["black", "white"]),
    default="black",
    show_default=True,
    help="Under transparent pixels.",
)
@click.option("--count", type=click.IntRange(1), default=1000, show_default=True, help="synthetic: number of heads.")
@click.option("--seed", default=0, show_default=True, help="synthetic: the same seed makes the same heads.")
@optional_finding_options
@_writing
@friendly
def eg3d(
    src: str, dst: Path, cameras: Path | None, size: int | None, masks: bool, max_images: int | None, **o: Any
) -> None:
    """Pictures and cameras in SRC to a data set DST (a folder, or NAME.zip) as EG3D reads it.

    SRC is a folder, an existing set, or 'synthetic': made-up heads with exact cameras in EG3D's units
    (radius 2.7, focal length 4.2647). With --camera-from it is a folder of photographs as they come, and DST
    a folder ('prepare_data.py photos' does the same and can do more). Cameras are 25-number labels, 4x4 or 3x4 matrices, bare 3x3
    rotations, {"pose", "intrinsics"} pairs or NeRF's transforms.json.

    \b
    opencv_c2w  camera to world, x right, y down, z forward (EG3D)
    opengl_c2w  camera to world, x right, y up, looks along -z (Blender, NeRF)
    opencv_w2c  world to camera, the inverse of the first (COLMAP)
    opengl_w2c  world to camera, the inverse of the second
    """
    from facelab.data.eg3d_prepare import synthetic_items

    finding = {name: o.pop(name) for name in FINDING}
    if finding["camera_from"]:
        _from_photos(src, dst, size, o | {"cameras": cameras, "masks": masks, "max_images": max_images}, finding)
        return
    _unused(finding, "pictures with cameras; --camera-from takes photographs", FINDING)
    if src == SYNTHETIC:
        _unused(
            o | {"cameras": cameras}, "synthetic heads", ("cameras", "convention", "pixels", "no_labels", "center_crop")
        )
        focal = _focal(o["focal"], o["fov"])
        options = {} if focal is None else {"focal": focal}
        if o["radius"]:
            options["radius"] = o["radius"]
        count = min(o["count"], max_images or o["count"])
        items = synthetic_items(count, size or 128, o["seed"], **options)
    else:
        context = click.get_current_context()
        given = {name: context.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in ("count", "seed")}
        _unused(given, "pictures from files; --max-images takes the first so many", ("count", "seed"))
        items = _from_folder(Path(src), cameras, masks, max_images, o)
    _write(dst, items, size, o, masks=masks, mirror=o["mirror"], crop=o["center_crop"])


@click.command("eg3d-mirror", cls=OneLineCommand)
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@_writing
@friendly
def eg3d_mirror(src: Path, dst: Path, **o: Any) -> None:
    """The set SRC with a mirror image of every picture (NAME_mirror.png, pose mirrored) to DST."""
    from facelab.data.eg3d_recipes import dataset_items

    dataset = _open(src)
    done = next((name for name in dataset.names if Path(name).stem.endswith("_mirror")), None)
    if done:
        raise UserError(f"{src} holds mirror images already, for example {done}; expected a set without them")
    _write(dst, dataset_items(dataset), None, o, masks=dataset.mask_names is not None, mirror=True)


@click.command("eg3d-rebalance", cls=OneLineCommand)
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.option("--copies", type=PATH, help="JSON {picture number: copies}; pictures not listed are left out.")
@click.option(
    "--step",
    type=FiniteFloat(0, min_open=True),
    default=15.0,
    show_default=True,
    help="One more copy for every so many degrees of |yaw|.",
)
@click.option("--most", type=click.IntRange(1), default=4, show_default=True, help="Most copies of a picture.")
@friendly
def eg3d_rebalance(src: Path, dst: Path, copies: Path | None, step: float, most: int) -> None:
    """The set SRC with steep poses repeated (NAME_kk.png) to DST."""
    from facelab.data.eg3d_recipes import read_copies, rebalance, replicas_by_yaw

    dataset = _open(src)
    if dataset.labels is None:
        raise UserError(f"{src} has no camera labels, so there are no poses to rebalance; give it labels first")
    table = read_copies(copies) if copies else replicas_by_yaw(dataset.labels, step, most)
    click.echo("\n".join([f"{dst}: {line}" for line in rebalance(dataset, dst, table).lines()]))


@click.command("eg3d-ffhq", cls=OneLineCommand)
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.option("--crops", type=PATH, required=True, help="cropping_params.json: lm, lm3d_std ... of each file.")
@click.option(
    "--landmarks", type=PATH, help="FFHQ's metadata JSON: SRC holds in-the-wild pictures, realign them first."
)
@click.option("--labels", type=PATH, help="dataset.json with the cameras.")
@click.option("--size", type=click.IntRange(4), default=512, show_default=True, help="Side in pixels.")
@click.option("--mirror/--no-mirror", default=True, show_default=True, help="Append mirror images.")
@_writing
@friendly
def eg3d_ffhq(
    src: Path, dst: Path, crops: Path, landmarks: Path | None, labels: Path | None, size: int, mirror: bool, **o: Any
) -> None:
    """FFHQ as EG3D crops it: pictures in SRC, landmarks and crop parameters from files, to DST."""
    from facelab.data.eg3d_recipes import ffhq_items

    _write(dst, ffhq_items(src, crops, landmarks, labels, size), size, o, mirror=mirror)


@click.command("eg3d-afhq", cls=OneLineCommand)
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.option("--labels", type=PATH, required=True, help="dataset.json; bare 3x3 rotations are placed at radius 2.7.")
@click.option("--size", type=click.IntRange(4), default=512, show_default=True, help="Side in pixels.")
@click.option("--mirror/--no-mirror", default=True, show_default=True, help="Append mirror images.")
@_writing
@friendly
def eg3d_afhq(src: Path, dst: Path, labels: Path, size: int, mirror: bool, **o: Any) -> None:
    """AFHQ's pictures (the cats of its training part) in SRC with published cameras to DST."""
    from facelab.data.eg3d_cameras import CameraSource
    from facelab.data.eg3d_prepare import folder_items

    _write(dst, folder_items(src, CameraSource(labels)), size, o, mirror=mirror)


@click.command("eg3d-shapenet", cls=OneLineCommand)
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.option(
    "--pixels",
    type=FiniteFloat(1),
    default=512.0,
    show_default=True,
    help="Picture width that intrinsics.txt means.",
)
@click.option(
    "--convention", type=click.Choice(CONVENTIONS), default="opencv_c2w", show_default=True, help="Of the poses."
)
@click.option("--size", type=click.IntRange(4), default=128, show_default=True, help="Side in pixels.")
@_writing
@friendly
def eg3d_shapenet(src: Path, dst: Path, pixels: float, convention: str, size: int, **o: Any) -> None:
    """ShapeNet renders in SRC (OBJECT/rgb, OBJECT/pose, OBJECT/intrinsics.txt) to DST; not mirrored."""
    from facelab.data.eg3d_recipes import shapenet_items

    _write(dst, shapenet_items(src, pixels, convention), size, o)


def check_cameras_of(folder: Path, fast: bool, picture: Path | None, report_file: Path | None) -> int:
    """Check a set with cameras, say what was found, and return the number of problems."""
    import json

    from facelab.data.checking import check_set
    from facelab.data.checking_picture import draw_report
    from facelab.files import atomic_path
    from facelab.progress import progress_bar

    try:
        dataset = _open(folder)
    except UserError as error:
        damaged = [line for line in _unreadable(folder) if line != str(error)]
        click.echo("".join(f"problem: {line}\n" for line in damaged), nl=False)
        raise
    count = len(dataset.names)
    with progress_bar(total=count, unit="img", desc="looking", leave=False, show=not fast, delay=2.0) as bar:
        report = check_set(dataset, fast, bar.update)
    click.echo("\n".join([f"{folder}: {report.lines()[0]}", *report.lines()[1:]]))
    if report_file is not None:
        with atomic_path(report_file) as temporary:
            temporary.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
    if picture is not None:
        click.echo(f"picture: {draw_report(dataset, report, picture)}")
    return len(report.problems)


def _unreadable(folder: Path) -> list[str]:
    """What is said of each file that cannot be read out of a set that does not open; empty where there is no set."""
    from facelab.data.eg3d_store import open_store

    said = []
    try:
        store = open_store(folder)
        names = store.names()
    except UserError:
        return said
    for name in names:
        try:
            store.read(name)
        except UserError as error:
            said.append(str(error))
    return said


def has_cameras(path: Path) -> bool:
    """Whether ``path`` is a zip or a folder whose ``dataset.json`` states labels."""
    from facelab.data.eg3d_store import ZipStore, open_store, read_description

    if path.is_file() or not path.is_dir():
        return path.suffix.lower() == ".zip"
    store = open_store(path)
    if isinstance(store, ZipStore):
        return True
    if not (path / "dataset.json").is_file():
        return False
    return "labels" in (read_description(store, ["dataset.json"]) or {})


def _from_folder(src: Path, cameras: Path | None, masks: bool, limit: int | None, o: dict[str, Any]) -> list[Item]:
    from facelab.data.eg3d_cameras import CameraSource
    from facelab.data.eg3d_prepare import folder_items
    from facelab.data.eg3d_recipes import dataset_items

    if src.suffix.lower() == ".zip":
        fixed = ("cameras", "convention", "focal", "fov", "pixels", "radius")
        _unused(o | {"cameras": cameras}, "a zip, which states its own cameras; unpack it to change them", fixed)
        return dataset_items(_open(src, labels=not o["no_labels"]))[:limit]
    if cameras is None and (src / "dataset.json").is_file():
        cameras = src / "dataset.json"
    source = CameraSource(cameras, o["convention"], _focal(o["focal"], o["fov"]), o["pixels"])
    items = folder_items(src, None if o["no_labels"] else source, o["radius"], o["alpha"], limit)
    if masks and not (src / "masks").is_dir() and not (src / "celebahq_mask_mask").is_dir():
        raise UserError(f"--masks: {src} has no masks/ beside images/; expected PNG files of the pictures' names")
    return items


def _from_photos(src: str, dst: Path, size: int | None, o: dict[str, Any], finding: dict[str, Any]) -> None:
    """Photographs in a folder through the photo doctor."""
    for_crops = ("cameras", "convention", "focal", "fov", "pixels", "radius", "no_labels", "center_crop")
    _unused(o, "photographs (--camera-from), whose cameras are estimated", (*for_crops, "masks", "max_images"))
    if dst.suffix.lower() == ".zip":
        raise UserError(f"--camera-from writes a folder, got {dst}; name a folder (a zip can be made from it)")
    if src == SYNTHETIC:
        raise UserError("--camera-from takes photographs, and synthetic heads have cameras; leave it out")
    settings = finding | {"detector": finding["detector"] or "mtcnn", "mirror": o["mirror"], "size": size or 512}
    prepare_folder(Path(src), dst, overlays=None, workers=o["workers"], quiet=o["quiet"], force=False, **settings)


def _unused(options: dict[str, Any], what: str, names: tuple[str, ...]) -> None:
    """UserError if an option was given that would have no effect."""
    given = next((name for name in names if options[name]), None)
    if given:
        raise UserError(f"--{given.replace('_', '-')} has no effect on {what}; leave it out")


def _focal(focal: float | None, fov: float | None) -> float | None:
    import math

    if focal is not None and fov is not None:
        raise UserError("--focal and --fov say the same thing; give one of them")
    return focal if fov is None else 0.5 / math.tan(math.radians(fov) / 2)


def _open(path: Path, labels: bool = True) -> Any:
    """A set with its masks if it has one for every picture; without labels where it states none.

    Its pictures are for :meth:`~facelab.data.eg3d_dataset.Eg3dDataset.read_picture`: no size is looked up, so that a
    damaged first one stops nothing.
    """
    from facelab.data.eg3d_dataset import Eg3dDataset
    from facelab.data.eg3d_store import open_store, read_description, split_names

    store = open_store(path)
    files = store.names()
    names, partners = split_names(files)
    whole = bool(names) and len(partners) == len(names)
    stated = (read_description(store, files) or {}).get("labels") is not None
    return Eg3dDataset(path, 1, labels="required" if labels and stated else "none", masks=whole, cache="none")


def _write(dst: Path, items: list[Item], size: int | None, o: dict[str, Any], **options: Any) -> None:
    from facelab.data.eg3d_prepare import write_items

    encoding = {"compression": o["compression"], "workers": o["workers"], "progress": not o["quiet"]}
    report = write_items(dst, items, size=size, **encoding, **options)
    click.echo("\n".join([f"{dst}: {report.lines()[0]}", *report.lines()[1:]]))


COMMANDS = (eg3d, eg3d_mirror, eg3d_rebalance, eg3d_ffhq, eg3d_afhq, eg3d_shapenet)
