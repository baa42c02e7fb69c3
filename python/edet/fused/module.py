"""Weights folded and packed once for the fused ops, and again when a source tensor changes.

A module that is frozen does not look any more and replays its op calls.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import register_optimizer_step_post_hook

from edet_kernels import current_backend
from edet_kernels.autocast import autocast_dtype

from .plan import Plan, Plans, record

#: Attributes that a packed module needs for itself.
RESERVED = ("pack", "packed", "repack", "freeze", "unfreeze", "fused", "frozen_since", "_cache",
            "_frozen")  # fmt: skip

#: Plans that a frozen module keeps, one for each shape, dtype and backend of its inputs.
MAX_PLANS = 16

_version = attrgetter("_version")
_training = attrgetter("training")
_optimizer_steps = 0


def _count_optimizer_step(*_: object) -> None:
    # Fused optimizers write to parameters without raising their version. Compiled ones raise it,
    # and would be compiled again at every step if they saw this counter.
    global _optimizer_steps
    if not torch.compiler.is_compiling():
        _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def fold_batch_norm(bn: nn.BatchNorm2d, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and shift, (C,) float64, of a convolution's ``bias`` and a batch norm in eval mode.

    γ/√(σ²+ε) and β + (bias − μ)·scale (Ioffe & Szegedy 2015, algorithm 2).
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("bn must track running statistics, got one without")
    scale = bn.weight.double() * torch.rsqrt(bn.running_var.double() + bn.eps)
    mean = bn.running_mean.double()
    centred = -mean if bias is None else bias.double() - mean
    return scale, bn.bias.double() + centred * scale


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of packed weights for maps of ``dtype``: float32, or float64 (reference only)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Sources:
    """Every parameter, buffer and child below a module, and whether any has changed since.

    Written for speed, because it is asked before every call: the loops are C's.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self.owner = weakref.ref(module)
        self.tables: list[dict[str, Any]] = [
            table for m in modules for table in (m._parameters, m._buffers, m._modules) if table
        ]
        self.contents = [dict(table) for table in self.tables]
        entries = [(table, key, table[key]) for table in self.tables for key in table]
        self.tensors = [value for _, _, value in entries if isinstance(value, Tensor)]
        # while these are kept, no new tensor can be given the address of one
        self.storages = [t.detach() for t in self.tensors]
        # two tensors of one element can be equal without being the same
        self.scalars = [e for e in entries if isinstance(e[2], Tensor) and e[2].numel() == 1]
        self.norms = [m for m in modules if isinstance(m, _BatchNorm)]
        self.optimizer_steps = _optimizer_steps
        try:
            self.state: tuple[list[int], list[int]] | None = self._state()
        except RuntimeError:  # inference tensors have no version, wrapped ones no address
            self.state = None

    def _state(self) -> tuple[list[int], list[int]]:
        # An in-place write raises the version; `p.data = q`, and so `.to()`, moves the address.
        # The batch norms' running statistics change unversioned, but with num_batches_tracked.
        return list(map(_version, self.tensors)), list(map(Tensor.data_ptr, self.tensors))

    def _same_objects(self) -> bool:
        try:
            same = self.tables == self.contents  # compares identities first
        except RuntimeError:  # and then finds that two tensors have no one truth value
            return False
        return same and all(table[key] is value for table, key, value in self.scalars)

    def unchanged(self, module: nn.Module) -> bool:
        return (
            self.state is not None
            and self.owner() is module
            and self.optimizer_steps == _optimizer_steps
            and self._same_objects()
            and self._state() == self.state
        )


class _Cache:
    """The packed weights of one module; a copy or a pickle of it is empty."""

    def __init__(self) -> None:
        # one attribute, so that threads sharing a module see sources, dtype and weights that match
        self.entry: tuple[_Sources, torch.dtype, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Cache:
        return _Cache()

    def __reduce__(self) -> tuple[type[_Cache], tuple[()]]:
        return _Cache, ()


_Module = TypeVar("_Module", bound="PackedModule")


class _Frozen:
    """The plans of a frozen module, and the parameters that had a gradient before."""

    def __init__(self, trained: list[nn.Parameter]) -> None:
        self.trained = trained
        self.plans: Plans[Plan] = Plans(MAX_PLANS)

    def __getstate__(self) -> dict[str, Any]:
        return {"trained": self.trained}  # a copy records its own plans

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def run(self, forward: Callable[[], Sequence[Tensor]], inputs: list[Tensor]) -> list[Tensor]:
        """``forward()``, which computes from ``inputs``: replayed when it was seen before."""
        grad = torch.is_grad_enabled()
        if grad and any(x.requires_grad for x in inputs):
            return list(forward())
        key = (
            current_backend(),
            grad,
            torch.is_inference_mode_enabled(),
            autocast_dtype(inputs[0]),
            *((x.shape, x.dtype, x.device) for x in inputs),
        )
        known, plan = self.plans.find(key)
        if known:
            return list(forward()) if plan is None else plan(inputs)
        forward()  # packs the weights, which are constants of the plan
        outputs, recorded = record(forward, inputs)
        self.plans.keep(key, None if recorded.refusal else recorded)
        return outputs

    def forget(self) -> None:
        """Drops the plans, whose weights are out of date."""
        self.plans.clear()


def planned(forward: Callable[[_Module, Any], list[Tensor]]) -> Any:
    """Decorates the ``forward`` of a :class:`PackedModule`: once frozen, its op calls are replayed.

    ``forward`` takes one map or a list of maps and returns a list of maps.
    """

    @functools.wraps(forward)
    def wrapper(self: _Module, maps: Any) -> list[Tensor]:
        frozen = self._frozen
        inputs = [maps] if isinstance(maps, Tensor) else maps
        if (
            frozen is None
            or not self.fused
            or torch.compiler.is_compiling()
            or torch.compiler.is_exporting()
            or not isinstance(inputs, (list, tuple))
            or not inputs
            or not all(isinstance(x, Tensor) for x in inputs)
        ):
            return forward(self, maps)
        return frozen.run(lambda: forward(self, maps), list(inputs))

    return wrapper


def _exports_layers() -> bool:
    """Whether torch.export is to record PyTorch's operations and not the fused ones."""
    return current_backend() in ("auto", "reference")


# what it reads, a ContextVar, cannot be traced
_exports_layers._dynamo_marked_constant = True  # type: ignore[attr-defined]


class PackedModule(nn.Module):
    """A module with two ways to compute the same: differentiable layers, and fused ops.

    :meth:`packed` gives a subclass' ``forward`` the weights for the fused ops, or None when the
    differentiable layers must run. The weights are packed when first used and again when any
    parameter, buffer or submodule below was written to, replaced or moved. Two things cannot be
    seen from Python: writes through ``parameter.data`` or a NumPy view (call :meth:`repack` after
    them), and that a submodule has forward hooks (they run with the differentiable layers only).
    """

    _frozen: _Frozen | None = None
    #: False: PyTorch's own layers always run, as for a benchmark's baseline.
    fused: bool = True

    def __init__(self) -> None:
        super().__init__()
        self._cache = _Cache()

    @property
    def frozen_since(self) -> object | None:
        """Another object for every :meth:`freeze`; None while the module is not frozen."""
        return self._frozen

    def pack(self, dtype: torch.dtype) -> Any:
        """The weights for maps of ``dtype``, by tensor operations that can be compiled."""
        raise NotImplementedError

    def repack(self) -> None:
        """Packs the weights anew at the next use."""
        self._cache.entry = None
        if self._frozen is not None:
            self._frozen.forget()

    def freeze(self) -> None:
        """Makes the weights constants: they are packed once and not looked at any more.

        Switches to eval mode and to parameters without gradients; the op calls for each shape of
        the inputs are recorded and replayed. Undone by :meth:`unfreeze` and by ``train()``,
        ``.to()`` and ``load_state_dict()`` of this module or one that holds it. Any other write to
        a weight is not seen until :meth:`repack`, nor are the weights of
        ``torch.func.functional_call``. A copy is frozen too.
        """
        self.unfreeze()
        self.eval()
        self._frozen = _Frozen([p for p in self.parameters() if p.requires_grad])
        self.requires_grad_(False)
        self.repack()

    def unfreeze(self) -> None:
        """Undoes :meth:`freeze`, except for the eval mode."""
        if self._frozen is not None:
            for p in self._frozen.trained:
                p.requires_grad_(True)
            self._frozen = None

    def train(self: _Module, mode: bool = True) -> _Module:
        if mode:
            self.unfreeze()
        return super().train(mode)

    def _apply(self: _Module, *args: Any, **kwargs: Any) -> _Module:
        self.unfreeze()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unfreeze()
        super()._load_from_state_dict(*args, **kwargs)

    def packed(self, x: Tensor) -> tuple[Any, torch.dtype] | None:
        """The packed weights and the dtype to compute in for the input ``x``.

        None, for the differentiable layers, in training mode, when a gradient is needed, and in
        torch.export, whose graphs are to hold PyTorch's own operations unless a backend with
        kernels is asked for by name. torch.compile and torch.export pack inside their graph, so
        that the weights stay inputs of it.
        """
        if not self.fused or self.training or (torch.compiler.is_exporting() and _exports_layers()):
            return None
        if torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        ):
            return None
        dtype = autocast_dtype(x) or x.dtype
        if torch.compiler.is_compiling():
            training = any(m.training for m in self.modules() if isinstance(m, _BatchNorm))
            return None if training else (self.pack(dtype), dtype)
        entry = self._cache.entry
        frozen = entry is not None and self._frozen is not None
        if entry is None or not (frozen or entry[0].unchanged(self)):
            entry = _Sources(self), dtype, None
        sources, packed_dtype, weights = entry
        if any(map(_training, sources.norms)):
            return None
        if weights is None or packed_dtype != dtype:
            weights = self.pack(dtype)
            self._cache.entry = sources, dtype, weights
        return weights, dtype


def adopt(module: nn.Module, packed_class: type[PackedModule]) -> None:
    """Changes the class of ``module`` to one derived from it and :class:`PackedModule`."""
    module.__class__ = packed_class
    cast(PackedModule, module)._cache = _Cache()


def release(module: PackedModule, original_class: type[nn.Module]) -> None:
    """Undoes :func:`adopt`."""
    module.unfreeze()
    del module._cache
    vars(module).pop("_frozen", None)
    module.__class__ = original_class  # type: ignore[assignment]
