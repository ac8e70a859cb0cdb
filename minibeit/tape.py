"""A tape: the model's own code runs on nodes instead of arrays, and every op is recorded, to be run in reverse.

Nothing is computed here: forward and backward are the seam's.  Only calls that involve a watched array are recorded, so
that whatever comes before the first trained parameter costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from types import SimpleNamespace
from typing import Any

from .ops import backward as reference_backward
from .ops import reference
from .params import flatten, unflatten
from .trace import SILENT, Scope

Array = Any


class Node:
    """An array that gradients are wanted of, with the few methods of arrays that the model's text uses."""

    __slots__ = ("gradient", "tape", "value")
    __array_ufunc__ = None  # so that `array * node` comes to the node

    def __init__(self, tape: Tape, value: Array) -> None:
        self.tape = tape
        self.value = value
        self.gradient: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the array."""
        return self.value.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.value.ndim

    def reshape(self, *shape: int) -> Node:
        """The array in another shape."""
        return self.tape.call("reshape", self, shape)

    def transpose(self, *axes: int) -> Node:
        """The array with its axes in another order."""
        return self.tape.call("transpose", self, axes)

    def __getitem__(self, index: Any) -> Node:
        return self.tape.call("part", self, index)

    def __add__(self, other: Any) -> Node:
        return self.tape.call("add", self, other)

    def __mul__(self, constant: Any) -> Node:
        return self.tape.call("dropout", self, constant)

    __radd__ = __add__
    __rmul__ = __mul__

    def __len__(self) -> int:
        return len(self.value)


METHODS: dict[str, Callable[..., Array]] = {  # those of arrays, where the seam has no op of that name
    "reshape": lambda x, shape: x.reshape(*shape),
    "transpose": lambda x, axes: x.transpose(*axes),
    "part": lambda x, index: x[index],
}


@dataclasses.dataclass
class Call:
    """One op that was run: what it was given, what it kept for its backward and what came of it."""

    backward: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    saved: Any
    out: Node | tuple[Node, ...]


class Tape:
    """Notes the calls of one forward pass.

    `ops` is the seam; `statistics`, where given, makes batch norms use the batch (see `BatchStatistics`); with
    `recomputing` the blocks keep only their input and are run again in the backward.  A backend may have
    `NAME_forward` and `NAME_backward` of its own; NumPy's serve where it has none.
    """

    def __init__(self, ops: Any, statistics: Any | None = None, recomputing: bool = False) -> None:
        self.base = ops
        self.statistics = statistics
        self.recomputing = recomputing
        self.calls: list[Call] = []
        self.leaves: set[Node] = set()
        self.ops = self._recorded()

    def watch(self, params: Any, frozen: Collection[str] = ()) -> Any:
        """`params` with a node in place of every array that is learned.

        Not learned are the running statistics of batch norms and the canonical names in `frozen`.
        """
        named = {
            name: array if name in frozen or ".running_" in f".{name}" else Node(self, array)
            for name, array in flatten(params).items()
        }
        self.leaves.update(leaf for leaf in named.values() if isinstance(leaf, Node))
        return unflatten(params, named)

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        """The op of that name, noted if a node is among its arguments."""
        plain = tuple(map(values, args))
        training = {} if self.statistics is None or "_bn_" not in name else {"statistics": self.statistics}
        noted = any(map(watched, args))
        forward = self._half(name, "forward")
        if forward is None or not (noted or training or hasattr(self.base, "on_host")):
            made, saved = self._plain(name)(*plain, **options), None
        else:
            made, saved = forward(*plain, **options, **training)
        return self._note(self._half(name, "backward"), args, options, saved, made) if noted else made

    def recompute(self, function: Callable[..., Any], ops: Any, args: tuple[Any, ...]) -> Any:
        """function(ops, *args); with `recomputing` only the arguments are kept, and it is run again in the backward."""
        if not self.recomputing or not any(map(watched, args)):
            return function(self.ops, *args)
        made = function(self.ops, *map(values, args))  # without a node nothing is noted

        def backward(g: Any, saved: None, *plain: Any) -> tuple[Any, ...]:
            inner = Tape(self.base, self.statistics)
            silent = (SILENT if isinstance(arg, Scope) else arg for arg in args)  # was recorded the first time
            nodes = [renewed(arg, inner) for arg in silent]
            inner.backward(function(inner.ops, *nodes), g)
            return tuple(map(gradients, nodes))

        return self._note(backward, args, {}, None, made)

    def backward(
        self, out: Node | tuple[Node, ...], cotangent: Any, final: Callable[[Node], None] | None = None
    ) -> None:
        """Puts its gradient into every node that `out` depends on.  A tape is played once: it frees what it passes.

        `final(node)` is called for every watched array that was used, once nothing more will be added to its gradient,
        which is None if `out` does not depend on it.
        """
        uses = {} if final is None else self._first_uses()
        accumulate(out, cotangent)
        while self.calls:
            self._play(self.calls.pop())
            for node in uses.get(len(self.calls), ()):
                assert final is not None
                final(node)

    def _play(self, call: Call) -> None:
        g = gradients(call.out)
        if g is None or (isinstance(g, tuple) and all(part is None for part in g)):
            return  # nothing that `out` depends on came of it
        plain = map(values, call.args)
        for arg, ct in zip(call.args, call.backward(g, call.saved, *plain, **call.options)):
            accumulate(arg, ct)
        for node in call.out if isinstance(call.out, tuple) else (call.out,):
            node.gradient = None  # has been passed on

    def _first_uses(self) -> dict[int, list[Node]]:
        """{number of a call: the watched arrays that no earlier call was given}."""
        seen: set[Node] = set()
        uses: dict[int, list[Node]] = {}
        for number, call in enumerate(self.calls):
            for node in nodes(call.args):
                if node in self.leaves and node not in seen:
                    seen.add(node)
                    uses.setdefault(number, []).append(node)
        return uses

    def _recorded(self) -> SimpleNamespace:
        """The seam, with every op that has a backward noting its calls."""
        table = dict(vars(self.base))
        for name in table:
            if hasattr(reference_backward, f"{name}_backward"):
                table[name] = self._noting(name)
        table["recompute"] = self.recompute
        table["all_finite"] = table.get("finite_on_host", table["all_finite"])  # a loss that is NaN says it later
        table["queued"] = reference.queued  # a tape reads arrays as they are made
        table["to_host"] = lambda x: x if isinstance(x, Node) else self.base.to_host(x)
        return SimpleNamespace(**table)

    def _noting(self, name: str) -> Callable[..., Any]:
        return lambda *args, **options: self.call(name, *args, **options)

    def _plain(self, name: str) -> Callable[..., Any]:
        if name in METHODS:
            return METHODS[name]
        on_host = getattr(self.base, "on_host", None)  # a GPU's ops take prepared weights, not those that are learned
        if on_host is not None and not hasattr(self.base, f"{name}_backward"):
            return on_host(getattr(reference, name))
        return getattr(self.base, name)

    def _half(self, name: str, half: str) -> Any:
        full = f"{name}_{half}"
        numpys = getattr(reference_backward, full, None)
        on_host = getattr(self.base, "on_host", None)
        return getattr(self.base, full, None) or (on_host(numpys) if on_host and numpys else numpys)

    def _note(self, backward: Callable[..., Any], args: tuple[Any, ...], options: Any, saved: Any, made: Any) -> Any:
        out = tuple(Node(self, y) for y in made) if isinstance(made, tuple) else Node(self, made)
        self.calls.append(Call(backward, args, options, saved, out))
        return out


# Structures: arguments are arrays, numbers, or lists, tuples and dataclasses of them --------------------------------


def mapped(x: Any, function: Callable[[Any], Any]) -> Any:
    """`x` with function(node) in place of every node in it."""
    if isinstance(x, Node):
        return function(x)
    if isinstance(x, (list, tuple)) and watched(x):
        return type(x)(mapped(part, function) for part in x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type) and watched(x):
        return dataclasses.replace(x, **{f.name: mapped(getattr(x, f.name), function) for f in dataclasses.fields(x)})
    return x


def nodes(x: Any) -> Iterator[Node]:
    """The nodes in `x`."""
    if isinstance(x, Node):
        yield x
    elif isinstance(x, (list, tuple)):
        for part in x:
            yield from nodes(part)
    elif dataclasses.is_dataclass(x):
        for f in dataclasses.fields(x):
            yield from nodes(getattr(x, f.name))


def watched(x: Any) -> bool:
    """Whether there is a node in `x`."""
    return next(nodes(x), None) is not None


def values(x: Any) -> Any:
    """`x` with the array of every node in its place."""
    return mapped(x, lambda node: node.value)


def gradients(x: Any) -> Any:
    """`x` with the gradient of every node in its place, None where the loss does not depend on it."""
    return mapped(x, lambda node: node.gradient)


def renewed(x: Any, tape: Tape) -> Any:
    """`x` with a fresh node of `tape` in place of every node."""
    return mapped(x, lambda node: Node(tape, node.value))


def accumulate(x: Any, cotangent: Any) -> None:
    """Adds a cotangent, which has the structure of `x`, to the nodes in `x`."""
    if cotangent is None:
        return
    if isinstance(x, Node):  # never in place: the array may be another node's cotangent too
        x.gradient = cotangent if x.gradient is None else x.gradient + cotangent
    elif isinstance(x, (list, tuple)):
        for part, ct in zip(x, cotangent):
            accumulate(part, ct)
    elif dataclasses.is_dataclass(x):
        for f in dataclasses.fields(x):
            accumulate(getattr(x, f.name), getattr(cotangent, f.name, None))
