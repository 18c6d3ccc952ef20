# SPDX-License-Identifier: Apache-2.0
"""Take the tensors out of a TorchScript archive and leave its code alone.

Some feature networks (Inception, VGG16 with LPIPS weights) are published as TorchScript, which is a program. Only
``data.pkl`` (attributes) and the storages are read here, by the same interpreter as other foreign pickles; the
architecture is ours.
"""

from __future__ import annotations

import re
import zipfile
from collections import OrderedDict
from pathlib import Path

from torch import Tensor

from facelab.checkpoints.legacy_pickle import ALLOWED_CLASSES, CheckpointBuilder, LegacyObject
from facelab.checkpoints.legacy_storages import Budget, GlobalName, ZipStorages, open_archive, refusing
from facelab.checkpoints.pickle_machine import PickleMachine, Refused

_MAX_DEPTH = 64
_MAX_OBJECTS = 20_000
_HELPER = re.compile(r"torch\.jit\._pickle\.(build_\w+|restore_type_tag)")


def read_torchscript(path: str | Path) -> OrderedDict[str, Tensor]:
    """Tensors of a TorchScript archive under their dotted attribute names, in the order they were registered.

    Parameters, buffers and plain tensor attributes look alike in the file and all appear. Constants that tracing
    lifted into the code are appended as ``constants.<number>``. Lists of tensors appear as ``name.<number>``.

    Raises:
        UserError: not a TorchScript archive, damaged, or refused by the allow-list (one line, with the reason).
    """
    path = Path(path)
    with refusing(path), open_archive(path) as archive:
        size = path.stat().st_size
        names = archive.namelist()
        roots = [n[: -len("constants.pkl")] for n in names if re.fullmatch(r"[^/]+/constants\.pkl", n)]
        if len(roots) != 1 or f"{roots[0]}data.pkl" not in names:
            raise Refused("expected a TorchScript archive with data.pkl and constants.pkl, got another zip file")
        budget = Budget(bytes_left=2 * size + (1 << 16))
        tensors: OrderedDict[str, Tensor] = OrderedDict()
        _collect(_load(archive, roots[0], "data", size, budget), tensors)
        _collect({"constants": _load(archive, roots[0], "constants", size, budget)}, tensors)
        return tensors


class _ScriptBuilder(CheckpointBuilder):
    """Classes of the archive's own namespace become records; list helpers return their list."""

    def find_global(self, module: str, name: str) -> object:
        path = f"{module}.{name}"
        return GlobalName(path) if _HELPER.fullmatch(path) else super().find_global(module, name)

    def call(self, function: object, arguments: tuple) -> object:
        if isinstance(function, GlobalName) and _HELPER.fullmatch(function.path):
            if not arguments:
                raise Refused(f"its call of '{function.path}' has no arguments")
            return arguments[0]
        return super().call(function, arguments)


def _load(archive: zipfile.ZipFile, root: str, name: str, size: int, budget: Budget) -> object:
    reader = ZipStorages(archive, root, size, budget, folder=name)
    builder = _ScriptBuilder((*ALLOWED_CLASSES, "__torch__.*"), budget, reader.load)
    return PickleMachine(memoryview(reader.read(f"{name}.pkl")), builder, operations=budget.operations).load()


def _collect(value: object, tensors: OrderedDict[str, Tensor]) -> None:
    """Depth first, in order; a record that contains itself is entered once on each path."""
    pending: list[tuple[str, object, int]] = [("", value, 0)]
    count = 0
    while pending:
        name, item, depth = pending.pop()
        count += 1
        if count > _MAX_OBJECTS or depth > _MAX_DEPTH:
            raise Refused("it unfolds to far more objects than a network has")
        if isinstance(item, Tensor):
            tensors[name] = item.detach()  # type: ignore[attr-defined]
            continue
        if isinstance(item, LegacyObject):
            children = list(item.state.items())
        elif isinstance(item, dict):
            children = [(str(key), child) for key, child in item.items()]
        elif isinstance(item, (list, tuple)):
            children = [(str(number), child) for number, child in enumerate(item)]
        else:
            continue
        kept = [(f"{name}.{key}".lstrip("."), child, depth + 1) for key, child in children if not _is_scalar(child)]
        pending += reversed(kept)


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, bytes))
