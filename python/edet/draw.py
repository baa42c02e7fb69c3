"""Drawing detections: the public face of :mod:`edet.detection.draw`."""

from .detection.draw import *  # noqa: F403
