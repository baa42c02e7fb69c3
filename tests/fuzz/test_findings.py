"""What fuzzing has found: each input that once did harm, and what becomes of it."""

import io
from dataclasses import replace

import pytest
import torch

import edet
import edet_kernels
from edet.models.checkpoints import read_checkpoint
from edet.models.reading import CheckpointError
from edet_kernels import int8
from edet_kernels.testing import samples


def test_a_storage_that_an_old_file_does_not_list(tmp_path):
    """torch raises an AssertionError, which was no CheckpointError."""
    file = io.BytesIO()
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    data = file.getvalue()
    listed = data.rindex(b"X", 0, data.rindex(b"a."))  # the last string: the storage's key
    length = int.from_bytes(data[listed + 1 : listed + 5], "little")
    key = data[listed + 5 : listed + 5 + length]
    assert key.isdigit() and data.count(key) == 2
    other = bytes([key[0] ^ 1]) + key[1:]
    (tmp_path / "old.pth").write_bytes(data[: listed + 5] + other + data[listed + 5 + length :])
    with pytest.raises(CheckpointError, match=r"old\.pth is not a readable checkpoint"):
        read_checkpoint(tmp_path / "old.pth")


ROW = '{"box": [1, 2, 3, 4], "score": 0.5, "label": 1, "name": "cat"}'


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[1, 2, 3, 4]", "[1, 2, 3]"),  # a RuntimeError
        ('"label": 1', '"label": 99999999999999999999'),  # a RuntimeError
        ('"label": 1', '"label": 1.5'),  # was cut to 1
        ('"name": "cat"', '"name": 3'),  # no name afterwards
        ("[4, 5]", '"ab"'),  # a size of letters
        (ROW, "[" * 100_000),  # a RecursionError
    ],
)
def test_json_that_is_no_detections(old, new):
    whole = f'{{"image_size": [4, 5], "detections": [{ROW}]}}'
    assert len(edet.Detections.from_json(whole)) == 1
    with pytest.raises(ValueError, match="text must be JSON as"):
        edet.Detections.from_json(whole.replace(old, new))


@pytest.mark.parametrize("dtype", [torch.ones(2), torch.int64, "float32", 1])
def test_a_dtype_that_is_none(dtype):
    """A tensor was a RuntimeError about its truth, an integer dtype ran."""
    image, vector = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.ones(2)
    with pytest.raises(TypeError, match="dtype must be a float dtype or None"):
        edet_kernels.stem(image, torch.ones(2, 3, 3, 3), vector, vector, dtype=dtype)


def test_no_channels():
    """A kernel gave an empty map, the reference torch's RuntimeError about its weight."""
    image, none = torch.zeros(1, 3, 4, 4), torch.ones(0)
    for backend in ("auto", "reference"):
        with (
            edet_kernels.backend(backend),
            pytest.raises(ValueError, match=r"scale must be \(C_out,\) with C_out at least 1"),
        ):
            edet_kernels.stem(image, torch.ones(0, 3, 3, 3), none, none)


@pytest.mark.parametrize("name", ["max_detections", "max_candidates"])
@pytest.mark.parametrize("value", [2**20 + 1, 2**31, 2**63, True])
def test_counts_beyond_what_is_held(name, value):
    """Gigabytes of empty places, or torch's RuntimeError about the operator's schema."""
    maps = [torch.zeros(1, 4, 2, 2)]
    with pytest.raises(ValueError, match=f"{name} must be an integer of 1 to 1048576"):
        edet_kernels.detect(maps, maps, torch.zeros(4, 4), **{name: value})


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_box_outputs_on_another_device(backend):
    """torch's RuntimeError from inside the reference; a kernel would have read the other memory."""
    maps = [torch.zeros(1, 4, 2, 2)]
    other = [x.to("meta") for x in maps]
    with edet_kernels.backend(backend), pytest.raises(ValueError, match="box_outputs must be on c"):
        edet_kernels.detect(maps, other, torch.zeros(4, 4))


MBCONV, TRAINING = samples.sample("mbconv"), samples.sample("training_project")
NODE, GRAPH = samples.sample("training_node"), samples.sample("bifpn")
BYTES = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
STEM = (BYTES, torch.ones(1, 27, 16), torch.ones(2), torch.ones(2))
ROWS, PACKED = torch.ones(2, 3), edet_kernels.pack_pointwise_int8(torch.ones(3, 3, 1, 1).char())


def _depthwise(*parts):
    """mbconv with other parts of its depthwise convolution."""
    expand, _, *others = MBCONV.weights
    return edet_kernels.mbconv(MBCONV.maps, expand, parts, *others)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("call", "says"),
    [
        # AttributeErrors, IndexErrors and RuntimeErrors of Python's and torch's own
        (lambda: _depthwise("none", *MBCONV.weights[1][1:]), "dw_weight of depthwise must be"),
        (lambda: _depthwise(*[torch.tensor(1.0)] * 3), r"scale must be \(C_mid,\)"),
        (lambda: replace(MBCONV, options={"stride": torch.ones(2)})(), "stride must be 1 or 2"),
        (lambda: replace(MBCONV, options={"residual": torch.ones(2)})(), "residual must be True"),
        (
            lambda: replace(TRAINING, weights=(*TRAINING.weights[:2], 3, TRAINING.weights[3]))(),
            "squeeze must be",
        ),
        (lambda: replace(TRAINING, options={"statistics": "hard"})(), "statistics must be True"),
        (
            lambda: replace(NODE, options={**NODE.options, "edge_counts": [None, 1]})(),
            r"edge_counts\[0\] must be an integer",
        ),
        (
            lambda: replace(GRAPH, options={**GRAPH.options, "outputs": [None]})(),
            "outputs must be a tuple of ids",
        ),
        (
            lambda: replace(GRAPH, options={**GRAPH.options, "nodes": [[torch.ones(0)]]})(),
            r"nodes\[0\] must be a tuple of ids",
        ),
        # True is an int of Python's, and no stride, size or count
        (lambda: replace(MBCONV, options={"stride": True})(), "stride must be 1 or 2, got True"),
        (
            lambda: replace(GRAPH, options={**GRAPH.options, "outputs": [True]})(),
            "outputs must be a tuple of ids",
        ),
        (
            lambda: edet_kernels.weighted_fusion(
                [torch.ones(1, 1, 2, 2)], fusion="sum", size=(True, 2)
            ),
            "size must be two positive integers",
        ),
        (
            lambda: edet_kernels.nms(
                torch.ones(1, 1, 4), torch.ones(1, 1), torch.ones(1, 1).long(), iou_threshold=True
            ),
            "iou_threshold must be a number, got True",
        ),
        # a size that is no number of 32 bits, which torch could not make a map of
        (
            lambda: edet_kernels.weighted_fusion(
                [torch.ones(1, 1, 2, 2)], fusion="sum", size=(2**32, 2)
            ),
            "size must be two positive integers",
        ),
        (lambda: int8.quantize(torch.ones(1, 1, 2, 2), "", 0), "inverse must be a number"),
        (lambda: int8.dequantize(BYTES, torch.ones(2), 0), "scale must be a number"),
        (lambda: int8.stem(*STEM, inverse=1.0, zero=0, mean=1, std=1), "mean must be a tensor"),
        (
            lambda: int8.stem(
                *STEM, inverse=1.0, zero=0, mean=torch.zeros(3).double(), std=torch.ones(3)
            ),
            "mean must be torch.float32",
        ),
        (
            lambda: replace(
                TRAINING,
                weights=(*TRAINING.weights[:3], torch.ones(0, TRAINING.maps.shape[1], 1, 1)),
            )(),
            r"project_weight must be .* with C_out at least 1",
        ),
        (lambda: int8.stem(*STEM[:2], 1, 1, inverse=1.0, zero=0), r"scale must be \(C_out,\)"),
        (
            lambda: int8.stem(*STEM[:2], *[torch.ones(2).double()] * 2, inverse=1.0, zero=0),
            "scale must be torch.float32",
        ),
        (lambda: int8.mbconv(BYTES, None, 1, None, 1), "depthwise must be"),
        (lambda: int8.mbconv(BYTES, None, (1, 2, 3), None, (1, 2)), "weight of depthwise must be"),
        (lambda: int8.lateral(BYTES, [PACKED], 1), "rows must be a non-empty list"),
        (lambda: int8.lateral(BYTES, [PACKED], [torch.tensor(1.0)]), r"rows must be \(2, C\)"),
    ],
)
def test_arguments_that_are_none(backend, call, says):
    with edet_kernels.backend(backend), pytest.raises((ValueError, TypeError), match=says):
        call()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_pooled_without_end(backend):
    """Took minutes and then all memory for maps of one pixel."""
    with edet_kernels.backend(backend):
        with pytest.raises(ValueError, match="pooled must be an integer of 0 to 16"):
            int8.lateral(BYTES, [PACKED], [ROWS], pooled=2**31)
        with pytest.raises(ValueError, match="pooled must be an integer of 0 to 16"):
            replace(samples.sample("lateral"), options={"pooled": 2**31})()


def _nodes(**changes):
    """Two nodes of bytes, the second a map of floats, with other options."""
    depthwise = edet_kernels.pack_depthwise_int8(torch.ones(3, 1, 3, 3).char())[None]
    layer = [torch.ones(1, 1, 3)], [depthwise], [ROWS[None]], [PACKED[None]]
    parts = [2 * x for x in layer]
    options = {"layers": [0, 1], "edges": [(0,), (1,)], "sizes": [(4, 4)] * 2, "outputs": [2]}
    rows = [torch.ones(1, 4, 3), ROWS[None]]
    return int8.nodes([BYTES], *parts, rows, **{**options, **changes})


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": [0, 2]}, r"layers\[1\] must be an integer of 0 to 1, got 2"),
        ({"layers": [0, 0]}, "layers must name layer 0 at most 1 times"),
        ({"layers": [0, [1]]}, r"layers\[1\] must be an integer"),
        ({"layers": [1, 0], "outputs": [1, 2]}, r"edges\[1\] must name maps of 3 channels of byte"),
        ({"edges": [(0,), (0, 1)]}, r"edges\[1\] must be 1 ids, got 2"),
        ({"edges": [(0,), (7,)]}, r"edges\[1\] must name inputs or earlier nodes"),
        ({"sizes": [(4, 4), (2, 2)]}, r"sizes\[1\] must be that of map 1, which is not fused"),
        ({"sizes": [(4, 4), (2**32, 2**32)]}, r"sizes\[1\] must be two positive integers"),
        ({"outputs": [1]}, "outputs must name every map of floats, 2 too"),
        ({"outputs": [2, 2]}, "outputs must be different nodes"),
    ],
)
def test_graphs_of_bytes(backend, changes, says):
    """RuntimeErrors of the kernel; the reference gave other results or an IndexError."""
    with edet_kernels.backend(backend):
        assert _nodes()[0].shape == (1, 3, 4, 4)
        with pytest.raises(ValueError, match=says):
            _nodes(**changes)


def test_moments_without_memory():
    """torch has no autocast for the device that holds shapes only."""
    mean, products = edet_kernels.training_moments(torch.ones(1, 3, 2, 2, device="meta"))
    assert mean.shape == (3,) and products.shape == (3, 3)
