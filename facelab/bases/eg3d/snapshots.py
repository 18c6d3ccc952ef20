# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: real ones at the start, generated ones every ``log.samples_every`` steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facelab.bases.eg3d.schedules import neural_resolution
from facelab.cameras.camera import Camera
from facelab.draws import Draws
from facelab.inference.pictures import depth_picture, image_grid, save_png, to_uint8
from facelab.training.loop import Callback, Trainer


class Snapshots(Callback):
    """Writes ``samples/reals.png`` and ``samples/<step>_{image,raw,depth}.png`` from the averaged generator.

    The same heads under the same cameras each time: latents of a fixed seed, the first cameras of the data.
    """

    def on_start(self, trainer: Trainer) -> None:
        c = trainer.config
        if c.discriminator.group_size == 1:
            trainer.logger.say(
                "minibatch groups of 1: the discriminator sees no statistics of the batch; cameras to swap with "
                f"come from {'the same chunk' if c.reference.roll_partners else 'the data set'}"
            )
        if not (trainer.distributed.is_main and c.log.samples_every):
            return
        reals, _ = self._reals(trainer)
        save_png(Path(trainer.run_dir) / "samples" / "reals.png", image_grid(reals, columns(len(reals))))

    @torch.no_grad()
    def on_samples(self, trainer: Trainer) -> None:
        if not trainer.distributed.is_main:
            return
        generator: Any = trainer.models["generator"]
        _, camera = self._reals(trainer)
        generator.eval()
        try:
            with trainer.averages["ema"].applied_to(generator):
                pictures = self._pictures(trainer, generator, camera)
        finally:
            generator.train()
        for name, rows in pictures.items():
            path = Path(trainer.run_dir) / "samples" / f"{trainer.position.step:08d}_{name}.png"
            save_png(path, image_grid(torch.cat(rows), columns(len(rows))))

    def _pictures(self, trainer: Trainer, generator: Any, camera: Camera) -> dict[str, list[Tensor]]:
        config = trainer.config
        n, method = config.neural, trainer.method
        size = neural_resolution(trainer.position.images, n.initial, n.final, n.fade_kimg)
        settings = method.inference_settings(config, size)  # type: ignore[attr-defined]
        draws = Draws(config.train.seed).at(phase="samples")
        shape = generator.latent_spec["z"]
        ends = method.depth_range(config)  # type: ignore[attr-defined]
        found: dict[str, list[Tensor]] = {"image": [], "raw": [], "depth": []}
        for index in range(len(camera)):
            z = draws.at(chunk=index).normal("z", (1, *shape)).to(trainer.device)
            one = camera[index].to(trainer.device)
            output = generator.render(generator.scene(generator.map({"z": z}, one.label())), one, settings, draws)
            found["image"].append(to_uint8(output.rgb).cpu())
            found["raw"].append(to_uint8(output.raw_rgb).cpu())
            found["depth"].append(depth_picture(output.depth, output.opacity, *ends).cpu())
        return found

    @staticmethod
    def _reals(trainer: Trainer) -> tuple[Tensor, Camera]:
        count = trainer.config.log.sample_heads
        batch = trainer.method.dataset(trainer.config).batch(0, count)  # type: ignore[union-attr]
        return batch.image, batch.camera


def columns(count: int) -> int:
    """Of a grid that is about square."""
    return max(1, round(count**0.5))
