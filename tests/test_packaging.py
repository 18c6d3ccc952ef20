# SPDX-License-Identifier: Apache-2.0
"""A wheel holds what an installed facelab needs, nothing else, and works far from the checkout."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT

DATA = {".yaml", ".json", ".safetensors", ".md", ".txt"}
SOURCES = ("facelab", "cuda_ops", "configs", "networks", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md",
           "LICENSE", "NOTICE")  # fmt: skip

RENDER = """
import numpy as np
import facelab
assert facelab.__file__.startswith({installed!r}), facelab.__file__
from facelab.config import configs_folder, find_curricula
assert str(configs_folder()).startswith({installed!r}), configs_folder()
assert sorted(find_curricula("fenerf")) == {curricula!r}
{more}
"""
RENDER_MODEL = """
model = facelab.load({model!r})
picture = model.sample(seed=1, settings=model.settings(16))
assert picture.rgb.shape[-2:] == (16, 16) and picture.rgb.isfinite().all() and picture.rgb.std() > 0.01
"""


def run(*command: str, cwd: Path, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FACELAB_HOME")}
    done = subprocess.run(
        command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{' '.join(command[:5])}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder is left in the checkout or read from it."""
    pytest.importorskip("setuptools", reason="building a wheel without isolation needs setuptools")
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        path = CHECKOUT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__", "_data"))
        elif path.is_file():
            shutil.copyfile(path, source / name)
    if not (source / "README.md").exists():
        (source / "README.md").write_text("facelab\n")
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out), str(source),
        cwd=out)  # fmt: skip
    (built,) = out.glob("facelab-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel),
        cwd=target)  # fmt: skip
    return target


def expected_files() -> set[str]:
    code = {
        str(path.relative_to(CHECKOUT))
        for package in ("facelab", "cuda_ops")
        for path in (CHECKOUT / package).rglob("*.py")
        if "_data" not in path.parts
    }
    kernels = {str(p.relative_to(CHECKOUT)) for p in (CHECKOUT / "cuda_ops" / "csrc").glob("*") if p.is_file()}
    data = {
        f"facelab/_data/{path.relative_to(CHECKOUT)}"
        for folder in ("configs", "networks")
        for path in (CHECKOUT / folder).rglob("*")
        if path.is_file() and path.suffix in DATA
    }
    return code | kernels | data


def test_wheel_holds_code_kernels_configs_and_networks(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert expected_files() - names == set()
    surplus = {name for name in names - expected_files() if not name.endswith("README.md")}
    assert surplus == set()


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = email.message_from_string(archive.read(metadata).decode())
        (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "facelab = facelab.cli:main" in archive.read(entry).decode()
        licences = {Path(name).name for name in archive.namelist() if "/licenses/" in name}
    assert text["Requires-Python"] == ">=3.10" and text["License-Expression"] == "Apache-2.0"
    assert licences == {"LICENSE", "NOTICE"}
    required = {line.split(";")[0].strip() for line in text.get_all("Requires-Dist") if "extra ==" not in line}
    names = {line.split(">")[0] for line in required}
    assert not names & {"torchvision", "kornia", "lpips", "diffusers", "tensorboard", "wandb", "viser"}
    assert {"torch", "numpy", "omegaconf", "safetensors", "click"} <= names


def test_installed_wheel_works_elsewhere(installed: Path, tmp_path: Path) -> None:
    """Import, configurations and, with a bundled model, a picture, from another folder and without the checkout."""
    curricula = sorted(p.stem for p in (CHECKOUT / "configs" / "fenerf").glob("[!_]*.yaml"))
    models = sorted((CHECKOUT / "networks").rglob("fenerf*.safetensors"))
    more = ""
    if (CHECKOUT / "facelab" / "api.py").is_file() and models:
        more = RENDER_MODEL.format(model=str(installed / "facelab/_data" / models[0].relative_to(CHECKOUT)))
    code = RENDER.format(installed=str(installed), curricula=curricula, more=more)
    run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed), PYTHONSAFEPATH="1")
