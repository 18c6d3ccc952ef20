# SPDX-License-Identifier: Apache-2.0
"""Options of invert_eg3d and of FaceDNeRF's commands, and the settings they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from facelab.cli.common import Command
from facelab.cli.photo_input import (
    PATH,
    batch_option,
    max_points_option,
    perceptual_option,
    photo_options,
    quiet_option,
    resume_option,
    save_every_option,
    weights_option,
    with_options,
)
from facelab.cli.photos import camera_options
from facelab.option_types import FiniteFloat

SETTINGS = {  # option -> setting of FaceDNeRFConfig
    "domain": "domain",
    "seed": "seed",
    "space": "codes.space",
    "steps": "codes.steps",
    "tune_steps": "tune.steps",
    "tune_parts": "tune.parts",
    "identity_weight": "weights.identity",
    "reconstruction_weight": "weights.reconstruction",
    "picture_weight": "weights.picture",
    "text_weight": "weights.text",
    "clip_weight": "weights.clip",
    "light_weight": "weights.light",
    "sample_factor": "render.sample_factor",
    "image_size": "render.resolution",
    "superresolution": "memory.superresolution",
    "max_points": "memory.max_points",
    "guidance": "guidance.guidance",
    "diffusion_precision": "guidance.precision",
}
LOW_MEMORY = ("memory.recompute=true", "memory.superresolution=bf16", "memory.max_points=500000")
WEIGHT = FiniteFloat(0)


def source_options(function: Command) -> Command:
    """Photos and how they are taken in."""
    camera = (
        "Camera of a crop: 25 numbers, a file (.npy, .json, .txt), a dataset.json or a folder of them; face: found anew. "
        "[default: NAME.npy or dataset.json beside the photo, else face]"
    )
    aligned = "PHOTOs without a camera are EG3D's crops, too: their cameras come from the face."
    return photo_options(camera, aligned)(camera_options(function))


def method_options(side: bool) -> Any:
    """How a head is looked for; ``side``: with the losses of the side view."""
    options = [
        click.option("--preset", default=None, help="Name (see --list-presets) or YAML file.  [default: as needed]"),
        click.option(
            "--list-presets",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_list_presets,
            help="List the presets and leave.",
        ),
        click.option("--domain", default=None, help="faces, cats or other: which losses mean anything."),
        click.option("--space", default=None, help="w or w_plus: one vector for all layers, or one for each."),
        click.option("--steps", type=click.IntRange(0), default=None, help="First stage: codes."),
        click.option("--tune-steps", type=click.IntRange(0), default=None, help="Second stage: the generator."),
        click.option(
            "--tune-parts", default=None, help="Tune only these: superresolution, field_net ...; with commas."
        ),
        click.option("--identity-weight", type=WEIGHT, default=None, help="Same person (ArcFace), front."),
        click.option("--reconstruction-weight", type=WEIGHT, default=None, help="Perceptual distance, front."),
        click.option("--picture-weight", type=WEIGHT, default=None, help="Mean squared difference, front."),
        *(_side_options() if side else ()),
        click.option(
            "--sample-factor",
            type=FiniteFloat(0, min_open=True),
            default=None,
            help="On the model's samples per ray.",
        ),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Any setting; repeatable."),
        click.option("--reference", is_flag=True, help="Restore everything the original does where we deviate."),
        perceptual_option,
        click.option(
            "--identity",
            default="auto",
            show_default=True,
            help="ArcFace IR-SE50 file; none; auto: the manifest's file if there.",
        ),
    ]
    return lambda function: with_options(function, options)


def _side_options() -> list[Any]:
    return [
        click.option("--text-weight", type=WEIGHT, default=None, help="Score distillation, side."),
        click.option("--clip-weight", type=WEIGHT, default=None, help="CLIP distance, side.  [with --clip: 1]"),
        click.option("--light-weight", type=WEIGHT, default=None, help="Distance of lights, side."),
    ]


def text_options(function: Command) -> Command:
    """The prompt and who judges it."""
    options = (
        click.option("--negative", default="", help="What the head should not be."),
        click.option("--diffusion", type=PATH, default=None, help="Stable Diffusion's folder (1.x, 2.x, XL)."),
        click.option(
            "--demo-diffusion",
            is_flag=True,
            help="A tiny diffusion model of random weights instead: shows the mechanism, edits nothing.",
        ),
        click.option("--diffusion-device", default=None, help="Another GPU for it.  [default: --device]"),
        click.option(
            "--diffusion-precision",
            type=click.Choice(["fp16", "bf16", "fp32"]),
            default=None,
            help="[default: bf16 on a GPU, fp32 on a CPU]",
        ),
        click.option(
            "--guidance", type=FiniteFloat(), default=None, help="How strongly the prompt pulls.  [default: 100]"
        ),
        click.option("--embeddings", type=PATH, default=None, help="Folder that keeps encoded prompts."),
        click.option("--clip", type=PATH, default=None, help="CLIP's file: its similarity counts, too, or alone."),
        click.option(
            "--clip-activation",
            type=click.Choice(["gelu", "quick_gelu"]),
            default=None,
            help="Of CLIP's layers, where its file does not say it.  [default: quick_gelu for OpenAI's, else gelu]",
        ),
    )
    return with_options(function, options)


def light_options(function: Command) -> Command:
    """The light and who judges it."""
    options = (
        click.option(
            "--light",
            default=None,
            help="right, left, below, top_right; nine numbers; {direction: [1, 0.3, 0.5]}; a YAML file; a "
            "panorama (see docs/facednerf.md).",
        ),
        click.option("--light-of", type=PATH, default=None, help="The light of this photo."),
        click.option(
            "--light-network",
            default="auto",
            show_default=True,
            help="DPR's file; random: a network of random weights, for a try; auto: the manifest's file.",
        ),
    )
    return with_options(function, options)


def run_options(out: str, photos: bool = True) -> Any:
    """Folders, speed, memory, what is written."""
    options = [
        click.option("--out", type=PATH, default=Path(out), show_default=True, help="Gets a folder per head."),
        resume_option,
        *(_group_options() if photos else ()),
        click.option(
            "--image-size",
            type=click.IntRange(1),
            default=None,
            help="Pixels per side of the volume rendering. [default: the model's]",
        ),
        click.option("--low-memory", is_flag=True, help="Recompute, bf16 super-resolution, points in parts."),
        max_points_option,
        click.option("--superresolution", default=None, help="fp32, bf16 or as_built: its precision."),
        save_every_option,
        click.option(
            "--picture-every",
            type=click.IntRange(0),
            default=50,
            show_default=True,
            help="Steps between two pictures in steps/; 0: none.",
        ),
        click.option("--video-frames", type=click.IntRange(0), default=120, show_default=True, help="0: no video."),
        weights_option,
        quiet_option,
    ]
    return lambda function: with_options(function, options)


def _group_options() -> list[Any]:
    return [
        batch_option,
        click.option("--seed", type=int, default=None, help="Of side views, depths and perturbations."),
    ]


def settings_of(options: dict[str, Any], preset: str) -> Any:
    """The configuration that options stand for; those that are settings are taken out of ``options``.

    Args:
        preset: taken where ``--preset`` says nothing.

    Raises:
        UserError: an unknown preset or setting, a value that cannot be.
    """
    import dataclasses

    from facelab.config import load_config, resolve_curriculum
    from facelab.methods.facednerf.config import FaceDNeRFConfig, ReferenceConfig

    given = {setting: options.pop(name, None) for name, setting in SETTINGS.items()}
    changes = list(LOW_MEMORY) if options.pop("low_memory") else []
    changes += [f"{setting}={value}" for setting, value in given.items() if value is not None]
    if options.pop("reference"):
        changes += [f"reference.{entry.name}=true" for entry in dataclasses.fields(ReferenceConfig)]
    path = resolve_curriculum("facednerf", options.pop("preset") or preset)
    return load_config(FaceDNeRFConfig, [path], [*changes, *options.pop("overrides")])


def _list_presets(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    from facelab.config import list_curricula

    for entry in list_curricula("facednerf"):
        click.echo(f"{entry.name:20s} {entry.description}")
    context.exit()
