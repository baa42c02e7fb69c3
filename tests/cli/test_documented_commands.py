"""The pages' command lines run as they stand there, and leave the files that they name."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edet
from edet.models.described import save_described

pytest.importorskip("typer", reason="needs the extra cli")
from typer.testing import CliRunner

from edet.cli import app

# exporters warn about themselves
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

DOCS = Path(__file__).resolve().parents[2] / "docs"

#: Exports of whole models take long, and tests/deploy has them.
LEFT_OUT = re.compile(r"^edet (bench|evaluate|train) |^edet export (?!run/best\.pt)")


def commands(page: str) -> list[str]:
    """The page's commands of this project, for one process or several."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"^    ((?:edet|torchrun .*-m edet) .*)$", text, re.MULTILINE)
    return [command for command in found if not LEFT_OUT.match(command)]


PAGES = ("deployment.md", "guide.md", "many-images.md", "serving.md")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the commands read: a run of edet train, a checkpoint, photographs, a clip."""
    image = pytest.importorskip("PIL.Image", reason="needs the extra image")
    av = pytest.importorskip("av", reason="needs the extra video")
    monkeypatch.chdir(tmp_path)
    for name in ("run", "photos"):
        Path(name).mkdir()
    size = {"width": 16, "cells": 1, "head_repeats": 1, "num_classes": 2, "image_size": (64, 96)}
    model = edet.create_model("tf_efficientdet_lite0", **size)
    save_described(model, Path("run/best.pt"), class_names=["red", "white"])
    edet.save_checkpoint(edet.create_model("tf_efficientdet_d0"), "tf_efficientdet_d0.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 96, 3), np.uint8)
    for i in range(5):
        image.fromarray(pixels[i]).save(f"photos/{i}.jpg")
    image.fromarray(pixels[0]).save("photo.jpg")
    with av.open("clip.mp4", "w") as clip:
        stream = clip.add_stream("mpeg4", rate=10, width=96, height=64)
        for frame in pixels[:2]:
            clip.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        clip.mux(stream.encode())
    return tmp_path


def ran(command: str) -> str:
    """What a command printed."""
    program, *words = shlex.split(command, comments=True)
    if program == "edet":
        result = CliRunner().invoke(app, words, prog_name="edet")
        assert result.exit_code == 0, result.output
        return result.output
    module = [sys.executable, "-m", "torch.distributed.run"]
    done = subprocess.run([*module, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page, folder):
    wanted = commands(page)
    assert wanted
    for command in wanted:
        words = shlex.split(command, comments=True)
        outputs = [
            Path(words[i + 1])
            for i, word in enumerate(words)
            if word in ("-o", "--output", "--json")
        ]
        assert ran(command)
        assert all(output.exists() for output in outputs), command
