"""Backward of every op, registered with torch.library.

A forward pass saves its inputs and weights only; whatever else the backward pass needs is computed
again. `weighted_fusion`, `fusion_node`, `separable_conv` and `training_node` have backward kernels;
`bifpn` and `head` are chains of them; in Triton `lateral` has one too. An op that ran as a compiled
CUDA kernel takes Triton's backward. `mbconv` and `stem`, and any op whose device lacks the backward
kernel, run their reference again under autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from . import reference
from .backend import has_kernel, triton_serves
from .names import ACTIVATIONS, FUSIONS, POOLS

# What the compiled ops compute, as references of the compiled ops' own arguments.


def _split(values: list[int], counts: list[int]) -> list[list[int]]:
    ends = accumulate(counts)
    return [values[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _weighted_fusion(
    inputs: list[Tensor],
    edge_weights: Tensor | None,
    size: list[int],
    fusion: int,
    pool: int,
    activation: int,
) -> Tensor:
    return reference.weighted_fusion(
        inputs,
        edge_weights,
        size=(size[0], size[1]),
        fusion=FUSIONS[fusion],
        pool=POOLS[pool],
        activation=ACTIVATIONS[activation],
    )


def _fusion_node(
    inputs: list[Tensor],
    edge_weights: Tensor | None,
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    size: list[int],
    fusion: int,
    pool: int,
    pre: int,
    post: int,
) -> Tensor:
    return reference.fusion_node(
        inputs,
        edge_weights,
        dw_weight,
        pw_weight,
        scale,
        shift,
        size=(size[0], size[1]),
        fusion=FUSIONS[fusion],
        pool=POOLS[pool],
        pre_activation=ACTIVATIONS[pre],
        post_activation=ACTIVATIONS[post],
    )


def _separable_conv(
    inputs: list[Tensor],
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: int,
) -> list[Tensor]:
    return reference.separable_conv(
        inputs, dw_weight, pw_weight, scale, shift, activation=ACTIVATIONS[activation]
    )


def _lateral(
    input: Tensor,
    pw_weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    pooled: int,
    pool: int,
) -> list[Tensor]:
    return reference.lateral(input, pw_weights, scales, shifts, pooled=pooled, pool=POOLS[pool])


def _padding(x: Tensor, kernel: int, stride: int, before: list[int], size: list[int]) -> str:
    """The name of a padding given by its leading pixels and the output's size."""
    same = [reference.conv_geometry(n, kernel, stride, "same") for n in x.shape[-2:]]
    wanted = list(zip(before, size, strict=True))
    return "same" if same == wanted else "symmetric"


def _mbconv(
    input: Tensor,
    expand: list[Tensor],
    depthwise: list[Tensor],
    squeeze: list[Tensor],
    project: list[Tensor],
    stride: int,
    padding: list[int],
    size: list[int],
    activation: int,
    residual: bool,
) -> Tensor:
    kernel = 3 if depthwise[0].shape[0] == 9 else 5
    return reference.mbconv(
        input,
        expand or None,
        depthwise,
        squeeze or None,
        project,
        stride=stride,
        padding=_padding(input, kernel, stride, padding, size),
        activation=ACTIVATIONS[activation],
        residual=residual,
    )


def _stem(
    image: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    padding: list[int],
    size: list[int],
    activation: int,
    dtype: torch.dtype,
) -> Tensor:
    return reference.stem(
        image,
        weight,
        scale,
        shift,
        mean=mean,
        std=std,
        padding=_padding(image, 3, 2, padding, size),
        activation=ACTIVATIONS[activation],
        dtype=dtype,
    )


def _training_node(
    inputs: list[Tensor],
    scales: Tensor | None,
    offsets: Tensor | None,
    edge_weights: Tensor | None,
    dw_weight: Tensor,
    pw_weight: Tensor,
    shift: Tensor,
    edge_counts: list[int],
    sizes: list[int],
    fusion: int,
    pool: int,
    activation: int,
    statistics: bool,
) -> list[Tensor]:
    maps, mean, m2 = reference.training_node(
        inputs,
        scales,
        offsets,
        edge_weights,
        dw_weight,
        pw_weight,
        shift,
        edge_counts=edge_counts,
        sizes=list(zip(sizes[::2], sizes[1::2], strict=True)),
        fusion=FUSIONS[fusion],
        pool=POOLS[pool],
        activation=ACTIVATIONS[activation],
        statistics=statistics,
    )
    return [*maps, mean, m2]


def _bifpn(
    inputs: list[Tensor],
    edge_weights: Tensor | None,
    dw_weight: Tensor,
    pw_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    edges: list[int],
    edge_counts: list[int],
    sizes: list[int],
    outputs: list[int],
    fusion: int,
    pool: int,
    pre: int,
    post: int,
) -> list[Tensor]:
    return reference.bifpn(
        inputs,
        edge_weights,
        dw_weight,
        pw_weight,
        scale,
        shift,
        nodes=_split(edges, edge_counts),
        sizes=list(zip(sizes[::2], sizes[1::2], strict=True)),
        outputs=outputs,
        fusion=FUSIONS[fusion],
        pool=POOLS[pool],
        pre_activation=ACTIVATIONS[pre],
        post_activation=ACTIVATIONS[post],
    )


def _head(
    inputs: list[Tensor],
    dw_weights: list[Tensor],
    pw_weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    activation: int,
) -> list[Tensor]:
    return reference.head(
        inputs, dw_weights, pw_weights, scales, shifts, activation=ACTIVATIONS[activation]
    )


_REFERENCES: dict[str, Callable[..., Tensor | list[Tensor]]] = {
    "weighted_fusion": _weighted_fusion,
    "fusion_node": _fusion_node,
    "bifpn": _bifpn,
    "separable_conv": _separable_conv,
    "head": _head,
    "lateral": _lateral,
    "mbconv": _mbconv,
    "stem": _stem,
    "training_node": _training_node,
}


# Backward passes by kernels. Each gets the operators of its backend, the forward's arguments and
# the gradients of its results, and returns the gradients of all arguments that may be tensors, in
# order, lists flattened.


def _kernel(ops: Any, op: str, *args: Any) -> list[Tensor]:
    return list(getattr(ops, f"{op}_backward")(*args))


def _weighted_fusion_backward(ops: Any, args: Sequence[Any], grads: list[Tensor]) -> list[Tensor]:
    return _kernel(ops, "weighted_fusion", grads[0], *args)


def _fusion_node_backward(ops: Any, args: Sequence[Any], grads: list[Tensor]) -> list[Tensor]:
    return _kernel(ops, "fusion_node", grads[0], *args)


def _separable_conv_backward(ops: Any, args: Sequence[Any], grads: list[Tensor]) -> list[Tensor]:
    return _kernel(ops, "separable_conv", grads, *args)


def _bifpn_backward(ops: Any, args: Sequence[Any], grads: list[Tensor]) -> list[Tensor]:
    inputs, edge_weights, dw, pw, scale, shift, edges, counts, sizes, outputs, *numbers = args
    nodes = _split(edges, counts)
    known = list(inputs)

    def arguments(i: int) -> tuple[Any, ...]:
        weights = None if edge_weights is None else edge_weights[i, : counts[i]]
        size = sizes[2 * i : 2 * i + 2]
        maps = [known[e] for e in nodes[i]]
        return (maps, weights, dw[i], pw[i], scale[i], shift[i], size, *numbers)

    for i in range(len(nodes)):
        known.append(ops.fusion_node(*arguments(i)))
    total: list[Tensor | None] = [None] * len(known)
    for o, grad in zip(outputs, grads, strict=True):
        total[o] = grad
    edge_grad = None if edge_weights is None else torch.zeros_like(edge_weights)
    weight_grads = [torch.zeros_like(w) for w in (dw, pw, scale, shift)]
    for i in reversed(range(len(nodes))):
        node_grad = total.pop()
        if node_grad is not None:
            found = _kernel(ops, "fusion_node", node_grad, *arguments(i))
            for e, g in zip(nodes[i], found, strict=False):
                previous = total[e]
                total[e] = g if previous is None else previous + g
            if edge_grad is not None:
                edge_grad[i, : counts[i]] = found[counts[i]]
            for stacked, g in zip(weight_grads, found[counts[i] + 1 :], strict=True):
                stacked[i] = g.view_as(stacked[i])
        known.pop()
    input_grads = [
        torch.zeros_like(x) if g is None else g for x, g in zip(inputs, total, strict=True)
    ]
    none = dw.new_empty(0)
    return [*input_grads, none if edge_grad is None else edge_grad, *weight_grads]


def _head_backward(ops: Any, args: Sequence[Any], grads: list[Tensor]) -> list[Tensor]:
    inputs, dw, pw, scales, shifts, activation = args
    maps = [list(inputs)]
    layers = list(zip(dw, pw, scales, shifts, strict=True))
    for layer in layers[:-1]:
        maps.append(ops.separable_conv(maps[-1], *layer, activation))
    found = []
    for i, layer in reversed(list(enumerate(layers))):
        last = i == len(layers) - 1
        result = _kernel(
            ops, "separable_conv", grads, maps.pop(), *layer, 0 if last else activation
        )
        grads, weights = result[: len(inputs)], result[len(inputs) :]
        found.append(weights)
    by_kind = zip(*reversed(found), strict=True)
    return [*grads, *chain.from_iterable(by_kind)]


def _lateral_backward(ops: Any, args: Sequence[Any], grads: list[Tensor]) -> list[Tensor]:
    return _kernel(ops, "lateral", grads, *args)


def _training_node_backward(
    ops: Any, args: Sequence[Any], grads: list[Tensor], outputs: list[Tensor]
) -> list[Tensor]:
    *maps, mean, _ = outputs or (None, None)  # nothing is saved where there are no statistics
    *map_grads, mean_grad, m2_grad = grads
    return _kernel(ops, "training_node", map_grads, mean_grad, m2_grad, maps, mean, *args[:-1])


#: The backward pass by kernels, and the kernel's op it needs.
_KERNELS: dict[str, tuple[Callable[..., list[Tensor]], str]] = {
    "weighted_fusion": (_weighted_fusion_backward, "weighted_fusion_backward"),
    "fusion_node": (_fusion_node_backward, "fusion_node_backward"),
    "bifpn": (_bifpn_backward, "fusion_node_backward"),
    "separable_conv": (_separable_conv_backward, "separable_conv_backward"),
    "head": (_head_backward, "separable_conv_backward"),
    "lateral": (_lateral_backward, "lateral_backward"),
    "training_node": (_training_node_backward, "training_node_backward"),
}


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
    ctx.outputs = slice(len(tensors), None)
    ctx.save_for_backward(*tensors, *(output if op == "training_node" and inputs[-1] else ()))


def _arguments(ctx: Any) -> list[Any]:
    saved = ctx.saved_tensors
    lists = [(many, value if many is None else list(saved[value])) for many, value in ctx.values]
    return [value[0] if many is False else value for many, value in lists]


def _recompute(op: str, args: list[Any], needed: Sequence[Any], grads: list[Any]) -> list[Any]:
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
        results = _REFERENCES[op](*(leaf(x, n) for x, n in zip(args, needed, strict=True)))
    results = results if isinstance(results, list) else [results]
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


def _backward_namespace(namespace: str, op: str, kernel: str, device: str) -> str:
    """Where in ``torch.ops`` the backward ``kernel`` of an op of ``namespace`` is; "" for none."""
    if has_kernel(kernel, device, namespace):
        return namespace
    if device == "cuda" and triton_serves(op):  # compiled CUDA kernels have no backward
        return "edet_kernels_triton"
    return ""


def _backward(namespace: str, op: str, ctx: Any, *grads: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"edet_kernels.{op} has no second derivative (create_graph=True asked for one): run it "
            "inside edet_kernels.backend('reference')"
        )
    args = _arguments(ctx)
    flat = list(chain.from_iterable(g if isinstance(g, list) else [g] for g in grads))
    kernel, needs = _KERNELS.get(op, (None, ""))
    found_in = needs and _backward_namespace(namespace, op, needs, flat[0].device.type)
    ops = getattr(torch.ops, found_in or namespace)
    if kernel is None or not found_in:
        gradients = _recompute(op, args, ctx.needs_input_grad, flat)
    elif op == "training_node":
        gradients = kernel(ops, args, flat, list(ctx.saved_tensors[ctx.outputs]))
    else:
        gradients = kernel(ops, args, flat)
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


def register(namespace: str = "edet_kernels") -> None:
    """Registers the backward passes of the operators that ``torch.ops`` has under ``namespace``."""
    for op in _REFERENCES:
        if torch._C._dispatch_has_kernel(f"{namespace}::{op}"):
            torch.library.register_autograd(
                f"{namespace}::{op}",
                partial(_backward, namespace, op),
                setup_context=partial(_save, op),
            )
