"""Whole models on a GPU against PyTorch's layers; also run on the CPU, where that is quick.

A case of the CPU stands beside those of the GPU so that the tests' own logic is run everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import edet
from edet.bench.variants import eager_copy, part_calls, prepare, random_model
from edet_kernels.testing.numeric import assert_identical, check_network, relative_difference
from edet_kernels.testing.samples import DTYPES

Run = Callable[..., list[Tensor]]

on_devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device; PyTorch's layers do without TF32, which nobody else was asked to use."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param)


def images_on(device: torch.device, batch: int = 2) -> Tensor:
    """Normalised images, small where they are slow."""
    side = 128 if device.type == "cpu" else 384
    return torch.randn(batch, 3, side, side, device=device)


NETWORKS = [
    ("cpu", "tf_efficientdet_lite0", torch.bfloat16),
    *(
        pytest.param("cuda", name, dtype, marks=pytest.mark.gpu)
        for name in ("tf_efficientdet_lite0", "tf_efficientdet_d0")
        for dtype in DTYPES
    ),
]


@pytest.mark.parametrize(("device", "name", "dtype"), NETWORKS, indirect=["device"], ids=str)
@torch.no_grad()
def test_network(device: torch.device, name: str, dtype: torch.dtype) -> None:
    images = images_on(device)
    model = prepare(random_model(name, images[:1]), device, dtype)
    images = images.to(dtype).contiguous(memory_format=torch.channels_last)
    eager = eager_copy(model)
    features = eager.backbone(images)
    pyramid = eager.fpn(features)
    double = copy.deepcopy(eager).double()
    exact = part_calls(
        double, images.double(), [x.double() for x in features], [x.double() for x in pyramid]
    )
    own = part_calls(eager, images, features, pyramid)
    for part, call in part_calls(model.freeze(), images, features, pyramid).items():
        truths = exact[part]()
        found = call()
        assert {x.dtype for x in found} == {dtype}
        errors = (relative_difference(x, truths) for x in (found, own[part]()))
        check_network(f"{name}, {part}", *errors, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 4])
@torch.no_grad()
def test_a_captured_network_sees_new_images(batch: int) -> None:
    images = images_on(torch.device("cuda"), batch).half()
    images = images.contiguous(memory_format=torch.channels_last)
    model = prepare(random_model("tf_efficientdet_d0", images[:1].float()), images.device,
                    torch.float16).freeze()  # fmt: skip
    others = [torch.randn_like(images) for _ in range(3)]
    expected = [[*classes, *boxes] for classes, boxes in map(model, others)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        classes, boxes = model(images)
    for _ in range(3):
        for other, wanted in zip(others, expected, strict=True):
            images.copy_(other)
            graph.replay()
            assert_identical([*classes, *boxes], wanted)


@pytest.mark.slow
@on_devices
@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_graph_break(
    device: torch.device, small: edet.EfficientDet, fused: Run
) -> None:
    torch.compiler.reset()
    small.to(device)
    images = torch.randn(1, 3, 64, 64, device=device)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        found, expected = fused(compiled, images), fused(small, images)
        assert relative_difference(found, [x.double() for x in expected]) < 1e-4
        with torch.no_grad():  # the weights are inputs of the compiled graph
            small.fpn.cells[0].nodes[0].after_combine.conv.bn.bias.add_(1.0)


@pytest.mark.slow
@on_devices
@pytest.mark.filterwarnings("ignore")
def test_compiled_in_a_cuda_graph(device: torch.device, small: edet.EfficientDet) -> None:
    """By the whole compiler, whose graphs of ops of ours and of torch are captured on a GPU."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    torch.compiler.reset()
    small.to(device).freeze()
    called: set[str] = set()

    def run(maps: list[Tensor]) -> list[Tensor]:
        return [torch.sigmoid(x) for x in small.class_net(small.fpn(maps))]

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        called.update(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return compile_fx(graph, inputs, config_patches=list_mode_options("reduce-overhead"))

    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    for _ in range(4):
        maps = [torch.randn(1, c, s, s, device=device) for c, s in ((40, 8), (112, 4), (320, 2))]
        with torch.no_grad():
            found, expected = [x.clone() for x in compiled(maps)], run(maps)
        # what multiplies is ours, and not as TF32, which would be 100 times as far off
        ours = {f"edet_kernels.{op}" for op in ("lateral", "bifpn", "head")}
        assert {name for name in called if "edet_kernels" in name or "conv" in name} == ours
        assert relative_difference(found, [x.double() for x in expected]) < 1e-5
