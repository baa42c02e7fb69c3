"""Training on several processes: who is who, shared batch norms, sums and gathered values."""

from __future__ import annotations

import inspect
import os
import pickle
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..models.batch_norm import SharedBatchNorm2d
from ..models.efficientdet import EfficientDet

#: Statistics are shared by the norms themselves; the argument has a new name since torch 2.13.
_SYNC = "forward_sync_buffers"
_NEW = _SYNC in inspect.signature(DistributedDataParallel.__init__).parameters
_OWN_BUFFERS: dict[str, Any] = {_SYNC if _NEW else "broadcast_buffers": False}


def process_group() -> tuple[int, int]:
    """This process's rank and the number of processes: 0 and 1 without ``torch.distributed``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def start_processes(device: torch.device) -> torch.device:
    """Joins the processes that ``torchrun`` started, if it did; this one's device.

    NCCL for GPUs, of which each process takes that of its local rank, and gloo for CPUs.

    Raises:
        ValueError: the machine has fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU of its own: it has "
                f"{torch.cuda.device_count()}; give torchrun that --nproc-per-node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def _share_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            setattr(module, name, SharedBatchNorm2d.like(child))
        else:
            _share_norms(child)


def distributed(model: EfficientDet) -> DistributedDataParallel:
    """``model`` for :class:`edet.training.Trainer`'s ``forward`` on several processes.

    Its batch norms are changed, in place, to take their statistics over all processes, as was
    published: to ``nn.SyncBatchNorm`` on a GPU, to :class:`SharedBatchNorm2d` elsewhere. The keys
    of its state dict stay.

    Raises:
        ValueError: there is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("torch.distributed must be initialised first: run by torchrun")
    device = next(model.parameters()).device
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return DistributedDataParallel(model, device_ids=[device.index], **_OWN_BUFFERS)
    _share_norms(model)
    return DistributedDataParallel(model, **_OWN_BUFFERS)


def _exchange(function: Callable[..., Any], output: Tensor | list[Tensor], *inputs: Tensor) -> None:
    """Runs an exchange, and waits until no other thread refers to its tensors.

    Gloo's threads let go of a tensor a little after the call has returned, for which they need the
    interpreter's lock: a process that is ending by then would be aborted.
    """
    tensors = [*([output] if isinstance(output, Tensor) else output), *inputs]
    before = [sys.getrefcount(x) for x in tensors]
    function(output, *inputs)
    deadline = time.monotonic() + 1
    while tensors[0].device.type == "cpu" and time.monotonic() < deadline:
        if all(sys.getrefcount(x) <= n for x, n in zip(tensors, before, strict=True)):
            return
        time.sleep(1e-4)


def summed(values: Tensor) -> Tensor:
    """The sum of ``values`` over the processes."""
    if process_group()[1] > 1:
        values = values.clone()
        _exchange(dist.all_reduce, values)
    return values


def gathered(value: Any) -> list[Any]:
    """The ``value`` of each process, in every process; anything that can be pickled."""
    _, count = process_group()
    if count == 1:
        return [value]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    length = torch.tensor([len(data)], device=device)
    lengths = [torch.empty_like(length) for _ in range(count)]
    _exchange(dist.all_gather, lengths, length)
    sizes = [int(n) for n in lengths]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    shares = [torch.empty_like(padded) for _ in range(count)]
    _exchange(dist.all_gather, shares, padded)
    pairs = zip(shares, sizes, strict=True)
    return [pickle.loads(bytes(share[:n].cpu().numpy())) for share, n in pairs]


def from_first(value: Any) -> Any:
    """The ``value`` of the first process, in every process."""
    return gathered(value if process_group()[0] == 0 else None)[0]
