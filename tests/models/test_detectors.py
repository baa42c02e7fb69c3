"""Detectors of other projects, under their names and in their layouts, by rule-made weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edet
from edet.models.detectors import load_detector
from edet.models.efficientnet import EfficientNet
from edet.models.reading import CheckpointError


def model(name: str = "tf_efficientdet_d0", **options: Any) -> edet.EfficientDet:
    return edet.create_model(name, **({"num_classes": 4} | options))


def tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in module.state_dict().items()}


class Variables(dict[str, Any]):
    """TensorFlow's variables of PyTorch's layers."""

    def conv(self, name: str, layer: Any, kernel: str = "kernel", bias: str = "bias") -> None:
        axes = (2, 3, 0, 1) if kernel == "depthwise_kernel" else (2, 3, 1, 0)
        self[f"{name}/{kernel}"] = layer.weight.detach().permute(axes).numpy()
        if layer.bias is not None:
            self[f"{name}/{bias}"] = layer.bias.detach().numpy()

    def norm(self, name: str, layer: Any) -> None:
        self[f"{name}/gamma"], self[f"{name}/beta"] = layer.weight.detach(), layer.bias.detach()
        self[f"{name}/moving_mean"] = layer.running_mean
        self[f"{name}/moving_variance"] = layer.running_var


def automl(net: edet.EfficientDet) -> dict[str, Any]:
    """As google/automl names them: blocks and nodes by their numbers."""
    found, norm = Variables(), "tpu_batch_normalization"
    backbone: EfficientNet = net.backbone
    top = net.config.backbone.replace("_", "-")
    found.conv(f"{top}/stem/conv2d", backbone.conv_stem)
    found.norm(f"{top}/stem/{norm}", backbone.bn1)
    blocks = [block for stage in backbone.stages() for block in stage]
    for i, block in enumerate(blocks):
        expand, (depthwise, middle), squeeze, (project, last), _ = block.layers
        place, numbers = f"{top}/blocks_{i}", iter(("", "_1", "_2"))
        if expand is not None:
            found.conv(f"{place}/conv2d", expand[0])
            found.norm(f"{place}/{norm}{next(numbers)}", expand[1])
        found.conv(f"{place}/depthwise_conv2d", depthwise, "depthwise_kernel")
        found.norm(f"{place}/{norm}{next(numbers)}", middle)
        if squeeze is not None:
            found.conv(f"{place}/se/conv2d", squeeze[0])
            found.conv(f"{place}/se/conv2d_1", squeeze[1])
        found.conv(f"{place}/conv2d{'' if expand is None else '_1'}", project)
        found.norm(f"{place}/{norm}{next(numbers)}", last)
    fpn: Any = net.fpn
    found.conv("resample_p6/conv2d", fpn.resample["3"].conv.conv)
    found.norm("resample_p6/bn", fpn.resample["3"].conv.bn)
    for c, cell in enumerate(fpn.cell):
        for n, node in enumerate(cell.fnode):
            place = f"fpn_cells/cell_{c}/fnode{n}"
            if net.config.fusion == "fast":
                for j, weight in enumerate(node.combine.edge_weights.detach()):
                    found[f"{place}/WSM{f'_{j}' if j else ''}"] = weight
            for offset, resample in getattr(node.combine, "resample", {}).items():
                if not list(resample.parameters()):
                    continue
                name = f"{place}/resample_0_{offset}_{net.config.levels + n}"
                found.conv(f"{name}/conv2d", resample.conv.conv)
                found.norm(f"{name}/bn", resample.conv.bn)
            layers = node.after_combine.conv
            name = f"{place}/op_after_combine{net.config.levels + n}"
            found.conv(f"{name}/conv", layers.conv_dw, "depthwise_kernel")
            found.conv(f"{name}/conv", layers.conv_pw, "pointwise_kernel")
            found.norm(f"{name}/bn", layers.bn)
    for kind in ("class", "box"):
        head: Any = getattr(net, f"{kind}_net")
        layers = [(str(i), layer) for i, layer in enumerate(head.conv_rep)]
        for which, layer in [*layers, ("predict", head.predict)]:
            name = f"{kind}_net/{kind}-{which}"
            found.conv(name, layer.conv_dw, "depthwise_kernel")
            found.conv(name, layer.conv_pw, "pointwise_kernel")
        for i, norms in enumerate(head.bn_rep):
            for level, layer in enumerate(norms, 3):
                found.norm(f"{kind}_net/{kind}-{i}-bn-{level}", layer.bn)
    return {key: np.asarray(value) for key, value in found.items()}


def zylo117(net: edet.EfficientDet) -> dict[str, Tensor]:
    """As zylo117 names them, by its classes' attributes."""
    found = {}
    backbone: EfficientNet = net.backbone
    top = "backbone_net.model"
    found |= tensors(f"{top}._conv_stem.conv", backbone.conv_stem)
    found |= tensors(f"{top}._bn0", backbone.bn1)
    blocks = [block for stage in backbone.stages() for block in stage]
    for i, block in enumerate(blocks):
        expand, (depthwise, norm), squeeze, (project, last), _ = block.layers
        place = f"{top}._blocks.{i}"
        if expand is not None:
            found |= tensors(f"{place}._expand_conv.conv", expand[0])
            found |= tensors(f"{place}._bn0", expand[1])
        found |= tensors(f"{place}._depthwise_conv.conv", depthwise)
        found |= tensors(f"{place}._bn1", norm)
        assert squeeze is not None
        found |= tensors(f"{place}._se_reduce.conv", squeeze[0])
        found |= tensors(f"{place}._se_expand.conv", squeeze[1])
        found |= tensors(f"{place}._project_conv.conv", project)
        found |= tensors(f"{place}._bn2", last)
    fpn: Any = net.fpn

    def projection(name: str, layers: Any) -> None:
        found.update(tensors(f"bifpn.0.{name}.0.conv", layers.conv))
        found.update(tensors(f"bifpn.0.{name}.1", layers.bn))

    projection("p5_to_p6", fpn.resample["3"].conv)
    first = fpn.cell[0].fnode
    for node, offset, name in (
        (1, "2", "p5_down_channel"),
        (2, "1", "p4_down_channel"),
        (3, "0", "p3_down_channel"),
        (4, "1", "p4_down_channel_2"),
        (5, "2", "p5_down_channel_2"),
    ):
        projection(name, first[node].combine.resample[offset].conv)
    nodes = ("6_up 6_w1", "5_up 5_w1", "4_up 4_w1", "3_up 3_w1")
    nodes += ("4_down 4_w2", "5_down 5_w2", "6_down 6_w2", "7_down 7_w2")
    for c, cell in enumerate(fpn.cell):
        for node, names in zip(cell.fnode, nodes, strict=True):
            conv, weights = names.split()
            found[f"bifpn.{c}.p{weights}"] = node.combine.edge_weights.detach()
            layers, place = node.after_combine.conv, f"bifpn.{c}.conv{conv}"
            found |= tensors(f"{place}.depthwise_conv.conv", layers.conv_dw)
            found |= tensors(f"{place}.pointwise_conv.conv", layers.conv_pw)
            found |= tensors(f"{place}.bn", layers.bn)
    for name, head in (("classifier", net.class_net), ("regressor", net.box_net)):
        parts: Any = head
        lists = [(f"conv_list.{i}", layer) for i, layer in enumerate(parts.conv_rep)]
        for place, layer in [*lists, ("header", parts.predict)]:
            found |= tensors(f"{name}.{place}.depthwise_conv.conv", layer.conv_dw)
            found |= tensors(f"{name}.{place}.pointwise_conv.conv", layer.conv_pw)
        for i, norms in enumerate(parts.bn_rep):
            for level, layer in enumerate(norms):
                found |= tensors(f"{name}.bn_list.{level}.{i}", layer.bn)
    return found


def assert_equal(a: edet.EfficientDet, b: edet.EfficientDet) -> None:
    for key, value in a.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, b.state_dict()[key]), key


def test_zylo117(tmp_path: Path, randomise: Callable[[nn.Module], nn.Module]) -> None:
    source, target = model(), model()
    randomise(source)
    torch.save(zylo117(source), tmp_path / "a.pth")
    load_detector(target, tmp_path / "a.pth")
    assert_equal(source, target)
    other = model(num_classes=7)
    with pytest.raises(CheckpointError, match=r"with 7 classes: it has other shapes for class_net"):
        load_detector(other, tmp_path / "a.pth")
    load_detector(other, tmp_path / "a.pth", reinit_head=True)
    assert torch.equal(other.box_net.predict.conv_pw.weight, source.box_net.predict.conv_pw.weight)
    with pytest.raises(CheckpointError, match=r"is not of a tf_efficientdet_d1 .* it lacks "):
        load_detector(model("tf_efficientdet_d1"), tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["tf_efficientdet_d0", "tf_efficientdet_lite0"])
def test_automl(name: str, tmp_path: Path, randomise: Callable[[nn.Module], nn.Module]) -> None:
    source, target = model(name), model(name)
    randomise(source)
    variables = automl(source)
    np.savez(tmp_path / "a.npz", **variables)
    load_detector(target, tmp_path / "a.npz")
    assert_equal(source, target)
    averages = {f"{key}/ExponentialMovingAverage": value for key, value in variables.items()}
    ones = {key: np.ones_like(value) for key, value in variables.items()}
    np.savez(tmp_path / "b.npz", **averages, **ones)
    target = model(name)
    load_detector(target, tmp_path / "b.npz")
    assert_equal(source, target)


def test_what_does_not_fit(tmp_path: Path) -> None:
    plain = model(width=8, cells=1, head_repeats=1)
    edet.save_checkpoint(plain, tmp_path / "own.pth")
    target = model(width=8, cells=1, head_repeats=1)
    load_detector(target, tmp_path / "own.pth")
    assert_equal(plain, target)
    (tmp_path / "a.npz").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"a\.npz is not a readable \.npz file"):
        load_detector(target, tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    with pytest.raises(CheckpointError, match=r"it lacks backbone\.conv_stem\.weight"):
        load_detector(target, tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError, match="path must be a checkpoint file"):
        load_detector(target, tmp_path / "none.npz")
