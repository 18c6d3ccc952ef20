# SPDX-License-Identifier: Apache-2.0
"""export_model: a run as one file that opens everywhere and that training can start from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from facelab.cli.common import OneLineCommand, friendly
from facelab.errors import UserError
from facelab.option_types import FiniteFloat

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("fp32", "fp16", "bf16")
MB = 1_000_000
PER_TENSOR = 160  # bytes of a safetensors header for each tensor: name, shape, offsets


@click.command("export_model", cls=OneLineCommand)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(DTYPES), default="fp16", show_default=True, help="Of the weights.")
@click.option(
    "--with-discriminators", is_flag=True, help="Also the discriminators, so that training can go on from it."
)
@click.option("--weights", default="ema", show_default=True, help="The generator's: ema, ema_slow or generator.")
@click.option(
    "--max-mb",
    type=FiniteFloat(min=0),
    default=None,
    help="Refuse a larger file, megabytes of 10^6 bytes. [default: no limit]",
)
@click.option("--mirror-depth", is_flag=True, help="Turn a hollow face inside out (see docs/fenerf.md).")
@friendly
def export_command(
    run: Path, out: Path, dtype: str, with_discriminators: bool, weights: str, max_mb: float | None, mirror_depth: bool
) -> None:
    """Write the newest checkpoint of RUN (a folder or one of its checkpoints) to OUT.safetensors."""
    from facelab.checkpoints.format import load_model

    path = export(run, out, dtype, with_discriminators, weights, max_mb, mirror_depth)
    change = load_model(path).meta["exported"].get("picture_change")  # type: ignore[attr-defined]
    said = "" if change is None else f", {dtype} changes colours by {100 * change:.2g} % of their range on average"
    click.echo(f"written: {path} ({path.stat().st_size / MB:.2f} MB{said})")


def export(
    run: str | Path,
    out: str | Path,
    dtype: str = "fp16",
    with_discriminators: bool = False,
    weights: str = "ema",
    max_mb: float | None = None,
    mirror_depth: bool = False,
) -> Path:
    """Write a single-file model of a run.

    It holds the averaged generator as ``ema`` (whichever of the run's generators was chosen) and, on request, every
    discriminator. Its ``config`` is that in force at the checkpoint's step; ``staged_config`` is the whole curriculum, with
    its list of stages; ``training`` says how long it took, by the run's ``log.jsonl``; ``exported`` what rounding
    the weights does to pictures, see :func:`picture_change`.

    Raises:
        UserError: no checkpoint, no such weights, a value that is not finite (or too large for ``dtype``), a file
            above ``max_mb``. Nothing is written then.
    """
    from facelab.api import locate
    from facelab.checkpoints.format import export_model, find_checkpoint, load_checkpoint
    from facelab.config import from_dict, to_dict
    from facelab.methods import load_method

    target = Path(out)
    target = target if target.suffix == ".safetensors" else target.with_name(target.name + ".safetensors")
    found = find_checkpoint(locate(run, own=True))
    stored = load_checkpoint(found, with_state=False)
    if weights not in stored.weights:
        has = ", ".join(sorted(name for name in stored.weights if not is_discriminator(name)))
        raise UserError(f"{run} has no weights '{weights}' to export, it has {has or 'no generator at all'}")
    groups: dict[str, Mapping[str, Tensor]] = {"ema": stored.weights[weights]}
    if with_discriminators:
        judges = {name: state for name, state in stored.weights.items() if is_discriminator(name)}
        if not judges:
            raise UserError(f"{run} holds no discriminators, only {', '.join(sorted(stored.weights))}")
        groups |= judges
    method = load_method(str(stored.meta.get("method", "")))
    described = stored.meta.get("staged_config") or stored.meta["config"]
    staged = from_dict(method.config_type, described, where=str(found))  # type: ignore[arg-type]
    config = staged.at(stored.step, int(stored.meta.get("images", 0)))  # type: ignore[call-overload]
    if mirror_depth:
        groups = _mirrored(groups, method.generator_config(config).field)
    kind = _dtype(dtype)
    about: dict[str, Any] = {"weights": weights, "dtype": dtype}
    if mirror_depth:
        about["mirrored_depth"] = True
    if dtype != "fp32":
        about["picture_change"] = picture_change(method, config, groups["ema"], kind)
    meta = {**stored.meta, "config": to_dict(config), "exported": about}
    if len(staged.stages) > 1:
        meta["staged_config"] = to_dict(staged)
    timing = training_time(found, stored.step)
    if timing is not None:
        meta["training"] = timing
    if max_mb is not None:
        _check_size(groups, meta, kind, max_mb, target)
    return export_model(target, groups, meta, kind)


def is_discriminator(name: str) -> bool:
    """Whether a network of a run judges pictures, by its name."""
    return name == "discriminator" or name.startswith("d_")


def _mirrored(groups: Mapping[str, Mapping[str, Tensor]], field: Any) -> dict[str, Mapping[str, Tensor]]:
    """The weights with depth turned inside out, pose heads with them; the code averages stay as they are."""
    from facelab.bases.pigan.hollow import mirror_depth_of_field, mirror_pose_head
    from facelab.fields.siren import SirenConfig

    if not isinstance(field, SirenConfig):
        raise UserError("--mirror-depth turns the fields of pi-GAN and FENeRF inside out, this model has another kind")
    try:
        generator = mirror_depth_of_field(groups["ema"], field)
    except ValueError as error:
        raise UserError(f"--mirror-depth: {error}") from error
    judges = {name: mirror_pose_head(state) for name, state in groups.items() if is_discriminator(name)}
    return {"ema": generator, **judges}


def picture_change(method: Any, config: Any, state: Mapping[str, Tensor], dtype: Any) -> float | None:
    """What rounding the weights to ``dtype`` does to pictures: mean |difference| of colours in 0..1.

    Two frontal heads of seed 0 and 1 at psi 1 and at most 32 px; None where the rounded weights give no finite
    picture (they are refused when the file is written).
    """
    from facelab.api import FaceModel

    def picture(rounded: bool) -> Tensor:
        generator = method.build_generator(config)
        kept = {k: v.to(dtype) if rounded and v.is_floating_point() else v for k, v in state.items()}
        generator.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in kept.items()})
        model = FaceModel(method, generator.eval().requires_grad_(False), config, {}, Path())
        settings = model.settings(min(32, config.render.resolution), 1).deterministic()
        return model.sample([0, 1], truncation=1.0, settings=settings, fill=False).rgb

    change = float((picture(False) - picture(True)).abs().mean()) / 2
    return change if math.isfinite(change) else None


def training_time(checkpoint: Path, step: int) -> dict[str, float | int] | None:
    """Wall time of the training loop up to a step, from the ``log.jsonl`` of the checkpoint's run.

    Returns:
        ``seconds``, ``steps`` that they cover (fewer than ``step`` if the log begins later), ``processes``;
        None without a log.
    """
    log = checkpoint.parent.parent / "log.jsonl"
    if not checkpoint.is_dir() or not log.is_file():
        return None
    seconds, covered, before = 0.0, 0, 0
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            here, each = int(entry["step"]), float(entry["seconds_per_step"])
        except (ValueError, KeyError, TypeError):
            continue  # half a line of a killed run, or one of a callback
        if before < here <= step:
            seconds += (here - before) * each
            covered += here - before
            before = here
    return {"seconds": round(seconds, 1), "steps": covered, "processes": _processes(checkpoint)} if covered else None


def _processes(checkpoint: Path) -> int:
    """How many processes trained, by the checkpoint's state."""
    from facelab.checkpoints.format import load_checkpoint

    state = load_checkpoint(checkpoint, groups=()).state
    position = state.get("position", {}) if isinstance(state, Mapping) else {}
    return int(position.get("processes", 1))


def _dtype(name: str) -> Any:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def _check_size(
    groups: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any], dtype: Any, max_mb: float, target: Path
) -> None:
    """UserError, naming the largest part, if the file would be above ``max_mb``; the header is estimated."""
    sizes = {
        name: sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in state.values())
        for name, state in groups.items()
    }
    header = len(json.dumps(json.dumps(meta))) + PER_TENSOR * sum(map(len, groups.values()))
    total = (sum(sizes.values()) + header) / MB
    if total > max_mb:
        largest = max(sizes, key=sizes.__getitem__)
        raise UserError(
            f"{target} would have {total:.2f} MB, expected at most {max_mb:g}; its largest part is {largest} with "
            f"{sizes[largest] / MB:.2f} MB; use --dtype fp16, or train a smaller model"
        )
