# SPDX-License-Identifier: Apache-2.0
"""Original pi-GAN and FENeRF generator keys <-> ours. The architecture is derived from tensor shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from facelab.bases.pigan.model import LatentConfig, SirenGeneratorConfig
from facelab.bases.pigan.variants import FENERF_VARIANTS, PIGAN_VARIANTS
from facelab.errors import UserError
from facelab.fields.siren import SirenConfig

PREFIX = "siren."
_MAPPINGS = {"mapping_network": "z", "geo_mapping_network": "geo", "app_mapping_network": "app"}
_FIELD_RULES = (
    (r"^spatial_embeddings$", r"field_net.grid"),
    (r"^network\.(\d+)\.layer\.(weight|bias)$", r"field_net.geometry.\1.\2"),
    (r"^final_layer\.(weight|bias)$", r"field_net.sigma.\1"),
    (r"^color_layer_sine\.layer\.(weight|bias)$", r"field_net.color.0.\1"),
    (r"^color_layer_sine\.(\d+)\.layer\.(weight|bias)$", r"field_net.color.\1.\2"),
    (r"^color_layer_linear\.0\.(weight|bias)$", r"field_net.rgb.\1"),
    (r"^label_layer_linear\.(\d+)\.(weight|bias)$", r"field_net.labels.\1.\2"),
)


def our_key(key: str) -> str | None:
    """Original state-dict key (with or without ``siren.``) -> ours, None if it is not a generator key."""
    key = key.removeprefix(PREFIX)
    for pattern, template in _FIELD_RULES:
        if re.match(pattern, key):
            return re.sub(pattern, template, key)
    match = re.match(r"^(\w*mapping_network)\.network\.(\d+)\.(weight|bias)$", key)
    if match and match[1] in _MAPPINGS and int(match[2]) % 2 == 0:
        return f"mapping.{_MAPPINGS[match[1]]}.linears.{int(match[2]) // 2}.{match[3]}"
    return None


def original_key(key: str, config: SirenGeneratorConfig) -> str | None:
    """Our key -> the original's (with ``siren.``); None for stored averages, which the original lacks."""
    if key.startswith("average_"):
        return None
    match = re.match(r"^mapping\.(\w+)\.linears\.(\d+)\.(weight|bias)$", key)
    if match:
        network = next(original for original, ours in _MAPPINGS.items() if ours == match[1])
        return f"{PREFIX}{network}.network.{2 * int(match[2])}.{match[3]}"
    key = key.removeprefix("field_net.")
    if set(config.latents) == {"z"} and key.startswith("color.0."):
        return f"{PREFIX}color_layer_sine.layer.{key.removeprefix('color.0.')}"
    rules = {
        r"^grid$": "spatial_embeddings",
        r"^geometry\.(\d+)\.(.+)$": r"network.\1.layer.\2",
        r"^sigma\.(.+)$": r"final_layer.\1",
        r"^color\.(\d+)\.(.+)$": r"color_layer_sine.\1.layer.\2",
        r"^rgb\.(.+)$": r"color_layer_linear.0.\1",
        r"^labels\.(\d+)\.(.+)$": r"label_layer_linear.\1.\2",
    }
    for pattern, template in rules.items():
        if re.match(pattern, key):
            return PREFIX + re.sub(pattern, template, key)
    raise KeyError(f"{key!r} is not a key of a SIREN generator")


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an original generator (or bare SIREN) state dict. UserError names keys that do not belong."""
    renamed = {key: our_key(key) for key in state}
    unknown = [key for key, ours in renamed.items() if ours is None]
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(state)} tensors are not those of a pi-GAN or FENeRF generator, "
            f"for example {unknown[0]!r}; is this a discriminator or another method's file?"
        )
    return {ours: state[key] for key, ours in renamed.items() if ours is not None}


def to_original(state: Mapping[str, Tensor], config: SirenGeneratorConfig) -> dict[str, Tensor]:
    """Our generator state dict -> the original's key names; stored averages are left out."""
    pairs = {original_key(key, config): value for key, value in state.items()}
    return {key: value for key, value in pairs.items() if key is not None}


def derive_config(state: Mapping[str, Tensor], class_name: str | None = None) -> SirenGeneratorConfig:
    """The architecture of an original generator, from the shapes of its tensors.

    ``class_name`` (the original field class) decides only what no shape shows: whether points are
    warped to the box (TALLSIREN is not). UserError if tensors are missing or do not fit together.
    """
    ours = from_original(state)

    def shape(key: str) -> tuple[int, ...]:
        if key not in ours:
            raise UserError(
                f"the file has no tensor {key!r} (our name): it is damaged or of another method; copy or download it again, "
                "or name its method (auto finds it)"
            )
        return tuple(ours[key].shape)

    def count(prefix: str) -> int:
        return len({k.removeprefix(prefix).split(".")[0] for k in ours if k.startswith(prefix)})

    hidden = shape("field_net.sigma.weight")[1]
    first, color = shape("field_net.geometry.0.weight")[1], shape("field_net.color.0.weight")[1]
    grid = shape("field_net.grid") if "field_net.grid" in ours else None
    branch = "none" if grid is None else ("geometry" if first == 3 + grid[1] else "color")
    labels = count("field_net.labels.")
    known = (PIGAN_VARIANTS | FENERF_VARIANTS).get(class_name or "")
    color_layers = count("field_net.color.")
    extra = color - hidden - (grid[1] if grid is not None and branch == "color" else 0)
    if extra not in (0, 3) or first not in (3, 3 + (grid[1] if grid else 0)):
        raise UserError(
            f"the first layers take {first} and {color} inputs, which no pi-GAN or FENeRF variant with "
            f"width {hidden} has; the file is damaged or of another method"
        )
    base = known or SirenConfig(color_layers=color_layers, label_layers=labels)
    field_config = replace(
        base,
        hidden=hidden,
        geometry_layers=count("field_net.geometry."),
        color_layers=color_layers,
        label_layers=labels,
        label_count=shape(f"field_net.labels.{labels - 1}.weight")[0] if labels else base.label_count,
        use_direction=extra == 3,
        grid_branch=branch,
        grid_channels=grid[1] if grid else base.grid_channels,
        grid_size=grid[2:] if grid else base.grid_size,
    )
    names = [name for name in ("z", "geo", "app") if f"mapping.{name}.linears.0.weight" in ours]
    roles = {"z": "all", "geo": "geometry", "app": "color"}
    if names not in (["z"], ["geo", "app"]):
        raise UserError(f"the file has the mapping networks {names}, expected one of pi-GAN (z) or FENeRF (geo, app)")
    return SirenGeneratorConfig(
        field=field_config,
        latents={n: LatentConfig(shape(f"mapping.{n}.linears.0.weight")[1], roles[n]) for n in names},  # type: ignore[arg-type]
        mapping_hidden=shape(f"mapping.{names[0]}.linears.0.weight")[0],
        mapping_linears=count(f"mapping.{names[0]}.linears."),
    )
