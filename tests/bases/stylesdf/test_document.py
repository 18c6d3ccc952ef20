# SPDX-License-Identifier: Apache-2.0
"""docs/stylesdf.md agrees with the code: flags, curricula, deviations, functions, commands."""

from __future__ import annotations

import re
from functools import reduce

from facelab.bases.stylesdf.config import DEVIATIONS, StyleSdfConfig
from facelab.bases.stylesdf.options import describe
from facelab.cli.render import extract_mesh, render_images, render_video
from facelab.cli.train import train_command
from facelab.config import list_curricula, load_staged
from tests.conftest import CHECKOUT
from tests.documents import find, functions, options_of, page, rows

# of the original's option parser, all groups
ORIGINAL_FLAGS = """
dataset_path config expname ckpt continue_training checkpoints_dir iter batch chunk val_n_sample d_reg_every g_reg_every
local_rank mixing lr r1 view_lambda eikonal_lambda min_surf_lambda min_surf_beta path_regularize path_batch_shrink wandb
no_sphere_init results_dir truncation_ratio truncation_mean identities num_views_per_id no_surface_renderings
fixed_camera_angles azim_video size style_dim channel_multiplier n_mlp lr_mapping renderer_spatial_output_dim
project_noise uniform azim elev fov dist_radius depth width no_sdf no_z_normalize static_viewdirs N_samples
no_offset_sampling perturb raw_noise_std force_background return_xyz return_sdf
"""
PICTURE_FLAGS = """
expname ckpt size identities results_dir truncation_ratio truncation_mean num_views_per_id fixed_camera_angles
no_surface_renderings azim_video project_noise
"""
TEXT = page("stylesdf")


def test_every_original_flag_is_mapped() -> None:
    assert [row[0].strip("`") for row in rows(TEXT, "flags")] == [f"--{flag}" for flag in ORIGINAL_FLAGS.split()]


def test_flags_and_settings_of_our_side_exist() -> None:
    options = options_of(train_command("stylesdf", "debug"))
    cells = {row[0].strip("`"): row[1] for row in rows(TEXT, "flags")}
    for flag, key in describe().items():
        assert flag in options and all(f"`{part}`" in cells[flag] for part in key.split(" and ")), flag
    config = StyleSdfConfig()
    for cell in cells.values():
        assert set(re.findall(r"`(--[\w-]+)", cell)) <= options, cell
        for setting in re.findall(r"`([a-z]+\.[a-z_0-9]+)`", cell):
            reduce(getattr, setting.split("."), config)


def test_no_flag_of_the_original_is_met_with_silence() -> None:
    """What is in the tables and not among our options is answered by the commands themselves."""
    training = train_command("stylesdf", "debug")
    flags = {f"--{flag}" for flag in ORIGINAL_FLAGS.split()}
    assert flags - options_of(training) == set(training.instead)
    pictures = (render_images, render_video, extract_mesh)
    asked = {flag for row in rows(TEXT, "picture flags") for flag in re.findall(r"`(--[\w-]+)", row[0])}
    for command in pictures:
        assert asked - options_of(command) <= set(command.instead)
        assert not options_of(command) & set(command.instead)


def test_settings_in_the_text_exist() -> None:
    config = StyleSdfConfig()
    sections = set(vars(config)) - {"stage", "init_from"}
    found = {s for s in re.findall(r"`([a-z]+\.[a-z_0-9]+)`", TEXT) if s.split(".")[0] in sections}
    assert len(found) > 40
    for setting in found:
        reduce(getattr, setting.split("."), config)


def test_curricula() -> None:
    expected = []
    for curriculum in list_curricula("stylesdf"):
        c = load_staged(StyleSdfConfig, [curriculum.path]).at(0)
        names = ", ".join(f"`{alias}`" for alias in curriculum.aliases) or "-"
        side = f"{c.render.resolution}" + (f" to {c.model.resolution}" if c.stage == "full" else "")
        batch = f"{c.train.batch_per_gpu}" if c.train.batch_size is None else f"{c.train.batch_size} in all"
        numbers = [str(c.render.samples), batch, str(c.train.batch_chunk), f"{c.loss.r1:g}", f"{c.view.azimuth:g}"]
        expected.append([curriculum.name, names, c.stage, side, *numbers, str(c.train.max_steps)])
    assert rows(TEXT, "curricula") == expected


def test_deviations() -> None:
    assert rows(TEXT, "deviations") == [[f"`reference.{d.switch}`", d.what] for d in DEVIATIONS]
    assert {d.switch for d in DEVIATIONS} == set(vars(StyleSdfConfig().reference))


def test_functions_exist() -> None:
    names = functions(TEXT)
    assert len(names) > 15
    assert [path for path in names if not callable(find(path))] == []


def test_curricula_of_the_commands_exist() -> None:
    curricula = {name for c in list_curricula("stylesdf") for name in (c.name, *c.aliases)}
    shown = set(re.findall(r"--curriculum (\w+)", TEXT))
    assert shown and shown <= curricula


def test_flags_of_pictures_and_videos() -> None:
    """Every flag of the original's programs has a row; what stands on our side exists."""
    table = rows(TEXT, "picture flags")
    assert {f for row in table for f in re.findall(r"`--([\w-]+)`", row[0])} == set(PICTURE_FLAGS.split())
    known = options_of(render_images, render_video, extract_mesh)
    for row in table:
        assert set(re.findall(r"`(--[\w-]+)", row[1])) <= known, row
        assert all((CHECKOUT / path).is_file() for path in re.findall(r"`(scripts/\w+\.py)`", row[1])), row
