"""What all five tasks share: making, loading and saving a model, checking its input, running the encoder."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from ..checkpoint.load import load_checkpoint
from ..checkpoint.packed_file import Prepared, prepared_file, read_prepared, write_prepared
from ..checkpoint.save import save_checkpoint
from ..config import CONFIG_FIELDS, BeitConfig
from ..errors import CheckpointError, unknown_keywords
from ..foreign import as_torch, dtype_name, is_torch
from ..loading_options import split_model_keywords
from ..model.embeddings import patch_grid
from ..model.encoder import encode
from ..ops import dtype_of_file, get_ops, host_dtype
from ..ops.low_precision import LOW_DTYPES, Spans, lowered
from ..ops.portable import dump_portable, is_portable, restore_portable
from ..outputs import ModelOutput
from ..params import count_parameters, param_shapes, random_arrays, shapes, unflatten
from ..trace import Scope, Trace
from .capture import Capture
from .ecosystem import EcosystemMethods
from .inputs import checked_mask, checked_pixels
from .memory import check_call, check_weights

Array = Any
Self = TypeVar("Self", bound="BeitPreTrainedModel")
Output = TypeVar("Output", bound=ModelOutput)


class BeitPreTrainedModel(EcosystemMethods, Generic[Output]):
    """A BEiT with the head of one task: config, parameters and the ops that compute with them.

    Without `arrays` or `prepared` the weights are random, determined by `seed`.  `dtype` is "float32" or "float64", on
    a GPU also "float16" or "bfloat16", on a CPU "int8" or "bfloat16" (see `ops.low_precision`).  `backend` selects the
    ops (see `minibeit.ops.get_ops`), `only` a subset of its fast ops.  `num_threads` is how many threads a call uses,
    by default MINIBEIT_NUM_THREADS or all cores; `device` is the number of a GPU, by default the first.
    """

    task: ClassVar[str]
    name_or_path = ""  # what `from_pretrained` was given

    def __init__(
        self,
        config: BeitConfig,
        *,
        seed: int | None = 0,
        dtype: str = "float32",
        backend: str | None = None,
        only: Any | None = None,
        num_threads: int | None = None,
        device: int | None = None,
        arrays: Mapping[str, Array] | None = None,
        prepared: Prepared | None = None,
    ) -> None:
        if not isinstance(config, BeitConfig):
            raise TypeError(f"config: expected a BeitConfig, found {type(config).__name__}; see BeitConfig.from_dict")
        self.config = config
        self.dtype = dtype
        self.num_threads = num_threads
        self.device = device
        self._only = None if only is None else tuple(only)
        self.ops = get_ops(backend, self._only, dtype, device)
        self._check_config()
        self._arrays, self._prepared = arrays, prepared
        if prepared is not None:
            self.params = self._restored(prepared)
        else:
            check_weights(config, self.task, self.ops.backend, self._itemsize)
            if arrays is None:
                self._arrays = random_arrays(config, param_shapes(config, self.task), seed, host_dtype(dtype))
            self.params = self.ops.prepare(unflatten(shapes(config, self.task), self.arrays))

    @classmethod
    def from_pretrained(
        cls: type[Self],
        path: str | os.PathLike[str],
        *,
        dtype: Any = "float32",
        backend: str | None = None,
        only: Any | None = None,
        num_threads: int | None = None,
        device: int | None = None,
        seed: int | None = 0,
        **keywords: Any,
    ) -> Self:
        """The model of a checkpoint: a folder as on the Hub, a file of any format, or an id on the Hub.

        `keywords` are fields of `minibeit.loading_options.Loading` (`revision`, `token`, `subfolder`, `variant`,
        `weights`, ...), which say which files are read and how, and fields of the config to replace; any other raises
        TypeError.  Tensors that the checkpoint lacks because it was made for another task are drawn at random from
        `seed`, with a warning that lists them.  Another `image_size` or `num_labels`, or a bias table per block in
        place of a shared one, adapts the trained tensors, with a warning (see `load_checkpoint`).  A folder written by
        `save_prepared` is mapped into memory and used without repacking.  `dtype` may also be a dtype of NumPy or
        PyTorch, or "auto": the file's on a GPU and of a prepared file, float32 elsewhere.  Raises FileNotFoundError or
        CheckpointError in one sentence that names the file and the tensor.
        """
        dtype, auto = ("float32", True) if dtype == "auto" else (dtype_name(dtype), False)
        options: dict[str, Any] = dict(dtype=dtype, backend=backend, only=only, num_threads=num_threads, device=device)
        loading, fields = split_model_keywords(keywords, CONFIG_FIELDS)
        file = prepared_file(Path(path) / loading.subfolder)
        if file is not None:
            prepared = read_prepared(file, fields)
            if auto:
                options["dtype"] = prepared.dtype
            model = cls(prepared.config, **options, prepared=prepared)
        else:
            get_ops(backend, only, dtype, device)  # reports a missing backend before gigabytes are read
            config, arrays = load_checkpoint(path, cls.task, host_dtype(dtype), seed, keywords)
            if auto:
                options["dtype"] = dtype_of_file(config.extra.get("dtype", config.extra.get("torch_dtype")), backend)
            model = cls(config, **options, arrays=arrays)
        model.name_or_path = str(path)
        return model

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and other processes get the original arrays and pack them again, since packed weights are for one CPU
        and hold addresses.  Views of a file are sent as its name."""
        made: dict[str, Any] = dict(
            dtype=self.dtype, backend=self.ops.backend, only=self._only, num_threads=self.num_threads
        )
        made.update(device=self.device, arrays=self._arrays, prepared=self._prepared)
        kept = {name: value for name, value in vars(self).items() if name in ("name_or_path", "add_pooling_layer")}
        return _remade, (type(self), self.config, made), kept

    def __call__(
        self,
        pixel_values: Any,
        *args: Any,
        num_threads: int | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Output:
        """The output of `forward` for the same arguments, computed by `num_threads` threads.

        `interpolate_pos_encoding` is accepted for the sake of code written for transformers and changes nothing:
        positions are always resized to the images at hand.  With
        `return_dict=False` the output is a tuple of what is there.  Its arrays are NumPy's, or tensors of PyTorch on
        the CPU if `pixel_values` is such a tensor.
        """
        with self.ops.num_threads(self.num_threads if num_threads is None else num_threads):
            output = self.forward(pixel_values, *args, **kwargs).named(self.config.id2label)
        if is_torch(pixel_values):
            output = output.converted(as_torch)
        return output.to_tuple() if return_dict is False else output  # type: ignore[return-value]

    def __init_subclass__(cls, **keywords: Any) -> None:
        """For help(): a task's `__call__` has the parameters of its `forward`, and those that every call has."""
        super().__init_subclass__(**keywords)
        if "forward" not in vars(cls):
            return
        whole = BeitPreTrainedModel.__call__

        own, common = inspect.signature(cls.forward), inspect.signature(whole).parameters.values()
        added = [parameter for parameter in common if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
        known = [*own.parameters, *(parameter.name for parameter in added)]

        @functools.wraps(cls.forward)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if unknown := [name for name in kwargs if name not in known]:
                raise unknown_keywords(type(self).__name__, unknown, known[1:])
            return whole(self, *args, **kwargs)

        call.__signature__ = own.replace(parameters=[*own.parameters.values(), *added])  # type: ignore[attr-defined]
        call.__name__, call.__qualname__ = "__call__", f"{cls.__qualname__}.__call__"
        cls.__call__ = call  # type: ignore[method-assign]

    def forward(self, pixel_values: Any, *args: Any, **kwargs: Any) -> Output:
        """Computes the output; defined by each task."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: str = "float32") -> None:
        """Writes `config.json` and `model.safetensors` with the Hub's names, so that transformers loads them too.

        `dtype` of the file: "float32", "float16" or "bfloat16".
        """
        config = self.config.replace(architectures=(type(self).__name__,))
        save_checkpoint(folder, config, self.task, self.arrays, dtype)

    def save_prepared(
        self, folder: str | os.PathLike[str], portable: bool = False, spans: Sequence[Spans] | None = None
    ) -> None:
        """Writes `config.json` and `prepared.safetensors`: the weights as this backend packed them for this CPU.

        `from_pretrained` maps such a file without packing again.  With `portable`, for the dtypes int8 and bfloat16,
        it holds the rounded weights for every CPU, to be packed when they are loaded.  `spans` are what
        `calibration.channel_spans` measured, for int8.  Raises ValueError for a backend that does not pack weights, and
        for a dtype without such a file.
        """
        if self.dtype not in ("float32", *LOW_DTYPES) or (portable and self.dtype not in LOW_DTYPES):
            kinds = f"{'' if portable else 'float32 or '}low precision ({', '.join(LOW_DTYPES)})"
            raise ValueError(f"a prepared file holds weights of {kinds}, this model's are {self.dtype}")
        if portable:
            layout, arrays = dump_portable(self.plain_params, self.dtype, spans)
        elif spans is not None:
            layout, arrays = self.ops.dump(self.ops.prepare(lowered(self.plain_params, self.dtype, spans=spans)))
        else:
            layout, arrays = self.ops.dump(self.params)
        config = self.config.replace(architectures=(type(self).__name__,))
        write_prepared(folder, config, self.task, layout, arrays, self.dtype)

    @property
    def arrays(self) -> Mapping[str, Array]:
        """The parameters as loaded, by canonical name; views of a mapped file take no memory of their own.

        Raises ValueError for a model loaded from a prepared file, which holds packed weights only.
        """
        if self._arrays is None:
            raise ValueError(
                "this model was loaded from a prepared file, which holds packed weights only; "
                "load the checkpoint that it was made from"
            )
        return self._arrays

    @property
    def plain_params(self) -> Any:
        """The tree of parameters in plain arrays, whatever the backend has packed: what training learns."""
        plain = self.ops.backend == "numpy" and self.dtype not in LOW_DTYPES
        return self.params if plain else unflatten(shapes(self.config, self.task), self.arrays)

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the model has learned; running statistics of batch norms are not learned."""
        return count_parameters(self.config, self.task)

    def __repr__(self) -> str:
        c = self.config
        return (
            f"{type(self).__name__}({c.num_hidden_layers} blocks, width {c.hidden_size}, "
            f"{c.num_attention_heads} heads, "
            f"{self.num_parameters():,} parameters, {self.dtype}, backend {self.ops.backend}"
            f"{'' if self.device is None else f' on GPU {self.device}'})"
        )

    def _restored(self, prepared: Prepared) -> Any:
        """The parameters from a prepared file.  Raises CheckpointError if this model cannot use them."""
        if self.dtype != prepared.dtype:
            raise CheckpointError(
                f"{prepared.path}: holds {prepared.dtype} weights, but dtype {self.dtype} was asked for"
            )
        try:
            if is_portable(prepared.layout):
                tree = restore_portable(shapes(self.config, self.task), prepared.layout, prepared.arrays)
                return self.ops.prepare(tree)
            return self.ops.restore(shapes(self.config, self.task), prepared.layout, prepared.arrays)
        except ValueError as error:
            raise CheckpointError(f"{prepared.path} (for {prepared.task.replace('_', ' ')}): {error}") from None

    # For the tasks -------------------------------------------------------------------------------------------------

    def _check_config(self) -> None:
        """Raises ValueError if the config does not suit the task."""

    def _pixels(self, pixel_values: Any) -> Array:  # -> (B, C, height, width)
        pixels = checked_pixels(self.ops, pixel_values, self.config, self.dtype)
        check_call(self.config, self.task, pixels.shape, self.ops.backend, self._itemsize)
        return pixels

    @property
    def _itemsize(self) -> int:
        return 8 if self.dtype == "float64" else 4

    def _mask(self, bool_masked_pos: Any, pixels: Array) -> Array | None:  # -> (B, P)
        gh, gw = patch_grid(pixels, self.config)
        mask_token = self.params.beit.embeddings.mask_token
        return checked_mask(self.ops, bool_masked_pos, mask_token, (len(pixels), gh * gw))

    def _capture(self, states: bool, attentions: bool, trace: Trace | None) -> Capture:
        return Capture(self.ops, states, attentions, trace)

    def _encode(
        self,
        pixels: Array,
        scope: Scope,
        mask: Array | None = None,
        rng: Any | None = None,
        collect: tuple[int, ...] = (),
        depth: int | None = None,
    ) -> tuple[Array, list[Array]]:
        with self.ops.queued(scope.silent):  # a trace reads arrays at once, so no queue
            return encode(self.ops, self.params.beit, pixels, self.config, collect, depth, mask, rng, scope)


def _remade(model_class: type[BeitPreTrainedModel], config: BeitConfig, made: dict[str, Any]) -> BeitPreTrainedModel:
    return model_class(config, **made)
