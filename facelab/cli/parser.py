# SPDX-License-Identifier: Apache-2.0
"""train_parser and ``prepare_data.py masks``: face parsing from training to masks, and how good the masks are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from facelab.cli.common import OneLineCommand, friendly, pick_device

if TYPE_CHECKING:
    from facelab.training.distributed import Distributed

FOLDER = click.Path(path_type=Path)
CURRICULA = "parser"  # folder of configs/


@click.command("train_parser", cls=OneLineCommand)
@click.option("--curriculum", default="synthetic", show_default=True, help="Name in configs/parser, or a YAML file.")
@click.option("--out", type=FOLDER, default=None, help="Run folder. [default: runs/parser/CURRICULUM]")
@click.option("--gpus", type=int, default=None, help="Number of GPUs of this machine, one process each.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default=None, help="[default: cuda if there is one]")
@click.option("--resume", default=None, help="'auto' = go on where the run folder stands; or a checkpoint.")
@click.option("--max-steps", type=int, default=None, help="Iterations in all (train.max_steps).")
@click.option("--seed", type=int, default=None, help="Seed of the run (train.seed).")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting; repeatable.")
@click.option("--allow-config-change", is_flag=True, help="Resume although settings differ.")
@friendly
def train_parser(
    curriculum: str,
    out: Path | None,
    gpus: int | None,
    device: str | None,
    resume: str | None,
    max_steps: int | None,
    seed: int | None,
    overrides: tuple[str, ...],
    allow_config_change: bool,
) -> None:
    """Train the small face parser on synthetic heads; writes parser.safetensors (fp16) beside its checkpoints.

    Measure it with: prepare_data.py masks IMAGES OUT --parser RUN/parser.safetensors --compare MASKS
    """
    from facelab.config import load_staged, resolve_curriculum, to_dict
    from facelab.methods.face_parser.config import FaceParserConfig
    from facelab.training.launch import launch

    named = {"train.max_steps": max_steps, "train.seed": seed}
    changes = [f"{key}={value}" for key, value in named.items() if value is not None]
    path = resolve_curriculum(CURRICULA, curriculum)
    staged = load_staged(FaceParserConfig, [path], [*changes, *overrides])
    run_dir = str(out or Path("runs") / "parser" / path.stem)
    raise SystemExit(launch(work, (to_dict(staged), run_dir, resume, allow_config_change), device=device, gpus=gpus))


def work(
    distributed: Distributed,
    config: dict[str, Any],
    run_dir: str,
    resume: str | None,
    allow_config_change: bool = False,
) -> int:
    """One process of a training run."""
    from facelab.config import from_dict
    from facelab.methods.face_parser.training import METHOD, ExportParser
    from facelab.training.loop import Trainer

    staged = from_dict(METHOD.config_type, config)
    trainer = Trainer(
        METHOD,
        staged,
        run_dir,
        distributed,
        [ExportParser()],
        resume=resume,
        allow_config_change=allow_config_change,
    )
    return trainer.run().exit_code


@click.command("masks", cls=OneLineCommand)
@click.argument("images", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option(
    "--parser",
    "parser_path",
    required=True,
    help="File of the parser: SofGAN's (20 classes), the popular BiSeNet (19 classes) or one of facelab's; "
    "or its name in the manifest (fenerf_parser).",
)
@click.option("--size", default=512, show_default=True, help="Short side of the masks; never above the picture's.")
@click.option("--batch", default=16, show_default=True, help="Pictures that go through the network together.")
@click.option("--device", default="auto", show_default=True, help="auto (cuda if there is one), cpu, cuda, cuda:1 ...")
@click.option("--workers", type=click.IntRange(1), default=4, show_default=True, help="Threads that read and write.")
@click.option("--compare", type=FOLDER, default=None, help="Folder of true masks: measure the overlap (IoU) with them.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@friendly
def masks(
    images: Path,
    out: Path,
    parser_path: str,
    size: int,
    batch: int,
    device: str,
    workers: int,
    compare: Path | None,
    quiet: bool,
) -> None:
    """Segmentation masks for the aligned portraits in IMAGES, as palette PNGs in OUT.

    Give the same command again after an interruption: masks that are done are kept. For training, join pictures and
    masks with 'prepare_data.py ffhq IMAGES OUT DST'.
    """
    from facelab.data.parsing import write_masks
    from facelab.errors import UserError

    if compare is not None and not compare.is_dir():
        raise UserError(f"no folder {compare}: expected true masks; check the path")
    report = write_masks(
        images,
        out,
        find_parser(parser_path),
        size=size,
        batch=batch,
        device=pick_device(device),
        workers=workers,
        progress=not quiet,
    )
    click.echo(f"{out}: {report.written} masks by {report.parser}, {report.kept} from earlier runs")
    if report.damaged:
        name, reason = next(iter(report.damaged.items()))
        click.echo(f"{len(report.damaged)} pictures could not be read, first: {name}: {reason}", err=True)
    if compare is not None:
        result = compare_masks(out, compare)
        for line in comparison_lines(result):
            click.echo(line)
        click.echo(json.dumps(result))


def find_parser(name_or_path: str) -> Path:
    """A file, or the file of a name in networks/manifest.yaml. UserError if it is neither."""
    from facelab import assets
    from facelab.errors import UserError, nearest

    path = Path(name_or_path)
    if path.is_file():
        return path
    names = assets.manifest()
    if name_or_path in names:
        return assets.find(name_or_path)
    raise UserError(
        f"no parser at {name_or_path}: expected a .pth or .safetensors file, or a name such as fenerf_parser."
        f"{nearest(name_or_path, names)}"
    )


def compare_masks(predicted: Path, truth: Path) -> dict[str, Any]:
    """Overlap of the masks of two folders, matched by name (an ending ``_mask`` is ignored).

    True masks of another size are brought to that of the predicted ones' partners: the prediction is resized to the
    truth by nearest neighbours, so that the truth is what is counted.

    Returns:
        ``pictures``, ``miou`` (mean over the classes that occur, pixels of the set pooled), ``miou_per_picture``
        (mean over pictures of the mean over classes in them), ``accuracy``, ``iou`` (class name -> IoU).

    Raises:
        UserError: no pair of masks.
    """
    import torch

    from facelab.data import reading
    from facelab.data.classes import CLASSES
    from facelab.data.transforms import resize_mask
    from facelab.errors import UserError
    from facelab.metrics.segmentation import OverlapMeter

    if not truth.is_dir():
        raise UserError(f"no folder {truth}: expected true masks; check the path")
    ours = {p.stem.removesuffix("_mask"): p for p in reading.list_images(predicted, recursive=True)}
    meter, right, pixels = OverlapMeter(), 0, 0
    for path in reading.list_images(truth, recursive=True):
        partner = ours.get(path.stem.removesuffix("_mask"))
        if partner is None or path.suffix.lower() != ".png":
            continue
        target = reading.read_mask(path)[0]
        mask = resize_mask(reading.read_mask(partner)[0], target.shape[1], target.shape[0])
        meter.add(torch.from_numpy(mask)[None], torch.from_numpy(target)[None])
        right, pixels = right + int((mask == target).sum()), pixels + target.size
    if not meter.pictures:
        raise UserError(f"no mask in {truth} belongs to one in {predicted}: expected equal names, or NAME_mask.png")
    per_class = meter.per_class()
    return {
        "pictures": meter.pictures,
        "miou": meter.mean(),
        "miou_per_picture": meter.mean_per_picture(),
        "accuracy": right / pixels,
        "iou": {name: float(v) for name, v in zip(CLASSES, per_class, strict=True) if not v.isnan()},
    }


def comparison_lines(result: dict[str, Any]) -> list[str]:
    """A comparison for a person."""
    rows = [f"  {name:<10s} {value:.3f}" for name, value in result["iou"].items()]
    head = (
        f"mIoU {result['miou']:.3f} over {len(rows)} classes, {result['miou_per_picture']:.3f} as a mean over "
        f"{result['pictures']} pictures, {100 * result['accuracy']:.1f} % of pixels right"
    )
    return [head, *rows]
