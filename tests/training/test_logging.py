# SPDX-License-Identifier: Apache-2.0
"""What a run tells, and to whom."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
import torch

from facelab.cameras import Camera
from facelab.data.batch import Batch
from facelab.errors import UserError
from facelab.training.config import LogConfig, may_change
from facelab.training.feed import Feed, chunk_of
from facelab.training.logging import Logger, PhaseTimer, truncate
from facelab.training.loop import Callback
from facelab.training.schedule import Progress, linear, nerf_noise
from tests.training.training_doubles import Fenerf, Pixels, config, run


def test_a_line_holds_means_speed_and_seconds(tmp_path: Path) -> None:
    losses: list[float] = []

    class Watched(Fenerf):
        def generator_losses(self, ctx):
            for name, loss in super().generator_losses(ctx):
                losses.append(float(loss.detach()))
                ctx.log("twice", 2 * loss)
                ctx.log("Own/name", 3.0)
                yield name, loss

    run(Watched(), config(train={"max_steps": 4}), tmp_path)
    first, second = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (first["step"], first["images"], second["step"]) == (2, 16, 4)
    assert first["g/loss"] == pytest.approx(sum(losses[:8]) / 8, rel=1e-5)
    assert second["g/loss"] == pytest.approx(sum(losses[8:]) / 8, rel=1e-5)
    assert second["g/twice"] == pytest.approx(2 * second["g/loss"], rel=1e-5) and second["Own/name"] == 3.0
    assert second["images_per_second"] > 0 and second["eta_seconds"] == 0 and second["memory_gib"] > 0
    assert {k for k in second if k.startswith("seconds/")} == {"seconds/d_image", "seconds/d_label", "seconds/g"}
    assert second["lr/d_image"] == 0.02 and (tmp_path / "config.yaml").exists()


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    with Logger(tmp_path, LogConfig(), active=False, total=5) as logger:
        logger.write(1, {"step": 1}, {})
        logger.say("nothing")
        logger.tick(1)
    assert list(tmp_path.iterdir()) == []


def test_callbacks_come_in_order(tmp_path: Path) -> None:
    calls: list[str] = []

    class Recorder(Callback):
        def on_start(self, trainer):
            calls.append("start")

        def on_log(self, trainer, metrics):
            calls.append(f"log {metrics['step']}")

        def on_samples(self, trainer):
            with trainer.averages["ema"].applied_to(trainer.models["generator"]):
                calls.append(f"samples {trainer.position.step}")

        def on_checkpoint(self, trainer, folder):
            calls.append(f"checkpoint {folder.name}")

        def on_end(self, trainer):
            calls.append("end")

    staged = config(train={"max_steps": 3}, log={"every": 2, "samples_every": 2}, checkpoint={"every": 2})
    run("fenerf", staged, tmp_path, callbacks=[Recorder()])
    middle = ["log 2", "samples 2", "checkpoint 00000002"]
    assert calls == ["start", *middle, "log 3", "samples 3", "checkpoint 00000003", "end"]


def test_truncate_keeps_whole_lines_up_to_the_step(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    entries = [{"step": 0, "warmup_step": 2}, {"step": 0, "warmup_step": 4}, {"step": 5}, {"step": 10}]
    path.write_text("".join(json.dumps(e) + "\n" for e in entries) + '{"step": 3')
    truncate(path, 7, warmup_step=4)
    assert [json.loads(line) for line in path.read_text().splitlines()] == entries[:3]
    truncate(path, 0, warmup_step=3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == entries[:1]


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run("fenerf", config(train={"max_steps": 4}, log={"tensorboard": True}), tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("g/loss")] == [2, 4]


@pytest.mark.parametrize(("option", "package"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_missing_loggers_say_what_to_install(tmp_path: Path, monkeypatch, option: str, package: str) -> None:
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=f"log.{option}=true needs a package: pip install {option}"):
        Logger(tmp_path, LogConfig(progress=False, **{option: True}), active=True, total=1)


def test_phase_timer_averages_and_forgets() -> None:
    timer = PhaseTimer(torch.device("cpu"))
    timer._marks = [("a", 1.0, 2.0), ("b", 0.0, 5.0), ("a", 2.0, 5.0)]
    assert timer.read() == {"a": 2.0, "b": 5.0} and timer.read() == {}


def test_feed_shares_out_contiguous_parts_of_each_step() -> None:
    device = torch.device("cpu")
    whole = Pixels()
    feeds = [Feed(Pixels(), 4, 6, rank, 2, workers=rank, device=device) for rank in range(2)]
    for step in range(2):
        parts = [feed.next() for feed in feeds]
        expected = whole.batch(4 + 6 * step, 6)
        assert expected.image is not None
        assert torch.equal(torch.cat([part.image for part in parts]), expected.image)
    for feed in feeds:
        feed.close()


def test_chunks_are_views_with_their_cameras() -> None:
    camera = Camera(torch.eye(4).repeat(8, 1, 1), torch.eye(3).repeat(8, 1, 1))
    camera.cam2world[:, 0, 3] = torch.arange(8.0)
    batch = Batch(image=Pixels(frames=2).batch(0, 4).image, camera=camera)
    part = chunk_of(batch, 1, 2)
    chosen = batch.select(slice(1, 3))
    assert torch.equal(part.image, chosen.image) and part.image.data_ptr() == batch.image[1].data_ptr()
    assert torch.equal(part.camera.cam2world, chosen.camera.cam2world)


def test_schedules() -> None:
    assert [linear(x, 4, 2.0, 4.0) for x in (-1, 0, 2, 9)] == [2.0, 2.0, 3.0, 4.0]
    assert [nerf_noise(s) for s in (0, 2500, 5000, 9000)] == [1.0, 0.5, 0.0, 0.0]
    progress = Progress(25, 250, 10, 2, ((0, 0), (10, 100), (20, 200)), ({"r": 1}, {"r": 2}, {"r": 2}))
    assert progress.last_change(lambda c: c["r"]) == (10, 100)
    assert progress.fade(30, lambda c: c["r"]) == 0.5 and progress.fade(5, lambda c: c["r"]) == 1.0


def test_settings_that_a_resume_may_change() -> None:
    assert may_change("train.max_steps") and may_change("stages[2].checkpoint.keep_last")
    assert not may_change("train.seed") and not may_change("logger") and not may_change("stages")
    assert may_change("data.path", ("data.path",))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_nothing_waits_for_the_gpu_inside_a_step(tmp_path: Path, precision: str) -> None:
    from facelab.training.distributed import Distributed
    from facelab.training.loop import Trainer

    class Strict(Callback):
        def on_start(self, trainer):
            torch.cuda.set_sync_debug_mode("error")

        def on_log(self, trainer, metrics):
            torch.cuda.set_sync_debug_mode("default")

    staged = config(train={"max_steps": 5, "precision": precision}, log={"every": 5})
    method = Fenerf()
    trainer = Trainer(method, staged, tmp_path, Distributed(device=torch.device("cuda")), [Strict()])
    means = trainer._means

    def relaxed():
        torch.cuda.set_sync_debug_mode("default")
        return means()

    trainer._means = relaxed  # type: ignore[method-assign]
    try:
        assert trainer.run().finished
    finally:
        torch.cuda.set_sync_debug_mode("default")
