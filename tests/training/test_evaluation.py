"""Evaluation against pycocotools itself, on made-up detections and on a model's own."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import drawn_shapes
import edet
from edet.training import plots
from edet.training.datasets import Dataset, Truth, open_dataset
from edet.training.evaluation import FIGURES, Found, confusion, detect, evaluate, score
from edet.training.formats import DatasetError

Results = list[dict[str, Any]]


def by_pycocotools(file: Path, results: Results) -> list[float]:
    """The twelve figures of COCO results for the file as it is, by its own ids."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        evaluator = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [float(x) for x in evaluator.stats]


def assert_same_figures(found: dict[str, float], expected: Sequence[float]) -> None:
    assert list(found) == list(FIGURES)
    for value, other in zip(found.values(), expected, strict=True):
        assert value == other or (math.isnan(value) and other == -1)


@pytest.fixture
def difficult_file(tmp_path: Path) -> Path:
    """Crowds, ids with gaps and 0, images without objects, boxes beyond the edge, all sizes."""
    pictures = drawn_shapes.draw(tmp_path / "val", count=12, side=160)
    content = drawn_shapes.coco(pictures)
    content["categories"] = [{"id": i, "name": f"class {i}"} for i in (0, 4, 9, 90)]
    numbers = np.random.default_rng(5)
    content["annotations"] = []
    for image in content["images"]:
        for _ in range(0 if image["id"] in (20, 50) else int(numbers.integers(1, 7))):
            x, y = numbers.uniform(-4, 120, 2)
            w, h = numbers.choice([8, 20, 60, 110], 2) * numbers.uniform(0.8, 1.2, 2)
            entry = {"id": 3 * len(content["annotations"]) + 7, "image_id": image["id"]}
            entry |= {"category_id": int(numbers.choice([0, 4, 9])), "bbox": [x, y, w, h]}
            entry |= {"iscrowd": int(numbers.random() < 0.2), "area": w * h * 0.7}
            content["annotations"].append(entry)
    file = tmp_path / "instances_val.json"
    file.write_text(json.dumps(content))
    return file


def made_up(file: Path, dataset: Dataset) -> list[Found]:
    """Detections by a rule: objects moved a little, some missed, twice, or as another class."""
    numbers = np.random.default_rng(8)
    found = []
    for i in range(len(dataset)):
        truth = dataset.truth(i)
        rows = []
        for box, label in zip(truth.boxes, truth.labels, strict=True):
            for _ in range(int(numbers.choice([0, 1, 1, 1, 2]))):
                corners = np.concatenate([box[:2], box[:2] + box[2:]])
                moved = corners + numbers.normal(0, 0.06, 4) * box[[2, 3, 2, 3]]
                guess = label if numbers.random() < 0.9 else numbers.integers(1, 5)
                rows.append([*moved, round(float(numbers.random()), 1), guess])
        for _ in range(int(numbers.integers(0, 3))):
            x, y = numbers.uniform(0, 100, 2)
            rows.append([x, y, x + 30, y + 30, float(numbers.random()), numbers.integers(1, 5)])
        table = np.array(rows).reshape(-1, 6)
        table = table[np.argsort(-table[:, 4], kind="stable")]
        boxes, scores = table[:, :4].astype(np.float32), table[:, 4].astype(np.float32)
        found.append(Found(boxes, scores, table[:, 5].astype(np.int64)))
    return found


def as_results(dataset: Dataset, found: Sequence[Found]) -> Results:
    """The detections with the file's own ids, by :meth:`edet.Detections.to_coco`."""
    results: Results = []
    for image_id, objects, size in zip(dataset.ids, found, dataset.sizes, strict=True):
        categories = [dataset.category_ids[label - 1] for label in objects.labels]
        detections = edet.Detections(
            torch.from_numpy(objects.boxes),
            torch.from_numpy(objects.scores),
            torch.tensor(categories, dtype=torch.int64),
            (int(size[0]), int(size[1])),
        )
        results += detections.to_coco(int(image_id))
    return results


def test_it_is_pycocotools_to_the_last_digit(difficult_file: Path) -> None:
    dataset = open_dataset(difficult_file)
    found = made_up(difficult_file, dataset)
    evaluation = score([dataset.truth(i) for i in range(12)], found, dataset.class_names)
    expected = by_pycocotools(difficult_file, as_results(dataset, found))
    assert_same_figures(evaluation.figures, expected)
    assert 0.2 < evaluation.figures["AP"] < 0.9
    assert dataset.report.crowds > 2 and dataset.report.empty == 2 and dataset.report.clipped > 0
    # by class, against a file with that class alone
    content = json.loads(difficult_file.read_text())
    for label, category in enumerate(dataset.category_ids, 1):
        name = dataset.class_names[label - 1]
        own = [a for a in content["annotations"] if a["category_id"] == category]
        results = [r for r in as_results(dataset, found) if r["category_id"] == category]
        if not own:
            assert math.isnan(evaluation.class_ap[name])
            continue
        single = difficult_file.with_name(f"only-{category}.json")
        categories = [c for c in content["categories"] if c["id"] == category]
        single.write_text(json.dumps(content | {"annotations": own, "categories": categories}))
        figures = by_pycocotools(single, results)
        assert evaluation.class_ap[name] == figures[0]
        assert evaluation.class_ap50[name] == figures[1]


def test_nothing_found_and_nothing_there(difficult_file: Path) -> None:
    dataset = open_dataset(difficult_file)
    none = Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    truths = [dataset.truth(i) for i in range(12)]
    evaluation = score(truths, [none] * 12, dataset.class_names)
    assert evaluation.figures["AP"] == 0
    empty = Truth(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64), np.zeros(0, bool))
    found = made_up(difficult_file, dataset)
    evaluation = score([empty] * 12, found, dataset.class_names)
    assert all(math.isnan(value) for value in evaluation.figures.values())
    evaluation.to_json(difficult_file.with_name("figures.json"))
    assert json.loads(difficult_file.with_name("figures.json").read_text())["figures"]["AP"] is None


def small_model(num_classes: int = 2) -> edet.EfficientDet:
    torch.manual_seed(1)
    model = edet.create_model(
        "tf_efficientdet_lite0",
        width=16,
        cells=1,
        head_repeats=1,
        num_classes=num_classes,
        image_size=64,
    )
    with torch.no_grad():
        model.class_net.predict.conv_pw.bias.fill_(-2.0)
        model.class_net.predict.conv_pw.weight.mul_(4.0)
    return model


def test_a_model_is_evaluated_as_its_predictor_predicts(tmp_path: Path) -> None:
    dataset = open_dataset(drawn_shapes.write_coco(tmp_path, count=7, side=72))
    model = small_model()
    model.backbone.eval()
    model.fpn.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    gradients = [p.requires_grad for p in model.parameters()]
    for batch_size, workers in ((4, 0), (3, 2)):
        evaluation = evaluate(model, dataset, batch_size=batch_size, workers=workers)
        assert [m.training for m in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == gradients
        predictor = edet.Predictor(copy.deepcopy(model), score_threshold=0.001)
        for i, found in enumerate(evaluation.found):
            expected = predictor(dataset.paths[i])
            assert len(found.scores)
            assert np.array_equal(found.boxes, expected.boxes.numpy())
            assert np.array_equal(found.scores, expected.scores.numpy())
            assert np.array_equal(found.labels, expected.labels.numpy())
        results = as_results(dataset, evaluation.found)
        assert_same_figures(
            evaluation.figures, by_pycocotools(tmp_path / "instances_train.json", results)
        )
    with torch.no_grad():  # other weights, another result: nothing is kept
        model.box_net.predict.conv_pw.bias.add_(0.3)
    other = evaluate(model, dataset)
    assert not np.array_equal(other.found[0].boxes, evaluation.found[0].boxes)
    assert "AP50" in str(other) and "square" in str(other)


def test_labels_of_published_models_are_category_ids(tmp_path: Path) -> None:
    dataset = open_dataset(drawn_shapes.write_coco(tmp_path, count=3))
    model = small_model(num_classes=9)
    found = detect(model, dataset)
    predictor = edet.Predictor(copy.deepcopy(model), score_threshold=0.001)
    for objects, path in zip(found, dataset.paths, strict=True):
        labels = predictor(path).labels
        expected = [dataset.label_of[x] for x in labels.tolist() if x in (3, 7)]
        assert objects.labels.tolist() == expected
    with pytest.raises(DatasetError, match="the model has 3 classes and the data set 2"):
        evaluate(small_model(num_classes=3), dataset)


def test_confusion() -> None:
    def corners(*rows: list[float]) -> np.ndarray[Any, Any]:
        return np.array(rows, dtype=np.float32)

    boxes = np.array([[0, 0, 10, 10], [20, 0, 10, 10], [40, 0, 10, 10], [60, 0, 30, 30.0]])
    crowd = np.array([False, False, False, True])
    truth = Truth(boxes, np.full(4, 100.0), np.array([1, 2, 1, 2]), crowd)
    found = Found(
        corners(
            [0, 0, 10, 9],  # right
            [0, 0, 10, 10],  # again: of nothing
            [20, 0, 31, 10],  # as another class
            [62, 2, 70, 9],  # of a crowd: not counted
            [0, 50, 9, 60],  # of nothing
            [40, 0, 50, 10],  # not sure enough
        ),
        np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.2], np.float32),
        np.array([1, 1, 1, 2, 2, 1]),
    )
    matrix = confusion([truth], [found], 2)
    assert matrix.tolist() == [[1, 0, 1], [1, 0, 0], [1, 1, 0]]


def test_pictures(difficult_file: Path, tmp_path: Path) -> None:
    dataset = open_dataset(difficult_file)
    found = made_up(difficult_file, dataset)
    evaluation = score([dataset.truth(i) for i in range(12)], found, dataset.class_names)
    files = plots.plot_evaluation(evaluation, dataset, tmp_path / "plots", worst=3)
    assert [f.name for f in files[:3]] == [
        "precision-recall.png",
        "confusion.png",
        "evaluation.json",
    ]
    assert len(files) == 6
    for file in files:
        if file.suffix != ".json":
            pixels = edet.preprocess.load_image(file)
            assert min(pixels.shape[1:]) > 100 and pixels.float().std() > 5
    rows = [{"epoch": i, "loss": 3.0 / i, "AP": 0.1 * i, "learning_rate": 0.1} for i in (1, 2)]
    plots.plot_history(rows, tmp_path / "history.png", "a run")
    assert edet.preprocess.load_image(tmp_path / "history.png").float().std() > 5


def test_difficult_objects_do_not_count(tmp_path: Path) -> None:
    dataset = open_dataset(drawn_shapes.write_voc(tmp_path))
    truths = [dataset.truth(i) for i in range(6)]
    easy = []
    for truth in truths:
        corners = truth.boxes.astype(np.float32)
        corners[:, 2:] += corners[:, :2]
        kept = ~truth.crowd
        easy.append(Found(corners[kept], np.ones(int(kept.sum()), np.float32), truth.labels[kept]))
    assert sum(len(f.scores) for f in easy) > 2
    assert score(truths, easy, dataset.class_names).figures["AP"] == 1
