# SPDX-License-Identifier: Apache-2.0
"""CNeRF trains: both stages, resuming, processes, what each phase changes, what discriminators share."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from facelab.bases.stylesdf.phases import PATH, sphere_loss
from facelab.checkpoints.format import load_checkpoint
from facelab.config import StagedConfig, load_staged, resolve_curriculum
from facelab.data.regions import fuse_regions
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.inference.pictures import read_picture
from facelab.methods.cnerf import full_stage, volume_stage
from facelab.methods.cnerf.config import CnerfConfig
from facelab.methods.cnerf.convert import convert_states
from facelab.methods.cnerf.model import CNerfGenerator
from facelab.methods.cnerf.originals import generator_to_original
from facelab.methods.cnerf.training import METHOD
from facelab.training.distributed import Distributed
from facelab.training.launch import launch
from facelab.training.loop import Trainer
from facelab.training.phases import PhaseContext, SharedResults, Sums
from facelab.training.schedule import Progress

QUIET = ("log.progress=false", "log.samples_every=0", "data.heads=6")
LAZY = ("loss.r1_every=2", "loss.path_every=2")  # every phase at work within three steps
VOLUME, FULL = "debug_volume", "debug_full"
WEIGHTS = {
    VOLUME: {"generator", "d_global", "d_region", "ema"},
    FULL: {"generator", "d_full", "path", "ema"},
}


def staged(name: str = VOLUME, *settings: str) -> StagedConfig:
    return load_staged(CnerfConfig, [resolve_curriculum("cnerf", name)], [*QUIET, *settings])


def train(out: Path, name: str, *settings: str, **options: Any) -> Path:
    Trainer(METHOD, staged(name, *settings), out, **options).run()
    return out


def full_settings(first: Path) -> tuple[str, ...]:
    return (*LAZY, f'init_from="{first}"', "train.max_steps=3")


def both(distributed: Distributed, folder: Path, first: Path) -> None:
    """One process of two runs, one of each stage."""
    train(folder / "volume", VOLUME, "train.max_steps=3", distributed=distributed)
    train(folder / "full", FULL, *full_settings(first), distributed=distributed)


def same(first: Path, second: Path, name: str, share: float = 0.0) -> None:
    """Equal weights, averages and optimisers: bit for bit, or up to a share of the largest value of a tensor."""
    a, b = load_checkpoint(first), load_checkpoint(second)
    assert a.weights.keys() == b.weights.keys() == WEIGHTS[name] and a.step == b.step
    for group, tensors in a.weights.items():
        for key, value in tensors.items():
            assert_near(b.weights[group][key], value, share, f"{group}.{key}")
    for optimizer, entries in a.state["optimizers"].items():  # type: ignore[index]
        for key, moments in entries.items():
            for entry, value in moments.items():
                other = b.state["optimizers"][optimizer][key][entry]  # type: ignore[index]
                assert_near(other, value, share, f"{optimizer}.{key}.{entry}")


def assert_near(other: Tensor, value: Tensor, share: float, what: str) -> None:
    largest = float(value.abs().max()) if share else 0.0
    torch.testing.assert_close(other, value, rtol=0.0, atol=share * largest, msg=what)


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of the volume stage after two of the sphere, without a break."""
    return train(tmp_path_factory.mktemp("first") / "run", VOLUME, "train.max_steps=3")


@pytest.fixture(scope="module")
def second(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of the full stage on it."""
    return train(tmp_path_factory.mktemp("second") / "run", FULL, *full_settings(first))


def context(config: Any, models: Any, *, count: int = 2, chunk: int = 0, real: Any = None) -> PhaseContext:
    """What the loop would pass for one chunk of a batch of four."""
    return PhaseContext(
        Progress(0, 0, 4), config, models, torch.device("cpu"), count, chunk, chunk * count, Draws(5, 0, "test", chunk),
        real, SharedResults(), Sums(), Sums(), torch.ones(()), lambda enabled: torch.autocast("cpu", enabled=False),
    )  # fmt: skip


# ---------------------------------------------------------------- runs


def test_resumed_equals_uninterrupted(first: Path, second: Path, tmp_path: Path) -> None:
    for steps, resume in ((1, None), (3, "auto")):
        train(tmp_path / "volume", VOLUME, f"train.max_steps={steps}", "checkpoint.every=1", resume=resume)
        options = (*full_settings(first), f"train.max_steps={steps}")
        train(tmp_path / "full", FULL, *options, resume=resume)
    same(first, tmp_path / "volume", VOLUME)
    same(second, tmp_path / "full", FULL)


def test_two_processes_equal_one(first: Path, second: Path, tmp_path: Path) -> None:
    """Sphere and volume stage with fakes that two discriminators share, lazy path lengths of the full stage."""
    assert launch(both, (tmp_path, first), device="cpu", processes=2) == 0
    same(first, tmp_path / "volume", VOLUME, 1e-4)
    same(second, tmp_path / "full", FULL, 2e-3)  # Adam makes much of small gradients


def test_every_term_is_told(first: Path, second: Path) -> None:
    volume, full = log_of(first), log_of(second)
    assert [line["warmup_step"] for line in volume] == [1, 2, 2, 2, 2] and "sphere/distance" in volume[0]
    wanted = {f"d_{which}/{name}" for which in ("global", "region") for name in ("realness", "r1", "total")}
    wanted |= {"d_global/view", "d_region/classes", "g/realness", "g/view", "g/eikonal", "g/surface"}
    wanted |= {"g/region_realness", "g/classes", "g/beta", "g/inside", "g/total"}
    assert all(wanted <= set(line) for line in volume[2:])
    names = ("realness", "view", "eikonal", "surface", "region_realness", "classes")
    assert sum(volume[-1][f"g/{name}"] for name in names) == pytest.approx(volume[-1]["g/total"], rel=1e-5)
    assert volume[-1]["lr/generator"] == 2e-5 and volume[-1]["lr/d_global"] == volume[-1]["lr/d_region"] == 2e-4
    assert [("d_reg/r1" in line, "g_path/penalty" in line) for line in full] == [
        (True, True),
        (False, False),
        (True, True),
    ]
    assert full[0]["lr/generator"] == full[0]["lr/d_full"] == pytest.approx(0.002 / 1.5)
    lengths = [line["g_path/length"] for line in full if "g_path/length" in line]
    mean = 0.01 * lengths[0]
    mean += 0.01 * (lengths[1] - mean)
    assert load_checkpoint(second).weights[PATH]["mean"].item() == pytest.approx(mean, rel=1e-5)


def changes(name: str, folder: Path, *settings: str) -> dict[str, set[str]]:
    """Phase -> tensors that it changed in one step, or in one of the warm-up."""
    trainer = Trainer(METHOD, staged(name, *settings, "train.max_steps=1"), folder)
    changed: dict[str, set[str]] = {}
    run_phase = trainer._run_phase

    def watched(phase: Any, *rest: Any) -> None:
        before = {f"{n}.{k}": v.clone() for n, m in trainer.models.items() for k, v in m.state_dict().items()}
        run_phase(phase, *rest)
        after = {f"{n}.{k}": v for n, m in trainer.models.items() for k, v in m.state_dict().items()}
        changed[phase.name] = {key for key in before if not before[key].equal(after[key])}

    trainer._run_phase = watched  # type: ignore[method-assign]
    trainer.run()
    return changed


def test_the_volume_stage_changes_what_it_trains(tmp_path: Path) -> None:
    """The sphere is learnt by base and mapping alone, and the base by nothing else."""
    changed = changes(VOLUME, tmp_path, "sphere.steps=1")
    assert set(changed) == {"sphere", "d_global", "d_region", "g"}
    base, mapping, regions = (f"generator.{x}." for x in ("field_net.base", "mapping", "field_net.regions"))
    assert all(key.startswith((base, mapping)) for key in changed["sphere"])
    assert any(key.startswith(base) for key in changed["sphere"])
    for phase in ("d_global", "d_region"):
        assert changed[phase] and all(key.startswith(f"{phase}.") for key in changed[phase])
    assert not any(key.startswith(base) for key in changed["g"])
    for part in (mapping, f"{regions}mask", f"{regions}sdf", f"{regions}rgb", f"{regions}feature"):
        assert any(key.startswith(part) for key in changed["g"]), part
    assert "generator.field_net.beta" in changed["g"]


def test_the_sphere_may_be_the_whole_heads(tmp_path: Path) -> None:
    changed = changes(VOLUME, tmp_path, "sphere.steps=1", "sphere.residuals=true")["sphere"]
    assert any(key.startswith("generator.field_net.regions.sdf") for key in changed)
    assert any(key.startswith("generator.field_net.base.sdf") for key in changed)
    assert not any("rgb" in key or "mask" in key for key in changed)


def test_the_full_stage_leaves_the_renderer(first: Path, tmp_path: Path) -> None:
    changed = changes(FULL, tmp_path, f'init_from="{first}"')
    assert set(changed) == {"d_main", "d_reg", "g_main", "g_path"}
    for phase in ("d_main", "d_reg"):
        assert changed[phase] and all(key.startswith("d_full.") for key in changed[phase])
    assert all(full_stage.is_decoder(key) for key in changed["g_main"])
    for part in ("transfer", "decoder.mapping", "decoder.blocks.0.to_rgb", "decoder.blocks.1.to_semantics"):
        assert any(key.startswith(f"generator.{part}") for key in changed["g_main"]), part
    assert "path.mean" in changed["g_path"]
    assert not any("to_semantics" in key for key in changed["g_path"] if "bias" in key)  # lengths are the picture's


@pytest.mark.parametrize(("residuals", "share"), [("false", 0.9), ("true", 0.9)])
def test_the_sphere_is_learnt(residuals: str, share: float, tmp_path: Path) -> None:
    """The mean distance of base or head to the sphere of radius 0.06 falls; the regions help only where they are asked."""
    settings = (f"sphere.residuals={residuals}", "sphere.steps=30", "optim.volume_generator_lr=5e-4", "log.every=10")
    train(tmp_path, VOLUME, *settings, "train.max_steps=1")
    distances = [line["sphere/distance"] for line in log_of(tmp_path) if "sphere/distance" in line]
    assert len(distances) == 3 and distances[2] < share * distances[0], distances


# ---------------------------------------------------------------- pieces


def test_both_discriminators_see_the_same_fakes_and_reals() -> None:
    config = staged().at(0)
    models = METHOD.build(config)
    ctx = context(config, models, real=METHOD.dataset(config).batch(0, 2))
    stage = volume_stage.VolumeStage(config)
    seen = []
    for name, losses in (("d_global", stage.d_global), ("d_region", stage.d_region)):
        models[name].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
        dict(losses(ctx))
    (fake, masks), (real, real_masks), (fake_again, channel), (real_again, real_channel) = seen
    assert torch.equal(fake, fake_again) and torch.equal(real, real_again) and not fake.requires_grad
    regions = stage.regions(ctx)
    rows = torch.arange(2)
    assert torch.equal(channel[:, 0], masks[rows, regions]) and torch.equal(
        real_channel[:, 0], real_masks[rows, regions]
    )
    assert torch.equal(real_masks, fuse_regions(ctx.real.label_map)) and real_masks.shape[1] == 9
    fresh, _ = stage.render(ctx, ctx.draws, volume_stage.SdfOptions())
    assert not torch.equal(fresh.portraits.image, fake), "the generator's fakes are others"


def test_lopsided_brows_are_a_switch() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[0, 4, 4] = 6
    found = []
    for value in ("false", "true"):
        config = staged(VOLUME, f"reference.lopsided_brows={value}").at(0)
        real = METHOD.dataset(config).batch(0, 1)
        real = type(real)(image=real.image, label_map=labels)
        found.append(volume_stage.real_portraits(context(config, {}, count=1, real=real)).masks[0, 4])
    rows = [mask.any(1).nonzero()[:, 0].tolist() for mask in found]
    assert rows == [[2, 3, 4, 5, 6], [3, 4, 5, 6]]


def test_mixing_is_one_coin_and_a_choice_for_each_region() -> None:
    config = staged(VOLUME, "loss.mixing=0.5").at(0)
    models = METHOD.build(config)
    mixed = []
    for step in range(40):
        kinds = set()
        for chunk in (0, 1):
            ctx = context(config, models, chunk=chunk)
            codes, second = volume_stage.draw_pair(ctx, ctx.draws.at(step=step), 2)
            kinds.add(second is not None)
            shape, w = codes.values["shape"], codes.values["decoder"]
            own = [(shape[n, k] - w[n]).abs().max() == 0 for n in range(2) for k in range(9)]
            assert all(own) if second is None else True
        assert len(kinds) == 1, "one coin for all chunks"
        mixed.append(kinds.pop())
    assert 10 < sum(mixed) < 30


def test_regions_are_drawn_alike() -> None:
    config = staged().at(0)
    models = METHOD.build(config)
    stage = volume_stage.VolumeStage(config)
    drawn = stage.regions(context(config, models, count=900))
    assert drawn.dtype == torch.int64 and torch.bincount(drawn, minlength=9).min() > 60 and drawn.max() == 8


def test_renderings_of_the_full_stage_have_no_graph() -> None:
    config = staged(FULL, "loss.mixing=1").at(0)
    models = METHOD.build(config)
    for name, parameter in models["generator"].named_parameters():
        parameter.requires_grad_(full_stage.is_decoder(f"generator.{name}"))
    stage = full_stage.FullStage(config)
    fakes, ws = stage.portraits(context(config, models), Draws(1), 2)
    assert fakes.image.shape == (2, 3, 16, 16) and fakes.masks.shape == (2, 9, 16, 16)
    assert not torch.equal(ws[:, 0], ws[:, -1]), "mixed"
    (fakes.image.sum() + fakes.masks.sum()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in models["generator"].parameters())
    again, _ = stage.portraits(context(config, models), Draws(2), 2)
    assert not torch.equal(again.image, fakes.image)


def test_the_width_of_the_surface_has_a_rate_of_its_own(tmp_path: Path) -> None:
    """``optim.beta_factor``; and ``sphere.beta`` is where it starts."""
    settings = ("optim.beta_factor=10", "sphere.steps=0", "sphere.beta=0.03", "train.max_steps=1")
    train(tmp_path, VOLUME, *settings)
    moved = abs(float(load_checkpoint(tmp_path).weights["generator"]["field_net.beta"]) - 0.03)
    assert moved == pytest.approx(2e-4, rel=1e-2), "Adam's first step is as long as the rate"


def test_the_sphere_as_an_anchor_fades() -> None:
    config = staged(VOLUME, "loss.sphere=2", "loss.sphere_steps=10").at(0)
    models = METHOD.build(config)
    for name, parameter in models["generator"].named_parameters():
        parameter.requires_grad_(not name.startswith("field_net.base"))
    ctx = context(config, models)
    weighted = volume_stage.sphere_anchor(ctx)
    draws = ctx.draws.at(phase="test/sphere")
    torch.testing.assert_close(weighted, 2 * sphere_loss(ctx, volume_stage.sphere(config, whole=True), draws, 2))
    torch.testing.assert_close(
        volume_stage.sphere_anchor(replace(ctx, progress=replace(ctx.progress, step=5))), weighted / 2
    )
    assert volume_stage.sphere_anchor(replace(ctx, progress=replace(ctx.progress, step=10))) == 0
    assert volume_stage.sphere_anchor(context(staged().at(0), models)) == 0, "none by default"
    weighted.backward()
    net: Any = models["generator"].field_net  # type: ignore[union-attr]
    assert net.regions.sdf.weight.grad.abs().max() > 0, "of the whole head"


def test_weights_of_zero_have_no_phase() -> None:
    names = [p.name for p in METHOD.stages(staged(VOLUME, "loss.semantic=0").at(0))[0].phases]
    assert names == ["d_global", "g"]
    off = ("loss.path_weight=0", "loss.r1_image=0", "loss.r1_semantics=0")
    assert [p.name for p in METHOD.stages(staged(FULL, *off).at(0))[0].phases] == ["d_main", "g_main"]
    assert METHOD.stages(staged(VOLUME, "sphere.steps=0").at(0))[0].warmup is None


def test_sums_and_groups_are_switches() -> None:
    for name, summed in ((VOLUME, {"g"}), (FULL, {"d_main", "d_reg", "g_main", "g_path"})):
        phases = METHOD.stages(staged(name, "reference.sum_chunks=true").at(0))[0].phases
        assert {phase.name for phase in phases if phase.reduction == "sum"} == summed
    config = staged(FULL, "reference.strided_groups=true").at(0)
    configs = (
        METHOD.full_discriminator(config),
        METHOD.global_discriminator(config),
        METHOD.region_discriminator(config),
    )
    assert {c.grouping for c in configs} == {"strided"}


# ---------------------------------------------------------------- starts


def test_the_renderer_is_the_first_stages_average(first: Path, second: Path) -> None:
    stage1, run = load_checkpoint(first).weights["ema"], load_checkpoint(second).weights
    shared = [key for key in stage1 if key.startswith(("mapping.", "field_net."))]
    assert len(shared) > 40
    for group in ("generator", "ema"):
        assert all(torch.equal(run[group][key], stage1[key]) for key in shared)
        assert not run[group]["average_w"].any() and not run[group]["average_style"].any()


def test_an_original_file_starts_a_second_stage(first: Path, tmp_path: Path) -> None:
    generator = CNerfGenerator(METHOD.generator_config(staged().at(0)))
    generator.load_state_dict(load_checkpoint(first).weights["ema"])
    state = {"g_ema": generator_to_original(generator)}
    path = tmp_path / "CNeRF_vol_renderer.pt"
    torch.save(state, path)
    named = convert_states(state, path).weights["ema"]  # channels by what they show
    models = METHOD.build(staged(FULL).at(0))
    METHOD.stages(staged(FULL, f'init_from="{path}"').at(0))[0].init_from(models)
    for key, value in named.items():
        if key != "average_w":
            assert torch.equal(models["generator"].state_dict()[key], value), key


def test_first_stages_that_do_not_fit(first: Path, tmp_path: Path) -> None:
    def refusal(*settings: str) -> str:
        with pytest.raises(UserError) as caught:
            METHOD.first_stage(staged(FULL, *settings).at(0))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    origin = f'init_from="{first}"'
    assert "--pretrain_render_path" in refusal("init_from=")
    assert "nothing at" in refusal(f'init_from="{tmp_path / "nothing"}"')
    assert "its model.width is 16, this run has 8" in refusal(origin, "model.width=8")
    assert "its camera.radius is 0.12" in refusal(origin, "camera.radius=0.1")


def test_settings_that_do_not_fit() -> None:
    for name, setting, words in (
        (VOLUME, "model.regions=5", "the data have 9"),
        (VOLUME, "discriminator.chunk=3", "expected a multiple of discriminator.group_size 2"),
        (VOLUME, "render.resolution=48", r"render\.resolution: resolution must be one of"),
        (VOLUME, "train.compile=true", "train.compile"),
        (VOLUME, "init_from=somewhere", "only the full stage starts from another"),
        (FULL, "model.resolution=4", "size must be at least in_resolution"),
    ):
        with pytest.raises(UserError, match=words):
            METHOD.check_config(staged(name, setting).at(0))
    with pytest.raises(UserError, match="expected fp32, tf32"):
        staged(VOLUME, "train.precision=bf16")


# ---------------------------------------------------------------- sample grids


@pytest.mark.parametrize(("name", "more"), [(VOLUME, set()), (FULL, {"thumb"})])
def test_grids_of_a_run(name: str, more: set[str], tmp_path: Path) -> None:
    """A row for each head, a column for each azimuth; averages of codes are dropped again."""
    settings = (
        "sphere.steps=0",
        "log.samples_every=1",
        "train.max_steps=1",
        "log.sample_heads=3",
        "log.sample_views=4",
    )
    config = staged(name, *settings)
    Trainer(METHOD, config, tmp_path, callbacks=METHOD.callbacks()).run()
    side = METHOD.side(config.at(0))
    written = {path.stem: read_picture(path) for path in (tmp_path / "samples").glob("*.png")}
    assert set(written) == {"reals", *(f"00000001_{kind}" for kind in {"image", "segmentation", "depth", *more})}
    assert written["00000001_image"].shape[-2:] == written["00000001_segmentation"].shape[-2:] == (3 * side, 4 * side)
    assert written["reals"].shape[-1] >= 2 * side
    colours = written["reals"][..., :side, side : 2 * side].flatten(-2).T.unique(dim=0)
    assert len(colours) <= 9
    assert not load_checkpoint(tmp_path).weights["ema"]["average_w"].any()


def test_recipes_build() -> None:
    for name in ("ffhq_volume", "ffhq_volume_4gpu", "ffhq_full_512", "synthetic_64", "synthetic_128_full"):
        METHOD.check_config(load_staged(CnerfConfig, [resolve_curriculum("cnerf", name)]).at(0))
    config = load_staged(CnerfConfig, [resolve_curriculum("cnerf", "synthetic_128_full")]).at(0)
    assert 2 * sum(p.numel() for p in METHOD.build_generator(config).parameters()) < 6e6, "bytes in half precision"
