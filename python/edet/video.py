"""Videos: the public face of :mod:`edet.detection.video`."""

from .detection.video import *  # noqa: F403
