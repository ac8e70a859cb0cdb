"""The Auto classes of transformers, which choose the class of a model by its checkpoint."""

from __future__ import annotations

from typing import Any

from .config import BeitConfig
from .image_processor import BeitImageProcessor
from .tasks.backbone import BeitBackbone
from .tasks.base import BeitPreTrainedModel
from .tasks.image_classification import BeitForImageClassification
from .tasks.masked_image_modeling import BeitForMaskedImageModeling
from .tasks.model import BeitModel
from .tasks.semantic_segmentation import BeitForSemanticSegmentation

AutoConfig = BeitConfig
AutoImageProcessor = AutoFeatureExtractor = BeitImageProcessor
AutoModel = BeitModel
AutoBackbone = BeitBackbone
AutoModelForMaskedImageModeling = BeitForMaskedImageModeling
AutoModelForImageClassification = BeitForImageClassification
AutoModelForSemanticSegmentation = BeitForSemanticSegmentation

BeitImageProcessorFast = BeitImageProcessorPil = BeitImageProcessor  # there is one way of reading images here

# The same network; a checkpoint's config says what differs.
Data2VecVisionPreTrainedModel = BeitPreTrainedModel
Data2VecVisionModel = BeitModel
Data2VecVisionForImageClassification = BeitForImageClassification
Data2VecVisionForSemanticSegmentation = BeitForSemanticSegmentation


class Data2VecVisionConfig(BeitConfig):
    """A BeitConfig whose `model_type` is "data2vec-vision" unless it says otherwise."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**{"model_type": "data2vec-vision", **values})
