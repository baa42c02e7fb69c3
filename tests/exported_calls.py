"""What tests of exported files share: pictures, the files' inputs, and whether detections agree."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import edet
from edet.demo import photograph
from edet.preprocess import letterbox, load_image

PAGE = Path(__file__).parents[1] / "docs/deployment.md"


def documented(part: str) -> str:
    """The one indented block of code on the page of deployment that holds ``part``."""
    blocks = re.findall(r"^\n((?:    .*\n|\n)+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    [block] = [block for block in blocks if part in block]
    return textwrap.dedent(block)


def pictures() -> list[Tensor]:
    """A portrait, a part of it that is wider than high, and a small one; (3, H, W) uint8."""
    portrait = load_image(photograph())
    return [portrait, portrait[:, :200], portrait[:, 100:220, 100:220]]


def inputs(
    images: Sequence[Tensor], image_size: tuple[int, int], fill: Sequence[int]
) -> dict[str, Tensor]:
    """What an exported file takes."""
    return {
        "images": letterbox(images, image_size, fill),
        "sizes": torch.tensor([x.shape[1:] for x in images]),
    }


def fed(predictor: edet.Predictor, images: Sequence[Tensor], fill: str) -> dict[str, Any]:
    """The same as NumPy arrays; ``fill`` is as the file's metadata gives it."""
    tensors = inputs(images, predictor.image_size, json.loads(fill))
    return {name: x.numpy() for name, x in tensors.items()}


def assert_detections(
    found: Mapping[str, Any],
    predictor: edet.Predictor,
    images: Sequence[Tensor],
    *,
    exact: bool = False,
) -> None:
    """Asserts that the outputs of a file are what the predictor finds, and zeros behind it."""
    values = {name: torch.as_tensor(np.asarray(found[name])) for name in found}
    expected = predictor(list(images))
    assert any(len(x) for x in expected)
    assert values["counts"].dtype == values["labels"].dtype == torch.int64
    assert values["counts"].tolist() == [len(x) for x in expected]
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-3}
    for i, x in enumerate(expected):
        n = len(x)
        for name in ("boxes", "scores", "labels"):
            rows = values[name][i]
            assert len(rows) == predictor.max_detections
            torch.testing.assert_close(rows[:n], getattr(x, name), **tolerance)
            assert not rows[n:].any()
