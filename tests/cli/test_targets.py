"""What 'edet predict' may write to: nothing that it reads, nothing twice, anything else whole."""

import hashlib
import json
import os
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import edet
from edet.cli import app
from edet.cli.common import parse_size
from edet.cli.targets import annotated_names

MODEL = "tf_efficientdet_lite0"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def predict(*arguments, weights=("--random-weights",)):
    return CliRunner().invoke(
        app, ["predict", "--image-size", "64", *map(str, arguments), "-m", MODEL, *weights]
    )


def digests(folder):
    """What every file of the folder holds, by its name."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_refused(tmp_path, monkeypatch, *arguments, word="replace", **options):
    """One line on standard error, before a model is made, and every file as it was."""

    def never(*_, **__):
        pytest.fail("a model was made")

    before = digests(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("edet.cli.predict.create_model", never)
        result = predict(*arguments, **options)
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert word in result.stderr
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("inputs", "arguments"),
    [
        (("photos/x.jpg", "photos/sub/x.jpg"), ("photos/sub", "photos", "-o", "photos")),
        (("same/x.bmp", "same/x.png"), ("same", "-o", "same")),
        (("a/x.jpg", "b/x.jpg"), ("b/x.jpg", "a/x.jpg", "-o", "a")),
        (("a/x.jpg",), ("a/x.jpg", "-o", "a/../a")),
        (("a/x.jpg", "a/X.JPG"), ("a", "-o", "a")),
        (("a/x.jpg", "b/x-2.jpg", "b/x.jpg"), ("a/x.jpg", "b/x-2.jpg", "b/x.jpg", "-o", "b")),
    ],
    ids=["folder above", "other suffix", "other order", "other path", "other case", "number"],
)
def test_no_input_is_overwritten(tmp_path, monkeypatch, inputs, arguments):
    for seed, name in enumerate(inputs):
        picture(tmp_path / name, seed)
    assert_refused(tmp_path, monkeypatch, *arguments, word="--output")


@pytest.mark.parametrize("way", ["hard link", "link", "folder"])
def test_no_input_is_overwritten_by_another_name(tmp_path, monkeypatch, way):
    picture(tmp_path / "in" / "x.png")
    if way == "folder":
        (tmp_path / "out").symlink_to("in")
    else:
        (tmp_path / "out").mkdir()
        (os.link if way == "hard link" else os.symlink)(
            tmp_path / "in" / "x.png", tmp_path / "out" / "x.png"
        )
    assert_refused(tmp_path, monkeypatch, "in", "-o", "out", word="--output: out/x.png")


def test_no_video_is_overwritten(tmp_path, monkeypatch):
    pytest.importorskip("av")
    for name in ("clip.avi", "clip.mp4"):
        (tmp_path / name).write_bytes(b"frames")
    assert_refused(tmp_path, monkeypatch, "clip.avi", "clip.mp4", "-o", ".", word="clip.mp4")


@pytest.mark.parametrize(
    "name", ["x.png", "weights.pth", "names.txt", "font.ttf", "hard.json", "soft.json", "SUB/x.png"]
)
def test_json_overwrites_no_input(tmp_path, monkeypatch, name):
    picture(tmp_path / "x.png")
    for other in ("weights.pth", "names.txt", "font.ttf"):
        (tmp_path / other).write_text("kept")
    os.link(tmp_path / "x.png", tmp_path / "hard.json")
    (tmp_path / "soft.json").symlink_to("weights.pth")
    (tmp_path / "SUB").symlink_to(".")
    options = ("--class-names", "names.txt", "--font", "font.ttf")
    weights = ("-c", "weights.pth")
    assert_refused(
        tmp_path, monkeypatch, "x.png", "--json", name, *options, weights=weights, word="--json"
    )


def test_no_target_is_written_twice(tmp_path, monkeypatch):
    picture(tmp_path / "a" / "x.png")
    picture(tmp_path / "a" / "y.png", 1)
    assert_refused(tmp_path, monkeypatch, "a", "-o", "out", "--json", "out/x.png", word="--json")
    (tmp_path / "out").mkdir()
    assert_refused(tmp_path, monkeypatch, "a", "-o", "out", "--json", "out/x.png", word="--json")
    (tmp_path / "out" / "x.png").symlink_to("coming.png")
    (tmp_path / "out" / "y.png").symlink_to("coming.png")
    assert_refused(tmp_path, monkeypatch, "a", "-o", "out", word="out/y.png would replace out/x")
    (tmp_path / "out" / "coming.png").touch()
    assert_refused(tmp_path, monkeypatch, "a", "-o", "out", word="out/y.png would replace out/x")


@pytest.mark.parametrize(
    ("target", "word"),
    [
        ("folder", "Is a directory"),
        ("to_folder", "Is a directory"),
        ("none/x.json", "cannot write to none"),
        ("n" * 256, "File name too long"),
    ],
)
def test_json_that_cannot_be_written(tmp_path, monkeypatch, target, word):
    picture(tmp_path / "x.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to_folder").symlink_to("folder")
    assert_refused(tmp_path, monkeypatch, "x.png", "--json", target, word=word)


def test_a_copy_that_cannot_be_written(tmp_path, monkeypatch):
    picture(tmp_path / "x.png")
    (tmp_path / "out" / "x.png").mkdir(parents=True)
    assert_refused(tmp_path, monkeypatch, "x.png", "-o", "out", word="Is a directory")


def test_names_of_copies(tmp_path):
    def named(*names):
        found = annotated_names([tmp_path / name for name in names], tmp_path / "out")
        return [path.name for path in found.values()]

    assert named("a/x.jpg", "b/x.jpg", "c/X.jpg") == ["x.jpg", "x-2.jpg", "X-3.jpg"]
    assert named("x.bmp", "x.png", "x.JPEG") == ["x.png", "x-2.png", "x.JPEG"]
    assert named("x.avi", "x.mkv") == ["x.mp4", "x-2.mp4"]
    assert named("é.png", "b/e\u0301.png") == ["é.png", "e\u0301-2.png"]
    assert named("n" * 255, "b/" + "n" * 255) == ["n" * 251 + ".png", "n" * 249 + "-2.png"]
    assert named("ü" * 126 + ".gif") == ["ü" * 125 + ".png"]


def test_names_as_long_as_can_be(tmp_path):
    image = picture(tmp_path / ("n" * 251 + ".png"))
    longest = "j" * 250 + ".json"
    result = predict(image, "-o", "out", "--json", longest)
    assert result.exit_code == 0, result.output
    assert [p.name for p in (tmp_path / "out").iterdir()] == [image.name]
    assert len(json.loads((tmp_path / longest).read_text())) == 1


def test_json_to_a_fifo_and_through_a_link(tmp_path):
    picture(tmp_path / "x.png")
    os.mkfifo(tmp_path / "pipe")
    read = []
    thread = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    thread.start()
    assert predict("x.png", "--json", "pipe").exit_code == 0
    thread.join()
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "link.json").symlink_to("real.json")
    assert predict("x.png", "--json", "link.json").exit_code == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == json.loads(read[0])


def run(command, tmp_path):
    """A shell's pipeline, ``edet`` in it."""
    edet_ = f"{sys.executable} -m edet"
    return subprocess.run(
        ["bash", "-c", command.replace("edet ", edet_ + " ") + '; echo "${PIPESTATUS[@]}"'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_json_to_standard_output(tmp_path, name):
    """Nothing else is printed there: what reads it gets JSON alone, also where it is a file."""
    picture(tmp_path / "a.png")
    run = [sys.executable, "-m", "edet", "predict", "a.png", "--random-weights", "-m", MODEL]
    run += ["--image-size", "64", "--json", name]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert [entry["file"] for entry in json.loads(done.stdout)] == ["a.png"]
    assert "a.png: " in done.stderr and "/dev/stdout" not in done.stderr
    with open("found.json", "w") as file:
        subprocess.run(run, stdout=file, stderr=subprocess.DEVNULL, check=True)
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(done.stdout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "found.json"]


def test_where_a_dash_is_no_file(tmp_path):
    picture(tmp_path / "a.png")
    result = predict("a.png", "--json", "-", "--resume")
    assert result.exit_code == 2 and "--resume needs --json FILE" in result.stderr
    result = CliRunner().invoke(app, ["bench", MODEL, "--json", "-"])
    assert result.exit_code == 2 and "--json must be the path of a file, got -" in result.stderr
    assert not (tmp_path / "-").exists()


def test_a_reader_that_leaves_is_no_error(tmp_path):
    for i in range(3):
        picture(tmp_path / "in" / f"{i}.png", i)
    predicting = f"edet predict in -m {MODEL} --random-weights --image-size 64"
    found = run(f"{predicting} | true", tmp_path)
    assert found.stdout == "141 0\n"
    assert [line for line in found.stderr.splitlines() if not line.startswith("Note: ")] == []
    found = run(f"{predicting} --json found.json | true", tmp_path)
    assert found.stdout == "0 0\n"  # what is wanted in a file is there
    assert "Error" not in found.stderr and "3 images" in found.stderr
    assert len(json.loads((tmp_path / "found.json").read_text())) == 3
    found = run("edet info tf_efficientdet_lite0 | true", tmp_path)
    assert found.stdout == "141 0\n" and found.stderr == ""


def test_options_reach_the_predictor(tmp_path, monkeypatch):
    picture(tmp_path / "x.png")
    options = {}

    def recorded(network, **given):
        options.update(given)
        return made(network, **given)

    made = edet.Predictor
    monkeypatch.setattr("edet.cli.predict.Predictor", recorded)
    result = predict(
        *("x.png", "--max-detections", 7, "--iou-threshold", 0.25, "--class-agnostic"),
        *("--score-threshold", 0, "--json", "found.json"),
    )
    assert result.exit_code == 0, result.output
    assert options["max_detections"] == 7
    assert options["iou_threshold"] == 0.25
    assert options["class_agnostic"] is True
    assert options["image_size"] == (64, 64)
    [entry] = json.loads((tmp_path / "found.json").read_text())
    assert len(entry["detections"]) == 7


@pytest.mark.parametrize(
    ("text", "size"), [("128", (128, 128)), ("96x160", (96, 160)), ("96X160", (96, 160))]
)
def test_image_size(text, size):
    assert parse_size(text) == size


MISTAKES = ("0", "x", "12x", "x12", "1x2x3", "-5", "1.5", "99999", "9" * 5000, "²", "")


@pytest.mark.parametrize("text", MISTAKES, ids=range(len(MISTAKES)))
def test_image_size_mistakes(tmp_path, text):
    picture(tmp_path / "x.png")
    result = predict("x.png", "--image-size", text)
    assert result.exit_code == 2
    assert "--image-size must be" in result.stderr and repr(text) in result.stderr


def test_random_weights_are_the_same_in_every_process(tmp_path):
    """Else the processes of torchrun, or a run and the one that goes on with it, disagreed."""
    picture(tmp_path / "a.png")
    run = [sys.executable, "-m", "edet", "predict", "a.png", "--random-weights", "-m", MODEL]
    run += ["--image-size", "64", "--score-threshold", "0.01", "--json", "-"]
    first, second = (subprocess.run(run, capture_output=True, check=True).stdout for _ in range(2))
    [entry] = json.loads(first)
    assert entry["detections"] and first == second
