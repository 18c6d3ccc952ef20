# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: pictures beside their coloured segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facelab.bases.stylesdf.snapshots import Snapshots, limited
from facelab.data.regions import colour_regions, fuse_regions
from facelab.generator import GeneratorOutput
from facelab.inference.pictures import image_grid, save_png
from facelab.training.loop import Trainer


class SampleRows(Snapshots):
    """Writes ``samples/reals.png`` and ``samples/<step>_{image,segmentation,thumb,depth}.png``.

    A row of ``image`` is a head of the averaged generator from all azimuths; the same place of ``segmentation`` has the
    regions of that picture. In ``reals.png`` they stand beside each other.
    """

    def on_start(self, trainer: Trainer) -> None:
        log = trainer.config.log
        if not (trainer.distributed.is_main and log.samples_every):
            return
        source: Any = trainer.method.dataset(trainer.config)
        batch = source.batch(0, max(1, log.sample_heads))
        masks = fuse_regions(batch.label_map, reference=trainer.config.reference.lopsided_brows)
        pairs = torch.stack([limited(batch.image), limited(colour_regions(masks))], dim=1).flatten(0, 1)
        columns = 2 * max(1, round((len(pairs) / 4) ** 0.5))
        save_png(Path(trainer.run_dir) / "samples" / "reals.png", image_grid(pairs, columns))

    def prior(self, config: Any) -> Any:
        """Distribution of training cameras."""
        return config.camera.prior()

    def layers(self, output: GeneratorOutput, ends: tuple[float, float]) -> Mapping[str, Tensor]:
        """Picture, segmentation in the regions' colours, depth and, with a decoder, the rendering."""
        assert output.semantics is not None
        return {**super().layers(output, ends), "segmentation": colour_regions(output.semantics)}
