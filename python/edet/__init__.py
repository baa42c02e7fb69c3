"""EfficientDet on fused kernels: models, detection, training and the command line."""

from edet_kernels import __version__

from . import (
    anchors,
    describe,
    draw,
    layers,
    postprocess,
    preprocess,
    training,
    video,
)
from .detection.images import ImageError
from .detection.predictor import Prediction, Predictor
from .detection.results import Detections
from .dropin import accelerate, restore
from .models.checkpoints import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint
from .models.configs import ModelConfig, list_models
from .models.counts import count_macs, count_parameters
from .models.efficientdet import EfficientDet
from .models.factory import create_model
from .training import losses, targets

__all__ = [
    "CheckpointError",
    "Detections",
    "EfficientDet",
    "ImageError",
    "ModelConfig",
    "Prediction",
    "Predictor",
    "__version__",
    "accelerate",
    "anchors",
    "count_macs",
    "count_parameters",
    "create_model",
    "describe",
    "draw",
    "layers",
    "list_models",
    "load_checkpoint",
    "losses",
    "postprocess",
    "preprocess",
    "read_checkpoint",
    "restore",
    "save_checkpoint",
    "targets",
    "training",
    "video",
]
