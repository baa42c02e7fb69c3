"""Parts of a network on bytes: from float weights and ranges to the ops of edet_kernels.int8.

Each class has ``run``, which computes from float maps to float maps as the float part does, and
``watch``, which computes the float part by PyTorch's layers and shows every map that has a range.
A map between ops has one range; maps inside of an op have one for each channel, at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

import edet_kernels
from edet_kernels import int8, reference

from .packed import PackedBackbone, PackedHead, PackedNodes, Parts
from .ranges import Int8, Steps, rounded_weight

#: Shows a map by its name; ``per_channel``: it has a range for each channel.
See = Callable[[str, Tensor, bool], None]


def _skip(name: str, x: Tensor, per_channel: bool) -> None:
    """Shows nothing."""


def _rows(*rows: Tensor) -> Tensor:
    return torch.stack([row.expand(rows[0].shape) for row in rows]).float().contiguous()


def requantisation(scale: Tensor, shift: Tensor, steps: Steps, activation: str) -> Tensor:
    """The rows (4, C) from a sum to the bytes of ``steps``: activation(scale·sum + shift)."""
    if activation == "swish":
        return _rows(2 * scale, 2 * shift, 0.25 / steps.scale, steps.zero)
    if activation == "hard_swish":
        return _rows(scale, shift, 1 / (6 * steps.scale), steps.zero)
    low, high = torch.zeros_like(scale), torch.full_like(scale, 255.0)
    if activation in ("relu", "relu6"):
        low = steps.zero.expand(scale.shape)
    if activation == "relu6":
        high = torch.minimum(high, steps.zero + 6 / steps.scale)
    return _rows(scale / steps.scale, shift / steps.scale + steps.zero, low, high)


def _pointwise(
    weight: Tensor, source: Steps, mean: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed int8 weight (C_out, C_in, 1, 1) of bytes; scale and shift from its sums to values.

    What rounding the weight does to a map of means ``mean`` is taken off the shift (Nagel et al.
    2019, section 4.2).
    """
    columns = source.wide(weight.shape[1])
    exact = (weight.double() * columns.scale.view(1, -1, 1, 1)).flatten(1)
    whole, own = rounded_weight(exact)
    error = ((exact - whole * own[:, None]) * (mean.double() / columns.scale)).sum(1)
    shift = shift.double() + scale.double() * error
    scale = scale.double() * own
    packed = edet_kernels.pack_pointwise_int8(whole[:, :, None, None].to(torch.int8))
    return packed, scale, shift - scale * (whole * columns.zero).sum(1)


def _depthwise(
    weight: Tensor, source: Steps, mean: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a depthwise weight (C, 1, k, k)."""
    steps = source.wide(weight.shape[0])
    exact = weight.double().flatten(1)
    whole, own = rounded_weight(exact)
    error = (exact - whole * own[:, None]).sum(1) * mean.double()
    shift = shift.double() + scale.double() * error
    scale = scale.double() * own * steps.scale
    packed = edet_kernels.pack_depthwise_int8(whole.view(weight.shape).to(torch.int8))
    return packed, scale, shift - scale * whole.sum(1) * steps.zero


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype != torch.float32:
        raise ValueError(f"a quantised model must compute from float32 maps, got {dtype}")


class Int8Block:
    """One inverted residual block's arguments of :func:`edet_kernels.int8.mbconv`."""

    def __init__(
        self,
        weights: tuple[Parts | None, Parts, Parts | None, Parts],
        source: Steps,
        middle: tuple[Steps | None, Steps],
        target: Steps,
        means: tuple[Tensor, Tensor | None, Tensor],
        activation: str,
        residual: bool,
    ) -> None:
        expand, depthwise, squeeze, project = weights
        inside, mid = middle
        mean, mean_inside, mean_mid = means
        self.expand: tuple[Tensor, Tensor] | None = None
        before = source
        if expand is not None and inside is not None and mean_inside is not None:
            weight = edet_kernels.unpack_pointwise(expand[0], expand[1].numel())
            packed, scale, shift = _pointwise(weight, source, mean, *expand[1:])
            self.expand = packed, requantisation(scale, shift, inside, activation)
            before, mean = inside, mean_inside
        weight = edet_kernels.unpack_depthwise(depthwise[0])
        c_mid, c_out = weight.shape[0], project[1].numel()
        packed, scale, shift = _depthwise(weight, before, mean, *depthwise[1:])
        rows = requantisation(scale, shift, mid, activation)
        pad = before.wide(c_mid).zero.to(torch.uint8).contiguous()
        self.depthwise = packed, rows, pad

        (out_scale, out_zero), (in_scale, in_zero) = target.one, source.one
        self.residual = in_scale / out_scale if residual else 0.0
        constant = out_zero - in_zero * self.residual
        weight = edet_kernels.unpack_pointwise(project[0], c_out)
        self.squeeze: tuple[Tensor, ...] | None = None
        if squeeze is None:
            packed, scale, shift = _pointwise(weight, mid, mean_mid, *project[1:])
            self.project = packed, _rows(scale / out_scale, shift / out_scale + constant)
            return
        steps = mid.wide(c_mid)
        reduce, reduce_bias, excite, excite_bias = squeeze
        reduced = reduce_bias.numel()
        whole, own = rounded_weight(
            edet_kernels.unpack_pointwise(reduce, reduced).flatten(1) * steps.scale, 32767
        )
        # means and the values in the middle are in steps of 2^−16
        factor = 2.0 if activation == "swish" else 1.0
        reduce_rows = _rows(factor * own / 65536, factor * reduce_bias.double())
        back, own = rounded_weight(edet_kernels.unpack_pointwise(excite, c_mid).flatten(1), 32767)
        excite_rows = _rows(own / 65536, excite_bias.double())
        self.squeeze = (
            whole.to(torch.int16),
            reduce_rows,
            back.to(torch.int16),
            excite_rows,
            steps.zero.float().contiguous(),
        )
        scaled = (weight.double() * steps.scale.view(1, -1, 1, 1)).float()
        scale, shift = project[1].double() / out_scale, project[2].double() / out_scale
        self.project = edet_kernels.pack_pointwise(scaled), _rows(scale, shift + constant)


def watch_block(
    x: Tensor,
    weights: tuple[Parts | None, Parts, Parts | None, Parts],
    stride: int,
    padding: str,
    activation: str,
    residual: bool,
    see: Callable[[str, Tensor], None],
) -> Tensor:
    """:func:`edet_kernels.reference.mbconv`, showing the maps inside."""
    expand, (dw_weight, scale, shift), squeeze, project = weights
    y = x
    if expand is not None:
        y = reference.activate(reference.pointwise(y, *expand), activation)
        see("expand", y)
    y = reference.convolve(
        y, edet_kernels.unpack_depthwise(dw_weight), stride, padding, groups=y.shape[1]
    )
    y = reference.activate(y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), activation)
    see("depthwise", y)
    if squeeze is not None:
        reduce, reduce_bias, excite, excite_bias = squeeze
        gate = y.mean((2, 3), keepdim=True)
        ones = torch.ones_like
        gate = reference.pointwise(gate, reduce, ones(reduce_bias), reduce_bias)
        gate = reference.activate(gate, activation)
        y = y * reference.pointwise(gate, excite, ones(excite_bias), excite_bias).sigmoid()
    y = reference.pointwise(y, *project)
    return x + y if residual else y


class Int8Backbone:
    """A backbone whose blocks run on bytes, but for those that are kept; the stem is float.

    Args:
        packed: the float weights.
        settings: ranges ``stem``, and of each block i ``i.expand``, ``i.depthwise`` and ``i.out``;
            a block i is kept by its name ``i``.
    """

    def __init__(
        self, packed: PackedBackbone, settings: Int8, dtype: torch.dtype = torch.float32
    ) -> None:
        _check_dtype(dtype)
        self.packed = packed
        steps = {name: Steps.of(ends) for name, ends in settings.ranges.items()}
        self.steps = [steps["stem"]]
        self.blocks: list[Int8Block | None] = []
        before, means = "stem", settings.means
        for i, (block, weights) in enumerate(zip(*self._pairs(), strict=True)):
            target = steps[f"{i}.out"]
            kept = str(i) in settings.keep
            middle = steps.get(f"{i}.expand"), steps[f"{i}.depthwise"]
            seen = means[before], means.get(f"{i}.expand"), means[f"{i}.depthwise"]
            activation, residual = packed.source.activation, block.residual
            self.blocks.append(
                None
                if kept
                else Int8Block(weights, self.steps[-1], middle, target, seen, activation, residual)
            )
            self.steps.append(target)
            before = f"{i}.out"

    def _pairs(self) -> tuple[Sequence[Any], Sequence[Any]]:
        return self.packed.source.blocks, self.packed.blocks

    def _stem(self, images: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
        """The first map's bytes."""
        source, (scale, zero) = self.packed.source, self.steps[0].one
        return int8.stem(
            images.float() if mean is None or images.dtype != torch.uint8 else images,
            *self.packed.stem,
            mean=mean,
            std=std,
            padding=source.padding,
            activation=source.activation,
            inverse=1 / scale,
            zero=zero,
        )

    def run(
        self,
        images: Tensor,
        dtype: torch.dtype,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        see: See = _skip,
    ) -> list[Tensor]:
        """The float maps of ``images``, as :meth:`PackedBackbone.run` gives them."""
        source = self.packed.source
        u: Tensor | None = self._stem(images, mean, std)  # as bytes; None: not known
        x: Tensor | None = None  # as floats
        maps = []
        for i, (block, weights) in enumerate(zip(*self._pairs(), strict=True)):
            options = {
                "stride": block.depthwise[0].stride[0],
                "padding": source.padding,
                "activation": source.activation,
            }
            scale, zero = self.steps[i].one
            own = self.blocks[i]
            if own is None:
                if x is None:
                    x = int8.dequantize(cast(Tensor, u), scale, zero)
                x, u = edet_kernels.mbconv(x, *weights, **options, residual=block.residual), None
            else:
                if u is None:
                    u = int8.quantize(cast(Tensor, x), 1 / scale, zero)
                u = int8.mbconv(
                    u, own.expand, own.depthwise, own.squeeze, own.project,
                    **options, residual=own.residual,
                )  # fmt: skip
                x = None
            if i in source.returned or see is not _skip:
                if x is None:
                    x = int8.dequantize(cast(Tensor, u), *self.steps[i + 1].one)
                see(f"{i}.out", x, False)
                if i in source.returned:
                    maps.append(x)
        return maps

    @staticmethod
    def watch(packed: PackedBackbone, images: Tensor, see: See) -> list[Tensor]:
        """The float maps of normalised images, each shown to ``see``."""
        source = packed.source
        x = reference.stem(
            images, *packed.stem, padding=source.padding, activation=source.activation
        )
        see("stem", x, False)
        maps = []
        for i, (block, weights) in enumerate(zip(source.blocks, packed.blocks, strict=True)):

            def inside(name: str, y: Tensor, number: int = i) -> None:
                see(f"{number}.{name}", y, True)

            stride = block.depthwise[0].stride[0]
            x = watch_block(
                x, weights, stride, source.padding, source.activation, block.residual, inside
            )
            see(f"{i}.out", x, False)
            if i in source.returned:
                maps.append(x)
        return maps


class _Layers:
    """The lists that :func:`edet_kernels.int8.nodes` takes, a layer after the other."""

    def __init__(self) -> None:
        self.parts: list[list[Tensor]] = [[], [], [], [], []]

    def add(self, *rows: Sequence[Tensor]) -> None:
        """A layer's tensors of its nodes: fuse rows, dw weights, mid rows, pw weights, out rows."""
        for part, tensors in zip(self.parts, rows, strict=True):
            part.append(torch.stack(list(tensors)).contiguous())


class Int8Nodes:
    """A feature network on bytes: projections and nodes.

    Args:
        packed: the float weights; the levels above the backbone's are one projection, pooled.
        settings: ranges ``input.i`` of the given maps, ``edge.j`` of what the nodes read,
            ``i.fused``, ``i.mid`` and ``i.out`` of each node.
    """

    def __init__(
        self, packed: PackedNodes, settings: Int8, dtype: torch.dtype = torch.float32
    ) -> None:
        _check_dtype(dtype)
        if packed.pool == "zero" or packed.above:
            raise ValueError(
                "fpn must be kept in float: its levels above the backbone's are made in a way that "
                "has no int8 op"
            )
        self.packed, self.means = packed, settings.means
        steps = {name: Steps.of(ends) for name, ends in settings.ranges.items()}
        self.inputs = [steps[f"input.{i}"] for i in range(packed.inputs)]
        self._project(steps)
        self.edges = [steps[f"edge.{j}"] for j in range(self.count)]
        self.edges += [steps[f"{i}.out"] for i in range(len(packed.nodes))]
        self.layers = _Layers()
        kinds = sorted({len(ids) for ids in packed.nodes})
        self.layer_list = [kinds.index(len(ids)) for ids in packed.nodes]
        for kind in range(len(kinds)):
            of_kind = [i for i, k in enumerate(self.layer_list) if k == kind]
            rows = [self._node(i, steps) for i in of_kind]
            self.layers.add(*zip(*rows, strict=True))

    def _project(self, steps: dict[str, Steps]) -> None:
        """Weights of the projections; how many maps the nodes are given."""
        packed = self.packed
        self.lateral: list[tuple[list[Tensor], list[Tensor]]] = []
        place = 0
        for i in range(packed.inputs):
            place += packed.raw[i]
            weights, rows = [], []
            for weight, scale, shift in zip(*packed.lateral[i], strict=True):
                target = steps[f"edge.{place}"]  # of the pooled one, the first pooled map
                conv = edet_kernels.unpack_pointwise(weight, scale.numel())
                int8_weight, scale, shift = _pointwise(
                    conv, self.inputs[i], self.means[f"input.{i}"], scale, shift
                )
                weights.append(int8_weight)
                rows.append(_rows(scale / target.scale, shift / target.scale + target.zero))
                place += 1
            self.lateral.append((weights, rows))
        self.count = place + (self._pooled(packed.inputs - 1) - 1 if packed.chained else 0)

    def _pooled(self, i: int) -> int:
        packed = self.packed
        return packed.levels - packed.inputs if packed.chained and i == packed.inputs - 1 else 0

    def _node(self, i: int, steps: dict[str, Steps]) -> tuple[Tensor, ...]:
        packed = self.packed
        ids, channels = packed.nodes[i], packed.scale.shape[1]
        fused = steps[f"{i}.fused"].wide(channels)
        mid, target = steps[f"{i}.mid"], self.edges[self.count + i]
        weights = None if packed.edge_weights is None else packed.edge_weights[i]
        factors = reference.fusion_coefficients(weights, len(ids), packed.fusion)
        rows, shift = [], torch.zeros(channels, dtype=torch.float64)
        activation = packed.activations["pre_activation"]
        double = 2.0 if activation == "swish" else 1.0
        for k, edge in enumerate(ids):
            own = torch.ones(1) if factors is None else factors[k]
            factor = double * own.double() * self.edges[edge].scale
            rows.append(factor.expand(channels))
            shift = shift - factor * self.edges[edge].zero
        most = {"swish": 0.25, "hard_swish": 1 / 6}.get(activation, 1.0)
        fuse = _rows(*rows, shift, most / fused.scale, fused.zero)
        ones, none = torch.ones(channels), torch.zeros(channels)
        weight = edet_kernels.unpack_depthwise(packed.dw_weight[i])
        dw, scale, shift = _depthwise(weight, fused, self.means[f"{i}.fused"], ones, none)
        mid_rows = _rows(scale / mid.scale, shift / mid.scale + mid.zero)
        weight = edet_kernels.unpack_pointwise(packed.pw_weight[i], channels)
        mean = self.means[f"{i}.mid"]
        pw, scale, shift = _pointwise(weight, mid, mean, packed.scale[i], packed.shift[i])
        out = requantisation(scale, shift, target, packed.activations["post_activation"])
        return fuse, dw, mid_rows, pw, out

    def run(self, maps: Sequence[Tensor], dtype: torch.dtype, see: See = _skip) -> Any:
        """What the network makes of float ``maps``, as :meth:`PackedNodes.run` gives it."""
        packed = self.packed
        sizes = [(int(x.shape[-2]), int(x.shape[-1])) for x in maps]
        while len(sizes) < packed.levels:
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        inputs: list[Tensor] = []
        for i, x in enumerate(maps):
            scale, zero = self.inputs[i].one
            u = int8.quantize(x.to(dtype), 1 / scale, zero)
            if packed.raw[i]:
                inputs.append(u)
            if self.lateral[i][0]:
                pooled = self._pooled(i)
                inputs += int8.lateral(u, *self.lateral[i], pooled=pooled, pool=packed.pool)
        every = range(self.count, self.count + len(packed.nodes))
        outputs = packed.outputs if see is _skip else list(every)
        found = int8.nodes(
            inputs,
            *self.layers.parts,
            layers=self.layer_list,
            edges=packed.nodes,
            sizes=[sizes[level] for level in packed.node_levels],
            outputs=outputs,
            pool=packed.pool,
            pre_activation=packed.activations["pre_activation"],
            post_activation=packed.activations["post_activation"],
        )
        values = {
            o: int8.dequantize(u, *self.edges[o].one) for o, u in zip(outputs, found, strict=True)
        }
        for o, x in values.items():
            see(f"{o - self.count}.out", x, False)
        return packed.finish([values[o] for o in packed.outputs])

    @staticmethod
    def watch(packed: PackedNodes, maps: Sequence[Tensor], see: See) -> list[Tensor]:
        """The float maps of the network, each map inside shown to ``see``."""
        for i, x in enumerate(maps):
            see(f"input.{i}", x, False)
        inputs, sizes = packed.node_inputs(maps, maps[0].dtype)
        known = list(inputs)
        if packed.chained:  # pooled maps have the bytes of the first of them
            shared = len(inputs) - (packed.levels - packed.inputs)
        for j, x in enumerate(inputs):
            see(f"edge.{j}", x, False)
            if packed.chained and j > shared:
                see(f"edge.{shared}", x, False)
        for i, ids in enumerate(packed.nodes):
            x = reference.weighted_fusion(
                [known[e] for e in ids],
                None if packed.edge_weights is None else packed.edge_weights[i],
                size=sizes[packed.node_levels[i]],
                fusion=packed.fusion,
                pool=packed.pool,
                activation=packed.activations["pre_activation"],
            )
            see(f"{i}.fused", x, True)
            x = reference.depthwise(x, packed.dw_weight[i])
            see(f"{i}.mid", x, True)
            x = reference.pointwise(x, packed.pw_weight[i], packed.scale[i], packed.shift[i])
            x = reference.activate(x, packed.activations["post_activation"])
            see(f"{i}.out", x, False)
            known.append(x)
        return [known[o] for o in packed.outputs]


class Int8Head:
    """A head on bytes, from float maps to float predictions.

    Args:
        packed: the float weights.
        settings: ranges ``input.v`` of each level, and of each layer i ``i.mid`` and, on each
            level, ``i.v.out``; ``predict`` keeps the last layer in float.
    """

    def __init__(
        self, packed: PackedHead, settings: Int8, dtype: torch.dtype = torch.float32
    ) -> None:
        _check_dtype(dtype)
        self.packed, self.means = packed, settings.means
        steps = {name: Steps.of(ends) for name, ends in settings.ranges.items()}
        self.levels = sum(name.startswith("input.") for name in steps)
        self.inputs = [steps[f"input.{v}"] for v in range(self.levels)]
        self.depth = len(packed.scales)
        self.keeps_last = "predict" in settings.keep
        self.layers = _Layers()
        before = self.inputs
        for i in range(self.depth - self.keeps_last):
            last = i == self.depth - 1
            after = [] if last else [steps[f"{i}.{v}.out"] for v in range(self.levels)]
            self.layers.add(*self._layer(i, before, steps[f"{i}.mid"], after))
            before = after
        self.hidden = before

    def _layer(
        self, i: int, before: Sequence[Steps], mid: Steps, after: Sequence[Steps]
    ) -> tuple[Any, ...]:
        dw_packed, pw_packed, scales, shifts = (part[i] for part in self.packed[:4])
        channels, c_out = dw_packed.shape[1], scales.shape[-1]
        weight = edet_kernels.unpack_depthwise(dw_packed)
        conv = edet_kernels.unpack_pointwise(pw_packed, c_out)
        ones, none = torch.ones(channels), torch.zeros(channels)
        fuse, mids, outs = [], [], []
        for v, source in enumerate(before):
            fuse.append(_rows(source.wide(channels).zero))
            mean = self.means[f"{i - 1}.{v}.out" if i else f"input.{v}"]
            dw, scale, shift = _depthwise(weight, source, mean, ones, none)
            mids.append(_rows(scale / mid.scale, shift / mid.scale + mid.zero))
            norm = (x[v] if x.dim() == 2 else x for x in (scales, shifts))
            pw, scale, shift = _pointwise(conv, mid, self.means[f"{i}.mid"], *norm)
            outs.append(
                requantisation(scale, shift, after[v], self.packed.activation)
                if after
                else _rows(scale, shift)
            )
        return fuse, [dw], mids, [pw], outs

    def run(self, maps: Sequence[Tensor], dtype: torch.dtype, see: See = _skip) -> Any:
        """What the head makes of float ``maps``, as :meth:`PackedHead.run` gives it."""
        inputs = []
        for x, steps in zip(maps, self.inputs, strict=True):
            scale, zero = steps.one
            inputs.append(int8.quantize(x.to(dtype), 1 / scale, zero))
        levels, count = self.levels, len(self.layers.parts[0])
        found: list[Tensor] = inputs
        if count:
            found = int8.nodes(
                inputs,
                *self.layers.parts,
                # all layers of a level, then the next: a map is read while it is in the cache
                layers=list(range(count)) * levels,
                edges=[
                    (levels + v * count + i - 1,) if i else (v,)
                    for v in range(levels)
                    for i in range(count)
                ],
                sizes=[tuple(x.shape[-2:]) for x in inputs for _ in range(count)],  # type: ignore[misc]
                outputs=[levels + (v + 1) * count - 1 for v in range(levels)],
                post_activation=self.packed.activation,
            )
        if self.keeps_last:
            hidden = [
                int8.dequantize(u, *steps.one) for u, steps in zip(found, self.hidden, strict=True)
            ]
            last = [part[-1] for part in self.packed[:4]]
            found = edet_kernels.separable_conv(hidden, *last, activation="none")
        for v, x in enumerate(found):
            see(f"predict.{v}", x, False)
        return self.packed.finish(found)

    @staticmethod
    def watch(packed: PackedHead, maps: Sequence[Tensor], see: See) -> list[Tensor]:
        """The float predictions, each map inside shown to ``see``."""
        for v, x in enumerate(maps):
            see(f"input.{v}", x, False)
        found = list(maps)
        for i, (dw, pw, scales, shifts) in enumerate(zip(*packed[:4], strict=True)):
            last = i == len(packed.scales) - 1
            for v, x in enumerate(found):
                x = reference.depthwise(x, dw)
                see(f"{i}.mid", x, True)
                norm = [t[v] if t.dim() == 2 else t for t in (scales, shifts)]
                x = reference.pointwise(x, pw, *norm)
                found[v] = x if last else reference.activate(x, packed.activation)
                see(f"predict.{v}" if last else f"{i}.{v}.out", found[v], False)
        return found
