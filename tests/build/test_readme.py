"""The README's Python runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import edet

BLOCKS = re.findall(
    r"```python\n(.*?)```",
    (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8"),
    re.DOTALL,
)


def test_each_example_is_about_ten_lines():
    assert len(BLOCKS) == 2
    assert all(len(block.strip().splitlines()) <= 12 for block in BLOCKS)


def test_replacing_the_bifpn_and_heads_keeps_the_results():
    model = edet.create_model("tf_efficientdet_d0", image_size=128).eval()
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        before = model(images)
    original = {model.fpn, model.class_net, model.box_net}
    names = {"my_efficientdet": lambda: model, "images": images}
    exec(BLOCKS[0], names)
    assert original.isdisjoint({model.fpn, model.class_net, model.box_net})
    after = (names["class_logits"], names["box_regressions"])
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old)


def test_detecting_objects(tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("PIL.Image", reason="needs the extra image")
    monkeypatch.chdir(tmp_path)
    model = edet.create_model("tf_efficientdet_d0")
    edet.save_checkpoint(model, "tf_efficientdet_d0.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    image.fromarray(pixels).save("street.jpg")
    names: dict[str, object] = {}
    exec(BLOCKS[1].replace("score_threshold=0.4", "score_threshold=0.0"), names)
    assert len(names["found"].boxes) > 0
    assert len(capsys.readouterr().out.splitlines()) == len(names["found"].boxes)
    with image.open("street-detected.png") as drawn:
        assert drawn.size[0] >= 120
    assert (tmp_path / "street.json").stat().st_size > 0
