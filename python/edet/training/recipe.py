"""The parts of the published recipe: optimisers, warm-up and cosine, a moving average of weights.

EfficientDet paper, section 5.1, and the published code where the paper is silent.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..fused.module import PackedModule

#: For a batch of one image: 0.16 for the published 128.
LEARNING_RATE = 0.16 / 128

#: Of AdamW, for any batch; nothing is published for it.
ADAMW_LEARNING_RATE = 3e-4


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for the convolutions' weights, none for biases, norms and edge weights."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() == 4], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() != 4], "weight_decay": 0.0},
    ]


def sgd(
    model: nn.Module,
    learning_rate: float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 4e-5,
) -> torch.optim.SGD:
    """SGD with weight decay on the convolutions' weights, not on biases, norms or edge weights."""
    return torch.optim.SGD(_groups(model, weight_decay), learning_rate, momentum=momentum)


def adamw(
    model: nn.Module,
    learning_rate: float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
) -> torch.optim.AdamW:
    """AdamW with weight decay on the convolutions' weights; ``momentum`` is its β₁."""
    return torch.optim.AdamW(_groups(model, weight_decay), learning_rate, betas=(momentum, 0.999))


class WarmupCosine:
    """The factor of the learning rate at a step; see :func:`warmup_cosine`."""

    def __init__(self, steps: int, warmup_steps: int) -> None:
        if not 0 <= warmup_steps < steps:
            raise ValueError(
                f"warmup_steps must be 0 ≤ warmup_steps < steps ({steps}), got {warmup_steps}"
            )
        self.steps, self.warmup_steps = steps, warmup_steps

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return step / self.warmup_steps
        done = min((step - self.warmup_steps) / (self.steps - self.warmup_steps), 1.0)
        return 0.5 * (1 + math.cos(math.pi * done))


def warmup_cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises linearly from 0 for ``warmup_steps``, then falls to 0 as a cosine."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, WarmupCosine(steps, warmup_steps))


_Module = TypeVar("_Module", bound=nn.Module)


def _wide(model: _Module) -> _Module:
    """``model`` with its 16-bit tensors in float32."""

    def widen(tensor: Tensor) -> Tensor:
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        return tensor.float() if half else tensor

    return model._apply(widen)


class MovingAverage(Generic[_Module]):
    """An exponential moving average of a model's weights and statistics.

    Early on it forgets faster, decay (1 + n)/(10 + n) after n updates, as TensorFlow's does. That
    of a 16-bit model is kept in float32, in which small steps are not lost.

    Attributes:
        model: a copy in eval mode with the averaged weights: the one to evaluate and to save.
        updates: how many there were; without it a resumed average forgets too fast.
    """

    def __init__(self, model: _Module, decay: float = 0.9998) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.model = _wide(copy.deepcopy(model)).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards ``model``, in a few launches."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, news = self.model.state_dict().values(), model.state_dict().values()
        moving, moved, counters, counted = [], [], [], []
        for average, new in zip(averages, news, strict=True):
            if average.is_floating_point():
                moving.append(average)
                moved.append(new.to(average.dtype))
            else:
                counters.append(average)
                counted.append(new)
        if moving:
            torch._foreach_lerp_(moving, moved, 1 - decay)
        if counters:
            torch._foreach_copy_(counters, counted)
        self.changed()

    def changed(self) -> None:
        """Has the averaged model, and every predictor of it, see the weights as they are now."""
        for module in self.model.modules():
            if isinstance(module, PackedModule):
                module.unfreeze()
                module.repack()
