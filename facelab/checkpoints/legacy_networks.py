# SPDX-License-Identifier: Apache-2.0
"""Network pickles of the StyleGAN family: a dictionary of G, D, G_ema, training_set_kwargs and augment_pipe.

Each module in such a file is a record of class name, the source text of the module that defines the class, and the
instance's attributes. The original runs that text when it loads the file. Here the text is dropped while reading (see
:mod:`facelab.checkpoints.legacy_pickle`); what remains are tensors, constructor arguments and plain settings.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from facelab.checkpoints.legacy_modules import is_module, module_state, walk_modules
from facelab.checkpoints.legacy_pickle import LegacyObject, read_pickle_checkpoint
from facelab.checkpoints.legacy_storages import printable
from facelab.errors import UserError

NETWORKS = ("G", "D", "G_ema", "augment_pipe")
_MAX_PLAIN = 10_000  # settings of one network
_MAX_PLAIN_DEPTH = 12
_MAX_TEXT = 10_000
_MAX_NAME = 200
_MAX_LISTED = 256  # numbers of a tensor among the settings
_OMIT = object()


@dataclass(frozen=True)
class Network:
    """One module of a network pickle, without behaviour.

    Attributes:
        class_name: class in the original, without its module.
        state: original key -> tensor (CPU), as ``state_dict()`` of the original would give it.
        init_args: positional constructor arguments.
        init_kwargs: keyword arguments of the constructor, nested dictionaries included.
        attributes: plain attributes of the instance (numbers, text, lists, dictionaries), which may differ from
            ``init_kwargs`` because training changes them.
        classes: dotted name -> class name of every module below, the network itself under ''.
        omitted: dotted names of settings that are no plain values and were left out.
    """

    class_name: str
    state: OrderedDict[str, Tensor]
    init_args: tuple[object, ...] = ()
    init_kwargs: dict[str, object] = field(default_factory=dict)
    attributes: dict[str, object] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    omitted: tuple[str, ...] = ()

    @property
    def numbers(self) -> int:
        """How many numbers the tensors hold."""
        return sum(tensor.numel() for tensor in self.state.values())


@dataclass(frozen=True)
class NetworkPickle:
    """What a network pickle holds.

    Attributes:
        path: the file.
        networks: those of :data:`NETWORKS` that are there.
        training_set: arguments of the training set, None if the file has none.
        sources: class name -> characters of the source text that lay beside it, which was neither kept nor run.
        others: further top-level keys, ignored.
    """

    path: Path
    networks: dict[str, Network]
    training_set: dict[str, object] | None = None
    sources: dict[str, int] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What was found, for people: one printable line each."""
        found = [
            f"{self.path.name}: {name} is a {network.class_name} of {len(network.state)} tensors, "
            f"{network.numbers / 1e6:.2f} million numbers"
            + (f"; left out: {', '.join(network.omitted[:5])}" if network.omitted else "")
            for name, network in self.networks.items()
        ]
        missing = [name for name in NETWORKS if name not in self.networks]
        if missing:
            found.append(f"not in the file: {', '.join(missing)}")
        if self.training_set is not None:
            settings = ", ".join(f"{key} {value}" for key, value in self.training_set.items())
            found.append(f"training set: {settings[:500]}")
        if self.sources:
            names = ", ".join(f"{name} ({length})" for name, length in sorted(self.sources.items()))
            found.append(
                f"source text of {len(self.sources)} classes was skipped, not run (characters): {names[:1000]}"
            )
        if self.others:
            found.append(f"ignored: {', '.join(self.others)[:500]}")
        return [printable(line) for line in found]


def read_network_pickle(path: str | Path) -> NetworkPickle:
    """Read a network pickle without running or importing anything of it.

    Raises:
        UserError: refused (a global outside the allow-list, named), damaged or cut, or no network pickle; one line.
    """
    return networks_of(Path(path), read_pickle_checkpoint(path))


def is_network_tree(tree: object) -> bool:
    """Whether what :func:`read_pickle_checkpoint` returned is a dictionary of networks (or of empty places for them)."""
    if not isinstance(tree, dict):
        return False
    found = [tree[name] for name in NETWORKS if name in tree]
    return bool(found) and all(value is None or is_module(value) for value in found)


def networks_of(path: Path, tree: object) -> NetworkPickle:
    """The same as :func:`read_network_pickle` for a file that has been read already."""
    if not isinstance(tree, dict) or not any(name in tree for name in NETWORKS):
        got = (
            f"a dictionary of {', '.join(map(str, list(tree)[:5]))}" if isinstance(tree, dict) else type(tree).__name__
        )
        raise UserError(
            printable(
                f"{path}: expected a pickled dictionary with {', '.join(NETWORKS[:3])}, got {got[:200]}; check the file"
            )
        )
    sources: dict[str, int] = {}
    networks = {}
    for name in NETWORKS:
        if tree.get(name) is None:
            continue
        if not is_module(tree[name]):
            raise UserError(printable(f"{path}: expected '{name}' to be a network, got {type(tree[name]).__name__}"))
        networks[name] = _network(path, name, tree[name], sources)
    if not networks:
        raise UserError(f"{path}: {', '.join(NETWORKS)} are all empty; check the file")
    training_set = tree.get("training_set_kwargs")
    with _naming(path, "training_set_kwargs"):
        plain, _ = plain_settings(training_set) if isinstance(training_set, dict) else (None, ())
    others = tuple(str(key)[:80] for key in tree if key not in (*NETWORKS, "training_set_kwargs"))
    return NetworkPickle(path, networks, plain, sources, others[:20])


def _network(path: Path, name: str, record: LegacyObject, sources: dict[str, int]) -> Network:
    classes = {}
    attributes = {key: v for key, v in record.state.items() if not key.startswith("_") and key != "training"}
    positional = record.state.get("_init_args")
    with _naming(path, name):
        for key, module in walk_modules(record):
            classes[key] = module.class_name
            if module.source_length is not None:
                sources[module.class_name] = module.source_length
        state = module_state(record)
        kwargs, omitted = plain_settings(record.state.get("_init_kwargs"))
        values, more = plain_settings(attributes)
        arguments, _ = plain_settings(dict(_numbered(positional)) if isinstance(positional, tuple) else {})
    left_out = tuple(dict.fromkeys((*omitted, *more)))
    return Network(record.class_name, state, tuple(arguments.values()), kwargs, values, classes, left_out)


def _numbered(values: tuple[object, ...]) -> Iterator[tuple[str, object]]:
    return ((str(number), value) for number, value in enumerate(values))


@contextlib.contextmanager
def _naming(path: Path, name: str) -> Iterator[None]:
    """Put the file and the part of it in front of a message."""
    try:
        yield
    except UserError as error:
        raise UserError(printable(f"{path}: '{name}': {error}")) from None


def plain_settings(value: object) -> tuple[dict[str, object], tuple[str, ...]]:
    """Nested dictionaries, lists and scalars as plain Python data, and the dotted names of all that is something else.

    Tuples become lists and small tensors lists of numbers. Anything but a dictionary gives an empty one. Bounded:
    at most some thousand values, and no deeper than a dozen levels.
    """
    omitted: list[str] = []
    count = 0

    def convert(item: object, name: str, depth: int) -> object:
        nonlocal count
        count += 1
        if count > _MAX_PLAIN or depth > _MAX_PLAIN_DEPTH:
            raise UserError(
                f"the settings of a network unfold to more than {_MAX_PLAIN} values; it is no real checkpoint"
            )
        if item is None or isinstance(item, (bool, int)):
            return item
        if isinstance(item, float):
            return item if math.isfinite(item) else str(item)  # JSON knows no infinity
        if isinstance(item, str) and len(item) <= _MAX_TEXT:
            return item
        if isinstance(item, Tensor) and item.numel() <= _MAX_LISTED:
            return item.detach().tolist()
        if isinstance(item, Mapping):
            if any(type(key) is str and len(key) > _MAX_NAME for key in item):
                raise UserError(f"a setting has a name of more than {_MAX_NAME} characters; it is no real checkpoint")
            made = {key: convert(v, f"{name}.{key}", depth + 1) for key, v in item.items() if type(key) is str}
            return {key: v for key, v in made.items() if v is not _OMIT}
        if isinstance(item, (list, tuple)):
            listed = [convert(v, f"{name}.{i}", depth + 1) for i, v in enumerate(item)]
            return [v for v in listed if v is not _OMIT]
        omitted.append(printable(name[1:80]))
        return _OMIT

    if not isinstance(value, Mapping):
        return {}, ()
    return convert(value, "", 0), tuple(omitted)  # type: ignore[return-value]
