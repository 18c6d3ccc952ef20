# SPDX-License-Identifier: Apache-2.0
"""LMDB: the originals' keys, threads and processes, steps that survive a kill, what can be wrong with a file."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from facelab.data import lmdb_store
from facelab.data.lmdb_store import LmdbStore, LmdbWriter, is_lmdb, key_of
from facelab.errors import UserError

lmdb = pytest.importorskip("lmdb", reason="needs the lmdb package: pip install facelab[lmdb]")
COUNT = 6


def value(size: int, index: int) -> bytes:
    return bytes([size % 251, index]) * (100 + index)


@pytest.fixture
def store(tmp_path: Path) -> LmdbStore:
    """Written as the original does it, without our writer."""
    with (
        lmdb.open(str(tmp_path / "set"), map_size=1 << 22) as environment,
        environment.begin(write=True) as transaction,
    ):
        for size in (512, 8, 64):
            for index in range(COUNT):
                transaction.put(f"{size}-{str(index).zfill(5)}".encode(), value(size, index))
        transaction.put(b"length", str(COUNT).encode())
    return LmdbStore(tmp_path / "set")


def test_the_originals_keys_are_read(store):
    assert len(store) == COUNT and store.sizes() == (8, 64, 512) and is_lmdb(store.root)
    assert store.indices(64) == list(range(COUNT)) and store.indices(6) == [] and store.indices(51) == []
    assert store.read(64, 5) == value(64, 5) and store.read(8, 0) == value(8, 0)


def test_our_keys_are_read_by_the_package_alone(tmp_path):
    with LmdbWriter(tmp_path / "set") as writer:
        writer.commit({key_of(64, 0): b"a", key_of(64, 100_000): b"b"}, {"index": 2})
        writer.finish(2)
    with (
        lmdb.open(str(tmp_path / "set"), readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):
        assert dict(transaction.cursor()) == {b"64-00000": b"a", b"64-100000": b"b", b"length": b"2"}


def test_threads_share_a_store_and_stores_share_a_file(store):
    other = LmdbStore(os.path.join(store.root, ".", ""))
    jobs = [(size, index) for size in (8, 64, 512) for index in range(COUNT)] * 20
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: (store if job[1] % 2 else other).read(*job), jobs))
    assert found == [value(*job) for job in jobs]


def _read_in_child(store: LmdbStore, queue) -> None:
    queue.put(store.read(64, 3))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes_open_the_file_for_themselves(store, start):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {start}")
    assert store.read(64, 3) == value(64, 3)
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(store, queue))
    child.start()
    assert queue.get(timeout=30) == value(64, 3)
    child.join(30)
    assert child.exitcode == 0 and store.read(64, 4) == value(64, 4)


def test_unfinished_sets_never_look_whole(tmp_path):
    root = tmp_path / "set"
    with LmdbWriter(root) as writer:
        assert writer.progress is None and writer.length is None
        writer.commit({key_of(8, 0): b"x", key_of(8, 1): b"y"}, {"index": 2, "more": [1]})
    with pytest.raises(UserError, match=r"not finished \(2 pictures so far\).*same prepare_data.py lmdb command"):
        LmdbStore(root)
    with LmdbWriter(root) as writer:
        assert writer.progress == {"index": 2, "more": [1]}
        writer.finish(2)
    assert len(LmdbStore(root)) == 2
    gc.collect()
    with LmdbWriter(root) as writer:  # going on takes the end mark away again
        assert writer.length == 2
        writer.commit({}, {"index": 2})
    with pytest.raises(UserError, match="not finished"):
        LmdbStore(root)


def test_a_commit_is_all_or_nothing(tmp_path):
    root = tmp_path / "set"
    with LmdbWriter(root) as writer:
        writer.commit({key_of(8, 0): b"x"}, {"index": 1})
        with pytest.raises(UserError, match="MDB_BAD_VALSIZE"):
            writer.commit({key_of(8, 1): b"y", b"k" * 5000: b"a key too long"}, {"index": 3})
        assert writer.progress == {"index": 1}
        writer.finish(1)
    store = LmdbStore(root)
    assert store.indices(8) == [0] and len(store) == 1


def test_the_map_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(lmdb_store, "_FIRST_MAP", 1 << 16)
    data = {key_of(8, i): bytes([i]) * 50_000 for i in range(12)}
    with LmdbWriter(tmp_path / "set") as writer:
        writer.commit(data, {"index": 12})
        writer.finish(12)
    store = LmdbStore(tmp_path / "set")
    assert all(store.read(8, i) == data[key_of(8, i)] for i in range(12))


def test_two_conversions_into_one_file_are_noticed(tmp_path):
    with LmdbWriter(tmp_path / "set") as writer:
        writer.commit({}, {"index": 0})
        writer._stored = b"what another process has replaced since"
        with pytest.raises(UserError, match="another process is writing"):
            writer.commit({key_of(8, 0): b"x"}, {"index": 1})


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    with LmdbWriter(tmp_path / "set") as writer:

        class Full:
            def begin(self, **_):
                raise lmdb.DiskError("mdb_txn_commit: No space left on device")

            def close(self):
                pass

        monkeypatch.setattr(writer, "_environment", Full())
        with pytest.raises(UserError, match="the disk is full; free some space") as caught:
            writer.commit({}, {"index": 0})
    assert "\n" not in str(caught.value)


def _broken(root: Path, kind: str) -> None:
    if kind == "cut":
        with open(root / "data.mdb", "r+b") as file:
            file.truncate(8192)
    elif kind == "garbage":
        (root / "data.mdb").write_bytes(b"no database at all" * 1000)
    elif kind == "length":
        with lmdb.open(str(root), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
            transaction.put(b"length", b"many")
    elif kind == "no length":
        with lmdb.open(str(root), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
            transaction.delete(b"length")
    elif kind == "no file":
        (root / "data.mdb").unlink()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cut", "cut short, expected [0-9]+ bytes, got 8192"),
        ("garbage", "cannot be used as LMDB: MDB_INVALID"),
        ("length", '"length" must be a positive number'),
        ("no length", "was not finished"),
        ("no file", "no LMDB at .*expected a folder with data.mdb, got a folder without it"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, kind, words):
    root = tmp_path / "set"
    with LmdbWriter(root) as writer:
        writer.commit({key_of(8, i): bytes(20_000) for i in range(20)}, {"index": 20})
        writer.finish(20)
    _broken(root, kind)
    with pytest.raises(UserError, match=words) as caught:
        LmdbStore(root)
    assert "\n" not in str(caught.value)


def test_missing_entries_and_missing_package(store, monkeypatch):
    with pytest.raises(UserError, match="64-00006: no such entry, though the set states 6"):
        store.read(64, 6)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match=r"pip install facelab\[lmdb\]"):
        LmdbStore(store.root)
    with pytest.raises(UserError, match=r"pip install facelab\[lmdb\]"):
        LmdbWriter(store.root)
