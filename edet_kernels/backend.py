"""Which implementation an op runs: automatic, by ``EDET_BACKEND`` or by a context manager."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import library
from .names import OPS, TF32_OPS, TRITON_OPS

#: Names accepted by :func:`backend` and by the environment variable ``EDET_BACKEND``.
BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")

#: Map dtypes the compiled kernels take; the reference takes any float dtype.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: The compute capability that Triton's compiler asks for.
_TRITON_CAPABILITY = (8, 0)

#: The first one with TF32 tensor cores.
_TF32_CAPABILITY = (8, 0)

_log = logging.getLogger(__name__)
_told: set[tuple[str, str]] = set()
_override: ContextVar[str | None] = ContextVar("edet_backend", default=None)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run the op."""


@dataclass(frozen=True)
class Choice:
    """The backend an op will use and the reason."""

    op: str
    backend: str
    reason: str


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def current_backend() -> str:
    """What is asked for: the innermost ``with backend(…)``, else ``EDET_BACKEND``, else auto."""
    override = _override.get()
    if override is not None:
        return override
    return _check_name(os.environ.get("EDET_BACKEND", "auto"), "EDET_BACKEND")


def settings() -> tuple[str, str]:
    """What decides beside its maps which kernel an op runs: whoever records calls must ask for it.

    That is the backend that is asked for, and whether CUDA may multiply float32 as TF32.
    """
    return current_backend(), torch.backends.cuda.matmul.fp32_precision


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs ops on the backend ``name`` inside the ``with`` block.

    Args:
        name: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``. Any name but ``auto`` is a
            request that is met or refused, never replaced. A graph of torch.compile keeps the
            backend that it was traced with.

    Raises:
        ValueError: unknown name.
    """
    token = _override.set(_check_name(name, "backend"))
    try:
        yield
    finally:
        _override.reset(token)


def has_kernel(op: str, device_type: str, namespace: str = "edet_kernels") -> bool:
    """Whether ``torch.ops`` holds the operator, forward or backward, for the device."""
    name = f"{namespace}::{op}"
    return torch._C._dispatch_has_kernel(name) and torch._C._dispatch_has_kernel_for_dispatch_key(
        name, device_type.upper()
    )


@functools.cache
def _load_triton() -> str:
    """Imports the Triton kernels, which registers their operators; why it cannot, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install 'edet-kernels[triton]'"
    try:
        importlib.import_module(f"{__package__}.triton")
    except Exception as error:  # Triton is imported with it, and may be broken in any way
        return f"Triton cannot be used: {error}"
    return ""


def _triton_refusal(op: str, device_type: str) -> str:
    """Why there is no Triton kernel to run ``op`` on a device; empty when there is one."""
    if op not in TRITON_OPS:
        return "there is no Triton kernel for it"
    if device_type not in ("cpu", "cuda"):
        return f"the tensors are on {device_type}"
    problem = _load_triton()
    if problem:
        return problem
    if device_type == "cpu":
        if has_kernel(op, "cpu", "edet_kernels_triton"):  # registered where it is interpreted
            return ""
        return (
            "the tensors are on cpu, where only Triton's interpreter runs: set TRITON_INTERPRET=1 "
            "before Python starts"
        )
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < _TRITON_CAPABILITY:
        return "Triton needs compute capability 8.0, this GPU has {}.{}".format(*capability)
    return ""


def triton_serves(op: str) -> bool:
    """Whether ``op`` can run on Triton on this machine's GPU, its kernels imported."""
    return not _triton_refusal(op, "cuda")


@functools.cache
def _refusal(op: str, name: str, device_type: str, dtype: torch.dtype) -> str:
    """Why the backend ``name`` cannot run ``op``; empty when it can."""
    if name == "triton":
        refusal = _triton_refusal(op, device_type)
        if refusal:
            return refusal
    elif device_type != name:
        return f"the tensors are on {device_type}"
    if dtype not in KERNEL_DTYPES:
        return f"its maps are float32, float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if name == "triton":
        return ""
    if not library.load():
        return library.status()
    if name == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no CUDA GPU"
        refusal = library.cuda_refusal(torch.cuda.get_device_capability())
        if refusal:
            return refusal
    if not library.has_op(op):
        return "the library is older than this package and lacks it: run 'make build'"
    if not has_kernel(op, name):
        return f"the library was built without a {name.upper()} kernel for it"
    return ""


@functools.cache
def _has_tf32(op: str) -> bool:
    """Whether the library and the GPU can multiply floats as TF32 in ``op``."""
    return (
        op in TF32_OPS
        and torch.cuda.get_device_capability() >= _TF32_CAPABILITY
        and has_kernel(op, "cuda", "edet_kernels_tf32")
    )


def _multiplies_tf32(op: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether the CUDA kernel of ``op`` multiplies maps of ``dtype`` as TF32.

    As torch's own matrix products do, it follows ``torch.backends.cuda.matmul.fp32_precision``,
    which ``allow_tf32`` and ``torch.set_float32_matmul_precision`` set too.
    """
    return (
        device_type == "cuda"
        and dtype == torch.float32
        and torch.backends.cuda.matmul.fp32_precision == "tf32"
        and _has_tf32(op)
    )


def _precision(op: str, name: str, dtype: torch.dtype) -> str:
    """What a :class:`Choice` of the backend ``name`` adds to its reason."""
    return "; TF32 products" if _multiplies_tf32(op, name, dtype) else ""


def choose(op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Choice:
    """The backend ``op`` runs on for maps of ``dtype`` on ``device``, and why.

    Raises:
        BackendError: a backend was asked for by name and cannot run the op.
    """
    asked = current_backend()
    if asked == "reference":
        return Choice(op, "reference", "asked for")
    if asked != "auto":
        refusal = _refusal(op, asked, device.type, dtype)
        if refusal:
            raise BackendError(f"{op} cannot run on backend {asked!r}: {refusal}")
        return Choice(op, asked, "asked for" + _precision(op, asked, dtype))
    if device.type not in ("cpu", "cuda"):
        return Choice(op, "reference", f"no kernels for device type {device.type}")
    refusal = _refusal(op, device.type, device.type, dtype)
    if refusal and device.type == "cuda":
        triton_refusal = _refusal(op, "triton", device.type, dtype)
        if not triton_refusal:
            return Choice(op, "triton", f"Triton kernel; no compiled one: {refusal}")
        if triton_refusal != refusal:
            refusal = f"{refusal}; Triton: {triton_refusal}"
    if refusal:
        if (op, refusal) not in _told:
            _told.add((op, refusal))
            _log.debug("%s runs its reference: %s", op, refusal)
        return Choice(op, "reference", refusal)
    reason = f"compiled {device.type.upper()} kernel" + _precision(op, device.type, dtype)
    return Choice(op, device.type, reason)


_warned = False


def _warn_of_missing_library(op: str, device_type: str, dtype: torch.dtype) -> None:
    """Warns once, at the first op that would run a kernel if the library had it."""
    global _warned
    if _warned or current_backend() != "auto" or dtype not in KERNEL_DTYPES:
        return
    reason = library.missing(op) if device_type in ("cpu", "cuda") else ""
    if reason:
        _warned = True
        warnings.warn(
            f"edet_kernels runs its reference, several times slower than its kernels: {reason}. "
            "EDET_BACKEND=reference asks for it without this warning",
            RuntimeWarning,
            stacklevel=4,
        )


def _reference_when_traced(op: str, device: str, dtype: torch.dtype) -> bool:
    """The choice while torch.compile traces, which cannot look into a ContextVar."""
    reference = choose(op, torch.device(device), dtype).backend == "reference"
    if reference:
        _warn_of_missing_library(op, device, dtype)
    return reference


# torch.compiler.assume_constant_result does just this, after two seconds of importing the compiler
_reference_when_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode derivatives have to see PyTorch's own operations.

    A kernel has neither a batching rule nor a tangent: where gradients are off, its results would
    have the tangent zero.
    """
    level = torch._C._functorch.maybe_current_level()
    return level is not None or forward_ad._current_level >= 0


is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _reference_when_transformed(op: str) -> bool:
    asked = current_backend()
    if asked not in ("auto", "reference"):
        raise BackendError(
            f"{op} cannot run on backend {asked!r}: kernels have no rules for torch.func and for "
            "forward-mode derivatives"
        )
    return True


_reference_when_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def runs_reference(op: str, tensors: Sequence[Tensor | None]) -> bool:
    """Whether ``op`` on these tensors (the first one a map) runs its reference.

    Raises:
        BackendError: a backend was asked for by name and cannot run the op.
    """
    x = tensors[0]
    assert x is not None
    device = x.device.type
    if is_transformed():
        return _reference_when_transformed(op)
    if torch.compiler.is_compiling():
        return _reference_when_traced(op, device, x.dtype)
    if (
        current_backend() == "auto"
        and device in ("cpu", "cuda")
        and not _refusal(op, device, device, x.dtype)
    ):
        return False  # the common case, without the cost of a Choice
    reference = choose(op, x.device, x.dtype).backend == "reference"
    if reference:
        _warn_of_missing_library(op, device, x.dtype)
    return reference


def _namespace(op: str, device_type: str, dtype: torch.dtype) -> str:
    """:func:`namespace`, a constant for torch.compile like :func:`_reference_when_traced`."""
    asked = current_backend()
    if (
        asked == "auto"
        and device_type == "cuda"
        and op in TRITON_OPS  # the others have a compiled kernel or none, whatever is on their map
        and _refusal(op, "cuda", "cuda", dtype)
    ):
        asked = "triton"
    if asked == "triton":
        return "edet_kernels_triton"
    return "edet_kernels_tf32" if _multiplies_tf32(op, device_type, dtype) else "edet_kernels"


_namespace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def namespace(op: str, x: Tensor) -> str:
    """Where in ``torch.ops`` the operator is that runs ``op`` on ``x``, if not its reference."""
    return _namespace(op, x.device.type, x.dtype)


def explain(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> list[Choice]:
    """For each op, the backend it would use on ``device``, and why."""
    return [choose(op, torch.device(device), dtype) for op in OPS]
