# SPDX-License-Identifier: Apache-2.0
"""model_card: what a bundled model is, how it was made and what it measures, from the file and the numbers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from facelab.assets import find_bundled
from facelab.cli.common import OneLineCommand, friendly
from facelab.cli.sight import sight_of
from facelab.errors import UserError, an

MB = 1_000_000
LICENCE = (
    "Apache-2.0. Trained on synthetic heads only: they are computed by facelab, no picture of a real person was used."
)


@click.command("model_card", cls=OneLineCommand)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--metrics", type=click.Path(path_type=Path), default=None, help="JSON of compute_metrics.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="[default: MODEL with the ending .md]")
@click.option("--name", default=None, help="Title. [default: the file's name]")
@click.option("--command", default=None, help="How it was trained. [default: derived from its configuration]")
@click.option("--hardware", default=None, help="What it was trained on, for example '1 x NVIDIA H200'.")
@click.option("--note", "notes", multiple=True, help="A further line under 'Limits'; repeatable.")
@friendly
def card_command(
    model: Path,
    metrics: Path | None,
    out: Path | None,
    name: str | None,
    command: str | None,
    hardware: str | None,
    notes: tuple[str, ...],
) -> None:
    """Write the card of MODEL, an exported .safetensors file or a run folder."""
    from facelab.files import atomic_path

    target = out or (model.with_suffix(".md") if model.suffix == ".safetensors" else model / "model_card.md")
    text = model_card(model, read_metrics(metrics), name, command, hardware, notes)
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    click.echo(f"written: {target}")


def read_metrics(path: Path | None) -> dict[str, Any] | None:
    """The content of a ``metrics.json``. UserError if it is none."""
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["metrics"], dict):
            raise ValueError("'metrics' is no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected a JSON file of compute_metrics, got {error}; compute the metrics again"
        ) from error
    return content


def model_card(
    path: Path,
    metrics: Mapping[str, Any] | None = None,
    name: str | None = None,
    command: str | None = None,
    hardware: str | None = None,
    notes: tuple[str, ...] = (),
) -> str:
    """The card as Markdown.

    Raises:
        UserError: no model there, or metrics of another method or step.
    """
    from facelab.api import locate
    from facelab.checkpoints.format import find_checkpoint, load_checkpoint
    from facelab.cli.export import training_time
    from facelab.config import from_dict
    from facelab.methods import load_method

    found = find_checkpoint(locate(path, own=True))
    stored = load_checkpoint(found, with_state=False)
    meta: dict[str, Any] = dict(stored.meta)
    method = load_method(str(meta.get("method", "")))
    staged = from_dict(method.config_type, meta.get("staged_config") or meta["config"], where=str(path))
    if metrics is not None:
        _check_same_model(metrics, meta, path)
    timing = meta.get("training") or training_time(found, stored.step)
    config = staged.at(stored.step, int(meta.get("images", 0)))
    title = name or path.stem
    parts = [
        f"# {title}",
        _opening(str(meta["method"]), config, converted=bool(meta.get("origin"))),
        "## Training",
        f"```text\n{command or _made_with(meta, staged, path)}\n```",
        _bullets(_training_facts(meta, staged, stored.step, timing, hardware)),
        "## Parts",
        _table(("network", "parameters", "type"), _parameters(stored.weights)),
        *_file_facts(found, meta),
        "## Measured",
        *_measured(metrics),
        "## Limits",
        _bullets([*_limits(config, metrics, converted=bool(meta.get("origin"))), *notes]),
        "## Licence",
        _licence(config, meta),
    ]
    return "\n\n".join(parts) + "\n"


def _opening(method: str, config: Any, converted: bool) -> str:
    if converted:
        return f"{an(method).capitalize()} model, converted for facelab."
    size = sight_of(config).picture_size or config.render.resolution
    return f"{an(method).capitalize()} model for {size} px pictures, made with facelab."


def training_command(meta: Mapping[str, Any], staged: Any) -> str:
    """The command that gives this configuration: the curriculum, and ``--set`` for what differs from it.

    A start from other weights is told where the checkpoint's ``init_from`` says so.
    """
    from facelab.config import diff, load_staged, resolve_curriculum

    start = f"python scripts/train_{meta['method']}.py"
    curriculum = str(meta.get("curriculum", ""))
    origin = f" --init-from {meta['init_from']}" if meta.get("init_from") else ""
    try:
        plain = load_staged(staged.schema, [resolve_curriculum(str(meta["method"]), curriculum)])
    except UserError:
        return f"{start} --curriculum {curriculum or 'FILE'}{origin}  # a curriculum that is not among facelab's"
    named = {"train.max_steps": "--max-steps", "train.seed": "--seed", "data.path": "--data"}
    words = [f"--curriculum {curriculum}{origin}"]
    changes = {key: value for key, _, value in diff(plain, staged)}
    if meta.get("step") != staged.stages[-1].train.max_steps:
        changes["train.max_steps"] = meta.get("step")  # stopped before its end
    for key, value in changes.items():
        text = "null" if value is None else json.dumps(value) if isinstance(value, (bool, list, dict)) else str(value)
        words.append(f"{named[key]} {text}" if key in named else f"--set '{key}={text}'")
    return " ".join([start, *words])


def _made_with(meta: Mapping[str, Any], staged: Any, path: Path) -> str:
    """The command that this model came from: training, or the conversion of another program's file."""
    if not meta.get("origin"):
        return training_command(meta, staged)
    curriculum = f" --curriculum {meta['curriculum']}" if meta.get("curriculum") else ""
    return f"python scripts/convert_checkpoint.py {meta['method']} {_origin_file(meta)} {path.name}{curriculum}"


def _origin_file(meta: Mapping[str, Any]) -> str:
    origin = meta["origin"]
    return str(origin.get("file", "FILE")) if isinstance(origin, Mapping) else str(origin)


def _training_facts(
    meta: Mapping[str, Any], staged: Any, step: int, timing: Mapping[str, Any] | None, hardware: str | None
) -> list[str]:
    if meta.get("origin"):
        facts = [
            f"Trained by another program: converted from {_origin_file(meta)}, which does not say on what pictures",
            f"Steps: {step or 'not stated'}",
        ]
        if meta.get("curriculum"):
            facts.append(f"Cameras and rendering are set as in the curriculum {meta['curriculum']}")
        return [*facts, *([f"Hardware: {hardware}"] if hardware else [])]
    config = staged.at(step, int(meta.get("images", 0)))
    sight, data = sight_of(config), config.data
    prior = sight.prior
    if data.path:
        recipe = "Data: pictures given by --data"
    else:
        yaw_std, pitch_std = sight.heads_std or (prior.yaw_std, prior.pitch_std)
        recipe = (
            f"Data: {data.heads} synthetic heads of seed {config.train.seed} (facelab.data.synthetic), cameras with standard "
            f"deviations of {yaw_std} (yaw) and {pitch_std} (pitch) radians, {sight.fov:g} degrees field of view, "
            f"{sight.heads_background} background"
        )
    facts = [recipe, f"Steps: {step}; pictures seen: {meta.get('images', 'not stated')}"]
    reached = staged.stage_index(step, int(meta.get("images", 0))) + 1
    starts = [
        f"{row.render.resolution} px from {'step' if staged.unit == 'from_step' else 'image'} {at}"
        for at, row in zip(staged.boundaries[:reached], staged.stages[:reached], strict=True)
    ]
    stages = "Stages" if sight.picture_size is None else "Side of the rendering"
    facts.append(f"{stages}: {', '.join(starts)}")
    if timing is not None:
        minutes = timing["seconds"] * timing["processes"] / 60
        what = f"{timing['processes']} process{'es' if timing['processes'] != 1 else ''}"
        share = "" if timing["steps"] == step else f" (the log covers {timing['steps']} of {step} steps)"
        facts.append(f"Time: {minutes:.1f} device minutes, wall time of the training loop times {what}{share}")
    if hardware:
        facts.append(f"Hardware: {hardware}")
    switches = [entry["switch"] for entry in meta.get("deviations", [])]
    if switches:
        facts.append(f"Deviations from the original, named by the switches that would undo them: {', '.join(switches)}")
    return facts


def _parameters(weights: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Parameters per network; stored averages of codes are no parameters."""
    found = []
    for name, state in weights.items():
        trained = [tensor for key, tensor in state.items() if not key.startswith("average_")]
        kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in trained})
        found.append((name, f"{sum(t.numel() for t in trained):,}", ", ".join(kinds)))
    return found


def _file_facts(found: Path, meta: Mapping[str, Any]) -> list[str]:
    """Size of a single-file model and what its number format costs; nothing for a run folder."""
    if not found.is_file():
        return []
    facts = f"File: {found.stat().st_size / MB:.2f} MB (10^6 bytes)."
    exported = meta.get("exported") or {}
    if exported.get("picture_change") is not None:
        facts += (
            f" Rounding the weights to {exported['dtype']} changes colours by {100 * exported['picture_change']:.2g} % "
            "of their range on average (two heads, 32 px or less)."
        )
    return [facts]


def _check_same_model(metrics: Mapping[str, Any], meta: Mapping[str, Any], path: Path) -> None:
    """The numbers must be of this method and step; a file may have another name by now."""
    measured = metrics.get("model") or {}
    for key in ("method", "step", "images"):
        if measured.get(key) != meta.get(key):
            raise UserError(
                f"the metrics are of another model: {key} {measured.get(key)!r}, but {path} has {meta.get(key)!r}; "
                "compute them from this file"
            )


def _measured(metrics: Mapping[str, Any] | None) -> list[str]:
    from facelab.cli.metrics import rows

    if metrics is None:
        return ["Nothing was measured."]
    settings = metrics.get("settings", {})
    told = [f"{key.replace('_', ' ')} {settings[key]}" for key in ("num_images", "psi", "seed") if key in settings]
    how = (
        f"`scripts/compute_metrics.py`: {', '.join(told)}; data: {metrics.get('data', {}).get('source', 'not stated')}."
    )
    lines = [how, _table(("measure", "value"), rows(metrics["metrics"]))]
    for name, values in metrics["metrics"].items():
        said = [f"features `{values['features']}`"] if "features" in values else []
        said += [str(values[key]) for key in ("note", "definition") if key in values]
        if said:
            lines.append(f"`{name}`: {'; '.join(said)}")
    return lines


def _limits(config: Any, metrics: Mapping[str, Any] | None, converted: bool) -> list[str]:
    sight = sight_of(config)
    prior = sight.prior
    limits = [
        f"Trained at {config.render.resolution} px; larger pictures show the same detail with smoother edges."
        if sight.picture_size is None
        else f"Pictures have {sight.picture_size} pixels a side, no other size.",
        f"Views beyond about {2 * prior.yaw_std:.2f} radians of yaw or {2 * prior.pitch_std:.2f} of pitch from the mean pose "
        "(two standard deviations) were rarely seen in training.",
    ]
    if converted:  # what stands in its configuration is what facelab would train with
        limits = [] if sight.picture_size is None else limits[:1]
        limits.append("What it was trained on is not recorded, nor from which views.")
    elif not config.data.path:
        limits.append("It knows computed heads only: photographs of people are outside of what it has learnt.")
    if metrics is not None and "frechet_random" in metrics["metrics"]:
        limits.append(
            "frechet_random uses a network with random weights: it is no FID and comparable with itself only."
        )
    return limits


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _licence(config: Any, meta: Mapping[str, Any]) -> str:
    if meta.get("origin"):
        return f"Not stated: that of the file it was converted from, {_origin_file(meta)}, decides."
    if config.data.path:
        return "Not stated: the licence of the training pictures decides."
    if meta.get("init_from") and find_bundled(meta["init_from"]) is None:
        return f"Not stated: training began with the weights of {meta['init_from']}, whose licence decides."
    return LICENCE


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *lines])
