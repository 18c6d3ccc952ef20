# SPDX-License-Identifier: Apache-2.0
"""The authors' volume generators: their key names and sizes <-> ours.

    style.0.weight                               <-> mapping.linears.0.weight
    renderer.sigmoid_beta                        <-> field_net.beta
    renderer.network.pts_linears.2.gamma.weight  <-> field_net.layers.2.frequency.weight
    renderer.network.views_linears.beta.bias     <-> field_net.view.phase.bias
    renderer.network.sigma_linear.weight         <-> field_net.distance.weight

Where the original is wrong and we are not, see ``DEVIATIONS`` in ``config.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from facelab.bases.stylesdf.keys import Rules, count_of
from facelab.bases.stylesdf.model import SdfGenerator, SdfGeneratorConfig
from facelab.checkpoints.key_map import KeyMap
from facelab.errors import UserError
from facelab.fields.sdf import SdfFieldConfig

NETWORK = "renderer.network."
AVERAGES = ("average_w",)  # ours alone: the original computes the average at each start


def film_rules(original: str, ours: str) -> Rules:
    """Rules of a FiLM-SIREN layer that stands under these prefixes."""
    return [
        (f"{original}gamma.{{p}}", f"{ours}frequency.{{p}}"),
        (f"{original}beta.{{p}}", f"{ours}phase.{{p}}"),
        (f"{original}{{p}}", f"{ours}{{p}}"),
    ]


def mapping_rules() -> Rules:
    """Rules of the renderer's mapping network."""
    return [("style.{i:n}.{p}", "mapping.linears.{i:n}.{p}")]


def volume_rules() -> Rules:
    """Rules of a whole volume generator."""
    return [
        *mapping_rules(),
        ("renderer.sigmoid_beta", "field_net.beta"),
        *film_rules(f"{NETWORK}pts_linears.{{i:n}}.", "field_net.layers.{i:n}."),
        *film_rules(f"{NETWORK}views_linears.", "field_net.view."),
        (f"{NETWORK}sigma_linear.{{p}}", "field_net.distance.{p}"),
        (f"{NETWORK}rgb_linear.{{p}}", "field_net.rgb.{p}"),
    ]


def volume_from_original(state: Mapping[str, Tensor], generator: SdfGenerator) -> dict[str, Tensor]:
    """A state dict of the authors' volume generator -> ours, strictly; the stored average stays as it is.

    UserError for unknown or missing keys and for other shapes.
    """
    own = generator.state_dict()
    expected = {key: value for key, value in own.items() if key not in AVERAGES}
    renamed = KeyMap(volume_rules()).from_original(state, expected)
    return {**renamed, **{key: own[key] for key in AVERAGES}}


def volume_to_original(generator: SdfGenerator) -> dict[str, Tensor]:
    """Our weights under the authors' names."""
    state = {key: value for key, value in generator.state_dict().items() if key not in AVERAGES}
    return dict(KeyMap(volume_rules()).back_to_original(state))


def volume_config_from_original(
    state: Mapping[str, Tensor], *, dist_radius: float | None = 0.12, offset_sampling: bool = True
) -> SdfGeneratorConfig:
    """Architecture from the shapes of the authors' weights.

    Args:
        state: keys of a volume generator; others are not looked at.
        dist_radius: half of far - near, by which points are normalised; None: ``no_z_normalize``.
        offset_sampling: False: ``no_offset_sampling``.

    Raises:
        UserError: the keys of a volume generator are not there.
    """
    first, code = f"{NETWORK}pts_linears.0.weight", "style.0.weight"
    for key in (first, f"{NETWORK}pts_linears.0.gamma.weight", code):
        if key not in state or state[key].ndim != 2:
            raise UserError(
                f"no matrix '{key}': expected the weights of a StyleSDF generator; take the entry 'g_ema' of its file"
            )
    if dist_radius is not None and not (math.isfinite(dist_radius) and dist_radius > 0):
        raise UserError(f"dist_radius must be a positive number of scene units or None, got {dist_radius}")
    field = SdfFieldConfig(
        width=len(state[first]),
        layers=count_of(state, f"{NETWORK}pts_linears."),
        style_dim=state[f"{NETWORK}pts_linears.0.gamma.weight"].shape[1],
        box_side=None if dist_radius is None else 2 * dist_radius,
        density="sdf" if "renderer.sigmoid_beta" in state else "raw",
    )
    return SdfGeneratorConfig(
        field=field,
        latent_dim=state[code].shape[1],
        mapping_layers=count_of(state, "style."),
        sampling="offset" if offset_sampling else "stratified",
    )
