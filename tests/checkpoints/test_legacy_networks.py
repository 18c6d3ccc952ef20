# SPDX-License-Identifier: Apache-2.0
"""Network pickles with embedded source text: tensors and settings come out, the text is neither run nor kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from facelab.checkpoints.legacy_networks import plain_settings, read_network_pickle
from facelab.checkpoints.legacy_pickle import read_pickle_checkpoint
from facelab.errors import UserError
from tests.checkpoints.pickle_makers import (
    NAMED_MODULES,
    TRAP,
    Call,
    blob,
    dump,
    embedded,
    lay_traps,
    small_network_pickle,
    tensor_call,
)

GOLDEN = Path(os.environ.get("FACELAB_GOLDEN_DIR", Path(__file__).parents[2] / "test_data" / "golden"))
EMPTY = {"_parameters": {}, "_buffers": {}, "_modules": {}}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_networks_settings_and_source_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    """Everything is read, with traps laid under every module name that the file mentions."""
    (tmp_path / "net.pkl").write_bytes(small_network_pickle(protocol))
    assert TRAP.encode() in (tmp_path / "net.pkl").read_bytes()
    lay_traps(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    found = read_network_pickle("net.pkl")
    assert not (tmp_path / "PWNED").exists() and not {m.split(".")[0] for m in NAMED_MODULES} & (
        set(sys.modules) - before
    )
    generator = found.networks["G_ema"]
    assert list(found.networks) == ["G", "D", "G_ema"] and generator.class_name == "TriPlaneGenerator"
    shapes = {key: tuple(t.shape) for key, t in generator.state.items()}
    assert shapes == {
        "dataset_label_std": (25,), "b4.conv1.weight": (2, 2, 3, 3), "b4.conv1.noise_const": (4, 4), "mapping.w_avg": (4,),
    }  # fmt: skip
    numbers = torch.Generator().manual_seed(3)
    assert torch.equal(generator.state["b4.conv1.weight"], torch.randn(2, 2, 3, 3, generator=numbers))
    assert generator.init_kwargs == {"z_dim": 4, "rendering_kwargs": {"box_warp": 1, "avg_camera_pivot": [0, 0, 0.2]}}
    assert generator.attributes == {"neural_rendering_resolution": 96, "rendering_kwargs": {"box_warp": 1.5}}
    assert found.training_set == {"path": "x.zip", "max_size": 8}
    assert found.networks["D"].classes == {"": "DualDiscriminator", "a": "OSGDecoder", "b": "ImportanceRenderer"}
    assert found.sources == dict.fromkeys(("TriPlaneGenerator", "Layer", "DualDiscriminator"), len(TRAP))
    lines = "\n".join(found.lines())
    assert "G_ema is a TriPlaneGenerator of 4 tensors" in lines and f"Layer ({len(TRAP)})" in lines
    assert "not in the file: augment_pipe" in lines and "source text was run" not in lines


def test_source_text_appears_nowhere_in_the_result(tmp_path: Path) -> None:
    (tmp_path / "net.pkl").write_bytes(small_network_pickle())
    assert "PWNED" not in repr(read_network_pickle(tmp_path / "net.pkl"))
    pending, seen = [read_pickle_checkpoint(tmp_path / "net.pkl")], 0
    while pending:
        item = pending.pop()
        seen += 1
        assert not isinstance(item, str) or "PWNED" not in item
        if isinstance(item, dict):
            pending += [*item, *item.values()]
        elif isinstance(item, (list, tuple, set)):
            pending += item
        elif hasattr(item, "state"):
            pending.append(item.state)
    assert seen > 100


def test_the_traps_are_live(tmp_path: Path) -> None:
    """What would happen with Python's unpickler: importing the named module leaves the file, so does its source text."""
    (tmp_path / "net.pkl").write_bytes(small_network_pickle())
    lay_traps(tmp_path)
    command = [sys.executable, "-c", "import pickle; pickle.load(open('net.pkl', 'rb'))"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "source text was run" in done.stderr and (tmp_path / "PWNED").exists()
    (tmp_path / "PWNED").unlink()
    runner = "def _reconstruct_persistent_obj(record):\n    exec(record['module_src'])\n"
    (tmp_path / "torch_utils" / "persistence.py").write_text(runner)
    (tmp_path / "dnnlib" / "util.py").write_text("")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "source text was run" in done.stderr and (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("name", ["hostile_global", "hostile_nested"])
def test_hostile_examples_are_refused_with_the_name_of_the_global(name: str) -> None:
    path = GOLDEN / "eg3d" / f"{name}.pkl"
    if not path.exists():
        pytest.skip(f"{path} is not there: FACELAB_GOLDEN_DIR has no EG3D pickles")
    with pytest.raises(UserError, match=r"names the global '[a-z]+\.\w+', which is not on the allow-list") as caught:
        read_network_pickle(path)
    assert "\n" not in str(caught.value)


def _module(**changes: object) -> dict:
    return {"G_ema": embedded("Net", EMPTY | changes)}


def _bad_record(**changes: object) -> bytes:
    record = {"type": "class", "version": 6, "module_src": TRAP, "class_name": "Net", "state": EMPTY} | changes
    return dump({"G_ema": Call("torch_utils.persistence", "_reconstruct_persistent_obj", record)})


def _in_each_other(depth: int) -> bytes:
    inner = dump(1)
    for _ in range(depth):
        inner = dump(Call("torch.storage", "_load_from_bytes", inner))
    return inner


def _huge_tensor(size: tuple, stride: tuple) -> Call:
    storage = Call("torch.storage", "_load_from_bytes", blob(torch.arange(6.0)))
    return Call("torch._utils", "_rebuild_tensor_v2", storage, 0, size, stride, False, None)


def _chain(length: int) -> bytes:
    """A list of lists of which each holds the one before it: a search that starts at the first sees no depth."""
    links = [b"]r\x01\x00\x00\x00"]
    links += [b"]r" + i.to_bytes(4, "little") + b"j" + (i - 1).to_bytes(4, "little") + b"a" for i in range(2, length)]
    return b"\x80\x04](" + b"".join(links) + b"e."


SYSTEM = Call("os", "system", "touch PWNED")
HOSTILE = {
    "os.system among the parameters": (dump(_module(_parameters={"w": SYSTEM})), r"'os\.system'"),
    "os.system among the arguments": (dump(_module(_init_kwargs={"z_dim": SYSTEM})), r"'os\.system'"),
    "os.system as source text": (_bad_record(module_src=SYSTEM), r"'os\.system'"),
    "reduce inside reduce inside reduce": (
        dump({"G": Call("collections", "OrderedDict", [("a", Call("builtins", "set", [Call("os", "popen", "x")]))])}),
        r"'os\.popen'",
    ),
    "eval through builtins": (dump({"G": Call("builtins", "exec", TRAP)}), r"'builtins\.exec'"),
    "another function of the persistence": (
        dump({"G": Call("torch_utils.persistence", "_src_to_module", TRAP)}), r"'torch_utils\.persistence\._src_to_module'",
    ),
    "another function of dnnlib": (dump({"G": Call("dnnlib.util", "get_obj_by_name", "os.system")}), "get_obj_by_name"),
    "a class of training called": (dump({"G": Call("training.triplane", "OSGDecoder", 32)}), r"OSGDecoder"),
    "importlib": (dump({"G": Call("importlib", "import_module", "training")}), r"'importlib\.import_module'"),
    "os.system in a tensor's bytes": (
        dump(_module(_parameters={"w": Call("torch.storage", "_load_from_bytes", dump([SYSTEM]))})), r"'os\.system'",
    ),
    "files in each other": (_in_each_other(4), "nests files"),
    "another kind of record": (_bad_record(type="function"), "unknown type 'function'"),
    "a class name that is none": (_bad_record(class_name="a; import os"), "without a class name"),
    "no state": (_bad_record(state=None), "without a state"),
    "attribute names that are bytes": (dump({"G": embedded("Net", {b"x" * 10: 1})}), "no text"),
    "a tensor of 2 to the 60": (dump(_huge_tensor((1 << 60,), (1,))), "outside its storage"),
    "a tensor of 2 to the 60 in a tensor of 6": (dump(_huge_tensor((1 << 60,), (0,))), "far more numbers"),
    "a million operations": (b"\x80\x04}" + b"N0" * 700_000 + b".", "operations"),
    "a million sets": (b"\x80\x04" + b"\x8f" * 500_000 + b".", "operations"),
    "a file read again and again": (
        b"\x80\x04ctorch.storage\n_load_from_bytes\nq\x00C\x02N.q\x01]" + b"h\x00h\x01\x85Ra" * 100_000 + b".", "operations",
    ),
    "a text encoded again and again": (
        b"\x80\x04c_codecs\nencode\nq\x00X\x00\x00\x10\x00" + b"a" * (1 << 20) + b"q\x01X\x06\x00\x00\x00latin1q\x02]"
        + b"h\x00h\x01h\x02\x86Ra" * 10_000 + b".", "again and again",
    ),
    "one dictionary listed again and again": (
        b"\x80\x04}q\x00(" + b"".join(b"K%cN" % i for i in range(200)) + b"u](" + b"h\x00" * 300_000 + b"e.",
        "expected a pickled dictionary",
    ),
    "deep, met from its shallow end first": (_chain(400), "nested deeper"),
    "nothing inside": (dump({"G": None, "D": None, "G_ema": None}), "all empty"),
    "a number as a network": (dump({"G_ema": 5}), "expected 'G_ema' to be a network"),
    "a state dict": (dump({"weight": tensor_call(torch.ones(3))}), "expected a pickled dictionary with G, D, G_ema"),
    "names of a megabyte": (dump(_module(_parameters={"w" * (1 << 20): tensor_call(torch.ones(1))})), "too long names"),
    "parameters that are a list": (dump({"G": embedded("Net", {"_parameters": [1], "_modules": {}})}), "have no names"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_networks_are_refused_within_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data, words = HOSTILE[name]
    lay_traps(tmp_path)
    (tmp_path / "net.pkl").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(os.listdir(tmp_path))
    start = time.thread_time()
    with pytest.raises(UserError, match=words) as caught:
        read_network_pickle("net.pkl")
    assert time.thread_time() - start < 1
    message = str(caught.value)
    assert message.isprintable() and "net.pkl" in message and len(message) < 600
    assert set(os.listdir(tmp_path)) == before


def test_cut_network_pickles(tmp_path: Path) -> None:
    """No beginning of a file is taken for a whole one."""
    data = small_network_pickle()
    path = tmp_path / "cut.pkl"
    for length in [*range(0, len(data) - 1, 211), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cut\.pkl was not read") as caught:
            read_network_pickle(path)
        assert str(caught.value).isprintable()


def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pkl")
    with pytest.raises(UserError, match="pipe or a device"):
        read_network_pickle(tmp_path / "pipe.pkl")


def test_plain_settings_keep_data_only() -> None:
    kept, omitted = plain_settings(
        {"a": (1, 2.5, None), "b": {"c": torch.arange(3), "d": object()}, "e": float("inf"), 5: "not a name"}
    )
    assert kept == {"a": [1, 2.5, None], "b": {"c": [0, 1, 2]}, "e": "inf"} and omitted == ("b.d",)
    assert plain_settings([1]) == ({}, ())
    cycle: dict = {}
    cycle["again"] = cycle
    with pytest.raises(UserError, match="unfold"):
        plain_settings(cycle)
