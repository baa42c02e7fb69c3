"""The published recipe: SGD, warm-up and cosine, a moving average of the weights, clipping.

EfficientDet paper, section 5.1, and the published code where the paper is silent.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..detection.anchors import model_anchors
from ..fused.module import PackedModule
from ..models.efficientdet import EfficientDet
from .losses import Losses, detection_loss
from .targets import assign_targets

#: For a batch of one image: 0.16 for the published 128.
LEARNING_RATE = 0.16 / 128


def sgd(
    model: nn.Module,
    learning_rate: float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 4e-5,
) -> torch.optim.SGD:
    """SGD with weight decay on the convolutions' weights, not on biases, norms or edge weights."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() == 4], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() != 4], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, learning_rate, momentum=momentum)


def warmup_cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises linearly from 0 for ``warmup_steps``, then falls to 0 as a cosine."""
    if not 0 <= warmup_steps < steps:
        raise ValueError(
            f"warmup_steps must be 0 ≤ warmup_steps < steps ({steps}), got {warmup_steps}"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        done = min((step - warmup_steps) / (steps - warmup_steps), 1.0)
        return 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class MovingAverage:
    """An exponential moving average of a model's weights and statistics.

    Early on it forgets faster, decay (1 + n)/(10 + n) after n updates, as TensorFlow's does.

    Attributes:
        model: a copy in eval mode with the averaged weights: the one to evaluate and to save.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9998) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards ``model``."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, new in zip(
            self.model.state_dict().values(), model.state_dict().values(), strict=True
        ):
            if average.is_floating_point():
                average.lerp_(new, 1 - decay)
            else:
                average.copy_(new)
        for part in self.model.modules():
            if isinstance(part, PackedModule):
                part.repack()


class Trainer:
    """Trains a model by the published recipe, a batch at a time.

    >>> trainer = Trainer(model, steps=10_000, batch_size=16)  # doctest: +SKIP
    >>> for images, boxes, labels in batches:  # doctest: +SKIP
    ...     losses = trainer.step(images, boxes, labels)
    >>> edet.save_checkpoint(trainer.average.model, "trained.pt")  # doctest: +SKIP

    Args:
        model: it is put into training mode. On several GPUs convert its batch norms by
            ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` first, as was published, and pass
            ``forward=DistributedDataParallel(model)``.
        steps: in all.
        batch_size: images of a step over all processes; scales the learning rate.
        learning_rate: the highest; 0.16·batch_size/128 when None.
        warmup_steps: a twentieth of ``steps`` when None; published is one epoch.
        momentum, weight_decay, average_decay: as published.
        clip_norm: the gradient's norm is limited to this.
        forward: what computes the predictions; ``model`` when None.

    Attributes:
        model, optimizer, schedule: whose state a checkpoint to resume from needs, besides
        average: the :class:`MovingAverage`.
    """

    def __init__(
        self,
        model: EfficientDet,
        *,
        steps: int,
        batch_size: int,
        learning_rate: float | None = None,
        warmup_steps: int | None = None,
        momentum: float = 0.9,
        weight_decay: float = 4e-5,
        average_decay: float = 0.9998,
        clip_norm: float = 10.0,
        forward: nn.Module | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model.train()
        self.forward = model if forward is None else forward
        rate = LEARNING_RATE * batch_size if learning_rate is None else learning_rate
        self.optimizer = sgd(model, rate, momentum=momentum, weight_decay=weight_decay)
        warmup = steps // 20 if warmup_steps is None else warmup_steps
        self.schedule = warmup_cosine(self.optimizer, steps, warmup)
        self.average = MovingAverage(model, average_decay)
        self.clip_norm = clip_norm

    def step(self, images: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Losses:
        """One step of training.

        Args:
            images: (B, 3, H, W) of the model's dtype, normalised by ``config.mean`` and ``std``.
            boxes: for each image (M, 4) x1, y1, x2, y2 in pixels of ``images``.
            labels: for each image (M,) int64, from 1 to ``config.num_classes``.

        Returns:
            the losses before the step, without gradients.

        Raises:
            ValueError, TypeError: naming the argument, what it must be and what it was.
        """
        if len(boxes) != len(images):
            raise ValueError(
                f"boxes must hold one entry per image ({len(images)}), got {len(boxes)}"
            )
        config = self.model.config
        anchors = model_anchors(config, (images.shape[-2], images.shape[-1]), device=images.device)
        targets = assign_targets(anchors, boxes, labels, num_classes=config.num_classes)
        class_outputs, box_outputs = self.forward(images)
        losses = detection_loss(class_outputs, box_outputs, targets)
        self.optimizer.zero_grad()
        losses.total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.average.update(self.model)
        return Losses(*(x.detach() for x in losses))
