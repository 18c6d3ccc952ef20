# SPDX-License-Identifier: Apache-2.0
"""compute_metrics: numbers of a model as JSON and as a table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from facelab.cli.bars import Bar
from facelab.cli.common import OneLineCommand, device_option, friendly, open_model, pick_device
from facelab.cli.measure import OF_PICTURES, Request, Session
from facelab.errors import UserError, nearest
from facelab.option_types import FiniteFloat

METRICS = (
    *OF_PICTURES, "miou", "identity", "clip_score", "pose", "depth", "consistency", "segmentation", "regions"
)  # fmt: skip
INCEPTION = "inception_fid"  # entry of networks/manifest.yaml


ORIGINAL_METRICS = {  # of EG3D's original -> what it is here
    "fid50k_full": "fid with --num-images 50000",
    "fid50k": "fid with --num-images 50000",
    "kid50k_full": "kid with --num-images 50000",
    "kid50k": "kid with --num-images 50000",
    "pr50k3_full": "precision_recall with --num-images 50000",
    "pr50k3": "precision_recall with --num-images 50000",
}
INSTEAD = {  # flags of the originals that are not here: EG3D's, then pi-GAN's and FENeRF's
    "--network": "MODEL is the first argument, without a flag",
    "--mirror": "nothing, real pictures are never mirrored; leave it out",
    "--gpus": "--device; one GPU measures",
    "--verbose": "nothing; leave it out",
    "--dataset": "--data PATH",
    "--img_size": "--image-size",
    "--num_imgs": "--num-images",
    "--num_images": "--num-images",
    "--max_batch_size": "nothing, rendering goes in pieces that fit; leave it out",
    "--curriculum": "nothing, the configuration comes with the model; leave it out",
    "--real_image_dir": "--data PATH",
    "--generated_dir": "nothing, pictures are made in memory (scripts/render_images.py writes some); leave it out",
}


@click.command("compute_metrics", cls=OneLineCommand, instead=INSTEAD)
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--metrics", default="frechet_random", show_default=True, help=f"With commas: {', '.join(METRICS)}.")
@click.option(
    "--data", default=None, help="Real pictures: PATH or 'synthetic'. [default: what the model was trained on]"
)
@click.option("--num-images", type=click.IntRange(2), default=2048, show_default=True, help="Generated pictures.")
@click.option("--num-real", type=click.IntRange(2), default=None, help="Real pictures. [default: as --num-images]")
@click.option(
    "--image-size",
    type=click.IntRange(2),
    default=None,
    help="Pixels, picture distances. [default: 128; EG3D: its own]",
)
@click.option(
    "--geometry-size", type=click.IntRange(4), default=None, help="Pixels, depth and consistency. [default: as trained]"
)
@click.option(
    "--ray-step-multiplier",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Factor on the samples per ray of training.",
)
@click.option(
    "--psi",
    "--truncation",
    "psi",
    type=FiniteFloat(-100, 100),
    default=1.0,
    show_default=True,
    help="1 = full variety, 0 = average.",
)
@click.option(
    "--inception", type=click.Path(path_type=Path), default=None, help="The FID Inception weights, for fid and kid."
)
@click.option(
    "--vgg",
    type=click.Path(path_type=Path),
    default=None,
    help="VGG16 weights (torchvision's names), precision_recall.",
)
@click.option(
    "--arcface", type=click.Path(path_type=Path), default=None, help="ArcFace weights (model_ir_se50.pth), identity."
)
@click.option(
    "--clip",
    type=click.Path(path_type=Path),
    default=None,
    help="CLIP: open_clip file or CLIPModel folder, clip_score.",
)
@click.option("--prompt", default=None, help="clip_score: what the heads should look like.")
@click.option(
    "--fid-resize",
    type=click.Choice(["pytorch-fid", "clean"]),
    default="pytorch-fid",
    show_default=True,
    help="How pictures come to 299 px.",
)
@click.option(
    "--kernel-subsets",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Subsets of up to 1000, kid and kernel_random.",
)
@click.option(
    "--kind",
    type=click.Choice(["present", "original"]),
    default="present",
    show_default=True,
    help="miou: over the classes that occur, or FENeRF's own.",
)
@click.option("--classes", type=click.IntRange(2, 255), default=19, show_default=True, help="miou: number of classes.")
@click.option("--predictions", type=click.Path(path_type=Path), default=None, help="miou: folder of masks (PNG).")
@click.option(
    "--targets", type=click.Path(path_type=Path), default=None, help="miou: folder of masks of the same names."
)
@click.option(
    "--depth-heads",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="depth, segmentation: held-out synthetic heads.",
)
@click.option(
    "--depth-candidates",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="depth, segmentation: generated heads to choose from; consistency: heads.",
)
@click.option(
    "--parser", type=click.Path(path_type=Path), default=None, help="A face parser (file or bundled), segmentation."
)
@click.option(
    "--region-heads", type=click.IntRange(1), default=16, show_default=True, help="regions: heads that are edited."
)
@click.option(
    "--change-threshold",
    type=FiniteFloat(0, 255),
    default=8.0,
    show_default=True,
    help="regions: levels of 255 by which a pixel must differ to count as changed.",
)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Pictures at a time.")
@click.option(
    "--max-points", type=click.IntRange(1), default=2_400_000, show_default=True, help="Field evaluations at a time."
)
@click.option("--weights", default=None, help="ema, ema_slow or generator. [default: ema]")
@click.option("--seed", default=0, show_default=True, help="Of heads, cameras and subsets.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("metrics.json"), show_default=True, help="JSON file."
)
@device_option
@friendly
def compute_metrics(
    model: Path | None, metrics: str, weights: str | None, out: Path, device: str, **options: Any
) -> None:
    """Measure MODEL: a run folder, a checkpoint, a .safetensors model or the name of a bundled one.

    \b
    fid, kid        need --inception FILE
    frechet_random  the same distance on the fixed random network random-conv-v1; no FID, compares our models only
    precision_recall, precision_recall_random   of nearest neighbours: with --vgg FILE, or on the random network
    identity        needs --arcface FILE: is a head the same person from two random cameras?
    clip_score      needs --clip FILE --prompt TEXT: does a head fit the prompt, seen from two random cameras?
    pose            read off held-out synthetic heads and generated ones: by the model's image discriminator, or
                    (EG3D, StyleSDF, CNeRF) by a reader fitted on synthetic heads
    depth           of the generated heads that look most like held-out synthetic ones, same camera
    consistency     depth of generated heads carried from one view to another
    segmentation    of the generated segmentation: overlap with what --parser sees in the picture, and with the truth
                    of held-out synthetic heads that look alike
    regions         one region at a time takes another head's codes: share of the changed pixels outside it (cnerf)
    miou            of two folders of masks (--predictions, --targets); needs no MODEL
    """
    request = Request(metrics=parse_metrics(metrics), **options)
    result = evaluate(model, request, device, weights)
    write_json(out, result)
    click.echo(table(result["metrics"]))
    click.echo(f"written: {out}")


def parse_metrics(text: str) -> tuple[str, ...]:
    """``"fid,pose"`` -> names of :data:`METRICS`, each once. UserError with the nearest name otherwise."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name in ORIGINAL_METRICS:
            raise UserError(f"{name} is a metric of the original; here: {ORIGINAL_METRICS[name]}")
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}, expected some of {', '.join(METRICS)}.{nearest(name, METRICS)}")
    if not names:
        raise UserError(f"no metric chosen, expected some of {', '.join(METRICS)}")
    return names


def evaluate(model: Path | None, request: Request, device: str = "auto", weights: str | None = None) -> dict[str, Any]:
    """Everything that ``metrics.json`` holds. What can be refused is refused before anything is computed."""
    inception = inception_file(request) if {"fid", "kid"} & set(request.metrics) else None
    if "miou" in request.metrics:
        check_mask_folders(request)
    check_weight_files(request)
    session = None
    if set(request.metrics) - {"miou"}:
        if model is None:
            raise UserError(f"--metrics {','.join(request.metrics)} needs a MODEL; only miou works without one")
        session = Session(open_model(model, pick_device(device), weights), request, inception, weights)
    found: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    parts: list[tuple[str, tuple[str, ...], Callable[[], dict[str, Any]]]] = [
        ("miou", ("miou",), lambda: mask_overlap(request))
    ]
    if session is not None:
        parts += [
            ("pictures", OF_PICTURES, session.pictures),
            ("identity", ("identity",), session.identity),
            ("clip_score", ("clip_score",), session.clip_score),
            ("pose", ("pose",), session.pose),
            ("depth", ("depth",), session.depth),
            ("consistency", ("consistency",), session.consistency),
            ("segmentation", ("segmentation",), session.segmentation),
            ("regions", ("regions",), session.regions),
        ]
    for name, metrics, measure in parts:
        if set(metrics) & set(request.metrics):
            begin = time.perf_counter()
            found |= measure()
            seconds[name] = round(time.perf_counter() - begin, 2)
    result: dict[str, Any] = {"metrics": {name: found[name] for name in request.metrics}, "seconds": seconds}
    if session is not None:
        result |= session.describe()
    return {**result, "versions": versions(None if session is None else session.model.device)}


def inception_file(request: Request) -> Path:
    """The Inception weights: as named, or where weight files lie. UserError says which file and where to get it."""
    from facelab import assets

    try:
        return assets.find(INCEPTION, request.inception)
    except UserError as error:
        raise UserError(
            f"fid and kid need --inception FILE: {error}; frechet_random and kernel_random work without"
        ) from error


def check_weight_files(request: Request) -> None:
    """UserError unless the networks that were asked for have their files."""
    for metric, option, path, what, instead in (
        ("precision_recall", "--vgg", request.vgg, "VGG16", "; precision_recall_random works without"),
        ("identity", "--arcface", request.arcface, "ArcFace (model_ir_se50.pth)", ""),
    ):
        if metric in request.metrics and (path is None or not path.is_file()):
            got = "none was given" if path is None else f"there is no file {path}"
            raise UserError(f"{metric} needs {option} FILE with the weights of {what}, {got}{instead}")
    if "clip_score" in request.metrics and (request.clip is None or not (request.prompt or "").strip()):
        lacking = "--clip" if request.clip is None else "--prompt"
        raise UserError(
            f"clip_score needs --clip FILE (open_clip's or a CLIPModel folder) and --prompt TEXT, got no {lacking}"
        )


def check_mask_folders(request: Request) -> None:
    """UserError unless ``--predictions`` and ``--targets`` are given."""
    if request.predictions is None or request.targets is None:
        raise UserError(
            "miou compares two folders of masks: expected --predictions DIR --targets DIR "
            f"({'--targets' if request.predictions else '--predictions'} is missing); for generated heads see segmentation"
        )


def mask_overlap(request: Request) -> dict[str, Any]:
    """miou of the masks of two folders, paired by file name.

    Raises:
        UserError: a missing or empty folder, a mask without a partner, sizes that differ, a damaged mask.
    """
    import torch

    from facelab.data import reading
    from facelab.data.classes import CLASSES, NUM_CLASSES
    from facelab.metrics.segmentation import OverlapMeter

    assert request.predictions is not None and request.targets is not None
    first, second = (_masks(folder) for folder in (request.predictions, request.targets))
    lonely = sorted(set(first) ^ set(second))
    if lonely:
        raise UserError(
            f"every mask needs one of the same name in the other folder: {lonely[0]} stands in "
            f"{request.predictions if lonely[0] in first else request.targets} only ({len(lonely)} such masks)"
        )
    meter = OverlapMeter(request.classes)
    with Bar(len(first), "masks") as tick:
        for name, path in first.items():
            maps = [reading.read_mask(p, request.classes)[0] for p in (path, second[name])]
            if maps[0].shape != maps[1].shape:
                sizes = " and ".join(f"{m.shape[1]}x{m.shape[0]}" for m in maps)
                raise UserError(f"masks of {name} must have one size, got {sizes}; resize them (nearest) first")
            meter.add(*(torch.from_numpy(m.copy())[None] for m in maps))
            tick(1)
    labels = CLASSES if request.classes == NUM_CLASSES else [str(i) for i in range(request.classes)]
    shares = zip(labels, meter.per_class().tolist(), strict=True)
    return {
        "miou": {
            "value": meter.mean_per_picture(request.kind),  # type: ignore[arg-type]
            "kind": request.kind,
            "pooled": meter.mean(),
            "per_class": {label: None if share != share else share for label, share in shares},
            "count": meter.pictures,
            "predictions": str(request.predictions),
            "targets": str(request.targets),
        }
    }


def _masks(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"no folder of masks at {folder}: expected PNG files of class numbers; check the path")
    found = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() == ".png"}
    if not found:
        raise UserError(f"no masks in {folder}: expected PNG files of class numbers, got none; check the path")
    return found


def versions(device: Any) -> dict[str, str]:
    """What computed the numbers."""
    import platform

    import numpy
    import torch

    import facelab

    name = "cpu" if device is None or device.type == "cpu" else torch.cuda.get_device_name(device)
    found = {"facelab": facelab.__version__, "torch": torch.__version__, "numpy": numpy.__version__}
    return {**found, "python": platform.python_version(), "device": name}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all. UserError if it cannot be written."""
    from facelab.files import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


NOT_TOLD = ("per_class", "edits")  # in the file, not in the table


def rows(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value with unit) of every number worth a line; nested ones are ``pose.held_out.mean_yaw``."""
    found: list[tuple[str, str]] = []
    for name, values in metrics.items():
        found += _rows_of(name, values, f" {values['unit']}" if "unit" in values else "")
    return found


def _rows_of(name: str, values: dict[str, Any], unit: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += [] if key in NOT_TOLD else _rows_of(f"{name}.{key}", value, unit)
        elif isinstance(value, (int, float)) or value is None:
            found.append((name if key == "value" else f"{name}.{key}", _number(key, value, unit)))
    return found


def _number(key: str, value: float | int | None, unit: str) -> str:
    if value is None:
        return "not defined"
    plain = (
        isinstance(value, int)
        or key.startswith(("correlation", "compared", "hidden", "yaw_between"))
        or "_share" in key
    )
    return f"{value:.5g}" + ("" if plain or key == "mask_iou" else unit)


def table(metrics: dict[str, Any]) -> str:
    """The numbers as two columns."""
    lines = rows(metrics)
    width = max(len(name) for name, _ in lines)
    notes = [f"note: {name}: {values['note']}" for name, values in metrics.items() if "note" in values]
    return "\n".join([*(f"{name:{width}s}  {value}" for name, value in lines), *notes])
