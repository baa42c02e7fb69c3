"""Training by the published recipe: data, augmentation, the trainer, evaluation, checkpoints."""

from .augment import Augmentation
from .datasets import Dataset, Report, Sample, Truth, open_dataset
from .evaluation import Evaluation, Found, confusion, detect, evaluate, score
from .fit import History
from .formats import DatasetError
from .loading import (
    Batch,
    TrainingBatches,
    TrainingImages,
    evaluation_loader,
    training_loader,
)
from .logs import Event, TensorBoard
from .processes import distributed, start_processes
from .recipe import (
    ADAMW_LEARNING_RATE,
    LEARNING_RATE,
    MovingAverage,
    adamw,
    sgd,
    warmup_cosine,
)
from .trainer import NotFiniteError, Skipped, Trainer

__all__ = [
    "ADAMW_LEARNING_RATE",
    "LEARNING_RATE",
    "Augmentation",
    "Batch",
    "Dataset",
    "DatasetError",
    "Evaluation",
    "Event",
    "Found",
    "History",
    "MovingAverage",
    "NotFiniteError",
    "Report",
    "Sample",
    "Skipped",
    "TensorBoard",
    "Trainer",
    "TrainingBatches",
    "TrainingImages",
    "Truth",
    "adamw",
    "confusion",
    "detect",
    "distributed",
    "evaluate",
    "evaluation_loader",
    "open_dataset",
    "score",
    "sgd",
    "start_processes",
    "training_loader",
    "warmup_cosine",
]
