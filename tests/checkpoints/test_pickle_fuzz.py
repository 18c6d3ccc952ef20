# SPDX-License-Identifier: Apache-2.0
"""Thousands of damaged and hostile pickles: nothing is executed or imported, nothing hangs, memory stays small.

Files come from three sources: real layouts mutated at random, real layouts with hostile pieces spliced in, and random
programs of pickle opcodes. Python's audit events watch every read. A file that fails stays in the temporary folder.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import resource
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from facelab.checkpoints.legacy_networks import read_network_pickle
from facelab.checkpoints.legacy_pickle import read_pickle_checkpoint
from facelab.errors import UserError
from tests.checkpoints.pickle_makers import Call, dump, small_network_pickle

SNAPSHOT = Path(__file__).parents[2] / "test_data" / "golden" / "eg3d" / "snapshot_tiny.pkl"
SECONDS = 1.0  # of this thread's own time, for one file
HANG = 20  # seconds on the clock after which a read is interrupted
MEMORY = 300 * 2**20  # growth of the process over a whole run
# Nothing of this may happen while a file is read.
FORBIDDEN = ("exec", "compile", "import", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pickle.", "marshal.",
             "sys.settrace", "code.", "builtins.input",
             "builtins.breakpoint", "webbrowser.", "tempfile.", "pty.", "http.", "urllib.")  # fmt: skip

CODECS = ("latin-1", "unicode_escape", "raw_unicode_escape", "cp437", "ascii")  # Python imports its own on first use

_watch: dict = {"on": False, "seen": []}


def _audit(event: str, arguments: tuple) -> None:
    if not _watch["on"]:
        return
    writes = event == "open" and (not isinstance(arguments[1], str | None) or set(arguments[1] or "r") & set("wax+"))
    if event.startswith(FORBIDDEN) or writes:
        _watch["seen"].append(f"{event} {str(arguments)[:100]}")


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """The audit events of executing, importing or writing within the block."""
    if not _watch.get("hooked"):
        for codec in CODECS:
            b"a".decode(codec)
        sys.addaudithook(_audit)  # stays for good, but looks only while it is on
        _watch["hooked"] = True
    _watch["seen"] = []
    _watch["on"] = True
    try:
        yield _watch["seen"]
    finally:
        _watch["on"] = False


# ---------------------------------------------------------------- files


def real_layouts() -> list[bytes]:
    """Small files of every layout that is read: plain pickles with source text, torch's older and newer formats."""
    layouts = [small_network_pickle(protocol) for protocol in (2, 4)]
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    for zipped in (False, True):
        for value in (net, {"g_ema": net.state_dict(), "step": 7}):
            stream = io.BytesIO()
            torch.save(value, stream, _use_new_zipfile_serialization=zipped)
            layouts.append(stream.getvalue())
    return layouts


COMMAND = "touch PWNED"
PIECES = [
    f"cos\nsystem\n(S'{COMMAND}'\ntR".encode(),
    f"(S'{COMMAND}'\nios\nsystem\n".encode(),
    f"(cposix\nsystem\nX\x0b\x00\x00\x00{COMMAND}o".encode("latin-1"),
    b"\x8c\x08builtins\x8c\x04exec\x93\x8c\x13open('PWNED','w')\x85R",
    b"cbuiltins\neval\n(S'open(\"PWNED\",\"w\")'\ntR",
    b"cbuiltins\n__import__\n(S'this'\ntR",
    b"csubprocess\nPopen\n(S'touch PWNED'\ntR",
    b"cnumpy.core.multiarray\n_reconstruct\n(tR",
    b"ctorch\nload\n(S'PWNED'\ntR",
    b"ctorch_utils.persistence\nimport_hook\n)R",
    b"ctraining.triplane\nTriPlaneGenerator\n)\x81}(S'__setstate__'\nK\x01ub",
    b"ccollections\nOrderedDict\n)R",
    b"c__main__\nx\n",
    b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"P1\n", b"Q", b"\x97", b"\x98",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", b"B\xff\xff\xff\xff", b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f",
    b"r\xff\xff\xff\xff", b"]" * 500, b"(" * 500, b"2\x86" * 60, b"\x8f" * 500, b"N0" * 500, b"h\x00h\x01",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch.storage\n_load_from_bytes\n", b"\x80\x05", b".", b"0", b"1",
    b"t", b"R", b"\x81", b"b", b"u", b"e",
]  # fmt: skip
_NESTED = dump(Call("os", "system", COMMAND))
PIECES.append(b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(_NESTED)) + _NESTED + b"\x85R")


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to six random changes: bytes, bits, cuts, repeats, moves, lengths, hostile pieces."""
    made = bytearray(data)

    def place() -> int:
        return int(rng.integers(0, len(made) + 1))

    for _ in range(int(rng.integers(1, 7))):
        at, to = sorted((place(), place()))
        short = min(to, at + int(rng.integers(1, 400)))
        kind = rng.integers(0, 10)
        if kind == 0 and made:
            made[min(at, len(made) - 1)] = int(rng.integers(256))
        elif kind == 1 and made:
            made[min(at, len(made) - 1)] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del made[at:short]
        elif kind == 3:
            made[to:to] = made[at:short] * int(rng.integers(1, 4))
        elif kind == 4:
            piece = made[at:short]
            del made[at:short]
            where = place()
            made[where:where] = piece
        elif kind == 5:
            made[at : at + 4] = struct.pack("<I", int(rng.choice([0, 1, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1])))
        elif kind == 6:
            made[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 9)), dtype=np.uint8))
        elif kind == 7 and rng.random() < 0.3:
            del made[at:]
        else:
            made[at:at] = PIECES[int(rng.integers(len(PIECES)))]
    return bytes(made)


def splice(data: bytes, rng: np.random.Generator) -> bytes:
    """A hostile piece where an instruction begins, so that the file is well-formed up to there."""
    starts = _instructions(data)
    at = starts[int(rng.integers(len(starts)))] if starts else 0
    piece = PIECES[int(rng.integers(len(PIECES)))] * int(rng.integers(1, 3))
    return data[:at] + piece + data[at:]


_starts: dict[bytes, list[int]] = {}


def _instructions(data: bytes) -> list[int]:
    import pickletools

    if data not in _starts:
        found = []
        with contextlib.suppress(Exception):  # an archive, or the end of the first pickle of several
            found = [position for _, _, position in pickletools.genops(data)]
        _starts[data] = found
    return _starts[data]


def random_program(rng: np.random.Generator) -> bytes:
    """Random opcodes with small arguments, and hostile pieces between them."""
    words = [
        b"N", b"K\x05", b"M\x05\x00", b"]", b"}", b")", b"(", b"\x8f", b"X\x01\x00\x00\x00a", b"\x8c\x01b", b"C\x02ab",
        b"q\x00", b"h\x00", b"\x94", b"s", b"a", b"e", b"u", b"t", b"l", b"d", b"\x85", b"\x86", b"\x87", b"0", b"1", b"2",
        b"R", b"b", b"\x81", b"\x91", b"\x90", b"G" + struct.pack(">d", 1.5), b"I7\n", b"L7L\n", b"F1.5\n", b"S'a'\n",
        b"Vb\n", b"p1\n", b"g1\n", b"\x88", b"\x89", b"\x8a\x01\x07", b"ccollections\nOrderedDict\n", b"cbuiltins\nset\n",
        b"ctorch.nn.modules.linear\nLinear\n", b"ctorch\nFloatStorage\n", b"cnumpy\ndtype\n", b"cdnnlib.util\nEasyDict\n",
        b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n", b"ccopyreg\n_reconstructor\n",
    ]  # fmt: skip
    parts = [b"\x80\x04"]
    for _ in range(int(rng.integers(3, 120))):
        bank = PIECES if rng.random() < 0.03 else words
        parts.append(bank[int(rng.integers(len(bank)))])
    return b"".join(parts) + b"."


# ---------------------------------------------------------------- runs


def _alarm(*_: object) -> None:
    raise TimeoutError(f"a read did not end within {HANG} s")


def read_watched(path: Path, reader: Callable[[Path], object], where: str, limit: float = SECONDS) -> str:
    """Read one file. Returns 'read' or 'refused'; assertion error when anything else happens."""
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(HANG)
    start = time.thread_time()
    outcome = "read"
    try:
        with watched() as seen:
            try:
                reader(path)
            except UserError as error:
                outcome = "refused"
                message = str(error)
    finally:
        signal.alarm(0)
    spent = time.thread_time() - start
    assert not seen, f"{where}: {seen}"
    assert spent < limit, f"{where}: {spent:.2f} s"
    if outcome == "refused":
        assert message.isprintable() and path.name in message, f"{where}: {message!r}"
    return outcome


def run_fuzz(folder: Path, count: int, seed: int, layouts: list[bytes]) -> Counter:
    """``count`` files; the same seed makes the same changes. Returns how many were read and refused."""
    os.chdir(folder)
    path = folder / "fuzz.pkl"
    readers: list[Callable[[Path], object]] = [read_pickle_checkpoint, read_network_pickle]
    for data in layouts:  # whatever is imported on first use is imported now
        path.write_bytes(data)
        read_pickle_checkpoint(path)
    with contextlib.suppress(UserError):
        read_network_pickle(path)
    outcomes: Counter = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        base = layouts[int(rng.integers(len(layouts)))]
        kind = ("mutate", "splice", "program")[number % 3]
        data = mutate(base, rng) if kind == "mutate" else splice(base, rng) if kind == "splice" else random_program(rng)
        path.write_bytes(data)
        outcome = read_watched(path, readers[number % 2], f"seed {seed}, file {number} ({kind})")
        outcomes[f"{kind} {outcome}"] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY, f"seed {seed}: memory grew by {grown / 2**20:.0f} MiB"
    assert os.listdir(folder) == ["fuzz.pkl"], os.listdir(folder)
    return outcomes


def test_the_watch_sees_python_unpickling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same watch over Python's own unpickler reports the call, so silence means something."""
    monkeypatch.chdir(tmp_path)
    with watched() as seen:
        pickle.loads(PIECES[0] + b".")  # noqa: S301 - our own bytes: touches a file in the temporary folder
    assert any(event.startswith("pickle.find_class") for event in seen)
    assert any(event.startswith("os.system") for event in seen) and (tmp_path / "PWNED").exists()
    with watched() as seen, open("other.txt", "w") as file:
        file.write("x")
    assert seen and "other.txt" in seen[0]
    (tmp_path / "slow.pkl").write_bytes(b"N.")
    with pytest.raises(AssertionError, match=r"here: \d\.\d+ s"):
        read_watched(tmp_path / "slow.pkl", lambda path: sum(i * i for i in range(200_000)), "here", 1e-3)


def test_every_hostile_piece_is_refused_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that call something are refused wherever they stand at the top of a file."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "fuzz.pkl"
    for piece in PIECES:
        if b"PWNED" in piece or b"__import__" in piece:
            for data in (b"\x80\x04" + piece + b".", b"\x80\x02}X\x01\x00\x00\x00G" + piece + b"s."):
                path.write_bytes(data)
                assert read_watched(path, read_pickle_checkpoint, repr(piece)) == "refused"
    assert os.listdir(tmp_path) == ["fuzz.pkl"]


def test_some_hundred_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcomes = run_fuzz(tmp_path, 600, 0, real_layouts())
    refused = sum(n for key, n in outcomes.items() if key.endswith("refused"))
    assert outcomes["mutate refused"] > 50 and outcomes["splice refused"] > 50 and refused < 600, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_thousands_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """5000 small files for each seed."""
    monkeypatch.chdir(tmp_path)
    print(seed, dict(run_fuzz(tmp_path, 5000, seed, real_layouts())))


@pytest.mark.slow
def test_a_thousand_damaged_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that the original classes wrote, half a megabyte."""
    monkeypatch.chdir(tmp_path)
    print(dict(run_fuzz(tmp_path, 1500, 9, [SNAPSHOT.read_bytes()])))
