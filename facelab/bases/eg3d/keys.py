# SPDX-License-Identifier: Apache-2.0
"""Names of the official EG3D checkpoints <-> ours: mapping network, synthesis network, super-resolution.

The 4x4 ``resample_filter`` buffers of the official files are constants: they are dropped on the way in, and
:func:`resample_filters` gives them back on the way out.

    mapping.fc0.weight                          <-> mapping.layers.0.weight
    mapping.embed.weight, mapping.w_avg         <-> the same
    synthesis.b8.conv0.affine.weight            <-> synthesis.blocks.8.conv0.affine.weight
    synthesis.b8.torgb.bias                     <-> synthesis.blocks.8.to_rgb.bias
    superresolution.block0.torgb.weight         <-> superresolution.blocks.0.to_rgb.weight
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from facelab.checkpoints.key_map import KeyMap
from facelab.errors import UserError, nearest

Rules = list[tuple[str, str]]

FILTERS = ("resample_filter", "{path:*}.resample_filter")
_SUPERRESOLUTIONS = {
    "SuperresolutionHybrid2X": "2x",
    "SuperresolutionHybrid4X": "4x",
    "SuperresolutionHybrid8X": "8x",
    "SuperresolutionHybrid8XDC": "8xdc",
}
_FILTERED = re.compile(r"(?P<block>.*\b(?:b|block)\d+)\.(?P<layer>conv0|conv1|skip)\.weight")


def mapping_rules(original: str = "", ours: str = "") -> Rules:
    """Rules of a mapping network (generator or discriminator) that stands under these prefixes."""
    return [
        (f"{original}fc{{i:n}}.{{p}}", f"{ours}layers.{{i:n}}.{{p}}"),
        (f"{original}embed.{{p}}", f"{ours}embed.{{p}}"),
        (f"{original}w_avg", f"{ours}w_avg"),
    ]


def synthesis_rules(original: str = "", ours: str = "") -> Rules:
    """Rules of a synthesis network that stands under these prefixes."""
    return _block_rules(f"{original}b", f"{ours}blocks.")


def superresolution_rules(original: str = "", ours: str = "") -> Rules:
    """Rules of a super-resolution module that stands under these prefixes."""
    return _block_rules(f"{original}block", f"{ours}blocks.")


def backbone_rules(original: str = "backbone.", ours: str = "backbone.") -> Rules:
    """Rules of mapping and synthesis network together."""
    return [
        *mapping_rules(f"{original}mapping.", f"{ours}mapping."),
        *synthesis_rules(f"{original}synthesis.", f"{ours}synthesis."),
    ]


def key_map(rules: Rules) -> KeyMap:
    """A map of these rules that drops the constant filters of the official files."""
    return KeyMap(rules, dropped=FILTERS)


def superresolution_kind(class_path: str) -> str:
    """The kind of super-resolution (see ``facelab.nn.stylegan2.KINDS``) that an official class path names.

    Only the last component counts: ``training.superresolution.SuperresolutionHybrid8XDC`` is ``8xdc``.

    Raises:
        UserError: another class.
    """
    name = class_path.rpartition(".")[2]
    if name not in _SUPERRESOLUTIONS:
        raise UserError(
            f"superresolution_module: expected one of {', '.join(_SUPERRESOLUTIONS)}, got '{class_path}'."
            f"{nearest(name, _SUPERRESOLUTIONS)} Other modules are not supported"
        )
    return _SUPERRESOLUTIONS[name]


def resample_filters(original_keys: Iterable[str], superresolution: str | None = None) -> dict[str, Tensor]:
    """The constant filters an official generator holds beside these original keys.

    Each block and each of its 3x3 and ``skip`` convolutions has one; a super-resolution of another kind than
    ``8xdc`` has one more at its top.

    Args:
        superresolution: kind of the super-resolution among the keys under ``superresolution.``; None: no such keys.

    Returns:
        original key -> (4, 4) float32: the binomial [1, 3, 3, 1] with itself, divided by its sum.
    """
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    names: dict[str, None] = {}
    if superresolution is not None and superresolution != "8xdc":
        names["superresolution.resample_filter"] = None
    for key in original_keys:
        found = _FILTERED.fullmatch(key)
        if found:
            names[f"{found['block']}.resample_filter"] = None
            names[f"{found['block']}.{found['layer']}.resample_filter"] = None
    return {name: torch.outer(taps, taps) / 64 for name in names}


def _block_rules(original: str, ours: str) -> Rules:
    return [
        (f"{original}{{i:n}}.torgb.{{p:*}}", f"{ours}{{i:n}}.to_rgb.{{p:*}}"),
        (f"{original}{{i:n}}.{{p:*}}", f"{ours}{{i:n}}.{{p:*}}"),
    ]
