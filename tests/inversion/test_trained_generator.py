# SPDX-License-Identifier: Apache-2.0
"""A trained generator of another method: the loop needs the protocol alone."""

from __future__ import annotations

import functools

import torch

import facelab
from facelab.inversion import terms
from facelab.inversion.loop import Inversion, InversionSettings, advance_until
from facelab.inversion.measure import measure
from facelab.inversion.problem import Problem, Target, Weighted
from facelab.inversion.schedules import ramped_rate
from facelab.inversion.start import random_latents, start_statistics
from facelab.losses.perceptual import RandomPerceptual


def test_a_head_of_the_bundled_fenerf_is_found() -> None:
    """From the average, 15 steps at 16 px: the loss falls to less than a third, the picture comes within 25 dB."""
    model = facelab.load("fenerf_synthetic_64")
    settings = model.settings(16, 1).replace(samples_coarse=12, samples_fine=0)
    camera, codes = model.camera(yaw=0.2), model.codes(3, 1.0)
    with torch.no_grad():
        output = model.generator.render(model.generator.scene(codes), camera, settings)
    target, net = Target(output.rgb, camera, output.semantics), RandomPerceptual()
    start = start_statistics(model.generator, random_latents(model.generator, 500))
    chosen = {
        "picture": Weighted(1.0, terms.picture_term),
        "perceptual": Weighted(1.0, terms.perceptual_term(net, target)),
        "mask": Weighted(1.0, terms.scores_term),
        "prior": Weighted(0.01, terms.prior_term(start)),
    }
    spread = torch.cat([v.flatten() for v in start.spread.values.values()]).square().mean().sqrt()
    rate = functools.partial(ramped_rate, steps=15, base=0.1 * float(spread))
    inversion = Inversion(
        Problem(model.generator, target, chosen, settings), start.average, InversionSettings(15, rate)
    )
    first = inversion.advance()
    advance_until(inversion)
    solution = inversion.solution()
    assert solution.total < first.total / 3, (first.total, solution.total)
    with torch.no_grad():
        seen = model.generator.render(model.generator.scene(solution.codes), camera, settings)
    found, before = measure(seen, target, net), measure(first.output, target, net)
    assert found["psnr"] > max(25.0, float(before["psnr"]) + 3) and found["ssim"] > before["ssim"]
