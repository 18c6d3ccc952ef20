# SPDX-License-Identifier: Apache-2.0
"""Sample grids during training: the fixed heads from the front and tilted, live and averaged, and fresh ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from facelab.api import FaceModel
from facelab.cli.pictures import sample_grids
from facelab.inference.pictures import save_png
from facelab.training.loop import Callback, Trainer

TILT = 0.5  # radians of yaw, as in the original's "tilted" grids
FRESH_TRUNCATION = 0.7


class SampleGrids(Callback):
    """Writes ``samples/<step>_<layer>_{fixed,tilted,fixed_ema,tilted_ema,random}.png``."""

    def __init__(self, method: Any) -> None:
        self.method = method

    @torch.no_grad()
    def on_samples(self, trainer: Trainer) -> None:
        if not trainer.distributed.is_main:
            return
        config, step = trainer.config, trainer.position.step
        generator = trainer.models["generator"]
        folder = Path(trainer.run_dir) / "samples"
        fixed = list(range(config.log.sample_heads))
        self._write(trainer, folder, step, "", fixed)
        with trainer.averages["ema"].applied_to(generator):
            self._write(trainer, folder, step, "_ema", fixed)
            first = 1000 + step * len(fixed)
            model = self._model(trainer)
            model.generator.update_averages()
            for name, grid in self._grids(
                model, config, range(first, first + len(fixed)), FRESH_TRUNCATION, 0.0
            ).items():
                save_png(folder / f"{step:08d}_{name}_random.png", grid)

    def _write(self, trainer: Trainer, folder: Path, step: int, suffix: str, seeds: list[int]) -> None:
        for view, yaw in (("fixed", 0.0), ("tilted", TILT)):
            grids = self._grids(self._model(trainer), trainer.config, seeds, 1.0, yaw)
            for name, grid in grids.items():
                save_png(folder / f"{step:08d}_{name}_{view}{suffix}.png", grid)

    def _model(self, trainer: Trainer) -> FaceModel:
        return FaceModel(self.method, trainer.models["generator"], trainer.config, {}, Path(trainer.run_dir))

    def _grids(self, model: FaceModel, config: Any, seeds: Any, truncation: float, yaw: float) -> dict:
        settings = model.settings(config.log.sample_size, 1)
        columns = max(1, round(len(seeds) ** 0.5))
        return sample_grids(model, seeds, settings, truncation, yaw, columns)
