"""Whole runs: checkpoints, a kill at any moment, going on, stopping, and what is refused."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import drawn_shapes
import edet
import small_models
from edet.models.described import read_description, read_training
from edet.models.reading import CheckpointError
from edet.training import fit as fits
from edet.training.datasets import Dataset, open_dataset
from edet.training.evaluation import evaluate
from edet.training.fit import History
from edet.training.formats import DatasetError
from edet.training.logs import Event
from edet.training.trainer import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    """Twelve images to learn and four to evaluate on."""
    root = tmp_path_factory.mktemp("shapes")
    drawn_shapes.write_coco(root, count=12)
    drawn_shapes.write_coco(root, "val", count=4, seed=1)
    return open_dataset(root), open_dataset(root, "val")


def new_trainer(**options: Any) -> Trainer:
    torch.manual_seed(1)
    random.seed(1)  # which a new process does not keep, and a checkpoint does
    options = {"batch_size": 4, "learning_rate": 0.02} | options
    return Trainer(small_models.small_model(), **options)


def run(data: tuple[Dataset, Dataset], folder: Path | None, **options: Any) -> History:
    """Three epochs of three steps, the last evaluated."""
    trainer = options.pop("trainer", None) or new_trainer()
    options = {"epochs": 3, "workers": 0, "folder": folder} | options
    return trainer.fit(data[0], **options)


def everything(folder: Path) -> list[Tensor]:
    """All tensors and numbers of a run's last checkpoint that are the same in every run."""
    found: list[Tensor] = []

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                visit(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif isinstance(value, int | float):
            # NaN, an AP of nothing, is not equal to itself
            number = -1.0 if value != value else float(value)
            found.append(torch.tensor(number, dtype=torch.float64))

    visit(read_training(folder / "last.pt"))
    visit(edet.read_checkpoint(folder / "last.pt"))
    return found


def assert_same_runs(a: Path, b: Path) -> None:
    x, y = everything(a), everything(b)
    assert len(x) == len(y) > 100
    assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
    assert (a / "log.csv").read_text() == (b / "log.csv").read_text()


def in_a_process(target: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    """Starts ``target`` in a copy of this process, which is faster than a new one."""
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def test_a_run_from_data_to_boxes(data: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    model = edet.create_model(
        "tf_efficientdet_lite0",
        width=16,
        cells=1,
        head_repeats=1,
        num_classes=2,
        image_size=64,
    )
    events: list[Event] = []
    trainer = Trainer(model, batch_size=4)
    history = run(
        data,
        tmp_path / "run",
        trainer=trainer,
        validation=data[1],
        epochs=2,
        callbacks=[events.append],
        tensorboard=True,
    )
    assert [e.kind for e in events] == [*["step"] * 3, "epoch"] * 2 + ["end"]
    assert [(e.epoch, e.step, e.steps) for e in events[-3:]] == [(2, 6, 6)] * 3
    step = events[0].values
    assert step["loss"] == pytest.approx(step["class_loss"] + 50 * step["box_loss"], rel=1e-5)
    assert step["gradient_norm"] > 0 and step["images_per_second"] > 0
    with (tmp_path / "run/log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["AP"]) == history.rows[1]["AP"]
    assert list((tmp_path / "run/tensorboard").iterdir())
    assert history.evaluation is not None
    for name in ("last.pt", "best.pt"):
        description = read_description(tmp_path / "run" / name)
        assert description is not None
        assert description.config == model.config
        assert description.class_names == ["disc", "square"]
        assert description.category_ids == [3, 7]
        assert description.version == edet.__version__
    assert description.figures["AP"] == history.best
    # the checkpoint alone gives the boxes that the evaluation gave
    predictor = edet.Predictor(tmp_path / "run/last.pt", score_threshold=0.001)
    for path, found in zip(data[1].paths, history.evaluation.found, strict=True):
        expected = predictor(path)
        assert torch.equal(torch.from_numpy(found.boxes), expected.boxes)
        assert torch.equal(torch.from_numpy(found.scores), expected.scores)
    assert set(expected.names) <= {"disc", "square"}
    again = evaluate(tmp_path / "run/last.pt", data[1])
    # NaN is not equal to itself
    assert str(again.figures) == str(history.evaluation.figures)


@pytest.mark.filterwarnings("ignore:.*fork")
def test_kills_at_random_moments_change_nothing(
    data: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    start = time.monotonic()
    run(data, tmp_path / "straight", validation=data[1])
    seconds = time.monotonic() - start
    numbers = random.Random(time.time_ns())
    moments = []
    for _ in range(4):
        # from 0: also before anything is written
        moments.append(numbers.uniform(0, 0.6) * seconds)
        child = in_a_process(
            lambda: run(data, tmp_path / "run", validation=data[1], resume=True, save_minutes=0)
        )
        child.join(moments[-1])
        child.kill()
        child.join()
    run(data, tmp_path / "run", validation=data[1], resume=True)
    assert_same_runs(tmp_path / "straight", tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["best.pt", "last.pt", "log.csv"]


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("write", [1, 3, 6])
def test_a_kill_in_the_middle_of_a_write(
    data: tuple[Dataset, Dataset], tmp_path: Path, write: int
) -> None:
    run(data, tmp_path / "straight")

    def killed() -> None:
        save, writes = torch.save, 0

        def half(content: Any, file: Any) -> None:
            nonlocal writes
            writes += 1
            save(content, file)
            if writes == write:
                file.truncate(file.tell() // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = half
        run(data, tmp_path / "run", save_minutes=0)

    child = in_a_process(killed)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    if write > 1:
        assert (
            read_training(tmp_path / "run/last.pt")["trainer"]["step_count"] == {3: 2, 6: 4}[write]
        )
    run(data, tmp_path / "run", resume=True)
    assert_same_runs(tmp_path / "straight", tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["last.pt", "log.csv"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_run_after_its_step(
    data: tuple[Dataset, Dataset], tmp_path: Path, number: signal.Signals
) -> None:
    run(data, tmp_path / "straight")

    def interrupt(event: Event) -> None:
        if event.kind == "step" and event.step == 5:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    history = run(data, tmp_path / "run", callbacks=[interrupt], workers=1)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert history.interrupted and len(history.rows) == 1
    assert read_training(tmp_path / "run/last.pt")["trainer"]["epoch_step"] == 2
    history = run(data, tmp_path / "run", resume=True)
    assert not history.interrupted
    assert_same_runs(tmp_path / "straight", tmp_path / "run")
    assert run(data, tmp_path / "run", resume=True).rows == history.rows  # nothing is left to do


def test_it_runs_in_a_thread_and_without_a_folder(data: tuple[Dataset, Dataset]) -> None:
    histories: list[History] = []
    thread = threading.Thread(target=lambda: histories.append(run(data, None, epochs=1)))
    thread.start()
    thread.join()
    assert len(histories[0].rows) == 1


def test_the_predictor_shows_the_weights_of_each_epoch(
    data: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    trainer = new_trainer()
    predictor = edet.Predictor(trainer.average.model, score_threshold=0)
    seen: list[Tensor] = []

    def look(event: Event) -> None:
        if event.kind == "epoch":
            new = edet.Predictor(trainer.average.model, score_threshold=0)(data[1].paths[0])
            for _ in range(3):
                kept = predictor(data[1].paths[0])
            assert torch.equal(kept.scores, new.scores) and torch.equal(kept.boxes, new.boxes)
            seen.append(kept.scores)

    history = run(data, None, trainer=trainer, validation=data[1], callbacks=[look])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert history.evaluation is not None
    assert torch.from_numpy(history.evaluation.found[0].scores)[0] == seen[2][0]


def test_patience_and_stopping(data: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    trainer = new_trainer(learning_rate=0.0)
    history = run(data, tmp_path / "a", trainer=trainer, validation=data[1], epochs=9, patience=2)
    assert len(history.rows) == 3  # the first is the best, two more are no better
    assert not history.interrupted

    trainer = new_trainer()

    def stop(event: Event) -> None:
        trainer.stopping = event.step == 4

    history = run(data, tmp_path / "b", trainer=trainer, callbacks=[stop])
    assert history.interrupted and trainer.step_count == 4

    history = run(data, None, validation=data[1], epochs=3, evaluate_every=2)
    assert ["AP" in row for row in history.rows] == [False, True, True]


def test_a_bad_image_in_a_run(data: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    trainer = new_trainer()
    forward, calls = trainer.model.backbone.forward, 0

    def poisoned(x: Tensor) -> list[Tensor]:
        nonlocal calls
        calls += 1
        return forward(x * float("nan") if calls == 2 else x)

    trainer.model.backbone.forward = poisoned
    with pytest.warns(UserWarning, match=r"step 1 is not finite: .*\.png, .*\.png"):
        history = run(data, tmp_path / "run", trainer=trainer)
    assert [row["skipped"] for row in history.rows] == [1, 1, 1]
    assert all(row["loss"] > 0 for row in history.rows)
    assert trainer.average.updates == 8


def test_what_cannot_be_resumed(data: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    run(data, tmp_path / "run", epochs=1)
    again: Any = {"epochs": 1, "resume": True}
    with pytest.raises(ValueError, match=r"holds a run already: resume it .* or give another"):
        run(data, tmp_path / "run", epochs=1)
    with pytest.raises(CheckpointError, match="was started with epochs 1, got 2: resume it with"):
        run(data, tmp_path / "run", epochs=2, resume=True)
    with pytest.raises(CheckpointError, match="was started with optimizer SGD, got AdamW"):
        run(data, tmp_path / "run", trainer=new_trainer(optimizer="adamw"), **again)
    other = Trainer(small_models.small_model(width=24), batch_size=4)
    with pytest.raises(CheckpointError, match="is of tf_efficientdet_d0 with other settings"):
        run(data, tmp_path / "run", trainer=other, **again)
    names = drawn_shapes.coco([])
    root = tmp_path / "other"
    drawn_shapes.write_coco(root, count=12)
    content = json.loads((root / "instances_train.json").read_text())
    content["categories"] = [c | {"name": c["name"] + "s"} for c in names["categories"]]
    (root / "instances_train.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="was trained on the classes disc, square, the data"):
        run((open_dataset(root), data[1]), tmp_path / "run", **again)
    edet.save_checkpoint(new_trainer().model, tmp_path / "run/last.pt")
    with pytest.raises(CheckpointError, match="holds no state to resume from"):
        run(data, tmp_path / "run", **again)
    (tmp_path / "run/last.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        run(data, tmp_path / "run", **again)
    with pytest.raises(ValueError, match="folder must be given to resume"):
        run(data, None, **again)


def test_data_that_do_not_fit_the_model(data: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    model = small_models.small_model(num_classes=3)
    with pytest.raises(DatasetError, match="the data set has 2 classes, the model 3: create the"):
        run(data, None, trainer=Trainer(model, batch_size=4))
    with pytest.raises(ValueError, match="at most the number of images, 12, got 16"):
        run(data, None, trainer=new_trainer(batch_size=16))
    file = drawn_shapes.write_coco(tmp_path)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"annotations": []}))
    with pytest.raises(DatasetError, match="has no boxes to learn"):
        run((open_dataset(file), data[1]), None)
    content["categories"] = [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}]
    file.write_text(json.dumps(content | {"annotations": []}))
    with pytest.raises(DatasetError, match="validation data has the classes x, y, the training"):
        run(data, None, validation=open_dataset(file))
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        run(data, None, epochs=0)
    with pytest.raises(ValueError, match="folder must be given for TensorBoard"):
        run(data, None, tensorboard=True)


def test_a_disk_that_fills_up(
    data: tuple[Dataset, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = fits.save_described, 0

    def full(*args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")
        save(*args, **options)

    monkeypatch.setattr(fits, "save_described", full)
    with pytest.warns(UserWarning, match=r"step 6 could not be written \(No space left on device"):
        run(data, tmp_path / "run")
    assert read_training(tmp_path / "run/last.pt")["trainer"]["epoch"] == 3
    calls = 0
    with pytest.raises(OSError, match="No space left"), pytest.warns(UserWarning):
        run(data, tmp_path / "short", epochs=2, callbacks=[lambda e: _always_full(monkeypatch)])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        run(data, tmp_path / "file" / "run")


def _always_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fits, "save_described", full)
