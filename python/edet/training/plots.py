"""Pictures of a training and an evaluation: curves, a confusion matrix, the worst images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..detection.draw import draw_detections
from ..detection.images import load_image
from ..detection.results import Detections
from ..extras import require
from ..files import replacing
from .datasets import Dataset, Truth
from .evaluation import Evaluation, Found, confusion, match_objects

_CLASSES = 20  # of which names are shown


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")


def _figure(width: float, height: float) -> Any:
    # not pyplot, which would want a display and keep every figure
    return require("matplotlib.figure", "plot").Figure(figsize=(width, height))


def plot_precision_recall(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
    """Precision over recall at IoU 0.5, of each class and of their mean.

    Raises:
        ImportError: matplotlib is missing (extra ``plot``).
        OSError: ``path`` cannot be written.
    """
    figure = _figure(6, 5)
    axes = figure.add_subplot()
    recall = np.linspace(0, 1, 101)
    curves = evaluation.precision[0]
    shown = [i for i in range(curves.shape[1]) if curves[0, i] > -1]
    for i in shown[:_CLASSES]:
        name = evaluation.class_names[i]
        label = f"{name} {evaluation.class_ap50[name]:.2f}"
        axes.plot(recall, curves[:, i], lw=1, label=label)
    if shown:
        mean = curves[:, shown].mean(1)
        axes.plot(recall, mean, "k", lw=2, label=f"mean {evaluation.figures['AP50']:.2f}")
        axes.legend(fontsize=7, title="AP50")
    axes.set(xlabel="recall", ylabel="precision at IoU 0.5", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_confusion(
    matrix: np.ndarray[Any, Any], class_names: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """The matrix of :func:`edet.training.confusion`, in shares of each true class.

    Raises:
        ImportError: matplotlib is missing (extra ``plot``).
        OSError: ``path`` cannot be written.
    """
    names = [*class_names, "nothing"]
    side = max(4.0, min(0.6 * len(names) + 2, 20))
    figure = _figure(side, side)
    axes = figure.add_subplot()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=90, fontsize=8)
    axes.set_yticks(ticks, names, fontsize=8)
    axes.set(xlabel="found as", ylabel="is")
    if len(names) <= _CLASSES:
        for (row, column), count in np.ndenumerate(matrix):
            dark = shares[row, column] > 0.5
            colour = "white" if dark else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    _save(figure, path)


def plot_history(
    history: Sequence[Mapping[str, float]], path: str | os.PathLike[str], title: str = ""
) -> None:
    """Losses, learning rate and average precision over the epochs of a run.

    Args:
        history: rows of :class:`edet.training.History`.

    Raises:
        ImportError: matplotlib is missing (extra ``plot``).
        OSError: ``path`` cannot be written.
    """
    figure = _figure(12, 3.6)
    epochs = [row["epoch"] for row in history]
    panels: tuple[tuple[str, ...], ...]
    panels = (("loss", "class_loss", "box_loss"), ("AP", "AP50", "AP75"), ("learning_rate",))
    for i, keys in enumerate(panels, 1):
        axes = figure.add_subplot(1, 3, i)
        for key in keys:
            points = [(e, row[key]) for e, row in zip(epochs, history, strict=True) if key in row]
            if points:
                factor = 50 if key == "box_loss" else 1
                label = "50 × box_loss" if factor == 50 else key
                x, y = zip(*points, strict=True)
                axes.plot(x, [factor * v for v in y], marker=".", label=label)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.suptitle(title)
    _save(figure, path)


def _mistakes(truth: Truth, found: Found, threshold: float) -> int:
    return sum(true != label for true, label in match_objects(truth, found, threshold, 0.5))


def draw_worst(
    dataset: Dataset,
    found: Sequence[Found],
    folder: str | os.PathLike[str],
    *,
    count: int = 8,
    score_threshold: float = 0.3,
) -> list[Path]:
    """Draws the images with the most mistakes: left what is there, right what was found.

    A mistake is an object that was missed or found as another, or a detection of nothing.

    Returns:
        the pictures' files, the worst first; none where there is no mistake.

    Raises:
        ImportError: Pillow is missing (extra ``image``).
        OSError: ``folder`` cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    truths = [dataset.truth(i) for i in range(len(dataset))]
    mistakes = [_mistakes(t, f, score_threshold) for t, f in zip(truths, found, strict=True)]
    order = sorted(range(len(dataset)), key=lambda i: -mistakes[i])
    names = dict(enumerate(dataset.class_names, 1))
    files = []
    image_module = require("PIL.Image", "image")
    for place, index in enumerate([i for i in order if mistakes[i]][:count], 1):
        pixels, truth, objects = load_image(dataset.paths[index]), truths[index], found[index]
        size = (pixels.shape[1], pixels.shape[2])
        corners = truth.boxes.copy()
        corners[:, 2:] += corners[:, :2]
        there = Detections(
            torch.from_numpy(corners).float(),
            torch.ones(len(corners)),
            torch.from_numpy(truth.labels),
            size,
            names,
        )
        boxes, scores, labels = map(torch.from_numpy, objects)
        guesses = Detections(boxes, scores, labels, size, names).filter(score_threshold)
        left, right = draw_detections(pixels, there), draw_detections(pixels, guesses)
        picture = image_module.new("RGB", (left.width + right.width + 4, left.height), "white")
        picture.paste(left, (0, 0))
        picture.paste(right, (left.width + 4, 0))
        path = folder / f"{place:02}-{dataset.paths[index].stem}.jpg"
        with replacing(path) as temporary:
            picture.save(temporary, quality=90)
        files.append(path)
    return files


def plot_evaluation(
    evaluation: Evaluation,
    dataset: Dataset,
    folder: str | os.PathLike[str],
    *,
    worst: int = 8,
    score_threshold: float = 0.3,
) -> list[Path]:
    """All pictures of an evaluation, and ``evaluation.json``, in a folder; their files.

    Raises:
        ImportError: matplotlib or Pillow is missing.
        OSError: ``folder`` cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "precision-recall.png", folder / "confusion.png", folder / "evaluation.json"]
    plot_precision_recall(evaluation, files[0])
    truths = [dataset.truth(i) for i in range(len(dataset))]
    matrix = confusion(
        truths, evaluation.found, len(dataset.class_names), score_threshold=score_threshold
    )
    plot_confusion(matrix, dataset.class_names, files[1])
    evaluation.to_json(files[2])
    return files + draw_worst(
        dataset, evaluation.found, folder / "worst", count=worst, score_threshold=score_threshold
    )
