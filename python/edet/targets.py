"""Targets of training: the public face of :mod:`edet.training.targets`."""

from .training.targets import *  # noqa: F403
