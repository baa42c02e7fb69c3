"""Training by the published recipe: data sets, augmentation, targets, losses, the trainer."""

from .augment import Augmentation
from .datasets import Dataset, Report, Sample, open_dataset
from .formats import DatasetError
from .loading import (
    Batch,
    TrainingBatches,
    TrainingImages,
    evaluation_loader,
    training_loader,
)
from .trainer import LEARNING_RATE, MovingAverage, Trainer, sgd, warmup_cosine

__all__ = [
    "LEARNING_RATE",
    "Augmentation",
    "Batch",
    "Dataset",
    "DatasetError",
    "MovingAverage",
    "Report",
    "Sample",
    "Trainer",
    "TrainingBatches",
    "TrainingImages",
    "evaluation_loader",
    "open_dataset",
    "sgd",
    "training_loader",
    "warmup_cosine",
]
