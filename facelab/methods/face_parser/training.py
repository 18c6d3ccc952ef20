# SPDX-License-Identifier: Apache-2.0
"""Training of the face parser on synthetic heads, through the project's training loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.data.classes import NUM_CLASSES
from facelab.data.parsing import save_small_parser
from facelab.data.synthetic_pool import SyntheticPool
from facelab.deviations import Deviation
from facelab.methods.face_parser.augment import augment
from facelab.methods.face_parser.config import FaceParserConfig
from facelab.nn.pretrained.face_parsing import SmallParser
from facelab.training.loop import Callback, Trainer
from facelab.training.phases import Losses, Phase, PhaseContext
from facelab.training.protocol import DataSource, EmaSpec, Models, OptimizerSpec, TrainStage

LARGE = (0, 1, 13, 14, 17, 18)  # background, skin, hair, hat, neck, clothes
PARSER_FILE = "parser.safetensors"


class FaceParserMethod:
    """Per-pixel classification; see ``config.py`` for what can be set."""

    name = "face_parser"
    config_type: type = FaceParserConfig
    deviations: list[Deviation] = []  # noqa: RUF012 - part of the protocol; nothing is reproduced here

    def build(self, config: FaceParserConfig) -> Models:
        """The network, by the name ``parser``."""
        return Models(parser=SmallParser(config.model.widths))

    def stages(self, config: FaceParserConfig) -> list[TrainStage]:
        """One stage with one phase."""
        return [TrainStage("main", (Phase("parse", ("parser",), "parser", self.losses),))]

    def optimizers(self, config: FaceParserConfig) -> Mapping[str, OptimizerSpec]:
        """Adam."""
        optim = config.optim
        return {
            "parser": OptimizerSpec(
                ("parser",), optim.lr, (optim.betas[0], optim.betas[1]), weight_decay=optim.weight_decay
            )
        }

    def emas(self, config: FaceParserConfig) -> Mapping[str, EmaSpec]:
        """The average that is exported."""
        return {"ema": EmaSpec("parser", config.ema_decay)}

    def dataset(self, config: FaceParserConfig) -> DataSource:
        """All heads, drawn once."""
        data, on = config.data, config.data.draw_on
        if on == "auto":
            on = "cuda" if torch.cuda.is_available() else "cpu"
        return SyntheticPool(data.heads, data.size, config.train.seed, data.yaw_std, data.pitch_std, data.fov, on)

    def losses(self, ctx: PhaseContext) -> Losses:
        """Weighted cross-entropy and soft Dice on augmented heads."""
        config: FaceParserConfig = ctx.config
        with torch.no_grad(), ctx.autocast(False):
            pictures, labels = augment(ctx.real.image, ctx.real.label_map, config.model.size, ctx.draws, config.augment)
        scores = ctx.models["parser"](pictures).float()
        weight = class_weights(config.loss.small_parts, scores.device)
        with ctx.autocast(False):
            cross = F.cross_entropy(scores, labels, weight)
            overlap = dice_loss(scores, labels)
        ctx.log("accuracy", (scores.argmax(1) == labels).float())
        ctx.log("cross_entropy", cross)
        ctx.log("dice", overlap)
        yield "total", cross + config.loss.dice * overlap


def class_weights(small_parts: float, device: torch.device | str = "cpu") -> Tensor:
    """(19,) weights of the cross-entropy: 1 for the large classes."""
    weight = torch.full((NUM_CLASSES,), float(small_parts), device=device)
    weight[list(LARGE)] = 1.0
    return weight


def dice_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """1 - mean over the classes that occur in the batch of 2 |P T| / (|P| + |T|), P soft (V-Net, arXiv 1606.04797).

    Args:
        scores: (N, C, H, W).
        labels: (N, H, W) int64.
    """
    share = scores.softmax(dim=1)
    truth = F.one_hot(labels, scores.shape[1]).permute(0, 3, 1, 2).to(share.dtype)
    both, sizes = (share * truth).sum((0, 2, 3)), share.sum((0, 2, 3)) + truth.sum((0, 2, 3))
    there = (truth.sum((0, 2, 3)) > 0).to(share.dtype)
    return 1 - ((2 * both + 1) / (sizes + 1) * there).sum() / there.sum()


class ExportParser(Callback):
    """Writes the averaged network as ``parser.safetensors`` (fp16) with every checkpoint."""

    @torch.no_grad()
    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        if not trainer.distributed.is_main:
            return
        net: Any = trainer.models["parser"]
        with trainer.averages["ema"].applied_to(net):
            meta = {"steps": trainer.position.step, "images": trainer.position.images}
            save_small_parser(Path(trainer.run_dir) / PARSER_FILE, net, trainer.config.model.size, meta)


METHOD = FaceParserMethod()
