"""What the names in a torch pickle mean: tensors over storages, containers, numbers, and inert placeholders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .file_bytes import Source, shown
from .lazy_tensors import ITEMSIZE, MAX_RANK, Stored, checked_shape, count
from .pickle_attacks import suspicious
from .pickle_machine import Inert, Machine, Name

STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip
STORAGE_NAMES = {
    f"{module}.{name}": dtype for module in ("torch", "torch.cuda", "torch.storage") for name, dtype in STORAGES.items()
}
TORCH_DTYPES = {
    "torch.float64": "float64", "torch.float32": "float32", "torch.float16": "float16", "torch.bfloat16": "bfloat16",
    "torch.int64": "int64", "torch.int32": "int32", "torch.int16": "int16", "torch.int8": "int8",
    "torch.uint64": "uint64", "torch.uint32": "uint32", "torch.uint16": "uint16", "torch.uint8": "uint8",
    "torch.bool": "bool",
}  # fmt: skip
TENSOR_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.Parameter", "torch.nn.parameter.Buffer")
# Classes whose attributes are read but whose code is never run. The modules are those of DALL-E's encoder.pkl and
# decoder.pkl.
INERT_CLASSES = (
    "argparse.Namespace",
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.upsampling.Upsample",
)
FROM_BUFFER = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
NUMPY_ARRAYS = (*FROM_BUFFER, "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
NUMPY_SCALARS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


@dataclass(eq=False)
class Storage:
    """A flat array that tensors are views of; `data` is filled in last if it follows the pickle."""

    dtype: str
    count: int
    data: memoryview | Callable[[], memoryview] | None = None

    def read(self) -> memoryview:
        assert self.data is not None
        return self.data() if callable(self.data) else self.data


def storage_identity(source: Source, identity: Any) -> tuple[str, str, int]:
    """(dtype, key, number of elements) from the tuple by which a pickle refers to a storage."""
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise source.error("the pickle refers to an outside object that is not a storage")
    _, kind, key, _, number = identity[:5]
    if not isinstance(kind, Name) or kind.name not in STORAGE_NAMES:
        raise source.error(f"the pickle refers to a storage of unknown type {shown(getattr(kind, 'name', kind))}")
    if not isinstance(key, str) or type(number) is not int or not 0 <= number < 1 << 48:
        raise source.error("the pickle refers to a storage by something other than its key and size")
    if len(identity) > 5 and identity[5] is not None:
        raise source.error("a storage is a view of another; save the checkpoint again with a newer torch")
    return STORAGE_NAMES[kind.name], key, number


def allowed(name: str) -> bool:
    """Whether a name may occur in a pickle; unknown ones become inert objects."""
    return known(name) or not (known(name.rpartition(".")[0]) or suspicious(name))


def known(name: str) -> bool:
    """Whether a name in a pickle has a meaning here."""
    return name in CALLS or name in STORAGE_NAMES or name in TORCH_DTYPES or name in TENSOR_CLASSES


def call(name: str, arguments: tuple[Any, ...], machine: Machine) -> Any:
    """The result of a known class or function; for an unknown one, an inert object that holds the arguments."""
    if name in CALLS:
        return CALLS[name](machine, arguments)
    if known(name):
        raise machine.error(f"calls {shown(name)}, which is only a type")
    return Inert(name, arguments=arguments)


def as_tensor(value: Any) -> Stored | None:
    """A tensor, also from a pickled NumPy array; None for anything else."""
    if isinstance(value, Stored):
        return value
    if not isinstance(value, Inert) or value.name not in NUMPY_ARRAYS:
        return None
    state = value.state.get("")
    if value.name in FROM_BUFFER and len(value.arguments) == 4:
        data, dtype, shape, order = value.arguments
        fortran = order == "F"
    elif isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, fortran, data = state
    else:
        return None
    stored = _plain_dtype(dtype)
    sizes = isinstance(shape, tuple) and len(shape) <= MAX_RANK and all(type(n) is int and n >= 0 for n in shape)
    if stored is None or not sizes or not isinstance(data, bytes):
        return None
    itemsize = ITEMSIZE[stored]
    if count(shape) * itemsize != len(data):
        return None
    steps = shape if fortran else shape[::-1]
    strides = tuple(itemsize * count(steps[:axis]) for axis in range(len(shape)))
    return Stored(stored, shape, memoryview(data), 0, strides if fortran else strides[::-1])


def _plain_dtype(dtype: Any) -> str | None:
    """The stored dtype's name for a pickled NumPy dtype; None for unsupported and big-endian ones."""
    if not isinstance(dtype, Inert) or not dtype.name.startswith("numpy.dtype:"):
        return None
    state = dtype.state.get("")
    if isinstance(state, tuple) and ">" in state[:2]:
        return None
    name = np.dtype(dtype.name[12:]).name
    return name if name in ITEMSIZE else None


def _bad(machine: Machine, name: str) -> Exception:
    return machine.error(f"calls {name} with arguments that torch does not write")


def _tensor(machine: Machine, storage: Any, offset: Any, shape: Any, strides: Any, dtype: str | None = None) -> Stored:
    """A checked view of a storage: no element outside it, and no more elements than it has."""
    source = machine.source
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise _bad(machine, "_rebuild_tensor")
    shape = checked_shape(source, "of a pickle", shape)
    strides = checked_shape(source, "of a pickle (strides)", strides)
    dtype = dtype or storage.dtype
    itemsize = ITEMSIZE[dtype]
    available = storage.count * ITEMSIZE[storage.dtype] // itemsize
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides))
    if len(strides) != len(shape) or (count(shape) and (last >= available or count(shape) > available)):
        raise source.error(
            f"a tensor of shape {list(shape)}, strides {list(strides)} and offset {offset} "
            f"does not fit its storage of {available:,} elements"
        )
    return Stored(dtype, shape, storage.read, offset * itemsize, tuple(stride * itemsize for stride in strides))


def _rebuild_tensor(machine: Machine, arguments: tuple[Any, ...]) -> Stored:
    if not 4 <= len(arguments) <= 7:
        raise _bad(machine, "_rebuild_tensor_v2")
    return _tensor(machine, *arguments[:4])


def _rebuild_tensor_v3(machine: Machine, arguments: tuple[Any, ...]) -> Stored:
    if not 7 <= len(arguments) <= 8 or not isinstance(arguments[6], Name) or arguments[6].name not in TORCH_DTYPES:
        raise _bad(machine, "_rebuild_tensor_v3")
    storage, offset, shape, strides = arguments[:4]
    return _tensor(machine, storage, offset, shape, strides, TORCH_DTYPES[arguments[6].name])


def _rebuild_parameter(machine: Machine, arguments: tuple[Any, ...]) -> Stored:
    if not 3 <= len(arguments) <= 4 or not isinstance(arguments[0], Stored):
        raise _bad(machine, "_rebuild_parameter")
    return arguments[0]


def _rebuild_from_type(machine: Machine, arguments: tuple[Any, ...]) -> Any:
    """The plain tensor of a tensor subclass or a tensor with Python attributes."""
    if len(arguments) != 4 or not isinstance(arguments[0], Name) or not isinstance(arguments[2], tuple):
        raise _bad(machine, "_rebuild_from_type_v2")
    if arguments[0].name not in REBUILDERS or getattr(arguments[1], "name", None) not in TENSOR_CLASSES:
        raise _bad(machine, "_rebuild_from_type_v2")
    return call(arguments[0].name, arguments[2], machine)


def _dictionary(machine: Machine, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    pairs = arguments[-1] if arguments and isinstance(arguments[-1], (list, dict)) else []
    machine.charge(len(pairs))
    for pair in pairs.items() if isinstance(pairs, dict) else pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise _bad(machine, "a dictionary")
        result[machine.key(pair[0])] = pair[1]
    return result


def _set(machine: Machine, arguments: tuple[Any, ...]) -> set[Any]:
    values = arguments[0] if arguments else []
    if len(arguments) > 1 or not isinstance(values, (list, tuple, set, frozenset)):
        raise _bad(machine, "set")
    machine.charge(len(values))
    return {machine.key(value) for value in values}


def _size(machine: Machine, arguments: tuple[Any, ...]) -> tuple[int, ...]:
    if len(arguments) != 1:
        raise _bad(machine, "torch.Size")
    return checked_shape(machine.source, "of a pickle", arguments[0])


def _device(machine: Machine, arguments: tuple[Any, ...]) -> str:
    if not 1 <= len(arguments) <= 2 or not isinstance(arguments[0], str):
        raise _bad(machine, "torch.device")
    return arguments[0]


def _bytes(machine: Machine, arguments: tuple[Any, ...]) -> bytes:
    """Bytes as protocol 2 writes them."""
    if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] != "latin1":
        raise _bad(machine, "_codecs.encode")
    machine.charge(len(arguments[0]))
    try:
        return arguments[0].encode("latin-1")
    except UnicodeEncodeError:
        raise _bad(machine, "_codecs.encode") from None


def _numpy_dtype(machine: Machine, arguments: tuple[Any, ...]) -> Inert:
    """A NumPy dtype: numeric ones by name, any other as a plain object that is never used."""
    plain = arguments and isinstance(arguments[0], str) and arguments[0] in NUMPY_SCALARS
    return Inert(f"numpy.dtype:{arguments[0]}" if plain else "numpy.dtype", arguments=arguments)


def _numpy_scalar(machine: Machine, arguments: tuple[Any, ...]) -> Any:
    """A NumPy number as a Python number; other scalars (strings, dates) as inert objects."""
    if len(arguments) == 2 and isinstance(arguments[0], Inert) and arguments[0].name == "numpy.dtype":
        return Inert("numpy.scalar", arguments=arguments)
    if len(arguments) != 2 or not isinstance(arguments[0], Inert) or not arguments[0].name.startswith("numpy.dtype:"):
        raise _bad(machine, "numpy scalar")
    dtype, data = np.dtype("<" + arguments[0].name[12:]), arguments[1]
    if isinstance(data, str) and len(data) == dtype.itemsize:  # written by Python 2
        data = data.encode("latin-1", "replace")
    state = arguments[0].state.get("")
    if not isinstance(data, bytes) or len(data) != dtype.itemsize or (isinstance(state, tuple) and ">" in state[:2]):
        raise _bad(machine, "numpy scalar")
    return np.frombuffer(data, dtype)[0].item()


def _inert(name: str) -> Callable[[Machine, tuple[Any, ...]], Inert]:
    def make(machine: Machine, arguments: tuple[Any, ...]) -> Inert:
        if arguments:
            raise _bad(machine, name)
        return Inert(name)

    return make


REBUILDERS: dict[str, Callable[[Machine, tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}
CALLS: dict[str, Callable[[Machine, tuple[Any, ...]], Any]] = {
    **REBUILDERS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": _dictionary,
    "collections.Counter": _dictionary,
    **{f"{module}.{name}": _set for module in ("builtins", "__builtin__") for name in ("set", "frozenset")},
    # classes that are only arguments: the factory of a defaultdict
    **{
        f"{module}.{name}": _dictionary if name == "dict" else _inert(name)
        for module in ("builtins", "__builtin__")
        for name in ("dict", "list", "int", "float")
    },
    "_codecs.encode": _bytes,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    **{name: _inert(name) for name in INERT_CLASSES},
}
