"""'edet predict' on files that are none on a disk, and on names that are no text."""

import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from edet.cli.inputs import find_files
from edet.detection.images import load_image

OPTIONS = ("-m", "tf_efficientdet_lite0", "--random-weights", "--image-size", "64")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def picture(path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def edet_(command, **env):
    """A line of bash with edet in it."""
    command = command.replace("edet ", f"{sys.executable} -m edet ")
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        timeout=100,
    )


def test_a_pipe_in_a_folder_is_left_out(tmp_path):
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")  # nobody will ever write to it
    assert find_files([str(tmp_path)]) == [tmp_path / "a.png"]


def test_a_picture_through_a_pipe(tmp_path):
    pixels = picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    data = (tmp_path / "a.png").read_bytes()
    thread = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(data))
    thread.start()
    assert (load_image(tmp_path / "pipe").permute(1, 2, 0).numpy() == pixels).all()
    thread.join()
    found = edet_(f"edet predict <(cat a.png) /dev/stdin {' '.join(OPTIONS)} < <(cat a.png)")
    assert found.returncode == 0, found.stderr
    assert b"2 images in" in found.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_was_found_is_kept_when_the_process_is_ended(tmp_path, number):
    picture(tmp_path / "0.png")
    for i in range(1, 3000):
        os.link(tmp_path / "0.png", tmp_path / f"{i}.png")
    words = [sys.executable, "-m", "edet", "predict", *map(str, find_files(["."])), *OPTIONS]
    (tmp_path / "out").mkdir()
    with subprocess.Popen(
        [*words, "--json", "out/found.json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # under nohup, and so maybe the tests, the signal is ignored, as it should be
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        for _ in range(5):
            process.stdout.readline()
        process.send_signal(number)
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1].startswith(b"Error: interrupted")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["found.json"]
    # a file is told of just before its entry is written
    assert 4 <= len(json.loads((tmp_path / "out/found.json").read_text())) < 3000


def test_a_name_that_is_no_text(tmp_path):
    picture(tmp_path / "a.png")
    os.link(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    found = edet_(
        f"edet predict . --json found.json -o out {' '.join(OPTIONS)}",
        PYTHONIOENCODING="utf-8:strict",  # as in any locale but C and POSIX
    )
    assert found.returncode == 0, found.stderr
    assert [line.split(b":")[0] for line in found.stdout.splitlines()] == [
        b"a.png",
        b"\\udcff.png",
    ]
    entries = json.loads((tmp_path / "found.json").read_text())
    assert [os.fsencode(entry["file"]) for entry in entries] == [b"a.png", b"\xff.png"]
    assert sorted(os.listdir(os.fsencode(tmp_path / "out"))) == [b"a.png", b"\xff.png"]
