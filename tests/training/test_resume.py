# SPDX-License-Identifier: Apache-2.0
"""A resumed run is the run that was never stopped; what does not fit is refused with its reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from facelab.checkpoints.format import list_checkpoints, load_checkpoint
from facelab.config import StagedConfig
from facelab.errors import UserError
from facelab.training.distributed import Distributed
from facelab.training.loop import Trainer
from tests.training.training_doubles import METHODS, Eg3d, Fenerf, config, run

ROWS = [{"from_step": 0}, {"from_step": 4, "resolution": 64, "generator_lr": 1e-3, "train": {"batch_size": 12}}]
CHECKOUT = Path(__file__).resolve().parents[2]


def flatten(value: object, name: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in flatten(item, f"{name}/{i}").items()}
    return {name: value}


def everything(run_dir: Path) -> dict[str, object]:
    """Every tensor and number of the newest checkpoint, but the settings that may differ."""
    checkpoint = load_checkpoint(run_dir)
    state = dict(checkpoint.state)  # type: ignore[call-overload]
    state.pop("random")
    return flatten({"weights": checkpoint.weights, "state": state})


def assert_same_run(first: Path, second: Path) -> None:
    a, b = everything(first), everything(second)
    assert a.keys() == b.keys() and len(a) > 30
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        assert same, name


def steps_of(max_steps: int, **more) -> StagedConfig:
    return config(ROWS, train={"max_steps": max_steps, "batch_chunk": 4}, **more)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, method: str) -> None:
    run(method, steps_of(8), tmp_path / "whole")
    for end in (2, 5, 8):  # within the first row, within the second, to the end
        _, result = run(method, steps_of(end), tmp_path / "parts", resume="auto")
        assert result.step == end
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    found = [[entry["step"] for entry in log if entry["step"]] for log in logs]  # without the warm-up
    assert found[0] == [2, 4, 6, 8]
    assert found[1] == [2, 4, 5, 6, 8]  # and a line where a part ended
    key = next(k for k in logs[0][-1] if k.endswith(("/loss", "/fake")))
    assert logs[0][-1][key] == logs[1][-1][key]


def test_resume_in_the_middle_of_a_warm_up(tmp_path: Path) -> None:
    run("pairs", config(train={"max_steps": 2}), tmp_path / "whole")
    trainer = Trainer(METHODS["pairs"](), config(train={"max_steps": 2}), tmp_path / "parts")
    trainer.logger = _Silent()  # type: ignore[assignment]
    for _ in range(2):
        trainer._iterate()
    trainer.save()
    assert load_checkpoint(tmp_path / "parts").step == 0
    resumed, _ = run("pairs", config(train={"max_steps": 2}), tmp_path / "parts", resume="auto")
    assert resumed.resumed_from is not None
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


class _Silent:
    def say(self, text: str) -> None: ...


def test_lines_after_the_last_checkpoint_are_not_repeated(tmp_path: Path) -> None:
    run("fenerf", config(train={"max_steps": 4}), tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:  # a run that was killed after its last checkpoint
        file.write(json.dumps({"step": 6}) + "\n" + '{"step": 8, "lo')
    run("fenerf", config(train={"max_steps": 6}), tmp_path, resume="auto")
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


def test_checkpoint_cadence_and_what_is_kept(tmp_path: Path) -> None:
    keep = {"every": 1, "keep_last": 2, "keep_every": 3}
    run("fenerf", config(train={"max_steps": 7}, checkpoint=keep), tmp_path)
    assert [int(p.name) for p in list_checkpoints(tmp_path)] == [3, 6, 7]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "00000007"
    meta = load_checkpoint(tmp_path).meta
    assert (meta["method"], meta["stage"], meta["step"], meta["images"]) == ("fenerf_double", "main", 7, 56)
    assert set(load_checkpoint(tmp_path).weights) == {"generator", "d_image", "d_label", "ema", "ema2"}


def test_resume_auto_without_a_checkpoint_starts(tmp_path: Path) -> None:
    trainer, result = run("fenerf", config(), tmp_path, resume="auto")
    assert trainer.resumed_from is None and result.step == 6


def test_torchrun_restart_means_resume(tmp_path: Path) -> None:
    run("fenerf", config(train={"max_steps": 3}), tmp_path)
    trainer, _ = run("fenerf", config(train={"max_steps": 4}), tmp_path, distributed=Distributed(restarts=1))
    assert trainer.resumed_from is not None


def refusal(tmp_path: Path, staged: StagedConfig, method=Fenerf, **options) -> str:
    with pytest.raises(UserError) as caught:
        Trainer(method(), staged, tmp_path, **{"resume": "auto", **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_resume_refuses(tmp_path: Path) -> None:
    run("fenerf", config(train={"max_steps": 3}), tmp_path)
    assert "holds a run that reached step 3: go on with --resume auto" in refusal(tmp_path, config(), resume=None)
    text = refusal(tmp_path, config(generator_lr=0.5))
    assert "generator_lr was 0.01, now 0.5" in text and "--allow-config-change" in text
    text = refusal(tmp_path, config([{"from_step": 0}, {"from_step": 9, "r1": 1.0}]))
    assert "stages was" in text
    assert "method 'fenerf_double', this run is 'eg3d_double'" in refusal(tmp_path, config(), Eg3d)
    assert "no checkpoint at" in refusal(tmp_path, config(), resume=str(tmp_path / "elsewhere"))
    shard = next((tmp_path / "checkpoints" / "00000003").glob("generator*.safetensors"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert "is damaged" in refusal(tmp_path, config())


def test_what_a_resume_may_change(tmp_path: Path) -> None:
    run("fenerf", config(train={"max_steps": 3}), tmp_path)
    harmless = config(train={"max_steps": 4, "workers": 1}, log={"every": 1}, checkpoint={"keep_last": 1})
    assert run("fenerf", harmless, tmp_path, resume="auto")[1].step == 4
    changed = config(train={"max_steps": 5}, generator_lr=0.5)
    trainer, _ = run("fenerf", changed, tmp_path, resume="auto", allow_config_change=True)
    rates = {g["prefix"]: g["lr"] for g in trainer.optimizers["generator"].adam.param_groups}
    assert rates == {"": 0.5, "generator.mapping": 0.025}
    allowed = Trainer(Fenerf(), config(r1=3.0, generator_lr=0.5), tmp_path, resume="auto", resume_may_change=("r1",))
    assert allowed.position.step == 5


def test_another_number_of_processes_keeps_the_batch_or_is_refused(tmp_path: Path) -> None:
    per_gpu = config(train={"max_steps": 2, "batch_size": None, "batch_per_gpu": 6})
    run("fenerf", per_gpu, tmp_path)
    three = Trainer(Fenerf(), per_gpu, tmp_path, _Pretended(world=3), resume="auto")
    assert three.batch_size == 6
    text = refusal(tmp_path, per_gpu, distributed=_Pretended(world=4))
    assert "a batch of 6 in chunks of 2 cannot be shared by 4 processes: expected a multiple of 8" in text


class _Pretended(Distributed):
    """Several processes for set-up code, alone."""

    def gather(self, value):
        return [value]

    def broadcast(self, value):
        return value


KILLED_IN_A_SAVE = """
import os, signal, sys
from pathlib import Path
from facelab.checkpoints import tensor_files
from tests.training.training_doubles import config, run

written, target = 0, int(sys.argv[2])
write_file = tensor_files.write_file

def write_and_die(path, chunks):
    global written
    result = write_file(path, chunks)
    written += 1
    if written == target:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

tensor_files.write_file = write_and_die
run("fenerf", config(train={"max_steps": 6}, checkpoint={"every": 2}), Path(sys.argv[1]))
"""


def test_kill_9_in_the_middle_of_a_save_loses_that_save_only(tmp_path: Path) -> None:
    staged = config(train={"max_steps": 6}, checkpoint={"every": 2})
    run("fenerf", staged, tmp_path / "whole")
    files = len(list((tmp_path / "whole" / "checkpoints" / "00000006").iterdir()))
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_IN_A_SAVE, str(killed), str(files + files // 2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    assert [p.name for p in list_checkpoints(killed)] == ["00000002"]
    assert any(p.name.startswith(".00000004") for p in (killed / "checkpoints").iterdir())
    trainer, result = run("fenerf", staged, killed, resume="auto")
    assert trainer.resumed_from is not None and trainer.resumed_from.name == "00000002" and result.step == 6
    assert_same_run(tmp_path / "whole", killed)
    assert not any(p.name.startswith(".") for p in (killed / "checkpoints").iterdir())


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path: Path, monkeypatch) -> None:
    from facelab.checkpoints import tensor_files

    run("fenerf", config(train={"max_steps": 2}), tmp_path)

    def full(path, chunks):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "write_file", full)
    with pytest.raises(UserError, match="the disk is full"):
        run("fenerf", config(train={"max_steps": 3}), tmp_path, resume="auto")
    monkeypatch.undo()
    assert run("fenerf", config(train={"max_steps": 3}), tmp_path, resume="auto")[1].step == 3


def test_a_file_where_the_run_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        Trainer(Fenerf(), config(), tmp_path / "file" / "run")
