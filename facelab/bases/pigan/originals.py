# SPDX-License-Identifier: Apache-2.0
"""Released pi-GAN and FENeRF generators: pickled modules beside pickled averages, read without running them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from facelab.bases.pigan.convert import derive_config, from_original
from facelab.bases.pigan.model import SirenGenerator, SirenGeneratorConfig
from facelab.bases.pigan.variants import FENERF_VARIANTS, PIGAN_VARIANTS
from facelab.checkpoints.legacy_modules import (
    attributes,
    find_average,
    find_state_dicts,
    is_module,
    module_classes,
    module_state,
    trainable_state,
    zip_ema,
)
from facelab.checkpoints.legacy_pickle import LegacyObject, read_pickle_checkpoint
from facelab.errors import UserError

CURRICULA = {"fenerf": "celebamask_hq_128", "pigan": "celeba", "TALLSIREN": "carla"}


@dataclass(frozen=True)
class RawGenerator:
    """What an original file holds, in its own key names.

    Attributes:
        states: ``generator`` and, where averages were found, ``ema``: original key -> tensor.
        class_name: class of the field, None for bare state dicts.
        attributes: what the original stored beside the weights (step, epoch ...).
        notes: lines for the user about the averages.
    """

    states: dict[str, Mapping[str, Tensor]]
    class_name: str | None = None
    attributes: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def converted(self, name: str) -> dict[str, Tensor]:
        """One of the states in our key names."""
        return from_original(self.states[name])


@dataclass(frozen=True)
class Original:
    """A converted generator.

    Attributes:
        method: ``pigan`` or ``fenerf``.
        model: ``model`` section of its configuration.
        weights: ``generator`` and, where averages were found, ``ema``; our key names, with stored averages
            of the mapping networks.
        meta: method, curriculum (whose settings it keeps), step, origin.
        notes: lines for the user: what was found.
    """

    method: str
    model: dict[str, Any]
    weights: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_raw(path: str | Path, ema: str | Path | None = None) -> RawGenerator:
    """Read a pickled generator (or a state dict) and, if given, its pickled averages. UserError, one line."""
    path = Path(path)
    tree = read_pickle_checkpoint(path)
    extra: Mapping[str, object] = {}
    class_name = None
    if isinstance(tree, LegacyObject) and is_module(tree):
        extra = attributes(tree)
        state, order = module_state(tree), trainable_state(tree)
        names = [c.rpartition(".")[2] for c in module_classes(tree).values()]
        class_name = next((n for n in names if n in PIGAN_VARIANTS | FENERF_VARIANTS), None)
    else:
        found = find_state_dicts(tree)
        if "" not in found:
            got = ", ".join(found) or (tree.class_name if isinstance(tree, LegacyObject) else type(tree).__name__)
            raise UserError(f"{path}: expected a generator (a pickled module or a state dict), got {got}")
        state = order = found[""]
    states: dict[str, Mapping[str, Tensor]] = {"generator": state}
    if ema is None:
        return RawGenerator(states, class_name, extra)
    average = find_average(read_pickle_checkpoint(ema))
    if average is None:
        raise UserError(f"{ema}: expected the averages of the generator (torch_ema), got something else")
    states["ema"] = {**state, **zip_ema(order, average.shadow_params)}
    note = f"{Path(ema).name}: averages, decay {average.decay:g}, {average.num_updates} updates"
    return RawGenerator(states, class_name, extra, (note,))


def read_original(
    path: str | Path, ema: str | Path | None = None, use_ema: bool = True, curriculum: str | None = None
) -> Original:
    """Read and convert ``generator.pth`` with the averages beside it.

    Args:
        ema: the averages' file; default ``ema.pth`` or ``<step>_ema.pth`` in the same folder, if there is one.
        use_ema: False leaves averages alone.
        curriculum: whose camera and rendering settings the model keeps; default by its class.

    Raises:
        UserError: refused or damaged file, or no generator in it; one line.
    """
    path = Path(path)
    beside = find_ema(path) if ema is None else Path(ema)
    raw = read_raw(path, beside if use_ema else None)
    config = derive_config(raw.states["generator"], raw.class_name)
    method = "fenerf" if "geo" in config.latents else "pigan"
    notes = (describe(path, config, raw.class_name, raw.attributes), *raw.notes)
    if "ema" not in raw.states and use_ema:
        notes = (*notes, "no averages beside it (ema.pth, STEP_ema.pth): the live weights are converted")
    step = raw.attributes.get("step")
    model = model_section(config, raw.class_name)
    chosen = curriculum or CURRICULA.get(raw.class_name or "", CURRICULA[method])
    meta = {
        "method": method,
        "curriculum": chosen,
        "step": step if isinstance(step, int) else 0,
        "origin": {
            "file": path.name,
            "class": raw.class_name,
            "averages": beside.name if beside is not None and "ema" in raw.states else None,
        },
    }
    try:
        weights = {name: with_averages(raw.converted(name), config) for name in raw.states}
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return Original(method, model, weights, meta, notes)


def find_ema(path: Path) -> Path | None:
    """The averages beside a generator: ``315000_generator.pth`` -> ``315000_ema.pth``, ``generator.pth`` -> ``ema.pth``."""
    candidate = path.with_name(re.sub(r"generator(?!.*generator)", "ema", path.name))
    return candidate if candidate != path and candidate.is_file() else None


def with_averages(state: dict[str, Tensor], config: SirenGeneratorConfig) -> dict[str, Tensor]:
    """The state dict with stored averages of the mapping networks (10 000 fixed draws)."""
    generator = SirenGenerator(config)
    try:
        missing, unexpected = generator.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip().rstrip(".")
        raise UserError(
            f"the generator does not fit its own shapes ({reason}); copy or download the file again"
        ) from error
    missing = [key for key in missing if not key.startswith("average_")]
    if missing or unexpected:
        raise UserError(
            f"the generator does not fit its own shapes: missing {missing[:3]}, unknown {unexpected[:3]}; copy or download "
            "the file again"
        )
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(
                f"'{name}' holds NaN or infinite numbers, expected weights; copy or download the file again"
            )
    generator.update_averages()
    return {key: value.detach().clone() for key, value in generator.state_dict().items()}


def model_section(config: SirenGeneratorConfig, class_name: str | None) -> dict[str, Any]:
    """The ``model`` section that builds this architecture; UserError if no named variant has it."""
    variants = FENERF_VARIANTS if "geo" in config.latents else PIGAN_VARIANTS
    same = ("color_layers", "label_layers", "use_direction", "grid_branch", "geometry_layers", "label_count")
    fits = [
        name
        for name, v in variants.items()
        if all(getattr(v, key) == getattr(config.field, key) for key in same)
        and (v.box_side == config.field.box_side or class_name is None)
    ]
    if class_name in fits:
        fits.insert(0, class_name)  # type: ignore[arg-type]
    dims = {latent.dim for latent in config.latents.values()}
    if not fits or len(dims) != 1:
        raise UserError(
            f"this architecture is none of the named variants ({config.field}); it cannot be converted into a model file"
        )
    return {
        "variant": fits[0],
        "hidden": config.field.hidden,
        "grid_size": list(config.field.grid_size) if config.field.grid_branch != "none" else None,
        "latent_dim": dims.pop(),
        "mapping_hidden": config.mapping_hidden,
        "mapping_linears": config.mapping_linears,
    }


def describe(path: Path, config: SirenGeneratorConfig, class_name: str | None, extra: Mapping[str, object]) -> str:
    """One line: what was found in the file."""
    f = config.field
    grid = (
        "no latent grid"
        if f.grid_branch == "none"
        else f"latent grid {f.grid_channels} x {f.grid_size} in the {f.grid_branch} branch"
    )
    labels = f"{f.label_count} labels through {f.label_layers} maps" if f.label_layers else "no labels"
    codes = ", ".join(f"{name} {latent.dim}" for name, latent in config.latents.items())
    step = f", step {extra['step']}" if isinstance(extra.get("step"), int) else ""
    return (
        f"{path.name}: {class_name or 'unnamed field'}{step}: width {f.hidden}, {f.geometry_layers} geometry and "
        f"{f.color_layers} colour layers, {grid}, {labels}, "
        f"{'with' if f.use_direction else 'without'} view direction, codes {codes}, mapping of {config.mapping_linears} layers"
    )
