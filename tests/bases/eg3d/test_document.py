# SPDX-License-Identifier: Apache-2.0
"""docs/eg3d.md agrees with the code: flags, curricula, deviations, functions, commands."""

from __future__ import annotations

import re
from functools import reduce

from facelab.bases.eg3d.config import DEVIATIONS, Eg3dConfig
from facelab.bases.eg3d.options import describe
from facelab.cli.metrics import compute_metrics
from facelab.cli.render import extract_mesh, render_images, render_video
from facelab.cli.train import train_command
from facelab.config import list_curricula, load_staged
from tests.conftest import CHECKOUT
from tests.documents import find, functions, options_of, page, rows

# of the original's training command
ORIGINAL_FLAGS = """
outdir cfg data gpus batch gamma cond mirror aug p target resume freezed batch-gpu cbase cmax glr dlr map-depth
mbstd-group desc metrics kimg tick snap seed nobench workers dry-run neural_rendering_resolution_initial
neural_rendering_resolution_final neural_rendering_resolution_fade_kimg blur_fade_kimg gen_pose_cond c-scale c-noise
gpc_reg_prob gpc_reg_fade_kimg disc_c_noise sr_noise_mode resume_blur sr_num_fp16_res g_num_fp16_res d_num_fp16_res
sr_first_cutoff sr_first_stopband style_mixing_prob sr-module density_reg density_reg_every density_reg_p_dist reg_type
decoder_lr_mul
"""
# of its programs for pictures and videos
PICTURE_FLAGS = """
network seeds outdir trunc trunc-cutoff class shapes shape-res fov-deg shape-format reload_modules shuffle-seed grid
num-keyframes w-frames cfg image_mode sample_mult nrr interpolate
"""
METRIC_FLAGS = "network metrics data mirror gpus verbose"
TEXT = page("eg3d")


def test_every_original_flag_is_mapped() -> None:
    stated = {row[0].strip("`") for row in rows(TEXT, "flags")}
    assert stated == {f"--{flag}" for flag in ORIGINAL_FLAGS.split()}


def test_flags_and_settings_of_our_side_exist() -> None:
    options = options_of(train_command("eg3d", "debug"))
    cells = {row[0].strip("`"): row[1] for row in rows(TEXT, "flags")}
    for flag, key in describe().items():
        assert flag in options and all(f"`{part.strip()}`" in cells[flag] for part in key.split(",")), flag
    config = Eg3dConfig()
    for cell in cells.values():
        assert {o for o in re.findall(r"`(--[\w-]+)", cell) if o != "--set"} <= options, cell
        for setting in re.findall(r"`(?:--set )?([a-z_]+\.[a-z_0-9]+)", cell):
            reduce(getattr, setting.split("."), config)


def test_curricula() -> None:
    expected = []
    for curriculum in list_curricula("eg3d"):
        c = load_staged(Eg3dConfig, [curriculum.path]).at(0)
        size = c.train.batch_size
        assert size is not None
        rendering = f"{c.neural.initial}" + ("" if c.neural.final is None else f" to {c.neural.final}")
        names = ", ".join(f"`{alias}`" for alias in curriculum.aliases) or "-"
        samples = f"{c.render.samples} + {c.render.importance}"
        swap = str(c.conditioning.swap) if c.conditioning.pose else "no pose"
        kimg = f"{c.train.max_steps * size / 1000:g}"
        numbers = [str(c.model.resolution), rendering, samples, str(size), str(c.train.batch_chunk)]
        expected.append([curriculum.name, names, *numbers, f"{c.loss.r1_gamma:g}", swap, c.augment.mode, kimg])
    assert rows(TEXT, "curricula") == expected


def test_deviations() -> None:
    assert rows(TEXT, "deviations") == [[f"`reference.{d.switch}`", d.what] for d in DEVIATIONS]
    assert {d.switch for d in DEVIATIONS} == set(vars(Eg3dConfig().reference))


def test_functions_exist() -> None:
    names = functions(TEXT)
    assert len(names) > 15
    assert [path for path in names if not callable(find(path))] == []


def test_curricula_of_the_commands_exist() -> None:
    curricula = {name for c in list_curricula("eg3d") for name in (c.name, *c.aliases)}
    shown = set(re.findall(r"--curriculum ([a-z]\w*)", TEXT))
    assert shown and shown <= curricula


def test_flags_of_pictures_and_videos() -> None:
    """Every flag of the original's programs has a row; what stands on our side exists."""
    table = rows(TEXT, "picture flags")
    assert {f for row in table for f in re.findall(r"`--([\w-]+)`", row[0])} == set(PICTURE_FLAGS.split())
    known = options_of(render_images, render_video, extract_mesh)
    for row in table:
        assert set(re.findall(r"`(--[\w-]+)", row[1])) <= known, row
        assert all((CHECKOUT / path).is_file() for path in re.findall(r"`(scripts/\w+\.py)`", row[1])), row


def test_flags_of_metrics() -> None:
    table = rows(TEXT, "metric flags")
    assert [row[0] for row in table] == [f"`--{flag}`" for flag in METRIC_FLAGS.split()]
    known = options_of(compute_metrics)
    for row in table:
        assert set(re.findall(r"`(--[\w-]+)", row[1])) <= known, row


def test_no_flag_of_the_original_is_met_with_silence() -> None:
    """What is in the tables and not among our options is answered by the command itself."""
    pairs = ((train_command("eg3d", "debug"), ORIGINAL_FLAGS), (compute_metrics, METRIC_FLAGS))
    for command, flags in pairs:
        missing = {f"--{flag}" for flag in flags.split()} - options_of(command)
        assert missing <= set(command.instead) and not set(command.instead) & options_of(command)
    pictures = {f"--{flag}" for flag in PICTURE_FLAGS.split()} - options_of(render_images, render_video)
    assert pictures <= {*render_images.instead, *render_video.instead}
    assert all(not options_of(c) & set(c.instead) for c in (render_images, render_video, extract_mesh))
