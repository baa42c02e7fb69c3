"""``edet.export``: a detector in one file for ONNX runtimes, AOTInductor or torch.export."""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import edet_kernels

from ..detection.predictor import Predictor
from ..detection.quantize import is_quantized
from ..extras import require
from ..files import check_target, replacing
from ..fused.module import constant_weights
from ..models.efficientdet import EfficientDet
from .graph import Detector, Interface, interface, metadata

#: The formats, and what their files' names end in.
FORMATS = {"onnx": ".onnx", "aoti": ".pt2", "torch": ".pt2"}

#: Version of ONNX's operators: the oldest that PyTorch's exporter writes.
OPSET = 18


def export(
    model: Predictor | EfficientDet | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    format: str = "onnx",
    batch_size: int | None = None,
    postprocess: bool = True,
    max_candidates: int = 5000,
    **options: Any,
) -> None:
    """Writes a detector for another runtime: one file from pixels to boxes.

    >>> edet.export("edet_lite0_person", "person.onnx")  # doctest: +SKIP
    >>> edet.export("run/best.pt", "detector.pt2", format="aoti")  # doctest: +SKIP

    The inputs are ``images``, (B, 3, H, W) uint8 RGB as :func:`edet.preprocess.letterbox` makes
    them, and ``sizes``, (B, 2) int64: height and width of each image before. The outputs are
    ``boxes`` (B, K, 4) float32 x1, y1, x2, y2 in pixels of that image, ``scores`` (B, K) float32,
    best first, ``labels`` (B, K) int64 and ``counts`` (B,) int64, how many of an image's K rows are
    detections; the rest is 0. They are the detections of :class:`edet.Predictor`. H and W are fixed
    in the file. The class names and the colour to fill up with are in the file's metadata.

    Formats: ``onnx`` is standard operators, for any runtime; of a model of :func:`edet.quantize`
    with its weights and scales, by QuantizeLinear and DequantizeLinear. ``aoti`` is a package
    compiled by AOTInductor, with the fused kernels: it needs libtorch and the op library, no
    Python. ``torch`` is ``torch.export``'s program of PyTorch's layers; its post-processing needs
    the op library.

    Args:
        model: a predictor, whose options are taken; or what :class:`edet.Predictor` takes, with
            these options. A model itself is copied, and stays as it is.
        path: the file, ``.onnx`` or ``.pt2``; it appears whole or not at all.
        format: ``onnx``, ``aoti`` or ``torch``.
        batch_size: B; any from 1 up when None.
        postprocess: False: the outputs are the heads', ``class_p3`` … logits (B, A·classes, h, w)
            and ``box_p3`` … regressions (B, A·4, h, w), and there is no ``sizes``.
        max_candidates: anchors × classes that enter the suppression of an image; TensorRT takes no
            more than 3840.
        options: of :class:`edet.Predictor`: ``image_size``, ``score_threshold``, ``device`` …

    Raises:
        ValueError: an unknown format, an ending of another one, a number out of range, soft-NMS in
            ONNX, an int8 model as ``torch``; see also :class:`edet.Predictor`.
        TypeError: options beside a predictor, or no model.
        edet_kernels.BackendError: ``aoti`` without the op library.
        ImportError: ``onnx`` without its packages.
        OSError: the file cannot be written, or ``aoti`` without a C++ compiler.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    path = Path(path)
    if path.suffix != FORMATS[format]:
        raise ValueError(f"path must end in {FORMATS[format]} for {format}, got {path}")
    for name, number in (("batch_size", batch_size), ("max_candidates", max_candidates)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    check_target(path)
    if format == "onnx":
        require("onnxscript", "onnx")
    elif format == "aoti":
        _check_compiler()
    predictor = _predictor(model, options)
    if format == "onnx":
        _check_onnx(predictor, postprocess)
    if format == "torch" and is_quantized(predictor.model):
        raise ValueError(
            "format must be onnx or aoti for an int8 model, which is no program of PyTorch's "
            "layers, got torch"
        )
    detector = Detector(predictor, postprocess, max_candidates).eval()
    batch = 2 if batch_size is None else batch_size  # a graph of one image would be of one only
    wires = interface(detector, batch)
    shapes = None
    if batch_size is None:
        dimension = torch.export.Dim("batch", min=1)
        shapes = {name: {0: dimension} for name in wires.inputs}
    write = {"onnx": _write_onnx, "aoti": _write_aoti, "torch": _write_torch}[format]
    with replacing(path) as temporary, torch.no_grad(), _quiet():
        write(detector, wires, shapes, metadata(predictor), temporary)


def _predictor(
    model: Predictor | EfficientDet | str | os.PathLike[str], options: dict[str, Any]
) -> Predictor:
    if isinstance(model, Predictor):
        if options:
            raise TypeError(
                f"options must be those of the predictor itself, got {', '.join(options)}"
            )
        return model
    if isinstance(model, EfficientDet):
        model = copy.deepcopy(model)  # a predictor freezes it
    return Predictor(model, **options)


def _check_compiler() -> None:
    """Checks that AOTInductor can compile."""
    from torch._inductor import cpp_builder, exc  # takes seconds

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise FileNotFoundError("aoti needs a C++ compiler: install g++, or set CXX") from error


def _check_onnx(predictor: Predictor, postprocess: bool) -> None:
    """Checks what ONNX, or its runtimes, cannot do."""
    if postprocess and predictor.nms != "hard":
        raise ValueError(
            f"nms must be hard in ONNX, which has no soft-NMS, got {predictor.nms}: export without "
            "post-processing, or as aoti"
        )
    if predictor.dtype not in (torch.float32, torch.float16):
        raise ValueError(f"dtype must be float32 or float16 in ONNX, got {predictor.dtype}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the compilers' remarks about themselves to themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write_onnx(
    detector: Detector,
    wires: Interface,
    shapes: dict[str, Any] | None,
    notes: dict[str, str],
    path: Path,
) -> None:
    model = detector.model
    # the ops on bytes have a form in ONNX whose weights are constants
    constants = constant_weights(model, detector.network.dtype) if is_quantized(model) else None
    with edet_kernels.backend("auto"), constants or nullcontext():
        program = torch.onnx.export(
            detector,
            kwargs=wires.examples,
            input_names=wires.inputs,
            output_names=wires.outputs,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(notes)
    program.save(path)


def _program(
    detector: Detector, wires: Interface, shapes: dict[str, Any] | None, backend: str
) -> torch.export.ExportedProgram:
    with edet_kernels.backend(backend):
        return torch.export.export(detector, (), wires.examples, dynamic_shapes=shapes)


def _write_torch(
    detector: Detector,
    wires: Interface,
    shapes: dict[str, Any] | None,
    notes: dict[str, str],
    path: Path,
) -> None:
    program = _program(detector, wires, shapes, "auto")
    torch.export.save(program, path, extra_files={"edet.json": json.dumps(notes)})


def _write_aoti(
    detector: Detector,
    wires: Interface,
    shapes: dict[str, Any] | None,
    notes: dict[str, str],
    path: Path,
) -> None:
    with constant_weights(detector.model, detector.network.dtype):
        program = _program(detector, wires, shapes, detector.anchors.device.type)
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(path),
        inductor_configs={
            "aot_inductor.metadata": notes,
            # what AOTI_RUNTIME_CHECK_INPUTS=1 checks: one image is allowed
            "aot_inductor.check_lowerbound": False,
        },
    )
