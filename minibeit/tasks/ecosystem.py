"""Methods that code written for transformers calls on a model: each does what is asked or explains the alternative."""

from __future__ import annotations

from typing import Any, TypeVar

from ..foreign import dtype_name

Self = TypeVar("Self", bound="EcosystemMethods")

# What PyTorch's modules have beside these, and where it is to be found here.
ELSEWHERE = {
    "parameters": "model.arrays has the weights by name, model.num_parameters() counts them",
    "named_parameters": "model.arrays has the weights by name",
    "state_dict": "model.arrays has the weights by name, model.save_pretrained(folder) writes them",
    "load_state_dict": "from_pretrained reads a state dict from its file",
    "modules": "minibeit.Trace(...) collects what happens inside: model(pixel_values, trace=trace)",
    "named_modules": "minibeit.Trace(...) collects what happens inside: model(pixel_values, trace=trace)",
    "register_forward_hook": "minibeit.Trace(...) collects what happens inside: model(pixel_values, trace=trace)",
    "zero_grad": "minibeit.value_and_grad gives the gradients of a batch",
    "gradient_checkpointing_enable": "minibeit.value_and_grad gives the gradients of a batch",
    "compile": "kernels are compiled when they are first needed",
    "push_to_hub": "model.save_pretrained(folder) writes files that huggingface_hub uploads",
    "bfloat16": "load it with from_pretrained(..., dtype='bfloat16', backend='cupy')",
}


class EcosystemMethods:
    """What remains of a PyTorch module where there is none: a model is ready for inference, on the device it is on."""

    dtype: str
    ops: Any

    def __getattr__(self, name: str) -> Any:
        hint = f"; {ELSEWHERE[name]}" if name in ELSEWHERE else ""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{hint}")

    def eval(self: Self) -> Self:
        """The model itself: noise is switched on by the call that wants it (`rng=`), never by a mode."""
        return self

    def train(self: Self, mode: bool = True) -> Self:
        """The model itself for `mode` False.  Raises ValueError for True: there is no such mode."""
        if mode:
            raise ValueError("a model has no training mode; minibeit.value_and_grad gives the gradients of a batch")
        return self

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """The model itself: `minibeit.value_and_grad` is told which gradients to take."""
        return self

    def to(self: Self, *places: Any, device: Any = None, dtype: Any = None, **_: Any) -> Self:
        """The model itself if it is there already, as float32 on a CPU it mostly is.

        Raises ValueError for another device or dtype: both are chosen when a model is loaded.
        """
        for place in (*places, device, dtype):
            if place is not None and not isinstance(place, bool):  # non_blocking
                self._check_place(str(place) if isinstance(place, int) else dtype_name(place))
        return self

    def cpu(self: Self) -> Self:
        """The same as `to("cpu")`."""
        return self.to("cpu")

    def cuda(self: Self, device: int | None = None) -> Self:
        """The same as `to("cuda")`."""
        return self.to("cuda" if device is None else f"cuda:{device}")

    def float(self: Self) -> Self:
        """The same as `to("float32")`."""
        return self.to("float32")

    def half(self: Self) -> Self:
        """The same as `to("float16")`."""
        return self.to("float16")

    def _check_place(self, place: str) -> None:
        on_gpu = self.ops.backend == "cupy"
        if place.isdecimal():
            place = f"cuda:{place}"
        if place.startswith("cuda"):
            if not on_gpu:
                raise ValueError(
                    f"this model runs on the CPU, {place!r} was asked for; load it with from_pretrained(..., "
                    "backend='cupy', device=0)"
                )
        elif place == "cpu":
            if on_gpu:
                raise ValueError("this model is on a GPU, 'cpu' was asked for; load it with backend='numba'")
        elif place != self.dtype:
            raise ValueError(
                f"this model is {self.dtype}, {place!r} was asked for; load it with from_pretrained(..., dtype=...)"
            )
