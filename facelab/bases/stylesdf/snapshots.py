# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: real ones at the start, heads from several sides every ``log.samples_every`` steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.cameras.camera import Camera
from facelab.draws import Draws
from facelab.generator import GeneratorOutput
from facelab.inference.pictures import depth_picture, image_grid, save_png, to_uint8
from facelab.training.loop import Callback, Trainer

LARGEST = 256  # pixels of a picture in a grid; larger ones are made smaller


class Snapshots(Callback):
    """Writes ``samples/reals.png`` and ``samples/<step>_{image,thumb,depth}.png`` from the averaged generator.

    A row for each head, the same ones each time, seen from all azimuths of the training range at one elevation, with
    truncated codes (the averages are computed for it and dropped again). Configurations need ``log.sample_heads``,
    ``sample_views`` and ``sample_truncation``.
    """

    def on_start(self, trainer: Trainer) -> None:
        if not (trainer.distributed.is_main and trainer.log.samples_every):
            return
        count = max(1, trainer.config.log.sample_heads)
        batch = trainer.method.dataset(trainer.config).batch(0, count)  # type: ignore[union-attr]
        columns = max(1, round(count**0.5))
        save_png(Path(trainer.run_dir) / "samples" / "reals.png", image_grid(limited(batch.image), columns))

    @torch.no_grad()
    def on_samples(self, trainer: Trainer) -> None:
        if not trainer.distributed.is_main or trainer.config.log.sample_heads < 1:
            return
        generator: Any = trainer.models["generator"]
        generator.eval()
        try:
            with trainer.averages["ema"].applied_to(generator):
                generator.update_averages()
                try:
                    pictures = self._pictures(trainer, generator)
                finally:
                    generator.forget_averages()
        finally:
            generator.train()
        for name, rows in pictures.items():
            path = Path(trainer.run_dir) / "samples" / f"{trainer.position.step:08d}_{name}.png"
            save_png(path, image_grid(torch.cat(rows), len(rows[0])))

    def _pictures(self, trainer: Trainer, generator: Any) -> dict[str, list[Tensor]]:
        config, method = trainer.config, trainer.method
        draws = Draws(config.train.seed).at(phase="samples")
        prior = self.prior(config)
        settings = method.inference_settings(config)  # type: ignore[attr-defined]
        found: dict[str, list[Tensor]] = {}
        for index in range(config.log.sample_heads):
            here = draws.at(chunk=index)
            latents = {
                name: here.normal(name, (1, *shape)).to(trainer.device) for name, shape in generator.latent_spec.items()
            }
            scene = generator.scene(generator.map(latents, truncation=config.log.sample_truncation))
            cameras: Camera = prior.sweep(here.uniform("elevation", (1,)), config.log.sample_views).to(trainer.device)
            views = [generator.render(scene, cameras[k], settings) for k in range(len(cameras))]
            ends = method.depth_range(config)  # type: ignore[attr-defined]
            for name, picture in self.layers(GeneratorOutput.cat(views), ends).items():
                found.setdefault(name, []).append(limited(picture).cpu())
        return found

    def prior(self, config: Any) -> Any:
        """Distribution of training cameras, a :class:`~facelab.cameras.sphere.SpherePrior`."""
        return config.view.prior

    def layers(self, output: GeneratorOutput, ends: tuple[float, float]) -> Mapping[str, Tensor]:
        """Name -> uint8 pictures (N, 3, H, W) of a head from N cameras; ``ends`` are the depths that are shown."""
        pictures = {"image": to_uint8(output.rgb)}
        if output.raw_rgb is not None and output.raw_rgb.shape != output.rgb.shape:
            pictures["thumb"] = to_uint8(output.raw_rgb)
        return {**pictures, "depth": depth_picture(output.depth, output.opacity, *ends)}


def limited(pictures: Tensor, largest: int = LARGEST) -> Tensor:
    """uint8 pictures (N, 3, H, W), at most so large, by means of pixels."""
    side = pictures.shape[-1]
    if side <= largest:
        return pictures
    return F.adaptive_avg_pool2d(pictures.float(), largest).round().to(torch.uint8)
