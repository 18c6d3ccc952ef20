# SPDX-License-Identifier: Apache-2.0
"""StyleSDF trains: both stages, resuming, processes, what each phase changes, losses by hand, the start of a stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import facelab
from facelab.bases.stylesdf import phases, stages
from facelab.bases.stylesdf.config import StyleSdfConfig
from facelab.bases.stylesdf.convert import read_original
from facelab.bases.stylesdf.full_originals import build_generator, generator_to_original
from facelab.bases.stylesdf.training import METHOD
from facelab.cameras import Camera
from facelab.checkpoints.format import export_model, load_checkpoint
from facelab.config import StagedConfig, load_staged, resolve_curriculum, to_dict
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.inference.pictures import read_picture
from facelab.losses.adversarial import r1_penalty
from facelab.losses.path_length import path_length
from facelab.rendering.sdf import SdfOptions
from facelab.training.distributed import Distributed
from facelab.training.launch import launch
from facelab.training.loop import Trainer
from facelab.training.phases import PhaseContext, SharedResults, Sums
from facelab.training.schedule import Progress

QUIET = ("log.progress=false", "log.samples_every=0", "data.heads=6")
LAZY = ("loss.r1_every=2", "loss.path_every=2")  # every phase at work within three steps
EXACT = {"rtol": 0.0, "atol": 0.0}
WEIGHTS = {"debug": {"generator", "discriminator", "ema"}, "debug_full": {"generator", "discriminator", "ema", "path"}}


def staged(name: str = "debug", *settings: str) -> StagedConfig:
    return load_staged(StyleSdfConfig, [resolve_curriculum("stylesdf", name)], [*QUIET, *settings])


def train(out: Path, name: str, *settings: str, **options: Any) -> Path:
    Trainer(METHOD, staged(name, *settings), out, **options).run()
    return out


def full_settings(first: Path) -> tuple[str, ...]:
    return (*LAZY, f'init_from="{first}"', "train.max_steps=3")


def both(distributed: Distributed, folder: Path, first: Path) -> None:
    """One process of two runs, one of each stage."""
    train(folder / "volume", "debug", "train.max_steps=3", distributed=distributed)
    train(folder / "full", "debug_full", *full_settings(first), distributed=distributed)


def same(first: Path, second: Path, name: str, **tolerance: float) -> None:
    """Equal weights, averages and optimisers, bit for bit unless a tolerance is given."""
    a, b = load_checkpoint(first), load_checkpoint(second)
    assert a.weights.keys() == b.weights.keys() == WEIGHTS[name] and a.step == b.step
    for group, tensors in a.weights.items():
        for key, value in tensors.items():
            torch.testing.assert_close(b.weights[group][key], value, msg=f"{group}.{key}", **(tolerance or EXACT))
    for optimizer, entries in a.state["optimizers"].items():  # type: ignore[index]
        for key, moments in entries.items():
            for entry, value in moments.items():
                other = b.state["optimizers"][optimizer][key][entry]  # type: ignore[index]
                torch.testing.assert_close(other, value, msg=f"{optimizer}.{key}.{entry}", **(tolerance or EXACT))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of the volume stage after two of the sphere, without a break."""
    return train(tmp_path_factory.mktemp("first") / "run", "debug", "train.max_steps=3")


@pytest.fixture(scope="module")
def second(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of the full stage on it."""
    return train(tmp_path_factory.mktemp("second") / "run", "debug_full", *full_settings(first))


# ---------------------------------------------------------------- runs


def test_resumed_equals_uninterrupted(first: Path, second: Path, tmp_path: Path) -> None:
    for steps, resume in ((1, None), (3, "auto")):
        train(tmp_path / "volume", "debug", f"train.max_steps={steps}", "checkpoint.every=1", resume=resume)
        options = (*full_settings(first), f"train.max_steps={steps}")
        train(tmp_path / "full", "debug_full", *options, resume=resume)
    same(first, tmp_path / "volume", "debug")
    same(second, tmp_path / "full", "debug_full")


def test_resumed_within_the_sphere(first: Path, tmp_path: Path) -> None:
    """A stop between the two steps of the warm-up."""
    trainer = Trainer(METHOD, staged("debug", "train.max_steps=3"), tmp_path)
    save = Trainer._housekeep

    def stop(self: Trainer) -> None:
        self._stop = 2
        save(self)

    try:
        Trainer._housekeep = stop  # type: ignore[method-assign]
        assert trainer.run().step == 0 and trainer.position.warmup_step == 1
    finally:
        Trainer._housekeep = save  # type: ignore[method-assign]
    train(tmp_path, "debug", "train.max_steps=3", resume="auto")
    same(first, tmp_path, "debug")


def test_two_processes_equal_one(first: Path, second: Path, tmp_path: Path) -> None:
    """The sphere with its three samples in two chunks, lazy path lengths with two, the running mean."""
    assert launch(both, (tmp_path, first), device="cpu", processes=2) == 0
    same(first, tmp_path / "volume", "debug", rtol=2e-4, atol=2e-6)
    same(second, tmp_path / "full", "debug_full", rtol=2e-4, atol=2e-6)


def test_everything_took_part(first: Path, second: Path) -> None:
    volume, full = (
        [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (first, second)
    )
    assert [line["warmup_step"] for line in volume] == [1, 2, 2, 2, 2] and "sphere/distance" in volume[0]
    wanted = {f"generator/{name}" for name in ("adversarial", "view", "eikonal", "surface", "inside", "beta")}
    wanted |= {f"discriminator/{name}" for name in ("real", "fake", "r1", "view")}
    assert all(wanted <= set(line) for line in volume[2:])
    lazy = [("d_reg/r1" in line, "g_path/penalty" in line) for line in full]
    assert lazy == [(True, True), (False, False), (True, True)]
    assert full[0]["lr/generator"] == full[0]["lr/discriminator"] == pytest.approx(0.002 / 1.5)
    assert volume[-1]["lr/generator"] == 2e-5 and volume[-1]["lr/discriminator"] == 2e-4
    lengths = [line["g_path/length"] for line in full if "g_path/length" in line]
    mean = 0.01 * lengths[0]
    mean += 0.01 * (lengths[1] - mean)
    assert load_checkpoint(second).weights["path"]["mean"].item() == pytest.approx(mean, rel=1e-5)


def test_the_published_rates_and_average(first: Path) -> None:
    """Without other intervals: 4/5 and 16/17 of the rate; the average keeps its share from the first step on."""
    trainer = Trainer(METHOD, staged("debug_full", f'init_from="{first}"'), first.parent / "rates")
    found = {name: entry.adam.param_groups[0] for name, entry in trainer.optimizers.items()}
    assert found["generator"]["lr"] == pytest.approx(0.002 * 4 / 5)
    assert found["discriminator"]["lr"] == pytest.approx(0.002 * 16 / 17)
    assert found["generator"]["betas"] == (0, pytest.approx(0.99 ** (4 / 5)))
    assert {key.split(".")[0] for key in found["generator"]["param_names"]} == {"generator"}
    assert all(key.startswith("generator.decoder.") for key in found["generator"]["param_names"])
    assert trainer.averages["ema"].schedule(1) == trainer.averages["ema"].schedule(10**6) == 0.5 ** (32 / 10_000)


def test_the_average_moves(first: Path) -> None:
    folders = sorted((first / "checkpoints").glob("0*"))
    before, after = load_checkpoint(folders[0]).weights, load_checkpoint(folders[-1]).weights
    assert folders[0].name == "00000000", "the average begins after the sphere"
    key = "field_net.rgb.weight"
    assert torch.equal(before["ema"][key], before["generator"][key])
    assert not torch.equal(after["ema"][key], after["generator"][key])
    assert (after["ema"][key] - before["ema"][key]).abs().max() < 3 * (1 - 0.5**0.0032) * 3 * 2e-4


@pytest.mark.parametrize(("name", "moving"), [("debug", ("mapping.", "field_net.")), ("debug_full", ("decoder.",))])
def test_phases_change_what_they_train(name: str, moving: tuple[str, ...], first: Path, tmp_path: Path) -> None:
    settings = (f'init_from="{first}"',) if name == "debug_full" else ("sphere.steps=0",)
    trainer = Trainer(METHOD, staged(name, *settings, "train.max_steps=1"), tmp_path)
    changed: dict[str, set[str]] = {}
    run_phase = trainer._run_phase

    def watched(phase: Any, *rest: Any) -> None:
        before = {f"{n}.{k}": v.clone() for n, m in trainer.models.items() for k, v in m.state_dict().items()}
        run_phase(phase, *rest)
        after = {f"{n}.{k}": v for n, m in trainer.models.items() for k, v in m.state_dict().items()}
        changed[phase.name] = {key for key in before if not before[key].equal(after[key])}

    trainer._run_phase = watched  # type: ignore[method-assign]
    trainer.run()
    for phase, keys in changed.items():
        owner = "discriminator." if phase.startswith("d") else "generator."
        assert keys and all(key.startswith(owner) or (phase == "g_path" and key == "path.mean") for key in keys), phase
    made = set().union(*(keys for phase, keys in changed.items() if phase.startswith("g"))) - {"path.mean"}
    assert all(key.removeprefix("generator.").startswith(moving) for key in made)
    assert ("path.mean" in changed.get("g_path", ())) == (name == "debug_full")
    if name == "debug":
        assert "generator.field_net.beta" in made


def test_the_sphere_is_learnt(tmp_path: Path) -> None:
    """The mean distance to the sphere of radius 0.06 falls; the average starts from what was learnt."""
    settings = ("sphere.steps=60", "optim.volume_generator_lr=5e-4", "log.every=20", "train.max_steps=1")
    train(tmp_path, "debug", *settings)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    distances = [line["sphere/distance"] for line in lines if "sphere/distance" in line]
    assert len(distances) == 3 and distances[2] < 0.4 * distances[0]


def test_sums_of_chunks_are_a_switch(tmp_path: Path) -> None:
    """Two chunks: twice the gradient of the mean, in each phase of both stages."""
    grads = []
    for name in ("false", "true"):
        settings = (f"reference.sum_chunks={name}", "sphere.steps=0", "train.max_steps=1")
        train(tmp_path / name, "debug", *settings)
        grads.append(json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0]))
    for phase in ("discriminator", "generator"):
        ratio = grads[1][f"grad_norm/{phase}"] / grads[0][f"grad_norm/{phase}"]
        assert ratio == pytest.approx(2, rel=1e-3 if phase == "discriminator" else 0.3), phase
    config = staged("debug_full", "reference.sum_chunks=true").at(0)
    assert {phase.reduction for phase in METHOD.stages(config)[0].phases} == {"sum"}


# ---------------------------------------------------------------- losses


def context(config: Any, models: Any, *, count: int = 2, chunk: int = 0, real: Any = None) -> PhaseContext:
    """What the loop would pass for one chunk of a batch of four."""
    sums = Sums()
    return PhaseContext(
        Progress(0, 0, 4), config, models, torch.device("cpu"), count, chunk, chunk * count, Draws(5, 0, "test", chunk),
        real, SharedResults(), sums, Sums(), torch.ones(()), lambda enabled: torch.autocast("cpu", enabled=False),
    )  # fmt: skip


def test_losses_of_the_volume_stage() -> None:
    """Weighted sums of the terms, computed anew from the same draws."""
    config = staged().at(0)
    models = METHOD.build(config)
    real = METHOD.dataset(config).batch(0, 2)
    ctx = context(config, models, real=real)
    losses = dict(stages.judge_thumbnails(ctx))
    x = (real.thumbnail.float() / 127.5 - 1).requires_grad_()
    said = models["discriminator"](x)
    expected = torch.nn.functional.softplus(-said.realness).mean() + 5 * r1_penalty(x, said.realness)
    torch.testing.assert_close(losses["real"], expected)
    fakes = stages.generate_volume(ctx, ctx.draws, SdfOptions("offset", samples=True, gradient="layers"))
    said = models["discriminator"](fakes.image)
    angles = 1.5707963267948966 - fakes.camera.sphere_angles().flip(-1)
    view = torch.nn.functional.smooth_l1_loss(said.view, angles)
    torch.testing.assert_close(losses["fake"], torch.nn.functional.softplus(said.realness).mean() + 15 * view)
    total = dict(stages.make_thumbnails(ctx))["total"]
    assert fakes.volume.gradient is not None and fakes.volume.sdf is not None
    eikonal = (fakes.volume.gradient.norm(dim=-1) - 1).square().mean()
    surface = torch.exp(-100 * fakes.volume.sdf.abs()).mean()
    expected = torch.nn.functional.softplus(-said.realness).mean() + 15 * view + 0.1 * eikonal + 0.05 * surface
    torch.testing.assert_close(total, expected)


def test_terms_of_weight_zero_cost_nothing() -> None:
    zero = ("loss.eikonal=0", "loss.surface=0", "loss.view=0", "loss.r1=0")
    config = staged("debug", *zero).at(0)
    assert stages.field_options(config) == SdfOptions("offset")
    assert stages.field_options(staged("debug", "model.density=raw").at(0)) == SdfOptions("offset")
    models = METHOD.build(config)
    ctx = context(config, models, real=METHOD.dataset(config).batch(0, 2))
    assert models["discriminator"].config.view is False
    assert dict(stages.make_thumbnails(ctx))["total"].isfinite()
    assert dict(stages.judge_thumbnails(ctx))["real"].isfinite()
    names = [p.name for p in METHOD.stages(staged("debug_full", "loss.path=0", "loss.r1=0").at(0))[0].phases]
    assert names == ["d_main", "g_main"] and "path" not in METHOD.build(staged("debug_full", "loss.path=0").at(0))


def test_the_sphere_as_an_anchor_fades() -> None:
    config = staged("debug", "loss.sphere=2", "loss.sphere_steps=10").at(0)
    models = METHOD.build(config)
    ctx = context(config, models)
    weighted = stages.sphere_anchor(ctx)
    distance = phases.sphere_loss(ctx, stages.sphere_batch(config), ctx.draws.at(phase="test/sphere"), 2)
    torch.testing.assert_close(weighted, 2 * distance)
    later = replace(ctx, progress=replace(ctx.progress, step=5))
    torch.testing.assert_close(stages.sphere_anchor(later), distance)
    assert stages.sphere_anchor(replace(ctx, progress=replace(ctx.progress, step=10))) == 0
    assert stages.sphere_anchor(context(staged("debug").at(0), models)) == 0, "none by default"


def test_the_width_of_the_surface_has_a_start_and_a_rate(tmp_path: Path) -> None:
    settings = ("sphere.beta=0.03", "optim.beta_factor=0.5", "sphere.steps=0", "train.max_steps=1")
    trainer = Trainer(METHOD, staged("debug", *settings), tmp_path)
    generator: Any = trainer.models["generator"]
    assert generator.field_net.beta.item() == pytest.approx(0.03)
    groups = trainer.optimizers["generator"].adam.param_groups
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert rates.pop("generator.field_net.beta") == pytest.approx(1e-5) and set(rates.values()) == {2e-5}


def test_raw_densities_train_without_a_sphere(tmp_path: Path) -> None:
    train(tmp_path, "debug", "model.density=raw", "render.density_noise=0.5")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and "generator/eikonal" not in lines[0] and "generator/beta" not in lines[0]


def test_path_lengths_are_those_of_the_styles() -> None:
    config = staged("debug_full", "loss.mixing=1").at(0)
    models = METHOD.build(config)
    phase = METHOD.stages(config)[0].phases[-1]
    models["path"].mean.fill_(0.3)
    ctx = context(config, models)
    loss = dict(phase.losses(ctx))["penalty"]
    image, styles = stages.draw_paths(ctx, 1)  # a batch of four is halved, a chunk of two has one of them
    assert not styles[:, 0].equal(styles[:, -1]), "mixed"
    noise = ctx.draws.normal("path_noise", image.shape)
    expected = path_length(image, styles, noise, torch.tensor(0.3))
    torch.testing.assert_close(loss, 2 * expected.penalty)
    torch.testing.assert_close(ctx._statistics.totals[phases.PATH_LENGTH], 2 * expected.lengths.detach().mean())


@pytest.mark.parametrize(("total", "size"), [(3, 2), (1, 1), (2, 1), (5, 4), (4, 1)])
def test_shares_of_a_step_make_its_mean(total: int, size: int) -> None:
    config = staged().at(0)
    shares = [phases.share_of(context(config, {}, count=size, chunk=k), total) for k in range(4 // size)]
    assert sum(share.count for share in shares) == total
    assert sum(share.weight for share in shares) / len(shares) == pytest.approx(1)
    assert all(share.weight == pytest.approx(share.count * len(shares) / total) for share in shares)


def test_mixing_is_one_coin_for_all_chunks() -> None:
    config = staged().at(0)
    found = []
    for step in range(300):
        pair = [context(config, {}, chunk=k) for k in (0, 1)]
        pair = [replace(ctx, draws=ctx.draws.at(step=step)) for ctx in pair]
        layers = {phases.mixing_layer(ctx, 0.7, 4) for ctx in pair}
        assert len(layers) == 1
        found.append(layers.pop())
    assert set(found) == {None, 1, 2, 3} and 0.6 < sum(x is not None for x in found) / 300 < 0.8
    assert phases.mixing_layer(context(config, {}), 0.0, 4) is None


def test_renderings_of_the_full_stage_have_no_graph() -> None:
    config = staged("debug_full").at(0)
    models = METHOD.build(config)
    for name, parameter in models["generator"].named_parameters():
        parameter.requires_grad_(name.startswith("decoder."))
    scene, features = stages.prepare(context(config, models), Draws(1), 2)
    assert not features.requires_grad and scene.parts["styles"].requires_grad
    again, _ = stages.prepare(context(config, models), Draws(2), 2)
    maps, others = scene.parts["noise"][1], again.parts["noise"][1]
    assert len(maps) == 3 and not any(maps[key].equal(others[key]) for key in maps), "noise is new in every call"


# ---------------------------------------------------------------- the start of the second stage


def test_the_renderer_is_the_first_stages_average(first: Path, second: Path) -> None:
    stage1, run = load_checkpoint(first).weights["ema"], load_checkpoint(second).weights
    shared = [key for key in stage1 if key != "average_w"]
    assert len(shared) > 20
    for group in ("generator", "ema"):
        assert all(torch.equal(run[group][key], stage1[key]) for key in shared)
        assert not run[group]["average_w"].any() and not run[group]["average_style"].any()


def test_an_official_file_starts_a_second_stage(first: Path, tmp_path: Path) -> None:
    config = staged().at(0)
    generator = build_generator(METHOD.generator_config(config))
    generator.load_state_dict(load_checkpoint(first).weights["ema"])
    path = tmp_path / "mine_vol_renderer.pt"
    torch.save({"g_ema": generator_to_original(generator)}, path)
    original = read_original(path)
    meta = {**original.meta, "config": to_dict(original.config)}
    export_model(tmp_path / "converted.safetensors", original.weights, meta)
    for source in (path, tmp_path / "converted.safetensors"):
        models = METHOD.build(staged("debug_full").at(0))
        METHOD.stages(staged("debug_full", f'init_from="{source}"').at(0))[0].init_from(models)
        for key, value in generator.state_dict().items():
            assert torch.equal(models["generator"].state_dict()[key], value), key


def test_first_stages_that_do_not_fit(first: Path, second: Path, tmp_path: Path) -> None:
    def refusal(*settings: str) -> str:
        with pytest.raises(UserError) as caught:
            METHOD.first_stage(staged("debug_full", *settings).at(0))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    origin = f'init_from="{first}"'
    assert "say --init-from" in refusal()
    assert "nothing at" in refusal(f'init_from="{tmp_path / "nothing"}"')
    assert "its model.width is 16, this run has 8; take another file or --set model.width=16" in refusal(
        origin, "model.width=8"
    )
    assert "its render.resolution is 8, this run has 4" in refusal(origin, "render.resolution=4")
    assert "its view.dist_radius is 0.12" in refusal(origin, "view.dist_radius=0.1")
    assert METHOD.first_stage(staged("debug_full", f'init_from="{second}"').at(0)).config.stage == "full"


def test_batches_and_sides_that_do_not_fit() -> None:
    for settings, words in {
        ("model.resolution=4",): "at least in_resolution",
        ("train.batch_chunk=5", "discriminator.group_size=4"): "do not divide into groups",
        ("train.compile=true",): "train.compile",
    }.items():
        with pytest.raises(UserError, match=words):
            METHOD.check_config(staged("debug_full", *settings).at(0))
    with pytest.raises(UserError, match=r"render\.resolution: resolution must be one of \[4, 8, 16"):
        METHOD.check_config(staged("debug", "render.resolution=48").at(0))


def test_strided_groups_are_a_switch() -> None:
    for value, grouping in (("false", "contiguous"), ("true", "strided")):
        config = staged("debug_full", f"reference.strided_groups={value}").at(0)
        assert METHOD.discriminator_config(config).grouping == grouping


def test_random_inference_draws_noise_for_each_picture(second: Path) -> None:
    model = facelab.load(second)
    camera = Camera.cat([model.camera(), model.camera()])
    head = model.codes(1)
    still = model.render(head, camera).rgb
    assert torch.allclose(still[0], still[1], atol=1e-5)
    generator: Any = model.generator
    with torch.no_grad():
        for block in generator.decoder.blocks:
            block.conv1.noise_strength.fill_(0.5)
    config = replace(model.config, reference=replace(model.config.reference, random_inference=True))
    other = facelab.api.FaceModel(METHOD, generator, config, {}, second)
    moved, again = (other.render(head, camera, seed=4).rgb for _ in range(2))
    assert not torch.allclose(moved[0], moved[1], atol=1e-3) and torch.equal(moved, again)
    assert not torch.allclose(other.render(head, camera, seed=5).rgb, moved, atol=1e-3)


# ---------------------------------------------------------------- sample grids


@pytest.mark.parametrize(
    ("name", "kinds"), [("debug", {"image", "depth"}), ("debug_full", {"image", "thumb", "depth"})]
)
def test_grids_of_a_run(name: str, kinds: set[str], first: Path, tmp_path: Path) -> None:
    """A row for each head, a column for each azimuth; averages of codes are dropped again."""
    config = staged(name, f'init_from="{first}"' if name == "debug_full" else "sphere.steps=0", "log.samples_every=1",
                    "train.max_steps=1", "log.sample_heads=3", "log.sample_views=4")  # fmt: skip
    Trainer(METHOD, config, tmp_path, callbacks=METHOD.callbacks()).run()
    side = METHOD.picture_size(config.at(0))
    written = {path.stem: read_picture(path) for path in (tmp_path / "samples").glob("*.png")}
    assert set(written) == {"reals", *(f"00000001_{kind}" for kind in kinds)}
    image = written["00000001_image"]
    assert image.shape[-2] >= 3 * side and image.shape[-1] >= 4 * side and image.float().std() > 0
    assert not load_checkpoint(tmp_path).weights["ema"]["average_w"].any()
