"""Quantised detectors in ONNX: the bytes of every op, and the detections, against our own."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import edet
import edet_kernels
from edet_kernels import int8
from exported_calls import inputs, pictures
from tests.detection.test_quantize import detector, images

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

# exporters warn about themselves
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Call(NamedTuple):
    """A call of an op on bytes: the maps that it reads, what it does with them, and its results."""

    op: str
    maps: list[Tensor]
    run: Callable[[list[Tensor]], list[Tensor]]
    results: list[Tensor]


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


@contextmanager
def recording() -> Iterator[list[Call]]:
    """The calls that are made of the ops on bytes; of nodes, every one's map is a result."""
    calls: list[Call] = []

    def called(op: str, original: Callable[..., Any], first: Any, *args: Any, **given: Any) -> Any:
        single = isinstance(first, Tensor)
        every = dict(given)
        if op == "nodes":
            every["outputs"] = range(len(first), len(first) + len(given["layers"]))

        def run(maps: list[Tensor]) -> list[Tensor]:
            found = original(maps[0] if single else maps, *args, **every)
            return [found] if isinstance(found, Tensor) else found

        maps = [first] if single else list(first)
        calls.append(Call(op, maps, run, run(maps)))
        return original(first, *args, **given)

    with pytest.MonkeyPatch.context() as patch, edet_kernels.backend("reference"):
        for op in ("quantize", "dequantize", "stem", "mbconv", "lateral", "nodes"):
            patch.setattr(int8, op, functools.partial(called, op, getattr(int8, op)))
        yield calls


def session(path: Path, *, optimised: bool) -> Any:
    options = runtime.SessionOptions()
    # without VNNI, kernels of unsigned and signed bytes saturate unless they are told not to
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimised:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def person() -> edet.EfficientDet:
    model = edet.create_model("edet_lite0_person").eval()
    return edet.quantize(model, pictures(), image_size=(128, 160))


@pytest.fixture(scope="module")
def d0() -> edet.EfficientDet:
    return edet.quantize(detector(), images())


def calls_of(model: edet.EfficientDet, image_size: tuple[int, int]) -> list[Call]:
    predictor = edet.Predictor(model, image_size=image_size)
    with recording() as calls, torch.no_grad():
        pixels = inputs(pictures()[:2], image_size, (0, 0, 0))["images"]
        predictor.network([pixels, pixels])
    return calls


def exported_calls(calls: list[Call], path: Path) -> None:
    maps = [x for call in calls for x in call.maps]
    with torch.no_grad():
        program = torch.onnx.export(Calls(calls).eval(), (maps,), dynamo=True, verbose=False)
    assert program is not None
    program.save(path)


@pytest.mark.parametrize("name", ["person", "d0"])
def test_every_op_gives_our_bytes(name, request, tmp_path):
    model, size = request.getfixturevalue(name), (128, 160) if name == "person" else (64, 64)
    calls = calls_of(model, size)
    assert Counter(call.op for call in calls)["mbconv"] == 16
    path = tmp_path / "calls.onnx"
    exported_calls(calls, path)
    for optimised in (False, True):
        opened = session(path, optimised=optimised)
        maps = [x.numpy() for call in calls for x in call.maps]
        given = dict(zip((x.name for x in opened.get_inputs()), maps, strict=True))
        found = iter(opened.run(None, given))
        for call in calls:
            for i, x in enumerate(call.results):
                y = torch.from_numpy(next(found))
                assert (y.dtype, y.shape) == (x.dtype, x.shape)
                d = (x.float() - y.float()).abs()
                print(
                    optimised, call.op, i, str(x.dtype)[6:], tuple(x.shape), float(d.max()),
                    round(float((d > 0).float().mean()), 4), float(x.float().std()),
                )  # fmt: skip
        assert next(found, None) is None
