# SPDX-License-Identifier: Apache-2.0
"""Files of the authors' program -> our weights and a whole configuration.

Every file holds ``g``, ``d`` and ``g_ema``; those of the first stage have no decoder. The architecture is read off names
and shapes, and every name is accounted for: the original's loader skips what does not fit without a word, this one says
what is unknown, missing or of another shape. Files tell neither cameras nor samples: those are the published ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from facelab import assets
from facelab.bases.stylesdf.config import StyleSdfConfig, preset
from facelab.bases.stylesdf.convert_discriminators import discriminator_from_original, discriminator_of
from facelab.bases.stylesdf.full_model import FullGeneratorConfig
from facelab.bases.stylesdf.full_originals import (
    build_generator,
    generator_config_from_original,
    generator_from_original,
)
from facelab.bases.stylesdf.model import SdfGenerator, SdfGeneratorConfig
from facelab.bases.stylesdf.training import METHOD
from facelab.checkpoints.legacy_modules import find_state_dicts
from facelab.checkpoints.legacy_pickle import read_pickle_checkpoint
from facelab.checkpoints.recognise import has_checksum_of
from facelab.config import to_dict
from facelab.errors import UserError
from facelab.nn.discriminators.coordconv import ViewDiscriminator
from facelab.nn.discriminators.skip_residual import ResidualDiscriminator

GENERATORS = {"g": "generator", "g_ema": "ema"}  # in the file -> group of our weights
DISCRIMINATOR = "d"
SIGN = "renderer.network.pts_linears.0.gamma.weight"  # of a StyleSDF generator, and of no other
DATA_SETS = ("ffhq", "afhq")


@dataclass(frozen=True)
class Original:
    """A converted file.

    Attributes:
        config: of a run with this model.
        weights: ``generator``, ``ema``, ``discriminator``, those that the file has; our names, with stored averages.
        meta: method, step, origin.
        notes: lines for the user: what was found.
    """

    config: StyleSdfConfig
    weights: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]
    notes: tuple[str, ...] = ()
    method: str = "stylesdf"

    @property
    def model(self) -> dict[str, Any]:
        """The ``model`` section of the configuration."""
        return dict(to_dict(self.config)["model"])


def is_stylesdf(tree: object) -> bool:
    """Whether what a file holds is a checkpoint of StyleSDF."""
    try:
        return any(SIGN in state for state in find_state_dicts(tree).values())
    except UserError:
        return False


def read_original(path: str | Path, tree: object = None, data_set: str | None = None) -> Original:
    """Read and convert a file of the authors' program. Nothing of it is run.

    Args:
        tree: what the file holds, where it has been read already (see ``legacy_pickle``).
        data_set: ``ffhq`` or ``afhq``, whose cameras the model keeps; None: by checksum, else by the file's name.

    Raises:
        UserError: refused, damaged, not a StyleSDF generator, or names and shapes that do not fit; one line.
    """
    path = Path(path)
    states = find_state_dicts(read_pickle_checkpoint(path) if tree is None else tree)
    return convert_states(states, path, data_set)


def convert_states(states: Mapping[str, Mapping[str, Tensor]], path: Path, data_set: str | None = None) -> Original:
    """State dicts of a file by the original's group names -> ours. Errors as in :func:`read_original`."""
    if SIGN in states.get("", {}):  # a bare state dict
        states = {"g_ema": states[""]}
    groups = [name for name in GENERATORS if name in states]
    if not groups:
        got = ", ".join(name or "a bare state dict" for name in states) or "nothing"
        raise UserError(f"{path}: expected the StyleSDF generators g or g_ema, got {got}; check the file")
    main = groups[-1]
    architecture = generator_config_from_original(states[main], what=f"{path}: {main}")
    set_name, why = _data_set(path, data_set)
    config = _configuration(path, architecture, set_name)
    notes, weights = [], {}
    for name in groups:
        converted = generator_from_original(states[name], build_generator(architecture), f"{path}: {name}")
        weights[GENERATORS[name]] = _with_averages(build_generator(architecture), converted)
        notes.append(f"{name}: all {len(states[name])} tensors accounted for, {_millions(converted)} million numbers")
    if DISCRIMINATOR in states:
        config = _add_discriminator(path, states[DISCRIMINATOR], config, weights, notes)
    notes.insert(0, describe(path, config))
    notes.append(f"the cameras are not in the file: azimuth {config.view.azimuth:g}, those of {set_name} ({why})")
    meta = {"method": "stylesdf", "step": 0, "images": 0, "origin": {"file": path.name, "groups": sorted(states)}}
    return Original(config, weights, meta, tuple(notes))


def describe(path: Path, config: StyleSdfConfig) -> str:
    """A line for people."""
    m, side = config.model, config.render.resolution
    drawn = (
        f"decoder from {side} to {m.resolution} px" if config.stage == "full" else f"rendered at {side} px, no decoder"
    )
    return f"{path.name}: StyleSDF, {m.layers} + 1 layers of {m.width}, codes of {m.style_dim}, {drawn}"


def _data_set(path: Path, chosen: str | None) -> tuple[str, str]:
    """The data set whose cameras a file was trained with, and why it is thought to be."""
    if chosen is not None:
        if chosen not in DATA_SETS:
            raise UserError(f"unknown data set {chosen!r}, expected one of {', '.join(DATA_SETS)}")
        return chosen, "as asked for"
    known = [asset for asset in assets.manifest().values() if "stylesdf" in asset.methods]
    same = next((a for a in known if path.is_file() and has_checksum_of(path, a)), None)
    name, why = (path.name, "by the file's name") if same is None else (same.name, f"{same.name}, by its checksum")
    found = next((data_set for data_set in DATA_SETS if data_set in name.lower()), None)
    return (found, why) if found else (DATA_SETS[0], "nothing tells them")


def _configuration(path: Path, architecture: SdfGeneratorConfig, data_set: str) -> StyleSdfConfig:
    """The configuration of a run; UserError where it cannot express the architecture."""
    full = isinstance(architecture, FullGeneratorConfig)
    config = preset(f"{data_set}_{'full' if full else 'volume'}")
    field = architecture.field
    model = replace(
        config.model,
        latent_dim=architecture.latent_dim,
        style_dim=field.style_dim,
        mapping_layers=architecture.mapping_layers,
        width=field.width,
        layers=field.layers,
        density=field.density,
        normalize_points=field.box_side is not None,
    )
    render = replace(config.render, sampling=architecture.sampling)
    if isinstance(architecture, FullGeneratorConfig):
        decoder = architecture.decoder
        model = replace(
            model,
            resolution=decoder.size,
            channel_multiplier=decoder.channel_multiplier,
            channel_max=decoder.channel_max,
            decoder_mapping_layers=decoder.mapping_layers,
        )
        render = replace(render, resolution=decoder.in_resolution)
    config = replace(config, model=model, render=render)
    ours = METHOD.generator_config(config)
    for entry in dataclasses.fields(architecture):
        wanted, got = getattr(architecture, entry.name), getattr(ours, entry.name)
        if wanted != got:
            raise UserError(f"{path}: its {entry.name} is {wanted}, only {got} is supported; it cannot be converted")
    return config


def _with_averages(generator: SdfGenerator, converted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights with the averages of 10 000 fixed draws, in storage of their own."""
    generator.load_state_dict(converted)
    generator.update_averages()
    return {key: value.detach().clone() for key, value in generator.state_dict().items()}


def _add_discriminator(
    path: Path,
    state: Mapping[str, Tensor],
    config: StyleSdfConfig,
    weights: dict[str, dict[str, Tensor]],
    notes: list[str],
) -> StyleSdfConfig:
    """Convert ``d``; a generator is useful without, so a strange one is left out with a note.

    That of the first stage tells the side of the thumbnails, which its generator does not.
    """
    what = f"{path}: {DISCRIMINATOR}"
    try:
        model = discriminator_of(state, what)
        kind: type = ResidualDiscriminator if config.stage == "full" else ViewDiscriminator
        if not isinstance(model, kind):
            raise UserError(f"{what}: it belongs to the other training stage")
        converted = discriminator_from_original(state, model, what)
        side = model.config.resolution
        if config.stage == "volume":
            config = replace(config, render=replace(config.render, resolution=side))
        elif side != config.model.resolution:
            raise UserError(f"{what}: it judges pictures of {side} pixels, the decoder draws {config.model.resolution}")
        section = replace(config.discriminator, channel_max=model.config.channel_max)
    except UserError as error:
        notes.append(f"the discriminator is left out: {error}")
        return config
    weights["discriminator"] = {key: value.detach().clone() for key, value in converted.items()}
    notes.append(f"{DISCRIMINATOR}: all {len(state)} tensors accounted for, {_millions(converted)} million numbers")
    return replace(config, discriminator=section)


def _millions(state: Mapping[str, Tensor]) -> str:
    return f"{sum(value.numel() for value in state.values()) / 1e6:.1f}"
