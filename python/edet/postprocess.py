"""From raw outputs to detections: the public face of :mod:`edet.detection.postprocess`."""

from .detection.postprocess import *  # noqa: F403
