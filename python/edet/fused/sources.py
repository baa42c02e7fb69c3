"""What a module computes from: whether it has changed, and whether only its layers can compute it.

A fused op runs none of the Python of the layers that it stands for, and it keeps what was made of
their weights. So everything that such a layer's result depends on is looked at here.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

from edet_kernels.backend import is_transformed

_version = attrgetter("_version")
_training = attrgetter("training")
_eps = attrgetter("eps")
_MODULES_OWN = frozenset(vars(nn.Module())) | {"_cache", "_frozen", "_constants", "int8"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_geometry = itemgetter("stride", "padding", "dilation", "groups", "padding_mode")
_optimizer_steps = 0


def _count_optimizer_step(*_: object) -> None:
    # Fused optimizers write to parameters without raising their version. Compiled ones raise it,
    # and would be compiled again at every step if they saw this counter.
    global _optimizer_steps
    if not torch.compiler.is_compiling():
        _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def is_traced() -> bool:
    """Whether PyTorch's own operations are to be seen.

    So it is in torch.jit.trace, which cannot record the fused ops' lists, in torch.func and in
    forward-mode derivatives, which know nothing of these ops.
    """
    return bool(torch.jit.is_tracing()) or is_transformed()  # type: ignore[attr-defined]


def _global_hooks() -> bool:
    """Whether hooks run at every call of every module."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a word, or a nest of them in Python's own containers."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


class _Attributes:
    """What else the layers may compute from: numbers, words, functions that are their attributes.

    An adapter's scale, for example, an activation's name, a padding.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.readers: list[tuple[Callable[[Any], Any], dict[str, Any]]] = []
        self.objects: list[tuple[dict[str, Any], str, Any]] = []
        for module in modules:
            table = vars(module)
            # of these convolutions and batch norms Sources knows what there is to know
            if type(module) in (nn.Conv2d, nn.BatchNorm2d):
                continue
            keys = [key for key in table if key not in _MODULES_OWN]
            plain = [key for key in keys if _is_plain(table[key])]
            if plain:
                self.readers.append((itemgetter(*plain), table))
            self.objects += [(table, key, table[key]) for key in keys if key not in plain]
        self.values = copy.deepcopy(self._values())

    def _values(self) -> list[Any]:
        return [read(table) for read, table in self.readers]

    def same(self) -> bool:
        """Whether each is what it was at first."""
        try:
            return self._values() == self.values and all(
                table[key] is value for table, key, value in self.objects
            )
        except (KeyError, RuntimeError, ValueError):  # one is gone, or is a tensor or an array now
            return False


class Sources:
    """Every parameter, buffer and child below a module, and whether any has changed since.

    Written for speed, because it is asked before every call: the loops are C's.

    Args:
        module: what is computed by fused ops.
        hooked: modules whose hooks those ops would not run; all below ``module`` when None.
    """

    def __init__(self, module: nn.Module, hooked: list[nn.Module] | None = None) -> None:
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
        self.hooks = [
            hooks
            for m in (modules[1:] if hooked is None else hooked)
            for hooks in (m._forward_hooks, m._forward_pre_hooks)
        ]
        self.modules = modules
        self.attributes = list(map(vars, modules))
        self.convolutions = [vars(m) for m in modules if isinstance(m, _ConvNd)]
        self.kinds = self._kinds()
        self.values = _Attributes(modules)
        self.optimizer_steps = _optimizer_steps
        self.versioned = [t for t in self.tensors if not t.is_inference()]
        try:
            self.state: tuple[list[int], list[int]] | None = self._state()
        except RuntimeError:  # wrapped tensors have no address
            self.state = None

    def _state(self) -> tuple[list[int], list[int]]:
        # An in-place write raises the version; `p.data = q`, and so `.to()`, moves the address.
        # The batch norms' running statistics change unversioned, but with num_batches_tracked.
        return list(map(_version, self.versioned)), list(map(Tensor.data_ptr, self.tensors))

    def _kinds(self) -> tuple[list[type], list[int], list[float], list[tuple[Any, ...]]]:
        # parametrisations exchange the class; a forward put on an instance is one more attribute
        return (
            list(map(type, self.modules)),
            list(map(len, self.attributes)),
            list(map(_eps, self.norms)),
            list(map(_geometry, self.convolutions)),
        )

    def _same_objects(self) -> bool:
        try:
            same = self.tables == self.contents  # compares identities first
        except RuntimeError:  # and then finds that two tensors have no one truth value
            return False
        return same and all(table[key] is value for table, key, value in self.scalars)

    def unchanged(self, module: nn.Module) -> bool:
        """Whether ``module`` computes from the same tensors, layers and values as at first."""
        known = self.state is not None and len(self.versioned) == len(self.tensors)
        return known and not self.changed(module)

    def changed(self, module: nn.Module) -> bool:
        """Whether a change can be seen: no write can to inference tensors, without a version."""
        return (
            self.exchanged(module)
            or self.optimizer_steps != _optimizer_steps
            or (self.state is not None and self._state() != self.state)
        )

    def exchanged(self, module: nn.Module) -> bool:
        """Whether these are not the layers and tensors of ``module``, whatever their values."""
        return (
            self.owner() is not module
            or not self._same_objects()
            or self._kinds() != self.kinds
            or not self.values.same()
        )

    def runs_python(self) -> bool:
        """Whether the layers must run at each call: for hooks, or for norms in training mode."""
        return any(self.hooks) or _global_hooks() or any(map(_training, self.norms))


def without_inference_tensors(model: nn.Module) -> None:
    """Puts copies in the place of tensors of ``model`` that were made in inference mode.

    These have no version, so that writes to them would not be seen.
    """
    copies: dict[int, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            tables: list[dict[str, Any]] = [module._parameters, module._buffers]
            for table in tables:
                for key, x in table.items():
                    if x is None or not x.is_inference():
                        continue
                    if id(x) not in copies:  # a tensor may be in several places
                        own = x.clone()
                        wanted = x.requires_grad
                        copies[id(x)] = (
                            nn.Parameter(own, wanted) if isinstance(x, nn.Parameter) else own
                        )
                    table[key] = copies[id(x)]


def own_weight(module: nn.Module) -> Tensor | None:
    """A weight of ``module`` whose dtype and device its maps must have; None if it has none."""
    return next((p for p in module.parameters() if p.is_floating_point()), None)


def layers_reason(module: Any, *, hooks: bool = True) -> str:
    """Why only the layers of the packed module ``module`` compute its result; or "".

    Hooks (unless they are not asked for), parametrisations, exchanged layers: fused ops would
    compute from what was there before, or is there beside them.
    """
    if hooks and _global_hooks():
        return "hooks are set on every module"
    known = module.layer_types
    for name, layer in module.named_modules():
        if layer is module:
            continue
        if hooks and (layer._forward_hooks or layer._forward_pre_hooks):
            return f"its layer {name} has a forward hook"
        if parametrize.is_parametrized(layer):
            return f"its layer {name} is parametrised"
        if "forward" in vars(layer):
            return f"its layer {name} was given another forward"
        if known is not None and type(layer) not in known:
            return f"its layer {name} is a {type(layer).__name__}"
    try:
        module.check_layers()
    except (ValueError, AttributeError, TypeError, LookupError) as error:
        return str(error)  # of Mismatch, or because a layer lacks what layers in its place have
    return ""


# what is looked at are Python objects, which torch.compile need not trace
layers_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]
