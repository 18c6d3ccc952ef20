# SPDX-License-Identifier: Apache-2.0
"""The loop against plain arithmetic, and the training structures of the papers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from facelab.data.samplers import rank_chunks
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.training.loop import Trainer
from facelab.training.phases import Phase, detach
from facelab.training.protocol import OptimizerSpec, TrainStage
from tests.training.training_doubles import Cnerf, Eg3d, Fenerf, Pairs, Pixels, config, one_hot, run


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def plain_fenerf_step(batch: int, chunk: int, clip: float) -> dict[str, dict[str, torch.Tensor]]:
    """The first step of the FENeRF double as one big batch, with torch.optim.Adam and no loop."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = Fenerf().build(config().at(0))
    real = Pixels().batch(0, batch)

    def fakes(phase: str) -> torch.Tensor:
        parts = [Draws(0, 0, phase, c).normal("z", (chunk, 6)) for c in rank_chunks(batch, chunk)]
        return models["generator"](torch.cat(parts))

    def update(loss: torch.Tensor, name: str, groups: list[dict]) -> None:
        parameters = [p for group in groups for p in group["params"]]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = torch.zeros_like(p) if g is None else g
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        torch.optim.Adam(groups, betas=(0.0, 0.9)).step()

    def d_loss(network, fake, x):
        x = x.requires_grad_()
        logits = network(x)[0]
        (g,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        penalty = 0.5 * 0.2 * g.square().flatten(1).sum(1).mean()
        return F.softplus(network(fake)[0]).mean() + F.softplus(-logits).mean() + penalty

    image, label, generator = models["d_image"], models["d_label"], models["generator"]
    loss = d_loss(image, fakes("d_image").detach()[:, :3], real.float_image())
    update(loss, "d_image", [{"params": list(image.parameters()), "lr": 2e-2}])
    both = torch.cat([real.float_image(), one_hot(real.label_map)], 1)
    update(
        d_loss(label, fakes("d_label").detach(), both), "d_label", [{"params": list(label.parameters()), "lr": 2e-2}]
    )
    out = fakes("g")
    mixed = torch.cat([out[:, :3].detach(), out[:, 3:]], 1)
    loss = F.softplus(-image(out[:, :3])[0]).mean() + 0.1 * F.softplus(-label(mixed)[0]).mean()
    rest = [*generator.synthesis.parameters(), *generator.unused.parameters()]
    slow = {"params": list(generator.mapping.parameters()), "lr": 0.05 * 1e-2}
    update(loss, "g", [slow, {"params": rest, "lr": 1e-2}])
    return {name: model.state_dict() for name, model in models.items()}


@pytest.mark.parametrize("chunk", [2, 8])
def test_chunked_step_equals_one_big_batch(tmp_path: Path, chunk: int) -> None:
    staged = config(train={"max_steps": 1, "batch_chunk": chunk, "grad_clip": 0.05})
    trainer, result = run("fenerf", staged, tmp_path)
    assert result.finished and result.exit_code == 0
    expected = plain_fenerf_step(8, chunk, clip=0.05)
    for name, model in trainer.models.items():
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name][key], rtol=1e-5, atol=1e-6)
    start = Fenerf().build(config().at(0))
    assert not torch.equal(trainer.models["generator"].synthesis.weight, start["generator"].synthesis.weight)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_power_of_two_on_the_losses_changes_nothing_in_full_precision(tmp_path: Path, clip: float | None) -> None:
    found = []
    for scale in (1.0, 64.0):
        staged = config(train={"max_steps": 3, "grad_clip": clip, "loss_scale": scale}, log={"every": 1})
        trainer, _ = run("fenerf", staged, tmp_path / str(scale))
        norms = [line["grad_norm/g"] for line in lines(tmp_path / str(scale))]
        found.append((norms, {n: m.state_dict() for n, m in trainer.models.items()}))
    (norms, plain), (scaled_norms, scaled) = found
    assert scaled_norms == pytest.approx(norms, rel=1e-5)
    for name in plain:
        for key, value in plain[name].items():
            torch.testing.assert_close(scaled[name][key], value, rtol=1e-5, atol=1e-6)


def test_reference_sum_is_chunks_times_the_mean(tmp_path: Path) -> None:
    norms = []
    for reduction in (False, True):
        staged = config(train={"max_steps": 1, "grad_clip": None}, log={"every": 1}, sum_chunks=reduction)
        run("fenerf", staged, tmp_path / str(reduction))
        norms.append(lines(tmp_path / str(reduction))[0])
    assert norms[1]["grad_norm/g"] == pytest.approx(4 * norms[0]["grad_norm/g"], rel=1e-5)
    assert norms[1]["grad_norm/d_image"] == pytest.approx(norms[0]["grad_norm/d_image"], rel=1e-6)


def test_unused_parameters_stay_and_untrained_models_get_no_gradient(tmp_path: Path) -> None:
    trainer = Trainer(Fenerf(), config(), tmp_path)
    before = trainer.models["generator"].unused.weight.clone()
    assert trainer.run().finished
    torch.testing.assert_close(trainer.models["generator"].unused.weight, before, rtol=0, atol=0)
    assert all(p.grad is None for _, p in trainer.models.named_parameters())


def test_shared_fakes_are_made_once_per_chunk_and_released(tmp_path: Path) -> None:
    method = Cnerf()
    trainer, _ = run(method, config(train={"max_steps": 2}), tmp_path)
    assert method.made == [(step, chunk) for step in range(2) for chunk in range(4)]
    for first, second in zip(method.used["d_image"], method.used["d_label"], strict=True):
        assert first is second and not first.requires_grad
    assert not trainer._shared.values


def test_shared_refuses_another_chunk_size(tmp_path: Path) -> None:
    class Uneven(Cnerf):
        def stages(self, config):
            (stage,) = super().stages(config)
            first, second, last = stage.phases
            return [TrainStage("main", (first, dataclasses.replace(second, chunk=lambda c: 4), last))]

    with pytest.raises(ValueError, match="made for chunks of 2 samples, asked for 4"):
        run(Uneven(), config(train={"max_steps": 1}), tmp_path)


def test_lazy_phases_share_adam_as_in_eg3d(tmp_path: Path) -> None:
    trainer, _ = run("eg3d", config(train={"max_steps": 17, "grad_clip": None}, log={"every": 1}), tmp_path)
    g, d = (trainer.optimizers[name].adam for name in ("g", "d"))
    assert g.param_groups[0]["lr"] == pytest.approx(0.002)
    assert g.param_groups[0]["betas"] == (0.0, pytest.approx(0.99**0.8))
    assert d.param_groups[0]["lr"] == pytest.approx(0.002 * 16 / 17)
    assert d.param_groups[0]["betas"][1] == pytest.approx(0.99 ** (16 / 17))
    ran = {name: [e["step"] - 1 for e in lines(tmp_path) if f"seconds/{name}" in e] for name in ("g_reg", "d_reg")}
    assert ran == {"g_reg": [0, 4, 8, 12, 16], "d_reg": [0, 16]}
    steps = {int(state["step"]) for state in d.state.values()}
    assert steps == {17 + 2}


def test_lazy_losses_are_multiplied_by_their_interval(tmp_path: Path) -> None:
    norms = []
    for every in (1, 4):

        class Lazy(Eg3d):
            def stages(self, config, every=every):
                return [TrainStage("main", (Phase("g_reg", ("generator",), "g", self.g_reg, every, real=False),))]

        run(Lazy(), config(train={"max_steps": 1, "grad_clip": None}, log={"every": 1}), tmp_path / str(every))
        norms.append(lines(tmp_path / str(every))[0]["grad_norm/g_reg"])
    assert norms[1] == pytest.approx(4 * norms[0], rel=1e-5)


def test_statistics_reach_the_buffers_once_per_step(tmp_path: Path) -> None:
    trainer, _ = run("eg3d", config(train={"max_steps": 1}), tmp_path)
    moved = trainer.models["generator"]
    assert float(trainer.models["augment"].p) in (0.0, pytest.approx(0.01))
    # phase d_main sees the generator after its update in phases g_main and g_reg
    z = torch.cat([Draws(0, 0, "d_main", c).normal("z", (2, 6)) for c in range(4)])
    expected = 0.002 * torch.tanh(moved.mapping(z)).mean(0)
    torch.testing.assert_close(moved.average, expected.detach(), rtol=1e-5, atol=1e-7)


def test_pairs_warm_up_and_named_stages(tmp_path: Path) -> None:
    trainer, result = run("pairs", config(train={"max_steps": 2}, log={"every": 1}), tmp_path / "main")
    assert (result.step, trainer.position.images, trainer.position.warmup_step) == (2, 16, 3)
    found = [(e["step"], e["warmup_step"]) for e in lines(tmp_path / "main")]
    assert found == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    trainer, _ = run("pairs", config(train={"max_steps": 30}), tmp_path / "driver", stage="driver")
    losses = [e["driver/l1"] for e in lines(tmp_path / "driver")]
    assert losses[-1] < losses[0]
    with pytest.raises(UserError, match=r"no training stage 'drver'. Did you mean 'driver'\? Stages: main, driver"):
        Trainer(Pairs(), config(), tmp_path / "no", stage="drver")


def test_init_from_runs_once_on_a_fresh_start(tmp_path: Path) -> None:
    calls = []

    class Continued(Fenerf):
        def stages(self, config):
            (stage,) = super().stages(config)

            def load(models):
                calls.append(1)
                torch.nn.init.constant_(models["generator"].unused.weight, 7.0)

            return [dataclasses.replace(stage, init_from=load)]

    trainer, _ = run(Continued(), config(train={"max_steps": 1}), tmp_path)
    assert float(trainer.averages["ema"].shadow["unused.weight"][0, 0]) == 7.0
    run(Continued(), config(train={"max_steps": 2}), tmp_path, resume="auto")
    assert calls == [1]


def test_curriculum_rows_change_rate_batch_and_fade_but_keep_moments(tmp_path: Path) -> None:
    rows = [
        {"from_step": 0},
        {"from_step": 3, "resolution": 64, "generator_lr": 1e-3},
        {"from_step": 5, "train": {"batch_size": 4}},
    ]
    method = Fenerf()
    trainer, _ = run(method, config(rows, train={"max_steps": 7, "batch_chunk": 4}), tmp_path)
    fades = method.fade_seen  # two chunks a step, then one
    assert fades == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.0, 0.0, 0.25, 0.25, 0.5, 0.75]
    assert trainer.position.starts == [(0, 0), (3, 24), (5, 40)] and trainer.position.images == 48
    rates = {g["prefix"]: g["lr"] for g in trainer.optimizers["generator"].adam.param_groups}
    assert rates == {"": 1e-3, "generator.mapping": pytest.approx(5e-5)}
    assert {int(s["step"]) for s in trainer.optimizers["generator"].adam.state.values()} == {7}


def test_rows_by_images(tmp_path: Path) -> None:
    rows = [{"from_kimg": 0}, {"from_kimg": 0.016, "generator_lr": 1e-3}]
    trainer, _ = run("fenerf", config(rows, train={"max_steps": 3}), tmp_path)
    assert trainer.position.starts == [(0, 0), (2, 16)]


def test_averages_follow_their_schedules(tmp_path: Path) -> None:
    trainer, _ = run("fenerf", config(train={"max_steps": 1}), tmp_path)
    start = Trainer(Fenerf(), config(), tmp_path / "start").models["generator"].synthesis.weight
    now = trainer.models["generator"].synthesis.weight
    first = start + (1 - 2 / 11) * (now - start)  # decay (1 + 1) / (10 + 1)
    torch.testing.assert_close(trainer.averages["ema"].shadow["synthesis.weight"], first.detach())
    torch.testing.assert_close(trainer.averages["ema2"].shadow["synthesis.weight"], now.detach())  # decay 0 at first


def test_samples_follow_one_another_without_gaps(tmp_path: Path) -> None:
    source = Pixels()

    class Watched(Fenerf):
        def dataset(self, config):
            return source

    run(Watched(), config(train={"max_steps": 3}), tmp_path)
    assert source.asked == [(0, 8), (8, 8), (16, 8)]


def test_optimizer_can_select_parameters(tmp_path: Path) -> None:
    class DecoderOnly(Fenerf):
        def optimizers(self, config):
            spec = OptimizerSpec(("generator",), 1e-2, select=lambda name: "synthesis" in name)
            return {**super().optimizers(config), "generator": spec}

    trainer = Trainer(DecoderOnly(), config(), tmp_path)
    before = {k: v.clone() for k, v in trainer.models["generator"].state_dict().items()}
    trainer.run()
    changed = {k for k, v in trainer.models["generator"].state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"synthesis.weight", "synthesis.bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"batch_size": 9}}, "a batch of 9 in chunks of 2 cannot be shared by 1 processes"),
        ({"train": {"batch_chunk": 0}}, "batch_chunk must be at least 1"),
        ({"train": {"precision": "fp8"}}, "precision"),
        ({"train": {"max_stps": 3}}, "Did you mean 'max_steps'"),
    ],
)
def test_bad_settings_are_one_line(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Trainer(Fenerf(), config(**change), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (Phase("x", ("generatr",), "generator", Fenerf().image_losses), "trains"),
        (Phase("x", ("generator",), "generatr", Fenerf().image_losses), "name the optimizers"),
        (Phase("x", ("d_image",), "generator", Fenerf().image_losses), "holds"),
    ],
)
def test_phases_that_do_not_fit_are_refused(tmp_path: Path, phase: Phase, message: str) -> None:
    class Wrong(Fenerf):
        def stages(self, config):
            return [TrainStage("main", (phase,))]

    with pytest.raises(ValueError, match=message):
        Trainer(Wrong(), config(), tmp_path)


def test_losses_must_be_scalars(tmp_path: Path) -> None:
    class Wrong(Fenerf):
        def generator_losses(self, ctx):
            yield "loss", self.fake(ctx).mean(0)

    with pytest.raises(ValueError, match=r"phase 'g': loss 'loss' must be a scalar, got \(8, 4, 4\)"):
        run(Wrong(), config(), tmp_path)


def test_detach_reaches_into_containers() -> None:
    @dataclasses.dataclass(frozen=True)
    class Out:
        rgb: torch.Tensor
        extra: dict

    leaf = torch.ones(2, requires_grad=True) * 2
    result = detach(Out(leaf, {"a": [leaf, 3]}))
    assert not result.rgb.requires_grad and not result.extra["a"][0].requires_grad and result.extra["a"][1] == 3
