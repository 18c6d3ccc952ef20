# SPDX-License-Identifier: Apache-2.0
"""Files of the authors' program -> our weights and a whole configuration.

``final_model.pt`` holds ``g_ema`` (and may hold ``g`` and ``d``); checkpoints of the first training stage hold ``g``,
``g_ema``, the global discriminator ``gd`` and that of one region, ``sd``. The architecture is read off names and
shapes; every name is accounted for. Files tell neither cameras nor samples: those are the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facelab.bases.stylesdf.convert_discriminators import discriminator_from_original, discriminator_of
from facelab.checkpoints.legacy_modules import find_state_dicts
from facelab.checkpoints.legacy_pickle import read_pickle_checkpoint
from facelab.config import to_dict
from facelab.errors import UserError
from facelab.methods.cnerf.config import CnerfConfig, ModelConfig, RenderConfig, generator_config
from facelab.methods.cnerf.model import CNerfGenerator, CNerfGeneratorConfig
from facelab.methods.cnerf.order import check_order, exchange
from facelab.methods.cnerf.originals import generator_config_from_original, generator_from_original

GENERATORS = {"g": "generator", "g_ema": "ema"}  # in the file -> group of our weights
DISCRIMINATORS = {"gd": "d_global", "sd": "d_region", "d": "d_full"}
SIGN = "renderer.init_network.sdf_linear.weight"  # of a CNeRF generator, and of no other


@dataclass(frozen=True)
class Original:
    """A converted file.

    Attributes:
        config: of a run with this model.
        weights: ``generator``, ``ema`` and discriminators, those that the file has; our names, with averages.
        meta: method, step, origin.
        notes: lines for the user: what was found.
    """

    config: CnerfConfig
    weights: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]
    notes: tuple[str, ...] = ()
    method: str = "cnerf"

    @property
    def model(self) -> dict[str, Any]:
        """The ``model`` section of the configuration."""
        return dict(to_dict(self.config)["model"])


def is_cnerf(tree: object) -> bool:
    """Whether what a file holds is a checkpoint of CNeRF."""
    try:
        return any(SIGN in state for state in find_state_dicts(tree).values())
    except UserError:
        return False


def read_original(path: str | Path, tree: object = None) -> Original:
    """Read and convert a file of the authors' program. Nothing of it is run.

    Args:
        tree: what the file holds, where it has been read already (see ``legacy_pickle``).

    Raises:
        UserError: refused, damaged, not a CNeRF generator, or keys and shapes that do not fit; one line.
    """
    path = Path(path)
    return convert_states(find_state_dicts(read_pickle_checkpoint(path) if tree is None else tree), path)


def convert_states(states: Mapping[str, Mapping[str, Tensor]], path: Path) -> Original:
    """State dicts of a file by the original's group names -> ours. Errors as in :func:`read_original`."""
    if SIGN in states.get("", {}):  # a bare state dict
        states = {"g_ema": states[""]}
    groups = [name for name in GENERATORS if name in states]
    if not groups:
        got = ", ".join(name or "a bare state dict" for name in states) or "nothing"
        raise UserError(f"{path}: expected the CNeRF generators g or g_ema, got {got}; check the file")
    main = groups[-1]
    architecture = generator_config_from_original(states[main], f"{path}: {main}")
    config = _configuration(architecture, path)
    notes = [describe(path, config)]
    weights = {}
    for name in groups:
        generator = CNerfGenerator(architecture)
        converted = generator_from_original(states[name], generator, f"{path}: {name}")
        weights[GENERATORS[name]] = _with_averages(generator, converted)
        kept = sum(value.numel() for value in converted.values())
        notes.append(f"{name}: all {len(states[name])} tensors accounted for, {kept / 1e6:.1f} million weights")
    for name, ours in DISCRIMINATORS.items():
        if name in states:
            _add_discriminator(path, name, ours, states[name], weights, notes)
    weights = _named(architecture, weights, GENERATORS[main], notes)
    meta = {"method": "cnerf", "step": 0, "images": 0, "origin": {"file": path.name, "groups": sorted(states)}}
    return Original(config, weights, meta, tuple(notes))


def describe(path: Path, config: CnerfConfig) -> str:
    """A line for people."""
    m, side = config.model, config.render.resolution
    drawn = f"decoder from {side} to {m.resolution} px" if m.stage == "full" else f"rendered at {side} px, no decoder"
    return (
        f"{path.name}: CNeRF, {m.regions} regions, {m.depth} + 2 layers of {m.width}, codes of {m.style_dim}, {drawn}"
    )


def _configuration(architecture: CNerfGeneratorConfig, path: Path) -> CnerfConfig:
    """The configuration of a run; UserError where it cannot express the architecture."""
    field, decoder = architecture.field, architecture.decoder
    model = ModelConfig(
        stage="volume" if decoder is None else "full",
        regions=field.regions,
        depth=field.depth,
        width=field.width,
        style_dim=field.style_dim,
        mapping_layers=architecture.mapping_layers,
    )
    config = CnerfConfig(model=model)
    if decoder is not None:
        model = replace(
            model,
            resolution=decoder.size,
            transfer_channels=decoder.in_channels,
            channel_multiplier=decoder.channel_multiplier,
        )
        config = replace(config, model=model, render=RenderConfig(resolution=decoder.in_resolution))
    ours = generator_config(config)
    if ours != architecture:
        raise UserError(
            f"{path}: its decoder has a latent width of {decoder.width if decoder else 0} and "
            f"{decoder.mapping_layers if decoder else 0} mapping layers, expected {ours.decoder.width if ours.decoder else 0} "
            f"and {ours.decoder.mapping_layers if ours.decoder else 0}; such a model cannot be converted"
        )
    return config


def _with_averages(generator: CNerfGenerator, converted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights with the averages of 10 000 fixed draws, in storage of their own."""
    generator.load_state_dict(converted)
    generator.update_averages()
    return {key: value.detach().clone() for key, value in generator.state_dict().items()}


def _add_discriminator(
    path: Path,
    name: str,
    ours: str,
    state: Mapping[str, Tensor],
    weights: dict[str, dict[str, Tensor]],
    notes: list[str],
) -> None:
    """Convert one discriminator; a generator is useful without, so a strange one is left out with a note."""
    what = f"{path}: {name}"
    try:
        converted = discriminator_from_original(state, discriminator_of(state, what), what)
    except UserError as error:
        notes.append(f"the discriminator is left out: {error}")
        return
    weights[ours] = {key: value.detach().clone() for key, value in converted.items()}
    notes.append(f"{name}: all {len(state)} tensors accounted for, as {ours}")


def _named(
    architecture: CNerfGeneratorConfig, weights: dict[str, dict[str, Tensor]], group: str, notes: list[str]
) -> dict[str, dict[str, Tensor]]:
    """The weights with channels that mean what they are called, told by looking at the generator of ``group``."""
    generator = CNerfGenerator(architecture).eval()
    generator.load_state_dict(weights[group])
    finite = all(torch.isfinite(value).all() for value in weights[group].values())
    report = check_order(generator) if finite else None
    if report is None:
        notes.append("the order of the regions was not checked: there are not nine, or weights are not finite")
        return weights
    notes.append(report.text)
    if report.verdict != "exchanged":
        return weights
    return {name: exchange(state) for name, state in weights.items()}
