"""Quantised detectors in ONNX: the bytes of every op, and the detections, against our own."""

from __future__ import annotations

import copy
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import edet
import edet_kernels
from edet.cli import app
from edet.preprocess import preprocess
from edet_kernels import int8
from exported_calls import fed, pictures
from tests.detection.test_quantize import decibels, detector, images

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

# exporters warn about themselves
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Call(NamedTuple):
    """A call of an op on bytes.

    Attributes:
        kind: the op, and whatever makes it compute in another way.
        maps: what it reads.
        run: from ``maps`` to its results.
    """

    kind: tuple[Any, ...]
    maps: list[Tensor]
    run: Callable[[list[Tensor]], list[Tensor]]


class Calls(nn.Module):
    """Each call on maps of its own; the weights are constants."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = tuple((call.run, len(call.maps)) for call in calls)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        for run, count in self.calls:
            found += run(maps[:count])
            maps = maps[count:]
        return found


def single_nodes(
    original: Callable[..., list[Tensor]], inputs: list[Tensor], *parts: Any, **given: Any
) -> Iterator[Call]:
    """A call of one node for each node of a call of ``nodes``, on the maps that it reads there."""
    count, row = len(inputs), Counter[int]()
    every = {**given, "outputs": list(range(count, count + len(given["layers"])))}
    maps = [*inputs, *original(inputs, *parts, **every)]
    for layer, ids, size in zip(given["layers"], given["edges"], given["sizes"], strict=True):
        rows = [[part[layer][min(row[layer], len(part[layer]) - 1)][None]] for part in parts]
        row[layer] += 1
        sources = [maps[e] for e in ids]
        graph = {"layers": [0], "edges": [tuple(range(len(ids)))], "sizes": [size]}
        options = {**given, **graph, "outputs": [len(ids)]}
        resized = tuple((x.shape[-2] > size[0]) - (x.shape[-2] < size[0]) for x in sources)
        yield Call(
            ("nodes", resized, tuple(rows[-1][0].shape[1:2])),
            sources,
            lambda maps, rows=rows, options=options: original(maps, *rows, **options),
        )


@contextmanager
def recording() -> Iterator[list[Call]]:
    """The calls that are made of the ops on bytes."""
    calls: list[Call] = []

    def called(op: str, original: Callable[..., Any], first: Any, *args: Any, **given: Any) -> Any:
        def run(maps: list[Tensor]) -> list[Tensor]:
            found = original(maps[0], *args, **given)
            return [found] if isinstance(found, Tensor) else found

        if op == "nodes":
            calls.extend(single_nodes(original, first, *args, **given))
        else:
            kind: tuple[Any, ...] = (op,)
            if op == "mbconv":
                expand, depthwise, *_ = args
                kernel, stride, residual = len(depthwise[0]), given["stride"], given["residual"]
                kind = (op, expand is None, kernel, stride, bool(residual))
            calls.append(Call(kind, [first], run))
        return original(first, *args, **given)

    with pytest.MonkeyPatch.context() as patch, edet_kernels.backend("reference"):
        for op in ("quantize", "dequantize", "stem", "mbconv", "lateral", "nodes"):
            patch.setattr(int8, op, functools.partial(called, op, getattr(int8, op)))
        yield calls


def session(path: Path, *, optimised: bool) -> Any:
    options = runtime.SessionOptions()
    if not optimised:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


#: Without VNNI, ONNX Runtime's products of unsigned by signed bytes saturate.
OPTIMISED = (False, True) if torch.cpu._is_vnni_supported() else (False,)


@pytest.fixture(scope="module")
def person() -> edet.EfficientDet:
    model = edet.create_model("edet_lite0_person").eval()
    return edet.quantize(model, pictures(), image_size=(128, 160))


@pytest.fixture(scope="module")
def d0() -> edet.EfficientDet:
    return edet.quantize(detector(cells=1, head_repeats=1), images())


def calls_of(model: edet.EfficientDet, size: tuple[int, int]) -> list[Call]:
    """The first call of each kind of a model of two pictures."""
    config, model = model.config, copy.deepcopy(model).unfreeze()
    batch = preprocess(pictures()[:2], size, mean=config.mean, std=config.std).images
    with recording() as calls, torch.no_grad():
        model(batch)
    return list({call.kind: call for call in reversed(calls)}.values())


#: The share of an op's bytes that may differ, by one.
SHARES = {"stem": 0.001, "quantize": 0.001, "lateral": 0.01, "nodes": 0.05, "mbconv": 0.15}


@pytest.mark.parametrize("name", ["person", "d0"])
def test_every_op_gives_our_bytes(name, request, tmp_path):
    model, size = request.getfixturevalue(name), (128, 160) if name == "person" else (64, 64)
    calls = calls_of(model, size)
    assert {call.kind[0] for call in calls} == {*SHARES, "dequantize"}
    with edet_kernels.backend("reference"):
        expected = [x for call in calls for x in call.run(call.maps)]
    kinds = [call.kind for call in calls for _ in call.run(call.maps)]
    maps = [x for call in calls for x in call.maps]
    with torch.no_grad():
        program = torch.onnx.export(Calls(calls).eval(), (maps,), dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "calls.onnx")
    for optimised in OPTIMISED:
        opened = session(tmp_path / "calls.onnx", optimised=optimised)
        names = [x.name for x in opened.get_inputs()]
        found = opened.run(None, dict(zip(names, (x.numpy() for x in maps), strict=True)))
        for kind, x, array in zip(kinds, expected, found, strict=True):
            y = torch.from_numpy(array)
            assert (y.dtype, y.shape) == (x.dtype, x.shape)
            if x.dtype == torch.uint8:
                wrong = (x.int() - y.int()).abs()
                print(optimised, kind, float(wrong.max()), float((wrong > 0).float().mean()))
                assert wrong.max() <= 1, kind
                assert (wrong > 0).float().mean() <= SHARES[kind[0]], kind
            else:
                print(optimised, kind, decibels([x], [y]))
                assert decibels([x], [y]) > 30, kind


class Detections(NamedTuple):
    """Boxes (N, 4), scores and labels of one image."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def assert_found(found: Detections, among: Detections) -> None:
    """Asserts that what is found for sure is among others: within 2 pixels, .03 of the score."""
    sure = found.scores > 0.3
    near = (found.boxes[sure][:, None] - among.boxes).abs().amax(2) < 2
    near &= (found.scores[sure][:, None] - among.scores).abs() < 0.03
    near &= found.labels[sure][:, None] == among.labels
    assert near.any(1).all()


def head_outputs(file: Path) -> Path:
    """The file with the outputs of the heads, the convolutions of class and box, as outputs too."""
    content = onnx.load(file)
    read = {name: node.op_type for node in content.graph.node for name in node.input}
    for node in content.graph.node:
        if node.op_type == "Conv" and read.get(node.output[0]) == "Transpose":
            content.graph.output.append(
                onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)
            )
    path = file.with_name("heads.onnx")
    onnx.save(content, path)
    return path


def runtimes(file: Path) -> Iterator[tuple[str, Callable[[dict[str, Any]], list[Any]]]]:
    for optimised in OPTIMISED:
        opened = session(file, optimised=optimised)
        yield f"ONNX Runtime, {optimised}", functools.partial(opened.run, None)
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    yield "OpenVINO", lambda given: list(compiled(given).to_tuple())


def assert_is_int8(file: Path, products: int) -> None:
    """Standard operators; int8 weights per output channel in front of all but the stem's."""
    content = onnx.load(file)
    onnx.checker.check_model(content, full_check=True)
    assert {node.domain for node in content.graph.node} == {""}
    made = {name: node for node in content.graph.node for name in node.output}
    values = {x.name: x for x in content.graph.initializer}
    convolutions = [node for node in content.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == products
    quantised = 0
    for node in convolutions:
        read, weight = (made.get(name) for name in node.input[:2])
        if weight is None:
            continue
        assert read.op_type == weight.op_type == "DequantizeLinear"
        assert values[weight.input[0]].data_type == onnx.TensorProto.INT8
        assert values[weight.input[1]].dims == values[weight.input[0]].dims[:1]
        quantised += 1
    assert quantised == products - 1


def test_detections_are_ours(person, tmp_path):
    predictor = edet.Predictor(person, image_size=(128, 160), score_threshold=0.1)
    file = tmp_path / "person.onnx"
    edet.export(predictor, file)
    assert_is_int8(file, 182)
    fill = runtime.InferenceSession(str(file)).get_modelmeta().custom_metadata_map["fill"]
    given = fed(predictor, pictures(), fill)
    expected = predictor(pictures())
    assert all((x.scores > 0.3).any() for x in expected)
    pixels = torch.from_numpy(given["images"])
    with torch.no_grad():
        *heads, _ = predictor.network([pixels, pixels])
    for name, run in runtimes(head_outputs(file)):
        boxes, scores, labels, counts, *found = map(torch.from_numpy, run(given))
        assert decibels(heads, found) > 30, name
        for i, x in enumerate(expected):
            ours = Detections(x.boxes, x.scores, x.labels)
            rows = Detections(*(values[i, : counts[i]] for values in (boxes, scores, labels)))
            assert_found(ours, rows)
            assert_found(rows, ours)


def test_a_checkpoint_in_int8_is_exported_in_int8(d0, tmp_path):
    checkpoint, file = tmp_path / "d0.pt", tmp_path / "d0.onnx"
    edet.save_described(d0, checkpoint, class_names=["a", "b", "c"])
    result = CliRunner().invoke(
        app, ["export", str(checkpoint), "-o", str(file), "--score-threshold", "0.01"]
    )
    assert result.exit_code == 0, result.output
    assert_is_int8(file, 1)
    predictor = edet.Predictor(d0)
    given = fed(predictor, pictures(), json.dumps([0, 0, 0]))
    pixels = torch.from_numpy(given["images"])
    with torch.no_grad():
        *heads, _ = predictor.network([pixels, pixels])
    for name, run in runtimes(head_outputs(file)):
        counts, *found = map(torch.from_numpy, run(given)[3:])
        assert counts.all()
        assert decibels(heads, found) > 30, name


def test_a_program_of_layers_is_refused(d0, tmp_path):
    with pytest.raises(
        ValueError, match=r"format must be onnx or aoti for an int8 model, .* torch"
    ):
        edet.export(d0, tmp_path / "x.pt2", format="torch")
    assert list(tmp_path.iterdir()) == []
