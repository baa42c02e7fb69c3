"""Average precision and recall as COCO counts them, for any data set and class ids."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from ..detection.pipeline import Network, Selection, columns, stages
from ..detection.preprocess import geometry, letterbox_fill
from ..extras import require
from ..files import replacing
from ..fused.module import FrozenModel
from ..models.described import load_described
from ..models.efficientdet import EfficientDet
from .datasets import Dataset, Truth
from .formats import DatasetError
from .loading import EvaluationImages, evaluation_loader
from .processes import from_first, gathered, process_group

Array = np.ndarray[Any, Any]

#: COCO's twelve figures, in the order of pycocotools.
FIGURES = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)


class Found(NamedTuple):
    """The detections of one image, best first.

    Attributes:
        boxes: (N, 4) float32 x1, y1, x2, y2 in pixels of the image.
        scores: (N,) float32.
        labels: (N,) int64, of the data set.
    """

    boxes: Array
    scores: Array
    labels: Array


@dataclass
class Evaluation:
    """What an evaluation found.

    Attributes:
        figures: COCO's twelve by name (:data:`FIGURES`); NaN where there is nothing to count, as
            for APs of images without small objects.
        class_ap: AP of each class; NaN for one without objects.
        class_ap50: the same at IoU 0.5.
        precision: (10, 101, K) at IoU 0.5, 0.55, … 0.95, recall 0, 0.01, … 1 and for each class; −1
            for a class without objects.
        found: the detections of each image of the data set.
        class_names: of labels 1, 2, …
    """

    figures: dict[str, float]
    class_ap: dict[str, float]
    class_ap50: dict[str, float]
    precision: Array
    found: list[Found]
    class_names: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            "  ".join(f"{k} {self.figures[k]:.3f}" for k in FIGURES[i : i + 6]) for i in (0, 6)
        ]
        width = max(map(len, self.class_names), default=0)
        lines += [
            f"  {name.ljust(width)}  AP {ap:.3f}  AP50 {self.class_ap50[name]:.3f}"
            for name, ap in self.class_ap.items()
        ]
        return "\n".join(lines)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes figures and each class' AP; null where there is nothing to count."""

        def plain(values: dict[str, float]) -> dict[str, float | None]:
            return {key: None if np.isnan(value) else value for key, value in values.items()}

        content = {
            "figures": plain(self.figures),
            "class_ap": plain(self.class_ap),
            "class_ap50": plain(self.class_ap50),
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


# --- counting -------------------------------------------------------------------------------------


def _coco(content: dict[str, Any]) -> Any:
    coco = require("pycocotools.coco", "coco").COCO()
    coco.dataset = content
    coco.createIndex()
    return coco


def _truths(truths: Sequence[Truth]) -> list[dict[str, Any]]:
    rows = [
        (image, box.tolist(), float(area), int(label), int(crowd))
        for image, truth in enumerate(truths, 1)
        for box, area, label, crowd in zip(*truth, strict=True)
    ]
    # ids start at 1: to pycocotools 0 means that a detection found nothing
    return [
        {"id": i, "image_id": im, "category_id": c, "bbox": box, "area": a, "iscrowd": crowd}
        for i, (im, box, a, c, crowd) in enumerate(rows, 1)
    ]


def _detections(found: Sequence[Found]) -> Array:
    """Rows of image, x, y, width, height, score and label, in the order of the images."""
    rows = []
    for i, (boxes, scores, labels) in enumerate(found, 1):
        corners = boxes.astype(np.float64)
        low, sides = corners[:, :2], corners[:, 2:] - corners[:, :2]
        rows.append(np.column_stack([np.full(len(scores), i), low, sides, scores, labels]))
    return np.concatenate(rows) if rows else np.zeros((0, 7))


def _mean(precision: Array) -> float:
    counted = precision[precision > -1]
    return float(counted.mean()) if counted.size else float("nan")


def score(
    truths: Sequence[Truth], found: Sequence[Found], class_names: Sequence[str]
) -> Evaluation:
    """COCO's figures of detections, by pycocotools.

    Args:
        truths: of each image.
        found: of each image.
        class_names: of labels 1, 2, …

    Raises:
        ImportError: pycocotools is missing (extra ``coco``).
    """
    evaluator = require("pycocotools.cocoeval", "coco").COCOeval
    content: dict[str, Any] = {
        "images": [{"id": i} for i in range(1, len(truths) + 1)],
        "categories": [{"id": i} for i in range(1, len(class_names) + 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints all it does
        truth = _coco({**content, "annotations": _truths(truths)})
        rows = _detections(found)
        # loadRes refuses to load nothing
        results = truth.loadRes(rows) if len(rows) else _coco({**content, "annotations": []})
        counted = evaluator(truth, results, "bbox")
        counted.evaluate()
        counted.accumulate()
        counted.summarize()
    figures = [float(x) if x > -1 else float("nan") for x in counted.stats]
    precision = counted.eval["precision"][..., 0, -1]  # of any area, with at most 100 detections
    names = list(class_names)
    return Evaluation(
        dict(zip(FIGURES, figures, strict=True)),
        {name: _mean(precision[:, :, i]) for i, name in enumerate(names)},
        {name: _mean(precision[0, :, i]) for i, name in enumerate(names)},
        precision,
        list(found),
        names,
    )


# --- detecting ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _as_it_was(model: EfficientDet) -> Iterator[None]:
    """Gives the model back as it is: training or eval mode of each part, gradients, not frozen."""
    modes = [(m, m.training) for m in model.modules()]
    gradients = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        model.unfreeze()
        for module, mode in modes:
            module.training = mode
        for parameter, wanted in gradients:
            parameter.requires_grad_(wanted)


def _label_table(model: EfficientDet, dataset: Dataset) -> Array:
    """The data set's label of each of the model's; 0 for one that is no class of the data set."""
    count, classes = model.config.num_classes, len(dataset.class_names)
    table: Array = np.zeros(count + 1, dtype=np.int64)
    if count == classes:
        table[1:] = np.arange(1, count + 1)
    elif min(dataset.category_ids) >= 1 and max(dataset.category_ids) <= count:
        for category, label in dataset.label_of.items():  # as the published models count
            table[category] = label
    else:
        raise DatasetError(
            f"the model has {count} classes and the data set {classes} "
            f"({', '.join(dataset.class_names[:5])}, …): they must be the same"
        )
    return table


def detect(
    model: EfficientDet,
    dataset: Dataset,
    *,
    image_size: tuple[int, int] | None = None,
    nms: str = "hard",
    iou_threshold: float = 0.5,
    score_threshold: float = 0.001,
    max_detections: int = 100,
    batch_size: int = 8,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Found]:
    """What the model finds in each image of the data set, as its :class:`edet.Predictor` does.

    On several processes each takes its share, and all get all of it. The arguments are those of
    :func:`evaluate`.
    """
    rank, processes = process_group()
    table = _label_table(model, dataset)
    mine: list[tuple[int, Found]] = []
    size = model.config.image_size if image_size is None else image_size
    selection = Selection(score_threshold, nms, iou_threshold, max_detections=max_detections)
    images = EvaluationImages(dataset, size, letterbox_fill(model.config.mean))
    batches = evaluation_loader(images, batch_size, rank=rank, processes=processes, workers=workers)
    with _as_it_was(model), torch.no_grad():
        network = Network(model, FrozenModel(model.eval()).runs_python)
        for batch in batches:
            _, *row = stages(network, batch.sizes, size, selection)
            where = geometry(batch.sizes, size)
            values = [x.to(network.device, non_blocking=True) for x in (batch.images, where)]
            for stage in row:
                values = stage(values)
            for index, rows in zip(batch.indices, values[0].cpu(), strict=True):
                boxes, scores, labels = (x.numpy() for x in columns(rows.float()))
                known = table[labels] > 0
                mine.append((index, Found(boxes[known], scores[known], table[labels][known])))
            if progress is not None:
                progress(len(batch.indices))
    everything = dict(pair for share in gathered(mine) for pair in share)
    return [everything[i] for i in range(len(dataset))]


def evaluate(
    model: EfficientDet | str | os.PathLike[str],
    data: Dataset,
    *,
    image_size: tuple[int, int] | None = None,
    nms: str = "hard",
    iou_threshold: float = 0.5,
    score_threshold: float = 0.001,
    max_detections: int = 100,
    batch_size: int = 8,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """COCO's figures of a model on a data set, by pycocotools (extra ``coco``).

    Crowd regions, and VOC's difficult objects, are neither to be found nor wrong to find. Boxes are
    compared as they stand in the annotations. The model is given back as it was. On several
    processes each takes its share of the images, and all get the result.

    Args:
        model: a model, or a checkpoint that says which one it is of. With as many classes as the
            data set, its labels are the data set's; with more, they are category ids, as in the
            published models.
        data: from :func:`edet.training.open_dataset`.
        image_size: (H, W) of the network's input; the model's own when None.
        nms, iou_threshold, max_detections: as for :class:`edet.Predictor`.
        score_threshold: average precision counts improbable detections too: leave it near 0.
        batch_size: images at once.
        workers: processes that read ahead.
        progress: called with the number of images after each batch.

    Raises:
        DatasetError: the model has other classes.
        ImportError: pycocotools is missing.
    """
    require("pycocotools.cocoeval", "coco")  # before the work
    if isinstance(model, str | os.PathLike):
        model, description = load_described(model)
        if description.class_names and description.class_names != data.class_names:
            raise DatasetError(
                f"the model's classes are {', '.join(description.class_names)}, the data set's "
                f"{', '.join(data.class_names)}: they must be the same, in this order"
            )
    found = detect(
        model,
        data,
        image_size=image_size,
        nms=nms,
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
        max_detections=max_detections,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
    )
    rank, _ = process_group()
    result = None
    if rank == 0:
        result = score([data.truth(i) for i in range(len(data))], found, data.class_names)
    shared: Evaluation = from_first(result)
    return shared


def confusion(
    truths: Sequence[Truth],
    found: Sequence[Found],
    classes: int,
    *,
    score_threshold: float = 0.3,
    iou_threshold: float = 0.5,
) -> Array:
    """How often an object of one class was found as another.

    The best detections come first; each takes the object it overlaps most, at least
    ``iou_threshold``, of any class, that is not taken yet. Those of crowd regions do not count.

    Returns:
        (K + 1, K + 1) int64: rows are true classes, columns found ones; the last row counts
        detections of nothing, the last column objects that were not found.
    """
    matrix: Array = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for truth, objects in zip(truths, found, strict=True):
        for true, label in match_objects(truth, objects, score_threshold, iou_threshold):
            matrix[true - 1 if true else classes, label - 1 if label else classes] += 1
    return matrix


def match_objects(
    truth: Truth, found: Found, score_threshold: float, iou_threshold: float
) -> list[tuple[int, int]]:
    """Pairs of true and found labels of one image; 0 for none. See :func:`confusion`."""
    corners = truth.boxes.copy()
    corners[:, 2:] += corners[:, :2]
    sure = found.scores > score_threshold
    boxes, labels = found.boxes[sure].astype(np.float64), found.labels[sure]
    low = np.maximum(boxes[:, None, :2], corners[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], corners[None, :, 2:])
    overlap = np.clip(high - low, 0, None).prod(2)
    own, others = ((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, corners))
    iou = overlap / np.maximum(own[:, None] + others - overlap, 1e-9)
    inside = overlap / np.maximum(own[:, None], 1e-9)
    taken = truth.crowd.copy()
    result = []
    for i, label in enumerate(labels.tolist()):
        free = np.where(taken, 0, iou[i])
        best = int(free.argmax()) if free.size else -1
        if best >= 0 and free[best] >= iou_threshold:
            taken[best] = True
            result.append((int(truth.labels[best]), label))
        elif not (inside[i][truth.crowd] >= iou_threshold).any():
            result.append((0, label))
    missed = np.logical_and(np.logical_not(taken), np.logical_not(truth.crowd))
    return result + [(int(label), 0) for label in truth.labels[missed]]
