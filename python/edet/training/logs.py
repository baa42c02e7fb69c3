"""What a training says while it runs: events for callbacks, a CSV file, TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..extras import require
from ..files import replacing


class Event(NamedTuple):
    """Something that happened in a training.

    Attributes:
        kind: ``step``, ``epoch`` (after its evaluation) or ``end``.
        epoch, epochs: the epoch, from 1, and how many there are.
        step, steps: steps so far, and how many there are.
        values: of a step ``loss``, ``class_loss``, ``box_loss``, ``learning_rate``,
            ``gradient_norm`` and ``images_per_second``; of an epoch its means and the figures of
            its evaluation; of the end the last epoch's.
        skipped: steps that were left out so far.
    """

    kind: str
    epoch: int
    epochs: int
    step: int
    steps: int
    values: Mapping[str, float]
    skipped: int


#: A function that is told of every event; in all processes, so that it may ask for the rank.
Callback: TypeAlias = Callable[[Event], None]


def write_csv(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Writes the epochs' rows, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


class TensorBoard:
    """A callback that writes events for TensorBoard.

    Args:
        folder: for its files.
        step: where a resumed run goes on: what was written beyond it is not shown.

    Raises:
        ImportError: tensorboard is missing (extra ``train``).
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        require("tensorboard", "train")
        writer = require("torch.utils.tensorboard", "train").SummaryWriter
        self._writer: Any = writer(str(folder), purge_step=step or None)

    def __call__(self, event: Event) -> None:
        group = {"step": "train", "epoch": "epoch"}.get(event.kind)
        if group is not None:
            for key, value in event.values.items():
                self._writer.add_scalar(f"{group}/{key}", value, event.step)
        if event.kind != "step":
            self._writer.flush()
        if event.kind == "end":
            self._writer.close()
