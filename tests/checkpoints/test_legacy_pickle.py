# SPDX-License-Identifier: Apache-2.0
"""Foreign pickles: the released layout is read, everything hostile is refused at once and nothing runs."""

from __future__ import annotations

import json
import os
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from facelab.checkpoints import legacy_modules as modules
from facelab.checkpoints.legacy_pickle import LegacyObject, read_pickle_checkpoint
from facelab.checkpoints.legacy_storages import Budget
from facelab.checkpoints.pickle_machine import MAX_OPERATIONS
from facelab.errors import UserError
from tests.checkpoints.pickle_makers import Call, blob, dump, embedded

GOLDEN = Path(os.environ.get("FACELAB_GOLDEN_DIR", Path(__file__).parents[2] / "test_data" / "golden"))
SNAPSHOT = GOLDEN / "eg3d" / "snapshot_tiny.pkl"


@pytest.mark.parametrize("method", ["pigan", "fenerf"])
def test_released_layout_generator_and_average(method: str) -> None:
    """A whole pickled module and a whole pickled average become state dicts under the original names."""
    case = GOLDEN / method / "checkpoint_fixture"
    config = json.loads(case.with_suffix(".json").read_text())["config"]
    generator = read_pickle_checkpoint(f"{case}_generator.pth")
    average = modules.find_average(read_pickle_checkpoint(f"{case}_ema.pth"))
    assert isinstance(generator, LegacyObject) and generator.class_path == config["original_classes"][0]
    assert modules.module_classes(generator)["siren"] == config["original_classes"][1]
    found = modules.attributes(generator)
    assert (found["step"], found["epoch"]) == (config["step"], config["epoch"])
    assert (
        average is not None
        and average.decay == config["ema_decay"]
        and average.num_updates == config["ema_num_updates"]
    )
    named = modules.zip_ema(modules.trainable_state(generator), average.shadow_params)
    with np.load(case.with_suffix(".npz"), allow_pickle=False) as arrays:
        expected = {k.removeprefix("ema_state/"): arrays[k] for k in arrays.files if k.startswith("ema_state/")}
    assert expected and set(named) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(named[name].numpy(), array, rtol=1e-6, atol=1e-7)
    state = modules.module_state(generator)
    assert list(state) == list(named) and all(not t.requires_grad and t.device.type == "cpu" for t in state.values())


def test_average_of_another_model_is_refused() -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    with pytest.raises(UserError, match="expected 2 tensors, got 1"):
        modules.zip_ema(state, [torch.zeros(2, 3)])
    with pytest.raises(UserError, match=r"tensor 1 is 'b' of shape \(4,\), got \(5,\)"):
        modules.zip_ema(state, [torch.zeros(2, 3), torch.zeros(5)])


def _network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), act=nn.LeakyReLU(0.2), head=nn.Linear(4, 2))
    )
    net.norm.bias.requires_grad_(False)
    net.tied = net.head
    net.register_buffer("kept", torch.ones(2))
    net.register_buffer("dropped", torch.ones(2), persistent=False)
    net.step = 17
    return net


@pytest.mark.parametrize("zipped", [True, False])
def test_whole_module_in_both_torch_formats(tmp_path: Path, zipped: bool) -> None:
    net = _network()
    torch.save(net, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    record = read_pickle_checkpoint(tmp_path / "net.pth")
    state, expected = modules.module_state(record), net.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[k], v) and state[k].dtype == v.dtype for k, v in expected.items())
    trainable = [name for name, p in net.named_parameters() if p.requires_grad]
    assert list(modules.trainable_state(record)) == trainable
    assert modules.attributes(record)["step"] == 17
    assert set(modules.module_state(record, buffers=False)) == {
        k for k, _ in net.named_parameters(remove_duplicate=False)
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts_optimiser_and_every_dtype(tmp_path: Path, zipped: bool) -> None:
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    base = torch.arange(24.0)
    dtypes = [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    ]
    tree = {
        "g_ema": net.state_dict(),
        "opt": optimizer.state_dict(),
        "views": [base[2:8].view(2, 3), base.view(4, 6).t(), base[:1].expand(50), torch.zeros(0, 3), torch.tensor(5)],
        "dtypes": [torch.ones(3, dtype=d) for d in dtypes] + [torch.tensor([True, False])],
        "numbers": [1, -5, 2**40, 1.5, None, True, "text", b"bytes", (1, 2)],
        "numpy": np.float64(0.25),
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
    }
    torch.save(tree, tmp_path / "all.pt", _use_new_zipfile_serialization=zipped)
    read = read_pickle_checkpoint(tmp_path / "all.pt")
    for ours, theirs in zip(read["views"] + read["dtypes"], tree["views"] + tree["dtypes"], strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert read["numbers"] == tree["numbers"] and read["numpy"] == 0.25 and read["size"] == (2, 3)
    assert read["dtype"] is torch.float16
    assert torch.equal(read["opt"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    found = modules.find_state_dicts(read)
    assert list(found) == ["g_ema"] and list(found["g_ema"]) == ["weight", "bias"]


def _rewritten(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """Apply ``change`` to data.pkl of a torch zip file."""
    target = path.with_name("changed.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, change(data) if info.filename.endswith("data.pkl") else data)
    return target


def test_cuda_storages_come_to_the_cpu(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(3.0)}, tmp_path / "a.pth")
    path = _rewritten(tmp_path / "a.pth", lambda data: data.replace(b"\x03\x00\x00\x00cpu", b"\x06\x00\x00\x00cuda:1"))
    assert b"cuda:1" in path.read_bytes()
    assert torch.equal(read_pickle_checkpoint(path)["w"], torch.arange(3.0))


def test_pickles_with_embedded_source(tmp_path: Path) -> None:
    """The layout of one pickled dictionary: source text beside each module, one torch stream in each tensor."""
    storage = Call("torch.storage", "_load_from_bytes", blob(torch.arange(6.0)))
    weight = Call(
        "torch._utils", "_rebuild_tensor_v2", storage, 0, (2, 3), (3, 1), False, Call("collections", "OrderedDict")
    )
    layer = embedded("Layer", {"_parameters": {"weight": weight}, "_buffers": {}, "_modules": {}, "gain": 2})
    gain = Call("numpy.core.multiarray", "scalar", Call("numpy", "dtype", "f8", False, True), struct.pack("<d", 0.5))
    root = {"_parameters": {}, "_buffers": {}, "_modules": {"fc": layer}, "gain": gain, "z_dim": 512}
    (tmp_path / "net.pkl").write_bytes(dump({"G_ema": embedded("Root", root), "D": None}))
    record = read_pickle_checkpoint(tmp_path / "net.pkl")["G_ema"]
    assert record.class_name == "Root" and modules.attributes(record) == {"gain": 0.5, "z_dim": 512}
    assert torch.equal(modules.module_state(record)["fc.weight"], torch.arange(6.0).view(2, 3))


_OUT = b"torch\nFloatStorage\n"


def _tensor(size: tuple, stride: tuple, offset: int = 0) -> bytes:
    storage = Call("torch.storage", "_load_from_bytes", blob(torch.arange(6.0)))
    return dump(Call("torch._utils", "_rebuild_tensor_v2", storage, offset, size, stride, False, None))


def _nested_tuples(depth: int) -> bytes:
    return b"\x80\x02)" + b"2\x86" * depth  # each level is (x, x): hashing or printing it takes 2**depth steps


def _module_cycle(fan_out: int) -> bytes:
    """A module that holds itself."""
    head = b"\x80\x02ctorch.nn.modules.container\nSequential\n)\x81q\x00}q\x01(X\x0b\x00\x00\x00_parameters}"
    head += b"X\x08\x00\x00\x00_modules}("
    return head + b"".join(b"X\x01\x00\x00\x00%dh\x00" % i for i in range(fan_out)) + b"uub."


HOSTILE = {
    "os.system, protocol 0": (b"cos\nsystem\n(S'touch PWNED'\ntR.", "os.system"),
    "os.system, protocol 4": (dump({"a": Call("os", "system", "touch PWNED")}), "os.system"),
    "posix.system as an object": (b"(S'touch PWNED'\niposix\nsystem\n.", "posix.system"),
    "eval": (dump([Call("builtins", "eval", "open('PWNED','w')")]), "builtins.eval"),
    "python 2 eval": (dump([Call("__builtin__", "eval", "1")]), "builtins.eval"),
    "getattr chain": (dump(Call("builtins", "getattr", Call("torch", "load"), "x")), "builtins.getattr"),
    "torch.load inside": (dump(Call("torch", "load", "x")), "torch.load"),
    "functools.partial inside an allowed call": (
        dump(Call("collections", "OrderedDict", [("a", Call("functools", "partial", 1))])),
        "functools.partial",
    ),
    "allowed class as a function": (dump(Call("torch.nn.modules.linear", "Linear", 10**9, 10**9)), "Linear"),
    "nested stream": (
        dump(Call("torch.storage", "_load_from_bytes", dump(Call("os", "system", "touch PWNED")))),
        "os.system",
    ),
    "numpy object array": (dump(Call("numpy.core.multiarray", "_reconstruct", 1)), "_reconstruct"),
    "numpy object dtype": (dump(Call("numpy", "dtype", "O8", False, True)), "plain number"),
    "dotted name": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
    "claimed 8 EiB of bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.", "cut off"),
    "claimed 4 GiB of text": (b"\x80\x02X\xff\xff\xff\xffx.", "cut off"),
    "memo bomb": (b"\x80\x02Nr\xff\xff\xff\xff" * 3 + b".", None),
    "huge integer": (b"\x80\x02\x8b\xff\xff\xff\x00" + b"\xff" * 1000, "integer"),
    "long decimal": (b"(I" + b"9" * 60000 + b"\n.", "digits"),
    "tuple as key": (b"\x80\x02}" + _nested_tuples(60)[2:] + b"Ns.", "dictionary key"),
    "tuple in a set": (b"\x80\x04\x8f(" + _nested_tuples(60)[2:] + b"\x90.", "dictionary key"),
    "colliding integers": (b"\x80\x02}\x8a\x09" + b"\xff" * 8 + b"\x00Ns.", "dictionary key"),
    "100000 nested lists": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "nested deeper"),
    "100000 marks": (b"\x80\x02" + b"(" * 100_000 + b".", "nested deeper"),
    "doubling tuples": (_nested_tuples(5000) + b".", "nested deeper"),
    "3000000 nested tuples": (b"\x80\x02)" + b"\x85" * 3_000_000 + b".", "more than 1000000 pickle operations"),
    "1500000 doubling tuples": (_nested_tuples(1_500_000) + b".", "more than 1000000 pickle operations"),
    "600000 tuples side by side": (b"\x80\x02(" + b"N\x85" * 600_000 + b"t.", "more than 1000000 pickle operations"),
    "600000 sets side by side": (b"\x80\x04(" + b"\x8f" * 600_000 + b"t.", "more than 1000000 pickle operations"),
    "view outside": (_tensor((7,), (1,)), "outside its storage"),
    "view outside by stride": (_tensor((2, 2), (5, 1)), "outside its storage"),
    "negative stride": (_tensor((2,), (-1,), 3), "unusual sizes"),
    "negative offset": (_tensor((2,), (1,), -4), "unusual sizes"),
    "expanded to 4 TiB": (_tensor((1 << 40,), (0,)), "far more numbers"),
    "claimed storage": (
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.\x80\x02(X\x07\x00\x00\x00storagec"
        + _OUT
        + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu\x8a\x06\x00\x00\x00\x00\x00\x01tQ.",
        "more than the file holds",
    ),
    "other magic": (b"\x80\x02\x8a\x05abcde.", "magic number"),
    "persistent id as text": (b"(P1\n.", "opcode"),
    "extension registry": (b"\x80\x02\x82\x01.", "opcode"),
    "web page": (b"<!DOCTYPE html><html>Google Drive - virus scan warning", "web page"),
    "picture": (b"\x89PNG\r\n\x1a\n" + b"0" * 99, "begins with"),
    "empty": (b"", "empty"),
    "no opcode": (b"\x80\x02\xff.", "opcode"),
    "future protocol": (b"\x80\x09N.", "protocol"),
    "state of a number": (b"\x80\x02K\x01}b.", "sets the state"),
    "same list copied again and again": (
        b"\x80\x02](" + b"K\x01" * 20000 + b"e\x85q\x00" + b"c__builtin__\nset\nh\x00R0" * 20000 + b"N.",
        "again and again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_within_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    data, words = HOSTILE[name]
    path = tmp_path / "hostile.pth"
    path.write_bytes(data)
    monkeypatch.chdir(tmp_path)
    start = time.thread_time()
    if words is None:  # harmless here: an index costs nothing
        assert read_pickle_checkpoint(path) is None
    else:
        with pytest.raises(UserError, match=words) as caught:
            read_pickle_checkpoint(path)
        assert "\n" not in str(caught.value) and "hostile.pth" in str(caught.value) and len(str(caught.value)) < 500
    assert time.thread_time() - start < 1
    assert os.listdir(tmp_path) == ["hostile.pth"]


def test_a_network_pickle_stays_far_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot of G, D and G_ema as the original classes wrote it."""
    budgets: list[Budget] = []

    def noted(**values: int) -> Budget:
        budgets.append(Budget(**values))
        return budgets[-1]

    monkeypatch.setattr("facelab.checkpoints.legacy_pickle.Budget", noted)
    read_pickle_checkpoint(SNAPSHOT)
    (budget,) = budgets
    assert 50_000 < MAX_OPERATIONS - budget.operations.left < MAX_OPERATIONS / 5


def test_hostile_pickle_inside_a_torch_file(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pth")
    path = _rewritten(tmp_path / "a.pth", lambda data: b"cos\nsystem\n(S'touch PWNED'\ntR.")
    with pytest.raises(UserError, match=r"changed\.pth .*'os\.system'"):
        read_pickle_checkpoint(path)


def test_compressed_and_claimed_entries_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(300)}, tmp_path / "a.pth")
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(UserError, match="compressed"):
        read_pickle_checkpoint(path)
    larger = _rewritten(tmp_path / "a.pth", lambda data: data.replace(struct.pack("<H", 300), struct.pack("<H", 60000)))
    with pytest.raises(UserError, match="should hold 240000 bytes, got 1200"):
        read_pickle_checkpoint(larger)
    with zipfile.ZipFile(path, "w") as new:
        new.writestr("readme.txt", "no checkpoint")
    with pytest.raises(UserError, match="unpack it first"):
        read_pickle_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_files_at_every_length(tmp_path: Path, zipped: bool) -> None:
    """No prefix of a file is taken for a whole one, and none gives anything but one line."""
    torch.save(_network().state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "a.pth").read_bytes()
    path = tmp_path / "cut.pth"
    for length in [*range(200), *range(200, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cut\.pth") as caught:
            read_pickle_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    torch.save(_network(), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pth").read_bytes()
    numbers = np.random.default_rng(0)
    path = tmp_path / "b.pth"
    for _ in range(300):
        changed = bytearray(data)
        for place in numbers.integers(0, len(data), 3):
            changed[place] = numbers.integers(256)
        path.write_bytes(bytes(changed))
        try:
            read_pickle_checkpoint(path)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("fan_out", [1, 2])
def test_modules_that_contain_themselves(tmp_path: Path, fan_out: int) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(_module_cycle(fan_out))
    with pytest.raises(UserError, match="contains itself"):
        modules.module_state(read_pickle_checkpoint(path))


def test_archives_with_endless_lists_of_contents(tmp_path: Path) -> None:
    path = tmp_path / "many.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        for number in range(40_000):
            archive.writestr(f"a/data/{number}", b"")
    start = time.thread_time()
    with pytest.raises(UserError, match="lists its contents in"):
        read_pickle_checkpoint(path)
    assert time.thread_time() - start < 1


def test_modules_that_unfold_without_end() -> None:
    record = LegacyObject("torch.nn.Linear", {"_parameters": {}, "_modules": {}})
    for _ in range(50):
        record = LegacyObject("torch.nn.Sequential", {"_parameters": {}, "_modules": {"a": record, "b": record}})
    start = time.thread_time()
    with pytest.raises(UserError, match="unfolds"):
        modules.module_state(record)
    assert time.thread_time() - start < 1


def test_missing_file_and_extra_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_pickle_checkpoint(tmp_path / "nothing.pth")
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x02cmodels.encoder\nNet\n)\x81}X\x01\x00\x00\x00aK\x07sb.")
    with pytest.raises(UserError, match=r"models\.encoder\.Net"):
        read_pickle_checkpoint(path)
    assert read_pickle_checkpoint(path, extra_classes=["models.encoder.*"]).state == {"a": 7}


def test_names_from_a_file_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    name = "\x1b[2Jos\nline two"
    path.write_bytes(b"\x80\x04\x8c" + bytes([len(name)]) + name.encode() + b"\x8c\x01x\x93.")
    with pytest.raises(UserError) as caught:
        read_pickle_checkpoint(path)
    assert str(caught.value).isprintable()


def test_damaged_archives_never_escape(tmp_path: Path) -> None:
    torch.save(_network(), tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    numbers = np.random.default_rng(1)
    path, refused = tmp_path / "b.pth", 0
    for _ in range(200):
        changed = bytearray(data)
        for place in len(data) - 1 - numbers.integers(0, 1500, 4):  # the directory lies at the end
            changed[place] = numbers.integers(256)
        path.write_bytes(bytes(changed))
        try:
            read_pickle_checkpoint(path)
        except UserError as error:
            assert str(error).isprintable()
            refused += 1
    assert refused > 100
