"""A predictor behind NVIDIA Triton Inference Server: the class its Python backend runs.

``edet triton-repository`` writes the folder that the server loads; docs/serving.md has both.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .detection.predictor import Prediction, Predictor
from .detection.results import Detections

__all__ = ["TritonPythonModel"]


class TritonPythonModel:
    """Encoded pictures to boxes; the methods are those that Triton's Python backend calls.

    A request has one tensor, ``image``: (B, 1) bytes, each a file such as a JPEG. The response has,
    for M the most objects of an image, ``boxes`` (B, M, 4) float32 x1, y1, x2, y2 in pixels of the
    upright picture, ``scores`` (B, M) float32, descending, ``labels`` (B, M) int64 and ``names``
    (B, M) bytes, all filled up with zeros, and ``count`` (B, 1) int32, how many are objects. A
    picture that cannot be read makes an error of its request, and of no other in the batch.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the checkpoint that lies beside the server's ``model.py``.

        Args:
            args: the server's: ``model_config``, JSON of the config; ``model_repository``, the
                model's folder; ``model_version``; ``model_instance_kind``, CPU or GPU; and
                ``model_instance_device_id``.
        """
        # the server's own module, which is nowhere else
        self._triton: Any = importlib.import_module("triton_python_backend_utils")
        config = json.loads(args["model_config"])
        options = {key: value["string_value"] for key, value in config["parameters"].items()}
        if int(options["threads"]):
            torch.set_num_threads(int(options["threads"]))
        gpu = args["model_instance_kind"] == "GPU"
        self._most = int(options["max_detections"])
        self._workers = int(options["workers"])
        self._predictor = Predictor(
            Path(args["model_repository"], args["model_version"], options["checkpoint"]),
            score_threshold=float(options["score_threshold"]),
            nms=options["nms"],
            iou_threshold=float(options["iou_threshold"]),
            class_agnostic=options["class_agnostic"] == "true",
            max_detections=self._most,
            image_size=(int(options["image_height"]), int(options["image_width"])),
            batch_size=max(1, config["max_batch_size"]),
            device=f"cuda:{args['model_instance_device_id']}" if gpu else "cpu",
            dtype=getattr(torch, options["dtype"]),
        )
        self._predictor.warm_up()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers each request, the images of all of them in one batch."""
        tensors = [self._triton.get_input_tensor_by_name(r, "image") for r in requests]
        images = [[bytes(file) for file in t.as_numpy().reshape(-1)] for t in tensors]
        found = self._predictor.stream((x for xs in images for x in xs), workers=self._workers)
        return [self._response([next(found) for _ in xs]) for xs in images]

    def _response(self, found: Sequence[Prediction]) -> Any:
        """The objects of a request's images, or why one of them cannot be used."""
        rows = []
        for i, prediction in enumerate(found):
            if prediction.detections is None:
                error = self._triton.TritonError(f"image {i} of the request: {prediction.error}")
                return self._triton.InferenceResponse(output_tensors=[], error=error)
            rows.append(self._padded(prediction.detections))
        columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return self._triton.InferenceResponse(
            output_tensors=[self._triton.Tensor(name, x) for name, x in columns.items()]
        )

    def _padded(self, found: Detections) -> dict[str, np.ndarray[Any, Any]]:
        """The output tensors of one image."""
        count, most = len(found), self._most
        boxes, scores = np.zeros((most, 4), np.float32), np.zeros(most, np.float32)
        labels, names = np.zeros(most, np.int64), np.full(most, b"", object)
        boxes[:count], scores[:count] = found.boxes.float().numpy(), found.scores.float().numpy()
        labels[:count] = found.labels.numpy()
        names[:count] = [name.encode() for name in found.names]
        return {
            "boxes": boxes,
            "scores": scores,
            "labels": labels,
            "names": names,
            "count": np.array([count], np.int32),
        }
