"""Batch norms in training as a scale and an offset, for layers that run on ``training_node``.

The op hands out the statistics of its maps; here they become what the next op multiplies and adds,
and move the running statistics exactly as PyTorch's layers do. Gradients flow through all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edet_kernels.autocast import autocast_dtype
from edet_kernels.backend import runs_reference

from ..fused.module import PackedModule
from ..fused.sources import is_traced, layers_reason


class _Sum(torch.autograd.Function):
    """The sum over the processes of a group, whose gradient is that sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


class SharedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose statistics in training are those of all processes' maps, on any device.

    ``nn.SyncBatchNorm`` is the same on GPUs alone, and faster there.
    """

    #: As ``nn.SyncBatchNorm`` has it; None for all processes.
    process_group: Any = None

    @classmethod
    def like(cls, norm: nn.BatchNorm2d) -> SharedBatchNorm2d:
        """A norm with the tensors and settings of ``norm``."""
        shared = cls(
            norm.num_features,
            norm.eps,
            norm.momentum,
            norm.affine,
            norm.track_running_stats,
            device="meta",
        )
        for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
            setattr(shared, name, tensor)
        return shared.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not torch.distributed.is_initialized():
            return super().forward(x)
        count = x.numel() // x.shape[1]
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean = wide.mean((0, 2, 3))
        deviations = (wide - mean.view(1, -1, 1, 1)).square().sum((0, 2, 3))
        scale, offset = normalise([self], mean[None], deviations[None], [count])
        return (wide * scale.view(1, -1, 1, 1) + offset.view(1, -1, 1, 1)).to(x.dtype)


class Normalised(NamedTuple):
    """A map scale·x + offset that is not written down: x and, (C,), the scale and the offset."""

    x: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None

    def tensor(self) -> Tensor:
        """The map itself."""
        if self.scale is None or self.offset is None:
            return self.x
        scale, offset = self.scale.view(-1, 1, 1), self.offset.view(-1, 1, 1)
        return torch.addcmul(offset, self.x.to(scale.dtype), scale).to(self.x.dtype)

    @staticmethod
    def stack(maps: Sequence[Normalised]) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """The maps, and their scales and offsets (maps, C) if any has them."""
        scales = [m.scale for m in maps if m.scale is not None]
        if not scales:
            return [m.x for m in maps], None, None
        one, zero = torch.ones_like(scales[0]), torch.zeros_like(scales[0])
        return (
            [m.x for m in maps],
            torch.stack([one if m.scale is None else m.scale for m in maps]),
            torch.stack([zero if m.offset is None else m.offset for m in maps]),
        )


def training_maps(
    module: PackedModule, maps: Sequence[Tensor], ops: Sequence[str] = ("training_node",)
) -> list[Tensor] | None:
    """The maps in the dtype to compute in, or None where ``module``'s own layers must run.

    Its layers must run outside of training and in torch.export, where one of ``ops`` has no
    kernel, and where there is a hook on them or another kind of layer in their place.
    """
    if not module.training or not module.fused:
        return None
    if torch.compiler.is_exporting() or is_traced():
        return None
    maps = [x.to(autocast_dtype(x) or x.dtype) for x in maps]
    if any(runs_reference(op, maps[:1]) for op in ops):
        return None
    if layers_reason(module):
        return None
    for m in module.modules():
        if m._backward_hooks or m._backward_pre_hooks:
            return None
        if isinstance(m, _BatchNorm) and not (m.affine and m.track_running_stats):
            return None
    return maps


def _synchronised(
    norm: nn.SyncBatchNorm | SharedBatchNorm2d, mean: Tensor, deviations: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics over the processes of ``norm``'s group (Chan, Golub & LeVeque 1983)."""
    group = norm.process_group or torch.distributed.group.WORLD
    if torch.distributed.get_world_size(group) == 1:
        return mean, deviations, counts
    total = counts.clone()
    torch.distributed.all_reduce(total, group=group)
    average = _Sum.apply(mean * (counts / total), group)
    own = deviations + counts * (mean - average).square()
    return average, _Sum.apply(own, group), total


def normalise(
    norms: Sequence[nn.BatchNorm2d], mean: Tensor, deviations: Tensor, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Scale and offset, (norms, C), of batch norms over maps with these statistics.

    Running statistics move where a norm is in training mode; where it is not, as in a model whose
    batch norms are frozen, they are what it normalises with.

    Args:
        norms: one per map.
        mean: (norms, C) of each map.
        deviations: (norms, C), sums of squared deviations from ``mean``.
        counts: values per channel of each map.

    Raises:
        ValueError: a norm in training mode has one value per channel.
    """
    n = torch.tensor(counts, dtype=mean.dtype, device=mean.device).unsqueeze(1)
    first = norms[0]
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    shared = False
    if distributed and isinstance(first, nn.SyncBatchNorm | SharedBatchNorm2d):
        mean, deviations, n = _synchronised(first, mean, deviations, n)
        # counts that other processes add to are not looked at: a GPU would have to be waited for
        shared = torch.distributed.get_world_size(first.process_group) > 1
    alone = zip(norms, () if shared else counts, strict=False)
    if any(norm.training and count == 1 for norm, count in alone):
        raise ValueError(
            "maps must have more than 1 value per channel in training, got 1: "
            "give larger images or a larger batch"
        )
    variance = deviations / n
    with torch.no_grad():
        unbiased = deviations / (n - 1)
        for i, norm in enumerate(norms):
            if norm.training:
                _move(norm, mean[i], unbiased[i])
    if not all(norm.training for norm in norms):
        used = [
            (mean[i], variance[i]) if norm.training else (norm.running_mean, norm.running_var)
            for i, norm in enumerate(norms)
        ]
        mean, variance = (torch.stack(tensors) for tensors in zip(*used, strict=True))
    if all(norm.eps == first.eps for norm in norms):
        variance = variance + first.eps
    else:
        variance = variance + variance.new_tensor([[norm.eps] for norm in norms])
    scale = torch.stack([norm.weight for norm in norms]) * variance.rsqrt()
    return scale, torch.stack([norm.bias for norm in norms]) - mean * scale


def _move(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Moves the running statistics towards a batch's, as ``torch.nn.BatchNorm2d`` does."""
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:  # a cumulative average
        momentum = 1.0 / float(norm.num_batches_tracked)
    norm.running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    norm.running_var.mul_(1 - momentum).add_(variance, alpha=momentum)
