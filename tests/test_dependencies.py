# SPDX-License-Identifier: Apache-2.0
"""The arrows of facelab/README.md: an import points to an equal or lower layer, optional packages stay inside functions."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT

LAYERS = {
    "errors": 0, "files": 0, "progress": 0, "draws": 0, "tensors": 0, "recording": 0, "config": 0, "yaml_files": 0, "assets": 0,
    "deviations": 0, "ranges": 0, "option_types": 0, "tensor_files": 0, "__init__": 0,
    "cameras": 1, "lighting": 1,
    "face_model": 2, "mesh": 2,
    "nn": 3,
    "data": 4,
    "fields": 5,
    "rendering": 6,
    "generator": 7,
    "losses": 8,
    "checkpoints": 9,
    "training": 10,
    "inference": 11, "inversion": 11, "metrics": 11, "weights": 11,
    "bases": 12,
    "methods": 13,
    "viewers": 14,
    "api": 15, "cli": 15, "__main__": 15,
}  # fmt: skip
CORE_PACKAGES = {"torch", "numpy", "safetensors", "omegaconf", "yaml", "click", "tqdm", "PIL"}
LAZY_PACKAGES = {
    "torchvision", "kornia", "lpips", "skimage", "imageio", "imageio_ffmpeg", "trimesh", "scipy", "numba",
    "tensorboard", "wandb", "diffusers", "transformers", "viser", "matplotlib", "mrcfile", "lmdb", "cv2", "dlib",
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    """One import: the module that does it, the module it names, where, and whether importing the file runs it."""

    source: str
    target: str
    line: int
    at_module_level: bool
    for_types_only: bool


def find_imports(root: Path, file: Path) -> Iterator[Import]:
    """Every import of a file; relative ones are resolved, ``from a import b`` names ``a.b``."""
    parts = file.relative_to(root).with_suffix("").parts
    package = parts[:-1]
    source = ".".join(package if parts[-1] == "__init__" else parts)

    def walk(node: ast.AST, inside: bool, types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(source, alias.name, node.lineno, not inside, types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else node.module or ""
            for alias in node.names:
                yield Import(source, f"{base}.{alias.name}", node.lineno, not inside, types)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield Import(source, node.args[0].value, node.lineno, not inside, types)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from walk(child, inside, True)
            for child in node.orelse:
                yield from walk(child, inside, types)
            return
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside or function, types)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), False, False)


def layer_of(module: str) -> int | None:
    """The layer of a module of ours, -1 for cuda_ops, None for foreign ones. KeyError on an unknown part of facelab."""
    parts = module.split(".")
    if parts[0] == "cuda_ops":
        return -1
    if parts[0] != "facelab":
        return None
    return LAYERS[parts[1]] if len(parts) > 1 else LAYERS["__init__"]


def method_of(module: str) -> str:
    """``facelab.methods.fenerf.model`` -> ``fenerf``; empty for what is no method."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["facelab", "methods"] and len(parts) > 2 else ""


def is_public_name(root: Path, target: str) -> bool:
    """``facelab.load``: a name of the package itself and not a module of it."""
    parts = target.split(".")
    here = root.joinpath(*parts)
    if parts[0] != "facelab" or len(parts) != 2 or parts[1] in LAYERS:
        return False
    return not here.with_suffix(".py").is_file() and not here.is_dir()


def violations(root: Path) -> list[str]:
    """Every broken arrow under ``root``, each as ``file:line: what``."""
    found = []
    for top in ("facelab", "cuda_ops"):
        for file in sorted((root / top).rglob("*.py")):
            if "_data" in file.parts:
                continue
            for item in find_imports(root, file):
                problem = judge(root, item)
                if problem:
                    found.append(f"{file.relative_to(root)}:{item.line}: {problem}")
    return found


def judge(root: Path, item: Import) -> str:
    """What is wrong with an import, or an empty string."""
    package = item.target.split(".")[0]
    if package in ("scripts", "tests", "conftest"):
        return f"imports {package}"
    try:
        here = layer_of(item.source)
        there = layer_of("facelab" if is_public_name(root, item.target) else item.target)
    except KeyError as error:
        return f"{error.args[0]!r} has no layer: add it to the table of facelab/README.md and to this test"
    if there is not None and here is not None and there > here and not is_lazy_door(item):
        return f"{item.source} (layer {here}) imports {item.target} (layer {there})"
    theirs, ours = method_of(item.target), method_of(item.source)
    if ours and theirs and ours != theirs and root.joinpath("facelab", "methods", theirs).is_dir():
        return f"method {ours} imports method {theirs}"
    lazy = lazy_package(root, item.target)
    if lazy and item.at_module_level and not item.for_types_only and not item.source.endswith(f"_{lazy}"):
        return f"imports {lazy} at module level; import it in the function that uses it"
    if item.source.startswith("cuda_ops") and package not in {"torch", "triton", "cuda_ops", *sys.stdlib_module_names}:
        return f"cuda_ops imports torch only, not {package}"
    return ""


def lazy_package(root: Path, target: str) -> str:
    """The optional package that an import loads: itself, or that of a backend such as ``mesh.rasterize_numba``.

    A file named ``..._<package>.py`` may import its package at the top; the file is then imported inside functions.
    """
    parts = target.split(".")
    if parts[0] in LAZY_PACKAGES:
        return parts[0]
    files = [i for i in range(1, len(parts)) if root.joinpath(*parts[: i + 1]).with_suffix(".py").is_file()]
    endings = {parts[i].rpartition("_")[2] for i in files if "_" in parts[i]}
    return next(iter(endings & LAZY_PACKAGES), "")


def is_lazy_door(item: Import) -> bool:
    """``facelab/__init__.py`` may open the API on first use."""
    return item.source == "facelab" and (not item.at_module_level or item.for_types_only)


def test_arrows() -> None:
    assert not violations(CHECKOUT), "\n" + "\n".join(violations(CHECKOUT))


def test_module_level_packages_are_declared() -> None:
    known = CORE_PACKAGES | LAZY_PACKAGES | {"facelab", "cuda_ops", "triton", *sys.stdlib_module_names}
    foreign = {
        f"{file.relative_to(CHECKOUT)}:{item.line}: {item.target}"
        for top in ("facelab", "cuda_ops")
        for file in (CHECKOUT / top).rglob("*.py")
        for item in find_imports(CHECKOUT, file)
        if item.target.split(".")[0] not in known
    }
    assert not foreign, f"not in pyproject's dependencies or extras as this test knows them: {sorted(foreign)}"


def test_every_part_of_facelab_has_a_layer() -> None:
    parts = {p.stem for p in (CHECKOUT / "facelab").iterdir() if p.suffix == ".py"}
    parts |= {p.parent.name for p in (CHECKOUT / "facelab").glob("*/*.py")}
    assert parts - set(LAYERS) == set()


def test_scripts_are_thin() -> None:
    for file in sorted((CHECKOUT / "scripts").glob("*.py")):
        own = [i.target for i in find_imports(CHECKOUT, file) if i.target.split(".")[0] in ("tests", "scripts")]
        assert not own, f"{file.name} imports {own}"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"facelab/cameras/a.py": "from facelab.errors import UserError"}, ""),
        ({"facelab/cameras/a.py": "from facelab import load"}, ""),
        ({"facelab/cameras/a.py": "import facelab.training.loop"}, "imports facelab.training.loop (layer 10)"),
        ({"facelab/cameras/a.py": "from facelab.nn import mapping"}, "(layer 1) imports facelab.nn.mapping (layer 3)"),
        ({"facelab/cameras/a.py": "from ..nn import mapping"}, "(layer 1) imports facelab.nn.mapping (layer 3)"),
        ({"facelab/nn/a/b.py": "from ...data.c import d"}, "(layer 3) imports facelab.data.c.d (layer 4)"),
        ({"facelab/cameras/a.py": "from facelab import generator"}, "generator (layer 7)"),
        ({"facelab/nn/a.py": "def f():\n    from facelab.api import load"}, "imports facelab.api.load (layer 15)"),
        (
            {"facelab/nn/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from facelab.data import b"},
            "(layer 3) imports facelab.data.b (layer 4)",
        ),
        ({"facelab/nn/a.py": "import importlib\nimportlib.import_module('facelab.data')"}, "imports facelab.data"),
        ({"facelab/nn/a.py": "from tests.conftest import x"}, "imports tests"),
        ({"facelab/cli.py": "import scripts.train"}, "imports scripts"),
        ({"facelab/nn/a.py": "import torchvision.models as m"}, "imports torchvision at module level"),
        ({"facelab/nn/a.py": "class A:\n    import lpips"}, "imports lpips at module level"),
        ({"facelab/nn/a.py": "try:\n    from scipy import io\nexcept ImportError:\n    io = None"}, "imports scipy"),
        ({"facelab/nn/a.py": "def f():\n    import lpips"}, ""),
        ({"facelab/mesh/a_numba.py": "import numba"}, ""),
        ({"facelab/mesh/a.py": "from facelab.mesh.b import has_numba"}, ""),
        (
            {"facelab/mesh/a.py": "def f():\n    from facelab.mesh.a_numba import g", "facelab/mesh/a_numba.py": ""},
            "",
        ),
        (
            {"facelab/mesh/a.py": "from facelab.mesh.a_numba import g", "facelab/mesh/a_numba.py": ""},
            "imports numba at module level",
        ),
        ({"facelab/newpart.py": "import facelab.errors"}, "'newpart' has no layer"),
        ({"facelab/methods/x/a.py": "from facelab.methods.y.b import c", "facelab/methods/y/b.py": ""}, "method x imp"),
        ({"facelab/methods/x/a.py": "from facelab.bases.y.b import c", "facelab/methods/y/b.py": ""}, ""),
        ({"facelab/bases/x/a.py": "from facelab.methods.y.b import c"}, "(layer 12) imports facelab.methods.y.b.c"),
        ({"cuda_ops/a.py": "from facelab.errors import UserError"}, "imports facelab.errors.UserError (layer 0)"),
        ({"cuda_ops/a.py": "import numpy"}, "cuda_ops imports torch only"),
        ({"cuda_ops/a.py": "import torch, os\nfrom cuda_ops import reference"}, ""),
        ({"facelab/__init__.py": "def __getattr__(name):\n    from facelab import api"}, ""),
        ({"facelab/__init__.py": "from facelab import api"}, "imports facelab.api (layer 15)"),
    ],
)
def test_the_checker_itself(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = violations(tmp_path)
    if expected:
        assert len(found) == 1 and expected in found[0], found
    else:
        assert found == []
