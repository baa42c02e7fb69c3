"""What fuzzing has found: each input that once did harm, and what becomes of it."""

import io

import pytest
import torch

import edet
import edet_kernels
from edet.models.checkpoints import CheckpointError, read_checkpoint


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
@pytest.mark.parametrize("value", [2**31, 2**63])
def test_counts_beyond_what_is_held(name, value):
    """torch's RuntimeError about the operator's schema."""
    maps = [torch.zeros(1, 4, 2, 2)]
    with pytest.raises(ValueError, match=f"{name} must be a positive integer below"):
        edet_kernels.detect(maps, maps, torch.zeros(4, 4), **{name: value})


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_box_outputs_on_another_device(backend):
    """torch's RuntimeError from inside the reference; a kernel would have read the other memory."""
    maps = [torch.zeros(1, 4, 2, 2)]
    other = [x.to("meta") for x in maps]
    with edet_kernels.backend(backend), pytest.raises(ValueError, match="box_outputs must be on c"):
        edet_kernels.detect(maps, other, torch.zeros(4, 4))
