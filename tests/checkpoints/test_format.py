# SPDX-License-Identifier: Apache-2.0
"""The checkpoint format: exact, whole or not at all, and clear about damage."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from facelab.checkpoints import format as fmt
from facelab.checkpoints import tensor_files
from facelab.errors import UserError


def _weights(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "generator": {"a.weight": torch.full((3, 4), value), "a.bias": torch.arange(4.0), "count": torch.tensor(7)},
        "discriminator_img": {"w": torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).half()},
    }


def _same(a: object, b: object) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) and type(k) is type(j) for k, j in zip(a, b, strict=True))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return a == b


def test_weights_state_and_meta_come_back_exactly(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-5, betas=(0.0, 0.9))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "optimizer": {"generator": optimizer.state_dict()},
        "rng": {"torch": torch.Generator().manual_seed(3).get_state(), "python": random.Random(5).getstate()},
        "numpy": np.random.default_rng(4).bit_generator.state,
        "arrays": [np.arange(6, dtype=">i2").reshape(2, 3), np.float32(0.1), np.int64(-3)],
        "numbers": [1, 2**80, -0.0, 0.1, 1e-320, math.inf, -math.inf, math.nan, True, None],
        "odd keys": {1: "one", None: 2, "$tuple": 3, False: 4},
        "text": "Zürich\n\u2028",
        "bytes": b"\x00\xff",
        "tuple": (1, (2, [3, ()]), {}),
        "dtypes": [
            torch.zeros(2, dtype=d) for d in (torch.bfloat16, torch.bool, torch.uint8, torch.int64, torch.float64)
        ],
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "strided": torch.arange(12.0).reshape(3, 4).t(),
        "types": [torch.float16, torch.device("cuda:1")],
    }
    meta = {"method": "fenerf", "step": 12, "images": 288, "config": {"lr": 6e-5, "stages": [1, 2]}, "deviations": []}
    folder = fmt.save_checkpoint(fmt.checkpoint_folder(tmp_path, 12), _weights(), state, meta)
    loaded = fmt.load_checkpoint(folder)
    assert _same(loaded.state, state)
    assert loaded.meta == meta and loaded.step == 12 and loaded.path == folder
    expected = _weights()
    assert set(loaded.weights) == set(expected)
    for group, tensors in expected.items():
        assert set(loaded.weights[group]) == set(tensors)
        assert all(_same(loaded.weights[group][name], tensor) for name, tensor in tensors.items())
    restored = torch.optim.Adam(model.parameters(), lr=1.0)
    restored.load_state_dict(loaded.state["optimizer"]["generator"])
    assert restored.param_groups[0]["betas"] == (0.0, 0.9) and type(restored.param_groups[0]["betas"]) is tuple
    torch.Generator().set_state(loaded.state["rng"]["torch"])
    random.Random().setstate(loaded.state["rng"]["python"])


def test_tied_and_expanded_tensors_are_stored_by_value(tmp_path: Path) -> None:
    base = torch.arange(4.0)
    weights = {"generator": {"a": base, "b": base, "c": base[1:3], "d": base[:1].expand(1000)}}
    loaded = fmt.load_checkpoint(fmt.save_checkpoint(tmp_path / "00000001", weights))
    assert all(torch.equal(loaded.weights["generator"][k], v) for k, v in weights["generator"].items())


def test_shards_stay_below_the_limit_and_join_again(tmp_path: Path) -> None:
    limit = 0.05  # MiB
    numbers = torch.Generator().manual_seed(0)
    state = {
        "moments": {i: torch.randn(60, 50, generator=numbers) for i in range(8)},
        "big": torch.randn(333, 101, generator=numbers),
    }
    weights = {"generator": {"grid": torch.randn(1, 4, 25, 25, 25, generator=numbers), "w": torch.ones(3)}}
    folder = fmt.save_checkpoint(tmp_path / "00000002", weights, state, max_shard_mb=limit)
    sizes = {p.name: p.stat().st_size for p in folder.glob("*.safetensors")}
    assert max(sizes.values()) <= limit * 2**20, sizes
    assert sum(name.startswith("state-") for name in sizes) >= 4
    loaded = fmt.load_checkpoint(folder)
    assert _same(loaded.state, state)
    assert torch.equal(loaded.weights["generator"]["grid"], weights["generator"]["grid"])


def test_files_are_ordinary_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = fmt.save_checkpoint(tmp_path / "00000003", _weights())
    assert torch.equal(load_file(folder / "generator.safetensors")["a.bias"], torch.arange(4.0))


def test_a_run_its_checkpoints_and_a_folder_all_open(tmp_path: Path) -> None:
    for step in (5, 10):
        fmt.save_checkpoint(fmt.checkpoint_folder(tmp_path, step), _weights(step), {"step": step}, {"step": step})
    for path in (
        tmp_path,
        tmp_path / "checkpoints",
        tmp_path / "checkpoints/00000010",
        tmp_path / "checkpoints/00000010/checkpoint.json",
    ):
        assert fmt.load_checkpoint(path).step == 10
    assert fmt.load_checkpoint(tmp_path / "checkpoints/00000005").state == {"step": 5}
    light = fmt.load_checkpoint(tmp_path, with_state=False, groups=("generator",))
    assert light.state is None and set(light.weights) == {"generator"}
    with pytest.raises(UserError, match="Did you mean 'generator'"):
        fmt.load_checkpoint(tmp_path, groups=("generater",))


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("a1", "a1.safetensors"), ("a2", "a2_run"), ("b.pk", "b.pkl"), ("notes", None)],
)
def test_a_path_that_is_not_there_is_told_the_nearest_model(asked: str, meant: str | None, tmp_path: Path) -> None:
    for name in ("a1.md", "a1.json", "a1.safetensors", "a2.md", "b.pkl", "notes.md"):
        (tmp_path / name).touch()
    (tmp_path / "a2_run").mkdir()
    with pytest.raises(UserError, match="no checkpoint at") as caught:
        fmt.find_checkpoint(tmp_path / asked)
    assert str(caught.value).partition(" Did you mean ")[2] == (f"{meant!r}?" if meant else "")


def test_pointer_to_nothing_falls_back_with_a_warning(tmp_path: Path) -> None:
    fmt.save_checkpoint(fmt.checkpoint_folder(tmp_path, 5), _weights(), meta={"step": 5})
    (tmp_path / "checkpoints/latest").write_text("00000099\n")
    with pytest.warns(UserWarning, match="00000099"):
        assert fmt.load_checkpoint(tmp_path).step == 5
    (tmp_path / "checkpoints/latest").unlink()
    assert fmt.load_checkpoint(tmp_path).step == 5


def test_single_file_model(tmp_path: Path) -> None:
    meta = {"method": "fenerf", "config": {"hidden": 64}, "deviations": ["flip"], "card": {"steps": 3}}
    path = fmt.export_model(tmp_path / "tiny.safetensors", _weights(0.1), meta, dtype=torch.float16)
    model = fmt.load_model(path)
    assert model.meta == meta and model.state is None
    assert model.weights["generator"]["a.weight"].dtype == torch.float16
    assert model.weights["generator"]["count"].dtype == torch.int64
    assert fmt.load_model(path, dtype=torch.float32).weights["generator"]["a.weight"].dtype == torch.float32
    assert fmt.load_checkpoint(path).meta["method"] == "fenerf"
    with pytest.raises(UserError, match=r"huge.*finite"):
        fmt.export_model(
            tmp_path / "b.safetensors", {"generator": {"huge": torch.full((2,), 1e6)}}, dtype=torch.float16
        )
    assert not (tmp_path / "b.safetensors").exists()


def test_prune_keeps_last_every_and_latest(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50, 60):
        fmt.save_checkpoint(fmt.checkpoint_folder(tmp_path, step), {"g": {"w": torch.ones(1)}})
    (tmp_path / "checkpoints/latest").write_text("00000010")
    deleted = fmt.prune(tmp_path, keep_last=2, keep_every=20)
    assert [p.name for p in deleted] == ["00000030"]
    assert [int(p.name) for p in fmt.list_checkpoints(tmp_path)] == [10, 20, 40, 50, 60]
    fmt.prune(tmp_path, keep_last=1)
    assert [int(p.name) for p in fmt.list_checkpoints(tmp_path)] == [10, 60]
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    weights = _weights()
    weights["generator"]["a.bias"][2] = bad
    with pytest.raises(UserError, match=r"generator\.a\.bias.*1 of 4"):
        fmt.save_checkpoint(tmp_path / "00000001", weights)
    with pytest.raises(UserError, match=r"state\.moments"):
        fmt.save_checkpoint(tmp_path / "00000001", _weights(), {"moments": torch.tensor([1.0, bad])})
    assert not (tmp_path / "00000001").exists()
    fmt.save_checkpoint(tmp_path / "00000001", weights, check_finite=False)


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"state\.opt\[1\].*Linear"):
        fmt.save_checkpoint(tmp_path / "00000001", {}, {"opt": [1, torch.nn.Linear(1, 1)]})
    with pytest.raises(ValueError, match="after the step"):
        fmt.save_checkpoint(tmp_path / "best", {})
    with pytest.raises(ValueError, match="weight group"):
        fmt.save_checkpoint(tmp_path / "00000001", {"../x": {}})


def _damage_index(folder: Path) -> None:
    (folder / "checkpoint.json").write_text("{")


def _truncate(folder: Path) -> None:
    path = folder / "generator.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_bit(folder: Path) -> None:
    path = folder / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _newer(folder: Path) -> None:
    index = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**index, "format_version": 99}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, r"generator\.safetensors is damaged: expected \d+ bytes, got \d+; use an earlier"),
        (lambda f: (f / "state.json").unlink(), r"state\.json is missing: expected \d+ bytes, got no file"),
        (_flip_a_bit, r"state\.safetensors is damaged: expected CRC-32"),
        (_damage_index, r"checkpoint\.json is damaged"),
        (_newer, "expected checkpoint format 1, got 99"),
    ],
)
def test_damage_gives_one_line(tmp_path: Path, damage: object, words: str) -> None:
    folder = fmt.save_checkpoint(tmp_path / "00000001", _weights(), {"m": torch.ones(9)})
    damage(folder)
    with pytest.raises(UserError, match=words) as caught:
        fmt.load_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_model_cut_in_half_and_other_files(tmp_path: Path) -> None:
    path = fmt.export_model(tmp_path / "m.safetensors", _weights())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"expected \d+ bytes, got \d+"):
        fmt.load_model(path)
    path.write_bytes(b"\x89PNG not a model")
    with pytest.raises(UserError, match="expected a safetensors file"):
        fmt.load_checkpoint(path)
    tensor_files.write_file(path, tensor_files.safetensors_chunks({"w": torch.ones(1)}))
    with pytest.raises(UserError, match="convert_checkpoint"):
        fmt.load_model(path)
    with pytest.raises(UserError, match="no checkpoint"):
        fmt.load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="or train first"):
        fmt.load_checkpoint(tmp_path)


def test_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt.save_checkpoint(fmt.checkpoint_folder(tmp_path, 1), _weights(1), meta={"step": 1})
    written = tensor_files.write_file

    def full(path: Path, chunks: object) -> tuple[int, int]:
        if path.name.startswith("state"):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(path, chunks)

    monkeypatch.setattr(tensor_files, "write_file", full)
    with pytest.raises(UserError, match="00000002: the disk is full") as caught:
        fmt.save_checkpoint(fmt.checkpoint_folder(tmp_path, 2), _weights(2), meta={"step": 2})
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000001", "latest"]
    assert fmt.load_checkpoint(tmp_path).step == 1
    monkeypatch.setattr(tensor_files, "write_file", lambda path, chunks: full(path.with_name("state"), chunks))
    with pytest.raises(UserError, match="disk is full"):
        fmt.export_model(tmp_path / "m.safetensors", _weights())


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        fmt.save_checkpoint(fmt.checkpoint_folder(tmp_path, 1), _weights())


_KILLED = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from facelab.checkpoints import format as fmt, tensor_files
    where, run = sys.argv[1], Path(sys.argv[2])
    die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
    if where == "in a file":
        def write(path, chunks, real=tensor_files.write_file):
            return die() if path.name.startswith("state") else real(path, chunks)
        tensor_files.write_file = write
    elif where == "before the rename":
        fmt._put_in_place = die
    elif where == "between the renames":
        real_rename, calls = os.rename, []
        def rename(a, b):
            calls.append(a)
            return die() if len(calls) == 2 else real_rename(a, b)
        os.rename = rename
    elif where == "before the pointer":
        fmt.atomic_write = die
    step = 1 if where == "between the renames" else 2
    weights = {"g": {"w": torch.full((9,), 2.0)}}
    fmt.save_checkpoint(fmt.checkpoint_folder(run, step), weights, {"s": torch.ones(4)}, {"step": step})
"""


@pytest.mark.parametrize("where", ["in a file", "before the rename", "between the renames", "before the pointer"])
def test_kill_9_in_the_middle_of_a_save(tmp_path: Path, where: str) -> None:
    fmt.save_checkpoint(fmt.checkpoint_folder(tmp_path, 1), {"g": {"w": torch.ones(9)}}, {"s": 1}, {"step": 1})
    root = str(Path(fmt.__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_KILLED), where, str(tmp_path)],
        env=environment,
        capture_output=True,
        timeout=60,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    survived = fmt.load_checkpoint(tmp_path)
    assert survived.step == 1 and survived.state == {"s": 1} and torch.equal(survived.weights["g"]["w"], torch.ones(9))
    assert fmt.load_checkpoint(tmp_path / "checkpoints/00000001").step == 1
    fmt.save_checkpoint(fmt.checkpoint_folder(tmp_path, 3), {"g": {"w": torch.ones(9)}}, None, {"step": 3})
    assert not [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]
    assert fmt.load_checkpoint(tmp_path).step == 3
    assert fmt.load_checkpoint(tmp_path / "checkpoints/00000001").step == 1
