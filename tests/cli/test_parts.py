"""Predicting in several processes, and going on after a kill: all files once, in one array."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import edet
from edet.cli import app

#: The pretrained model, small, and with boxes in any picture.
OPTIONS = ("-m", "edet_lite0_person", "--image-size", "64", "--score-threshold", "0")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Seven pictures, one of them broken."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(7):
        pixels = generator.integers(0, 256, (60, 80 + i, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "5.png").write_bytes(b"junk")
    return folder


@pytest.fixture
def done(monkeypatch):
    """The files that were predicted in this process."""
    names: list[str] = []
    stream = edet.Predictor.stream

    def counted(self, images, **options):
        for found in stream(self, images, **options):
            names.append(Path(found.image).name)
            yield found

    monkeypatch.setattr(edet.Predictor, "stream", counted)
    return names


def predict(*arguments, rank=None, world=2):
    env = {} if rank is None else {"RANK": str(rank), "WORLD_SIZE": str(world)}
    words = ["predict", *OPTIONS, *(str(a) for a in arguments)]
    return CliRunner(env=env).invoke(app, words, prog_name="edet")


def expected(photos) -> str:
    """What one process that is not interrupted writes."""
    assert predict(photos, "--json", "alone.json").exit_code == 1
    return Path("alone.json").read_text()


def test_processes_share_the_files_and_write_one_array(photos, done):
    whole = expected(photos)
    done.clear()
    first = predict(photos, "--json", "found.json", "-o", "out", rank=1)
    assert first.exit_code == 0, first.output  # a failure would end the other processes
    assert done == ["1.png", "3.png", "5.png"]
    assert "Skipped" in first.stderr and "not all files are done" in first.stderr
    assert not Path("found.json").exists()
    last = predict(photos, "--json", "found.json", "-o", "out", rank=0)
    assert last.exit_code == 1 and "1 of 7 files could not be read" in last.stderr
    assert sorted(done) == [f"{i}.png" for i in range(7)]
    assert Path("found.json").read_text() == whole
    assert len(list(Path("out").iterdir())) == 6
    assert not Path("found.json.parts").exists()


@pytest.mark.slow
def test_torchrun(photos):
    whole = expected(photos)
    module = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = ["-m", "edet", "predict", *OPTIONS, str(photos), "--json", "found.json"]
    ran = subprocess.run([*module, *words], capture_output=True, text=True, check=False)
    assert "1 of 7 files could not be read" in ran.stderr
    assert Path("found.json").read_text() == whole
    assert Counter(line.split(":")[0] for line in ran.stdout.splitlines()) == Counter(
        str(photos / f"{i}.png") for i in range(7) if i != 5
    )


def test_going_on_after_an_interruption(photos, done, monkeypatch):
    whole = expected(photos)
    done.clear()
    stream = edet.Predictor.stream

    def interrupted(self, images, **options):
        for i, found in enumerate(stream(self, images, **options)):
            if i == 3:
                raise KeyboardInterrupt
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(edet.Predictor, "stream", interrupted)
        assert predict(photos, "--json", "found.json", "--resume").exit_code == 130
    assert not Path("found.json").exists()
    done.clear()
    result = predict(photos, "--json", "found.json", "--resume")
    assert done == ["3.png", "4.png", "5.png", "6.png"]
    assert "3 files were done before, 4 are left" in result.stderr
    assert Path("found.json").read_text() == whole


@pytest.mark.slow
def test_a_kill_loses_nothing_that_was_said_to_be_done(photos, done):
    """Killed while it writes, as seen from outside: lines of files in order, the last one cut."""
    whole = expected(photos)
    for i in range(7, 60):
        (photos / f"{i}.png").write_bytes((photos / "0.png").read_bytes())
    words = [sys.executable, "-m", "edet", "predict", *OPTIONS, str(photos)]
    process = subprocess.Popen(
        [*words, "--json", "found.json", "--resume"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for _ in range(10):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    [part] = Path("found.json.parts").glob("*.jsonl")
    kept = sum(line.startswith('{"done"') for line in part.read_text().splitlines())
    assert kept >= 6  # four more may wait for the thread that writes
    with part.open("a") as stream:
        stream.write('{"file": "cut o')
    done.clear()
    predict(photos, "--json", "found.json", "--resume")
    found = json.loads(Path("found.json").read_text())
    assert len(done) == 60 - kept
    assert len(found) == 59 and len({entry["file"] for entry in found}) == 59
    first = json.loads(whole)
    assert all(entry in found for entry in first)


def test_a_file_that_changed_is_done_again(photos, done):
    predict(photos, "--json", "found.json", rank=0)
    time.sleep(0.01)
    (photos / "2.png").write_bytes((photos / "0.png").read_bytes())
    done.clear()
    predict(photos, "--json", "found.json", rank=1)
    assert not Path("found.json").exists()  # one is out of date
    predict(photos, "--json", "found.json", rank=0)
    assert done == ["1.png", "3.png", "5.png", "2.png"]
    entries = {Path(e["file"]).name: e for e in json.loads(Path("found.json").read_text())}
    assert entries["2.png"]["detections"] == entries["0.png"]["detections"]


def test_copies_that_were_not_saved_are_not_done(photos, done, monkeypatch):
    def full(path, picture):
        if path.name == "1.png":
            raise OSError(28, "No space left on device", str(path))
        picture.save(path)

    with monkeypatch.context() as patch:
        patch.setattr("edet.cli.predict.save_copy", full)
        failed = predict(photos, "--json", "found.json", "-o", "out", "--resume")
        assert failed.exit_code == 2 and "No space left" in failed.stderr
    done.clear()
    predict(photos, "--json", "found.json", "-o", "out", "--resume")
    assert done == [f"{i}.png" for i in range(1, 7)]
    assert len(list(Path("out").iterdir())) == 6


def test_a_video_is_done_when_it_ends(photos):
    video = pytest.importorskip("av", reason="needs the extra video") and edet.video
    with video.VideoWriter("clip.mp4", Fraction(25)) as writer:
        for i in range(5):
            writer.write(Image.fromarray(np.full((64, 64, 3), 20 * i, np.uint8)))
    assert predict("clip.mp4", photos, "--json", "alone.json").exit_code == 1
    for rank in (0, 1):
        result = predict("clip.mp4", photos, "--json", "found.json", rank=rank)
        assert result.exit_code == rank, result.output
    assert Path("found.json").read_text() == Path("alone.json").read_text()


def test_mistakes(photos):
    predict(photos, "--json", "found.json", rank=0)
    for arguments, place, words in [
        (("--json", "found.json", "--max-detections", 5), {"rank": 1}, ["max_detections 100, not"]),
        ((), {"rank": 0}, ["several processes needs --json FILE"]),
        (("--resume",), {}, ["--resume needs --json FILE"]),
        (("--resume", "--json", "/dev/null"), {}, ["--resume needs --json FILE"]),
        (("--json", "found.json"), {"rank": 2}, ["RANK=2, WORLD_SIZE=2"]),
        (("--json", "found.json"), {"rank": "a"}, ["RANK=a"]),
    ]:
        result = predict(photos, *arguments, **place)
        assert result.exit_code == 2, result.output
        last = result.stderr.splitlines()[-1]
        assert last.startswith("Error: ") and all(word in last for word in words)
