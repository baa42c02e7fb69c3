"""The trainings behind docs/results.md, shortened: each learns, and the page is what files say."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

import drawn_shapes
import edet
from benchmarks import accuracy
from edet.training import Dataset, Trainer, open_dataset


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    folder = tmp_path_factory.mktemp("shapes")
    drawn_shapes.write_coco(folder, count=24)
    drawn_shapes.write_coco(folder, "val", count=8, seed=5)
    return open_dataset(folder), open_dataset(folder, "val")


def shortened(name: str) -> accuracy.Comparison:
    """A comparison of a few dozen steps on small images, with its own variants."""
    whole = accuracy.COMPARISONS[name]
    small = {"width": 24, "cells": 1, "head_repeats": 1, "fusion": "fast"}
    variants = {
        key: dataclasses.replace(v, options=v.options | {"image_size": 64, "cells": 1})
        for key, v in whole.variants.items()
    }
    return dataclasses.replace(
        whole, variants=variants, options=small, image_size=64, epochs=30, batch_size=4, seeds=1
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", accuracy.COMPARISONS)
def test_each_comparison_learns(name: str, shapes: tuple[Dataset, Dataset]) -> None:
    result = accuracy.compare(shortened(name), *shapes)
    for variant, row in result["variants"].items():
        curve = row["runs"][0]["curve"]
        assert curve[-1]["loss"] < 0.3 * curve[0]["loss"], variant
        assert row["AP50"] > 0.1, (variant, row["AP50"])
    assert list(result["variants"]) == list(accuracy.COMPARISONS[name].variants)


def test_a_run_in_each_precision(tmp_path: Path, shapes: tuple[Dataset, Dataset]) -> None:
    small = {"num_classes": 2, "image_size": 64, "width": 16, "cells": 1, "head_repeats": 1}
    trainer = Trainer(edet.create_model("tf_efficientdet_lite0", **small), batch_size=8)
    trainer.fit(shapes[0], epochs=1, validation=shapes[1], folder=tmp_path, workers=0)
    result = accuracy.detector(tmp_path, *shapes, "edet train")
    assert list(result["precisions"]) == [
        "float32, fused",
        "float32, layers",
        "bfloat16, fused",
        "bfloat16, layers",
        "float16, fused",
        "int8",
    ]
    assert all(0 <= row["AP"] <= row["AP50"] <= 1 for row in result["precisions"].values())
    assert len(result["curve"]) == 1 and result["few_boxes"]["images"] == 8


def test_intervals_are_students() -> None:
    def rows(*values: float) -> list[dict[str, dict[str, float]]]:
        return [{"figures": {"AP": value}} for value in values]

    found = accuracy.difference(rows(0.3, 0.5, 0.4), rows(0.2, 0.2, 0.2), "AP")
    # differences .1, .3, .2: deviation .1, and Student's t of two degrees of freedom is 4.303
    assert found["mean"] == pytest.approx(0.2)
    assert found["half_interval"] == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    alone = accuracy.difference(rows(0.3), rows(0.2), "AP")
    assert math.isnan(alone["half_interval"])


def test_the_page_is_what_the_files_say() -> None:
    text = accuracy.PAGE.read_text(encoding="utf-8")
    assert accuracy.page(text, accuracy.result_files()) == text


def test_a_result_file_holds_all_that_it_takes_to_repeat_it() -> None:
    files = accuracy.result_files()
    assert files
    for file in files:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
        assert result["schema"] == accuracy.SCHEMA
        for key in ("command", "date", "revision", "machine", "versions", "data"):
            assert result[key], (file.name, key)
