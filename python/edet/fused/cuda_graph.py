"""Functions of tensors captured in a CUDA graph, and uploads beside the work of the GPU.

The tests run it on a GPU where there is one, else on a stand-in for ``torch.cuda``.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .plan import Stage

#: The door to CUDA.
cuda: Any = torch.cuda

#: Held while a graph is made: a capture begins by synchronising the device, which ends that of
#: another thread.
_making = threading.Lock()

#: Runs before the capture, in which libraries choose their kernels and caches are filled.
WARM_UP = 2


def captures(device: torch.device) -> bool:
    """Whether work on ``device`` can be captured."""
    return device.type == "cuda"


class Graph:
    """Stages that follow one another as one CUDA graph, for inputs like those it was made with.

    Its buffers are written by every call, so calls must not overlap: the results are on the CPU
    when one returns.

    Args:
        stages: each gets the list that the one before returned; none may wait for the device or
            bring data to it.
        inputs: of the first stage, on the GPU.
        pool: memory that graphs share, from ``torch.cuda.graph_pool_handle()``.
    """

    def __init__(self, stages: Sequence[Stage], inputs: list[Tensor], pool: Any) -> None:
        self._stages = stages  # and with them the tensors that they hold: the graph has addresses
        self._inputs = [torch.empty_like(x).copy_(x) for x in inputs]
        with _making:
            self._capture(pool)

    def _capture(self, pool: Any) -> None:
        stages = self._stages
        stream, side = cuda.current_stream(), cuda.Stream()
        side.wait_stream(stream)
        with cuda.stream(side):
            for _ in range(WARM_UP):
                values = self._inputs
                for stage in stages:
                    values = stage(values)
        stream.wait_stream(side)
        # external: they become nodes of the graph, which every replay records again
        self._marks = [cuda.Event(enable_timing=True, external=True) for _ in (None, *stages)]
        self._graph = cuda.CUDAGraph()
        # other threads upload meanwhile: what they allocate must not end this capture
        with cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            values = self._inputs
            self._marks[0].record()
            for stage, mark in zip(stages, self._marks[1:], strict=True):
                values = stage(values)
                mark.record()
        self._outputs = values

    def __call__(self, inputs: list[Tensor]) -> tuple[list[Tensor], list[float]]:
        """The last stage's result, on the CPU, and the seconds that each stage took.

        The work goes to the current stream.
        """
        for buffer, x in zip(self._inputs, inputs, strict=True):
            buffer.copy_(x, non_blocking=True)
        self._graph.replay()
        outputs = [x.to("cpu", copy=True) for x in self._outputs]  # waits for the graph
        marks = zip(self._marks, self._marks[1:], strict=False)
        return outputs, [1e-3 * before.elapsed_time(after) for before, after in marks]


class Upload:
    """A tensor on its way to a GPU on a stream of its own.

    Args:
        x: a tensor on the CPU.
        device: where to.
        stream: the stream to copy on.
    """

    def __init__(self, x: Tensor, device: torch.device, stream: Any) -> None:
        with cuda.stream(stream):
            self._copy = x.pin_memory().to(device, non_blocking=True)
            self._done = stream.record_event()

    def result(self) -> Tensor:
        """The tensor on the GPU, for work on the current stream."""
        stream = cuda.current_stream()
        stream.wait_event(self._done)
        self._copy.record_stream(stream)
        return self._copy
