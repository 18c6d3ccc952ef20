# SPDX-License-Identifier: Apache-2.0
"""The second stage starts from the first: its renderer comes from a run, a converted model or an official file.

CNeRF's stages use the same checks with architectures of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from facelab import assets
from facelab.checkpoints.format import INDEX, load_checkpoint
from facelab.config import from_dict
from facelab.errors import UserError
from facelab.training.protocol import Models

BEST = ("ema", "generator")  # groups of weights, the averaged one first


@dataclass(frozen=True)
class Stored:
    """A generator from a file.

    Attributes:
        path: as the user named it.
        config: the whole configuration, at the step where the model stands.
        weights: of the averaged generator, or of the trained one where there is no average; our names.
        foreign: from a file of the authors, which tells sizes of networks and neither cameras nor renderings.
    """

    path: Path
    config: Any
    weights: Mapping[str, Tensor]
    foreign: bool = False

    def told(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of these dotted settings that the file tells."""
        return tuple(name for name in names if not self.foreign or name.startswith("model."))


def open_stored(
    path: str | Path, method: str, config_type: type, read_original: Callable[[Path], Any], groups: Sequence[str] = BEST
) -> Stored:
    """Open a run, a checkpoint, a converted or bundled model, or a file of the authors.

    Args:
        method: whose model it must be.
        config_type: its configuration.
        read_original: reads the authors' files: ``.config`` and ``.weights``.
        groups: of weights, the first that is there is taken.

    Raises:
        UserError: nothing there, unreadable, of another method, or without a generator.
    """
    found = Path(path)
    if not found.exists():
        found = assets.find_bundled(str(path)) or found
    if not found.exists():
        raise UserError(
            f"nothing at {path}, expected a run, a model or an official file to start from; train one with --stage volume, "
            "or name another with --init-from"
        )
    foreign = found.is_file() and found.suffix != ".safetensors" and found.name != INDEX
    if foreign:
        original = read_original(found)
        config, weights = original.config, original.weights
    else:
        checkpoint = load_checkpoint(found, with_state=False)
        meta: Any = checkpoint.meta
        if meta.get("method") != method:
            raise UserError(f"{path} is a {meta.get('method')} model, expected one of {method}")
        staged = from_dict(config_type, meta["config"], where=f"{path}: its configuration")
        config = staged.at(checkpoint.step, int(meta.get("images") or 0))
        foreign = "origin" in meta  # converted
        weights = checkpoint.weights
    name = next((group for group in groups if group in weights), None)
    if name is None:
        raise UserError(
            f"{path} holds no generator to start from, it has {', '.join(sorted(weights)) or 'nothing'}; take the run of a "
            "first stage"
        )
    return Stored(Path(path), config, weights[name], foreign)


def check_same(path: str | Path, stored: Any, wanted: Any, names: Sequence[str]) -> None:
    """UserError names the first setting in which the first stage differs from what the second one is told.

    Args:
        stored, wanted: configurations.
        names: dotted settings, see :meth:`Stored.told`.
    """
    for name in names:
        theirs, ours = _at(stored, name), _at(wanted, name)
        if theirs != ours:
            raise UserError(
                f"the first stage {path} does not fit: its {name} is {theirs}, this run has {ours}; take another file "
                f"or --set {name}={theirs}"
            )


def fill_renderer(generator: Any, stored: Stored, own: Callable[[str], bool]) -> None:
    """Load the first stage's weights.

    Args:
        generator: of the second stage.
        own: name of a tensor -> it belongs to the second stage and keeps its first value.

    Raises:
        UserError: tensors are missing or of another shape.
    """
    mine = generator.state_dict()
    wanted = {key: value for key, value in mine.items() if not own(key)}
    for key, value in wanted.items():
        given = stored.weights.get(key)
        if given is None or given.shape != value.shape:
            got = "none" if given is None else tuple(given.shape)
            raise UserError(
                f"{stored.path} does not fit: '{key}' must be {tuple(value.shape)}, got {got}; take another checkpoint of the "
                "first stage, or the model settings that it has"
            )
    generator.load_state_dict({**mine, **{key: stored.weights[key].to(mine[key]) for key in wanted}})
    generator.forget_averages()


def filler(open_file: Callable[[], Stored], own: Callable[[str], bool]) -> Callable[[Models], None]:
    """What a :class:`~facelab.training.protocol.TrainStage` of the second stage calls once."""
    return lambda models: fill_renderer(models["generator"], open_file(), own)


def _at(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part) if dataclasses.is_dataclass(config) else config[part]
    return config
