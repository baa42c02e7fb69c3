"""From pictures to the network's input: the public face of :mod:`edet.detection`'s two modules."""

from .detection.images import *  # noqa: F403
from .detection.preprocess import *  # noqa: F403
