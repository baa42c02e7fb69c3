"""Stands in for ``torch.cuda`` where there is none: graphs of operator calls on tensors of the CPU.

A captured graph repeats its calls on the very tensors of the capture, as a CUDA graph does on
addresses, so that a result shows stale inputs, freed constants and skipped copies.
"""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from edet.fused import cuda_graph as edet_graph


class CUDAGraph:
    made = 0

    def __init__(self):
        CUDAGraph.made += 1
        self.calls = []
        self.replays = 0

    def replay(self):
        self.replays += 1
        for call in self.calls:
            call()


class _Capture(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # reading a number waits for the device, lift_fresh brings data to it
        forbidden = ("_local_scalar_dense", "lift_fresh", "nonzero", "item", "equal")
        assert func.overloadpacket.__name__ not in forbidden, f"{func} in a capture"
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        outputs = list(result) if isinstance(result, (list, tuple)) else [result]
        own = [not any(x is a for a in args) for x in outputs]

        def again():
            found = func(*args, **kwargs)
            for x, new, write in zip(
                outputs,
                found if isinstance(found, (list, tuple)) else [found],
                own,
                strict=True,
            ):
                if write:
                    x.copy_(new)

        self.graph.calls.append(again)
        return result


class Event:
    def __init__(self, enable_timing=False, external=False):
        assert enable_timing and external
        self.time = None

    def record(self):
        _Cuda.capturing.calls.append(self._stamp)

    def _stamp(self):
        self.time = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)


class Stream:
    def __init__(self, device=None):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)

    def record_event(self):
        return self

    def wait_event(self, event):
        self.waited.append(event)


class _Cuda:
    """What edet.graph uses of torch.cuda."""

    CUDAGraph, Event, Stream = CUDAGraph, Event, Stream
    capturing = None

    def __init__(self):
        self.stream_ = Stream()

    def device(self, device):
        return nullcontext()

    def stream(self, stream):
        return nullcontext()

    def current_stream(self):
        return self.stream_

    def graph_pool_handle(self):
        return (0, 1)

    def memory_allocated(self, device):
        return 2**20

    def max_memory_allocated(self, device):
        return 3 * 2**20

    @contextmanager
    def graph(self, graph, pool, capture_error_mode):
        assert pool == (0, 1) and capture_error_mode == "thread_local"
        assert _Cuda.capturing is None, "a device is synchronised as a capture begins"
        _Cuda.capturing = graph
        with _Capture(graph):
            yield
        _Cuda.capturing = None


def install(monkeypatch):
    """Lets predictors of CPU models run as on a GPU; returns the stand-in."""
    cuda = _Cuda()
    CUDAGraph.made = 0
    monkeypatch.setattr(edet_graph, "cuda", cuda)
    monkeypatch.setattr(edet_graph, "captures", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: None)
    return cuda
