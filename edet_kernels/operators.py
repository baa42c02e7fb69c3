"""The operators in ``torch.ops``: how they are called, and what torch.library is told of them.

That is for each a fake kernel (:mod:`edet_kernels.fakes`), and for those with gradients a backward
pass. Both are written beside the op in :mod:`edet_kernels.ops`; decorators collect them,
:func:`register` hands them to torch for the operators of a namespace: the compiled ones, Triton's.

A forward pass saves its inputs and weights only; whatever else the backward pass needs is computed
again: by kernels where the op has a backward pass by kernels and its device these kernels, else by
the reference, run again under autograd. An op that ran as a compiled CUDA kernel takes Triton's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import autocast, reference
from .backend import has_kernel, namespace, triton_serves
from .fakes import FAKES, empty_gradients
from .names import MAP_OPS, WORDS

F = TypeVar("F", bound=Callable[..., Any])


def run(op: str, *args: Any) -> Any:
    """Calls the operator ``op``, on a map or maps first, of the backend that runs it.

    Past autograd, which costs 20 µs, where gradients are off.
    """
    x = args[0] if isinstance(args[0], Tensor) else args[0][0]
    function = getattr(getattr(torch.ops, namespace(op, x)), op)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return function(*args)


# Backward passes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backward:
    """A backward pass by kernels.

    Attributes:
        function: gets the operators of the namespace that has the kernel, the arguments of the
            forward and the gradients of its results, flat; where ``results_kept``, the results
            too. It returns the gradients of all arguments that may be tensors, in order, lists
            flattened.
        kernel: the operator that it needs.
        results_kept: whether the results of a call with these arguments are needed; None: never.
    """

    function: Callable[..., list[Tensor]]
    kernel: str
    results_kept: Callable[[Sequence[Any]], bool] | None


_BACKWARDS: dict[str, Backward] = {}
_ADAPTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def backward(
    op: str, kernel: str, results_kept: Callable[[Sequence[Any]], bool] | None = None
) -> Callable[[F], F]:
    """Makes a function the backward pass of ``op`` by kernels; see :class:`Backward`.

    The fake kernel of ``kernel`` is :func:`empty_gradients` unless it has one of its own.
    """

    def take(function: F) -> F:
        FAKES.setdefault(kernel, empty_gradients)
        _BACKWARDS[op] = Backward(function, kernel, results_kept)
        return function

    return take


def for_reference(op: str) -> Callable[[F], F]:
    """Makes a function the way from the operator's arguments to those of the reference.

    Both are given by name. For an op without such a function they are the same, but for names in
    the place of numbers.
    """

    def take(function: F) -> F:
        _ADAPTERS[op] = function
        return function

    return take


def _run_reference(space: str, op: str, args: Sequence[Any]) -> list[Tensor]:
    """The reference on the arguments of the operator ``op`` of a namespace; its results, flat."""
    schema = getattr(getattr(torch.ops, space), op).default._schema
    given = dict(zip((a.name for a in schema.arguments), args, strict=True))
    given |= {name: words[given[name]] for name, words in WORDS.items() if name in given}
    results = getattr(reference, op)(**_ADAPTERS[op](given) if op in _ADAPTERS else given)
    return [results] if isinstance(results, Tensor) else _flat(results)


def _flat(values: Sequence[Any]) -> list[Any]:
    return list(chain.from_iterable(v if isinstance(v, list) else [v] for v in values))


def _is_tensors(argument: Any) -> bool:
    return isinstance(argument, list) and all(isinstance(t, Tensor) for t in argument)


def _save(op: str, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors: list[Tensor] = []
    ctx.values = []  # of each argument; for tensors, the slice of the saved ones
    for argument in inputs:
        first = len(tensors)
        if isinstance(argument, Tensor) or _is_tensors(argument):
            tensors += [argument] if isinstance(argument, Tensor) else argument
            ctx.values.append((isinstance(argument, list), slice(first, len(tensors))))
        else:
            ctx.values.append((None, argument))
    ctx.results = slice(len(tensors), None)
    kept = _BACKWARDS[op].results_kept if op in _BACKWARDS else None
    ctx.save_for_backward(*tensors, *(output if kept and kept(inputs) else ()))


def _arguments(ctx: Any) -> list[Any]:
    saved = ctx.saved_tensors
    lists = [(many, value if many is None else list(saved[value])) for many, value in ctx.values]
    return [value[0] if many is False else value for many, value in lists]


def _recompute(
    space: str, op: str, args: list[Any], needed: Sequence[Any], grads: list[Any]
) -> list[Any]:
    """The backward pass by the reference."""
    leaves: list[Tensor] = []

    def leaf(x: Any, need: Any) -> Any:
        if _is_tensors(x):
            return [leaf(t, n) for t, n in zip(x, need, strict=True)]
        if not isinstance(x, Tensor) or not need:
            return x
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad():
        results = _run_reference(space, op, [leaf(x, n) for x, n in zip(args, needed, strict=True)])
    pairs = [(x, g) for x, g in zip(results, grads, strict=True) if x.requires_grad]
    found = iter(
        torch.autograd.grad([x for x, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    )
    gradients: list[Any] = []
    for x, need in zip(args, needed, strict=True):
        if _is_tensors(x):
            gradients += [next(found) if n else None for n in need]
        elif x is None or isinstance(x, Tensor):
            gradients.append(next(found) if need else None)
    return gradients


def _backward_namespace(space: str, op: str, kernel: str, device: str) -> str:
    """Where in ``torch.ops`` the backward ``kernel`` of an op of ``space`` is; "" for none."""
    if has_kernel(kernel, device, space):
        return space
    if device == "cuda" and triton_serves(op):  # compiled CUDA kernels have no backward
        return "edet_kernels_triton"
    return ""


def _backward(space: str, op: str, ctx: Any, *grads: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"edet_kernels.{op} has no second derivative (create_graph=True asked for one): run it "
            "inside edet_kernels.backend('reference')"
        )
    args, flat = _arguments(ctx), _flat(grads)
    by = _BACKWARDS.get(op)
    found_in = by and _backward_namespace(space, op, by.kernel, flat[0].device.type)
    if by is None or not found_in:
        gradients = _recompute(space, op, args, ctx.needs_input_grad, flat)
    else:
        results = [list(ctx.saved_tensors[ctx.results])] if by.results_kept else []
        gradients = by.function(getattr(torch.ops, found_in), args, flat, *results)
    found = iter(gradients)
    result: list[Any] = []
    for x in args:
        if _is_tensors(x):
            result.append([next(found) for _ in x])
        elif isinstance(x, Tensor):
            result.append(next(found))
        else:
            if x is None:
                next(found)
            result.append(None)
    return tuple(result)


def register(space: str = "edet_kernels") -> None:
    """Registers all there is for the operators that ``torch.ops`` has under a namespace."""
    for op, function in FAKES.items():
        if torch._C._dispatch_has_kernel(f"{space}::{op}"):
            torch.library.register_fake(f"{space}::{op}", function)
    autocast.register(space)
    for op in MAP_OPS:
        if torch._C._dispatch_has_kernel(f"{space}::{op}"):
            torch.library.register_autograd(
                f"{space}::{op}", partial(_backward, space, op), setup_context=partial(_save, op)
            )
