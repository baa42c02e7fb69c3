"""The folder for Triton Inference Server: its form, and its model.py under a stand-in backend."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import edet
from edet.cli import app

OPTIONS = ("--image-size", "64x96", "--max-detections", "7", "--score-threshold", "0")


def run(*arguments):
    words = [str(a) for a in arguments]
    return CliRunner().invoke(app, ["triton-repository", *words], prog_name="edet")


@pytest.fixture
def folder(tmp_path):
    """The model's folder in a new repository."""
    result = run("edet_lite0_person", "-o", tmp_path / "models", "--name", "people", *OPTIONS)
    assert result.exit_code == 0, result.output
    return tmp_path / "models" / "people"


def parsed(text: str) -> dict[str, list]:
    """Text of a protocol buffer message: each field and all its values."""
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    tokens = re.findall(r'"[^"]*"|[\w.-]+|[:{}\[\],]', text)
    assert "".join(tokens) == re.sub(r'\s+(?=(?:[^"]*"[^"]*")*[^"]*$)', "", text)

    def message(end):
        found: dict[str, list] = {}
        while tokens and tokens[0] != end:
            name = tokens.pop(0)
            assert re.fullmatch("[a-z_]+", name)
            if tokens[0] == ":":
                tokens.pop(0)
            found.setdefault(name, []).extend(values())
        assert not end or tokens.pop(0) == end
        return found

    def values():
        first = tokens.pop(0)
        if first == "{":
            return [message("}")]
        if first != "[":
            return [json.loads(first) if first[0] in '"0123456789' else first]
        found = values()
        while tokens[0] == ",":
            tokens.pop(0)
            found += values()
        assert tokens.pop(0) == "]"
        return found

    return message("")


def test_the_config(folder):
    config = parsed((folder / "config.pbtxt").read_text())
    assert set(config) == {
        *("name", "backend", "max_batch_size", "input", "output", "instance_group"),
        *("dynamic_batching", "parameters"),
    }
    assert config["name"] == [folder.name] and config["backend"] == ["python"]
    assert config["max_batch_size"] == [8]
    assert config["input"] == [{"name": ["image"], "data_type": ["TYPE_STRING"], "dims": [1]}]
    assert [(o["name"][0], o["data_type"][0], o["dims"]) for o in config["output"]] == [
        ("boxes", "TYPE_FP32", [7, 4]),
        ("scores", "TYPE_FP32", [7]),
        ("labels", "TYPE_INT64", [7]),
        ("names", "TYPE_STRING", [7]),
        ("count", "TYPE_INT32", [1]),
    ]
    assert config["instance_group"] == [{"count": [1], "kind": ["KIND_CPU"]}]
    assert sorted(p.name for p in (folder / "1").iterdir()) == ["model.pt", "model.py"]


def test_the_server_would_read_the_config(folder):
    protocol = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs its client")
    text_format = pytest.importorskip("google.protobuf.text_format")
    config = text_format.Parse((folder / "config.pbtxt").read_text(), protocol.ModelConfig())
    assert config.name == folder.name and config.output[0].data_type == protocol.TYPE_FP32
    assert config.parameters["image_width"].string_value == "96"


class Tensor:
    """As in Triton's Python backend: a name and an array of the declared type."""

    def __init__(self, name, array):
        assert isinstance(array, np.ndarray)
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


@pytest.fixture
def server(folder, monkeypatch):
    """The model as the server's Python backend loads it; answers (B, 1) arrays of files."""
    triton = types.ModuleType("triton_python_backend_utils")
    triton.Tensor = Tensor
    triton.TritonError = lambda text: types.SimpleNamespace(message=lambda: text)
    triton.get_input_tensor_by_name = lambda request, name: request[name]
    triton.InferenceResponse = lambda output_tensors, error=None: types.SimpleNamespace(
        output_tensors=lambda: output_tensors, error=lambda: error
    )
    monkeypatch.setitem(sys.modules, triton.__name__, triton)
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = parsed((folder / "config.pbtxt").read_text())
    parameters = {
        p["key"][0]: {"string_value": p["value"][0]["string_value"][0]}
        for p in config["parameters"]
    }
    plain = {"max_batch_size": config["max_batch_size"][0], "parameters": parameters}
    model = module.TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps(plain),
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
            "model_repository": str(folder),
            "model_version": "1",
            "model_name": folder.name,
        }
    )
    types_of = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64, "TYPE_INT32": np.int32}
    outputs = {
        o["name"][0]: (types_of.get(o["data_type"][0], np.object_), o["dims"])
        for o in config["output"]
    }

    def answer(*requests):
        made = [
            {"image": Tensor("image", np.array(r, np.object_).reshape(-1, 1))} for r in requests
        ]
        responses = model.execute(made)
        assert len(responses) == len(requests)
        plain = []
        for request, response in zip(requests, responses, strict=True):
            if response.error() is not None:
                plain.append(response.error().message())
                continue
            tensors = {t.name(): t.as_numpy() for t in response.output_tensors()}
            assert {n: (x.dtype, list(x.shape)) for n, x in tensors.items()} == {
                name: (dtype, [len(request), *dims]) for name, (dtype, dims) in outputs.items()
            }
            plain.append(tensors)
        return plain

    return answer


def picture(seed: int, height: int, width: int, **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **({"format": "PNG"} | options))
    return file.getvalue()


def test_requests_of_a_batch_are_answered_as_a_predictor_would(server):
    turned = Image.Exif()
    turned[0x0112] = 6
    files = [
        picture(0, 60, 80),
        picture(1, 30, 90),
        picture(2, 50, 40, format="JPEG", exif=turned),
    ]
    predictor = edet.Predictor(
        "edet_lite0_person", image_size=(64, 96), max_detections=7, score_threshold=0
    )
    first, second = server(files[:1], files[1:])
    expected = predictor([Image.open(io.BytesIO(file)) for file in files])
    assert expected[2].image_size == (40, 50)
    for found, (tensors, row) in zip(expected, [(first, 0), (second, 0), (second, 1)], strict=True):
        n = int(tensors["count"][row, 0])
        assert n == len(found) > 0
        np.testing.assert_allclose(tensors["boxes"][row, :n], found.boxes, rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(tensors["scores"][row, :n], found.scores, rtol=1e-4)
        assert tensors["labels"][row, :n].tolist() == found.labels.tolist()
        assert [name.decode() for name in tensors["names"][row, :n]] == found.names
        assert not tensors["boxes"][row, n:].any() and not tensors["scores"][row, n:].any()


def test_a_broken_picture_is_an_error_of_its_request_alone(server):
    good = picture(0, 60, 80)
    first, second, third = server([good], [good, b"junk"], [good])
    assert second == "image 1 of the request: images[2] is not an image in a known format"
    assert np.array_equal(first["boxes"], third["boxes"])
    assert first["count"] > 0


def test_mistakes(folder, tmp_path):
    there = folder.parent
    before = sorted(there.rglob("*"))
    for arguments, word in [
        (("edet_lite0_person", "-o", there, "--name", "people"), "people exists"),
        (("edet_lite0_person", "-o", there, "--name", "a/b"), "--name must be letters"),
        (("tf_efficientdet_d0", "-o", there), "--checkpoint FILE is required"),
        (("none.pt", "-o", there), "none.pt"),
        (("edet_lite0_person", "-o", folder / "config.pbtxt"), "--output"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("Error: ") and word in result.stderr
    assert sorted(there.rglob("*")) == before


def test_the_package_needs_no_server():
    assert Path(sys.modules["edet"].__file__).with_name("serving.py").exists()
    from edet.serving import TritonPythonModel

    with pytest.raises(ModuleNotFoundError, match="triton_python_backend_utils"):
        TritonPythonModel().initialize({})
