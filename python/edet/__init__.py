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
from .deploy import export
from .detection.images import ImageError
from .detection.predictor import Prediction, Predictor
from .detection.quantize import int8_errors, quantize
from .detection.results import Detections
from .dropin import accelerate, restore
from .models.backbones import load_backbone
from .models.checkpoints import load_checkpoint, read_checkpoint, save_checkpoint
from .models.configs import ModelConfig, list_models
from .models.counts import count_macs, count_parameters
from .models.described import load_described, save_described
from .models.efficientdet import EfficientDet
from .models.factory import create_model
from .models.reading import CheckpointError
from .training import losses, targets
from .training.datasets import Dataset, open_dataset
from .training.evaluation import evaluate
from .training.formats import DatasetError
from .training.trainer import Trainer

__all__ = [
    "CheckpointError",
    "Dataset",
    "DatasetError",
    "Detections",
    "EfficientDet",
    "ImageError",
    "ModelConfig",
    "Prediction",
    "Predictor",
    "Trainer",
    "__version__",
    "accelerate",
    "anchors",
    "count_macs",
    "count_parameters",
    "create_model",
    "describe",
    "draw",
    "evaluate",
    "export",
    "int8_errors",
    "layers",
    "list_models",
    "load_backbone",
    "load_checkpoint",
    "load_described",
    "losses",
    "open_dataset",
    "postprocess",
    "preprocess",
    "quantize",
    "read_checkpoint",
    "restore",
    "save_checkpoint",
    "save_described",
    "targets",
    "training",
    "video",
]
