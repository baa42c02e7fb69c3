"""The drop-in on the real effdet; ``make test-peers`` runs it in an environment that has effdet."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

import edet
from benchmarks import rivals
from edet.bench import set_batch_norms
from edet_kernels.testing.numeric import check_network, relative_difference

effdet = pytest.importorskip("effdet", reason="needs effdet: make test-peers")

BIFPN = [
    *(f"tf_efficientdet_{n}" for n in ("d0", "d1", "d2", "d3", "d4", "d5", "d6", "d7", "d7x")),
    *(f"tf_efficientdet_{n}" for n in ("lite0", "lite1", "lite2", "lite3", "lite3x", "lite4")),
    "tf_efficientdet_d0_ap",
    *(f"efficientdet_{n}" for n in ("d0", "d1", "d2", "d3", "d4", "d5")),
    *("efficientdet_q0", "efficientdet_q2", "efficientdet_w0", "efficientdet_lite0"),
    *("mixdet_m", "mobiledetv2_110d", "mobiledetv3_large"),
]
LARGE = ("d4", "d5", "d6", "d7", "d7x", "lite4")
PARTS = ["fpn", "class_net", "box_net"]


def network(name, **changes):
    """effdet's model with random weights, for images of 256×256 (384×384 with an eighth level)."""
    config = effdet.get_efficientdet_config(name)
    size = 384 if config.max_level > 7 else 256
    config.update({"image_size": (size, size), **changes})
    torch.manual_seed(0)
    model = effdet.EfficientDet(config, pretrained_backbone=False).eval()
    for parameter_name, parameter in model.named_parameters():
        if "edge_weights" in parameter_name:
            torch.nn.init.uniform_(parameter, -0.3, 1.5)
    images = torch.randn(1, 3, size, size)
    set_batch_norms(model, images)
    return model, images


def flat(outputs):
    return [x for maps in outputs for x in maps]


@torch.no_grad()
def compare(model, images):
    """Checks that ``model`` before and after ``accelerate`` differ by rounding only."""
    keys, tensors = list(model.state_dict()), {id(p) for p in model.parameters()}
    before, exact = flat(model(images)), flat(copy.deepcopy(model).double()(images.double()))
    report = edet.accelerate(model, images, rounds=0)
    after = flat(model(images))
    own, mine = relative_difference(before, exact), relative_difference(after, exact)
    check_network("network", mine, own, torch.float32)
    assert list(model.state_dict()) == keys and {id(p) for p in model.parameters()} == tensors
    edet.restore(model)
    assert all(torch.equal(a, b) for a, b in zip(flat(model(images)), before, strict=True))
    return report


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n.rpartition("_")[2] in LARGE else ())
        for n in BIFPN
    ],
)
def test_model(name):
    replaced = compare(*network(name)).replaced
    assert set(PARTS) <= set(replaced)
    efficientnet = "_w0" not in name and "mixdet" not in name and "v3" not in name
    assert ("backbone" in replaced) == efficientnet


@pytest.mark.parametrize("fpn_name", ["bifpn_attn", "bifpn_sum", "pan_fa", "qufpn_sum"])
@pytest.mark.parametrize("level_first", [False, True])
def test_feature_networks(fpn_name, level_first):
    model, images = network(
        "tf_efficientdet_d0", fpn_name=fpn_name, head_bn_level_first=level_first
    )
    assert set(PARTS) <= set(compare(model, images).replaced)


@pytest.mark.parametrize("name", ["efficientdet_q1", "resdet50", "efficientdet_es"])
def test_other_networks_are_left_alone(name):
    report = edet.accelerate(network(name)[0], rounds=0)
    assert "fpn" not in report.replaced
    reason = next(part.reason for part in report.parts if part.name == "fpn")
    assert "not separable" in reason or "Interpolate2d" in reason


def test_heads_can_be_toggled_afterwards():
    model, images = network("tf_efficientdet_d0")
    edet.accelerate(model, images, rounds=0)
    with torch.no_grad():
        before = flat(model(images))
        model.toggle_head_bn_level_first()
        after = flat(model(images))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_prediction():
    model, images = network("tf_efficientdet_d0")
    bench = effdet.DetBenchPredict(model)
    with torch.no_grad():
        before = bench(images)
        report = edet.accelerate(bench, images, rounds=0)
        after = bench(images)
    assert {f"model.{part}" for part in PARTS} <= set(report.replaced)
    torch.testing.assert_close(after[..., 4], before[..., 4], rtol=1e-3, atol=1e-5)


def test_training_step():
    model, images = network("tf_efficientdet_d0")
    images = images.repeat(2, 1, 1, 1)
    target = {
        "bbox": torch.tensor([[[10.0, 20, 100, 120]], [[30, 30, 200, 220]]]),
        "cls": torch.tensor([[3], [7]]),
    }
    losses, steps = [], []
    for accelerated in (False, True):
        bench = effdet.DetBenchTrain(copy.deepcopy(model), create_labeler=True)
        if accelerated:
            edet.accelerate(bench, images, rounds=0)
        bench.train()
        optimizer = torch.optim.SGD(bench.parameters(), 0.01)
        torch.manual_seed(1)  # for drop path
        for _ in range(2):
            loss = bench(images, target)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        steps.append(list(bench.state_dict().values()))
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


def test_the_benchmark_exports_effdet_with_our_weights(tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs onnx: make test-peers")
    model = edet.create_model("tf_efficientdet_lite0", image_size=64).eval()
    images = torch.zeros(2, 3, 64, 64)
    files = rivals.export_effdet(Path(sys.executable), model, images, tmp_path)
    assert set(files) == set(rivals.ONNX_PARTS)
    inputs = onnx.load(files["network"]).graph.input
    assert [d.dim_value for d in inputs[0].type.tensor_type.shape.dim] == [2, 3, 64, 64]
