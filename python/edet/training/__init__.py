"""Training by the published recipe: targets, losses, the trainer."""

from .trainer import LEARNING_RATE, MovingAverage, Trainer, sgd, warmup_cosine

__all__ = ["LEARNING_RATE", "MovingAverage", "Trainer", "sgd", "warmup_cosine"]
