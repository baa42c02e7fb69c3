"""A whole training: epochs, evaluation, checkpoints that a kill cannot harm, and going on."""

from __future__ import annotations

import math
import os
import signal
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ..files import leftovers
from ..models.described import read_description, read_training, save_described
from ..models.reading import CheckpointError
from .augment import Augmentation
from .datasets import Dataset
from .evaluation import Evaluation, evaluate
from .formats import DatasetError
from .loading import TrainingBatches, TrainingImages, training_loader
from .logs import Callback, Event, TensorBoard, write_csv
from .losses import Losses
from .processes import process_group

if TYPE_CHECKING:
    from .trainer import Trainer

LAST, BEST, LOG = "last.pt", "best.pt", "log.csv"
_MEANS = ("loss", "class_loss", "box_loss", "gradient_norm")
_SPEED_STEPS = 20  # over which images per second are counted


@dataclass
class History:
    """What a training did.

    Attributes:
        rows: of each epoch: ``epoch``, ``step``, means of ``loss``, ``class_loss``, ``box_loss``
            and ``gradient_norm``, ``learning_rate``, ``skipped`` and the figures of its evaluation.
        evaluation: the last one; None without validation data, or when a finished run was resumed.
        interrupted: it was stopped before its end.
        best: AP of ``best.pt``; NaN before the first evaluation.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    evaluation: Evaluation | None = None
    interrupted: bool = False
    best: float = math.nan


def fit(
    trainer: Trainer,
    data: Dataset,
    *,
    epochs: int,
    validation: Dataset | None = None,
    folder: str | os.PathLike[str] | None = None,
    augmentation: Augmentation | None = Augmentation(),  # noqa: B008 (a constant)
    difficult: bool = True,
    workers: int = 2,
    seed: int = 0,
    evaluate_every: int = 1,
    patience: int | None = None,
    save_minutes: float = 10.0,
    resume: bool = False,
    tensorboard: bool = False,
    callbacks: Sequence[Callback] = (),
) -> History:
    """Trains on a data set, evaluates the average of the weights, and keeps checkpoints.

    ``last.pt`` is written after every epoch, every ``save_minutes``, and when the run is stopped;
    ``best.pt`` when the evaluation's AP is the highest so far. Both hold the averaged weights and
    know what they are: ``edet.Predictor("run/best.pt")``. Ctrl-C, or SIGTERM, ends the run after
    the step it is at. What an image becomes and the order of images depend on ``seed`` alone, so
    that a run resumed on one process continues to the same bits.

    Args:
        trainer: its ``batch_size`` is that of a step over all processes.
        data: what to learn; its classes are the model's.
        epochs: times that every image is seen.
        validation: what to evaluate on.
        folder: for checkpoints and logs; nothing is written when None.
        augmentation: None for none.
        difficult: learn VOC's difficult objects too.
        workers: processes that read ahead.
        seed: of order and augmentation.
        evaluate_every: epochs from one evaluation to the next; the last is always evaluated.
        patience: evaluations without a better AP after which the run ends.
        save_minutes: from one checkpoint to the next within an epoch.
        resume: go on from ``folder/last.pt``; from the start where there is none.
        tensorboard: write for TensorBoard too.
        callbacks: called with every :class:`Event`; one may set ``trainer.stopping``.

    Raises:
        ValueError, DatasetError: an argument, or data of other classes than the model's.
        CheckpointError: the run to resume is another one.
        NotFiniteError: several steps in a row were not finite.
        OSError: the folder cannot be written at the start or the end; in between that is a warning.
    """
    _check_arguments(trainer, data, validation, epochs=epochs, evaluate_every=evaluate_every)
    rank, processes = process_group()
    batches = TrainingBatches(
        len(data), trainer.batch_size, seed=seed, rank=rank, processes=processes
    )
    config = trainer.model.config
    images = TrainingImages(data, config, augmentation, seed=seed, difficult=difficult)
    images.mosaic_epochs = epochs - epochs // 5
    settings = _settings(trainer, data, epochs, seed)
    run = _Run(trainer, data, settings, None if folder is None else Path(folder))
    run.open(resume)
    if trainer.schedule is None:
        trainer.set_steps(epochs * batches.steps)
    run.callbacks = [*callbacks, *([run.tensorboard()] if tensorboard and rank == 0 else [])]
    loader = training_loader(images, batches, workers=workers)
    trainer.stopping = False
    with _stopped_by_signals(trainer):
        while trainer.epoch < epochs and not trainer.stopped:
            batches.epoch, batches.start = trainer.epoch, trainer.epoch_step
            run.train_epoch(loader, epochs, epochs * batches.steps, save_minutes)
            if trainer.stopped:
                break
            last = trainer.epoch + 1 == epochs
            if validation is not None and (last or (trainer.epoch + 1) % evaluate_every == 0):
                run.evaluate(validation, workers)
            run.end_epoch(epochs, epochs * batches.steps)
            if patience is not None and run.evaluations_since_best >= patience:
                break
    return run.end(epochs, epochs * batches.steps)


def _settings(trainer: Trainer, data: Dataset, epochs: int, seed: int) -> dict[str, int | str]:
    """What a run must be resumed with."""
    return {
        "epochs": epochs,
        "seed": seed,
        "batch_size": trainer.batch_size,
        "images": len(data),
        "optimizer": type(trainer.optimizer).__name__,
        "accumulate": trainer.accumulate,
        "freeze": ", ".join(trainer.freeze),
    }


def _check_arguments(
    trainer: Trainer, data: Dataset, validation: Dataset | None, **counts: int
) -> None:
    for name, number in counts.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if process_group()[1] > 1 and not isinstance(trainer.forward, DistributedDataParallel):
        raise ValueError("on several processes Trainer's forward must be DistributedDataParallel")
    _check_classes(trainer, data, validation)


def _check_classes(trainer: Trainer, data: Dataset, validation: Dataset | None) -> None:
    classes = trainer.model.config.num_classes
    if len(data.class_names) != classes:
        raise DatasetError(
            f"the data set has {len(data.class_names)} classes, the model {classes}: create the "
            f"model with num_classes={len(data.class_names)}"
        )
    if not data.report.boxes - data.report.crowds:
        raise DatasetError("the data set has no boxes to learn")
    if validation is not None and validation.class_names != data.class_names:
        raise DatasetError(
            f"the validation data has the classes {', '.join(validation.class_names)}, the "
            f"training data {', '.join(data.class_names)}: they must be the same, in this order"
        )


@contextmanager
def _stopped_by_signals(trainer: Trainer) -> Iterator[None]:
    """Ends the training after the step it is at on Ctrl-C and SIGTERM; at once on a second one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if trainer.stopping:
            raise KeyboardInterrupt
        trainer.stopping = True

    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Run:
    """What :func:`fit` keeps between its steps."""

    def __init__(
        self, trainer: Trainer, data: Dataset, settings: dict[str, int | str], folder: Path | None
    ) -> None:
        self.trainer, self.data, self.settings = trainer, data, settings
        self.folder = folder if process_group()[0] == 0 else None
        self.source = folder
        self.history = History()
        self.callbacks: list[Callback] = []
        self.evaluations_since_best = 0
        self.figures: dict[str, float] = {}
        self.sums: dict[str, float] = dict.fromkeys((*_MEANS, "steps"), 0.0)
        self.skipped = 0
        self.is_evaluated = False
        self.saved: tuple[int, int] | None = None

    def tensorboard(self) -> TensorBoard:
        """What writes for TensorBoard into the run's folder."""
        if self.source is None:
            raise ValueError("folder must be given for TensorBoard's files")
        return TensorBoard(self.source / "tensorboard", self.trainer.step_count)

    def end(self, epochs: int, steps: int) -> History:
        """Saves the run for the last time and says what happened."""
        self.history.interrupted = self.trainer.stopped and self.trainer.epoch < epochs
        self.save(final=True)
        values = self.history.rows[-1] if self.history.rows else {}
        self.tell("end", epochs, steps, values)
        return self.history

    # --- files --------------------------------------------------------------------------------

    def open(self, resume: bool) -> None:
        """Prepares the folder, and loads what is to be continued."""
        if self.source is None:
            if resume:
                raise ValueError("folder must be given to resume")
            return
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass  # raises where nothing can be written
            for leftover in leftovers(self.folder, (".pt", ".csv")):
                leftover.unlink()  # of a run that was killed while it wrote
        held = [name for name in (LAST, BEST) if (self.source / name).exists()]
        if held and not resume:  # the best weights alone may be all that was kept of a run
            raise ValueError(
                f"{self.source} holds a run already: resume it (resume=True, --resume), or give "
                "another folder"
            )
        if LAST in held:
            self._load(self.source / LAST)

    def _load(self, path: Path) -> None:
        description, content = read_description(path), read_training(path)
        config = self.trainer.model.config
        if description is None or description.config != config:
            other = "another model" if description is None else description.config.name
            raise CheckpointError(
                f"{path} is of {other} with other settings than this {config.name}: resume it "
                "with the model and the options it was started with"
            )
        if description.class_names != self.data.class_names:
            raise CheckpointError(
                f"{path} was trained on the classes {', '.join(description.class_names)}, the data "
                f"set has {', '.join(self.data.class_names)}"
            )
        for name, value in self.settings.items():
            if content["settings"].get(name) != value:
                raise CheckpointError(
                    f"{path} was started with {name} {content['settings'].get(name)}, got {value}: "
                    "resume it with what it was started with, or give another folder"
                )
        self.trainer.load_state_dict(content["trainer"])
        self.history.rows = [dict(row) for row in content["rows"]]
        self.history.best = content["best"]
        self.evaluations_since_best = content["evaluations_since_best"]
        self.figures, self.sums = dict(content["figures"]), dict(content["sums"])
        self.skipped = content["skipped"]
        self.saved = (self.trainer.step_count, self.trainer.epoch)

    def save(self, *, final: bool = False, best: bool = False) -> None:
        """Writes ``last.pt``, and before it ``best.pt`` when this is the best."""
        trainer = self.trainer
        place = (trainer.step_count, trainer.epoch)
        if self.folder is None or self.saved == place:
            return
        about: dict[str, Any] = {
            "class_names": self.data.class_names,
            "category_ids": self.data.category_ids,
            "step": trainer.step_count,
            "epoch": trainer.epoch,
            "figures": self.figures,
        }
        training = {
            "trainer": trainer.state_dict(),
            "settings": self.settings,
            "rows": self.history.rows,
            "best": self.history.best,
            "evaluations_since_best": self.evaluations_since_best,
            "figures": self.figures,
            "sums": self.sums,
            "skipped": self.skipped,
        }
        try:
            if best:
                save_described(trainer.average.model, self.folder / BEST, **about)
            save_described(trainer.average.model, self.folder / LAST, **about, training=training)
            write_csv(self.history.rows, self.folder / LOG)
            self.saved = place
        except OSError as error:
            if final:
                raise
            warnings.warn(
                f"{self.folder}: the checkpoint of step {trainer.step_count} could not be written "
                f"({error.strerror}); training goes on with the one before. Make room there",
                stacklevel=2,
            )

    # --- steps --------------------------------------------------------------------------------

    def tell(self, kind: str, epochs: int, steps: int, values: dict[str, float]) -> None:
        """Calls the callbacks."""
        epoch = min(self.trainer.epoch + (kind == "step"), epochs)
        count = self.trainer.step_count
        event = Event(kind, epoch, epochs, count, steps, values, self.skipped)
        for callback in self.callbacks:
            callback(event)

    def train_epoch(self, loader: Any, epochs: int, steps: int, save_minutes: float) -> None:
        """The rest of an epoch, or as far as it goes until the run is stopped."""
        trainer = self.trainer
        device = next(trainer.model.parameters()).device
        saved = time.monotonic()
        times = deque([saved], maxlen=_SPEED_STEPS)
        for batch in loader:
            rate, skipped = trainer.learning_rate, trainer.skipped_in_a_row
            losses = trainer.step(
                batch.images.to(device, non_blocking=True),
                batch.boxes,
                batch.labels,
                names=[str(path) for path in batch.paths],
            )
            trainer.epoch_step += 1
            left_out = trainer.skipped_in_a_row > skipped
            self.skipped += left_out
            times.append(time.monotonic())
            speed = trainer.batch_size * (len(times) - 1) / max(times[-1] - times[0], 1e-9)
            values = self._count(losses, left_out)
            values |= {"learning_rate": rate, "images_per_second": speed}
            self.tell("step", epochs, steps, values)
            if trainer.stopped:
                return
            if times[-1] - saved > 60 * save_minutes:
                self.save()
                saved = time.monotonic()

    def _count(self, losses: Losses, left_out: bool) -> dict[str, float]:
        found = torch.stack(list(losses)).tolist()
        values = dict(zip(_MEANS, (*found, self.trainer.gradient_norm), strict=True))
        if not left_out:
            for key, value in values.items():
                if math.isfinite(value):  # a gradient of scaled losses may not be
                    self.sums[key] += value
            self.sums["steps"] += 1
        return values

    def evaluate(self, validation: Dataset, workers: int) -> None:
        """Evaluates the average of the weights."""
        found = evaluate(self.trainer.average.model, validation, workers=workers)
        self.history.evaluation = found
        self.figures, self.is_evaluated = dict(found.figures), True

    def end_epoch(self, epochs: int, steps: int) -> None:
        """Notes what the epoch came to and saves it."""
        trainer, count = self.trainer, max(self.sums["steps"], 1.0)
        trainer.epoch, trainer.epoch_step = trainer.epoch + 1, 0
        row: dict[str, float] = {"epoch": trainer.epoch, "step": trainer.step_count}
        row |= {key: self.sums[key] / count for key in _MEANS}
        row |= {"learning_rate": trainer.learning_rate, "skipped": self.skipped}
        best = False
        if self.is_evaluated:
            row |= self.figures
            reached = self.figures["AP"]
            best = math.isnan(self.history.best) or reached > self.history.best
            self.evaluations_since_best = 0 if best else self.evaluations_since_best + 1
            if best:
                self.history.best = reached
        self.sums, self.is_evaluated = dict.fromkeys(self.sums, 0.0), False
        self.history.rows.append(row)
        self.save(best=best)
        self.tell("epoch", epochs, steps, row)
