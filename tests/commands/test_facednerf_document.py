# SPDX-License-Identifier: Apache-2.0
"""docs/facednerf.md agrees with the code: presets, flags, files, deviations, functions, commands."""

from __future__ import annotations

import importlib
import re
import shlex

import click
import pytest

from facelab.cli import facednerf
from facelab.cli.render import extract_mesh, render_video
from facelab.config import list_curricula, load_config
from facelab.lighting import light_from_text
from facelab.methods.facednerf.config import DEVIATIONS, FaceDNeRFConfig
from tests.conftest import CHECKOUT

ORIGINAL_FLAGS = """
network outdir image_path c_path sample_mult num_steps num_steps_pti nrr description lamda_id lamda_origin
lamda_diffusion lamda_illumination latent_space_type
"""
TEXT = (CHECKOUT / "docs" / "facednerf.md").read_text(encoding="utf-8")
COMMANDS = {
    "invert_eg3d": facednerf.invert_eg3d,
    "edit_facednerf": facednerf.edit_facednerf,
    "relight_facednerf": facednerf.relight_facednerf,
    "generate_facednerf": facednerf.generate_facednerf,
    "render_video": render_video,
    "extract_mesh": extract_mesh,
}


def rows(marker: str) -> list[list[str]]:
    """Cells of the table after a marker, without its header."""
    lines = TEXT.split(f"<!-- {marker}")[1].splitlines()[1:]
    table = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def options_of(command: click.Command) -> set[str]:
    return {o for p in command.params if isinstance(p, click.Option) for o in p.opts}


def test_presets() -> None:
    expected = []
    for entry in list_curricula("facednerf"):
        c = load_config(FaceDNeRFConfig, [entry.path])
        w = c.weights
        numbers = [c.codes.steps, c.tune.steps, w.identity, w.reconstruction, w.text, w.light, w.noise]
        expected.append([entry.name, c.codes.space, *(f"{value:g}" for value in numbers)])
    assert rows("presets") == expected


def test_flags_of_the_original() -> None:
    known = set().union(*(options_of(command) for command in COMMANDS.values()))
    documented = rows("flags")
    assert [row[0] for row in documented] == [f"`--{name}`" for name in ORIGINAL_FLAGS.split()]
    for _, ours in documented:
        assert ours in ("MODEL", "PHOTOS") or ours.strip("`") in known, ours


def test_deviations_and_functions() -> None:
    assert rows("deviations") == [[f"`reference.{d.switch}`", d.what] for d in DEVIATIONS]
    for _, names in rows("functions"):
        for name in re.findall(r"`([\w.]+)`", names):
            module, _, attribute = name.rpartition(".")
            assert callable(getattr(importlib.import_module(module), attribute)), name


@pytest.mark.parametrize("line", [line for line in TEXT.splitlines() if line.startswith("python scripts/")])
def test_commands_of_the_document(line: str) -> None:
    """Scripts exist and know every option that is shown with them."""
    words = shlex.split(line)
    name = words[1].removeprefix("scripts/").removesuffix(".py")
    assert (CHECKOUT / words[1]).is_file()
    used = {word for word in words if word.startswith("--")}
    assert used <= options_of(COMMANDS[name]), used - options_of(COMMANDS[name])


def test_lights_of_the_document() -> None:
    block = TEXT.split("```yaml")[1].split("```")[0].strip()
    shown = [line.split("#")[0].strip() for line in block.splitlines()]
    read = [light_from_text(text) for text in shown if not text.endswith((".hdr", ".yaml"))]
    assert len(read) == 4 and all(light.abs().max() > 0 for light in read)
