"""Packages of AOTInductor from real models, loaded from Python and from C++."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import edet
import edet_kernels
from edet.bench.variants import random_model
from edet_kernels import library
from exported_calls import assert_detections, documented, inputs, pictures

ROOT = Path(__file__).parents[2]
NAMES = ("boxes", "scores", "labels", "counts")

# compilers warn about themselves
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(not library.load(), reason="needs the compiled library"),
]


@pytest.fixture(scope="module")
def predictor() -> edet.Predictor:
    return edet.Predictor("edet_lite0_person", image_size=(128, 160), score_threshold=0.1)


@pytest.fixture(scope="module")
def person(predictor: edet.Predictor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aoti") / "person.pt2"
    edet.export(predictor, path, format="aoti")
    return path


def check(path: Path, predictor: edet.Predictor) -> None:
    """Checks that a package finds in any number of images what the predictor finds."""
    package = torch._inductor.aoti_load_package(str(path))
    notes = package.get_metadata()
    assert notes["model"] == predictor.model.config.name
    fill = [int(x) for x in notes["fill"].strip("[]").split(",")]
    for count in (3, 1):
        images = pictures()[:count]
        found = package(**inputs(images, predictor.image_size, fill))
        assert_detections(dict(zip(NAMES, found, strict=True)), predictor, images, exact=True)


def test_lite0(person: Path, predictor: edet.Predictor) -> None:
    check(person, predictor)


def test_the_page_shows_how(
    person: Path, predictor: edet.Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "person.pt2").symlink_to(person)
    names: dict[str, Any] = inputs(pictures(), predictor.image_size, [128] * 3)
    exec(documented("aoti_load_package("), names)
    found = {name: names[name] for name in NAMES}
    assert_detections(found, predictor, pictures(), exact=True)


def test_d0(tmp_path: Path) -> None:
    with torch.no_grad():
        model = random_model("tf_efficientdet_d0", torch.randn(1, 3, 128, 128))
    predictor = edet.Predictor(
        model, image_size=128, score_threshold=0, nms="gaussian", max_detections=20
    )
    path = tmp_path / "d0.pt2"
    edet.export(predictor, path, format="aoti")
    check(path, predictor)
    # the weights are packed: neither the operations that do it nor a second copy is in the package
    assert path.stat().st_size < 1.3 * 4 * edet.count_parameters(model).total


def test_d7x(tmp_path: Path) -> None:
    with torch.no_grad():
        model = random_model("tf_efficientdet_d7x", torch.randn(1, 3, 128, 128))
    predictor = edet.Predictor(model, image_size=256, score_threshold=0, max_detections=20)
    path = tmp_path / "d7x.pt2"
    edet.export(predictor, path, format="aoti")
    check(path, predictor)


def test_a_program_in_cpp(person: Path, predictor: edet.Predictor, tmp_path: Path) -> None:
    # the page's command, but for the place of what it makes and the time that it takes
    [command] = re.findall(r"^g\+\+ .*\\\n.*$", documented("g++"), re.MULTILINE)
    program = tmp_path / "detect"
    command = command.replace("-O2", "-O0").replace("-o detect", f"-o {program}")
    folder = str(Path(torch.__file__).parent)
    subprocess.run(command, shell=True, check=True, cwd=ROOT, env={**os.environ, "TORCH": folder})
    built = Path(edet_kernels.__file__).parent / "libedet_kernels.so"
    for i, picture in enumerate(pictures()):
        file = tmp_path / f"{i}.ppm"
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file)
        done = subprocess.run([program, person, built, file], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = torch.tensor(
            [[float(x) for x in line.split()] for line in done.stdout.splitlines()]
        )
        expected = predictor(picture)
        assert len(found) == len(expected)
        assert found[:, 0].tolist() == expected.labels.tolist()
        torch.testing.assert_close(found[:, 1], expected.scores, rtol=0, atol=1e-6)
        torch.testing.assert_close(found[:, 2:], expected.boxes, rtol=0, atol=1e-3)
    wrong = subprocess.run([program, person, built, person], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr) == (
        1,
        f"{person} is not a binary PPM file of 8 bits\n",
    )
