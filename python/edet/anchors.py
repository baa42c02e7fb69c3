"""Anchor boxes: the public face of :mod:`edet.detection.anchors`."""

from .detection.anchors import *  # noqa: F403
