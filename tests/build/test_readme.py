"""Every Python block of the README and of docs runs as it stands there, page by page."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import edet
from stand_ins import Effdet

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def street(tmp_path, monkeypatch):
    """A folder with the files that the examples read."""
    image = pytest.importorskip("PIL.Image", reason="needs the extra image")
    monkeypatch.chdir(tmp_path)
    edet.save_checkpoint(edet.create_model("tf_efficientdet_d0"), "tf_efficientdet_d0.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    image.fromarray(pixels).save("street.jpg")
    return tmp_path


def test_each_example_of_the_readme_is_short():
    found = blocks(PAGES[0])
    assert len(found) == 2
    assert all(len(block.strip().splitlines()) <= 12 for block in found)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.stem)
def test_examples_run(page, street):
    names: dict[str, object] = {"my_efficientdet": Effdet}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)


def test_accelerating_keeps_the_results():
    model = Effdet().eval()
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        before = model(images)
        exec(blocks(PAGES[0])[0], {"my_efficientdet": lambda: model})
        after = model(images)
    assert type(model.fpn).__name__ == "FusedEffdetFpn"
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)


def test_detecting_objects(street, capsys):
    image = pytest.importorskip("PIL.Image", reason="needs the extra image")
    names: dict[str, object] = {}
    exec(blocks(PAGES[0])[1].replace("score_threshold=0.4", "score_threshold=0.0"), names)
    assert len(names["found"].boxes) > 0
    assert len(capsys.readouterr().out.splitlines()) == len(names["found"].boxes)
    with image.open("street-detected.png") as drawn:
        assert drawn.size[0] >= 120
    assert (street / "street.json").stat().st_size > 0
