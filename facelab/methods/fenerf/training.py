# SPDX-License-Identifier: Apache-2.0
"""Training of FENeRF: pi-GAN with two codes and a second, semantic discriminator (arXiv 2111.15490, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from facelab.bases.pigan.training import Fakes, Judge, Pigan
from facelab.bases.pigan.variants import FENERF_VARIANTS
from facelab.data.batch import Batch
from facelab.data.labels import one_hot_pm1
from facelab.errors import UserError
from facelab.generator import GeneratorOutput
from facelab.losses.regularizers import opacity_penalty
from facelab.methods.fenerf.config import DEVIATIONS, FenerfConfig
from facelab.training.phases import PhaseContext
from facelab.training.schedule import linear

LABELS = 18  # classes of the label head; background is not one of them


@dataclass(frozen=True)
class SemanticJudge(Judge):
    """Sees 18 label channels and the picture; colour learns nothing from it."""

    def real(self, batch: Batch) -> Tensor:
        """(N, 21, S, S): labels +-1, then the picture."""
        if batch.label_map is None:
            raise UserError("FENeRF needs a mask for every picture, this data set has none; see docs/fenerf.md")
        return torch.cat([one_hot_pm1(batch.label_map), batch.float_image()], dim=1)

    def fake(self, output: GeneratorOutput, for_generator: bool) -> Tensor:
        """(N, 21, S, S); the picture is detached, so that colour learns from the image discriminator alone."""
        assert output.semantics is not None
        return torch.cat([output.semantics, output.rgb.detach()], dim=1)

    def weight(self, config: Any) -> float:
        return config.loss.semantic


class Fenerf(Pigan):
    """FENeRF as a trainable method."""

    name = "fenerf"
    config_type: type = FenerfConfig
    deviations = DEVIATIONS
    roles: Mapping[str, str] = {"geo": "geometry", "app": "color"}
    variants = FENERF_VARIANTS

    def judges(self) -> list[Judge]:
        """Image discriminator, semantic discriminator."""
        return [Judge("d_image", 3), SemanticJudge("d_semantic", LABELS + 3)]

    def discriminator_rates(self, config: Any) -> dict[str, float]:
        """Learning rate of each discriminator."""
        return {"d_image": config.optim.image_lr, "d_semantic": config.optim.semantic_lr}

    def check_config(self, config: Any) -> None:
        """As pi-GAN's; FENeRF has one preprocessing. UserError in one line."""
        super().check_config(config)
        if config.data.chain != "celeba":
            raise UserError(
                f"data.chain {config.data.chain} is for pi-GAN, FENeRF's pairs have one preprocessing; leave it out"
            )

    def discriminator_fakes(self, ctx: PhaseContext) -> Fakes:
        """A batch for each discriminator, or with ``share_fakes`` one for both."""
        if ctx.config.share_fakes:
            return ctx.shared("fakes", lambda draws: self.generate(ctx, draws))
        return super().discriminator_fakes(ctx)

    def regularization(self, ctx: PhaseContext, fakes: Fakes) -> Tensor:
        """The opacity term, growing over the first steps while the labels take shape."""
        loss, output = ctx.config.loss, fakes.output
        if not loss.opacity or output.semantics is None:
            return super().regularization(ctx, fakes)
        penalty = opacity_penalty(output.opacity, output.semantics / 2 + 0.5)
        ctx.log("opacity", penalty)
        return loss.opacity * ctx.schedule(lambda progress: linear(progress.step, loss.opacity_steps)) * penalty

    def pictures(self, config: Any) -> Any:
        """The picture and mask pairs at ``data.path``."""
        from facelab.data.celebamask_hq import CelebAMaskHQ

        d = config.data
        return CelebAMaskHQ(
            d.path,
            config.render.resolution,
            crop=d.crop,
            background_mask=d.background_mask,
            reference=config.reference.data_chain,
            cache=d.cache,
        )


METHOD = Fenerf()
