# SPDX-License-Identifier: Apache-2.0
"""Numbers that are not finite never get into weights, averages or checkpoints; loss scale and autocast."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from facelab.checkpoints.format import load_checkpoint
from facelab.training.distributed import Distributed
from facelab.training.gradients import FlatGradients, GradientArena, NanWatch
from facelab.training.loop import Callback, Trainer, TrainingDiverged
from facelab.training.precision import LossScale
from tests.training.training_doubles import Eg3d, Fenerf, config, run

CPU = torch.device("cpu")


class Poisoned(Fenerf):
    """The generator's loss is not finite in one chunk of chosen steps."""

    def __init__(self, steps: tuple[int, ...], value: float = float("nan")) -> None:
        super().__init__()
        self.steps, self.value = steps, value

    def generator_losses(self, ctx):
        for name, loss in super().generator_losses(ctx):
            yield name, loss * self.value if ctx.step in self.steps and ctx.chunk == 3 else loss


class Snapshots(Callback):
    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_log(self, trainer, metrics) -> None:
        models = ("generator", "d_image")
        self.weights.append(
            {f"{m}.{k}": v.clone() for m in models for k, v in trainer.models[m].state_dict().items()}
            | {"ema": trainer.averages["ema"].shadow["synthesis.weight"].clone()}
            | {"steps": next(iter(trainer.optimizers["generator"].adam.state.values()))["step"].clone()}
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_is_skipped_and_the_run_goes_on(tmp_path: Path, value: float) -> None:
    seen = Snapshots()
    staged = config(train={"max_steps": 4, "nan": "skip"}, log={"every": 1})
    run(Poisoned((1, 2), value), staged, tmp_path, callbacks=[seen])
    first, second, third, fourth = seen.weights
    for key in (k for k in first if k.startswith("generator") or k == "steps"):
        assert torch.equal(first[key], third[key]), key
    assert not torch.equal(first["d_image.body.weight"], second["d_image.body.weight"])
    assert not torch.equal(third["generator.synthesis.weight"], fourth["generator.synthesis.weight"])
    assert float(fourth["steps"]) == 2 and torch.isfinite(fourth["ema"]).all()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["skipped/g"] for entry in log] == [0, 1, 1, 0] and log[1]["g/loss"] is None


@pytest.mark.parametrize(("policy", "last"), [("skip", 5), ("stop", 3)])
def test_a_run_that_diverges_stops_with_a_good_state(tmp_path: Path, policy: str, last: int) -> None:
    staged = config(train={"max_steps": 20, "nan": policy})
    with pytest.raises(TrainingDiverged) as caught:
        run(Poisoned(tuple(range(2, 20))), staged, tmp_path)
    assert f"stopped after step {last}: gradients of g were not finite" in str(caught.value)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.step == last
    assert all(torch.isfinite(t).all() for tensors in checkpoint.weights.values() for t in tensors.values())


def test_two_bad_steps_between_good_ones_do_not_stop(tmp_path: Path) -> None:
    steps = (0, 1, 3, 4, 6, 7)
    assert run(Poisoned(steps), config(train={"max_steps": 9}), tmp_path)[1].finished


def test_reference_policy_replaces_values_as_the_original_did(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    gradients = FlatGradients([parameter], GradientArena())
    gradients.attach()
    parameter.grad.copy_(torch.tensor([float("nan"), float("inf"), -float("inf"), 2.0]))  # type: ignore[union-attr]
    _, bad = gradients.finish(torch.tensor(1.0), None, replace=True)
    assert gradients.flat.tolist() == [0.0, 1e5, -1e5, 2.0] and float(bad) == 0.0
    seen = Snapshots()
    staged = config(train={"max_steps": 5, "nan": "reference"}, log={"every": 1})
    run(Poisoned((0, 1, 2, 3, 4)), staged, tmp_path, callbacks=[seen])
    assert float(seen.weights[-1]["steps"]) == 5


def test_a_statistic_that_is_not_finite_leaves_the_buffer(tmp_path: Path) -> None:
    class Broken(Eg3d):
        def d_main(self, ctx):
            for name, loss in super().d_main(ctx):
                if name == "real" and ctx.step == 1:
                    ctx.statistic("w", torch.full((12,), float("nan")))
                yield name, loss

    once = Trainer(Eg3d(), config(train={"max_steps": 1}), tmp_path / "once")
    once.run()
    twice = Trainer(Broken(), config(train={"max_steps": 2}), tmp_path / "twice")
    twice.run()
    assert torch.equal(once.models["generator"].average, twice.models["generator"].average)
    assert once.models["generator"].average.abs().sum() > 0


def test_flat_gradients_accumulate_in_place_with_the_strides_of_the_parameters() -> None:
    plain = torch.nn.Parameter(torch.randn(3, 2))
    turned = torch.nn.Parameter(torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last))
    lonely = torch.nn.Parameter(torch.randn(5))
    gradients = FlatGradients([plain, turned, lonely], GradientArena())
    gradients.attach()
    for _ in range(2):
        ((plain**2).sum() + (turned**3).sum()).backward()
    torch.testing.assert_close(plain.grad, 4 * plain.detach())
    torch.testing.assert_close(turned.grad, 6 * turned.detach() ** 2)
    assert turned.grad.stride() == turned.stride() and float(lonely.grad.abs().sum()) == 0
    total = torch.cat([plain.grad.flatten(), turned.grad.flatten()]).norm()
    norm, bad = gradients.finish(torch.tensor(2.0), clip=0.5, replace=False)
    torch.testing.assert_close(norm, total / 2)
    torch.testing.assert_close(gradients.flat.norm(), torch.tensor(0.5))
    assert float(bad) == 0
    with pytest.raises(ValueError, match="float32"):
        FlatGradients([torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))], GradientArena())


def test_loss_scale_halves_doubles_and_stops_at_one() -> None:
    scale = LossScale(True, CPU, start=4.0, interval=3)
    values = []
    for overflow in (0, 0, 1, 0, 0, 0, 1, 1, 1, 1):
        scale.record(torch.tensor(float(overflow)))
        scale.record(torch.tensor(0.0))  # another phase of the same iteration
        scale.update()
        values.append(float(scale.scale))
    assert values == [4, 4, 2, 2, 2, 4, 2, 1, 1, 1]
    again = LossScale(True, CPU)
    again.load_state_dict(scale.state_dict())
    assert float(again.scale) == 1
    assert float(LossScale(False, CPU, 64.0).scale) == 64.0  # constant where nothing adapts it
    idle = LossScale(False, CPU)
    idle.record(torch.tensor(1.0))
    idle.update()
    assert float(idle.scale) == 1


def test_the_scale_follows_the_rules_of_torch() -> None:
    torch_scale, growth = torch.tensor(65536.0), torch.tensor(0, dtype=torch.int32)
    ours = LossScale(True, CPU, interval=4)
    for overflow in (1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0):
        torch._amp_update_scale_(torch_scale, growth, torch.tensor(float(overflow)), 2.0, 0.5, 4)
        ours.record(torch.tensor(float(overflow)))
        ours.update()
        assert float(ours.scale) == float(torch_scale)


def test_overflows_that_a_smaller_scale_cures_do_not_count() -> None:
    scale, watch = LossScale(True, CPU, start=4.0), NanWatch(3, CPU)
    stopped = []
    for _ in range(6):  # scale 4, 2, 1, 1, 1, 1
        flag = torch.tensor(1.0)
        watch.record("g", flag)
        watch.end_step(scale)
        scale.record(flag)
        scale.update()
        stopped.append(watch.exceeded())
    assert stopped[:4] == [[], [], [], []] and stopped[4] == ["g"]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_precisions_train_and_resume_exactly(tmp_path: Path, precision: str) -> None:
    def staged(steps: int):
        return config(train={"max_steps": steps, "precision": precision}, log={"every": 1})

    dtypes = []

    class Watched(Fenerf):
        def fake(self, ctx):
            out = super().fake(ctx)
            dtypes.append(out.dtype)
            with ctx.autocast(False):
                assert ctx.models["generator"].mapping(torch.ones(1, 6)).dtype == torch.float32
            return out

    whole, _ = run(Watched(), staged(4), tmp_path / "whole")
    run("fenerf", staged(2), tmp_path / "parts")
    parts, _ = run("fenerf", staged(4), tmp_path / "parts", resume="auto")
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}[precision]
    assert set(dtypes) == {expected}
    weight = whole.models["generator"].synthesis.weight
    assert torch.equal(weight, parts.models["generator"].synthesis.weight) and torch.isfinite(weight).all()
    start = Trainer(Fenerf(), staged(1), tmp_path / "start").models["generator"].synthesis.weight
    assert not torch.equal(weight, start)
    assert torch.equal(whole.scale.scale, parts.scale.scale)


def test_fp16_gradients_are_unscaled_before_they_are_clipped(tmp_path: Path) -> None:
    class GeneratorFirst(Fenerf):
        def stages(self, config):
            (stage,) = super().stages(config)
            return [dataclasses.replace(stage, phases=stage.phases[::-1])]

    norms = []
    for precision in ("fp32", "fp16"):
        staged = config(train={"max_steps": 1, "precision": precision, "grad_clip": 0.01}, log={"every": 1})
        run(GeneratorFirst(), staged, tmp_path / precision)
        norms.append(json.loads((tmp_path / precision / "log.jsonl").read_text().splitlines()[0]))
    assert norms[1]["grad_norm/g"] == pytest.approx(norms[0]["grad_norm/g"], rel=0.02)
    # R1 differentiates scaled half-precision logits: the first scale is too large for it, as it should find out
    assert norms[1]["skipped/d_image"] == 1 and norms[1]["loss_scale"] == 32768.0
    assert norms[0]["grad_norm/g"] > 0.01  # so that clipping had work to do


def test_an_overflow_skips_the_update_and_lowers_the_scale(tmp_path: Path) -> None:
    class Large(Fenerf):
        def generator_losses(self, ctx):
            for name, loss in super().generator_losses(ctx):
                yield name, loss * 3e33 if ctx.step < 4 else loss  # overflows fp32 once multiplied by the scale

    staged = config(train={"max_steps": 6, "precision": "fp16"}, log={"every": 1})
    _, result = run(Large(), staged, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert result.finished and [entry["skipped/g"] for entry in log] == [1, 1, 1, 1, 0, 0]
    assert [entry["loss_scale"] for entry in log] == [32768, 16384, 8192, 4096, 4096, 4096]


class Exact(Eg3d):
    """The regulariser of the generator is exact; each phase trains all its weights towards 0 and notes what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[tuple[bool, bool, torch.dtype]]] = {}

    def stages(self, config):
        (stage,) = super().stages(config)
        phases = [
            dataclasses.replace(p, exact=p.name == "g_reg", losses=self.watched(p), after=None) for p in stage.phases
        ]
        return [dataclasses.replace(stage, phases=tuple(phases))]

    def watched(self, phase):
        def losses(ctx):
            weights = list(ctx.models[phase.trains[0]].parameters())
            product = torch.mm(weights[0].flatten()[None], weights[0].flatten()[:, None])
            flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
            self.seen.setdefault(phase.name, set()).add((*flags, product.dtype))
            yield "loss", product.sum() + sum(weight.square().mean() for weight in weights)

        return losses


def test_an_exact_phase_has_no_autocast(tmp_path: Path) -> None:
    method = Exact()
    run(method, config(train={"max_steps": 2, "precision": "bf16"}), tmp_path)
    dtypes = {name: {dtype for *_, dtype in seen} for name, seen in method.seen.items()}
    assert dtypes["g_reg"] == {torch.float32}
    assert all(dtypes[name] == {torch.bfloat16} for name in ("g_main", "d_main", "d_reg"))


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_an_exact_phase_has_no_tf32_on_a_gpu(tmp_path: Path, graphs: bool) -> None:
    method = Exact()
    staged = config(train={"max_steps": 9, "precision": "tf32", "cuda_graphs": graphs})
    run(method, staged, tmp_path, distributed=Distributed(device=torch.device("cuda")))
    flags = {name: {both[:2] for both in seen} for name, seen in method.seen.items()}
    assert flags.pop("g_reg") == {(False, False)}
    assert set(flags) == {"g_main", "d_main", "d_reg"} and all(seen == {(True, True)} for seen in flags.values())
    assert not torch.backends.cudnn.allow_tf32
