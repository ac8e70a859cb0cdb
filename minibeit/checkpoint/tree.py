"""Nested containers of a checkpoint: the state dict inside, its tensors by joined names, and everything else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minibeit.checkpoint.pickle_machine import Inert, Name
from minibeit.checkpoint.source import MAX_NAME, Source, shown
from minibeit.checkpoint.tensors import Stored, TensorInfo

TORCH_WRAPPERS = ("model", "module", "state_dict")
FLAX_WRAPPERS = ("params",)
MAX_DEPTH = 64
MAX_NODES = 200_000
MODULE_PARTS = ("_parameters", "_buffers", "_modules")


def unwrap(root: Any, wrappers: tuple[str, ...], depth: int = 3) -> tuple[Any, str | None]:
    """The state dict under keys such as `model`, and those keys joined by dots (None when nothing wraps it).

    A wrapper is a key of a dict without tensors of its own, whose value is a dict (or module) that holds some.
    """
    if not isinstance(root, dict) or depth == 0 or any(isinstance(value, Stored) for value in root.values()):
        return root, None
    for key in wrappers:
        inner = root.get(key)
        if isinstance(inner, (dict, Inert)) and _holds_tensor(inner):
            state, below = unwrap(inner, wrappers, depth - 1)
            return state, f"{key}.{below}" if below else key
    return root, None


def _holds_tensor(value: Any) -> bool:
    """Whether there is a tensor anywhere inside; shared and cyclic parts are visited once."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Stored):
            return True
        if isinstance(value, (dict, list, tuple, Inert)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(child for _, child in _children(value))
    return False


class Walk:
    """Visits a tree of at most MAX_NODES values and MAX_DEPTH levels; a shared value counts each time."""

    def __init__(self, source: Source, joint: str) -> None:
        self.source, self.joint = source, joint
        self.nodes = 0

    def enter(self, depth: int) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            raise self.source.error(f"has containers of more than {MAX_NODES:,} values or {MAX_DEPTH} levels")

    def tensors(self, value: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
        """(joined name, tensor or other leaf) of a state dict."""
        self.enter(depth)
        if isinstance(value, (dict, list, tuple, Inert)):
            for key, child in _children(value):
                key = str(key) if isinstance(key, (str, int)) else repr(key)
                if len(prefix) + len(key) > MAX_NAME:
                    raise self.source.error(f"has a name of more than {MAX_NAME:,} characters: {shown(prefix + key)}")
                yield from self.tensors(child, prefix + self.joint + key if prefix else key, depth + 1)
        else:
            yield prefix, value

    def plain(self, value: Any, skip: Any = None, depth: int = 0) -> Any:
        """A copy as dicts, lists and leaves; tensors become their TensorInfo, objects their attributes."""
        self.enter(depth)
        if isinstance(value, Stored):
            return TensorInfo(value.dtype, value.shape)
        if isinstance(value, (dict, Inert)):
            items = (value if isinstance(value, dict) else value.state).items()
            return {key: self.plain(child, skip, depth + 1) for key, child in items if child is not skip}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.plain(child, skip, depth + 1) for child in value]
        if isinstance(value, memoryview):
            return bytes(value)
        return value.name if isinstance(value, Name) else value


def split(
    source: Source, root: Any, wrappers: tuple[str, ...], joint: str
) -> tuple[dict[str, Stored], Any, str | None]:
    """(tensors by joined name, everything else as plain data, the unwrapped keys)."""
    state, wrapper = unwrap(root, wrappers)
    walk = Walk(source, joint)
    extra = walk.plain(root, state) if wrapper else {}
    tensors: dict[str, Stored] = {}
    seen: set[str] = set()
    for name, leaf in walk.tensors(state):
        target = tensors if isinstance(leaf, Stored) else extra
        if name in seen:
            raise source.error(f"has two values of the name {shown(name)}")
        seen.add(name)
        target[name] = leaf if isinstance(leaf, Stored) else walk.plain(leaf)
    if "" in tensors or not tensors:
        raise source.error("holds no named tensors")
    return tensors, extra, wrapper


def _children(value: Any) -> Any:
    """The pairs of name and child; those of a torch module are its parameters, buffers and modules."""
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, Inert):
        parts = [value.state.get(part) for part in MODULE_PARTS]
        return [pair for part in parts if isinstance(part, dict) for pair in part.items()]
    return enumerate(value)
