"""Predictors on a GPU, where each shape is one CUDA graph, against those of a CPU.

The cases of the CPU run them on a stand-in for ``torch.cuda``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cuda_stand_in
import edet
from edet.bench.variants import eager_copy, predictor_calls, prepare, random_model
from edet.detection.predictor import Predictor
from edet.detection.preprocess import letterbox
from edet.detection.results import Detections
from edet.fused import cuda_graph
from edet_kernels.testing.samples import DTYPES

SIZE = (128, 192)
SIZES = [(48, 64), (100, 70), (30, 90)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU, or the CPU that is taken for one; float32 without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if request.param == "cpu":
        cuda_stand_in.install(monkeypatch)
    return torch.device(request.param)


@pytest.fixture
def model() -> edet.EfficientDet:
    """A D0 whose scores are far from one another."""
    made = random_model("tf_efficientdet_d0", torch.randn(1, 3, *SIZE))
    torch.nn.init.normal_(made.class_net.predict.conv_pw.weight, std=0.8)
    return made


def make(model: edet.EfficientDet, device: torch.device, **options: object) -> Predictor:
    options = {"score_threshold": 0.0, "max_detections": 20, "image_size": SIZE, **options}
    return Predictor(copy.deepcopy(model).to(device), **options)  # type: ignore[arg-type]


def photos(count: int, size: tuple[int, int] = SIZES[0]) -> list[Tensor]:
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in range(count)]


def assert_identical(found: Detections, expected: Detections) -> None:
    for x, y in zip(
        (found.boxes, found.scores, found.labels),
        (expected.boxes, expected.scores, expected.labels),
        strict=True,
    ):
        assert x.device.type == "cpu" and torch.equal(x, y)


def assert_same_objects(found: Detections, expected: Detections) -> None:
    """Each object but the last ones of one is one of the other: labels, scores, boxes."""
    for a, b in ((found, expected), (expected, found)):
        same = (a.labels[:, None] == b.labels) & ((a.scores[:, None] - b.scores).abs() < 1e-4)
        same &= (a.boxes[:, None] - b.boxes).abs().amax(-1) < 0.05  # pixels
        # what is as good as the last one may have had to go for it
        inner = a.scores > b.scores.min() + 1e-4
        assert inner.sum() > len(a) // 2
        assert (same.any(1) | ~inner).all()


def test_objects_are_those_of_the_cpu(
    device: torch.device, model: edet.EfficientDet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # bytes are resized in float by a GPU, in integers by a CPU: these need not be, or are floats
    batches = [[x // 4 + 96 for x in photos(count, SIZE)] for count in (1, 2)]
    batches += [[x / 255 for x in photos(1, size)] for size in SIZES]
    batches += [[x / 255 for size in (SIZES[0], (9, 99)) for x in photos(1, size)]]
    with monkeypatch.context() as patch:
        patch.setattr(cuda_graph, "captures", lambda device: False)
        expected = [make(model, torch.device("cpu"))(batch) for batch in batches]
    predictor = make(model, device)
    first: list[list[Detections]] = []
    for turn in range(3):
        for i, batch in enumerate(batches):
            found = predictor(batch)
            if turn == 0:
                first.append(found)
            for x, y, z in zip(found, expected[i], first[i], strict=True):
                assert_same_objects(x, y)
                assert_identical(x, z)  # the same kernels, alone and in a graph
    assert predictor.stats().plans == len(batches)
    assert all(isinstance(plan, cuda_graph.Graph) for plan in predictor._plans.values())


def test_resized_bytes_are_those_of_the_cpu_but_for_rounding(device: torch.device) -> None:
    images = [photos(1, size)[0] for size in [*SIZES, SIZE, (200, 333)]]
    expected = letterbox(images, SIZE, (124, 116, 104)).int()
    found = letterbox([x.to(device) for x in images], SIZE, (124, 116, 104))
    assert found.dtype == torch.uint8 and found.device.type == device.type
    apart = (found.cpu().int() - expected).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_detections_of_each_dtype_are_the_references(
    device: torch.device, dtype: torch.dtype
) -> None:
    images = torch.randn(1, 3, *SIZE, device=device)
    model = prepare(random_model("tf_efficientdet_lite0", images), device, dtype)
    with torch.inference_mode():  # raises where another box is found
        _, ours, eager = predictor_calls(model, eager_copy(model), SIZE, 2)
    assert ours <= 3 * eager + 4 * torch.finfo(dtype).eps


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Work of this thread on a stream of its own."""
    if device.type == "cpu":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


def test_threads_on_streams_of_their_own(device: torch.device, model: edet.EfficientDet) -> None:
    predictor = make(model, device)
    images = photos(6)
    expected = [predictor(image) for image in images]

    def work(_: int) -> list[Detections]:
        with own_stream(device):
            return [predictor(image) for image in images for _ in range(3)]

    with ThreadPoolExecutor(3) as threads:
        for found in threads.map(work, range(3)):
            for i, one in enumerate(found):
                assert_identical(one, expected[i // 3])


def test_streamed_images_are_those_of_calls(device: torch.device, model: edet.EfficientDet) -> None:
    predictor = make(model, device, batch_size=2)
    images = [image for _ in range(3) for size in SIZES for image in photos(2, size)]
    expected = [found for i in range(0, len(images), 2) for found in predictor(images[i : i + 2])]
    for prediction, wanted in zip(predictor.stream(images, workers=3), expected, strict=True):
        assert prediction.error is None and prediction.detections is not None
        assert_identical(prediction.detections, wanted)


def test_pickled_and_planned_again(device: torch.device, model: edet.EfficientDet) -> None:
    predictor = make(model, device)
    image = photos(1)[0]
    expected = [predictor(image) for _ in range(2)][1]
    for twin in (pickle.loads(pickle.dumps(predictor)), copy.deepcopy(predictor)):
        assert twin.device.type == device.type and twin.stats().plans == 0
        for _ in range(3):
            assert_identical(twin(image), expected)


def test_new_weights_are_seen(device: torch.device, model: edet.EfficientDet) -> None:
    predictor = make(model, device)
    image = photos(1)[0]
    before = [predictor(image) for _ in range(3)][2]
    with torch.no_grad():
        predictor.model.class_net.predict.conv_pw.bias.add_(0.5)
    after = [predictor(image) for _ in range(3)]
    assert not torch.equal(after[0].scores, before.scores)
    assert_identical(after[2], after[0])


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_predict_command(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typer_testing = pytest.importorskip("typer.testing", reason="needs the extra cli")
    pil = pytest.importorskip("PIL.Image", reason="needs the extra image")
    from edet.cli import app

    monkeypatch.chdir(tmp_path)
    pil.fromarray(photos(1)[0].permute(1, 2, 0).numpy()).save("photo.png")
    arguments = ["predict", "photo.png", "--model", "tf_efficientdet_lite0", "--random-weights"]
    arguments += ["--score-threshold", "0", "--device", place, "--json", "found.json"]
    result = typer_testing.CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(Path("found.json").read_text())


@pytest.mark.gpu
def test_bench_command() -> None:
    typer_testing = pytest.importorskip("typer.testing", reason="needs the extra cli")
    from edet.cli import app

    arguments = ["bench", "tf_efficientdet_lite0", "--rounds", "2", "--device", "cuda"]
    result = typer_testing.CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "BiFPN" in result.output
