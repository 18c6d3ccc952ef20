# SPDX-License-Identifier: Apache-2.0
"""From inert records of foreign modules and moving averages to ordered state dicts with the original key names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from facelab.checkpoints.legacy_pickle import LegacyObject
from facelab.checkpoints.legacy_storages import printable
from facelab.errors import UserError

_MAX_MODULE_DEPTH = 64
_MAX_MODULES = 20_000  # a few records that contain each other twice would unfold without end
_MAX_TENSORS = 200_000
_MAX_GROUPS = 100  # modules and dictionaries side by side in one file
_MAX_NAME = 1000  # characters; a long key that is used again and again would cost without end
_BOOKKEEPING = ("training", "dump_patches")


@dataclass(frozen=True)
class LegacyAverage:
    """An exponential moving average as ``torch_ema`` stores it: a list in the order of the trainable parameters."""

    decay: float
    num_updates: int | None
    shadow_params: list[Tensor]


def is_module(value: object) -> bool:
    """Whether ``value`` is a record of a torch module."""
    return (
        isinstance(value, LegacyObject)
        and isinstance(value.state.get("_modules"), dict)
        and "_parameters" in value.state
    )


def walk_modules(module: LegacyObject) -> Iterator[tuple[str, LegacyObject]]:
    """Yield (dotted name, record) of a module and all below it, parents first, in order of registration.

    UserError when the record contains itself.
    """
    if not is_module(module):
        raise UserError(f"expected a pickled torch module, got {module!r}; this file holds something else")
    pending: list[tuple[str, LegacyObject, tuple[int, ...]]] = [("", module, ())]
    count = 0
    while pending:
        name, record, parents = pending.pop()
        count += 1
        if count > _MAX_MODULES:
            raise UserError(f"the file unfolds to more than {_MAX_MODULES} modules; it is not a real checkpoint")
        if id(record) in parents or len(parents) > _MAX_MODULE_DEPTH:
            raise UserError(
                printable(
                    f"module '{name[:80]}' contains itself or is nested too deeply; the file is not a real checkpoint"
                )
            )
        if len(name) > _MAX_NAME:
            raise UserError(
                printable(f"module '{name[:80]}...' has a name of {len(name)} characters; it is not a real checkpoint")
            )
        yield name, record
        children = [(f"{name}.{key}".lstrip("."), child) for key, child in _table(record, "_modules").items()]
        below = [(key, child) for key, child in children if isinstance(child, LegacyObject) and is_module(child)]
        pending += [(key, child, (*parents, id(record))) for key, child in reversed(below)]


def module_state(module: LegacyObject, buffers: bool = True) -> OrderedDict[str, Tensor]:
    """State dict of a module record, key names and order as ``state_dict()`` of the original would give them."""
    state: OrderedDict[str, Tensor] = OrderedDict()
    looked_at = 0
    for name, record in walk_modules(module):
        skipped = record.state.get("_non_persistent_buffers_set")
        skipped = skipped if isinstance(skipped, (set, frozenset, list, tuple)) else ()
        for kind in ("_parameters", "_buffers") if buffers else ("_parameters",):
            table = _table(record, kind)
            looked_at += len(table)
            if looked_at > _MAX_TENSORS or any(len(key) > _MAX_NAME for key in table):
                raise UserError(
                    printable(f"module '{name[:80]}' has too many or too long names; it is not a real checkpoint")
                )
            for key, tensor in table.items():
                if isinstance(tensor, Tensor) and not (kind == "_buffers" and key in skipped):
                    state[f"{name}.{key}".lstrip(".")] = tensor.detach()
    return state


def _table(record: LegacyObject, kind: str) -> dict[str, object]:
    """The parameters or buffers of a record. UserError if they are no dictionary with names."""
    table = record.state.get(kind) or {}
    if not isinstance(table, dict) or any(type(key) is not str for key in table):
        raise UserError(
            printable(f"the {kind.strip('_')} of {record!r} have no names; the file is not a real checkpoint")
        )
    return table


def trainable_state(module: LegacyObject) -> OrderedDict[str, Tensor]:
    """The parameters that require gradients, a shared one once: what a moving average lists, in its order."""
    state: OrderedDict[str, Tensor] = OrderedDict()
    seen: set[int] = set()
    for name, record in walk_modules(module):
        for key, tensor in _table(record, "_parameters").items():
            if isinstance(tensor, Tensor) and tensor.requires_grad and id(tensor) not in seen:
                seen.add(id(tensor))
                state[f"{name}.{key}".lstrip(".")] = tensor.detach()
    return state


def module_classes(module: LegacyObject) -> dict[str, str]:
    """Dotted name -> class path, the root under ''."""
    return {name: record.class_path for name, record in walk_modules(module)}


def attributes(record: LegacyObject) -> dict[str, object]:
    """Attributes a program would set itself (step, epoch, z_dim ...): scalars, text, tensors, flat lists of scalars."""

    def simple(value: object) -> bool:
        if value is None or isinstance(value, (bool, int, float, str, Tensor)):
            return True
        return isinstance(value, (list, tuple)) and all(isinstance(v, (bool, int, float, str)) for v in value)

    return {
        key: value.detach() if isinstance(value, Tensor) else value  # type: ignore[attr-defined]
        for key, value in record.state.items()
        if not key.startswith("_") and key not in _BOOKKEEPING and simple(value)
    }


def find_average(tree: object) -> LegacyAverage | None:
    """The moving average that a file holds as a whole object or as its state dict; None if it is something else."""
    table = tree.state if isinstance(tree, LegacyObject) else tree
    if not isinstance(table, dict) or not isinstance(table.get("shadow_params"), (list, tuple)):
        return None
    shadow = list(table["shadow_params"])
    if not shadow or not all(isinstance(tensor, Tensor) for tensor in shadow):
        raise UserError("the moving average holds no list of tensors; expected shadow_params as torch_ema writes them")
    decay, updates = table.get("decay"), table.get("num_updates")
    return LegacyAverage(
        float(decay) if isinstance(decay, (int, float)) else float("nan"),
        updates if isinstance(updates, int) else None,
        [tensor.detach() for tensor in shadow],
    )


def zip_ema(state_dict: Mapping[str, Tensor], shadow_params: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
    """Give the averaged tensors the names of ``state_dict``, whose order they follow.

    Raises:
        UserError: another number of tensors, or a shape that differs (the first one is named).
    """
    if len(state_dict) != len(shadow_params):
        raise UserError(
            f"the moving average does not belong to this model: expected {len(state_dict)} tensors, got {len(shadow_params)}; "
            "take the ema file saved with the generator"
        )
    for number, ((name, tensor), shadow) in enumerate(zip(state_dict.items(), shadow_params, strict=True)):
        if tensor.shape != shadow.shape:
            raise UserError(
                f"the moving average does not belong to this model: tensor {number} is '{name}' of shape {tuple(tensor.shape)}, "
                f"got {tuple(shadow.shape)}; take the ema file saved with the generator"
            )
    return OrderedDict(zip(state_dict, (tensor.detach() for tensor in shadow_params), strict=True))


def find_state_dicts(tree: object) -> dict[str, OrderedDict[str, Tensor]]:
    """State dicts in a file, by the key they stand under ('' for the file itself): modules and dictionaries of tensors."""
    whole = _as_state_dict(tree)
    if whole:
        return {"": whole}
    if not isinstance(tree, dict):
        return {}
    groups = {
        key: value for key, value in tree.items() if type(key) is str and (is_module(value) or isinstance(value, dict))
    }
    if len(groups) > _MAX_GROUPS:  # no checkpoint, and looking into each could take long
        return {}
    parts = {key: _as_state_dict(value) for key, value in groups.items()}
    return {key: value for key, value in parts.items() if value}


def _as_state_dict(value: object) -> OrderedDict[str, Tensor] | None:
    if is_module(value):
        return module_state(value)  # type: ignore[arg-type]
    if isinstance(value, dict) and value:
        tensors = OrderedDict((k, v.detach()) for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor))
        return tensors if 2 * len(tensors) > len(value) else None
    return None
