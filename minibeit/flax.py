"""The calling convention of transformers' Flax classes, which transformers 5 dropped: weights as an argument.

Each class is a thin adapter around the model in `tasks/`, which does the work.  `params` is a nested dictionary with
Flax's names and layouts: `kernel` (in, out) for linear layers, (kh, kw, in, out) for the patches, `scale` for norms.
NumPy arrays in, NumPy arrays out; no JAX.

Source: modeling_flax_beit.py of transformers 4.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from .checkpoint.names import DIALECTS, Naming, Place
from .config import BeitConfig
from .outputs import FlaxBeitModelOutputWithPooling, FlaxMaskedLMOutput, FlaxSequenceClassifierOutput, ModelOutput
from .params import param_shapes
from .tasks.base import BeitPreTrainedModel
from .tasks.image_classification import BeitForImageClassification
from .tasks.masked_image_modeling import BeitForMaskedImageModeling
from .tasks.model import BeitModel

Params = Mapping[str, Any]  # nested: {"beit": {"embeddings": {"cls_token": array, ...}, ...}, ...}


class FlaxBeitPreTrainedModel:
    """What the three classes share: `model_class` does the work, `output_class` is the type of its result.

    `input_shape` is accepted for old code and ignored: weights do not depend on it.  With `_do_init=False` the model
    has no weights; give `params` with each call, or set them.
    """

    model_class: type[BeitPreTrainedModel]
    output_class: type[ModelOutput]
    fields: tuple[str, ...]  # what `return_dict=False` returns, in order
    naming = Naming(DIALECTS["flax"], "beit/")

    def __init__(
        self,
        config: BeitConfig,
        input_shape: tuple[int, ...] | None = None,
        seed: int = 0,
        dtype: Any = "float32",
        _do_init: bool = True,
        backend: str | None = None,
    ) -> None:
        self.config = config
        self.dtype = np.dtype(dtype).name
        self.backend = backend
        self._params: Params | None = None
        self._model: BeitPreTrainedModel | None = None
        self._of: Params | None = None  # the params that `_model` was made from
        if _do_init:
            model = self.model_class(config, seed=seed, dtype=self.dtype, backend=backend)
            self._params = self._of = flax_params(model.arrays, self.naming)
            self._model = model

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, dtype: Any = "float32", backend: str | None = None, **options: Any
    ) -> Any:
        """The model of a checkpoint in any format minibeit reads; see BeitPreTrainedModel.from_pretrained."""
        model = cls.model_class.from_pretrained(path, dtype=np.dtype(dtype).name, backend=backend, **options)
        adapter = cls(model.config, dtype=dtype, backend=backend, _do_init=False)
        adapter._params = adapter._of = flax_params(model.arrays, cls.naming)
        adapter._model = model
        return adapter

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors` with the Hub's names, which the other classes read too."""
        self._model_of(self.params).save_pretrained(folder)

    @property
    def params(self) -> Params:
        """The weights of a call without `params`.  Raises ValueError if there are none."""
        if self._params is None:
            raise ValueError(
                "params: this model was made with _do_init=False; give params= with the call or set params"
            )
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        self._params = params

    def __call__(
        self,
        pixel_values: Any,
        bool_masked_pos: Any | None = None,
        params: Params | None = None,
        dropout_rng: Any | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Runs the model on `pixel_values` (B, C, height, width).

        `params` replace the model's own weights.  The same dictionary is converted only once, so do not change its
        arrays in place.  `train=True` applies dropout at the config's rates and needs `dropout_rng`: a seed, a NumPy
        generator or a JAX key (the numbers drawn differ from JAX's).  `return_dict=False` returns a tuple, which,
        as in transformers, never has hidden states or attentions.  Raises ValueError for input that does not fit.
        """
        model = self._model_of(self.params if params is None else params)
        options: dict[str, Any] = {
            "output_hidden_states": bool(output_hidden_states),
            "output_attentions": bool(output_attentions),
            "rng": _generator(dropout_rng, self.config) if train else None,
        }
        if not isinstance(model, BeitForImageClassification):  # it ignores the mask, as in transformers
            options["bool_masked_pos"] = bool_masked_pos
        result = model(pixel_values, **options)  # type: ignore[operator]
        if return_dict is False:
            return tuple(result[name] for name in self.fields if name in result)
        return self.output_class(**dict(result.items()))

    def _model_of(self, params: Params) -> BeitPreTrainedModel:
        if self._model is None or params is not self._of:
            arrays = arrays_of(params, self.config, self.model_class.task, self.naming, self.dtype)
            self._model = self.model_class(self.config, dtype=self.dtype, backend=self.backend, arrays=arrays)
            self._of = params
        return self._model


class FlaxBeitModel(FlaxBeitPreTrainedModel):
    """The encoder without a head; its `params` lack the outer "beit" level."""

    model_class = BeitModel
    output_class = FlaxBeitModelOutputWithPooling
    fields = ("last_hidden_state", "pooler_output")
    naming = Naming(DIALECTS["flax"], "")


class FlaxBeitForMaskedImageModeling(FlaxBeitPreTrainedModel):
    """Scores of all visual tokens for every patch; there is no loss in Flax."""

    model_class = BeitForMaskedImageModeling
    output_class = FlaxMaskedLMOutput
    fields = ("logits",)


class FlaxBeitForImageClassification(FlaxBeitPreTrainedModel):
    """Class scores; there is no loss in Flax, and `bool_masked_pos` is ignored."""

    model_class = BeitForImageClassification
    output_class = FlaxSequenceClassifierOutput
    fields = ("logits",)


def flax_params(arrays: Mapping[str, np.ndarray], naming: Naming) -> dict[str, Any]:
    """{canonical name: array} as a nested dictionary with Flax's names and layouts; the arrays are views."""
    nested: dict[str, Any] = {}
    for name, array in arrays.items():
        place = naming.place(name)
        *path, last = place.name.split("/")
        node = nested
        for word in path:
            node = node.setdefault(word, {})
        node[last] = _to_flax(array, place)
    return nested


def arrays_of(params: Params, config: BeitConfig, task: str, naming: Naming, dtype: str) -> dict[str, np.ndarray]:
    """The reverse of `flax_params`.  Raises ValueError naming missing, unexpected or misshapen arrays."""
    if not isinstance(params, Mapping):
        raise ValueError(f"params: expected a nested dictionary of arrays, found {type(params).__name__}")
    flat = _flat(params)
    shapes = param_shapes(config, task)
    places = {name: naming.place(name) for name in shapes}
    missing = [place.name for place in places.values() if place.name not in flat]
    left = sorted(set(flat) - {place.name for place in places.values()})
    if missing or left:
        raise ValueError(
            f"params: the config asks for {len(places)} arrays, of which {len(missing)} are missing "
            f"({', '.join(missing[:3])}), and {len(left)} have no place ({', '.join(left[:3])})"
        )
    arrays = {}
    for name, place in places.items():
        array, expected = np.asarray(flat[place.name], dtype), place.stored_shape(shapes[name])
        if array.shape != expected:
            raise ValueError(f"params: {place.name} should have shape {expected}, found {array.shape}")
        arrays[name] = _from_flax(array, place)
    return arrays


def _flat(params: Params, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in params.items():
        path = f"{prefix}{name}"
        flat.update(_flat(value, path + "/") if isinstance(value, Mapping) else {path: value})
    return flat


def _to_flax(array: np.ndarray, place: Place) -> np.ndarray:
    if place.how == "hwio":
        return array.transpose(2, 3, 1, 0)
    return array.T if place.how == "transpose" else array


def _from_flax(array: np.ndarray, place: Place) -> np.ndarray:
    if place.how == "hwio":
        return array.transpose(3, 2, 0, 1)
    return array.T if place.how == "transpose" else array


def _generator(dropout_rng: Any | None, config: BeitConfig) -> np.random.Generator:
    if isinstance(dropout_rng, np.random.Generator):
        return dropout_rng
    if dropout_rng is None:
        rates = (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.drop_path_rate)
        if any(rates):
            raise ValueError("dropout_rng: train=True needs randomness: a seed, a generator or a JAX key")
        return np.random.default_rng(0)
    return np.random.default_rng(np.asarray(dropout_rng).astype(np.uint32).ravel())
