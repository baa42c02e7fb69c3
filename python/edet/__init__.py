"""EfficientDet on fused kernels: models, detection and the command line."""

from edet_kernels import __version__

from .checkpoints import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint
from .configs import ModelConfig, list_models
from .efficientdet import EfficientDet, count_macs, count_parameters, create_model

__all__ = [
    "CheckpointError",
    "EfficientDet",
    "ModelConfig",
    "__version__",
    "count_macs",
    "count_parameters",
    "create_model",
    "list_models",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
]
