"""The Auto classes of transformers, which choose the class of a model by its checkpoint."""

from __future__ import annotations

from .config import BeitConfig
from .image_processor import BeitImageProcessor
from .tasks.backbone import BeitBackbone
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

# The same network; a checkpoint's config says what differs.
Data2VecVisionModel = BeitModel
Data2VecVisionForImageClassification = BeitForImageClassification
Data2VecVisionForSemanticSegmentation = BeitForSemanticSegmentation
