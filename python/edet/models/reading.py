"""Files of weights: what they hold, read without running code, and what is none."""

from __future__ import annotations

import contextlib
import pickle
import re
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..extras import require

_LISTED = 10  # keys of each kind in a message

#: What training scripts store beside the weights: modules whose objects are read as nothing.
_BESIDE = (
    *("argparse", "collections", "copyreg", "copy_reg", "datetime", "decimal", "enum", "fractions"),
    *(
        "functools",
        "numpy",
        "pathlib",
        "re",
        "types",
        "typing",
        "uuid",
        "mmcv",
        "mmengine",
        "hydra",
    ),
    *("addict", "easydict", "lightning", "lightning_fabric", "ml_collections", "omegaconf"),
    *("pytorch_lightning", "yacs"),
)
#: Python's own classes that containers and functions of these modules are given.
_BUILTINS = frozenset(
    f"{module}.{name}"
    for module in ("builtins", "__builtin__")
    for name in (
        *("bool", "bytearray", "complex", "dict", "Ellipsis", "float", "frozenset", "int", "list"),
        *("object", "range", "set", "slice", "str", "tuple"),
    )
)
#: Losses, optimisers and schedules are not read, but stored whole where a script is careless.
_BESIDE_OF_TORCH = ("torch.nn.modules.loss.", "torch.optim.")
#: Their usual names, for files of old format, in which names cannot be looked up beforehand.
_BESIDE_NAMES = (
    *("argparse.Namespace", "numpy.dtype", "numpy.ndarray"),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath"),
    *("datetime.datetime", "datetime.timedelta"),
    *("collections.defaultdict", "collections.deque", "types.SimpleNamespace", *_BUILTINS),
)


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or a checkpoint of another model.

    Attributes:
        missing, unexpected, misshaped: the keys that do not fit, all of them.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        misshaped: Iterable[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing = list(missing)
        self.unexpected = list(unexpected)
        self.misshaped = list(misshaped)


class _Nothing(dict[Any, Any]):
    """Read in the place of an object that is no weight: takes whatever it is given, runs nothing.

    NumPy's own functions are not let do it: a data type of a wrong description is not safe.
    """

    def __new__(cls, *_: object, **__: object) -> _Nothing:
        return dict.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def __setstate__(self, _: object) -> None:
        pass


def _dict(*_: object) -> dict[Any, Any]:
    """Read in the place of a defaultdict: torch's loader fills no other kinds than dict's."""
    return {}


def _list(*_: object) -> list[Any]:
    """Read in the place of a deque."""
    return []


_FILLED = {"collections.defaultdict": _dict, "collections.deque": _list}


def _beside(file: Any) -> list[Any]:
    """The objects in a file of torch.save that are to be read as nothing, for torch's loader."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # of another format, or damaged, on which torch.load says more
        names = list(_BESIDE_NAMES)
    finally:
        file.seek(0)
    known = [x for x in names if x.split(".")[0] in _BESIDE or x.startswith(_BESIDE_OF_TORCH)]
    known += [x for x in names if x in _BUILTINS]
    return [(_FILLED.get(name, _Nothing), name) for name in known]


def _format_reason(path: Path, error: Exception) -> str:
    """What a file that torch cannot load is; torch's own words may advise to load it unsafely."""
    with contextlib.suppress(Exception):  # of files that only begin like one
        if tarfile.is_tarfile(path):
            return "it is a tar archive, torch's format before 0.1.10: unpack the checkpoint in it"
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            if any(name.endswith("constants.pkl") for name in names):
                return "it is a TorchScript program: save the state_dict() of its model"
            if not any(name.endswith("data.pkl") for name in names):
                return f"it is an archive of {listed(names)}: unpack it"
    text = str(error)
    return "torch refuses its format" if "weights_only" in text else text


#: First bytes of files that are often found in the place of a checkpoint, and what to do.
_TAKEN_FOR_ONE = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file: run git lfs pull",
    b"<!doctype html": "is a web page, not the file that was to be downloaded",
    b"<html": "is a web page, not the file that was to be downloaded",
    b"\x1f\x8b": "is compressed by gzip: unpack it",
    b"bzh": "is compressed by bzip2: unpack it",
    b"\xfd7zxz\0": "is compressed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it",
    b"7z\xbc\xaf\x27\x1c": "is compressed by 7-Zip: unpack it",
}


def _check_beginning(path: Path) -> None:
    """Checks that a file is none that is told by its beginning not to be a checkpoint.

    Raises:
        CheckpointError: it is one, or empty.
    """
    with path.open("rb") as file:
        begin = file.read(64)
    if not begin:
        raise CheckpointError(f"{path} is empty")
    for mark, words in _TAKEN_FOR_ONE.items():
        if begin.lstrip().lower().startswith(mark):
            raise CheckpointError(f"{path} {words}")
    if begin.startswith(b"{") and path.name.endswith(".index.json"):
        raise CheckpointError(f"{path} lists the parts of a checkpoint: merge them to one file")
    if re.match(rb"\s*[{\[]\s*[\"{\[\]}]", begin):
        raise CheckpointError(f"{path} is JSON, not a checkpoint")
    if begin[8:9] == b"{" and path.suffix != ".safetensors":
        raise CheckpointError(f"{path} looks like safetensors: its name must end in .safetensors")


def read_file(path: Path) -> Any:
    """All that a ``.safetensors`` file, or one of ``torch.save``, holds; no code of it is run.

    Raises:
        CheckpointError: it is damaged, of another format, or holds more than tensors and values.
    """
    _check_beginning(path)
    if path.suffix == ".safetensors":
        safetensors = require("safetensors.torch", "safetensors")
        try:
            return safetensors.load_file(path)
        except Exception as error:  # its error class is not part of its interface
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    with path.open("rb") as file, warnings.catch_warnings():
        # of files that torch.save did not write, on which the errors below say more
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        warnings.filterwarnings("ignore", message="'torch.load' received a zip file")
        try:
            # timm and effdet store the training script's arguments and figures beside the weights
            with torch.serialization.safe_globals(_beside(file)):
                return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, struct.error) as error:
            # torch's own message advises to load it unsafely
            raise CheckpointError(
                f"{path} is damaged, or holds Python objects other than tensors and is not loaded, "
                "because unpickling them can run code"
            ) from error
        except Exception as error:  # torch raises errors of any kind on damaged files
            reason = _format_reason(path, error)
            raise CheckpointError(f"{path} is not a readable checkpoint: {reason}") from error


def listed(keys: list[str]) -> str:
    """The keys for a message, not more of them than can be read."""
    more = f", … ({len(keys) - _LISTED} more)" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more
