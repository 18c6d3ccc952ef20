# SPDX-License-Identifier: Apache-2.0
"""docs/facednerf.md agrees with the code: presets, flags, files, deviations, functions, lights."""

from __future__ import annotations

from facelab.cli import facednerf
from facelab.cli.render import extract_mesh, render_video
from facelab.config import list_curricula, load_config
from facelab.lighting import light_from_text
from facelab.methods.facednerf.config import DEVIATIONS, FaceDNeRFConfig
from tests.documents import find, functions, options_of, page, rows

ORIGINAL_FLAGS = """
network outdir image_path c_path sample_mult num_steps num_steps_pti nrr description lamda_id lamda_origin
lamda_diffusion lamda_illumination latent_space_type
"""
TEXT = page("facednerf")
COMMANDS = (
    facednerf.invert_eg3d, facednerf.edit_facednerf, facednerf.relight_facednerf, facednerf.generate_facednerf,
    render_video, extract_mesh,
)  # fmt: skip


def test_presets() -> None:
    expected = []
    for entry in list_curricula("facednerf"):
        c = load_config(FaceDNeRFConfig, [entry.path])
        w = c.weights
        numbers = [c.codes.steps, c.tune.steps, w.identity, w.reconstruction, w.text, w.light, w.noise]
        expected.append([entry.name, c.codes.space, *(f"{value:g}" for value in numbers)])
    assert rows(TEXT, "presets") == expected


def test_flags_of_the_original() -> None:
    known = options_of(*COMMANDS)
    documented = rows(TEXT, "flags")
    assert [row[0] for row in documented] == [f"`--{name}`" for name in ORIGINAL_FLAGS.split()]
    for _, ours in documented:
        assert ours in ("MODEL", "PHOTOS") or ours.strip("`") in known, ours


def test_no_flag_of_the_original_is_met_with_silence() -> None:
    for command in COMMANDS[:4]:
        assert set(command.instead) == {f"--{flag}" for flag in ORIGINAL_FLAGS.split()}
        assert not set(command.instead) & options_of(command)


def test_deviations_and_functions() -> None:
    assert rows(TEXT, "deviations") == [[f"`reference.{d.switch}`", d.what] for d in DEVIATIONS]
    assert [path for path in functions(TEXT) if not callable(find(path))] == []


def test_lights_of_the_document() -> None:
    block = TEXT.split("```yaml")[1].split("```")[0].strip()
    shown = [line.split("#")[0].strip() for line in block.splitlines()]
    read = [light_from_text(text) for text in shown if not text.endswith((".hdr", ".yaml"))]
    assert len(read) == 4 and all(light.abs().max() > 0 for light in read)
