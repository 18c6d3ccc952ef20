# SPDX-License-Identifier: Apache-2.0
"""The second training stage: the decoder of picture and masks, on a frozen renderer (section 3.4).

Shape legend: N samples, K regions, R and S sides of rendering and picture, L and D number and width of the decoder's
style codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from facelab.bases.stylesdf.phases import PathSettings, draw_cameras, path_phase
from facelab.draws import Draws
from facelab.generator import ray_image
from facelab.losses.adversarial import d_fake_loss, d_real_loss, g_loss
from facelab.methods.cnerf.config import CnerfConfig
from facelab.methods.cnerf.losses import Portraits, portrait_r1
from facelab.methods.cnerf.volume_stage import GENERATOR, draw_pair, generator_of, judged_at_once, real_portraits
from facelab.nn.stylegan2.noise import draw_noise
from facelab.rendering.sdf import SdfOptions
from facelab.training.phases import Losses, Phase, PhaseContext
from facelab.training.protocol import Models, TrainStage

FULL = "d_full"
DECODER = ("generator.transfer.", "generator.decoder.")  # what this stage trains of the generator


def is_decoder(name: str) -> bool:
    """Whether the stage trains the parameter of this full name."""
    return name.startswith(DECODER)


class FullStage:
    """The phases ``d_main``, ``d_reg`` (lazy R1), ``g_main`` and ``g_path`` (lazy path lengths).

    Args:
        config: of the run.
        start: fills the renderer of a fresh run, which is not trained.
    """

    def __init__(self, config: CnerfConfig, start: Callable[[Models], None] | None = None) -> None:
        self.config, self.start = config, start

    def stage(self) -> TrainStage:
        """The whole."""
        return TrainStage("full", tuple(self.phases()), self.start)

    def phases(self) -> list[Phase]:
        """In the order of an iteration; a regulariser without weight has no phase."""
        loss = self.config.loss
        reduction = "sum" if self.config.reference.sum_chunks else "mean"
        judge = {"chunk": judged_at_once, "reduction": reduction}
        phases = [Phase("d_main", (FULL,), FULL, self.d_main, **judge)]
        if loss.r1_image > 0 or loss.r1_semantics > 0:
            phases.append(Phase("d_reg", (FULL,), FULL, self.d_reg, every=loss.r1_every, **judge))
        phases.append(Phase("g_main", (GENERATOR,), GENERATOR, self.g_main, real=False, reduction=reduction))
        if loss.path_weight > 0:
            phases.append(path_phase(loss.path_every, path_settings, self.path_pictures, reduction))
        return phases

    def portraits(self, ctx: PhaseContext, draws: Draws, count: int) -> tuple[Portraits, Tensor]:
        """Fresh pictures (N, 3, S, S) with masks (N, K, S, S), and the style codes (N, L, D) they were drawn with.

        The renderer gets no gradient. Where heads are mixed, the decoder changes its style at a layer of its own.
        """
        c, generator = ctx.config, generator_of(ctx)
        assert generator.decoder is not None
        settings = c.render.settings(c.camera.radius, training=True)
        with torch.no_grad():
            camera = draw_cameras(ctx, c.camera.prior(), draws, count)
            codes, second = draw_pair(ctx, draws, count)
            scene = generator.scene(codes)
            volume = generator.render_volume(scene, camera, settings, draws, SdfOptions(c.model.sampling))
            assert volume.features is not None and volume.semantics is not None
            features, masks = (ray_image(x, settings.resolution) for x in (volume.features, volume.semantics))
        ws = self.styles(ctx, draws, codes.values["decoder"], None if second is None else second.values["decoder"])
        noise = ("const", draw_noise(generator.decoder, count, draws))
        return Portraits(*generator.decode(features, masks, scene.replace(ws=ws, noise=noise))), ws

    def styles(self, ctx: PhaseContext, draws: Draws, code: Tensor, second: Tensor | None) -> Tensor:
        """Style codes (N, L, D) of the decoder, from some layer on those of the second code (N, W)."""
        decoder = generator_of(ctx).decoder
        assert decoder is not None
        if second is None:
            return decoder.broadcast(decoder.style(code)).contiguous()
        last = decoder.num_ws - 1
        inject = ctx.decide(
            lambda own, _: min(1 + int(float(own.uniform("inject", ())) * last), last), draws.at(chunk=0)
        )
        return decoder.broadcast(decoder.style(code), decoder.style(second), inject)

    def path_pictures(self, ctx: PhaseContext, count: int) -> tuple[Tensor, Tensor]:
        """Pictures and their style codes: what the path lengths look at."""
        portraits, ws = self.portraits(ctx, ctx.draws, count)
        return portraits.image, ws

    # ---------------------------------------------------------------- losses

    def d_main(self, ctx: PhaseContext) -> Losses:
        """Logistic loss of fakes and reals, back-propagated one after the other."""
        judge: Any = ctx.models[FULL]
        with torch.no_grad():
            fakes, _ = self.portraits(ctx, ctx.draws, ctx.count)
        logits = judge(fakes.image, fakes.masks)
        ctx.log("fake_logit", logits)
        yield "fake", d_fake_loss(logits)
        del logits, fakes
        real = real_portraits(ctx)
        logits = judge(real.image, real.masks)
        ctx.log("real_logit", logits)
        yield "real", d_real_loss(logits)

    def d_reg(self, ctx: PhaseContext) -> Losses:
        """R1 on picture and masks."""
        judge: Any = ctx.models[FULL]
        leaves = real_portraits(ctx).leaves()
        yield "r1", portrait_r1(judge(leaves.image, leaves.masks), leaves.image, leaves.masks, ctx.config.loss)

    def g_main(self, ctx: PhaseContext) -> Losses:
        """Non-saturating loss."""
        judge: Any = ctx.models[FULL]
        fakes, _ = self.portraits(ctx, ctx.draws, ctx.count)
        yield "realness", g_loss(judge(fakes.image, fakes.masks))


def path_settings(config: CnerfConfig) -> PathSettings:
    """Of the path length regulariser."""
    return PathSettings(config.loss.path_weight, config.loss.path_decay, config.loss.path_shrink)
