"""Descriptions of other people's networks: the public face of :mod:`edet.fused.describe`."""

from .fused.describe import *  # noqa: F403
