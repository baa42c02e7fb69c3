"""From pictures to the network's input: the public face of :mod:`edet.detection.preprocess`."""

from .detection.preprocess import *  # noqa: F403
