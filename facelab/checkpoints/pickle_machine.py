# SPDX-License-Identifier: Apache-2.0
"""A pickle interpreter that builds data and calls nothing.

Python's own unpickler imports and calls whatever a file names, allocates what a file claims and hashes what a file
nests. This one knows the opcodes that checkpoints use and hands the three that reach outside (global, call, state) to
a :class:`Builder`; every length is checked against the bytes that are there, and a whole file has a limited number of
operations, so that memory is bounded by the file's size and time by less than a second.

The limit is far above what is needed: network pickles of StyleGAN and EG3D have fewer than 200 000 opcodes, most of
which count as one operation. An opcode counts for more where it takes longer: what makes a container counts
eight times (Python's memory management looks at it, too, and so does :func:`check_depth`).
"""

from __future__ import annotations

import codecs
import pickle
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

MAX_OPERATIONS = 1_000_000  # a small network pickle with all its modules has 150 thousand
MAX_DEPTH = 200  # nesting of the result
_REACHES = (256, 1024, 4096, 1 << 14, 1 << 16)  # bytes looked at for the end of a line of text
_MAX_INTEGER_BYTES = 64
_NUMBERS = {code: struct.Struct("<" + code) for code in "iHIQ"}
_FLOAT = struct.Struct(">d")
_MAX_KEY = 1 << 60  # integers below this hash to themselves: no crafted collisions


class Refused(Exception):
    """Why a file is not read; the caller adds the file's name."""


@dataclass
class Operations:
    """What is left for one file, pickles inside its byte strings included."""

    left: int = MAX_OPERATIONS


class Builder(Protocol):
    """What the interpreter asks for; every method may raise :class:`Refused`."""

    def find_global(self, module: str, name: str) -> object:
        """An inert stand-in for ``module.name``."""

    def call(self, function: object, arguments: tuple) -> object:
        """The value of a REDUCE opcode."""

    def make(self, kind: object, arguments: tuple) -> object:
        """An object without state, of a class stand-in (NEWOBJ)."""

    def set_state(self, target: object, state: object) -> None:
        """Give an object its state (BUILD)."""

    def load_persistent(self, identifier: object) -> object:
        """The storage behind a persistent id."""


class PickleMachine:
    """Interpret one pickle in ``data`` from ``position`` on; ``position`` is behind it afterwards.

    ``operations`` is shared between the pickles of one file.
    """

    def __init__(
        self, data: memoryview, builder: Builder, position: int = 0, operations: Operations | None = None
    ) -> None:
        self.data = data
        self.position = position
        self._operations = operations or Operations()
        self._builder = builder
        self._memo: dict[int, object] = {}
        self._stack: list = []
        self._marks: list[list] = []

    def load(self) -> object:
        """Run until STOP and return the object. Refused on anything unusual."""
        start = self.position
        try:
            value = self._run()
        except Refused:
            raise
        except (IndexError, KeyError, TypeError, ValueError, struct.error, OverflowError, AttributeError) as error:
            raise Refused(f"it is not a well-formed pickle (byte {self.position - start}: {error})") from error
        check_depth(value)
        return value

    def _run(self) -> object:
        operations, data, size = self._operations, self.data, len(self.data)
        while operations.left > 0:
            if self.position >= size:
                raise Refused(f"the file is cut off: its pickle does not end within {size} bytes; download it again")
            opcode = data[self.position]
            self.position += 1
            if opcode == _STOP:
                return self._stack.pop()
            handler = _HANDLERS[opcode]
            if handler is None:
                raise Refused(f"it uses pickle opcode {bytes([opcode])!r}, which checkpoints do not need")
            operations.left -= _COSTS[opcode]
            handler(self)
        raise Refused(f"it needs more than {MAX_OPERATIONS} pickle operations, which no checkpoint does")

    # Reading

    def _read(self, count: int) -> memoryview:
        end = self.position + count
        if count < 0 or end > len(self.data):
            raise Refused(
                f"the file is cut off: it claims {count} more bytes at byte {self.position} of {len(self.data)}; "
                "download it again"
            )
        chunk = self.data[self.position : end]
        self.position = end
        return chunk

    def _byte(self) -> int:
        return self._read(1)[0]

    def _number(self, code: str) -> int:
        form = _NUMBERS[code]
        return form.unpack(self._read(form.size))[0]

    def _line(self) -> str:
        for reach in _REACHES:  # nearly every line is short
            window = bytes(self.data[self.position : self.position + reach])
            end = window.find(b"\n")
            if end >= 0:
                self.position += end + 1
                return window[:end].decode("utf-8", "backslashreplace")
        raise Refused("the file is cut off or holds a line of text that is too long")

    # Stack

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _items(self) -> list:
        """Pop everything above the last mark."""
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def _mark(self) -> None:
        if len(self._marks) > 10_000:
            raise Refused(f"it is nested deeper than {MAX_DEPTH} levels")
        self._marks.append(self._stack)
        self._stack = []

    # Opcodes with more than one line

    def _binary_integer(self, length: int) -> None:
        if length > _MAX_INTEGER_BYTES:
            raise Refused(f"it holds an integer of {length} bytes")
        self._push(int.from_bytes(self._read(length), "little", signed=True))

    def _text_integer(self) -> None:
        text = self._line().rstrip("L")
        if len(text) > 2 * _MAX_INTEGER_BYTES:
            raise Refused(f"it holds an integer of {len(text)} digits")
        self._push({"00": False, "01": True}[text] if text in ("00", "01") else int(text))

    def _quoted_text(self) -> None:
        line = self._line()
        if len(line) < 2 or line[0] != line[-1] or line[0] not in "'\"":
            raise ValueError("text without quotes")
        self._push(codecs.decode(line[1:-1].encode("latin-1"), "unicode_escape"))

    def _old_text(self, length: int) -> None:
        """Python 2 text: ASCII as a rule, any byte as Latin-1."""
        self._push(bytes(self._read(length)).decode("latin-1"))

    def _text(self, length: int) -> None:
        self._push(bytes(self._read(length)).decode("utf-8", "surrogatepass"))

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise ValueError("too few values for a tuple")
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._push(items)

    def _set_item(self, target: object, key: object, value: object) -> None:
        if not isinstance(target, dict):
            raise Refused(f"it sets items of a {type(target).__name__}")
        target[check_key(key)] = value

    def _set_items(self, items: list, target: object) -> None:
        if len(items) % 2:
            raise ValueError("a key without a value")
        for i in range(0, len(items), 2):
            self._set_item(target, items[i], items[i + 1])

    def _set_one(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_item(self._stack[-1], key, value)

    def _append(self, items: list) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise Refused(f"it appends to a {type(target).__name__}")
        target.extend(items)

    def _add(self, items: list) -> None:
        target = self._stack[-1]
        if type(target) is not set:
            raise Refused(f"it adds to a {type(target).__name__}")
        target.update(check_key(item) for item in items)

    def _global_by_stack(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("a global whose name is no text")
        self._push(self._builder.find_global(module, name))

    def _instance(self) -> None:
        """INST: the oldest way to write an object, a class name with arguments on the stack."""
        kind = self._builder.find_global(self._line(), self._line())
        self._push(self._builder.make(kind, tuple(self._items())))

    def _old_object(self) -> None:
        kind, *arguments = self._items()
        self._push(self._builder.make(kind, tuple(arguments)))

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(arguments) is not tuple:
            raise ValueError("a call without an argument tuple")
        self._push(self._builder.call(function, arguments))

    def _new_object(self) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        if type(arguments) is not tuple:
            raise ValueError("an object without an argument tuple")
        self._push(self._builder.make(kind, arguments))

    def _build(self) -> None:
        state = self._stack.pop()
        self._builder.set_state(self._stack[-1], state)

    def _proto(self) -> None:
        version = self._byte()
        if version > 5:
            raise Refused(f"it is not a pickle that can be read: expected protocol 0 to 5, got {version}")


def check_key(key: object) -> object:
    """Return a dictionary key or set element, or refuse it: nested keys cost exponential time to hash."""
    if key is None or type(key) in (str, bytes, bool):
        return key
    if type(key) is int and -_MAX_KEY < key < _MAX_KEY:
        return key
    raise Refused(f"it uses a {type(key).__name__} as a dictionary key or set element")


def check_depth(value: object) -> None:
    """Refuse a result nested deeper than :data:`MAX_DEPTH`; without recursion, each container looked at once.

    The depth is that of the longest way down, where what contains itself is not followed a second time.
    """
    heights: dict[int, int] = {}  # finished containers; 0 while one is still open
    pending: list[tuple[object, Iterable | None]] = [(value, None)]
    way_down = 0
    while pending:
        item, children = pending.pop()
        if children is None:
            children = _children(item)
            if children is None or id(item) in heights:
                continue
            if way_down > MAX_DEPTH:
                raise Refused(f"it is nested deeper than {MAX_DEPTH} levels")
            heights[id(item)] = 0
            way_down += 1
            pending.append((item, children))
            below = {id(child): child for child in children if _children(child) is not None}
            pending.extend((child, None) for child in below.values())
            continue
        way_down -= 1
        heights[id(item)] = 1 + max((heights.get(id(child), 0) for child in children), default=0)
        if heights[id(item)] > MAX_DEPTH + 1:
            raise Refused(f"it is nested deeper than {MAX_DEPTH} levels")


def _children(item: object) -> Iterable | None:
    """What a container or record holds; None for anything else."""
    if isinstance(item, dict):
        return item.values()
    if isinstance(item, (list, tuple, set, frozenset)):
        return item
    state = getattr(item, "state", None)
    return state.values() if type(state) is dict else None


def _handlers() -> list[Callable[[PickleMachine], object] | None]:
    """For each of the 256 opcodes the action on a machine ``m``, or None."""
    p = pickle
    table: dict[bytes, Callable[[PickleMachine], object]] = {
        p.PROTO: lambda m: m._proto(),
        p.FRAME: lambda m: m._read(8),
        p.MARK: lambda m: m._mark(),
        p.POP: lambda m: m._stack.pop() if m._stack else m._items(),
        p.POP_MARK: lambda m: m._items(),
        p.DUP: lambda m: m._push(m._stack[-1]),
        p.NONE: lambda m: m._push(None),
        p.NEWTRUE: lambda m: m._push(True),
        p.NEWFALSE: lambda m: m._push(False),
        p.INT: lambda m: m._text_integer(),
        p.LONG: lambda m: m._text_integer(),
        p.BININT: lambda m: m._push(m._number("i")),
        p.BININT1: lambda m: m._push(m._byte()),
        p.BININT2: lambda m: m._push(m._number("H")),
        p.LONG1: lambda m: m._binary_integer(m._byte()),
        p.LONG4: lambda m: m._binary_integer(m._number("i")),
        p.FLOAT: lambda m: m._push(float(m._line())),
        p.BINFLOAT: lambda m: m._push(_FLOAT.unpack(m._read(8))[0]),
        p.STRING: lambda m: m._quoted_text(),
        p.BINSTRING: lambda m: m._old_text(m._number("i")),
        p.SHORT_BINSTRING: lambda m: m._old_text(m._byte()),
        p.UNICODE: lambda m: m._push(codecs.decode(m._line().encode(), "raw_unicode_escape")),
        p.SHORT_BINUNICODE: lambda m: m._text(m._byte()),
        p.BINUNICODE: lambda m: m._text(m._number("I")),
        p.BINUNICODE8: lambda m: m._text(m._number("Q")),
        p.SHORT_BINBYTES: lambda m: m._push(bytes(m._read(m._byte()))),
        p.BINBYTES: lambda m: m._push(bytes(m._read(m._number("I")))),
        p.BINBYTES8: lambda m: m._push(bytes(m._read(m._number("Q")))),
        p.BYTEARRAY8: lambda m: m._push(bytes(m._read(m._number("Q")))),
        p.EMPTY_DICT: lambda m: m._push({}),
        p.EMPTY_LIST: lambda m: m._push([]),
        p.EMPTY_SET: lambda m: m._push(set()),
        p.EMPTY_TUPLE: lambda m: m._push(()),
        p.TUPLE1: lambda m: m._tuple(1),
        p.TUPLE2: lambda m: m._tuple(2),
        p.TUPLE3: lambda m: m._tuple(3),
        p.TUPLE: lambda m: m._push(tuple(m._items())),
        p.LIST: lambda m: m._push(m._items()),
        p.DICT: lambda m: (items := m._items(), m._push({}), m._set_items(items, m._stack[-1])),
        p.FROZENSET: lambda m: m._push(frozenset(check_key(item) for item in m._items())),
        p.APPEND: lambda m: m._append([m._stack.pop()]),
        p.APPENDS: lambda m: m._append(m._items()),
        p.SETITEM: lambda m: m._set_one(),
        p.SETITEMS: lambda m: m._set_items(m._items(), m._stack[-1]),
        p.ADDITEMS: lambda m: m._add(m._items()),
        p.GET: lambda m: m._push(m._memo[int(m._line())]),
        p.BINGET: lambda m: m._push(m._memo[m._byte()]),
        p.LONG_BINGET: lambda m: m._push(m._memo[m._number("I")]),
        p.PUT: lambda m: m._memo.__setitem__(int(m._line()), m._stack[-1]),
        p.BINPUT: lambda m: m._memo.__setitem__(m._byte(), m._stack[-1]),
        p.LONG_BINPUT: lambda m: m._memo.__setitem__(m._number("I"), m._stack[-1]),
        p.MEMOIZE: lambda m: m._memo.__setitem__(len(m._memo), m._stack[-1]),
        p.GLOBAL: lambda m: m._push(m._builder.find_global(m._line(), m._line())),
        p.STACK_GLOBAL: lambda m: m._global_by_stack(),
        p.INST: lambda m: m._instance(),
        p.OBJ: lambda m: m._old_object(),
        p.REDUCE: lambda m: m._reduce(),
        p.NEWOBJ: lambda m: m._new_object(),
        p.BUILD: lambda m: m._build(),
        p.BINPERSID: lambda m: m._push(m._builder.load_persistent(m._stack.pop())),
    }
    return [table.get(bytes([opcode])) for opcode in range(256)]


def _costs() -> list[int]:
    """For each opcode the operations it counts as."""
    p = pickle
    slower = {
        2: (p.LONG1, p.SHORT_BINBYTES, p.SHORT_BINSTRING, p.SHORT_BINUNICODE),
        3: (p.INT, p.LONG, p.FLOAT, p.STRING, p.UNICODE, p.GET, p.PUT),  # lines of text
        4: (p.BUILD, p.GLOBAL, p.STACK_GLOBAL),
        8: (p.TUPLE, p.TUPLE1, p.TUPLE2, p.TUPLE3, p.LIST, p.DICT, p.EMPTY_DICT, p.EMPTY_LIST),
        10: (p.REDUCE, p.NEWOBJ, p.OBJ, p.INST, p.BINPERSID),
        12: (p.EMPTY_SET, p.FROZENSET),
    }
    costs = {opcode[0]: cost for cost, opcodes in slower.items() for opcode in opcodes}
    return [costs.get(opcode, 1) for opcode in range(256)]


_HANDLERS, _COSTS = _handlers(), _costs()
_STOP = pickle.STOP[0]
