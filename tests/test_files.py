# SPDX-License-Identifier: Apache-2.0
"""A write that fails leaves what was there, and says why in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from facelab.errors import UserError
from facelab.files import atomic_path
from tests.conftest import CHECKOUT

WRITE = """
import resource, signal, sys
import torch
from safetensors.torch import save_file
from facelab.errors import UserError
from facelab.files import atomic_path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # the system refuses to write more
try:
    with atomic_path(sys.argv[1]) as temporary:
        save_file({"w": torch.zeros(100_000)}, temporary)
except UserError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of files as Linux does")
def test_a_refused_write_of_safetensors_is_one_line(tmp_path: Path) -> None:
    """Its errors are no OSError: the program would end in a traceback."""
    target = tmp_path / "codes.safetensors"
    target.write_bytes(b"before")
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(target)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.startswith(f"refused: cannot write {target}: "), done.stderr
    assert done.stdout.count("\n") == 1 and target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_under_safetensors_is_called_so(tmp_path: Path) -> None:
    target = tmp_path / "codes.safetensors"
    with pytest.raises(UserError, match="the disk is full") as caught, atomic_path(target):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert str(target) in str(caught.value) and list(tmp_path.iterdir()) == []


def test_other_errors_come_through(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="os error 28"), atomic_path(tmp_path / "x"):
        raise ValueError("mine (os error 28)")
    assert list(tmp_path.iterdir()) == []
