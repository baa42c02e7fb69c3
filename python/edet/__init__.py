"""EfficientDet on fused kernels: models, detection and the command line."""

from edet_kernels import __version__

from . import layers, losses, targets, training
from .checkpoints import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint
from .configs import ModelConfig, list_models
from .dropin import accelerate, restore
from .efficientdet import EfficientDet, count_macs, count_parameters, create_model
from .predictor import Prediction, Predictor
from .preprocess import ImageError
from .results import Detections

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
    "count_macs",
    "count_parameters",
    "create_model",
    "layers",
    "list_models",
    "load_checkpoint",
    "losses",
    "read_checkpoint",
    "restore",
    "save_checkpoint",
    "targets",
    "training",
]
