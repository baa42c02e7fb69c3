"""Weights folded and packed once for the fused ops, and again when a source tensor changes.

The op calls for a shape that comes again are recorded and replayed, until then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_, itemgetter
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edet_kernels import current_backend
from edet_kernels.autocast import autocast_dtype
from edet_kernels.backend import settings
from edet_kernels.onnx import in_onnx_export

from .plan import Plan, Plans, record
from .ranges import Int8
from .sources import Sources, is_traced, layers_reason, without_inference_tensors

#: Attributes that a packed module needs for itself.
RESERVED = (
    *("pack", "packed", "repack", "freeze", "unfreeze", "fused", "check_layers", "layer_types"),
    *("_cache", "_frozen", "_freeze", "_entry", "_constants", "int8"),
)

#: Plans that a module keeps, one for each shape, dtype and backend of its inputs.
MAX_PLANS = 16


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


class Replayed:
    """Packed weights that record the op calls of their ``run``, and replay them.

    An op's Python looks at every argument, weights too, which takes as long as a small map. The
    first call of a shape runs as it is, the second is recorded, which needs more memory.
    """

    def __init__(self, weights: Any) -> None:
        self._weights = weights
        self._seen: Plans[None] = Plans(MAX_PLANS)
        #: Of each kind of inputs the plan, and what makes of its list of maps what ``run`` returns.
        self.plans: Plans[tuple[Plan, Callable[[list[Tensor]], Any]]] = Plans(MAX_PLANS)

    def run(self, maps: Tensor | Sequence[Tensor], dtype: torch.dtype, *more: Tensor) -> Any:
        """What the weights' ``run`` makes of one map or of several."""
        inputs = [maps, *more] if isinstance(maps, Tensor) else [*maps, *more]
        grad = torch.is_grad_enabled()
        if (
            torch._C._len_torch_dispatch_stack()  # calls are recorded or counted by another
            or not all(type(x) is Tensor and x.layout is torch.strided for x in inputs)
            or (grad and any(x.requires_grad for x in inputs))
        ):
            return self._weights.run(maps, dtype, *more)
        key = (
            settings(),
            grad,
            torch.is_inference_mode_enabled(),
            autocast_dtype(inputs[0]),
            dtype,
            *((x.shape, x.dtype, x.device) for x in inputs),
        )
        known, planned = self.plans.find(key)
        if planned is not None:
            plan, finish = planned
            return finish(plan(inputs))
        if known or not self._seen.find(key)[0]:
            self._seen.keep(key, None)
            return self._weights.run(maps, dtype, *more)
        return self._record(key, inputs, functools.partial(self._weights.run, maps, dtype, *more))

    def _record(self, key: Hashable, inputs: list[Tensor], forward: Callable[[], Any]) -> Any:
        results: list[Any] = []

        def maps() -> Sequence[Tensor]:
            results.append(forward())
            found = results[0]
            known = type(found) in (list, tuple) and all(isinstance(x, Tensor) for x in found)
            return cast("Sequence[Tensor]", found) if known else [found]

        _, plan = record(maps, inputs)
        kind = type(results[0])
        finish = kind if kind in (list, tuple) else itemgetter(0)
        self.plans.keep(key, None if plan.refusal else (plan, finish))
        return results[0]


class _Entry(NamedTuple):
    """What a module's sources were packed to, for maps of one dtype."""

    sources: Sources
    reason: str  # why its layers run; else ""
    dtype: torch.dtype | None = None
    weights: Any = None

    def runs_layers(self) -> bool:
        return bool(self.reason) or self.sources.runs_python()


class _Cache:
    """The packed weights of one module; a copy or a pickle of it is empty."""

    def __init__(self) -> None:
        # one attribute, so that threads sharing a module see sources, dtype and weights that match
        self.entry: _Entry | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Cache:
        return _Cache()

    def __reduce__(self) -> tuple[type[_Cache], tuple[()]]:
        return _Cache, ()


_Module = TypeVar("_Module", bound="PackedModule")


class _Frozen(NamedTuple):
    """That a module is frozen, and the parameters that had a gradient before.

    ``looks``: changed weights are looked for, as where a predictor froze the module by itself.
    """

    trained: list[nn.Parameter]
    looks: bool


def _exports_layers() -> bool:
    """Whether torch.export is to record PyTorch's operations and not the fused ones."""
    return current_backend() in ("auto", "reference")


# what it reads, a ContextVar, cannot be traced
_exports_layers._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _has_fixed_height_and_width(_: int) -> bool:
    """True; what the strict exporter makes of its argument is a number, so that it refuses others.

    To it a dynamic size looks like an integer.
    """
    return True


_has_fixed_height_and_width._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_exported_size(name: str, x: Tensor) -> None:
    """Checks that the height and width of ``x`` are numbers where torch.export records layers.

    Raises:
        ValueError: they are dynamic. The layers decide by sizes how to resize and pad, so that the
            exporter would solve equations for minutes and make a program for one size.
    """
    if not torch.compiler.is_exporting() or not _exports_layers():
        return
    if any(isinstance(n, torch.SymInt) or not _has_fixed_height_and_width(n) for n in x.shape[-2:]):
        raise ValueError(
            f"{name} must have a fixed height and width in torch.export, got dynamic ones: export "
            "one program for each size (the number of images may be dynamic)"
        )


class PackedModule(nn.Module):
    """A module with two ways to compute the same: differentiable layers, and fused ops.

    :meth:`packed` gives a subclass' ``forward`` the weights for the fused ops, or None when the
    differentiable layers must run: also when one of them has a forward hook, is parametrised or
    pruned, or was exchanged for another kind. The weights are packed when first used and again when
    any parameter, buffer or submodule below was written to, replaced or moved, a number, word or
    function that is an attribute of a layer changed, and when ``train()`` or ``eval()`` change the
    mode. What cannot be seen from Python are other writes through
    ``parameter.data`` or a NumPy view: call :meth:`repack` after them.
    """

    _frozen: _Frozen | None = None
    _constants: tuple[Any, torch.dtype] | None = None
    #: How the fused ops compute on bytes; None: on floats. Call :meth:`repack` after a change.
    int8: Int8 | None = None
    #: Classes of the layers that the fused ops stand for; None: any.
    layer_types: frozenset[type] | None = None
    #: False: PyTorch's own layers always run, as for a benchmark's baseline.
    fused: bool = True

    def __init__(self) -> None:
        super().__init__()
        self._cache = _Cache()

    def check_layers(self) -> None:
        """Checks that the fused ops compute what the layers do.

        Raises:
            ValueError: they do not; the message names the layer.
        """

    def pack(self, dtype: torch.dtype) -> Any:
        """The weights for maps of ``dtype``, by tensor operations that can be compiled."""
        raise NotImplementedError

    def repack(self) -> None:
        """Packs the weights anew at the next use."""
        self._cache.entry = None
        if self._frozen is not None:  # anew, for a predictor that replays calls on the old weights
            self._frozen = _Frozen(*self._frozen)

    def freeze(self) -> None:
        """Makes the weights constants: they are packed once, their values not looked at any more.

        Switches to eval mode and to parameters without gradients. Undone by :meth:`unfreeze` and by
        ``train()``, ``.to()`` and ``load_state_dict()`` of this module or one that holds it. Any
        other write to a weight is not seen until :meth:`repack` or until it is frozen again;
        exchanged layers and tensors are. A copy is frozen too.
        """
        self._freeze(looks=False)

    def _freeze(self, looks: bool) -> None:
        self.unfreeze()
        self.eval()
        self._frozen = _Frozen([p for p in self.parameters() if p.requires_grad], looks)
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
        if mode != self.training:  # an average may be copied in through `.data` between the two
            self._cache.entry = None
        return super().train(mode)

    def _apply(self: _Module, *args: Any, **kwargs: Any) -> _Module:
        self.unfreeze()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unfreeze()
        super()._load_from_state_dict(*args, **kwargs)

    def packed(self, x: Tensor) -> tuple[Any, torch.dtype] | None:
        """The packed weights and the dtype to compute in for the input ``x``.

        None, for the differentiable layers, in training mode, when a gradient is needed, where the
        layers are no longer those that the ops stand for, in torch.jit.trace, in torch.func and in
        forward-mode derivatives, and in torch.export, whose graphs are to hold PyTorch's own
        operations unless a backend with kernels is asked for by name. torch.compile and
        torch.export pack inside their graph, so that the weights stay inputs of it; inside
        :func:`constant_weights` they are packed already.
        """
        if not self.fused or self.training:
            return None
        if torch.compiler.is_exporting() and _exports_layers():
            # the ops on bytes have a form in ONNX, of constants
            return self._constants if self.int8 is not None and in_onnx_export() else None
        if torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        ):
            return None
        dtype = autocast_dtype(x) or x.dtype
        if torch.compiler.is_compiling():
            if self._constants is not None and self._constants[1] == dtype:
                return self._constants
            training = any(m.training for m in self.modules() if isinstance(m, _BatchNorm))
            layers = training or layers_reason(self) or is_traced()
            return None if layers else (self.pack(dtype), dtype)
        if is_traced():
            return None
        entry = self._entry()
        if entry.runs_layers():
            return None
        if entry.weights is None or entry.dtype != dtype:
            entry = entry._replace(dtype=dtype, weights=Replayed(self.pack(dtype)))
            self._cache.entry = entry
        return entry.weights, dtype

    def _entry(self) -> _Entry:
        """What is known of the sources as they are, or were when they became constants."""
        entry, frozen = self._cache.entry, self._frozen
        if entry is not None:
            if frozen is None:
                same = entry.sources.unchanged(self)
            elif frozen.looks:
                same = not entry.sources.changed(self)
            else:
                same = not entry.sources.exchanged(self)
            if same:
                return entry
            self.repack()
        entry = _Entry(Sources(self), layers_reason(self, hooks=False))
        self._cache.entry = entry
        return entry


@contextmanager
def constant_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Graphs of torch.export that are made inside hold the packed weights of ``model``.

    Without it they hold the weights as they are and the operations that pack them, which a compiler
    takes long over.

    Args:
        dtype: that the model computes in.
    """
    parts = [m for m in model.modules() if isinstance(m, PackedModule) and not layers_reason(m)]
    try:
        with torch.no_grad():
            for part in parts:
                part._constants = (part.pack(dtype), dtype)
        yield
    finally:
        for part in parts:
            vars(part).pop("_constants", None)


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


class FrozenModel:
    """A model whose weights a predictor takes for constants, as long as they are the same.

    Args:
        model: is frozen, anew if it is already: whatever was written to its weights is seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._freeze()

    def _freeze(self) -> None:
        without_inference_tensors(self.model)
        self._parts = [m for m in self.model.modules() if isinstance(m, PackedModule)]
        for part in self._parts:
            part._freeze(looks=part._frozen is None or part._frozen.looks)
        self._record()

    def _record(self) -> None:
        self._frozen = [part._frozen for part in self._parts]
        self._fused = [part.fused for part in self._parts]
        self._sources = Sources(self.model, hooked=list(self.model.modules()))

    def stale(self) -> bool:
        """Whether the model is another one than when it was frozen.

        Writes through ``parameter.data`` or a NumPy view cannot be seen.
        """
        return (
            not all(map(is_, (part._frozen for part in self._parts), self._frozen))
            or self._fused != [part.fused for part in self._parts]
            or self._sources.changed(self.model)
        )

    def renew(self) -> None:
        """Freezes the model again, unless another predictor has just done so."""
        if self._sources.changed(self.model) or any(part._frozen is None for part in self._parts):
            self._freeze()
        else:
            self._record()

    def runs_python(self) -> bool:
        """Whether no call can be replayed, see :meth:`Sources.runs_python`."""
        return self._sources.runs_python()
