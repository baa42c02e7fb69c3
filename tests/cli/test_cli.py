"""The command line: what each sub-command does, and one clear line for every mistake."""

import json
import re
import subprocess
import sys
from typing import get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import edet
import edet_kernels
from edet.cli import app
from edet.models.described import save_described
from edet.models.pretrained import PRETRAINED

MODEL = "tf_efficientdet_lite0"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.png"):
        pixels = generator.integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def edet_(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="edet")


def predict(*arguments):
    return edet_("predict", *arguments, "--model", MODEL, "--random-weights")


def assert_one_line_error(result, *words, code=2):
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)  # no traceback
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert result.stderr.splitlines()[-1] == errors[0]
    for word in words:
        assert str(word) in errors[0]


# --- predict --------------------------------------------------------------------------------------


def test_predict_folder(photos):
    result = predict(photos)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"{photos / name}: nothing" for name in ("a.png", "b.jpg", "c.png")
    ]
    assert "random" in result.stderr


def test_predict_files_and_patterns_each_once(photos):
    result = predict("photos/c.png", "photos/*.png", "**/a.png", "--batch-size", 2)
    assert result.exit_code == 0
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == [
        "photos/c.png",
        "photos/a.png",
    ]


@pytest.mark.parametrize("nms", ["hard", "gaussian"])
def test_predict_writes_json_and_annotated_images(photos, tmp_path, nms):
    result = predict(
        photos, "--score-threshold", 0, "--json", "found.json", "--output", "out/in", "--nms", nms
    )
    assert result.exit_code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [f["file"] for f in found] == [str(photos / n) for n in ("a.png", "b.jpg", "c.png")]
    for entry in found:
        assert entry["image_size"] == [60, 80]
        assert len(entry["detections"]) == 100
        assert set(entry["detections"][0]) == {"box", "score", "label", "name"}
    for name in ("a.png", "b.jpg", "c.png"):
        with Image.open(tmp_path / "out" / "in" / name) as annotated:
            assert annotated.size == (320, 240)  # enlarged to be readable
    assert sorted(p.name for p in (tmp_path / "out" / "in").iterdir()) == [
        "a.png",
        "b.jpg",
        "c.png",
    ]


def test_images_of_one_name_do_not_overwrite_each_other(photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (photos / "a.png").rename(other / "a.png")
    (other / "c.png").write_bytes((photos / "c.png").read_bytes())
    assert predict(photos, other, "--output", "out").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "a.png",
        "b.jpg",
        "c-2.png",
        "c.png",
    ]


@pytest.mark.parametrize("content", [b"", b"junk"])
def test_broken_file_is_reported_and_skipped(photos, tmp_path, content):
    (photos / "b.jpg").write_bytes(content)
    result = predict(photos, "--json", "found.json")
    assert_one_line_error(result, "1 of 3 files could not be read", code=1)
    assert f"Skipped: {photos / 'b.jpg'} is not an image" in result.stderr
    assert len(result.stdout.splitlines()) == 2
    assert len(json.loads((tmp_path / "found.json").read_text())) == 2


def test_all_files_broken(photos, tmp_path):
    for path in photos.iterdir():
        path.write_bytes(b"junk")
    assert_one_line_error(predict(photos, "--json", "found.json"), "3 of 3", code=1)
    assert json.loads((tmp_path / "found.json").read_text()) == []


def test_interrupting_keeps_what_was_found(photos, tmp_path, monkeypatch):
    stream = edet.Predictor.stream

    def interrupted(self, images, **options):
        for i, found in enumerate(stream(self, images, **options)):
            if i == 2:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(edet.Predictor, "stream", interrupted)
    result = predict(photos, "--json", "found.json", "--output", "out")
    assert_one_line_error(result, "interrupted", code=130)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [f["file"] for f in found] == [str(photos / n) for n in ("a.png", "b.jpg")]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.jpg"]


def test_a_copy_that_cannot_be_written_ends_the_run(photos, tmp_path, monkeypatch):
    def full(path, picture):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("edet.cli.predict.save_copy", full)
    result = predict(photos, "--json", "found.json", "--output", "out")
    assert_one_line_error(result, "a.png: No space left on device")
    assert not (tmp_path / "found.json").exists()


def test_checkpoint_and_class_names(photos, tmp_path):
    torch.manual_seed(0)
    edet.save_checkpoint(edet.create_model(MODEL, num_classes=2), tmp_path / "weights.pth")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    result = edet_(
        *("predict", photos, "-m", MODEL, "-c", "weights.pth", "--num-classes", 2),
        *("--class-names", "names.txt", "--score-threshold", 0, "--dtype", "bfloat16"),
    )
    assert result.exit_code == 0
    assert re.fullmatch(r"(.*: \d+ (cat|dog).*\n){3}", result.stdout)
    assert "random" not in result.stderr


def test_class_names_are_as_many_as_the_checkpoint_has(photos, tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    save_described(edet.create_model(MODEL, num_classes=2), tmp_path / "own.pt")
    options = ("--class-names", "names.txt", "--score-threshold", 0, "--image-size", 64)
    result = edet_("predict", photos, "-c", "own.pt", *options)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"(.*: \d+ (cat|dog).*\n){3}", result.stdout)
    assert_one_line_error(edet_("predict", photos, *options), "names.txt must hold 1 names")
    (tmp_path / "names.txt").write_text("human\n")  # of the model that comes with its weights
    result = edet_("predict", photos, *options)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"(.*: \d+ human\n){3}", result.stdout)


def test_class_names_of_any_script_and_a_font(photos, tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffкот\r\nпёс\r\n\r\n".encode())
    options = ("--num-classes", 2, "--class-names", "names.txt", "--score-threshold", 0)
    result = predict(photos, *options, "--image-size", 64, "-o", "out", "--json", "found.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert {d["name"] for entry in found for d in entry["detections"]} == {"кот", "пёс"}
    [note] = [line for line in result.stderr.splitlines() if "glyphs" in line]
    assert note.startswith("Note: ") and "'копстё'" in note and note.endswith("--font FILE")
    matplotlib = pytest.importorskip("matplotlib")
    font = matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf"
    other = predict(photos, *options, "--image-size", 64, "-o", "other", "--font", font)
    assert other.exit_code == 0, other.output
    assert "glyphs" not in other.stderr
    assert (tmp_path / "other" / "a.png").read_bytes() != (tmp_path / "out" / "a.png").read_bytes()
    (tmp_path / "latin1.txt").write_bytes("café\nthé\n".encode("latin-1"))
    result = predict(photos, "--num-classes", 2, "--class-names", "latin1.txt")
    assert_one_line_error(result, "latin1.txt must be text in UTF-8", "line 1")


def test_predict_mistakes(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "bad.pth").write_bytes(b"junk" * 100)
    before = sorted(tmp_path.rglob("*"))
    weights = ("--random-weights",)
    for arguments, words in [
        ((), ["Missing argument"]),
        (("missing.jpg", *weights), ["missing.jpg does not exist"]),
        (("none/*.jpg", *weights), ["no file matches none/*.jpg"]),
        (("empty", *weights), ["folder empty holds no images or videos"]),
        ((photos, "-m", MODEL), ["--checkpoint FILE is required"]),
        ((photos, "-c", "bad.pth", *weights), ["exclude each other"]),
        ((photos, "-m", "tf_efficientdet_d9", *weights), ["d9", "did you mean", "_d7"]),
        ((photos, "-c", "missing.pth"), ["missing.pth"]),
        ((photos, "-m", MODEL, "-c", "bad.pth"), ["bad.pth"]),
        ((photos, "-m", MODEL, "-o", "file", *weights), ["--output", "cannot write to file"]),
        ((photos, "-m", MODEL, "-o", "file/out", *weights), ["--output", "file/out"]),
        ((photos, "-m", MODEL, "-o", photos, *weights), ["--output", "replaced"]),
        ((photos, "--json", "none/f.json", *weights), ["--json", "cannot write to none"]),
        ((photos, "--nms", "soft", *weights), ["--nms", "soft"]),
        ((photos, "--score-threshold", "2", *weights), ["--score-threshold"]),
        ((photos, "--batch-size", "0", *weights), ["--batch-size"]),
        ((photos, "-m", MODEL, "--device", "gpu", *weights), ["--device must be", "'gpu'"]),
        ((photos, "-m", MODEL, "--class-names", "none.txt", *weights), ["none.txt"]),
        ((photos, "-m", MODEL, "--class-names", "file", *weights), ["file must hold 90 names"]),
        ((photos, "-m", MODEL, "--font", "file", *weights), ["font must be", "got file"]),
        ((photos, "-m", MODEL, "--font", "none.ttf", *weights), ["none.ttf: No such file"]),
        ((photos, "-m", MODEL, "--max-detections", "0", *weights), ["--max-detections"]),
        ((photos, "-m", MODEL, "--iou-threshold", "2", *weights), ["--iou-threshold"]),
        ((photos, "--frobnicate"), ["--frobnicate"]),
    ]:
        assert_one_line_error(edet_("predict", *arguments), *words)
    assert sorted(tmp_path.rglob("*")) == before  # nothing written by halves


def test_checkpoint_of_another_model(photos, tmp_path):
    edet.save_checkpoint(edet.create_model("tf_efficientdet_lite1"), tmp_path / "lite1.pth")
    result = edet_("predict", photos, "-m", MODEL, "-c", "lite1.pth")
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert "Error: lite1.pth" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_device_that_is_not_there(photos):
    assert_one_line_error(predict(photos, "--device", "cuda"), "--device cuda cannot be used")


# --- the other commands ---------------------------------------------------------------------------


def test_models_lists_every_name():
    result = edet_("models")
    assert result.exit_code == 0
    names = [line.split()[0] for line in result.stdout.splitlines()[1:]]
    assert names == [*edet.list_models(), *PRETRAINED]
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_commands_know_the_detector_of_the_package():
    result = edet_("info", "edet_lite0_person")
    assert result.exit_code == 0, result.output
    assert "input 320x320" in result.stdout and "1 classes" in result.stdout
    result = edet_("schedule", "edet_lite0_person")
    assert result.exit_code == 0 and "P3" in result.stdout, result.output
    result = edet_("bench", "edet_lite0_person", "--rounds", 1)
    assert result.exit_code == 0 and "BiFPN" in result.stdout, result.output


def test_info():
    result = edet_("info", "tf_efficientdet_d0")
    assert result.exit_code == 0
    rows = {line.split("  ")[0]: line.split() for line in result.stdout.splitlines()}
    assert rows["total"][1] == "3,880,067"
    assert rows["total"][2] == "2.492"
    for choice in edet_kernels.explain():
        assert " ".join(rows[choice.op]) == f"{choice.op} {choice.backend} {choice.reason}"
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_bench(tmp_path):
    result = edet_("bench", MODEL, "--rounds", 1, "--json", "bench.json", "--plot", "bench.png")
    assert result.exit_code == 0
    table = json.loads((tmp_path / "bench.json").read_text())
    assert {row["model"] for row in table["rows"]} == {MODEL}
    with Image.open(tmp_path / "bench.png") as picture:
        assert picture.size == (1350, 675)
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_schedule(tmp_path):
    if not edet_kernels.library.load():
        pytest.skip("needs the op library")
    result = edet_("schedule", "tf_efficientdet_d0", "--blocks", 132, "--plot", "tiles.png")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len([line for line in lines if re.match(r"P\d\.\d+ ", line)]) == 24
    assert lines[1].split()[:5] == ["P6.0", "P6", "P7", "8x8", "1"]
    # 1 + 4 + 16 + 64 tiles down, 16 + 4 + 1 + 1 up, three times
    assert "321 tiles of 8x8 pixels; the longest chain is 24 tiles, 132 blocks take " in lines[-2]
    assert max(map(len, lines)) <= 80
    with Image.open(tmp_path / "tiles.png") as picture:
        assert picture.size[0] == 1350
    result = edet_("schedule", "tf_efficientdet_d7x", "--tile-rows", 4, "--batch", 1)
    assert result.exit_code == 0


@pytest.mark.parametrize("name", ["tiles", ".png", "tiles.jpgx"])
def test_a_picture_without_a_format_is_refused(tmp_path, name):
    result = edet_("schedule", MODEL, "--plot", name)
    assert_one_line_error(result, "--plot must end in .png, .svg or .pdf", name)
    assert list(tmp_path.iterdir()) == []


def test_bench_does_not_write_its_result_and_its_plot_to_one_file(tmp_path):
    (tmp_path / "link.svg").symlink_to("a.png")
    for json_file, plot in (("a.png", "a.png"), ("a.png", "link.svg")):
        result = edet_("bench", MODEL, "--rounds", 1, "--json", json_file, "--plot", plot)
        assert_one_line_error(result, f"--plot: {plot} would replace {json_file}")


def test_mistakes_of_the_other_commands(tmp_path):
    for arguments, words in [
        (("info", "nope"), ["nope"]),
        (("bench", "nope"), ["nope"]),
        (("bench", MODEL, "--rounds", 0), ["--rounds"]),
        (("bench", MODEL, "--plot", "none/x.png"), ["--plot", "none"]),
        (("bench", MODEL, "--plot", "x.docx"), ["--plot", ".png"]),
        (("bench", MODEL, "--json", "none/x.json"), ["--json", "none"]),
        (("bench", MODEL, "--device", "gpu"), ["--device"]),
        (("schedule", "nope"), ["nope"]),
        (("schedule", "--tile-rows", 3), ["--tile-rows", "3"]),
        (("schedule", "--plot", "none/x.png"), ["--plot", "none"]),
        (("frobnicate",), ["frobnicate"]),
    ]:
        assert_one_line_error(edet_(*arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_bench_reports_no_times_after_a_failed_check(monkeypatch):
    from edet.bench import stages

    def perturbed(model, copied=stages.eager_copy):
        eager = copied(model)
        with torch.no_grad():
            eager.class_net.predict.conv_pw.weight.mul_(1.01)
        return eager

    monkeypatch.setattr(stages, "eager_copy", perturbed)
    result = edet_("bench", MODEL, "--rounds", 1)
    assert_one_line_error(result, "heads", "no times are reported", code=1)
    assert result.stdout == ""


def test_bench_compare_and_report(tmp_path):
    arguments = (MODEL, "--rounds", 1, "--json", "a.json", "--batch-size", 1, "--batch-size", 2)
    assert edet_("bench", "run", *arguments).exit_code == 0
    table = json.loads((tmp_path / "a.json").read_text())

    def write_times(name, slowdown):
        """Times made up, so that the result depends on no machine: 10 ms, ours ``slowdown`` ms."""
        for row in table["rows"]:
            for variant, times in row["times"].items():
                middle = slowdown if variant == "ours" else 10.0
                times["samples_ms"] = [middle * (1 + 0.001 * i) for i in range(-10, 11)]
        (tmp_path / name).write_text(json.dumps(table))

    write_times("a.json", 5.0)
    result = edet_("bench", "compare", "a.json", "a.json")
    assert result.exit_code == 0 and "slower" not in result.stdout
    rows = [line for line in result.stdout.splitlines() if "batch " in line]
    assert sum("batch 2" in line for line in rows) == 8
    assert all(line.endswith("same") for line in rows)
    write_times("b.json", 5.5)
    result = edet_("bench", "compare", "a.json", "b.json")
    assert_one_line_error(result, "16 of 16 rows became slower", code=1)
    write_times("c.json", 4.5)
    result = edet_("bench", "compare", "a.json", "c.json")
    assert result.exit_code == 0 and result.stdout.count("faster") == 16
    assert edet_("bench", "report", "a.json", "-o", "report").exit_code == 0
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    (tmp_path / "d.json").write_text("{}")
    assert_one_line_error(edet_("bench", "compare", "a.json", "d.json"), "schema")
    assert edet_("bench", "report", "none.json").exit_code == 2


@pytest.mark.parametrize(
    "command",
    [
        "",
        "predict",
        "info",
        "bench",
        "bench run",
        "bench compare",
        "bench report",
        "schedule",
        "triton-repository",
        "models",
    ],
)
def test_help(command):
    result = edet_(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage: edet" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_version_and_no_arguments():
    assert edet.__version__ in edet_("--version").stdout
    assert "Commands:" in edet_().output


def test_python_m_edet():
    result = subprocess.run(
        [sys.executable, "-m", "edet", "models"], capture_output=True, text=True, check=True
    )
    assert "tf_efficientdet_d7x" in result.stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_missing_package_is_named(missing):
    code = f"import sys; sys.modules['{missing}'] = None; from edet.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == f'Error: {missing} is needed here: pip install "edet-kernels[cli]"\n'


def test_an_option_named_as_its_value_says_so():
    """Typer 0.27 called an option ``--DEVICE`` whose help shows its value as DEVICE."""
    from typer.models import OptionInfo

    def commands(group):
        yield from (command.callback for command in group.registered_commands)
        for other in group.registered_groups:
            yield from commands(other.typer_instance)

    seen = 0
    for callback in commands(app):
        hints = get_type_hints(callback, include_extras=True)
        for name, hint in hints.items():
            for option in getattr(hint, "__metadata__", ()):
                if isinstance(option, OptionInfo) and option.metavar == name.upper():
                    # where names are given, Typer finds the first in the place of the default
                    assert str(option.default).startswith("--"), f"{callback.__name__}: {name}"
                    seen += 1
    assert seen > 6
