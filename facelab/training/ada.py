# SPDX-License-Identifier: Apache-2.0
"""The controller of adaptive augmentation: it keeps the share of real pictures that the discriminator recognises.

Karras et al., arXiv 2006.06676, section 3: r_t = E[sign D(real)] should stay at a target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from facelab.nn.augment import AugmentPipe
from facelab.training.phases import AfterPhase

SIGN = "ada_sign"  # name of the statistic that a discriminator phase collects: mean sign of D(real)


def adapted(p: Tensor, sign: Tensor, target: float, batch_size: int, interval: int, kimg: float) -> Tensor:
    """``max(p + sign(E[sign] - target) * batch * interval / (1000 kimg), 0)``; there is no upper limit.

    Args:
        p: 0-d probability.
        sign: 0-d mean of sign D(real) over the last ``interval`` steps, in [-1, 1].
        target: 0.6 in the paper.
        batch_size: images per step over all processes.
        interval: steps between adjustments.
        kimg: thousands of images in which p could go from 0 to 1.
    """
    return (p + torch.sign(sign - target) * (batch_size * interval / (kimg * 1000))).clamp(min=0)


def adapt(after: AfterPhase, pipe: AugmentPipe, target: float, kimg: float, interval: int = 4) -> None:
    """Collect this step's statistic :data:`SIGN`; every ``interval`` steps adjust ``pipe.p`` and begin anew."""
    total = pipe.sign_sum + after.statistics[SIGN].to(pipe.sign_sum.device)
    steps = pipe.sign_steps + 1
    if (after.progress.step + 1) % interval:
        after.assign_(pipe.sign_sum, total)
        after.assign_(pipe.sign_steps, steps)
        return
    after.assign_(pipe.p, adapted(pipe.p, total / steps, target, after.progress.batch_size, interval, kimg))
    pipe.sign_sum.zero_()
    pipe.sign_steps.zero_()
