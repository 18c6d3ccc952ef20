# SPDX-License-Identifier: Apache-2.0
"""Command line entry points. Modules here import click alone until a command runs, so that --help is fast."""

from __future__ import annotations

import importlib

import click

COMMANDS = {  # name -> (module, attribute)
    "render-images": ("facelab.cli.render", "render_images"),
    "render-video": ("facelab.cli.render", "render_video"),
    "extract-mesh": ("facelab.cli.render", "extract_mesh"),
    "convert-checkpoint": ("facelab.cli.convert", "convert_checkpoint"),
    "export-model": ("facelab.cli.export", "export_command"),
    "model-card": ("facelab.cli.card", "card_command"),
    "compute-metrics": ("facelab.cli.metrics", "compute_metrics"),
    "prepare-data": ("facelab.cli.prepare", "prepare_data"),
    "prepare-photo": ("facelab.cli.photos", "prepare_photo"),
    "make-synthetic-heads": ("facelab.cli.heads", "make_synthetic_heads"),
    "edit-cnerf": ("facelab.cli.edit_cnerf", "edit_cnerf"),
    "invert-cnerf": ("facelab.cli.invert", "invert_cnerf"),
    "invert-eg3d": ("facelab.cli.facednerf", "invert_eg3d"),
    "edit-facednerf": ("facelab.cli.facednerf", "edit_facednerf"),
    "relight-facednerf": ("facelab.cli.facednerf", "relight_facednerf"),
    "generate-facednerf": ("facelab.cli.facednerf", "generate_facednerf"),
    "train-parser": ("facelab.cli.parser", "train_parser"),
    "weights": ("facelab.cli.weights", "weights"),
    "quickstart": ("facelab.cli.quickstart", "quickstart"),
}
TRAINED = {
    "train-fenerf": ("fenerf", "celebamask_hq_128"),
    "train-pigan": ("pigan", "celeba"),
    "train-eg3d": ("eg3d", "ffhq_512"),
    "train-stylesdf": ("stylesdf", "ffhq_volume"),
    "train-cnerf": ("cnerf", "ffhq_volume"),
}


class Commands(click.Group):
    """The commands of scripts/ under one name, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*COMMANDS, *TRAINED])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in TRAINED:
            from facelab.cli.train import train_command

            return train_command(*TRAINED[cmd_name])
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name]
        return getattr(importlib.import_module(module), attribute)


@click.command("facelab", cls=Commands)
@click.version_option(package_name="facelab")
def main() -> None:
    """Train, invert, edit, relight and render 3D-aware faces."""
