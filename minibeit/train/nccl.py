"""Ranks with a GPU each: what lies on devices is summed there by NCCL, everything else goes the way of MPI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from ..errors import DeviceError
from ..ops.cupy_gpu.device import cupy, open_device
from .ranks import Ranks

Value = TypeVar("Value")


class NcclRanks(Ranks):
    """The ranks `others`, this one computing on the current device, which no other rank uses.

    Sums of gradients run on a stream of their own, while the device goes on with the backward; `end_sums` orders what
    the device does later behind them, and the host waits for nothing.  Raises DeviceError without NCCL.
    """

    def __init__(self, others: Ranks) -> None:
        self._others = others
        self.rank, self.count, self.local, self.on_host = others.rank, others.count, others.local, others.on_host
        self.handed_over = 0
        nccl = _nccl()
        self._types = {"float32": nccl.NCCL_FLOAT32, "float64": nccl.NCCL_FLOAT64}
        self._sum = nccl.NCCL_SUM
        name = others.from_first(nccl.get_unique_id)
        try:
            self._comm = nccl.NcclCommunicator(others.count, name, others.rank)
        except RuntimeError as error:
            raise DeviceError(
                f"NCCL cannot join the GPUs of the ranks, of which each needs its own ({error})"
            ) from None
        self._stream = cupy.cuda.Stream(non_blocking=True)

    def total(self, numbers: Any) -> Any:
        if not isinstance(numbers, cupy.ndarray):
            return self._others.total(numbers)
        made = cupy.ascontiguousarray(numbers).copy()
        self._reduce(made)
        self.end_sums()
        return made.reshape(numbers.shape)

    def gathered(self, value: Value) -> list[Value]:
        return self._others.gathered(value)

    def from_first(self, make: Callable[[], Value]) -> Value:
        return self._others.from_first(make)

    def copy_from_first(self, array: np.ndarray) -> None:
        self._others.copy_from_first(array)

    def cores(self, usable: int) -> int:
        return self._others.cores(usable)

    def begin_sum(self, array: Any) -> None:
        self.handed_over += array.nbytes
        self._reduce(array)

    def end_sums(self) -> None:
        cupy.cuda.get_current_stream().wait_event(self._stream.record())

    def _reduce(self, array: Any) -> None:
        """Queues array = its sum over all ranks, after what the current stream has to do."""
        self._stream.wait_event(cupy.cuda.get_current_stream().record())
        place = array.data.ptr
        self._comm.allReduce(place, place, array.size, self._types[array.dtype.name], self._sum, self._stream.ptr)


def own_device(local: int, on_host: int) -> int:
    """The GPU of the rank that is number `local` of those on this machine.  Raises ValueError if there are too few.

    A rank that sees a single GPU takes that: Slurm may have given each its own.
    """
    open_device(None)
    there = cupy.cuda.runtime.getDeviceCount()
    if there == 1:
        return 0
    if on_host > there:
        raise ValueError(
            f"{on_host} ranks were started on a machine with {there} GPUs; NCCL wants one for each: start fewer ranks"
        )
    return local


def on_device(ranks: Ranks, device: int) -> NcclRanks:
    """`ranks` whose arrays on that device NCCL sums."""
    with cupy.cuda.Device(open_device(device)):
        return NcclRanks(ranks)


def _nccl() -> Any:
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise DeviceError(
            f"several ranks on GPUs need NCCL, which this CuPy cannot load ({error}); install it, as with "
            "pip install nvidia-nccl-cu12"
        ) from None
    return nccl
