# SPDX-License-Identifier: Apache-2.0
"""docs/fenerf.md and docs/pigan.md agree with the code: options, curricula, deviations, functions. Commands of all documents."""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path

import pytest

from facelab.bases.pigan.config import DEVIATIONS as PIGAN_DEVIATIONS
from facelab.config import list_curricula, load_staged, resolve_curriculum
from facelab.methods import load_config_type
from facelab.methods.fenerf.config import DEVIATIONS as FENERF_DEVIATIONS
from tests.commands.running import COMMANDS, command_of
from tests.conftest import CHECKOUT
from tests.documents import find, functions, options_of, page, rows, shown_commands, wrong_words

DOCUMENTS = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
UNSHOWN = {"export_model", "model_card", "quickstart", "train_parser"}
DEVIATIONS = {"fenerf": FENERF_DEVIATIONS, "pigan": PIGAN_DEVIATIONS}
ORIGINAL_FLAGS = """
n_epochs sample_interval output_dir load_dir load_step curriculum eval_freq port set_step model_save_interval num_gpus
seeds max_batch_size lock_view_dependence image_size ray_step_multiplier interpolation_type latent_type batch_size
depth_map num_frames trajectory psi fill_color fov save_with_video save_with_latent seed_mode cube_size
voxel_resolution latent_path image_path seg_path save_dir load_checkpoint checkpoint_path init_seed iteration
background_mask white_background_mask lambda_img lambda_seg lambda_percept lambda_norm latent_normalize init_psi recon
no_center_crop
"""
ORIGINAL_SCRIPTS = """
train_double_latent_semantic render_multiview_images_double_semantic render_video_interpolation_semantic
extract_double_semantic_shapes inverse_render_double_semantic prepare_segmaps run_UI converter_log_to_video
fid_evaluation eval_metrics extract_shapes tools
"""


@pytest.mark.parametrize("name", ["fenerf", "pigan"])
def test_curricula(name: str) -> None:
    documented = rows(page(name), "curricula")
    for curriculum in dict.fromkeys(row[0] for row in documented):
        staged = load_staged(load_config_type(name), [resolve_curriculum(name, curriculum)])
        expected = []
        for start, c in zip(staged.boundaries, staged.stages, strict=True):
            samples = f"{c.render.samples} + {c.render.samples if c.render.hierarchical else 0}"
            rates = [c.optim.generator_lr, c.optim.image_lr, *([c.optim.semantic_lr] if name == "fenerf" else [])]
            counts = [start, c.render.resolution, samples, c.train.batch_per_gpu, c.train.batch_chunk]
            poses = f"{c.camera.yaw_std:g}, {c.camera.pitch_std:g}"
            expected.append([curriculum, *map(str, counts), *map(str, rates), poses])
        assert [row for row in documented if row[0] == curriculum] == expected
    for curriculum in list_curricula(name):
        for known in (curriculum.name, *(curriculum.aliases if name == "fenerf" else ())):
            assert f"`{known}`" in page(name) or [known] in [row[:1] for row in documented], known


@pytest.mark.parametrize("name", ["fenerf", "pigan"])
def test_deviations(name: str) -> None:
    assert rows(page(name), "deviations") == [[f"`reference.{d.switch}`", d.what] for d in DEVIATIONS[name]]
    switches = {d.switch for d in DEVIATIONS[name]}
    schema = load_config_type(name)
    assert switches == set(vars(schema().reference))  # no switch without a sentence


@pytest.mark.parametrize("name", ["fenerf", "pigan"])
def test_functions_exist(name: str) -> None:
    names = functions(page(name))
    assert len(names) >= 8
    assert [path for path in names if not callable(find(path))] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_in_documents_have_these_options(document: Path) -> None:
    commands = shown_commands(document)
    missing = [script for script, _ in commands if not (CHECKOUT / "scripts" / f"{script}.py").is_file()]
    assert not missing, f"no such scripts: {missing}"
    wrong = {f"{script} {word}" for script, words in commands for word in wrong_words(command_of(script), words)}
    assert not wrong, f"{document.name} shows what the commands do not know: {sorted(wrong)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_measurements_in_documents_can_be_repeated(document: Path) -> None:
    """Programs of tests/benchmarks that are named are there, and name the options that are shown."""
    for program, words in shown_commands(document, "tests/benchmarks"):
        source = (CHECKOUT / "tests" / "benchmarks" / f"{program}.py").read_text(encoding="utf-8")
        unknown = [w for w in words if re.match(r"--\w", w) and f'"{w}"' not in source]
        assert not unknown, f"{program} does not know {unknown}"


def test_the_readme_shows_every_command() -> None:
    """A command of its own for each script that is no helper of the project itself."""
    shown = {script for script, _ in shown_commands(CHECKOUT / "README.md")}
    here = {path.stem for path in (CHECKOUT / "scripts").glob("*.py")}
    assert here - shown == UNSHOWN


def test_unknown_options_are_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "python scripts/prepare_data.py photos A B --no-such\npython scripts/weights.py lst\n", encoding="utf-8"
    )
    found = [wrong_words(command_of(script), words) for script, words in shown_commands(page)]
    assert found == [["--no-such"], ["lst"]]


def test_every_original_command_and_flag_is_mapped() -> None:
    table = page("fenerf").split("## From the original's commands")[1].split("## Curricula")[0]
    missing = [flag for flag in ORIGINAL_FLAGS.split() if f"`--{flag}`" not in table]
    missing += [script for script in ORIGINAL_SCRIPTS.split() if f"{script}.py**" not in table]
    assert not missing


def test_our_side_of_the_table_exists() -> None:
    """Options named on our side belong to one of the commands; settings named exist."""
    table = page("fenerf").split("## From the original's commands")[1].split("## Curricula")[0]
    ours = [line.strip("|").split("|")[1] for line in table.splitlines() if line.startswith("|")]
    known = options_of(*COMMANDS.values())
    used = {o for cell in ours for o in re.findall(r"`(--[\w-]+)", cell)}
    assert len(used) > 15 and used <= known, used - known
    config = load_config_type("fenerf")()
    for setting in {s for cell in ours for s in re.findall(r"--set ([\w.]+)=", cell)}:
        assert reduce(getattr, setting.split("."), config) is not None, setting


def test_what_cannot_be_had_is_said() -> None:
    assert "The released files themselves could not be obtained" in page("fenerf")
    assert "not yet" in page("fenerf") and "## Results" in page("fenerf")
