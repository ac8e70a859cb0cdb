"""A pickle reader that builds containers, numbers and strings, and looks up every class or function in a table.

Python's own unpickler imports and calls whatever a file names. This one never imports or calls: a name not in the
caller's table becomes an inert object that only stores its arguments, and a name that attacks use stops the reading.
There is no recursion, and a budget of steps proportional to the file size bounds time and memory. Supported are the
operations that Python's pickler emits for protocols 2 to 5 (described in the library's pickletools); those of protocols
0 and 1, of extensions and of buffers outside the pickle are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .file_bytes import Source, shown

MAX_STEPS = 150_000  # a checkpoint of large with its optimizer and an average of its weights takes 90,000
MAX_PICKLE = 32 << 20
MAX_INTEGER = 128
KEYS = (str, int, float, bool, bytes, type(None))
BYTES_PER_STEP = 16  # of the file: each 16 bytes allow a step beyond MAX_STEPS
MAX_KEY = 64  # values in a tuple used as a key


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names; it is never imported."""

    name: str


@dataclass(eq=False, repr=False)
class Inert:
    """An object of a class without its code: the class's name, the arguments, the attributes and the items."""

    name: str
    state: dict[Any, Any] = field(default_factory=dict)
    arguments: tuple[Any, ...] = ()
    items: list[Any] = field(default_factory=list)  # appended by the pickle or, as pairs, set by key

    def __repr__(self) -> str:
        return f"<{self.name}>"  # its content may be cyclic


class Machine:
    """Reads one pickle at `position` of the source's bytes and moves `position` past its end.

    `call(name, arguments, machine)` builds the object that calling `name` stands for; `allowed(name)` says which names
    may occur.  `load(identity)` returns an object that is stored outside the pickle.
    """

    def __init__(
        self,
        source: Source,
        data: memoryview,
        allowed: Callable[[str], bool],
        call: Callable[[str, tuple[Any, ...], Machine], Any],
        load: Callable[[Any], Any],
        position: int = 0,
        budget: int = MAX_STEPS,
    ) -> None:
        self.source, self.data, self.position = source, data, position
        self.limit = min(len(data), position + MAX_PICKLE)
        self.allowed, self.call, self.load = allowed, call, load
        self.steps, self.budget = 0, budget + source.size // BYTES_PER_STEP
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The object of the pickle. Raises CheckpointError for anything that is not data."""
        while True:
            if self.position >= self.limit:
                self.take(1)
            code = self.data[self.position]
            self.position += 1
            self.steps += 1
            if self.steps > self.budget:
                self.charge(0)
            if code == STOP:
                value = self.pop()
                if self.stack or self.marks:
                    raise self.error("ends with values left over")
                return value
            operation = OPERATIONS.get(code)
            if operation is None:
                raise self.error(f"uses the operation {_operation_name(code)}, which no torch file needs")
            operation(self)

    def error(self, message: str) -> Exception:
        return self.source.error(f"the pickle {message}")

    def charge(self, steps: int) -> None:
        """Counts work against the budget."""
        self.steps += steps
        if self.steps > self.budget:
            raise self.error(f"takes more than {self.budget:,} steps; a checkpoint needs far fewer")

    def take(self, length: int) -> memoryview:
        start = self.position
        if start + length > self.limit:
            raise self.error(f"is cut off at byte {start:,} (or longer than {MAX_PICKLE:,} bytes)")
        self.position = start + length
        return self.data[start : self.position]

    def number(self, layout: str) -> Any:
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout)))
        return value

    def text(self, length: int) -> str:
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError:
            raise self.error("holds text that is not UTF-8") from None

    def line(self) -> str:
        """Text up to the end of a line, as names are written."""
        window = bytes(self.data[self.position : min(self.limit, self.position + 1000)])
        length = window.find(b"\n")
        if length < 0:
            raise self.error("holds a name that does not end")
        text = self.text(length)
        self.position += 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.error("takes a value from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def marked(self) -> list[Any]:
        """Pops the last mark and the values above it, and returns the values."""
        if not self.marks:
            raise self.error("refers to a mark that was not set")
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def several(self, number: int) -> tuple[Any, ...]:
        return tuple([self.pop() for _ in range(number)][::-1])

    def key(self, value: Any) -> Any:
        """Checks that a value may be a key: hashing others could recurse without end or collide on purpose."""
        if isinstance(value, (Name, Inert)):
            return value  # hashed by name and by identity
        if isinstance(value, (set, frozenset)):  # its elements were checked as keys
            self.charge(len(value))
            return frozenset(value)
        parts = value if isinstance(value, tuple) else (value,)
        self.charge(len(parts) - 1)
        small = len(parts) <= MAX_KEY and all(
            isinstance(part, KEYS) and not (isinstance(part, int) and abs(part) >= 1 << 63) for part in parts
        )
        if not small:
            raise self.error(
                f"has a key of type {type(value).__name__}; possible are text, small numbers and short tuples of them"
            )
        return value

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.error(f"refers to the value {index}, which it did not keep")
        self.push(self.memo[index])

    def integer(self, length: int) -> None:
        if not 0 <= length <= MAX_INTEGER:
            raise self.error(f"holds an integer of {length:,} bytes")
        self.push(int.from_bytes(self.take(length), "little", signed=True))

    def append(self, values: list[Any]) -> None:
        target = self.top()
        target = target.items if isinstance(target, Inert) else target
        if not isinstance(target, list):
            raise self.error(f"appends to a {type(target).__name__}")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Inert) and len(values) % 2 == 0:
            target.items.extend(zip(values[::2], values[1::2]))
            return
        if not isinstance(target, dict) or len(values) % 2:
            raise self.error(f"sets items of a {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2]):
            target[self.key(key)] = value

    def make_set(self) -> None:
        """Pushes an empty set, which costs several times the memory and time of what other operations push."""
        self.charge(3)
        self.push(set())

    def add_items(self) -> None:
        values = self.marked()
        target = self.top()
        if isinstance(target, Inert):
            target.items.extend(values)
            return
        if not isinstance(target, set):
            raise self.error(f"adds to a {type(target).__name__}")
        target.update(self.key(value) for value in values)

    def name(self, module: Any, attribute: Any) -> None:
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise self.error("names a global by something other than text")
        name = f"{module[:200]}.{attribute[:200]}"
        if not self.allowed(name):
            raise self.error(
                f"refers to {shown(name)}; only tensors, containers, numbers and settings are read, and no code is run"
            )
        self.push(Name(name))

    def reduce(self) -> None:
        arguments = self.pop()
        function = self.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise self.error(f"calls a {type(function).__name__}")
        self.push(self.call(function.name, arguments, self))

    def make_with_keywords(self) -> None:
        """NEWOBJ_EX: a class with arguments and keyword arguments; no known class is saved that way."""
        keywords = self.pop()
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple) or not isinstance(keywords, dict):
            raise self.error(f"makes an object of a {type(function).__name__}")
        self.push(Inert(function.name, arguments=(*arguments, keywords)))

    def build(self) -> None:
        state = self.pop()
        target = self.top()
        if isinstance(target, dict):
            return  # attributes of an OrderedDict, such as a state dict's _metadata
        if not isinstance(target, Inert):
            raise self.error(f"sets the state of a {type(target).__name__}")
        if target.state:
            raise self.error("sets the state of an object twice")
        target.state = state if isinstance(state, dict) else {"": state}


def _stack_global(machine: Machine) -> None:
    attribute = machine.pop()
    machine.name(machine.pop(), attribute)


def _operation_name(code: int) -> str:
    from pickletools import opcodes

    return next((opcode.name for opcode in opcodes if opcode.code == chr(code)), f"0x{code:02x}")


def _protocol(machine: Machine) -> None:
    protocol = machine.number("<B")
    if not 2 <= protocol <= 5:
        raise machine.error(f"has protocol {protocol}; protocols 2 to 5 are read")


STOP = ord(".")
# The values are those of the opcodes in pickletools, in its order.
OPERATIONS: dict[int, Callable[[Machine], Any]] = {
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    0x8A: lambda m: m.integer(m.number("<B")),
    0x8B: lambda m: m.integer(m.number("<i")),
    ord("T"): lambda m: m.push(str(m.take(m.number("<I")), "latin-1")),
    ord("U"): lambda m: m.push(str(m.take(m.number("<B")), "latin-1")),
    ord("B"): lambda m: m.push(bytes(m.take(m.number("<I")))),
    ord("C"): lambda m: m.push(bytes(m.take(m.number("<B")))),
    0x8E: lambda m: m.push(bytes(m.take(m.number("<Q")))),
    0x96: lambda m: m.push(bytes(m.take(m.number("<Q")))),  # BYTEARRAY8: never changed here
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    0x8C: lambda m: m.push(m.text(m.number("<B"))),
    ord("X"): lambda m: m.push(m.text(m.number("<I"))),
    0x8D: lambda m: m.push(m.text(m.number("<Q"))),
    ord("G"): lambda m: m.push(m.number(">d")),
    ord("]"): lambda m: m.push([]),
    ord("a"): lambda m: m.append([m.pop()]),
    ord("e"): lambda m: m.append(m.marked()),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.marked())),
    0x85: lambda m: m.push(m.several(1)),
    0x86: lambda m: m.push(m.several(2)),
    0x87: lambda m: m.push(m.several(3)),
    ord("}"): lambda m: m.push({}),
    ord("s"): lambda m: m.set_items(list(m.several(2))),
    ord("u"): lambda m: m.set_items(m.marked()),
    0x8F: lambda m: m.make_set(),
    0x90: lambda m: m.add_items(),
    0x91: lambda m: m.push(frozenset(m.key(value) for value in m.marked())),
    ord("0"): lambda m: m.pop(),
    ord("1"): lambda m: m.marked(),
    ord("("): lambda m: m.marks.append(len(m.stack)),
    ord("h"): lambda m: m.recall(m.number("<B")),
    ord("j"): lambda m: m.recall(m.number("<I")),
    ord("q"): lambda m: m.remember(m.number("<B")),
    ord("r"): lambda m: m.remember(m.number("<I")),
    0x94: lambda m: m.remember(len(m.memo)),
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: _stack_global,
    ord("R"): lambda m: m.reduce(),
    0x81: lambda m: m.reduce(),  # NEWOBJ: same as REDUCE, since nothing is really called
    0x92: lambda m: m.make_with_keywords(),
    ord("b"): lambda m: m.build(),
    0x80: _protocol,
    0x95: lambda m: m.take(8),  # FRAME: only a hint how much to read at once
    ord("Q"): lambda m: m.push(m.load(m.pop())),
}
