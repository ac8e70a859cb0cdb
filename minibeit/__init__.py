"""minibeit: BEiT in NumPy and numba, to read, to check implementations against, and to run without a framework.

The public names are those of transformers, so that code moves over by changing an import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .auto import (
        AutoBackbone,
        AutoConfig,
        AutoFeatureExtractor,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForMaskedImageModeling,
        AutoModelForSemanticSegmentation,
        BeitImageProcessorFast,
        BeitImageProcessorPil,
        Data2VecVisionConfig,
        Data2VecVisionForImageClassification,
        Data2VecVisionForSemanticSegmentation,
        Data2VecVisionModel,
        Data2VecVisionPreTrainedModel,
    )
    from .config import BeitConfig
    from .errors import CheckpointError, ImageError
    from .explorer.exploration import Exploration, explore
    from .flax import FlaxBeitForImageClassification, FlaxBeitForMaskedImageModeling, FlaxBeitModel
    from .image_processor import BeitFeatureExtractor, BeitImageProcessor
    from .images.ahead import read_ahead
    from .noise import Noise
    from .outputs import (
        BackboneOutput,
        BeitModelOutputWithPooling,
        FlaxBeitModelOutputWithPooling,
        FlaxMaskedLMOutput,
        FlaxSequenceClassifierOutput,
        ImageClassifierOutput,
        MaskedLMOutput,
        SemanticSegmenterOutput,
    )
    from .pipelines import pipeline
    from .tasks.backbone import BeitBackbone
    from .tasks.base import BeitPreTrainedModel
    from .tasks.image_classification import BeitForImageClassification
    from .tasks.masked_image_modeling import BeitForMaskedImageModeling
    from .tasks.model import BeitModel
    from .tasks.semantic_segmentation import BeitForSemanticSegmentation
    from .tokenizer.config import DalleTokenizerConfig
    from .tokenizer.tokenizer import DalleTokenizer
    from .trace import Trace
    from .train.gradients import Gradients, value_and_grad

# Where each public name lives; a module is imported when its name is first asked for, so `import minibeit` is quick.
_HOMES = {
    "BeitConfig": "config",
    "BeitImageProcessor": "image_processor",
    "BeitFeatureExtractor": "image_processor",
    "BeitModel": "tasks.model",
    "BeitForMaskedImageModeling": "tasks.masked_image_modeling",
    "BeitForImageClassification": "tasks.image_classification",
    "BeitForSemanticSegmentation": "tasks.semantic_segmentation",
    "BeitBackbone": "tasks.backbone",
    "FlaxBeitModel": "flax",
    "FlaxBeitForMaskedImageModeling": "flax",
    "FlaxBeitForImageClassification": "flax",
    "FlaxBeitModelOutputWithPooling": "outputs",
    "FlaxMaskedLMOutput": "outputs",
    "FlaxSequenceClassifierOutput": "outputs",
    "BeitModelOutputWithPooling": "outputs",
    "MaskedLMOutput": "outputs",
    "ImageClassifierOutput": "outputs",
    "SemanticSegmenterOutput": "outputs",
    "BackboneOutput": "outputs",
    "DalleTokenizer": "tokenizer.tokenizer",
    "DalleTokenizerConfig": "tokenizer.config",
    "Trace": "trace",
    "read_ahead": "images.ahead",
    "pipeline": "pipelines",
    "AutoBackbone": "auto",
    "AutoConfig": "auto",
    "AutoFeatureExtractor": "auto",
    "AutoImageProcessor": "auto",
    "AutoModel": "auto",
    "AutoModelForImageClassification": "auto",
    "AutoModelForMaskedImageModeling": "auto",
    "AutoModelForSemanticSegmentation": "auto",
    "Data2VecVisionForImageClassification": "auto",
    "Data2VecVisionForSemanticSegmentation": "auto",
    "Data2VecVisionModel": "auto",
    "BeitImageProcessorFast": "auto",
    "BeitImageProcessorPil": "auto",
    "Data2VecVisionConfig": "auto",
    "Data2VecVisionPreTrainedModel": "auto",
    "BeitPreTrainedModel": "tasks.base",
    "Noise": "noise",
    "Gradients": "train.gradients",
    "value_and_grad": "train.gradients",
    "Exploration": "explorer.exploration",
    "explore": "explorer.exploration",
    "CheckpointError": "errors",
    "ImageError": "errors",
}

__all__ = [
    "AutoBackbone",
    "AutoConfig",
    "AutoFeatureExtractor",
    "AutoImageProcessor",
    "AutoModel",
    "AutoModelForImageClassification",
    "AutoModelForMaskedImageModeling",
    "AutoModelForSemanticSegmentation",
    "BackboneOutput",
    "BeitBackbone",
    "BeitConfig",
    "BeitFeatureExtractor",
    "BeitForImageClassification",
    "BeitForMaskedImageModeling",
    "BeitForSemanticSegmentation",
    "BeitImageProcessor",
    "BeitImageProcessorFast",
    "BeitImageProcessorPil",
    "BeitModel",
    "BeitModelOutputWithPooling",
    "BeitPreTrainedModel",
    "CheckpointError",
    "DalleTokenizer",
    "DalleTokenizerConfig",
    "Data2VecVisionConfig",
    "Data2VecVisionForImageClassification",
    "Data2VecVisionForSemanticSegmentation",
    "Data2VecVisionModel",
    "Data2VecVisionPreTrainedModel",
    "Exploration",
    "FlaxBeitForImageClassification",
    "FlaxBeitForMaskedImageModeling",
    "FlaxBeitModel",
    "FlaxBeitModelOutputWithPooling",
    "FlaxMaskedLMOutput",
    "FlaxSequenceClassifierOutput",
    "Gradients",
    "ImageClassifierOutput",
    "ImageError",
    "MaskedLMOutput",
    "Noise",
    "SemanticSegmenterOutput",
    "Trace",
    "__version__",
    "explore",
    "pipeline",
    "read_ahead",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minibeit' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
