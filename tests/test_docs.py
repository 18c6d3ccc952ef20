# SPDX-License-Identifier: Apache-2.0
"""Documents agree with the code: the palette, the layers, the links, and the conventions that are examples."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from facelab.cameras import Camera
from facelab.data.labels import CLASSES, FLIP_TABLE, PALETTE
from tests.conftest import CHECKOUT
from tests.test_dependencies import LAYERS

FOLDERS = ("configs", "cuda_ops", "docs", "facelab", "networks", "scripts", "test_data", "tests")
DOCUMENTS = sorted([*CHECKOUT.glob("*.md"), *(path for name in FOLDERS for path in (CHECKOUT / name).rglob("*.md"))])


def table(text: str) -> list[list[str]]:
    """Cells of the rows of the first table in ``text``, without its header."""
    rows = re.findall(r"^\|(.+)\|$", text, flags=re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows if not set(row) <= set("|-: ")][1:]


def test_palette_table() -> None:
    text = (CHECKOUT / "docs" / "conventions.md").read_text(encoding="utf-8").split("<!-- palette")[1]
    rows = [(int(r[0]), r[1], tuple(map(int, r[3].split(","))), int(r[4])) for r in table(text)]
    assert rows == [(i, CLASSES[i], PALETTE[i], FLIP_TABLE[i]) for i in range(len(CLASSES))]


def test_layer_table() -> None:
    text = (CHECKOUT / "facelab" / "README.md").read_text(encoding="utf-8")
    stated = {name: int(row[0]) for row in table(text) if row[0] != "-" for name in re.findall(r"`(\w+)`", row[1])}
    assert stated == {name: layer for name, layer in LAYERS.items() if not name.startswith("__")}


def test_parts_of_the_layer_table_exist_or_are_said_not_to() -> None:
    text = (CHECKOUT / "facelab" / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^Places kept, without code yet: (.+)$", text, flags=re.MULTILINE)
    here = CHECKOUT / "facelab"
    missing = {name for name in LAYERS if not name.startswith("__") and not any(here.glob(f"{name}*"))}
    assert missing <= set(re.findall(r"`(\w+)`", line))


@pytest.mark.parametrize(
    ("pitch", "yaw", "position"),
    [
        (math.pi / 2, math.pi / 2, (0.0, 0.0, 1.0)),
        (math.pi / 2, 0.0, (1.0, 0.0, 0.0)),
        (0.0, math.pi / 2, (0.0, 1.0, 0.0)),
    ],
)
def test_view_table(pitch: float, yaw: float, position: tuple[float, ...]) -> None:
    camera = Camera.on_sphere(pitch, yaw, fov=12.0)
    torch.testing.assert_close(camera.cam2world[0, :3, 3], torch.tensor(position), atol=2e-5, rtol=0)
    forward = camera.cam2world[0, :3, 2]
    torch.testing.assert_close(forward, -torch.tensor(position), atol=2e-5, rtol=0)
    assert camera.intrinsics[0, 0, 0].item() == pytest.approx(0.5 / math.tan(math.radians(6)), rel=1e-5)


def test_left_of_the_subject_is_right_in_the_picture() -> None:
    camera = Camera.on_sphere(math.pi / 2, math.pi / 2, fov=12.0)
    right, down = camera.cam2world[0, :3, 0], camera.cam2world[0, :3, 1]
    torch.testing.assert_close(right, torch.tensor([1.0, 0.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(down, torch.tensor([0.0, -1.0, 0.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)|<img[^>]+src=\"([^\"]+)\"", document.read_text(encoding="utf-8"))
    local = [link for pair in links for link in pair if link and not re.match(r"[a-z]+:", link)]
    missing = [link for link in local if not (document.parent / link).exists()]
    assert not missing, f"{document.relative_to(CHECKOUT)} points to nothing: {missing}"


@pytest.mark.parametrize("name", ["pigan", "fenerf", "eg3d", "stylesdf", "cnerf", "facednerf"])
def test_the_notice_names_the_paper_of_a_page(name: str) -> None:
    page = (CHECKOUT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    papers = re.findall(r"arxiv\.org/abs/([\d.]+\d)", page)
    assert papers and papers[0] in (CHECKOUT / "NOTICE").read_text(encoding="utf-8")


def test_files_keep_the_rules() -> None:
    """Licence headers, line counts and sizes of the tracked files; nothing to check outside a git checkout."""
    if not (CHECKOUT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(
        [sys.executable, ".ci/check_files.py"], cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
