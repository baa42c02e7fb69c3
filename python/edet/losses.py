"""Losses of training: the public face of :mod:`edet.training.losses`."""

from .training.losses import *  # noqa: F403
