"""The trainer: one step of the published recipe, what it leaves out, and all of its state."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..detection.anchors import model_anchors
from ..models.efficientdet import EfficientDet
from ..models.efficientnet import normalise_pixels
from .losses import Losses, detection_loss
from .processes import distributed, process_group, summed
from .recipe import (
    ADAMW_LEARNING_RATE,
    LEARNING_RATE,
    MovingAverage,
    adamw,
    sgd,
    warmup_cosine,
)
from .targets import Targets, assign_targets

if TYPE_CHECKING:
    from .fit import History

__all__ = ["LEARNING_RATE", "MovingAverage", "Trainer", "sgd", "warmup_cosine"]

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FROZEN = ("backbone", "norms")
#: Skipped steps that are remembered, with their images.
_REMEMBERED = 100


class NotFiniteError(RuntimeError):
    """Several steps in a row were not finite; the message says what to try."""


class Skipped(NamedTuple):
    """A step that was left out: its number from 0, and the images it was made of."""

    step: int
    images: list[str]


class Trainer:
    """Trains a model by the published recipe, a batch at a time or (:meth:`fit`) a whole run.

    >>> trainer = Trainer(model, batch_size=16)  # doctest: +SKIP
    >>> trainer.fit(open_dataset("data"), epochs=50, folder="run")  # doctest: +SKIP

    A step whose loss or gradient is not finite is left out: no weight, statistic, moment or average
    is written. It is counted in ``skipped``, and a warning names its images.

    Args:
        model: it is put into training mode, and its weights in ``channels_last`` order.
        steps: in all; None when :meth:`fit` is to count them.
        batch_size: images of a step over all processes; scales the learning rate of SGD.
        learning_rate: the highest; 0.16·batch_size/128 for SGD and 3e-4 for AdamW when None.
        warmup_steps: a twentieth of ``steps`` when None; published is one epoch.
        momentum, weight_decay, average_decay: as published.
        clip_norm: the gradient's norm is limited to this.
        forward: what computes the predictions; when None, ``model``, or on several processes
            :func:`edet.training.distributed` of it.
        optimizer: ``sgd`` as published, or ``adamw``.
        precision: ``float32`` (the model's own), or ``bfloat16`` or ``float16`` autocast; the last
            with scaled losses.
        accumulate: parts that a batch goes through the network in, one after the other, to take
            less memory. The loss is that of the whole batch; batch norms see the parts.
        freeze: of ``backbone`` (its weights and statistics stay) and ``norms`` (the statistics,
            weights and biases of all batch norms stay).
        max_skipped: steps in a row that may be left out before training ends with an error.

    Attributes:
        model, optimizer, schedule, average, scaler: what a step moves; :meth:`state_dict` has all.
        step_count: steps so far, also those left out.
        epoch, epoch_step: the place of :meth:`fit`.
        skipped: the last steps left out.
        gradient_norm: of the last step, before clipping.
        stopping: set to True to end :meth:`fit` after the step it is at.
    """

    schedule: torch.optim.lr_scheduler.LambdaLR | None

    def __init__(
        self,
        model: EfficientDet,
        *,
        steps: int | None = None,
        batch_size: int,
        learning_rate: float | None = None,
        warmup_steps: int | None = None,
        momentum: float = 0.9,
        weight_decay: float | None = None,
        average_decay: float = 0.9998,
        clip_norm: float = 10.0,
        forward: nn.Module | None = None,
        optimizer: str = "sgd",
        precision: str = "float32",
        accumulate: int = 1,
        freeze: Sequence[str] = (),
        max_skipped: int = 5,
    ) -> None:
        for name, number in (("batch_size", batch_size), ("accumulate", accumulate)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        for name, value, known in (
            ("optimizer", optimizer, ("sgd", "adamw")),
            ("precision", precision, tuple(_PRECISIONS)),
            *(("freeze", part, _FROZEN) for part in freeze),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        # maps run through the network channels last; convolutions copy weights of another order
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model, self.batch_size, self.freeze = model, batch_size, tuple(freeze)
        self._set_modes()  # before the processes agree on which gradients to exchange
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "model must have parameters to train, got none that requires a gradient, as in a "
                "moving average: call model.requires_grad_()"
            )
        if forward is None and process_group()[1] > 1:
            forward = distributed(model)
        self.forward = model if forward is None else forward
        published = optimizer == "sgd"
        standard = LEARNING_RATE * batch_size if published else ADAMW_LEARNING_RATE
        rate = standard if learning_rate is None else learning_rate
        decay = {} if weight_decay is None else {"weight_decay": weight_decay}
        make: Callable[..., torch.optim.Optimizer] = sgd if published else adamw
        self.optimizer = make(model, rate, momentum=momentum, **decay)
        self.warmup_steps, self.schedule = warmup_steps, None
        if steps is not None:
            self.set_steps(steps)
        self.average = MovingAverage(model, average_decay)
        self.clip_norm, self.accumulate, self.max_skipped = clip_norm, accumulate, max_skipped
        self.autocast = _PRECISIONS[precision]
        device = next(model.parameters()).device.type
        half = precision == "float16"
        self.scaler = torch.amp.GradScaler(device) if half else None
        self.step_count = self.epoch = self.epoch_step = self.skipped_in_a_row = 0
        self.skipped: list[Skipped] = []
        self.gradient_norm = 0.0
        self.stopping = self._agreed_to_stop = False

    def set_steps(self, steps: int) -> None:
        """Makes the schedule of the learning rate for a run of this many steps."""
        warmup = steps // 20 if self.warmup_steps is None else self.warmup_steps
        self.schedule = warmup_cosine(self.optimizer, steps, warmup)

    @property
    def stopped(self) -> bool:
        """Whether the last step is to be the last one: so says this process, or any of several."""
        shared = isinstance(self.forward, DistributedDataParallel)
        return self._agreed_to_stop if shared else self.stopping

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def fit(self, data: Any, *, epochs: int, **options: Any) -> History:
        """Trains on a data set; see :func:`edet.training.fit.fit` for the arguments."""
        from .fit import fit

        return fit(self, data, epochs=epochs, **options)

    def step(
        self,
        images: Tensor,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        *,
        names: Sequence[str] | None = None,
    ) -> Losses:
        """One step of training, on this process's images.

        Args:
            images: (B, 3, H, W) of the model's dtype, normalised by ``config.mean`` and ``std``; or
                uint8, which are normalised here.
            boxes: for each image (M, 4) x1, y1, x2, y2 in pixels of ``images``.
            labels: for each image (M,) int64, from 1 to ``config.num_classes``.
            names: of the images, for messages.

        Returns:
            the losses before the step, without gradients; over all processes.

        Raises:
            ValueError, TypeError: naming the argument, what it must be and what it was.
            NotFiniteError: this and the steps before it were left out.
        """
        if self.schedule is None:
            raise ValueError("steps must be given to Trainer, for the learning rate's schedule")
        self._check(images, boxes)
        if not self.model.training:  # after an evaluation
            self._set_modes()
        config = self.model.config
        anchors = model_anchors(config, (images.shape[-2], images.shape[-1]), device=images.device)
        targets = assign_targets(anchors, boxes, labels, num_classes=config.num_classes)
        images = self._normalised(images)
        statistics = [b for m in self._norms() if m.training for b in m.buffers()]
        saved = [b.clone() for b in statistics]
        losses = self._backward(images, targets)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        losses, norm_is_finite = self._shared(losses, norm)
        self.gradient_norm = float(norm)
        self.step_count += 1
        if norm_is_finite and bool(losses.total.isfinite()):
            self._move()
        else:
            with torch.no_grad():
                torch._foreach_copy_(statistics, saved)
            self._leave_out(images, names, scaled=bool(losses.total.isfinite()))
        return losses

    # --- parts of a step --------------------------------------------------------------------------

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.model.modules() if isinstance(m, _BatchNorm)]

    def _set_modes(self) -> None:
        """Training mode, except for what is frozen."""
        self.model.train()
        if "backbone" in self.freeze:
            self.model.backbone.eval().requires_grad_(False)
        if "norms" in self.freeze:
            for norm in self._norms():
                norm.eval().requires_grad_(False)

    def _check(self, images: Tensor, boxes: Sequence[Tensor]) -> None:
        if not isinstance(images, Tensor) or images.dim() != 4:
            kind = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be one tensor (B, 3, H, W), got {kind}")
        if not len(images):
            raise ValueError("images must hold at least one image, got none")
        if not torch.is_grad_enabled():
            raise ValueError("step needs gradients: call it outside of no_grad and inference_mode")
        if len(boxes) != len(images):
            raise ValueError(
                f"boxes must hold one entry per image ({len(images)}), got {len(boxes)}"
            )
        tensors = [b for b in boxes if isinstance(b, Tensor) and b.numel()]
        if len(tensors) > 1 and all(float(b.max()) <= 1 for b in tensors):
            warnings.warn(
                "boxes must be in pixels of the images, and none has a coordinate above 1: "
                "multiply fractions by the images' width and height",
                stacklevel=3,
            )
        smallest = 2**self.model.config.max_level
        cells = -(-images.shape[2] // smallest) * -(-images.shape[3] // smallest)
        part = -(-len(images) // self.accumulate)
        if cells * part == 1 and process_group()[1] == 1 and "norms" not in self.freeze:
            height, width = images.shape[2:]
            raise ValueError(
                f"one image of {height}×{width} has one pixel at the last level, too few for its "
                "batch norm: give larger images, a larger batch, or freeze=('norms',)"
            )

    def _normalised(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        parameter = next(self.model.parameters())
        config = self.model.config
        mean, std = (
            torch.tensor(v, dtype=torch.float32, device=images.device)
            for v in (config.mean, config.std)
        )
        return normalise_pixels(images, mean, std, parameter.dtype)

    def _backward(self, images: Tensor, targets: Targets) -> Losses:
        """Gradients of the loss of all processes' images, and this process's share of it."""
        forward, sums = self.forward, None
        shared = isinstance(forward, DistributedDataParallel)
        processes = process_group()[1] if shared else 1
        positives = targets.positives.sum()
        # 1.0 would have the default dtype
        normaliser = (summed(positives) if shared else positives).float() + 1
        self.optimizer.zero_grad()
        parts = images.chunk(self.accumulate)
        sizes = [len(part) for part in parts]
        rows = zip(parts, *(t.split(sizes) for t in targets), strict=True)
        for i, (part, labels, regressions) in enumerate(rows, 1):
            waits = shared and i < len(parts)
            with forward.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with self._autocasting(images.device.type):
                    outputs = forward(part)
                own = Targets(labels, regressions)
                losses = detection_loss(outputs[0], outputs[1], own, normaliser=normaliser)
                # the gradients of several processes are averaged, and are to be summed
                total = losses.total * processes
                (total if self.scaler is None else self.scaler.scale(total)).backward()
            found = [x.detach() for x in losses]
            sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
        assert sums is not None
        return Losses(*sums)

    def _autocasting(self, device: str) -> Any:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device, self.autocast)

    def _shared(self, losses: Losses, norm: Tensor) -> tuple[Losses, bool]:
        """The losses over all processes, whether all found finite gradients; who wants to stop."""
        if not isinstance(self.forward, DistributedDataParallel):
            return losses, bool(norm.isfinite())
        flags = [norm.isfinite().logical_not().to(losses.total.dtype)]
        flags.append(torch.full_like(flags[0], float(self.stopping)))
        *sums, bad, stopping = summed(torch.stack([*losses, *flags])).unbind()
        self._agreed_to_stop = bool(stopping > 0)
        return Losses(*sums), not bool(bad > 0)

    def _move(self) -> None:
        """Moves weights, schedule and average."""
        assert self.schedule is not None
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.schedule.step()
        self.average.update(self.model)
        self.skipped_in_a_row = 0

    def _leave_out(self, images: Tensor, names: Sequence[str] | None, *, scaled: bool) -> None:
        """Counts a step that is not finite.

        Args:
            scaled: only the gradient is not; with scaled losses that is how the scale is found.

        Raises:
            NotFiniteError: it is one too many in a row.
        """
        self.optimizer.zero_grad()
        if self.scaler is not None:
            scale = self.scaler.get_scale()
            self.scaler.update()
            if scaled and scale > 1:
                return
        broken = images.flatten(1).isfinite().all(1).logical_not()
        listed = list(names) if names is not None else [f"image {i}" for i in range(len(images))]
        if bool(broken.any()):
            listed = [name for name, bad in zip(listed, broken.tolist(), strict=True) if bad]
        self.skipped = [*self.skipped[-_REMEMBERED:], Skipped(self.step_count - 1, listed)]
        self.skipped_in_a_row += 1
        what = f"step {self.step_count - 1} is not finite: {', '.join(listed)}"
        if self.skipped_in_a_row >= self.max_skipped:
            raise NotFiniteError(
                f"{self.skipped_in_a_row} steps in a row were not finite (the last, {what}); no "
                "weight was changed by them. Try a lower learning_rate "
                f"(now {self.learning_rate:g}), more warmup_steps, a smaller clip_norm "
                f"(now {self.clip_norm:g}), or precision float32, and look at these images"
            )
        warnings.warn(f"left out, {what}", stacklevel=3)

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on as if it had not stopped: tensors and plain values.

        Model, average and its count, optimiser, schedule, scaler, random states, and the place.
        """
        if self.schedule is None:
            raise ValueError("there is no state before steps are known")
        return {
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict(),
            "average_updates": self.average.updates,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "random": _random_state(),
            "skipped": [list(x) for x in self.skipped],
            **{name: getattr(self, name) for name in _COUNTERS},
        }

    def _check_state(self, state: dict[str, Any]) -> None:
        lacking = [key for key in _STATE if key not in state]
        if lacking:
            raise ValueError(f"the state must be one of Trainer.state_dict, it lacks {lacking[0]}")
        if (state["scaler"] is None) != (self.scaler is None):
            raise ValueError("the state was saved with another precision than this trainer's")
        for name, model in (("model", self.model), ("average", self.average.model)):
            own = {key: x.shape for key, x in model.state_dict().items()}
            given = {key: x.shape for key, x in state[name].items()}
            unlike = [key for key in own | given if own.get(key) != given.get(key)]
            if unlike:
                raise ValueError(f"the state is of another model: {name} differs in {unlike[0]}")
        groups = [self.optimizer.param_groups, state["optimizer"]["param_groups"]]
        own_groups, given_groups = (
            [("betas" in g, "momentum" in g, len(g["params"])) for g in gs] for gs in groups
        )
        if own_groups != given_groups:
            raise ValueError(
                "the state is of another optimizer than this trainer's, or of another freeze"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, into a trainer made with the same arguments.

        Raises:
            ValueError: the state is of another model, optimiser or precision.
        """
        self._check_state(state)  # all of it, before anything is changed
        if self.schedule is None:
            self.set_steps(state["schedule"]["lr_lambdas"][0]["steps"])
        assert self.schedule is not None
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.average.updates = state["average_updates"]
        self.average.changed()
        self.skipped = [Skipped(step, list(images)) for step, images in state["skipped"]]
        for name in _COUNTERS:
            setattr(self, name, state[name])
        _set_random_state(state["random"])


_STATE = ("model", "average", "average_updates", "optimizer", "schedule", "scaler", "random")
_COUNTERS = ("step_count", "epoch", "epoch_step", "skipped_in_a_row", "gradient_norm")


def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = cast("tuple[Any, ...]", np.random.get_state())
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda else [],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(numbers), gauss],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
