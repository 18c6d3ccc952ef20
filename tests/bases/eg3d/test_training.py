# SPDX-License-Identifier: Apache-2.0
"""EG3D trains: resuming, processes, what each phase changes, conditioning, curricula, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from facelab.bases.eg3d import training
from facelab.bases.eg3d.config import Eg3dConfig
from facelab.bases.eg3d.data import LabelTable, WindowedSampler
from facelab.bases.eg3d.training import Eg3d, Schedule
from facelab.cameras.camera import Camera
from facelab.checkpoints.format import load_checkpoint
from facelab.cli.train import train_command
from facelab.config import list_curricula, load_staged, resolve_curriculum
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.generator import Codes
from facelab.inference.pictures import depth_colors, depth_picture, read_picture, save_png
from facelab.training.loop import Trainer
from facelab.training.phases import PhaseContext

QUIET = ("--device", "cpu", "--set", "log.progress=false", "--set", "log.samples_every=0")
# every phase, the controller, label noise and style mixing at work within four steps
BUSY = (
    "loss.r1_every=2",
    "loss.density_every=2",
    "loss.style_mixing=0.5",
    "loss.blur_fade_kimg=0.1",
    "augment.mode=ada",
    "augment.interval=2",
    "augment.kimg=0.1",
    "augment.target=-2",
    "discriminator.label_noise=0.5",
)


def train(out: Path, *arguments: Any, settings: tuple[str, ...] = BUSY) -> Path:
    """A run of the debug curriculum through the command."""
    command = train_command("eg3d", "debug")
    chosen = [x for setting in settings for x in ("--set", setting)]
    result = CliRunner().invoke(command, [*QUIET, "--out", str(out), *chosen, *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return out


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(train_command("eg3d", "debug"), [*QUIET, "--dry-run", *arguments])
    assert result.exit_code == 2, result.output
    return result.stderr.strip()


def config_of(*overrides: str, curriculum: str = "debug") -> Eg3dConfig:
    return load_staged(Eg3dConfig, [resolve_curriculum("eg3d", curriculum)], list(overrides)).at(0)


def same(first: Path, second: Path, **tolerance: float) -> None:
    """Equal weights, averages and optimisers, bit for bit unless a tolerance is given."""
    a, b = load_checkpoint(first), load_checkpoint(second)
    assert a.weights.keys() == b.weights.keys() == {"generator", "discriminator", "augment", "ema"}
    for group, tensors in a.weights.items():
        for key, value in tensors.items():
            torch.testing.assert_close(b.weights[group][key], value, msg=f"{group}.{key}", **(tolerance or EXACT))
    for name, entries in a.state["optimizers"].items():  # type: ignore[index]
        for key, moments in entries.items():
            for field, value in moments.items():
                other = b.state["optimizers"][name][key][field]  # type: ignore[index]
                torch.testing.assert_close(other, value, msg=f"{name}.{key}.{field}", **(tolerance or EXACT))


EXACT = {"rtol": 0.0, "atol": 0.0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps without a break."""
    return train(tmp_path_factory.mktemp("whole"), "--max-steps", 4)


def test_resumed_equals_uninterrupted(whole: Path, tmp_path: Path) -> None:
    train(tmp_path, "--max-steps", 3)
    train(tmp_path, "--max-steps", 4, "--resume", "auto")
    same(whole, tmp_path)


def test_two_processes_equal_one(whole: Path, tmp_path: Path) -> None:
    train(tmp_path, "--max-steps", 4, "--processes", 2)
    same(whole, tmp_path, rtol=2e-4, atol=2e-6)


def test_everything_took_part(whole: Path) -> None:
    """Each phase logged its losses at its interval; the augmentation grew; the average style moved."""
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [("g_reg/density" in line, "d_reg/r1" in line) for line in lines] == [(True, True), (False, False)] * 2
    assert all({"g_main/adversarial", "d_main/fake", "d_main/real"} <= set(line) for line in lines)
    weights = load_checkpoint(whole).weights
    assert weights["augment"]["p"].item() == pytest.approx(2 * 4 * 2 / 100)  # 2 changes, 4 pictures, interval 2
    assert weights["generator"]["backbone.mapping.w_avg"].any()
    assert lines[0]["lr/generator"] == pytest.approx(0.0025 * 2 / 3)  # lazy correction of one step in two


def test_phases_change_what_they_train(tmp_path: Path) -> None:
    """The generator's weights stay in d_main and d_reg, its average style moves in d_main alone."""
    staged = load_staged(Eg3dConfig, [resolve_curriculum("eg3d", "debug")], [*BUSY, "log.samples_every=0"])
    trainer = Trainer(Eg3d(), staged, tmp_path)
    changed: dict[str, set[str]] = {}
    run_phase = trainer._run_phase

    def watched(phase: Any, *rest: Any) -> None:
        before = {f"{n}.{k}": v.clone() for n, m in trainer.models.items() for k, v in m.state_dict().items()}
        run_phase(phase, *rest)
        after = {f"{n}.{k}": v for n, m in trainer.models.items() for k, v in m.state_dict().items()}
        changed[phase.name] = {key for key in before if not before[key].equal(after[key])}

    trainer._run_phase = watched  # type: ignore[method-assign]
    trainer._last_step = 1
    trainer._iterate()
    trainer._close_feed()
    average = "generator.backbone.mapping.w_avg"
    assert {key.split(".")[0] for key in changed["g_main"]} == {"generator"} and average not in changed["g_main"]
    assert all("superresolution" not in key and key != average for key in changed["g_reg"])
    assert "generator.field_net.decoder.hidden_weight" in changed["g_reg"]
    assert {key for key in changed["d_main"] if not key.startswith(("discriminator.", "augment."))} == {average}
    assert {key.split(".")[0] for key in changed["d_reg"]} == {"discriminator"}


def test_fine_tuning_keeps_the_average_style(whole: Path, tmp_path: Path) -> None:
    train(tmp_path, "--max-steps", 1, "--init-from", whole, "--set", "optim.generator_lr=0", settings=())
    started, tuned = load_checkpoint(whole).weights["ema"], load_checkpoint(tmp_path).weights["generator"]
    key = "backbone.mapping.w_avg"
    assert 0 < (tuned[key] - started[key]).abs().max() < 0.01 * started[key].abs().max() + 0.01
    key = "field_net.decoder.hidden_weight"
    assert tuned[key].equal(started[key])


def context(config: Eg3dConfig, count: int, images: int = 10**9, step: int = 0) -> PhaseContext:
    """Enough of a context for the conditioning."""
    from facelab.training.phases import SharedResults, Sums
    from facelab.training.schedule import Progress

    progress = Progress(step, images, count)
    return PhaseContext(
        progress, config, {}, torch.device("cpu"), count, 0, 0, Draws(1, phase="p"), None, SharedResults(), Sums(),
        Sums(), torch.ones(()), lambda enabled: None,  # type: ignore[arg-type, return-value]
    )  # fmt: skip


def labelled_folder(folder: Path, count: int = 4) -> Path:
    """Pictures with cameras that look from the right."""
    folder.mkdir()
    label = Camera.on_sphere(
        [math.pi / 2] * count, [math.pi / 2 - 0.1 - 0.1 * k for k in range(count)], 13.0, 2.7
    ).label()
    rows = []
    for index in range(count):
        picture = torch.full((3, 16, 16), 40 * index, dtype=torch.uint8)
        picture[0, :, :8] = 255  # red on the left
        save_png(folder / f"{index}.png", picture)
        rows.append([f"{index}.png", label[index].tolist()])
    (folder / "dataset.json").write_text(json.dumps({"labels": rows}))
    return folder


def test_a_data_set_is_mirrored_with_its_cameras(tmp_path: Path) -> None:
    """Cameras to generate from hold both sides; a mirrored picture has a mirrored camera; training runs on it."""
    data = labelled_folder(tmp_path / "data")
    source = Eg3d().dataset(config_of(f"data.path={data}", "data.mirror=true"))
    assert source.labels.shape == (8, 25) and source.labels[:, 3].sign().tolist() == [1] * 4 + [-1] * 4
    batch = source.batch(0, 40)
    assert batch.image is not None and batch.camera is not None
    red_left = batch.image[:, 0, 8, 0] == 255
    assert 5 < red_left.sum() < 35 and red_left.equal(batch.camera.cam2world[:, 0, 3] > 0)
    run = train(tmp_path / "run", "--data", data, "--mirror", "true", "--max-steps", 1, settings=())
    assert load_checkpoint(run).state["position"]["images"] == 4  # type: ignore[index]


@pytest.mark.shared
def test_trains_on_portraits(tmp_path: Path, real_data: Path) -> None:
    run = train(tmp_path / "run", "--data", real_data / "eg3d_portraits", "--max-steps", 2)
    assert load_checkpoint(run).state["position"]["step"] == 2  # type: ignore[index]


def test_conditioning_swaps_also_in_chunks_of_one() -> None:
    """Partners come from the data set; with the original's roll a chunk of one never swaps."""
    labels = torch.arange(100.0)[:, None].expand(100, 25)
    own = torch.full((1, 25), -1.0)

    def swapped(*overrides: str) -> float:
        config = config_of(*overrides)
        schedule = Schedule(Eg3d(), config, LabelTable(labels))
        found = []
        for step in range(200):
            ctx = context(config, 1, step=step)
            ctx.draws = ctx.draws.at(step=step)
            found.append(not schedule.conditioning(ctx, own, "swap").equal(own))
        return sum(found) / len(found)

    assert swapped("conditioning.swap=0.5") == pytest.approx(0.5, abs=0.12)
    assert swapped("conditioning.swap=0.5", "reference.roll_partners=true") == 0
    assert swapped("conditioning.swap=null") == 0
    config = config_of("conditioning.pose=false")
    assert not Schedule(Eg3d(), config, LabelTable(labels)).conditioning(context(config, 1), own, "swap").any()


def test_one_coin_for_a_chunk_of_the_regulariser() -> None:
    labels, own = torch.zeros(4, 25), torch.ones(64, 25)
    config = config_of("conditioning.swap=0.5")
    schedule = Schedule(Eg3d(), config, LabelTable(labels))
    each = schedule.conditioning(context(config, 64), own, "swap")[:, 0]
    together = schedule.conditioning(context(config, 64), own, "swap", per_sample=False)[:, 0]
    assert 0 < each.sum() < 64 and together.sum() in (0, 64)


def test_regularisers_of_weight_zero_have_no_phase() -> None:
    def names(*overrides: str) -> list[str]:
        return [phase.name for phase in Eg3d().stages(config_of(*overrides))[0].phases]

    assert names() == ["g_main", "g_reg", "d_main", "d_reg"]
    assert names("loss.density_weight=0", "loss.r1_gamma=0") == ["g_main", "d_main"]


@pytest.mark.parametrize("curriculum", [c.name for c in list_curricula("eg3d")])
def test_curricula_resolve(curriculum: str) -> None:
    config = config_of(curriculum=curriculum)
    Eg3d().check_config(config)
    size = config.train.batch_size
    assert size is not None and size % config.train.batch_chunk == 0


def test_more_frozen_layers_than_there_are_is_refused() -> None:
    config = config_of("model.resolution=16", "discriminator.freeze_layers=7")  # blocks of 16 and 8 px
    Eg3d().check_config(config)
    with pytest.raises(UserError, match=r"\(--freezed\) is 8, expected at most 7") as caught:
        Eg3d().check_config(config_of("model.resolution=16", "discriminator.freeze_layers=8"))
    assert "\n" not in str(caught.value)


def test_original_flags_are_settings(tmp_path: Path) -> None:
    flags = "--kimg 0.05 --gamma 2 --batch 8 --batch-gpu 4 --aug noaug --gen_pose_cond false --cbase 32"
    flags += " --reg_type tv --mirror true"
    result = CliRunner().invoke(train_command("eg3d", "debug"), [*QUIET, "--dry-run", *flags.split()])
    assert result.exit_code == 0, result.output
    import yaml

    start = result.stdout.index("model:")
    config = yaml.safe_load(result.stdout[start:])
    assert config["loss"]["r1_gamma"] == 2 and config["loss"]["density_type"] == "tv"
    assert (config["train"]["batch_size"], config["train"]["batch_chunk"], config["train"]["max_steps"]) == (8, 4, 7)
    assert config["augment"]["mode"] == "none" and config["conditioning"]["pose"] is False
    assert config["model"]["channel_base"] == config["discriminator"]["channel_base"] == 32
    assert config["data"]["mirror"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--set", "discriminator.group_size=4"),
            "batch_chunk is 2, expected a multiple of discriminator.group_size 4",
        ),
        (("--set", "train.precision=fp16"), "expected fp32, tf32"),
        (("--reg_type", "total-variation"), "is not one of 'l1', 'tv', 'monotonic-detach', 'monotonic-fixed'"),
        (("--set", "neural.initial=8"), "without super-resolution the rendering is the picture"),
        (("--set", "model.resolution=64", "--set", "model.superresolution=auto"), "no super-resolution makes that"),
        (("--set", "train.compile=true"), "no part of EG3D is compiled"),
        (("--gpc_reg_prob", "1.5"), "1.5 is not in the range 0<=x<=1"),
    ],
)
def test_refusals_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    said = refused(*arguments)
    assert message in said and "\n" not in said


def test_the_model_cannot_change_on_the_way(tmp_path: Path) -> None:
    base = resolve_curriculum("eg3d", "debug")
    path = tmp_path / "staged.yaml"
    path.write_text(f"base: {base}\nstages:\n  - from_step: 0\n  - from_step: 1\n    model.style_dim: 12\n")
    assert "stages[1] changes settings of model" in refused("--curriculum", str(path))


def test_style_mixing_takes_later_layers_of_another_code() -> None:
    class Doubled:
        def __init__(self) -> None:
            self.latent_spec = {"z": (2,)}

        def map(self, latents: Any, conditioning: Any) -> Codes:
            return Codes({"w": latents["z"].mean(1)[:, None, None].expand(-1, 6, 3)})

    def mixed(share: float) -> torch.Tensor:
        config = config_of(f"loss.style_mixing={share}")
        ctx = context(config, 64)
        ctx.models = {"generator": Doubled()}  # type: ignore[dict-item]
        codes = Codes({"w": torch.full((64, 6, 3), 9.0)})
        return Schedule(Eg3d(), config).mix(ctx, codes, torch.zeros(64, 25)).values["w"][..., 0] != 9.0

    assert not mixed(0.0).any()
    foreign = mixed(1.0)
    assert not foreign[:, 0].any() and foreign[:, -1].all()
    assert (foreign[:, 1:].int() >= foreign[:, :-1].int()).all() and set(foreign.sum(1).tolist()) == {1, 2, 3, 4, 5}
    assert 10 < mixed(0.5)[:, -1].sum() < 54


def test_grids_of_a_run(tmp_path: Path) -> None:
    train(tmp_path, "--max-steps", 1, "--set", "log.samples_every=1", settings=())
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert names == {"reals.png", *(f"00000001_{kind}.png" for kind in ("image", "raw", "depth"))}
    assert read_picture(tmp_path / "samples" / "00000001_image.png").shape == (3, 32, 32)  # 2 x 2 heads


def test_depth_pictures_are_dark_where_nothing_is() -> None:
    depth, opacity = torch.tensor([2.0, 0.0])[None, None, None], torch.tensor([1.0, 0.0])[None, None, None]
    shown = depth_picture(depth, opacity, 2.0, 3.0)[0]
    assert shown[:, 0, 0].tolist() == depth_colors()[0].tolist() and shown[:, 0, 1].tolist() == [0, 0, 0]


def test_windowed_order_is_random_access() -> None:
    once = WindowedSampler(7, seed=5).indices_for_chunk(0, 40)
    again = WindowedSampler(7, seed=5)
    assert again.indices_for_chunk(20, 20) == once[20:] and again.indices_for_chunk(3, 4) == once[3:7]
    assert set(once) == set(range(7))


@pytest.mark.gpu
def test_half_precision_run_stays_close_on_a_gpu(tmp_path: Path) -> None:
    """Marked blocks in fp16 and bf16 against full precision: losses of the first steps agree within a few percent."""
    found = {}
    for half in ("none", "fp16", "bf16"):
        settings = ("discriminator.half_blocks=1", f"train.half={half}", "loss.r1_every=1", "loss.density_every=1")
        command = train_command("eg3d", "debug")
        chosen = [x for setting in settings for x in ("--set", setting)]
        quiet = ("--device", "cuda", "--set", "log.progress=false", "--set", "log.samples_every=0")
        result = CliRunner().invoke(command, [*quiet, "--out", str(tmp_path / half), *chosen])
        assert result.exit_code == 0, result.output
        lines = (tmp_path / half / "log.jsonl").read_text().splitlines()
        found[half] = [json.loads(line)[key] for line in lines for key in ("d_main/real", "g_main/adversarial")]
    assert found["fp16"] == pytest.approx(found["none"], rel=0.02)
    assert found["bf16"] == pytest.approx(found["none"], rel=0.05)


def test_the_blur_is_made_once_in_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes, real pictures and R1 of a chunk see the same taps; the next step has others."""
    made: list[torch.Tensor] = []
    original = training.blur_taps
    monkeypatch.setattr(training, "blur_taps", lambda *given: made.append(original(*given)) or made[-1])
    staged = load_staged(
        Eg3dConfig,
        [resolve_curriculum("eg3d", "debug")],
        ["loss.r1_every=1", "loss.blur_fade_kimg=0.1", "log.samples_every=0", "log.progress=false"],
    )
    trainer = Trainer(Eg3d(), staged, tmp_path)
    trainer._last_step = 2
    chunks = staged.at(0).train.batch_size // staged.at(0).train.batch_chunk
    trainer._iterate()
    assert len(made) == chunks and all(taps.equal(made[0]) for taps in made)
    trainer._iterate()
    trainer._close_feed()
    assert len(made) == 2 * chunks and not made[-1].equal(made[0])
