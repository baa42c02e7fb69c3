"""Fused ops for the EfficientDets people already have: ``accelerate`` and ``restore``.

A backbone, BiFPN or head is fused in place: the module stays the same object with the same tensors
and state-dict keys, and its class is replaced by one derived from it, whose ``forward`` runs the
fused ops in eval mode without gradients and the module's own layers otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from edet_kernels import library

from ..bench.stages import CheckFailed, check
from ..fused.describe import (
    BackboneBlocks,
    BlockLayers,
    Edge,
    FusionNodes,
    HeadLayers,
    Mismatch,
    NodeLayers,
)
from ..fused.module import PackedModule, _Cache

#: Attributes that a fused module needs for itself.
_RESERVED = (
    *("pack", "packed", "repack", "freeze", "unfreeze", "fused"),
    *("_cache", "_frozen", "_freeze", "_entry", "_check_layers", "_layer_types", "_made_of"),
)

#: Class names of activations, in lower case, that the kernels compute.
_ACTIVATIONS = {
    "silu": "swish",
    "swish": "swish",
    "swishme": "swish",
    "memoryefficientswish": "swish",
    "relu": "relu",
    "relu6": "relu6",
    "hardswish": "hard_swish",
    "hardswishme": "hard_swish",
    "identity": "none",
    "nonetype": "none",
}

Description = FusionNodes | HeadLayers | BackboneBlocks

#: The methods of the protocol.
_METHODS = ("as_fusion_nodes", "as_head_layers", "as_backbone_blocks")

#: Names of fusion methods in other code.
_FUSIONS = {"fastattn": "fast", "attn": "softmax", "sum": "sum"}


def _activation(act: object) -> str:
    name = type(act).__name__
    try:
        return _ACTIVATIONS[name.lower()]
    except KeyError:
        raise Mismatch(f"the kernels have no activation {name}") from None


def _attributes(module: object, *names: str) -> list[Any]:
    """The attributes ``names`` of a part of a recognised module.

    Raises:
        Mismatch: one is missing.
    """
    for name in names:
        if not hasattr(module, name):
            raise Mismatch(f"{type(module).__name__} has no {name}")
    return [getattr(module, name) for name in names]


# --- the protocol ---------------------------------------------------------------------------------


def _protocol(module: nn.Module) -> Description | None:
    for method in _METHODS:
        if hasattr(module, method):
            return cast(Description, getattr(module, method)())
    return None


# --- timm's EfficientNets, the backbones of effdet ------------------------------------------------


def _timm_norm(bn: nn.Module) -> tuple[nn.Module, str]:
    """A batch norm and the activation behind it."""
    drop = getattr(bn, "drop", None)
    if isinstance(drop, nn.Module) and not isinstance(drop, nn.Identity):
        raise Mismatch(f"a batch norm with {type(drop).__name__}")
    return bn, _activation(getattr(bn, "act", None))


def _timm_padding(conv: nn.Conv2d) -> str | None:
    """How a convolution is padded; None when both ways are the same."""
    if conv.stride == (1, 1):
        if conv.padding != tuple(k // 2 for k in conv.kernel_size):
            raise Mismatch(f"a convolution padded by {conv.padding}")
        return None
    if "Same" in type(conv).__name__:
        return "same"
    if conv.padding != tuple(k // 2 for k in conv.kernel_size):
        raise Mismatch(f"a convolution with a stride padded by {conv.padding}")
    return "symmetric"


def _timm_block(
    block: nn.Module,
) -> tuple[BlockLayers, set[str], set[str | None]]:
    """A DepthwiseSeparableConv or InvertedResidual; its activations and paddings."""
    expands = hasattr(block, "conv_pwl")
    convs = ("conv_pw", "conv_dw", "conv_pwl") if expands else ("conv_dw", "conv_pw")
    parts = []
    activations = []
    for i, name in enumerate(convs, 1):
        conv, bn = _attributes(block, name, f"bn{i}")
        if not isinstance(conv, nn.Conv2d):
            raise Mismatch(f"a block with {type(conv).__name__}")
        parts.append((conv, _timm_norm(bn)[0]))
        activations.append(_timm_norm(bn)[1])
    if activations.pop() != "none":
        raise Mismatch("an activation after a projection")
    for name in ("aa", "conv_s2d"):
        other = getattr(block, name, None)
        if other is not None and not isinstance(other, nn.Identity):
            raise Mismatch(f"a block with {type(other).__name__}")
    squeeze = None
    se = getattr(block, "se", None)
    if se is not None and not isinstance(se, nn.Identity):
        reduce, act, excite, gate = _attributes(se, "conv_reduce", "act1", "conv_expand", "gate")
        if not isinstance(gate, nn.Sigmoid) and type(gate).__name__ != "Sigmoid":
            raise Mismatch(f"squeeze-excite with {type(gate).__name__}")
        squeeze = reduce, excite
        activations.append(_activation(act))
    layers = BlockLayers(
        parts[0] if expands else None,
        parts[-2],
        squeeze,
        parts[-1],
        bool(_attributes(block, "has_skip")[0]),
    )
    return layers, set(activations), {_timm_padding(parts[-2][0])}


def _timm_backbone(module: nn.Module) -> BackboneBlocks | None:
    if not all(hasattr(module, name) for name in ("conv_stem", "bn1", "blocks", "_stage_out_idx")):
        return None
    if getattr(module, "feature_hooks", None) is not None or 0 in cast(Any, module._stage_out_idx):
        raise Mismatch("it returns maps from inside of blocks")
    stem, bn, stages = _attributes(module, "conv_stem", "bn1", "blocks")
    bn, activation = _timm_norm(bn)
    activations, paddings = {activation}, {_timm_padding(stem)}
    blocks, returned = [], []
    for i, stage in enumerate(stages):
        for block in stage:
            layers, more, padded = _timm_block(block)
            blocks.append(layers)
            activations |= more
            paddings |= padded
        if i + 1 in cast(Any, module._stage_out_idx):
            returned.append(len(blocks) - 1)
    paddings.discard(None)
    if len(activations) > 1 or len(paddings) != 1:
        raise Mismatch("blocks with different activations or paddings")
    return BackboneBlocks((stem, bn), blocks, returned, cast(str, paddings.pop()), activation)


# --- effdet ---------------------------------------------------------------------------------------


def _effdet_projection(layers: nn.Module, name: str) -> tuple[nn.Conv2d | None, nn.Module | None]:
    """The 1×1 convolution and batch norm of a ResampleFeatureMap, whose resizing is checked."""
    conv = bn = None
    for key, layer in layers.named_children():
        if key == "conv":
            conv, bn, act = _attributes(layer, "conv", "bn", "act")
            if act is not None:
                raise Mismatch(f"{name}: an activation after the projection")
        elif key == "upsample":
            if getattr(layer, "mode", None) != "nearest":
                raise Mismatch(f"{name}: {getattr(layer, 'mode', type(layer).__name__)} upsampling")
        elif not isinstance(layer, nn.MaxPool2d):
            raise Mismatch(f"{name}: downsampling by {type(layer).__name__}")
    return conv, bn


def _effdet_pools(modules: Sequence[nn.Module]) -> str:
    """The padding of all max pools below ``modules``; ``same`` when there are none."""
    found = set()
    for pool in (m for top in modules for m in top.modules() if isinstance(m, nn.MaxPool2d)):
        kernel, stride, padding = (
            (v, v) if isinstance(v, int) else tuple(v)
            for v in (pool.kernel_size, pool.stride, pool.padding)
        )
        if pool.ceil_mode or any(k != s + 1 for k, s in zip(kernel, stride, strict=True)):
            raise Mismatch(f"a max pool of kernel {kernel} and stride {stride}")
        if "Same" in type(pool).__name__:
            found.add("same")
        elif padding == tuple(s - 1 for s in stride):
            found.add("symmetric")
        else:
            raise Mismatch(f"a max pool of stride {stride} padded by {padding}")
    if len(found) > 1:
        raise Mismatch("max pools are padded in different ways")
    return found.pop() if found else "same"


def _effdet_fpn(module: nn.Module) -> FusionNodes | None:
    if not (hasattr(module, "cell") and hasattr(module, "resample")):
        return None
    cells = list(cast(nn.Module, module.cell).children())
    if not cells or not all(hasattr(cell, "fnode") for cell in cells):
        return None
    levels = cast(int, _attributes(module, "num_levels")[0])
    resample = cast(nn.ModuleDict, module.resample)
    inputs = levels - len(resample)
    above = [
        Edge(inputs - 1 + i, *_effdet_projection(layer, f"resample.{key}"))
        for i, (key, layer) in enumerate(resample.items())
    ]
    nodes: list[NodeLayers] = []
    activations = set()
    known = list(range(levels))  # ids that the offsets of a cell mean
    node_level = {i: i for i in range(levels)}
    for c, cell in enumerate(cells):
        for n, fnode in enumerate(cast(nn.ModuleList, cell.fnode)):
            name = f"cell.{c}.fnode.{n}"
            combine, after = _attributes(fnode, "combine", "after_combine")
            method, offsets = _attributes(combine, "weight_method", "inputs_offsets")
            if method not in _FUSIONS:
                raise Mismatch(f"{name}: fusion method {method!r}")
            edges = [
                Edge(known[o], *_effdet_projection(combine.resample[str(o)], name)) for o in offsets
            ]
            if not hasattr(after, "conv") or not hasattr(after.conv, "conv_dw"):
                raise Mismatch(f"{name}: its convolution is not separable")
            dw, pw, bn, act = _attributes(after.conv, "conv_dw", "conv_pw", "bn", "act")
            activations.add((_activation(getattr(after, "act", None)), _activation(act)))
            # of a node's edges the first is always from its own level
            level = node_level[known[offsets[0]]]
            node_level[levels + len(nodes)] = level
            known.append(levels + len(nodes))
            weights = combine.edge_weights
            nodes.append(NodeLayers(level, edges, dw, pw, bn, weights, _FUSIONS[method]))
        known = known[-levels:]
    if len(activations) > 1:
        raise Mismatch("nodes have different activations")
    ((pre, post),) = activations
    pool = _effdet_pools([resample, *cells])
    return FusionNodes(inputs, nodes, known, above, pool, pre, post)


def _effdet_head(module: nn.Module) -> HeadLayers | None:
    if not all(hasattr(module, name) for name in ("conv_rep", "bn_rep", "predict")):
        return None
    level_first, act, reps, norms, predict = _attributes(
        module, "bn_level_first", "act", "conv_rep", "bn_rep", "predict"
    )
    convs = []
    for name, conv in [*reps.named_children(), ("predict", predict)]:
        if not hasattr(conv, "conv_dw"):
            raise Mismatch(f"conv_rep.{name}: its convolution is not separable")
        if getattr(conv, "bn", None) is not None or getattr(conv, "act", None) is not None:
            raise Mismatch(f"conv_rep.{name}: a batch norm or activation of its own")
        convs.append((conv.conv_dw, conv.conv_pw))
    table = [[getattr(bn, "bn", bn) for bn in row] for row in norms]
    if level_first:
        table = [list(layer) for layer in zip(*table, strict=True)]
    return HeadLayers(convs[:-1], table, convs[-1], _activation(act))


# --- zylo117's Yet-Another-EfficientDet-Pytorch ---------------------------------------------------


def _inner(conv: object) -> Any:
    """The convolution inside a wrapper that pads it."""
    return getattr(conv, "conv", conv)


def _zylo_separable(block: nn.Module) -> tuple[Any, Any, nn.Module | None]:
    """Depthwise, pointwise and batch norm of a SeparableConvBlock without activation."""
    dw, pw = _attributes(block, "depthwise_conv", "pointwise_conv")
    if getattr(block, "activation", False):
        raise Mismatch("a separable convolution with an activation")
    bn = cast(nn.Module, block.bn) if getattr(block, "norm", False) else None
    return _inner(dw), _inner(pw), bn


def _zylo_projection(layers: Any) -> tuple[Any, nn.Module | None]:
    """Convolution and batch norm, the first two of a Sequential."""
    return _inner(layers[0]), layers[1]


def _zylo_fpn(module: nn.Module) -> FusionNodes | None:
    if not all(hasattr(module, name) for name in ("conv6_up", "conv3_up", "conv4_down", "p4_w2")):
        return None
    first, attention = _attributes(module, "first_time", "attention")
    _activation(_attributes(module, "swish")[0])
    top = 8 if hasattr(module, "conv8_down") else 7
    levels = top - 2
    above: list[Edge] = []
    projections: dict[tuple[int, bool], tuple[Any, nn.Module | None]] = {}
    if first:
        above = [Edge(2, *_zylo_projection(module.p5_to_p6)), *map(Edge, range(3, levels - 1))]
        for level in (3, 4, 5):
            layers = getattr(module, f"p{level}_down_channel")
            projections[level, True] = _zylo_projection(layers)
        for level in (4, 5):
            layers = getattr(module, f"p{level}_down_channel_2")
            projections[level, False] = _zylo_projection(layers)
    last = {level: level - 3 for level in range(3, top + 1)}  # the newest map of each level
    nodes: list[NodeLayers] = []

    def node(level: int, other: int, up: bool) -> None:
        block = getattr(module, f"conv{level}_{'up' if up else 'down'}")
        own = Edge(level - 3, *projections.get((level, up), ()))
        edges = [own]
        if last[level] != level - 3:
            edges.append(Edge(last[level]))
        edges.append(Edge(last[other]))
        weights = getattr(module, f"p{level}_w{1 if up else 2}") if attention else None
        dw, pw, bn = _zylo_separable(block)
        fusion = "fast" if attention else "sum"
        nodes.append(NodeLayers(level - 3, edges, dw, pw, bn, weights, fusion))
        last[level] = levels + len(nodes) - 1

    for level in range(top - 1, 2, -1):
        node(level, level + 1, True)
    for level in range(4, top + 1):
        node(level, level - 1, False)
    outputs = [last[level] for level in range(3, top + 1)]
    inputs = 3 if first else levels
    return FusionNodes(inputs, nodes, outputs, above, "zero", finish=tuple)


def _flat(maps: list[Tensor], values: int, sigmoid: bool) -> Tensor:
    """Maps (N, anchors·values, H, W) of all levels as (N, anchors of all levels, values)."""
    flat = torch.cat([x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, values) for x in maps], dim=1)
    return flat.sigmoid() if sigmoid else flat


def _zylo_head(module: nn.Module) -> HeadLayers | None:
    if not all(hasattr(module, name) for name in ("conv_list", "bn_list", "header")):
        return None
    convs, norms, header = _attributes(module, "conv_list", "bn_list", "header")
    layers = [_zylo_separable(block) for block in [*convs, header]]
    if any(bn is not None for _, _, bn in layers):
        raise Mismatch("a separable convolution with a batch norm of its own")
    classes = getattr(module, "num_classes", None)
    return HeadLayers(
        [(dw, pw) for dw, pw, _ in layers[:-1]],
        [list(layer) for layer in zip(*norms, strict=True)],
        layers[-1][:2],
        _activation(_attributes(module, "swish")[0]),
        functools.partial(_flat, values=classes or 4, sigmoid=classes is not None),
    )


#: Each gives a module's description, None when it does not know it, or raises Mismatch.
RECOGNISERS: tuple[Callable[[nn.Module], Description | None], ...] = (
    _protocol,
    _timm_backbone,
    _effdet_fpn,
    _effdet_head,
    _zylo_fpn,
    _zylo_head,
)


def describe(module: nn.Module) -> Description | None:
    """What a backbone, BiFPN or head is made of; None for any other module.

    Raises:
        Mismatch: it is one, but the fused ops cannot compute it.
    """
    for recognise in RECOGNISERS:
        description = recognise(module)
        if description is not None:
            description.check()
            return description
    return None


# --- fused modules --------------------------------------------------------------------------------


class Fused(PackedModule):
    """Mixed into the class of an accelerated module."""

    original_class: type[nn.Module]
    _made_of: dict[str, type]  # the classes of its layers when it was fused, and so compared

    def _check_layers(self) -> None:
        found = _made_of(self)
        for name in self._made_of.keys() | found.keys():
            if found.get(name) is not self._made_of.get(name):
                raise Mismatch(f"its layer {name} was exchanged")
        if describe(self) is None:
            raise Mismatch(f"{self.original_class.__name__} is not recognised any more")

    def pack(self, dtype: torch.dtype) -> Any:
        description = describe(self)
        if description is None:
            raise Mismatch(f"{self.original_class.__name__} is not recognised any more")
        return description.pack(dtype)

    def forward(self, maps: Any) -> Any:
        """The fused ops in eval mode without gradients, otherwise the module's own layers."""
        own = self.original_class.forward
        first = maps[0] if isinstance(maps, (list, tuple)) and maps else maps
        if not isinstance(first, Tensor):
            return own(self, maps)  # which says what it wants
        packed = self.packed(first)
        return own(self, maps) if packed is None else packed[0].run(maps, packed[1])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self.original_class,), self.__getstate__()


_CLASSES: dict[type[nn.Module], type[Fused]] = {}


def _fused_class(original: type[nn.Module]) -> type[Fused]:
    if original not in _CLASSES:
        members = {"original_class": original, "__doc__": original.__doc__, "__module__": __name__}
        fused = type(f"Fused{original.__name__}", (Fused, original), members)
        _CLASSES[original] = cast("type[Fused]", fused)
    return _CLASSES[original]


def _blank(original: type[nn.Module]) -> Fused:
    """A fused module without state, for copies and pickles."""
    fused = _fused_class(original)
    return fused.__new__(fused)


def _made_of(module: nn.Module) -> dict[str, type]:
    """The class of each layer; a synchronised batch norm counts as an ordinary one."""
    return {
        name: nn.BatchNorm2d if type(layer) is nn.SyncBatchNorm else type(layer)
        for name, layer in module.named_modules()
        if layer is not module
    }


def _fuse(module: nn.Module) -> None:
    module.__class__ = _fused_class(type(module))
    cast(Fused, module)._cache = _Cache()
    cast(Fused, module)._made_of = _made_of(module)


def _unfuse(module: nn.Module) -> None:
    cast(Fused, module).unfreeze()
    module.__class__ = cast(Fused, module).original_class
    del module._cache, module._made_of
    vars(module).pop("_frozen", None)


# --- finding and checking parts -------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One backbone, BiFPN or head of a model, and what became of it.

    Attributes:
        name: of the module in the model.
        kind: its class.
        reason: why it was left alone; empty when it was replaced.
        difference: largest difference of the fused result from a float64 one on the sample input,
            as a fraction of the largest value; None when it was not computed.
        own_difference: the same of the module's own layers.
        own_ms, fused_ms: median times; None when they were not measured.
    """

    name: str
    kind: str
    reason: str = ""
    difference: float | None = None
    own_difference: float | None = None
    own_ms: float | None = None
    fused_ms: float | None = None

    @property
    def replaced(self) -> bool:
        """Whether the part runs on fused ops now."""
        return not self.reason


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did; prints as a table.

    Attributes:
        parts: every backbone, BiFPN and head that was found.
        own_ms, fused_ms: median times of the whole network on the sample input.
        sample: what the sample input was, in words.
    """

    parts: list[Part]
    own_ms: float | None = None
    fused_ms: float | None = None
    sample: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def replaced(self) -> list[str]:
        """Names of the modules that run on fused ops now."""
        return [part.name for part in self.parts if part.replaced]

    @property
    def largest_difference(self) -> float:
        """Of all replaced parts, as a fraction of a part's largest value."""
        return max((p.difference or 0.0 for p in self.parts if p.replaced), default=0.0)

    @property
    def gain(self) -> float | None:
        """How many times faster the whole network became; None when it was not measured."""
        return self.own_ms / self.fused_ms if self.own_ms and self.fused_ms else None

    def __str__(self) -> str:
        rows = [["part", "class", "", "before, ms", "after, ms", "gain", "difference"]]
        whole = Part("whole network", "", own_ms=self.own_ms, fused_ms=self.fused_ms)
        for part in [*self.parts, whole] if self.gain else self.parts:
            own, fused = part.own_ms, part.fused_ms
            times = ["", "", ""]
            if own is not None and fused is not None:
                times = [f"{own:.2f}", f"{fused:.2f}", f"{own / fused:.1f}x"]
            done = "" if part is whole else "replaced" if part.replaced else "left alone"
            error = "" if part.difference is None else f"{part.difference:.0e}"
            rows.append([part.name, part.kind, done, *times, error])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 3 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines += [f"{p.name} was left alone: {p.reason}" for p in self.parts if p.reason]
        lines += [f"Sample input: {self.sample}."] if self.sample else []
        return "\n".join([*lines, *self.notes])


_HELP = (
    "describe yours by a method as_fusion_nodes() (a head: as_head_layers()), see edet.describe "
    "and docs/dropin.md"
)


def _find(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name and module of every part, and why it must be left alone (or "")."""
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        reason = ""
        if isinstance(module, Fused):
            reason = "it is accelerated already"
        elif isinstance(module, PackedModule):
            if not any(hasattr(module, method) for method in _METHODS):
                continue
            reason = "it runs on fused ops by itself"
        else:
            try:
                if describe(module) is None:
                    continue
            except Mismatch as error:
                reason = str(error)
            if isinstance(module, torch.jit.ScriptModule):
                reason = "it is TorchScript"
            elif taken := [a for a in _RESERVED if hasattr(module, a)]:
                reason = f"it has an attribute {taken[0]} of its own"
            elif not reason:
                reason = _hooked(module)
        inside = f"{name}." if name else ""
        yield name, module, reason


def _hooked(module: nn.Module) -> str:
    """Why hooks of layers keep ``module`` from being fused, which would not run them; or ""."""
    for name, layer in module.named_modules():
        if layer is not module and (layer._forward_pre_hooks or layer._forward_hooks):
            return f"its layer {name} has a forward hook, as pruning sets one"
    return ""


def _is_backbone(module: nn.Module) -> bool:
    return hasattr(module, "conv_stem") or hasattr(module, "as_backbone_blocks")


def _network(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The smallest module of ``model`` that holds all of ``names``: without its wrappers."""
    split = [name.split(".")[:-1] for name in names]
    common = [
        parts[0]
        for parts in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*split, strict=False))
    ]
    network = model.get_submodule(".".join(common))
    # a container is not a network: it is run by what holds it
    while isinstance(network, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) and common:
        common.pop()
        network = model.get_submodule(".".join(common))
    return network


def _sample(network: nn.Module, sample: Tensor | None) -> Tensor:
    """An image of the network's own size, dtype and device, unless one is given."""
    tensor = next(iter(network.parameters()), torch.empty(0))
    if sample is not None:
        return sample.to(tensor.device, tensor.dtype)
    size = getattr(getattr(network, "config", None), "image_size", (512, 512))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, *size, dtype=torch.float32, generator=generator)
    return images.to(tensor.device, tensor.dtype)


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def _difference(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest difference as a fraction of the largest value; shapes must agree."""
    if [x.shape for x in found] != [x.shape for x in exact]:
        return float("inf")
    differences = [
        float((x.double() - r).abs().max() / r.abs().max().clamp(min=1e-300))
        for x, r in zip(found, exact, strict=True)
        if r.numel()
    ]
    return max(differences, default=0.0)


def _copied(maps: Any) -> Any:
    """A new list of the same maps: effdet's BiFPN appends to the one it is given."""
    return maps if isinstance(maps, Tensor) else type(maps)(maps)


def _own_result(module: nn.Module, maps: Any) -> list[Tensor]:
    """What the layers of ``module`` make of ``maps``."""
    own = getattr(module, "original_class", type(module)).forward
    return _tensors(own(module, _copied(maps)))


def _exact_result(module: nn.Module, maps: Any) -> list[Tensor]:
    """The same in float64; the module is as it was afterwards."""
    state = {n: t.double() if t.is_floating_point() else t for n, t in module.state_dict().items()}
    exact = maps.double() if isinstance(maps, Tensor) else type(maps)(x.double() for x in maps)
    return _tensors(torch.func.functional_call(module, state, (exact,)))


def _time(
    calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Median milliseconds of each call; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def _capture(
    network: nn.Module, modules: Sequence[nn.Module], images: Tensor
) -> dict[nn.Module, Any]:
    """The maps that each of ``modules`` is given when ``network`` runs ``images``."""
    seen: dict[nn.Module, Any] = {}

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.setdefault(module, _copied(args[0]))

    hooks = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        network(images)
    finally:
        for handle in hooks:
            handle.remove()
    return seen


@torch.no_grad()
def accelerate(model: nn.Module, sample: Tensor | None = None, *, rounds: int = 5) -> Report:
    """Replaces the backbone, the BiFPN and the heads of ``model`` by fused ones, in place.

    Known are effdet's models and their EfficientNets of timm, modules built like zylo117's, and
    whatever describes itself by ``as_fusion_nodes``, ``as_head_layers`` or ``as_backbone_blocks``
    (:mod:`edet.describe`), also inside ``DetBenchPredict``, ``DetBenchTrain`` or any other wrapper.
    Modules, parameters, buffers, hooks and state-dict keys stay the same objects. In training mode,
    or when a gradient is needed, the model's own layers run; in eval mode without gradients the
    fused ops do.

    Every part is compared with a float64 run of its own layers on a sample input before it is
    accepted: a part that cannot be matched is left as it was, and the report says why.

    Args:
        model: the model, or a wrapper around it.
        sample: images (N, 3, H, W) that the network is tried with; one random image of the model's
            own size (``config.image_size``, else 512×512) when None.
        rounds: timed runs of every part before and after; 0 measures nothing.

    Returns:
        A report that prints as a table.

    Raises:
        TypeError: ``model`` is not a module, or ``sample`` not a tensor.
        ValueError: ``model`` holds no BiFPN and no head that is known, cannot run ``sample``, or is
            on the meta device; ``rounds`` is negative.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if sample is not None and not isinstance(sample, Tensor):
        raise TypeError(f"sample must be a tensor of images, got {type(sample).__name__}")
    if rounds < 0:
        raise ValueError(f"rounds must be 0 or more, got {rounds}")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("model must have weights to be compared with, got some on the meta device")
    found = list(_find(model))
    if all(_is_backbone(module) for _, module, _ in found):
        raise ValueError(
            f"model must hold a BiFPN or a head that is known, got {type(model).__name__} "
            f"without one: {_HELP}"
        )
    candidates = [(name, module) for name, module, reason in found if not reason]
    parts = {n: Part(n, type(m).__name__, reason) for n, m, reason in found if reason}
    if not candidates:
        return Report([parts[name] for name, _, _ in found], notes=_notes())
    network = _network(model, [name for name, _, _ in found])
    images = _sample(network, sample)
    training = [module for module in network.modules() if module.training]
    network.eval()
    replaced: list[nn.Module] = []
    whole: dict[str, float] = {}
    stance = contextlib.ExitStack()
    if any(module._compiled_call_impl is not None for module in network.modules()):
        # what module.compile() has compiled does not run hooks that are new
        stance.enter_context(torch.compiler.set_stance("force_eager"))
    try:
        try:
            maps = _capture(network, [module for _, module in candidates], images)
        except Exception as error:
            raise ValueError(
                f"sample must be images that {type(network).__name__} can run, got "
                f"{tuple(images.shape)}, for which it says: {error}"
            ) from error
        for name, module in candidates:
            part = _try(name, module, maps.get(module), rounds, images.device)
            parts[name] = part
            replaced += [module] if part.replaced else []
        if replaced and rounds:
            whole = _time_whole(network, replaced, images, rounds)
    except BaseException:
        for _, module in candidates:
            if isinstance(module, Fused):
                _unfuse(module)
        raise
    finally:
        stance.close()
        for module in training:
            module.training = True
    shape = "×".join(map(str, images.shape))
    dtype = str(images.dtype).removeprefix("torch.")
    return Report(
        [parts[name] for name, _, _ in found],
        whole.get("own"),
        whole.get("fused"),
        f"{'random images' if sample is None else 'given images'} {shape}, {dtype}, "
        f"{images.device}, {torch.get_num_threads()} threads; "
        + (f"medians of {rounds} runs, " if rounds else "")
        + "differences from float64 as a fraction of the largest value",
        _notes(),
    )


def _notes() -> list[str]:
    return [] if library.load() else [f"The fused ops run their reference: {library.status()}"]


def _try(name: str, module: nn.Module, maps: Any, rounds: int, device: torch.device) -> Part:
    """Fuses one module if the fused result is right, and times both."""
    kind = type(module).__name__
    if maps is None:
        return Part(name, kind, "the network did not run it on the sample input")
    exact = _exact_result(module, maps)
    own = _difference(_own_result(module, maps), exact)
    if not math.isfinite(own):
        return Part(name, kind, "its own result for the sample input is not finite")
    _fuse(module)
    try:
        result = _tensors(module(_copied(maps)))
        difference = _difference(result, exact)
        check(name, difference, own, result[0].dtype)
    except (CheckFailed, ValueError, TypeError, RuntimeError) as error:
        _unfuse(module)
        wrong = isinstance(error, CheckFailed)
        reason = f"its result differs by {difference:.1e}" if wrong else str(error)
        return Part(name, kind, reason, difference if wrong else None, own)
    times: dict[str, float] = {}
    if rounds:
        times = _time(
            {
                "own": lambda: _own_result(module, maps),
                "fused": lambda: module(_copied(maps)),
            },
            rounds,
            device,
        )
    return Part(name, kind, "", difference, own, times.get("own"), times.get("fused"))


def _time_whole(
    network: nn.Module, replaced: Sequence[nn.Module], images: Tensor, rounds: int
) -> dict[str, float]:
    """Median milliseconds of the network with its own layers and with the fused ones."""

    def own() -> None:
        classes = [type(module) for module in replaced]
        for module in replaced:
            module.__class__ = cast(Fused, module).original_class
        try:
            network(images)
        finally:
            for module, fused in zip(replaced, classes, strict=True):
                module.__class__ = fused

    return _time({"own": own, "fused": lambda: network(images)}, rounds, images.device)


def restore(model: nn.Module) -> list[str]:
    """Undoes :func:`accelerate`: every part runs its own layers again.

    Returns:
        Names of the modules that were restored.
    """
    fused = [(name, m) for name, m in model.named_modules() if isinstance(m, Fused)]
    for _, module in fused:
        _unfuse(module)
    return [name for name, _ in fused]
