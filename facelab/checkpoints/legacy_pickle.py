# SPDX-License-Identifier: Apache-2.0
"""Read other people's ``.pth``, ``.pt``, ``.t7`` and ``.pkl`` files without running a line of them.

:func:`read_pickle_checkpoint` opens torch's zip and older formats and plain pickles (those with source code embedded
as well) and returns a tree of dictionaries, lists, tensors on the CPU and :class:`LegacyObject`: an inert record of
class path and attributes. Only globals of an allow-list may occur, none is imported, and only the calls in
``_CALLS`` below have an effect, each of them written here. :mod:`facelab.checkpoints.legacy_modules` turns whole
modules and averages into state dicts.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from facelab.checkpoints.legacy_storages import (
    STORAGE_DTYPES,
    Budget,
    GlobalName,
    Storage,
    StreamStorages,
    ZipStorages,
    open_archive,
    refusing,
)
from facelab.checkpoints.pickle_machine import PickleMachine, Refused, check_key

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_NESTED_FILES = 3

PERSISTENT = "persistent."  # class paths of modules that were pickled together with their source text

_DTYPES = {str(d): d for d in (*STORAGE_DTYPES.values(), torch.complex64)}

# Classes that may occur; they become records. A trailing star allows what begins so.
ALLOWED_CLASSES = (
    "torch.nn.*",
    "torch_ema.ema.ExponentialMovingAverage",
    "generators.generators.*",
    "siren.siren.*",
    "discriminators.discriminators.*",
    "discriminators.sgdiscriminators.*",
    "training.*",
    "argparse.Namespace",
)
_DICT_CLASSES = ("collections.OrderedDict", "dnnlib.util.EasyDict", "dnnlib.EasyDict", "builtins.dict")


@dataclass(eq=False)
class LegacyObject:
    """An object of a foreign class: its dotted class path and its attributes. It has no behaviour.

    ``source_length``: characters of the source text that lay beside it, None if there was none. The text is dropped.
    """

    class_path: str
    state: dict[str, object] = field(default_factory=dict)
    source_length: int | None = None

    @property
    def class_name(self) -> str:
        """Last component of the class path."""
        return self.class_path.rpartition(".")[2]

    def __repr__(self) -> str:
        return f"LegacyObject({self.class_path}, {len(self.state)} attributes)"


def read_pickle_checkpoint(path: str | Path, extra_classes: Collection[str] = ()) -> object:
    """Read a foreign checkpoint into an inert tree.

    Args:
        path: torch.save file (zip format, or the one before torch 1.6), or a plain pickle.
        extra_classes: more dotted class paths to accept as inert records (``name.*`` for a whole module).

    Returns:
        dict, list, tuple, scalar, Tensor (on the CPU; parameters keep ``requires_grad``) or :class:`LegacyObject`.

    Raises:
        UserError: one line with the file and the reason: a global outside the allow-list (named), a damaged or cut
            file, sizes that the file cannot hold, something that is no checkpoint at all.
    """
    path = Path(path)
    allowed = (*ALLOWED_CLASSES, *extra_classes)
    with refusing(path), open_regular(path) as file:
        head = file.read(512)
        size = file.seek(0, 2)
        if size == 0:
            raise Refused("the file is empty; download it again")
        budget = Budget(bytes_left=2 * size + (1 << 16))
        if head.startswith(b"PK\x03\x04"):
            return _read_zip(path, size, budget, allowed)
        _check_head(head)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            return _read_stream(view, budget, allowed, 0)


def open_regular(path: Path) -> BinaryIO:
    """Open a plain file. Refused for a pipe or device, which might never end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise Refused("it is a pipe or a device, not a file; save it to a file first")
    return open(path, "rb")


def _check_head(head: bytes) -> None:
    if head.lstrip()[:1] == b"<":
        raise Refused("it is a web page, not a checkpoint; download the file itself")
    if head[:1] not in (b"\x80", b"(", b"c", b"]", b"}", b"d", b"l"):
        raise Refused(f"expected a torch or pickle file, got one that begins with {head[:8]!r}; check the path")


def _read_zip(path: Path, size: int, budget: Budget, allowed: tuple[str, ...]) -> object:
    with open_archive(path) as archive:
        names = archive.namelist()
        roots = [n[: -len("data.pkl")] for n in names if re.fullmatch(r"[^/]+/data\.pkl", n)]
        if len(roots) != 1:
            raise Refused("expected a torch archive with one data.pkl, got another zip file; unpack it first")
        if f"{roots[0]}constants.pkl" in names:
            raise Refused(
                "it is a TorchScript archive, which is code; use read_torchscript, which takes its tensors only"
            )
        reader = ZipStorages(archive, roots[0], size, budget)
        data = memoryview(reader.read("data.pkl"))
        return PickleMachine(data, CheckpointBuilder(allowed, budget, reader.load), operations=budget.operations).load()


def _read_stream(view: memoryview, budget: Budget, allowed: tuple[str, ...], depth: int) -> object:
    """A plain pickle, or torch's format before 1.6: five pickles, then the storages."""
    if depth > _MAX_NESTED_FILES:
        raise Refused("it nests files in files")
    plain = CheckpointBuilder(allowed, budget, _no_storage, depth)
    shared = budget.operations
    machine = PickleMachine(view, plain, operations=shared)
    first = machine.load()
    if type(first) is not int:
        return first
    if first != _LEGACY_MAGIC:
        raise Refused(f"its magic number is {first:#x}, not that of a torch file ({_LEGACY_MAGIC:#x})")
    protocol = PickleMachine(view, plain, machine.position, shared)
    if protocol.load() != _LEGACY_PROTOCOL:
        raise Refused(f"expected protocol {_LEGACY_PROTOCOL} of torch's old format, got another")
    system = PickleMachine(view, plain, protocol.position, shared)
    information = system.load()
    if isinstance(information, dict) and information.get("little_endian") is False:
        raise Refused("expected little-endian data, got big-endian")
    storages = StreamStorages(budget)
    body = PickleMachine(view, CheckpointBuilder(allowed, budget, storages.load, depth), system.position, shared)
    value = body.load()
    keys = PickleMachine(view, plain, body.position, shared)
    storages.fill(view, keys.load(), keys.position)
    return value.flat if isinstance(value, Storage) else value


def _no_storage(identifier: object) -> Storage:
    raise Refused("it refers to a storage, but holds none")


class CheckpointBuilder:
    """What the globals, calls and states of checkpoint pickles mean here. See :class:`pickle_machine.Builder`."""

    def __init__(
        self, allowed: tuple[str, ...], budget: Budget, load: Callable[[object], Storage], depth: int = 0
    ) -> None:
        self._allowed = allowed
        self.budget = budget
        self._load = load
        self._depth = depth

    def find_global(self, module: str, name: str) -> object:
        path = f"{module}.{name}".replace("__builtin__.", "builtins.", 1).replace("numpy._core.", "numpy.core.", 1)
        if path in _DTYPES:
            return _DTYPES[path]
        if path in _CALLS or path in _DICT_CLASSES or path in _PLAIN_NAMES or self._is_class(path):
            return GlobalName(path)
        if path.startswith(("torch.", "torch.cuda.", "torch.storage.")) and name in STORAGE_DTYPES:
            return GlobalName(path)
        raise Refused(
            f"it names the global '{path[:200]}', which is not on the allow-list of checkpoint contents; "
            "nothing of it was run, do not open it with other tools"
        )

    def call(self, function: object, arguments: tuple) -> object:
        if not isinstance(function, GlobalName):
            raise Refused(f"it calls a {type(function).__name__}")
        if function.path in _DICT_CLASSES and not arguments:
            return OrderedDict()
        handler = _CALLS.get(function.path)
        if handler is None:
            raise Refused(
                f"it calls '{function.path}', which the allow-list only accepts as a name; nothing of it was run"
            )
        try:
            return handler(self, *arguments)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            raise Refused(f"its call of '{function.path}' has unusual arguments ({str(error)[:120]})") from None

    def make(self, kind: object, arguments: tuple) -> object:
        if not isinstance(kind, GlobalName):
            raise Refused(f"it makes an object of a {type(kind).__name__}")
        if kind.path in _DICT_CLASSES:
            return OrderedDict()
        if self._is_class(kind.path):
            return LegacyObject(kind.path)
        return self.call(kind, arguments)

    def set_state(self, target: object, state: object) -> None:
        if isinstance(target, dict):  # an OrderedDict's _metadata, an EasyDict's empty state
            return
        if isinstance(target, _NumpyType):
            return
        if not isinstance(target, LegacyObject):
            raise Refused(f"it sets the state of a {type(target).__name__}")
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.budget.take_items(part)
                if any(type(key) is not str for key in part):
                    raise Refused(f"an attribute of '{target.class_path}' has a name that is no text")
                target.state.update(part)
            elif part is not None:
                raise Refused(f"the state of '{target.class_path}' is a {type(part).__name__}, not a dictionary")

    def load_persistent(self, identifier: object) -> object:
        if isinstance(identifier, tuple) and len(identifier) == 4 and identifier[0] == "module":
            return identifier[1]  # the old format writes a class with its source text: keep the name
        return self._load(identifier)

    def nested(self, data: bytes) -> object:
        """A torch stream inside a bytes object."""
        if type(data) is not bytes:
            raise Refused("it nests something that is no byte string")
        value = _read_stream(memoryview(data), self.budget, self._allowed, self._depth + 1)
        return Storage(value) if isinstance(value, Tensor) else value

    def _is_class(self, path: str) -> bool:
        return any(path == a or (a.endswith(".*") and path.startswith(a[:-1])) for a in self._allowed)


def _rebuild_tensor(
    builder: CheckpointBuilder, storage: object, offset: object, size: object, stride: object, *_: object
) -> Tensor:
    """A view of a storage, after every bound has been checked (torch itself would enlarge the storage)."""
    if not isinstance(storage, Storage):
        raise Refused("it builds a tensor on something that is no storage")
    if len(size) != len(stride) or len(size) > 16:  # type: ignore[arg-type]
        raise Refused("it has a tensor with unusual sizes or strides")
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):  # type: ignore[misc]
        raise Refused("it has a tensor with unusual sizes or strides")
    flat = storage.flat
    count, last = 1, offset
    for n, step in zip(size, stride, strict=True):  # type: ignore[call-overload]
        count *= n
        last += (n - 1) * step
    if count and last >= flat.numel():  # type: ignore[operator]
        raise Refused(f"a tensor of shape {tuple(size)} reaches outside its storage of {flat.numel()} numbers")  # type: ignore[arg-type]
    if count > flat.numel():
        builder.budget.expanded_left -= count - flat.numel()
        if builder.budget.expanded_left < 0:
            raise Refused(f"a tensor of shape {tuple(size)} claims far more numbers than the file holds")  # type: ignore[arg-type]
    if count == 0:
        if max(size) > 1 << 40:  # type: ignore[call-overload]
            raise Refused("it has an empty tensor of unusual size")
        return torch.empty(tuple(size), dtype=flat.dtype)  # type: ignore[arg-type]
    return torch.as_strided(flat, tuple(size), tuple(stride), offset)  # type: ignore[arg-type, call-overload]


def _rebuild_tensor_v3(
    builder: CheckpointBuilder, storage: object, offset: object, size: object, stride: object, grad: object, hooks: object,
    dtype: object, *_: object,
) -> Tensor:  # fmt: skip
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise Refused("it builds a tensor on something that is no storage")
    return _rebuild_tensor(builder, Storage(storage.flat.view(dtype)), offset, size, stride)


def _rebuild_parameter(
    builder: CheckpointBuilder, data: object, requires_grad: object = True, *_: object
) -> nn.Parameter:
    if not isinstance(data, Tensor):
        raise Refused("it builds a parameter on something that is no tensor")
    return nn.Parameter(data, requires_grad=bool(requires_grad) and data.is_floating_point())  # type: ignore[attr-defined]


def _persistent_object(builder: CheckpointBuilder, record: object) -> LegacyObject:
    """A module pickled together with its source text: keep class name and state, drop the source."""
    if not isinstance(record, dict) or not isinstance(record.get("state"), dict):
        raise Refused("it holds a module record without a state")
    name, kind, source = record.get("class_name"), record.get("type", "class"), record.get("module_src")
    if type(name) is not str or not re.fullmatch(r"\w{1,100}", name):
        raise Refused("it holds a module record without a class name")
    if kind != "class":
        raise Refused(f"it holds a module record of the unknown type {str(kind)[:40]!r}, expected 'class'")
    made = LegacyObject(f"{PERSISTENT}{name}", {}, len(source) if type(source) is str else None)
    builder.set_state(made, record["state"])
    return made


@dataclass(frozen=True)
class _NumpyType:
    code: str


def _numpy_type(builder: CheckpointBuilder, code: str, *_: object) -> _NumpyType:
    if code not in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"):
        raise Refused("it holds a numpy value that is no plain number")
    return _NumpyType(code)


def _numpy_scalar(builder: CheckpointBuilder, kind: _NumpyType, data: bytes) -> float | int | bool:
    formats = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "b1": "?"}
    formats |= {"u8": "Q", "u4": "I", "u2": "H", "u1": "B"}
    return struct.unpack("<" + formats[kind.code], data)[0]


def _encode(builder: CheckpointBuilder, text: str, encoding: str) -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refused("it encodes text in an unusual way")
    builder.budget.take(len(text), "a text that is encoded again and again")
    return text.encode("latin-1")


def _ordered_dict(builder: CheckpointBuilder, pairs: object = ()) -> OrderedDict:
    builder.budget.take_items(pairs)
    return OrderedDict((check_key(key), value) for key, value in pairs)  # type: ignore[union-attr]


def _set(builder: CheckpointBuilder, items: object = ()) -> set:
    builder.budget.take_items(items)
    return {check_key(item) for item in items}  # type: ignore[union-attr]


def _sizes(builder: CheckpointBuilder, sizes: object = ()) -> tuple:
    if not isinstance(sizes, (tuple, list)) or len(sizes) > 16:
        raise Refused("it has an unusual torch.Size")
    return tuple(sizes)


def _device(builder: CheckpointBuilder, kind: object = "cpu", number: object = None) -> str:
    """The device as text; tensors come to the CPU whatever it says."""
    if type(kind) is not str or type(number) not in (int, type(None)):
        raise Refused("it has an unusual torch.device")
    return kind[:20] if number is None else f"{kind[:20]}:{number}"


def _reconstruct(builder: CheckpointBuilder, kind: object, base: object, state: object) -> object:
    if base != GlobalName("builtins.object") or state is not None:
        raise Refused("it rebuilds an object of an unusual base class")
    return builder.make(kind, ())


# Every call that has an effect. Nothing else is ever called.
_CALLS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda builder, *_: {},
    "builtins.set": _set,
    "builtins.frozenset": lambda builder, items=(): frozenset(_set(builder, items)),
    "torch.device": _device,
    "torch.Size": _sizes,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch.storage._load_from_bytes": lambda builder, data: builder.nested(data),
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy.dtype": _numpy_type,
    "_codecs.encode": _encode,
    "copy_reg._reconstructor": _reconstruct,
    "copyreg._reconstructor": _reconstruct,
}
# Accepted as names (arguments of the calls above), without effect.
_PLAIN_NAMES = ("builtins.object", "builtins.list", "builtins.int", "builtins.float", "builtins.tuple")
