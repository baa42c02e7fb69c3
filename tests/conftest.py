"""What tests share: no GPU tests without a GPU, fixed seeds, small models and two ways to run."""

from __future__ import annotations

import copy
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edet
from edet_kernels.testing.numeric import check_network, relative_difference

#: Folders of tests that run whole models: the rooms of ``edet``, and their benchmarks.
ROOMS = {
    "bench",
    "benchmarks",
    "cli",
    "deploy",
    "detection",
    "dropin",
    "fused",
    "models",
    "training",
}

#: Of 4 KiB, of a process that has grown large: 1.2 GB.
LARGE_PAGES = 300_000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked gpu on a machine without one; files with slow tests come first.

    Files are shared out among processes in this order: one of minutes that came last would leave
    the other processes without work.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Gives every test the same random numbers, whatever ran before it."""
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # a hundred times faster: the former notes, for a GPU to come, who called it
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small models on many threads spend their time waiting, minutes of it on a busy machine."""
    threads = torch.get_num_threads()
    if request.path.parent.name in ROOMS:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def _memory_given_back() -> Iterator[None]:
    """What compilers and exporters keep would add up, from file to file, to over 3 GB."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or int(Path("/proc/self/statm").read_text().split()[1]) < LARGE_PAGES:
        return
    dynamo.reset()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _flat(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    else:
        for item in output:
            yield from _flat(item)


def _randomise(module: nn.Module) -> nn.Module:
    """Weights and statistics that let every layer show: no zeros, no ones, no equal channels."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.dim() == 4:
                tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5)
            elif "edge_weights" in name:
                tensor.uniform_(-0.2, 1.8)
            elif name.endswith(("running_var", "weight")):
                tensor.uniform_(0.6, 1.4)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.2)
    return module


@pytest.fixture
def randomise() -> Callable[[nn.Module], nn.Module]:
    """Gives a module random weights and batch-norm statistics, in place."""
    return _randomise


@pytest.fixture
def small() -> edet.EfficientDet:
    """A narrow and shallow D0 with random weights, in eval mode."""
    model = edet.create_model(
        "tf_efficientdet_d0", width=16, cells=2, head_repeats=1, num_classes=3
    )
    return _randomise(model).eval()


@pytest.fixture
def fused() -> Callable[..., list[Tensor]]:
    """Runs a module without gradients; all its output tensors."""

    def run(module: nn.Module, *args: Any) -> list[Tensor]:
        with torch.no_grad():
            return list(_flat(module(*args)))

    return run


@pytest.fixture
def layers() -> Callable[..., list[Tensor]]:
    """Runs a module with gradients, and so by PyTorch's layers; all its output tensors."""

    def run(module: nn.Module, *args: Any) -> list[Tensor]:
        with torch.enable_grad():
            outputs = list(_flat(module(*args)))
        assert all(x.requires_grad for x in outputs)
        return [x.detach() for x in outputs]

    return run


@pytest.fixture
def assert_agrees(
    fused: Callable[..., list[Tensor]], layers: Callable[..., list[Tensor]]
) -> Callable[..., None]:
    """Checks the fused ops in float32 against the layers in float64, by the rule of networks."""

    def check(module: nn.Module, *args: Any) -> None:
        double = copy.deepcopy(module).double()
        wide = [a.double() if isinstance(a, Tensor) else [x.double() for x in a] for a in args]
        truths = layers(double, *wide)
        found, eager = fused(module, *args), layers(module, *args)
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in eager]
        mine, theirs = (relative_difference(x, truths) for x in (found, eager))
        check_network(type(module).__name__, mine, theirs, torch.float32)

    return check
