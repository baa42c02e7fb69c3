"""What was found in one image, and its conversions: COCO results, torchvision's dict, JSON."""

from __future__ import annotations

import json
import operator
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..files import replacing
from .draw import draw_detections
from .images import ImageLike
from .labels import COCO_NAMES, label_name

if TYPE_CHECKING:
    from PIL.Image import Image


class Detection(NamedTuple):
    """One object: x1, y1, x2, y2 in pixels of the image, score in [0, 1], label and its name."""

    box: tuple[float, float, float, float]
    score: float
    label: int
    name: str


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """The objects of one image, best first.

    ``len``, iteration and indexing work: an integer of any kind gives a :class:`Detection`;
    a slice, a mask, a list, array or tensor of indices gives :class:`Detections`.

    Attributes:
        boxes: (N, 4) float x1, y1, x2, y2 in pixels of the original, upright image.
        scores: (N,) float in [0, 1], descending.
        labels: (N,) int64, class index + 1; COCO's category ids for the published models.
        image_size: (height, width) of the original image.
        label_names: label to name.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    image_size: tuple[int, int]
    label_names: Mapping[int, str] = field(default_factory=lambda: COCO_NAMES)

    def __post_init__(self) -> None:
        count = len(self.scores)
        shapes = (tuple(self.boxes.shape), tuple(self.scores.shape), tuple(self.labels.shape))
        if shapes != ((count, 4), (count,), (count,)):
            raise ValueError(
                f"boxes, scores and labels must be (N, 4), (N,) and (N,), got {shapes[0]}, "
                f"{shapes[1]} and {shapes[2]}"
            )

    @property
    def names(self) -> list[str]:
        """The name of each object's label."""
        return [label_name(label, self.label_names) for label in self.labels.tolist()]

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        rows = zip(
            self.boxes.tolist(),
            self.scores.tolist(),
            self.labels.tolist(),
            self.names,
            strict=True,
        )
        return (Detection(tuple(box), score, label, name) for box, score, label, name in rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, np.ndarray) and index.ndim:
            index = torch.from_numpy(np.ascontiguousarray(index))
        if not isinstance(index, bool) and not getattr(index, "ndim", 0):
            with suppress(TypeError):  # a slice, a list, a single truth value
                index = operator.index(index)
        if isinstance(index, int):
            box, label = tuple(self.boxes[index].tolist()), int(self.labels[index])
            score = float(self.scores[index])
            return Detection(box, score, label, label_name(label, self.label_names))
        return Detections(
            self.boxes[index],
            self.scores[index],
            self.labels[index],
            self.image_size,
            self.label_names,
        )

    def __repr__(self) -> str:
        height, width = self.image_size
        found = Counter(self.names)
        listed = ", ".join(f"{count} {name}" for name, count in found.most_common(8))
        more = f", {len(found) - 8} more" if len(found) > 8 else ""
        best = f"; best {float(self.scores[0]):.2f}" if len(self) else ""
        return f"<Detections in {width}x{height}: {listed or 'nothing'}{more}{best}>"

    def filter(self, score_threshold: float) -> Detections:
        """The objects with a score above ``score_threshold``."""
        kept: Detections = self[self.scores > score_threshold]
        return kept

    def to(self, device: torch.device | str) -> Detections:
        """The same objects with their tensors on ``device``."""
        return Detections(
            self.boxes.to(device),
            self.scores.to(device),
            self.labels.to(device),
            self.image_size,
            self.label_names,
        )

    def to_dict(self) -> dict[str, Tensor]:
        """torchvision's convention: ``boxes`` (N, 4) xyxy, ``labels`` (N,) and ``scores`` (N,)."""
        return {"boxes": self.boxes, "labels": self.labels, "scores": self.scores}

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """COCO's result format: one dict per object, ``bbox`` is x, y, width, height in pixels."""
        return [
            {
                "image_id": image_id,
                "category_id": d.label,
                "bbox": [d.box[0], d.box[1], d.box[2] - d.box[0], d.box[3] - d.box[1]],
                "score": d.score,
            }
            for d in self
        ]

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The objects as JSON text, also written to ``path`` when it is given.

        ``{"image_size": [height, width], "detections": [{"box": [x1, y1, x2, y2], "score": …,
        "label": …, "name": …}, …]}``, read back by :meth:`from_json`.

        Raises:
            ValueError: a box or score is not finite, which JSON cannot hold.
            OSError: ``path`` cannot be written; nothing is left behind.
        """
        text = json.dumps(self.to_plain(), indent=1, allow_nan=False)
        if path is not None:
            with replacing(path) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        return text

    def to_plain(self) -> dict[str, Any]:
        """The structure of :meth:`to_json` in plain Python types."""
        return {
            "image_size": list(self.image_size),
            "detections": [{**d._asdict(), "box": list(d.box)} for d in self],
        }

    @classmethod
    def from_json(cls, text: str) -> Detections:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: ``text`` is not such JSON.
        """
        try:
            plain = json.loads(text)
            rows = plain["detections"]
            height, width = plain["image_size"]
            whole = [height, width, *(row["label"] for row in rows)]
            if not all(isinstance(number, int) for number in whole):
                raise TypeError("sizes and labels must be integers")
            if not all(isinstance(row["name"], str) for row in rows):
                raise TypeError("names must be strings")
            boxes = [row["box"] for row in rows]
            return cls(
                torch.tensor(boxes, dtype=torch.float32, device="cpu").view(-1, 4),
                torch.tensor([row["score"] for row in rows], dtype=torch.float32, device="cpu"),
                torch.tensor([row["label"] for row in rows], dtype=torch.int64, device="cpu"),
                (height, width),
                {row["label"]: row["name"] for row in rows},
            )
        except Exception as error:  # KeyError, RuntimeError of torch, RecursionError, …
            raise ValueError(
                f"text must be JSON as Detections.to_json writes it: {error!r}"
            ) from error

    def draw(self, image: ImageLike, *, font: str | os.PathLike[str] | None = None) -> Image:
        """``image`` with the boxes and names drawn on it; see :func:`edet.draw.draw_detections`."""
        return draw_detections(image, self, font=font)
