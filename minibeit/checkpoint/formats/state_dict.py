"""Splits the nested containers of a checkpoint into the state dict's tensors, by joined names, and everything else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..names import is_average, means, names_encoder
from .file_bytes import MAX_NAME, Source, shown
from .lazy_tensors import Stored, TensorInfo
from .pickle_machine import Inert, Name
from .torch_objects import as_tensor

WRAPPERS = {".": ("model", "module", "state_dict"), "/": ("params",)}  # by the separator of names: torch, Flax
MAX_DEPTH = 64
MAX_NODES = 200_000
MAX_STATES = 64  # state dicts in one file
MODULE_PARTS = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Parts:
    """The result of `split`; the fields are those of `formats.Loaded`."""

    tensors: dict[str, Stored]
    extra: Any
    wrapper: str | None
    others: tuple[str, ...]
    chosen: bool


def unwrap(source: Source, root: Any, joint: str, weights: str | None) -> tuple[Any, str | None, tuple[str, ...], bool]:
    """(state dict, its keys joined by dots or None, the keys of others like it, whether `weights` chose it).

    The state dict is a mapping with the tensors of an encoder: the one that `weights` selects, else of those that are
    no moving average the one with most tensors.  If there is none, it is the value under keys such as `model`, in dicts
    that hold no tensors themselves.
    """
    states = _states(root)
    if not states:
        state, wrapper = _under_known_keys(root, WRAPPERS[joint])
        return state, wrapper, (), False
    if weights in ("model", "ema") and _is_swapped(root, states):
        weights = "state_dict" if weights == "ema" else "ema_state_dict"
    meant = {key: state for key, state in states.items() if weights is None or means(weights, key)}
    if not meant and len(states) > 1:
        raise source.error(f"has no weights {weights!r}; there are those under {', '.join(map(repr, states))}")
    order = WRAPPERS[joint]

    def rank(key: str) -> tuple[bool, int, int]:
        known = order.index(key) if key in order else len(order)
        return is_average(key), -len(states[key]), known

    chosen = min(meant or states, key=rank)
    others = tuple(key for key in states if key != chosen)
    return states[chosen], chosen or None, others, weights is not None and bool(meant) and bool(chosen)


def _is_swapped(root: Any, states: Any) -> bool:
    """Whether a file is from mmengine's EMAHook, which saves the average as `state_dict` and the model beside it.

    Source: mmengine/hooks/ema_hook.py, `before_save_checkpoint`.
    """
    return {"state_dict", "ema_state_dict"} <= set(states) and "message_hub" in root


def _states(root: Any) -> dict[str, dict[Any, Any]]:
    """{keys joined by dots: mapping} of every dict that directly holds an encoder's tensors; at most MAX_STATES."""
    found: dict[str, dict[Any, Any]] = {}
    seen: set[int] = set()
    waiting = [("", root)]
    while waiting and len(found) < MAX_STATES:
        key, value = waiting.pop(0)
        if not isinstance(value, dict) or id(value) in seen or key.count(".") > 4:
            continue
        seen.add(id(value))
        if names_encoder([name for name, child in value.items() if isinstance(name, str) and as_tensor(child)]):
            found[key] = value
        waiting += [
            (f"{key}.{name}" if key else name, child)
            for name, child in value.items()
            if isinstance(child, dict) and isinstance(name, str) and len(key) + len(name) < MAX_NAME
        ]
    return found


def _under_known_keys(root: Any, wrappers: tuple[str, ...], depth: int = 3) -> tuple[Any, str | None]:
    """The value under keys such as `model`, and those keys joined by dots (None if nothing wraps it).

    A wrapper is a dict that holds no tensors itself, but has such a key whose value (a dict or module) does.
    """
    if not isinstance(root, dict) or depth == 0 or any(isinstance(value, Stored) for value in root.values()):
        return root, None
    for key in wrappers:
        inner = root.get(key)
        if isinstance(inner, (dict, Inert)) and _holds_tensor(inner):
            state, below = _under_known_keys(inner, wrappers, depth - 1)
            return state, f"{key}.{below}" if below else key
    return root, None


def _holds_tensor(value: Any) -> bool:
    """Whether there is a tensor anywhere inside; shared and cyclic values are visited once."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if as_tensor(value):
            return True
        if isinstance(value, (dict, list, tuple, Inert)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(child for _, child in _children(value))
    return False


class Walk:
    """Visits a tree of at most MAX_NODES values and MAX_DEPTH levels; a shared value counts each time."""

    def __init__(self, source: Source, joint: str) -> None:
        self.source, self.joint = source, joint
        self.nodes, self.most = 0, MAX_NODES + source.size // 16

    def enter(self, depth: int) -> None:
        self.nodes += 1
        if self.nodes > self.most or depth > MAX_DEPTH:
            raise self.source.error(f"has containers of more than {self.most:,} values or {MAX_DEPTH} levels")

    def tensors(self, value: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
        """(joined name, tensor or other leaf) of a state dict."""
        self.enter(depth)
        value = as_tensor(value) or value
        if isinstance(value, (dict, list, tuple, Inert)):
            for key, child in _children(value):
                key = str(key) if isinstance(key, (str, int)) else repr(key)
                if len(prefix) + len(key) > MAX_NAME:
                    raise self.source.error(f"has a name of more than {MAX_NAME:,} characters: {shown(prefix + key)}")
                yield from self.tensors(child, prefix + self.joint + key if prefix else key, depth + 1)
        else:
            yield prefix, value

    def plain(self, value: Any, skip: Any = None, depth: int = 0) -> Any:
        """A copy made of dicts, lists and leaves; tensors become their TensorInfo, objects their attributes."""
        self.enter(depth)
        tensor = as_tensor(value)
        if tensor:
            return TensorInfo(tensor.dtype, tensor.shape)
        if isinstance(value, Inert) and not value.state:
            value = value.items or list(value.arguments)
        if isinstance(value, (dict, Inert)):
            items = (value if isinstance(value, dict) else value.state).items()
            return {_plain_key(key): self.plain(child, skip, depth + 1) for key, child in items if child is not skip}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.plain(child, skip, depth + 1) for child in value]
        if isinstance(value, memoryview):
            return bytes(value)
        return value.name if isinstance(value, Name) else value


def split(source: Source, root: Any, joint: str, weights: str | None = None) -> Parts:
    """The tensors of the state dict by joined name, and everything else as plain data."""
    state, wrapper, others, chosen = unwrap(source, root, joint, weights)
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
        raise source.error(f"holds no named tensors{_stand_in(root)}")
    return Parts(tensors, extra, wrapper, others, chosen)


def _stand_in(root: Any) -> str:
    """For an error: describes an object of an unknown class found in place of tensors."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Inert):
            return f"; an object in it is made by {shown(value.name)}, whose code is not run"
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(child for _, child in _children(value))
    return ""


def _plain_key(key: Any) -> Any:
    return key.name if isinstance(key, (Name, Inert)) else key


def _children(value: Any) -> Any:
    """(name, child) pairs; those of a torch module are its parameters, buffers and modules."""
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, Inert):
        parts = [value.state.get(part) for part in MODULE_PARTS]
        return [pair for part in parts if isinstance(part, dict) for pair in part.items()]
    return enumerate(value)
