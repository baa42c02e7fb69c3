"""Detectors for other runtimes: one file from pixels to boxes, as ONNX, AOTInductor or .pt2."""

from .export import FORMATS, export

__all__ = ["FORMATS", "export"]
