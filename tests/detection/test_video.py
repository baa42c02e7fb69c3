"""Video files: frames as they were written, clear errors, and 'edet predict' on them."""

import json
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from edet import cli
from edet.detection import video

av = pytest.importorskip("av", reason="needs the extra video")

MODEL = "tf_efficientdet_lite0"


def frames(count, height=48, width=64):
    """Grey frames, each brighter than the one before, with a dark left half."""
    for i in range(count):
        pixels = np.full((height, width, 3), 60 + 20 * i, np.uint8)
        pixels[:, : width // 2] = 10
        yield pixels


def write(path, count=5, **size):
    with video.VideoWriter(path, Fraction(10)) as writer:
        for pixels in frames(count, **size):
            writer.write(Image.fromarray(pixels))
    return path


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def predict(*arguments):
    options = ("--model", MODEL, "--random-weights")
    return CliRunner().invoke(cli.app, ["predict", *map(str, arguments), *options])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_frames_are_read_as_written(tmp_path, suffix):
    reader = video.VideoReader(write(tmp_path / f"clip{suffix}"))
    assert reader.rate == 10
    assert reader.frames in (5, None)
    found = list(reader)
    assert len(found) == 5
    for wanted, pixels in zip(frames(5), found, strict=True):
        assert pixels.shape == (48, 64, 3) and pixels.dtype == np.uint8
        assert abs(pixels.astype(int) - wanted).mean() < 6  # H.264 is lossy


def test_odd_sizes_lose_a_row_and_a_column(tmp_path):
    [pixels] = video.VideoReader(write(tmp_path / "odd.mp4", 1, height=47, width=65))
    assert pixels.shape == (46, 64, 3)


def test_an_image_of_another_size_is_scaled_to_the_first(tmp_path):
    with video.VideoWriter(tmp_path / "clip.mp4", Fraction(10)) as writer:
        for size in ((64, 48), (128, 97)):
            writer.write(Image.new("RGB", size))
    assert [p.shape for p in video.VideoReader(tmp_path / "clip.mp4")] == [(48, 64, 3)] * 2


def test_rotated_frames_are_upright(tmp_path, monkeypatch):
    reader = video.VideoReader(write(tmp_path / "clip.mp4", 1))

    class Rotated:
        rotation = -90  # turn it clockwise to see it upright

        def to_ndarray(self, format):
            return next(frames(1))

    class Container:
        def decode(self, video):
            yield Rotated()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    reader._container = Container()
    [pixels] = reader
    assert pixels.shape == (64, 48, 3)
    assert (pixels[:30] == 10).all() and (pixels[34:] == 60).all()  # left became top


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "junk.mp4").write_bytes(b"junk" * 100)
    (tmp_path / "empty.mp4").touch()
    whole = write(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    for name in ("junk.mp4", "empty.mp4", "cut.mp4"):
        with pytest.raises(video.VideoError, match=rf"{name} (is not a video that|has no video)"):
            video.VideoReader(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        video.VideoReader(tmp_path / "none.mp4")
    with av.open("sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        container.mux([*stream.encode(sound), *stream.encode()])
    with pytest.raises(video.VideoError, match=r"sound\.mp4 has no video"):
        video.VideoReader("sound.mp4")


def test_predict_writes_json_and_an_annotated_copy(tmp_path):
    write(tmp_path / "clip.mp4", 4)
    result = predict(
        *("clip.mp4", "--score-threshold", 0, "--json", "found.json", "-o", "out", "--stats"),
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("clip.mp4: 4 frames, ")
    assert "4 images in" in result.stderr and "post-processing" in result.stderr
    entries = json.loads((tmp_path / "found.json").read_text())
    assert [(e["file"], e["frame"]) for e in entries] == [("clip.mp4", i) for i in range(4)]
    assert all(len(e["detections"]) == 100 for e in entries)
    copy = video.VideoReader(tmp_path / "out" / "clip.mp4")
    assert copy.rate == 10
    assert [pixels.shape for pixels in copy] == [(240, 320, 3)] * 4  # enlarged to be readable
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["clip.mp4"]


def test_a_folder_with_broken_videos_and_images(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "b.mkv", 2)
    (folder / "a.mp4").write_bytes(b"junk")
    Image.fromarray(next(frames(1))).save(folder / "c.png")
    result = predict("in", "--json", "found.json", "-o", "out")
    assert result.exit_code == 1
    assert "Skipped: in/a.mp4 is not a video" in result.stderr
    assert result.stderr.splitlines()[-1] == "Error: 1 of 3 files could not be read"
    assert result.stdout == "in/b.mkv: 2 frames, nothing\nin/c.png: nothing\n"
    entries = json.loads((tmp_path / "found.json").read_text())
    assert [(e["file"], e.get("frame")) for e in entries] == [
        ("in/b.mkv", 0),
        ("in/b.mkv", 1),
        ("in/c.png", None),
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["b.mp4", "c.png"]


def test_a_video_that_breaks_off_keeps_what_came_before(tmp_path, monkeypatch):
    write(tmp_path / "clip.mp4", 5)
    whole = video.VideoReader.__iter__

    def breaks(self):
        for i, pixels in enumerate(whole(self)):
            if i == 3:
                raise video.VideoError("clip.mp4 cannot be decoded after frame 3")
            yield pixels

    monkeypatch.setattr(video.VideoReader, "__iter__", breaks)
    result = predict("clip.mp4", "--json", "found.json", "-o", "out")
    assert result.exit_code == 1
    assert result.stdout == "clip.mp4: 3 frames, nothing\n"
    assert "Skipped: clip.mp4 cannot be decoded after frame 3" in result.stderr
    assert len(json.loads((tmp_path / "found.json").read_text())) == 3
    monkeypatch.undo()
    assert len(list(video.VideoReader(tmp_path / "out" / "clip.mp4"))) == 3


def test_missing_package_is_named(tmp_path, monkeypatch):
    write(tmp_path / "clip.mp4", 1)
    monkeypatch.setitem(sys.modules, "av", None)
    result = predict("clip.mp4")
    assert result.exit_code == 2
    assert 'Error: av is needed here: pip install "edet-kernels[video]"' in result.stderr
