# SPDX-License-Identifier: Apache-2.0
"""docs/cnerf.md agrees with the code: regions, flags, curricula, deviations, functions, commands."""

from __future__ import annotations

import re
from functools import reduce

import click

from facelab.cli.lmdb_sets import lmdb
from facelab.cli.render import render_images
from facelab.cli.train import train_command
from facelab.config import list_curricula, load_staged
from facelab.data.regions import REGION_CLASSES, REGION_PALETTE
from facelab.methods.cnerf.config import DEVIATIONS, CnerfConfig
from facelab.methods.cnerf.options import describe
from facelab.methods.cnerf.regions import NAMES, README_NAMES
from tests.documents import find, functions, options_of, page, rows

# of the original's option parser, groups of training, model and rendering
ORIGINAL_FLAGS = """
dataset_path config expname ckpt continue_training checkpoints_dir pretrain_render_path iter batch chunk val_n_sample
d_reg_every g_reg_every local_rank mixing lr r1_img r1_seg Semantic_D_lambda view_lambda eikonal_lambda min_surf_lambda
min_surf_beta path_regularize path_batch_shrink wandb no_sphere_init size style_dim channel_multiplier n_mlp n_render
n_wcode lr_mapping renderer_spatial_output_dim uniform azim elev fov dist_radius depth width no_sdf no_z_normalize
static_viewdirs N_samples no_offset_sampling perturb raw_noise_std force_background return_xyz return_sdf project_noise
"""
COMMAND_FLAGS = """
out_path n_worker size resample trained_ckpt results_dir identities truncation_ratio truncation_mean
no_surface_renderings semantics num_views_per_id fixed_camera_angles azim_video flag
"""
TEXT = page("cnerf")


def training() -> click.Command:
    return train_command("cnerf", "debug_volume")


def test_regions_and_the_trap_in_their_order() -> None:
    expected = []
    for channel, name in enumerate(NAMES):
        said = README_NAMES[channel] if README_NAMES[channel] == name else f"**{README_NAMES[channel]}**"
        classes, color = (",".join(map(str, numbers)) for numbers in (REGION_CLASSES[name], REGION_PALETTE[channel]))
        expected.append([str(channel), name, said, classes, color])
    assert rows(TEXT, "regions") == expected


def test_every_original_flag_is_mapped() -> None:
    assert [row[0].strip("`") for row in rows(TEXT, "flags")] == [f"--{flag}" for flag in ORIGINAL_FLAGS.split()]
    named = {flag for row in rows(TEXT, "commands") for flag in re.findall(r"`--([\w-]+)`", row[0])}
    assert named == set(COMMAND_FLAGS.split())


def test_flags_and_settings_of_our_side_exist() -> None:
    options = options_of(training())
    cells = {row[0].strip("`"): row[1] for row in rows(TEXT, "flags")}
    for flag, key in describe().items():
        assert flag in options and key.strip() in cells[flag], flag
    config = CnerfConfig()
    for cell in cells.values():
        assert set(re.findall(r"`(--[\w-]+)", cell)) <= options, cell
        for setting in re.findall(r"`([a-z]+\.[a-z_0-9]+)`", cell):
            reduce(getattr, setting.split("."), config)
    known = options_of(training(), lmdb, render_images)
    for row in rows(TEXT, "commands"):
        assert set(re.findall(r"`(--[\w-]+)", row[1])) <= known, row


def test_no_flag_of_the_original_is_met_with_silence() -> None:
    """What is in the tables and not among our options is answered by the commands themselves."""
    asked = {f"--{flag}" for flag in ORIGINAL_FLAGS.split()}
    pictures = {f"--{flag}" for flag in COMMAND_FLAGS.split()} - {"--out_path", "--n_worker", "--resample"}
    assert (asked | pictures) - options_of(training()) == set(training().instead)
    assert pictures - options_of(render_images) <= set(render_images.instead)
    assert set(lmdb.instead) == {"--out_path", "--n_worker"} and not options_of(lmdb) & set(lmdb.instead)


def test_curricula() -> None:
    expected = []
    for curriculum in list_curricula("cnerf"):
        c = load_staged(CnerfConfig, [curriculum.path]).at(0)
        side = f"{c.render.resolution}" + (f" to {c.model.resolution}" if c.model.stage == "full" else "")
        batch = f"{c.train.batch_per_gpu}" if c.train.batch_size is None else f"{c.train.batch_size} in all"
        numbers = [str(c.render.samples), batch, str(c.train.batch_chunk), str(c.train.max_steps)]
        expected.append([curriculum.name, c.model.stage, side, *numbers])
    assert rows(TEXT, "curricula") == expected


def test_deviations() -> None:
    assert rows(TEXT, "deviations") == [[f"`reference.{d.switch}`", d.what] for d in DEVIATIONS]
    assert {d.switch for d in DEVIATIONS} == set(vars(CnerfConfig().reference))


def test_functions_exist() -> None:
    names = functions(TEXT)
    assert len(names) > 10
    assert [path for path in names if not callable(find(path))] == []


def test_curricula_of_the_commands_exist() -> None:
    curricula = {name for c in list_curricula("cnerf") for name in (c.name, *c.aliases)}
    shown = set(re.findall(r"--curriculum (\w+)", TEXT))
    assert shown and shown <= curricula


def test_what_cannot_be_had_is_said() -> None:
    assert "**It was not at hand.**" in TEXT
