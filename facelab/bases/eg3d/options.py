# SPDX-License-Identifier: Apache-2.0
"""Flags of the original's training command that say the same here, as names of settings. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from facelab.option_types import ABOVE_ZERO, COUNT, NONNEGATIVE, POSITIVE, PROBABILITY


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: as the original has it, without the dashes.
        key: our setting.
        kind: what its value is.
        help: one line.
    """

    name: str
    key: str
    kind: Any
    help: str

    @property
    def parameter(self) -> str:
        return self.name.replace("-", "_")


FLAGS = (
    Flag("gamma", "loss.r1_gamma", NONNEGATIVE, "Weight of R1."),
    Flag("batch", "train.batch_size", POSITIVE, "Samples per step over all processes."),
    Flag("batch-gpu", "train.batch_chunk", POSITIVE, "Samples per pass; the results of the passes are averaged."),
    Flag("mbstd-group", "discriminator.group_size", POSITIVE, "Samples of a minibatch statistic."),
    Flag("glr", "optim.generator_lr", NONNEGATIVE, "Learning rate of the generator."),
    Flag("dlr", "optim.discriminator_lr", NONNEGATIVE, "Learning rate of the discriminator."),
    Flag("map-depth", "model.mapping_layers", POSITIVE, "Layers of the generator's mapping network."),
    Flag("cond", "discriminator.conditioned", bool, "Whether the discriminator is told the camera."),
    Flag("mirror", "data.mirror", bool, "Mirror half of the pictures, and their cameras."),
    Flag("aug", "augment.mode", click.Choice(["noaug", "ada", "fixed"]), "Augmentation."),
    Flag("p", "augment.p", PROBABILITY, "Probability of --aug fixed."),
    Flag("target", "augment.target", PROBABILITY, "Target of --aug ada."),
    Flag("freezed", "discriminator.freeze_layers", COUNT, "First layers of the discriminator that are not trained."),
    Flag("gen_pose_cond", "conditioning.pose", bool, "Whether the generator is told the camera."),
    Flag("gpc_reg_prob", "conditioning.swap", PROBABILITY, "Final probability that it is told a foreign one."),
    Flag("gpc_reg_fade_kimg", "conditioning.swap_fade_kimg", NONNEGATIVE, "From always swapped to that."),
    Flag("disc_c_noise", "discriminator.label_noise", NONNEGATIVE, "Noise on the cameras that the discriminator sees."),
    Flag("density_reg", "loss.density_weight", NONNEGATIVE, "Weight of the density regulariser."),
    Flag("density_reg_every", "loss.density_every", POSITIVE, "Steps from one to the next."),
    Flag("density_reg_p_dist", "loss.density_distance", NONNEGATIVE, "Distance between its points."),
    Flag(
        "reg_type",
        "loss.density_type",
        click.Choice(["l1", "tv", "monotonic-detach", "monotonic-fixed"]),
        "Kind of density regulariser.",
    ),
    Flag("neural_rendering_resolution_initial", "neural.initial", POSITIVE, "Side of the rendering, pixels."),
    Flag("neural_rendering_resolution_final", "neural.final", POSITIVE, "What it grows to."),
    Flag("neural_rendering_resolution_fade_kimg", "neural.fade_kimg", NONNEGATIVE, "Over how many thousand images."),
    Flag("blur_fade_kimg", "loss.blur_fade_kimg", NONNEGATIVE, "Thousand images with blur, for a batch of 32."),
    Flag("style_mixing_prob", "loss.style_mixing", PROBABILITY, "Probability of style mixing."),
    Flag("decoder_lr_mul", "model.decoder_lr_mul", NONNEGATIVE, "Learning rate multiplier of the decoder."),
    Flag(
        "sr_noise_mode",
        "model.superresolution_noise",
        click.Choice(["none", "random", "const"]),
        "Noise of the super-resolution.",
    ),
    Flag("sr_num_fp16_res", "model.superresolution_half", COUNT, "Super-resolution in half precision if above 0."),
    Flag("g_num_fp16_res", "model.half_blocks", COUNT, "Backbone blocks in half precision."),
    Flag("d_num_fp16_res", "discriminator.half_blocks", COUNT, "Discriminator blocks in half precision."),
    Flag("workers", "train.workers", COUNT, "Threads that read pictures, per process."),
)
VALUES = {"noaug": "none"}  # values that are called otherwise here
NO_EFFECT = "nothing, it never had an effect; leave it out"
INSTEAD = {  # flags of the original that are not here -> what to do
    "--outdir": "--out FOLDER (the run folder itself)",
    "--cfg": "--curriculum ffhq_512, afhq_512, shapenet_128 (--list-curricula shows all)",
    "--desc": "name the folder with --out",
    "--metrics": "scripts/compute_metrics.py on any checkpoint",
    "--nobench": "nothing, algorithms are chosen by PyTorch; leave it out",
    "--resume_blur": "--init-from keeps the settings loss.blur_fade_kimg, conditioning.swap_fade_kimg and ema.rampup",
    "--sr-module": "--set model.superresolution=2x (4x, 8x, 8xdc, none)",
    "--c-scale": "nothing, labels are passed as they are; leave it out",
    "--c-noise": NO_EFFECT,
    "--sr_first_cutoff": NO_EFFECT,
    "--sr_first_stopband": NO_EFFECT,
}
# flags whose one value sets two things: our networks have one number of channels each
BOTH = {"cbase": "channel_base", "cmax": "channel_max"}


def original_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags to a click command; their values arrive under their own names.

    ``tick`` and ``snap`` stay among its options: they become steps where the batch is known.
    """
    for name, text in (
        ("snap", "Ticks from one checkpoint, with its pictures, to the next. [checkpoint.every, log.samples_every]"),
        ("tick", "Thousand images from one line of the log to the next; 4 for --snap unless given. [log.every]"),
    ):
        command = click.option(f"--{name}", type=ABOVE_ZERO, default=None, help=text)(command)
    for name, key in reversed(BOTH.items()):
        command = click.option(f"--{name}", type=POSITIVE, default=None, help=f"Both networks' {key}.")(command)
    for flag in reversed(FLAGS):
        text = f"{flag.help} [{flag.key}]"
        names = dict.fromkeys((f"--{flag.name}", f"--{flag.name.replace('_', '-')}"))  # theirs, and as ours are spelled
        command = click.option(*names, flag.parameter, type=flag.kind, default=None, help=text)(command)
    return command


def take_overrides(options: dict[str, Any]) -> list[str]:
    """Remove the flags' values from a command's ``options`` -> ``key=value`` of those that were given."""
    found = []
    for flag in FLAGS:
        value = options.pop(flag.parameter, None)
        if value is not None:
            value = VALUES.get(value, value) if isinstance(value, str) else value
            found.append(f"{flag.key}={str(value).lower() if isinstance(value, bool) else value}")
    for name, key in BOTH.items():
        value = options.pop(name, None)
        if value is not None:
            found += [f"model.{key}={value}", f"discriminator.{key}={value}"]
    return found


def describe() -> Mapping[str, str]:
    """Flag -> setting, for the documentation's table."""
    table = {f"--{flag.name}": flag.key for flag in FLAGS}
    return table | {f"--{name}": f"model.{key}, discriminator.{key}" for name, key in BOTH.items()}
