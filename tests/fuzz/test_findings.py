"""What fuzzing has found: each input that once did harm, and what becomes of it."""

import io

import pytest
import torch

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
