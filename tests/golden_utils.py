"""Reads the golden fixtures and rebuilds the models, weights and images they were made with."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import edet
from edet_kernels.testing.numeric import NETWORK_FACTOR, NETWORK_FLOOR, allowed

FOLDER = Path(__file__).parent / "golden"

#: Every fixture, the quick ones first.
NAMES = (
    "tf_efficientdet_lite0",
    "tf_efficientdet_d0",
    "efficientdet_d0",
    "tf_efficientdet_d1_640x384",
    "tf_efficientdet_d6",
    "tf_efficientdet_d7x",
)

#: Fixtures whose scores are not saturated, so that their detections can be compared.
DETECTION_NAMES = tuple(name for name in NAMES if "d1" not in name and "d7x" not in name)


@dataclass(frozen=True)
class Golden:
    """One fixture.

    Attributes:
        name: of the file, without suffix.
        meta: see the README beside the files.
        taps: (k,) float64 samples of each tap.
        stats: running statistics of the batch norms, by state-dict key.
        detections: (batch, 100, 6) x1, y1, x2, y2, score, class.
    """

    name: str
    meta: dict[str, Any]
    taps: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]
    detections: np.ndarray

    def _generator(self, key: str) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([zlib.crc32(key.encode()), self.meta["salt"]]))

    def _entry(self, key: str, shape: list[int]) -> np.ndarray:
        g = self._generator(key)
        if key.endswith("edge_weights"):
            weights = g.uniform(0.2, 1.8, shape)
            if g.uniform() < 0.25:
                weights[-1] = -0.3
            return weights
        if len(shape) == 4:
            return g.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        if key.endswith("weight"):
            return g.uniform(0.8, 1.2, shape)
        if key.endswith("bias"):
            return 0.1 * g.standard_normal(shape)
        if key.endswith("num_batches_tracked"):
            return np.zeros(shape)
        return self.stats[key]

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, float32, in effdet's order."""
        return {
            key: torch.from_numpy(np.asarray(self._entry(key, shape), np.float32))
            for key, shape in self.meta["state_dict"].items()
        }

    def images(self) -> Tensor:
        """The input (batch, 3, H, W), float32."""
        batch, (height, width) = self.meta["batch"], self.meta["image_size"]
        g = self._generator("input")
        coarse = g.standard_normal((batch, 3, -(-height // 16), -(-width // 16)))
        coarse = coarse.repeat(16, axis=2).repeat(16, axis=3)[:, :, :height, :width]
        noise = g.standard_normal((batch, 3, height, width))
        return torch.from_numpy((coarse + 0.25 * noise).astype(np.float32))

    def new_model(self) -> edet.EfficientDet:
        """The model as it is created."""
        return edet.create_model(self.meta["model"], num_classes=self.meta["num_classes"])

    def model(self) -> edet.EfficientDet:
        """The model with its weights, float32, in eval mode."""
        model = self.new_model()
        model.load_state_dict(self.state_dict())
        return model.eval()

    def errors(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Largest difference of each tap, as a fraction of its absmax; the shapes must agree."""
        errors = {}
        for name, tap in self.meta["taps"].items():
            assert list(outputs[name].shape) == tap["shape"], name
            samples = self.taps[name]
            index = np.linspace(0, outputs[name].numel() - 1, len(samples)).astype(np.int64)
            found = outputs[name].detach().double().flatten().numpy()[index]
            errors[name] = float(np.abs(found - samples).max() / tap["absmax"])
        return errors

    def float32_bounds(self) -> dict[str, float]:
        """The error allowed to each tap in float32."""
        worst: dict[str, float] = {}
        for name, tap in self.meta["taps"].items():
            group = name.split(".")[0]
            worst[group] = max(worst.get(group, 0.0), tap["float32_error"])
        return {
            name: allowed(worst[name.split(".")[0]], factor=NETWORK_FACTOR, floor=NETWORK_FLOOR)
            for name in self.meta["taps"]
        }


def golden(name: str) -> Golden:
    """The fixture ``name``, one of :data:`NAMES`."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    return Golden(
        name,
        json.loads(str(arrays.pop("meta"))),
        {k.removeprefix("tap/"): v for k, v in arrays.items() if k.startswith("tap/")},
        {k.removeprefix("stat/"): v for k, v in arrays.items() if k.startswith("stat/")},
        arrays["detections"],
    )


def run(model: edet.EfficientDet, images: Tensor) -> dict[str, Tensor]:
    """The outputs of all parts of ``model`` under the names of the taps."""
    features = model.backbone(images)
    pyramid = model.fpn(features)
    groups = {
        "backbone": features,
        "fpn": pyramid,
        "class": model.class_net(pyramid),
        "box": model.box_net(pyramid),
    }
    return {f"{group}.{i}": x for group, maps in groups.items() for i, x in enumerate(maps)}
