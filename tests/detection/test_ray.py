"""docs/many-images.md's example of Ray Data runs as it stands there (extra ``ray``)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edet

PAGE = Path(__file__).resolve().parents[2] / "docs/many-images.md"


@pytest.mark.slow
def test_ray_data(tmp_path):
    pytest.importorskip("ray.data", reason="needs the extra ray")
    image = pytest.importorskip("PIL.Image", reason="needs the extra image")
    (tmp_path / "photos").mkdir()
    generator = np.random.default_rng(0)
    for i in range(10):
        pixels = generator.integers(0, 256, (60 + i, 80, 3), np.uint8)
        image.fromarray(pixels).save(tmp_path / f"photos/{i}.png")
    (tmp_path / "photos/9.png").write_bytes(b"junk")

    [example] = re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    # a process of its own: Ray leaves threads, sockets and handlers of signals behind
    start = "import ray\nray.init(num_cpus=2, object_store_memory=2**27, include_dashboard=False)\n"
    program = tmp_path / "example.py"
    program.write_text(start + example.replace("batch_size=8)", "batch_size=8, score_threshold=0)"))
    ran = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    written = [file.read_text() for file in (tmp_path / "found").iterdir()]
    rows = [json.loads(line) for text in written for line in text.splitlines()]
    by_name = {Path(row["path"]).name: row for row in rows}
    assert sorted(by_name) == [f"{i}.png" for i in range(10)]
    assert by_name["9.png"]["found"] == "" and by_name["9.png"]["error"]

    predictor = edet.Predictor("edet_lite0_person", image_size=128, score_threshold=0)
    for name in ("0.png", "8.png"):
        there = edet.Detections.from_json(by_name[name]["found"])
        here = predictor(tmp_path / "photos" / name)
        assert len(here) > 0
        np.testing.assert_allclose(there.boxes, here.boxes, rtol=1e-4, atol=1e-2)
