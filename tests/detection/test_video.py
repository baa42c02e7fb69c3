"""Video files: frames as they were written, clear errors, and 'edet predict' on them."""

import contextlib
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
        pixels = np.full((height, width, 3), (60 + 20 * i) % 256, np.uint8)
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
        pts, time_base = 3, Fraction(1, 10)
        width, height = 64, 48

        def to_ndarray(self, format):
            return next(frames(1))

    monkeypatch.setattr(video, "_decoded", lambda *_: [Rotated()])
    [pixels] = reader
    assert pixels.shape == (64, 48, 3)
    assert (pixels[:30] == 10).all() and (pixels[34:] == 60).all()  # left became top
    assert pixels.time == Fraction(3, 10)


def noise_video(path, milliseconds, **options):
    """A video of noise, which compresses badly, with a frame at each of these times."""
    if "libx264" not in av.codec.codecs_available:
        pytest.skip("needs the encoder libx264, whose damage the decoder notices")
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "5", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(milliseconds):
            pixels = np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def times(path):
    with av.open(str(path)) as container:
        return [round(float(frame.time), 3) for frame in container.decode(video=0)]


VARYING = [0, 100, 150, 1000, 1010, 3000, 3001, 9000]


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
@pytest.mark.parametrize("start", [0, 500])
def test_times_of_a_variable_rate_are_kept(tmp_path, suffix, start):
    path = noise_video(tmp_path / f"in{suffix}", [start + t for t in VARYING])
    wanted = [(start + t) / 1000 for t in VARYING]
    assert times(path) == wanted
    assert [round(float(frame.time), 3) for frame in video.VideoReader(path)] == wanted
    result = predict(path, "--json", "found.json", "-o", "out")
    assert result.exit_code == 0, result.output
    assert times(tmp_path / "out" / "in.mp4") == wanted
    entries = json.loads((tmp_path / "found.json").read_text())
    assert [round(entry["time"], 3) for entry in entries] == wanted
    assert [entry["frame"] for entry in entries] == list(range(len(wanted)))


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(24000, 1001), 25, 1000])
@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_constant_rate_stays_exact(tmp_path, rate, suffix):
    """Though Matroska rounds the times of frames to milliseconds."""
    with video.VideoWriter(tmp_path / f"in{suffix}", Fraction(rate)) as writer:
        for pixels in frames(9):
            writer.write(Image.fromarray(pixels))
    reader = video.VideoReader(tmp_path / f"in{suffix}")
    assert reader.rate == rate
    with video.VideoWriter(tmp_path / "out.mp4", reader.rate, reader.time_base) as writer:
        for pixels in reader:
            writer.write(Image.fromarray(pixels), pixels.time)
    found = [frame.time for frame in video.VideoReader(tmp_path / "out.mp4")]
    assert found == [pytest.approx(i / rate, abs=1e-6) for i in range(9)]
    assert video.VideoReader(tmp_path / "out.mp4").rate == rate


def test_times_that_do_not_grow_are_moved_on(tmp_path):
    with video.VideoWriter(tmp_path / "x.mp4", Fraction(10), Fraction(1, 1000)) as writer:
        for pixels, time in zip(frames(5), (0, 0.5, 0.5, 0.2, None), strict=True):
            writer.write(Image.fromarray(pixels), time)
    assert times(tmp_path / "x.mp4") == [0, 0.5, 0.501, 0.502, 0.503]


def test_the_frames_can_be_read_again(tmp_path):
    reader = video.VideoReader(write(tmp_path / "clip.mp4", 4))
    first, second = list(reader), list(reader)
    assert len(first) == 4
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one, other) and one.time == other.time
    begun = iter(reader)
    next(begun)
    assert len(list(reader)) == 4  # beside another
    assert len(list(begun)) == 3


def damaged(path, packet):
    """The video with the beginning of one packet overwritten."""
    with av.open(str(path)) as container:
        position = [p.pos for p in container.demux(video=0) if p.size][packet]
    data = bytearray(path.read_bytes())
    data[position : position + 4] = b"\xff" * 4
    path.write_bytes(data)
    return path


def decodable(path):
    count = 0
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            with contextlib.suppress(av.error.FFmpegError):
                count += len(packet.decode())
    return count


@pytest.mark.parametrize("packet", [0, 7, 29])
def test_reading_goes_on_behind_a_damaged_packet(tmp_path, packet):
    path = damaged(noise_video(tmp_path / "clip.mp4", range(0, 3000, 100)), packet)
    read = []
    with pytest.raises(video.VideoError, match=r"clip\.mp4 is damaged in .*: 29 frames"):
        read.extend(video.VideoReader(path))
    assert len(read) == decodable(path) == 29
    assert [round(float(f.time), 3) for f in read] == [i / 10 for i in range(30) if i != packet]
    result = predict(path, "--json", "found.json", "-o", "out")
    assert result.exit_code == 1
    assert "Skipped: " in result.stderr and "is damaged in" in result.stderr
    assert result.stdout.endswith("clip.mp4: 29 frames, nothing\n")
    assert len(json.loads((tmp_path / "found.json").read_text())) == 29
    assert len(times(tmp_path / "out" / "clip.mp4")) == 29


def test_many_damaged_packets_and_a_torn_end(tmp_path):
    path = noise_video(tmp_path / "clip.mp4", range(0, 3000, 100), movflags="faststart")
    for packet in (3, 4, 11, 12, 20):
        damaged(path, packet)
    path.write_bytes(path.read_bytes()[:-3000])
    read = []
    with pytest.raises(video.VideoError, match="is damaged in 6 places"):
        read.extend(video.VideoReader(path))
    assert len(read) == decodable(path) == 24 - 1


@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
def test_a_video_that_was_cut_off_is_told(tmp_path, suffix):
    """FFmpeg reads these formats to where they end, as if nothing lacked."""
    path = noise_video(tmp_path / f"clip{suffix}", range(0, 6000, 100))
    assert len(list(video.VideoReader(path))) == 60
    content = path.read_bytes()
    with av.open(str(path)) as container:
        cut = [packet.pos for packet in container.demux(video=0) if packet.size][30]
    path.write_bytes(content[: cut - 64])  # in the middle of the packet before, or at its end
    read = []
    with pytest.raises(
        video.VideoError, match=r"(cut off after [23]\.\d of 6\.0 s|damaged in).*: \d+ f"
    ):
        read.extend(video.VideoReader(path))
    assert 28 <= len(read) <= 30
    result = predict(path, "--json", "found.json")
    assert result.exit_code == 1
    assert len(json.loads((tmp_path / "found.json").read_text())) == len(read)


@pytest.mark.parametrize("last", [5.0, 45.0])
def test_a_last_frame_that_is_shown_for_long(tmp_path, last):
    with av.open(str(tmp_path / "slides.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        packets = []
        for pixels in frames(5):
            packets += stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24"))
        packets += stream.encode()
        packets[-1].duration = round(last / packets[-1].time_base)
        for packet in packets:
            container.mux(packet)
    reader = video.VideoReader(tmp_path / "slides.mkv")
    assert reader._end > last
    assert len(list(reader)) == 5


def test_data_that_the_decoder_made_up_is_told(tmp_path):
    path = tmp_path / "clip.avi"
    with video.VideoWriter(path, Fraction(10)) as writer:
        for i in range(30):
            noise = np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8)
            writer.write(Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3 + 7])
    read = []
    with pytest.raises(video.VideoError, match=r"damaged in .*Corrupt data"):
        read.extend(video.VideoReader(path))
    assert len(read) == decodable(path) > 15


@pytest.mark.parametrize("name", ["12:30:05.mp4", "file:x.mp4", "pipe:0.mp4", "a%03d ü.mp4"])
def test_a_name_is_no_address(tmp_path, name):
    write(name)  # relative, as all of a name before a colon is FFmpeg's name of a protocol
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert len(list(video.VideoReader(name))) == 5
    result = predict(name, "-o", "out")
    assert result.exit_code == 0, result.output
    assert len(list(video.VideoReader(f"out/{name}"))) == 5


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


def test_a_copy_that_cannot_be_encoded_does_not_end_the_run(tmp_path):
    (tmp_path / "in").mkdir()
    with av.open("in/a.mkv", "w") as container:  # wider than H.264 can be
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 20_000, 4, "yuv444p"
        for pixels in frames(2, height=4, width=20_000):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv444p")))
        container.mux(stream.encode())
    write("in/b.mp4", 2)
    result = predict("in", "--json", "found.json", "-o", "out")
    assert result.exit_code == 1, result.output
    assert result.stdout == "in/a.mkv: 2 frames, nothing\nin/b.mp4: 2 frames, nothing\n"
    assert "Skipped: out/a.mp4 is not written, a video of 20000 × " in result.stderr
    entries = json.loads((tmp_path / "found.json").read_text())
    assert [(e["file"], e["frame"]) for e in entries] == [
        (f"in/{name}", i) for name in ("a.mkv", "b.mp4") for i in range(2)
    ]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b.mp4"]


def test_missing_package_is_named(tmp_path, monkeypatch):
    write(tmp_path / "clip.mp4", 1)
    monkeypatch.setitem(sys.modules, "av", None)
    result = predict("clip.mp4")
    assert result.exit_code == 2
    assert 'Error: av is needed here: pip install "edet-kernels[video]"' in result.stderr
