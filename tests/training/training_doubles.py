# SPDX-License-Identifier: Apache-2.0
"""Small stand-ins for methods: linear generators and discriminators with the training structure of the papers."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facelab.config import StagedConfig, from_dict
from facelab.data.batch import Batch
from facelab.draws import Draws
from facelab.errors import UserError
from facelab.training.config import CheckpointConfig, LogConfig, TrainConfig
from facelab.training.distributed import Distributed
from facelab.training.loop import Callback, RunResult, Trainer
from facelab.training.phases import AfterPhase, Losses, Phase, PhaseContext
from facelab.training.protocol import EmaSpec, Models, OptimizerSpec, TrainStage, Warmup

SIZE = 4  # pixels
CLASSES = 5


@dataclass(frozen=True)
class DoubleConfig:
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    resolution: int = 32
    generator_lr: float = 1e-2
    discriminator_lr: float = 2e-2
    r1: float = 0.2
    sum_chunks: bool = False


def config(stages: list[dict] | None = None, unit: str = "from_step", **settings: Any) -> StagedConfig:
    """Small and silent; ``settings`` as in YAML: ``train={"max_steps": 4}``."""
    data: dict[str, Any] = {
        "train": {"max_steps": 6, "batch_size": 8, "batch_chunk": 2, "workers": 0, "grad_clip": 10.0},
        "checkpoint": {"every": 100},
        "log": {"every": 2, "samples_every": 0, "progress": False},
    }
    for key, value in settings.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    if stages:
        data["stages"] = stages
    return from_dict(DoubleConfig, data)


class Pixels:
    """An endless stream in memory; sample k is a function of k. ``frames`` > 1 gives pairs."""

    def __init__(self, frames: int = 1, poison: range = range(0)) -> None:
        self.frames, self.asked = frames, []
        self.poison = poison

    def batch(self, first_image: int, count: int) -> Batch:
        self.asked.append((first_image, count))
        draws = [Draws(7, step=k, phase="pixels") for k in range(first_image, first_image + count)]
        shape = (3, SIZE, SIZE) if self.frames == 1 else (self.frames, 3, SIZE, SIZE)
        image = torch.stack([(d.uniform("image", shape) * 255).to(torch.uint8) for d in draws])
        label_shape = (SIZE, SIZE) if self.frames == 1 else (self.frames, SIZE, SIZE)
        labels = torch.stack([(d.uniform("label", label_shape) * CLASSES).long() for d in draws])
        return Batch(image=image, label_map=labels)


class TinyGenerator(nn.Module):
    """Code (N, 6) -> image channels and label channels (N, 3 + CLASSES, SIZE, SIZE)."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Linear(6, 12)
        self.synthesis = nn.Linear(12, (3 + CLASSES) * SIZE * SIZE)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("average", torch.zeros(12))

    def forward(self, z: Tensor) -> Tensor:
        w = torch.tanh(self.mapping(z))
        return torch.tanh(self.synthesis(w)).view(-1, 3 + CLASSES, SIZE, SIZE)


class TinyDiscriminator(nn.Module):
    """(N, C, SIZE, SIZE) -> (logit (N, 1), pose (N, 2), class scores (N, CLASSES))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Linear(channels * SIZE * SIZE, 8)
        self.head = nn.Linear(8, 3 + CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.head(F.softplus(self.body(x.flatten(1))))
        return out[:, :1], out[:, 1:3], out[:, 3:]


def one_hot(label_map: Tensor) -> Tensor:
    return F.one_hot(label_map, CLASSES).movedim(-1, 1).float() * 2 - 1


def r1(ctx: PhaseContext, logits: Tensor, x: Tensor) -> Tensor:
    with ctx.autocast(False):
        scale = ctx.grad_scale()
        (gradient,) = torch.autograd.grad(logits.float().sum() * scale, x, create_graph=True)
        return 0.5 * ctx.config.r1 * (gradient / scale).square().flatten(1).sum(1).mean()


class Fenerf:
    """Image D and semantic D with their own fakes; the semantic term of G sees detached colours."""

    name = "fenerf_double"
    config_type = DoubleConfig

    def __init__(self) -> None:
        self.fade_seen: list[float] = []

    def build(self, config: DoubleConfig) -> Models:
        return Models(generator=TinyGenerator(), d_image=TinyDiscriminator(3), d_label=TinyDiscriminator(3 + CLASSES))

    def optimizers(self, config: DoubleConfig) -> dict[str, OptimizerSpec]:
        return {
            "generator": OptimizerSpec(("generator",), config.generator_lr, lr_factors={"generator.mapping": 0.05}),
            "d_image": OptimizerSpec(("d_image",), config.discriminator_lr),
            "d_label": OptimizerSpec(("d_label",), config.discriminator_lr),
        }

    def emas(self, config: DoubleConfig) -> dict[str, EmaSpec]:
        return {"ema": EmaSpec("generator", 0.999), "ema2": EmaSpec("generator", lambda p: 0.5 if p.images else 0.0)}

    def dataset(self, config: DoubleConfig) -> Pixels:
        return Pixels()

    def stages(self, config: DoubleConfig) -> list[TrainStage]:
        reduction = "sum" if config.sum_chunks else "mean"
        phases = (
            Phase("d_image", ("d_image",), "d_image", self.image_losses),
            Phase("d_label", ("d_label",), "d_label", self.label_losses),
            Phase("g", ("generator",), "generator", self.generator_losses, real=False, reduction=reduction),
        )
        return [TrainStage("main", phases)]

    def fake(self, ctx: PhaseContext) -> Tensor:
        return ctx.models["generator"](ctx.host(lambda draws: draws.normal("z", (ctx.count, 6))))

    def image_losses(self, ctx: PhaseContext) -> Losses:
        with torch.no_grad():
            fake = self.fake(ctx)[:, :3]
        yield from adversarial(ctx, ctx.models["d_image"], fake, ctx.real.float_image())

    def label_losses(self, ctx: PhaseContext) -> Losses:
        with torch.no_grad():
            fake = self.fake(ctx)
        real = torch.cat([ctx.real.float_image(), one_hot(ctx.real.label_map)], 1)
        yield from adversarial(ctx, ctx.models["d_label"], fake, real)

    def generator_losses(self, ctx: PhaseContext) -> Losses:
        self.fade_seen.append(ctx.progress.fade(4, lambda c: c.resolution))
        out = self.fake(ctx)
        logit = ctx.models["d_image"](out[:, :3])[0]
        mixed = torch.cat([out[:, :3].detach(), out[:, 3:]], 1)
        semantic = ctx.models["d_label"](mixed)[0]
        yield "loss", F.softplus(-logit).mean() + 0.1 * F.softplus(-semantic).mean()


def adversarial(ctx: PhaseContext, network: nn.Module, fake: Tensor, real: Tensor) -> Losses:
    yield "fake", F.softplus(network(fake)[0]).mean()
    real = real.detach().requires_grad_()
    logits = network(real)[0]
    ctx.log("scores", logits)
    yield "real", F.softplus(-logits).mean() + r1(ctx, logits, real)


class Cnerf(Fenerf):
    """One shared fake batch for two discriminators; a class label per sample, the same for real and fake."""

    name = "cnerf_double"

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, int]] = []
        self.used: dict[str, list[Tensor]] = {"d_image": [], "d_label": []}

    def build(self, config: DoubleConfig) -> Models:
        return Models(generator=TinyGenerator(), d_image=TinyDiscriminator(3), d_label=TinyDiscriminator(1))

    def make(self, ctx: PhaseContext, draws: Draws) -> dict[str, Tensor]:
        self.made.append((ctx.step, ctx.chunk))
        z = ctx.host(lambda own: own.normal("z", (ctx.count, 6)), draws)
        return {"out": ctx.models["generator"](z)}

    def image_losses(self, ctx: PhaseContext) -> Losses:
        out = ctx.shared("fakes", lambda draws: self.make(ctx, draws))["out"]
        self.used["d_image"].append(out)
        yield from adversarial(ctx, ctx.models["d_image"], out[:, :3], ctx.real.float_image())

    def label_losses(self, ctx: PhaseContext) -> Losses:
        out = ctx.shared("fakes", lambda draws: self.make(ctx, draws))["out"]
        self.used["d_label"].append(out)
        label = ctx.host(lambda draws: (draws.uniform("label", (ctx.count,)) * CLASSES).long())
        rows = torch.arange(ctx.count, device=ctx.device)
        fake = out[rows, 3 + label][:, None]
        real = one_hot(ctx.real.label_map)[rows, label][:, None]
        network = ctx.models["d_label"]
        yield "class", F.cross_entropy(network(real)[2], label) + F.cross_entropy(network(fake)[2], label)
        yield from adversarial(ctx, network, fake, real)

    def generator_losses(self, ctx: PhaseContext) -> Losses:
        out = self.fake(ctx)
        yield "loss", F.softplus(-ctx.models["d_image"](out[:, :3])[0]).mean()


class Eg3d(Fenerf):
    """Several backwards per phase, lazy regularisers, an average that one phase updates, an adaptive strength."""

    name = "eg3d_double"

    def build(self, config: DoubleConfig) -> Models:
        augment = nn.Module()
        augment.register_buffer("p", torch.zeros(()))
        return Models(generator=TinyGenerator(), d=TinyDiscriminator(3), augment=augment)

    def optimizers(self, config: DoubleConfig) -> dict[str, OptimizerSpec]:
        return {
            "g": OptimizerSpec(("generator",), 0.0025, (0.0, 0.99)),
            "d": OptimizerSpec(("d",), 0.002, (0.0, 0.99)),
        }

    def emas(self, config: DoubleConfig) -> dict[str, EmaSpec]:
        return {"ema": EmaSpec("generator", lambda p: 0.5 ** (p.batch_size / max(p.images * 0.05, 1e-8)))}

    def stages(self, config: DoubleConfig) -> list[TrainStage]:
        return [
            TrainStage(
                "main",
                (
                    Phase("g_main", ("generator",), "g", self.g_main, real=False),
                    Phase("g_reg", ("generator",), "g", self.g_reg, every=4, real=False),
                    Phase("d_main", ("d",), "d", self.d_main, after=self.after_d),
                    Phase("d_reg", ("d",), "d", self.d_reg, every=16),
                ),
            )
        ]

    def g_main(self, ctx: PhaseContext) -> Losses:
        yield "loss", F.softplus(-ctx.models["d"](self.fake(ctx)[:, :3])[0]).mean()

    def g_reg(self, ctx: PhaseContext) -> Losses:
        out = self.fake(ctx)
        yield "density", out[:, 3:].abs().mean()

    def d_main(self, ctx: PhaseContext) -> Losses:
        generator, d = ctx.models["generator"], ctx.models["d"]
        with torch.no_grad():
            w = torch.tanh(generator.mapping(ctx.draws.normal("z", (ctx.count, 6))))
            fake = torch.tanh(generator.synthesis(w)).view(ctx.count, -1, SIZE, SIZE)[:, :3]
        ctx.statistic("w", w.mean(0))
        yield "fake", F.softplus(d(fake)[0]).mean()
        logits = d(ctx.real.float_image())[0]
        ctx.statistic("sign", logits.sign().mean())
        yield "real", F.softplus(-logits).mean()

    def d_reg(self, ctx: PhaseContext) -> Losses:
        real = ctx.real.float_image().requires_grad_()
        yield "r1", r1(ctx, ctx.models["d"](real)[0], real)

    def after_d(self, after: AfterPhase) -> None:
        average, p = after.models["generator"].average, after.models["augment"].p
        after.assign_(average, average.lerp(after.statistics["w"], 0.002))
        if after.progress.step % 4 == 0:
            after.assign_(p, (p + (after.statistics["sign"] - 0.6).sign() * 0.01).clamp(min=0))


class Pairs(Fenerf):
    """Batches of two frames; images of both enter one discriminator."""

    name = "pairs_double"

    def build(self, config: DoubleConfig) -> Models:
        return Models(generator=TinyGenerator(), d=TinyDiscriminator(6))

    def optimizers(self, config: DoubleConfig) -> dict[str, OptimizerSpec]:
        return {"g": OptimizerSpec(("generator",), 1e-2), "d": OptimizerSpec(("d",), 1e-2)}

    def dataset(self, config: DoubleConfig) -> Pixels:
        return Pixels(frames=2)

    def stages(self, config: DoubleConfig) -> list[TrainStage]:
        regression = Phase("driver", ("generator",), "g", self.driver, real=False)
        main = (Phase("d", ("d",), "d", self.d), Phase("g", ("generator",), "g", self.g, real=False))
        sphere = Phase("sphere", ("generator",), "g", self.driver, real=False)
        return [TrainStage("main", main, warmup=Warmup(3, (sphere,))), TrainStage("driver", (regression,))]

    def pair(self, ctx: PhaseContext) -> Tensor:
        z = [ctx.draws.normal(name, (ctx.count, 6)) for name in ("u", "v")]
        return torch.cat([ctx.models["generator"](code)[:, :3] for code in z], 1)

    def d(self, ctx: PhaseContext) -> Losses:
        with torch.no_grad():
            fake = self.pair(ctx)
        real = ctx.real.float_image()
        assert real.shape == (ctx.count, 2, 3, SIZE, SIZE)
        yield from adversarial(ctx, ctx.models["d"], fake, real.flatten(1, 2))

    def g(self, ctx: PhaseContext) -> Losses:
        yield "loss", F.softplus(-ctx.models["d"](self.pair(ctx))[0]).mean()

    def driver(self, ctx: PhaseContext) -> Losses:
        z = ctx.draws.normal("z", (ctx.count, 6))
        yield "l1", (ctx.models["generator"](z)[:, 0, 0, 0] - z[:, 0]).abs().mean()


METHODS = {"fenerf": Fenerf, "cnerf": Cnerf, "eg3d": Eg3d, "pairs": Pairs}


class Slow(Callback):
    """Sleeps at each line of the log and leaves a file, so that a test can interfere."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        (self.folder / f"alive_{trainer.distributed.rank}").write_text(str(os.getpid()))
        time.sleep(self.seconds)


def train(
    distributed: Distributed,
    method: str,
    staged: StagedConfig,
    run_dir: Path,
    resume: str | None = None,
    slow: float = 0,
) -> int:
    """A worker for ``launch``."""
    callbacks = [Slow(run_dir, slow)] if slow else []
    resume = None if resume == "none" else resume
    result = Trainer(METHODS[method](), staged, run_dir, distributed, callbacks, resume=resume).run()
    return result.exit_code


class PoisonedOnOneRank(Fenerf):
    """The generator's loss is NaN at step 1, in the last chunk only, which the last process owns."""

    def generator_losses(self, ctx: PhaseContext) -> Losses:
        for name, loss in super().generator_losses(ctx):
            yield name, loss * float("nan") if ctx.step == 1 and ctx.chunk == 3 else loss


def train_several(distributed: Distributed, folder: Path, ended: Path) -> int:
    """All doubles, a run with NaN on one rank, and the second half of a run that one process began."""
    for name in METHODS:
        Trainer(METHODS[name](), config(train={"max_steps": 5}), folder / name, distributed).run()
    poisoned = config(train={"max_steps": 3}, log={"every": 1})
    Trainer(PoisonedOnOneRank(), poisoned, folder / "poisoned", distributed).run()
    halves = config(train={"max_steps": 5, "workers": 1})
    trainer = Trainer(Fenerf(), halves, ended, distributed, resume="auto")
    trainer.run()
    states = distributed.gather({k: v.tolist() for k, v in trainer.models["generator"].state_dict().items()})
    if any(state != states[0] for state in states):
        raise ValueError("the processes hold different weights")
    gaps = torch.full((2, 6), float(distributed.rank))[:, ::2]
    distributed.broadcast_tensors_([gaps])
    if gaps.any():
        raise ValueError("a tensor with gaps between its numbers did not get those of process 0")
    try:
        other = config(train={"max_steps": 5}, generator_lr=1.0)
        Trainer(Fenerf(), other, folder / "fenerf", distributed, resume="auto")
    except UserError as error:
        (folder / f"refusal_{distributed.rank}").write_text(str(error))
    return 0


def fail_on(distributed: Distributed, rank: int, how: str) -> int:
    """A worker of which one rank fails while the others wait for it."""
    if distributed.rank == rank:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("picture 3.png is damaged") if how == "user" else KeyError("missing thing")
    distributed.barrier()
    return 0


def run(method: Any, staged: StagedConfig, run_dir: Path, **options: Any) -> tuple[Trainer, RunResult]:
    trainer = Trainer(METHODS[method]() if isinstance(method, str) else method, staged, run_dir, **options)
    return trainer, trainer.run()
