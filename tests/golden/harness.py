# SPDX-License-Identifier: Apache-2.0
"""Golden cases: discovery, reproducible weights, adapters, comparison.

A case is ``<method>/<case>.json`` (settings, seeds, tolerances) beside ``<method>/<case>.npz``
(arrays: ``in_*`` inputs; ``out_*`` and ``ema_state/*`` expected outputs; where names do not say
it, the adapter names its inputs with :func:`given` and every other array is expected). Weights are
a pure function of (seed, original parameter name, shape): :func:`detfill` makes the same ones anywhere.

The folder is ``FACELAB_GOLDEN_DIR``, by default ``test_data/golden`` of this checkout. A case has
an adapter (``adapters/*.py``), or stands in ``planned.yaml`` with a reason, or fails.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

Meta = dict[str, Any]
Arrays = dict[str, Tensor]
Adapter = Callable[[Meta, Arrays], Mapping[str, "Tensor | np.ndarray | float"]]

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
EXPECTED_PREFIXES = ("out_", "ema_state/")


# ---------------------------------------------------------------- weights and cases


def detfill(
    shapes: Mapping[str, Sequence[int]], seed: int, rules: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Tensor]:
    """Float32 tensors for ``shapes`` (original key -> shape), independent of the order of the keys.

    ``rules`` are tried in order and the first whose ``match`` (``re.search``) fits the key wins:
    ``{"match": r, "std": s, "mean": m}`` draws N(m, s); ``{"match": r, "keep": true}`` leaves the
    key out, so that a module keeps its own value. Without a fitting rule: N(0, 1) for two or more
    dimensions, else N(0, 0.1).
    """
    filled: dict[str, Tensor] = {}
    for key, shape in shapes.items():
        rule = next((r for r in rules if re.search(str(r["match"]), key)), {})
        if rule.get("keep"):
            continue
        mean = float(rule.get("mean", 0.0))
        std = float(rule["std"]) if "std" in rule else (1.0 if len(shape) >= 2 else 0.1)
        rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())]))
        values = np.asarray(mean + std * rng.standard_normal(tuple(shape)), dtype=np.float32)
        filled[key] = torch.from_numpy(values)
    return filled


def case_weights(meta: Meta, shapes: Mapping[str, Sequence[int]], seed_offset: int = 0) -> dict[str, Tensor]:
    """:func:`detfill` with the seed and rules of a case's ``detfill`` entry."""
    entry = meta["detfill"]
    return detfill(shapes, int(entry["seed"]) + seed_offset, entry.get("rules", ()))


def load_case(path: str | Path) -> tuple[Meta, Arrays]:
    """Read ``<path>.json`` and ``<path>.npz``.

    ``meta["folder"]`` is set to the folder of the case, where the files named in ``meta["files"]`` lie.
    """
    path = Path(path)
    meta = json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))
    meta["folder"] = path.parent
    with np.load(path.with_name(path.name + ".npz"), allow_pickle=False) as data:
        arrays = {name: torch.from_numpy(np.ascontiguousarray(data[name]).reshape(data[name].shape)) for name in data}
    return meta, arrays


def tolerance(meta: Meta, output: str) -> tuple[float, float]:
    """(rtol, atol) of one output.

    A case states tolerances as one number, as a mapping per output (with or without ``out_``),
    or in an entry per output under ``outputs``. The most specific one wins.
    """
    names = (output, output.removeprefix("out_"), f"out_{output}")
    rtol, atol = meta.get("rtol", 1e-4), meta.get("atol", 1e-5)
    if isinstance(atol, Mapping):
        atol = next((atol[name] for name in names if name in atol), 1e-5)
    outputs = meta.get("outputs")
    if isinstance(outputs, Mapping):
        entry = next((outputs[name] for name in names if name in outputs), None)
        if isinstance(entry, Mapping):
            rtol, atol = entry.get("rtol", rtol), entry.get("atol", atol)
    return float(rtol), float(atol)


def golden_folder() -> Path:
    """``FACELAB_GOLDEN_DIR`` (relative to the checkout when relative), else ``test_data/golden``."""
    return REPOSITORY / os.environ.get("FACELAB_GOLDEN_DIR", "test_data/golden")


def find_cases(folder: Path) -> list[str]:
    """Names ``<method>/<case>`` of all cases in ``folder``, sorted."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in folder.glob("*/*.json"))


# ---------------------------------------------------------------- adapters and plans


@dataclass(frozen=True)
class Registry:
    """What can be done with which case.

    Attributes:
        adapters: case -> adapter function.
        planned: case or method -> reason why it is not started.
        broken: adapter module -> why it could not be collected.
    """

    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    planned: Mapping[str, str] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)

    def plan(self, case: str) -> str | None:
        """The reason why a case without an adapter is skipped, if it is planned."""
        if case in self.adapters:
            return None
        return self.planned.get(case) or self.planned.get(case.split("/")[0])


def read_planned(path: Path = HERE / "planned.yaml") -> dict[str, str]:
    """``planned.yaml``: ``methods`` and ``cases`` -> reason. ValueError for an empty reason."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    planned = {**(content.get("methods") or {}), **(content.get("cases") or {})}
    empty = [name for name, reason in planned.items() if not isinstance(reason, str) or not reason.strip()]
    if empty:
        raise ValueError(f"{path.name}: every entry needs a reason, these have none: {empty}")
    return planned


def collect() -> Registry:
    """Import ``adapters/*.py`` and merge their ``ADAPTERS`` tables.

    A module that cannot be imported, has no table, or repeats a case is reported in ``broken``,
    so that one unfinished module does not hide the cases of the others.
    """
    adapters: dict[str, Adapter] = {}
    broken: dict[str, str] = {}
    for path in sorted((HERE / "adapters").glob("[!_]*.py")):
        try:
            table = importlib.import_module(f"{__package__}.adapters.{path.stem}").ADAPTERS
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported as a failing test
            broken[path.stem] = f"{type(error).__name__}: {error}"
            continue
        twice = sorted(set(table) & set(adapters))
        if twice:
            broken[path.stem] = f"these cases already have an adapter in another module: {twice}"
        adapters.update({case: adapter for case, adapter in table.items() if case not in adapters})
    return Registry(adapters, read_planned(), broken)


# ---------------------------------------------------------------- comparison


class Mismatch(AssertionError):
    """Our outputs differ from the golden ones; the message lists every difference."""


def given(*patterns: str, partly: Mapping[str, int] | None = None) -> Callable[[Adapter], Adapter]:
    """Mark an adapter whose case does not prefix its arrays: these shell patterns are inputs, the rest is expected.

    Of the arrays in ``partly`` that many leading columns are inputs: the adapter sees these, the whole is expected.
    """

    def mark(adapter: Adapter) -> Adapter:
        adapter.given = patterns  # type: ignore[attr-defined]
        adapter.partly = dict(partly or {})  # type: ignore[attr-defined]
        return adapter

    return mark


def expected_outputs(arrays: Arrays, given: Sequence[str] | None = None) -> list[str]:
    """Names of the arrays that an adapter has to return; ``given`` as in :func:`given`."""
    if given is None:
        return [name for name in arrays if name.startswith(EXPECTED_PREFIXES)]
    return [name for name in arrays if not any(fnmatch.fnmatchcase(name, pattern) for pattern in given)]


def compare(meta: Meta, arrays: Arrays, results: Mapping[str, Any], given: Sequence[str] | None = None) -> None:
    """Compare every expected output; ``given`` as in :func:`given`.

    Raises:
        Mismatch: no expected output at all, a missing one, another shape, NaN, or a value outside
            the tolerance of the case.
    """
    names = expected_outputs(arrays, given)
    problems = [] if names else ["the case has no expected output, so nothing would be compared"]
    for name in names:
        if name not in results:
            problems.append(f"{name}: the adapter did not return it (returned: {sorted(results)})")
            continue
        problem = _difference(torch.as_tensor(results[name]), arrays[name], *tolerance(meta, name))
        if problem:
            problems.append(f"{name}: {problem}")
    if problems:
        raise Mismatch("\n".join(problems))


def _difference(got: Tensor, expected: Tensor, rtol: float, atol: float) -> str | None:
    if got.shape != expected.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    got, expected = got.detach().cpu().double(), expected.double()
    if got.isnan().any():
        return f"{int(got.isnan().sum())} of {got.numel()} values are NaN"
    close = torch.isclose(got, expected, rtol=rtol, atol=atol)
    if close.all():
        return None
    worst = (got - expected).abs().max().item()
    return f"{int((~close).sum())} of {got.numel()} values differ, worst by {worst:.3g} (rtol {rtol:g}, atol {atol:g})"


def run_case(case: str, adapter: Adapter, folder: Path) -> None:
    """Run one adapter in float32 on the CPU and compare. Mismatch as in :func:`compare`."""
    meta, arrays = load_case(folder / case)
    inputs_are = getattr(adapter, "given", None)
    expected = set(expected_outputs(arrays, inputs_are))
    inputs = {name: value for name, value in arrays.items() if name not in expected}
    inputs |= {name: arrays[name][:, :columns] for name, columns in getattr(adapter, "partly", {}).items()}
    compare(meta, arrays, adapter(meta, inputs), inputs_are)
