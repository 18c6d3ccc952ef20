# SPDX-License-Identifier: Apache-2.0
"""The named field variants of pi-GAN and FENeRF: original class name -> architecture."""

from __future__ import annotations

from dataclasses import replace

from facelab.fields.siren import SirenConfig

_PIGAN = SirenConfig(color_layers=1, label_layers=0)
_FENERF = SirenConfig(color_layers=3, label_layers=3, grid_branch="color")

PIGAN_VARIANTS: dict[str, SirenConfig] = {
    "SPATIALSIRENBASELINE": _PIGAN,
    "TALLSIREN": replace(_PIGAN, box_side=None),
    "EmbeddingPiGAN128": replace(_PIGAN, hidden=128, grid_branch="geometry", grid_std=0.01),
    "EmbeddingPiGAN256": replace(_PIGAN, grid_branch="geometry", grid_size=(64, 64, 64)),
}
FENERF_VARIANTS: dict[str, SirenConfig] = {
    "TextureEmbeddingPiGAN256SEMANTICDISENTANGLE_DIM_96": _FENERF,
    "TextureEmbeddingPiGAN256SEMANTICDISENTANGLE": replace(_FENERF, grid_size=(64, 64, 64)),
    "TextureEmbeddingPiGAN128SEMANTICDISENTANGLE": replace(_FENERF, hidden=128, grid_std=0.01),
    "SIRENBASELINESEMANTICDISENTANGLE": replace(_FENERF, label_layers=2, grid_branch="none"),
    "SPATIALSIRENSEMANTICDISENTANGLE": replace(
        _FENERF, label_layers=2, color_layers=8, grid_branch="none", color_first_layer_init="fan_in"
    ),
    "EmbeddingPiGAN128SEMANTICDISENTANGLE": replace(_FENERF, hidden=128, grid_branch="geometry", grid_std=0.01),
    "TextureEmbeddingPiGAN128SEMANTICDISENTANGLE_WO_DIR": replace(
        _FENERF, hidden=128, color_layers=8, use_direction=False, color_first_layer_init="three"
    ),
    "TextureEmbeddingPiGAN256SEMANTICDISENTANGLE_DIM_96_WO_DIR": replace(
        _FENERF, color_layers=8, use_direction=False, color_first_layer_init="three"
    ),
}
