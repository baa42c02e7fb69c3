"""Whole models: size, multiply-adds, any image, own parts, bad images, compilation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import edet
from edet.models.configs import get_config
from edet_kernels.testing.numeric import OP_FACTOR, check_errors, relative_difference

# parameters of backbone, BiFPN, class head, box head; GMACs of the same at the model's size
PARTS = {
    "d0": ((3595388, 196281, 69354, 19044), (1.901, 0.136, 0.362, 0.092)),
    "d1": ((6101024, 390972, 101394, 32508), (4.468, 0.451, 0.833, 0.252)),
    "d2": ((7202562, 708159, 136890, 49428), (7.430, 1.216, 1.625, 0.561)),
    "d3": ((10103336, 1559474, 247050, 122436), (14.888, 3.756, 3.997, 1.928)),
    "d4": ((16742216, 3349829, 402890, 228740), (30.503, 10.745, 8.560, 4.776)),
    "d5": ((27288112, 5405893, 591498, 367812), (75.039, 27.275, 19.710, 12.109)),
    "d6": ((39403992, 10583808, 1090986, 792996), (107.284, 54.063, 36.455, 26.320)),
    "d7": ((39403992, 10583808, 1090986, 792996), (154.486, 77.850, 52.495, 37.900)),
    "d7x": ((62143440, 13112064, 1094826, 796836), (238.646, 78.520, 52.533, 37.928)),
}
LITE = {
    "lite0": (3243470, 0.974),
    "lite1": (4248318, 1.967),
    "lite2": (5252334, 3.371),
    "lite3": (8350862, 7.480),
    "lite3x": (9280862, 13.978),
    "lite4": (15130894, 20.168),
}


def on_meta(name: str, **changes: object) -> edet.EfficientDet:
    with torch.device("meta"):
        return edet.create_model(name, **changes)


@pytest.mark.parametrize("scale", PARTS)
def test_parameters_and_macs(scale: str) -> None:
    parameters, gmacs = PARTS[scale]
    model = on_meta(f"tf_efficientdet_{scale}")
    assert edet.count_parameters(model) == parameters
    macs = edet.count_macs(model)
    assert [n / 1e9 for n in macs] == pytest.approx(gmacs, abs=0.001)
    assert macs.total == sum(macs)


@pytest.mark.parametrize("scale", LITE)
def test_parameters_and_macs_of_lite(scale: str) -> None:
    model = on_meta(f"tf_efficientdet_{scale}")
    assert edet.count_parameters(model).total == LITE[scale][0]
    assert edet.count_macs(model).total / 1e9 == pytest.approx(LITE[scale][1], abs=0.001)


@pytest.mark.parametrize("scale", [f"d{i}" for i in range(8)])
def test_native_models_have_no_redundant_biases(scale: str) -> None:
    config = get_config(f"efficientdet_{scale}")
    native, tf = on_meta(f"efficientdet_{scale}"), on_meta(f"tf_efficientdet_{scale}")
    nodes = 8 * config.cells
    biases = nodes + 6 + 2 * config.head_repeats  # and the projections of the first cell
    fewer = edet.count_parameters(tf).total - edet.count_parameters(native).total
    assert fewer == biases * config.width


def test_count_macs_leaves_the_model_as_it_was(small: edet.EfficientDet) -> None:
    small.train()
    small.backbone.bn1.eval()
    before = {k: v.clone() for k, v in small.state_dict().items()}
    modes = [module.training for module in small.modules()]
    edet.count_macs(small, (64, 64))
    assert [module.training for module in small.modules()] == modes
    assert all(v.equal(before[k]) for k, v in small.state_dict().items())
    assert not any(module._forward_hooks for module in small.modules())


@pytest.mark.parametrize("size", [(64, 64), (640, 384), (33, 57), (129, 257), (1, 1), (1, 300)])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_size_and_batch(
    small: edet.EfficientDet, size: tuple[int, int], batch: int, assert_agrees: Callable[..., None]
) -> None:
    images = torch.randn(batch, 3, *size)
    classes, boxes = small(images)
    for level, (c, b) in enumerate(zip(classes, boxes, strict=True), start=3):
        extent = tuple(-(-n // 2**level) for n in size)
        assert c.shape == (batch, 9 * 3, *extent)
        assert b.shape == (batch, 9 * 4, *extent)
    if batch * size[0] * size[1] < 200_000:
        assert_agrees(small, images)


def test_empty_batch(
    small: edet.EfficientDet,
    fused: Callable[..., list[Tensor]],
    layers: Callable[..., list[Tensor]],
) -> None:
    images = torch.empty(0, 3, 64, 64)
    shapes = [x.shape for x in fused(small, images)]
    assert shapes == [x.shape for x in layers(small, images)]
    assert shapes[0] == (0, 27, 8, 8)


def test_results_do_not_depend_on_the_batch_or_the_strides(
    small: edet.EfficientDet, fused: Callable[..., list[Tensor]]
) -> None:
    images = torch.randn(3, 3, 64, 96)
    together = fused(small, images)
    strided = fused(small, images.to(memory_format=torch.channels_last))
    alone = fused(small, images[1:2])
    for x, y, z in zip(together, strided, alone, strict=True):
        assert x.equal(y)
        torch.testing.assert_close(x[1:2], z, rtol=1e-5, atol=1e-5)


def test_images_are_not_changed(
    small: edet.EfficientDet, fused: Callable[..., list[Tensor]]
) -> None:
    images = torch.randn(1, 3, 64, 64).to(memory_format=torch.channels_last)
    before = images.clone()
    fused(small, images)
    assert images.equal(before)


@pytest.mark.parametrize("changes", [{"min_level": 2}, {"min_level": 4, "max_level": 6}])
def test_feature_levels(changes: dict[str, int], assert_agrees: Callable[..., None]) -> None:
    model = edet.create_model("tf_efficientdet_d0", width=16, cells=1, head_repeats=1, **changes)
    images = torch.randn(1, 3, 64, 64)
    assert_agrees(model.eval(), images)
    low = changes["min_level"]
    high = changes.get("max_level", 7)
    sizes = [x.shape[-1] for x in model(images)[0]]
    assert sizes == [-(-64 // 2**level) for level in range(low, high + 1)]


@pytest.mark.slow
def test_d7x_has_p8(assert_agrees: Callable[..., None]) -> None:
    model = edet.create_model("tf_efficientdet_d7x", width=32, cells=2, head_repeats=1).eval()
    assert len(model.fpn.cells[0].nodes) == 10
    images = torch.randn(1, 3, 96, 160)
    assert [x.shape[-2:] for x in model(images)[0]][-1] == (1, 1)
    assert_agrees(model, images)


class OwnBackbone(nn.Module):
    """Three maps of strides 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, s, s) for i, o, s in [(3, 16, 8), (16, 24, 2), (24, 10, 2)]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for conv in self.convs:
            x = conv(x).relu()
            maps.append(x)
        return maps


def test_own_backbone(
    randomise: Callable[[nn.Module], nn.Module], assert_agrees: Callable[..., None]
) -> None:
    model = edet.create_model(
        "efficientdet_d0",
        width=16,
        num_classes=5,
        fusion="softmax",
        backbone=OwnBackbone(),
        backbone_channels=[16, 24, 10],
    )
    randomise(model)
    assert_agrees(model.eval(), torch.randn(2, 3, 64, 64))
    # P3 has the width already
    assert "fpn.cell.0.fnode.3.combine.resample.0.conv.conv.weight" not in model.state_dict()


def test_own_backbone_must_tell_its_channels() -> None:
    with pytest.raises(ValueError, match="backbone_channels must give the channels"):
        edet.create_model("tf_efficientdet_d0", backbone=OwnBackbone())
    model = edet.create_model(
        "tf_efficientdet_d0", backbone=OwnBackbone(), backbone_channels=[16, 24, 32]
    )
    with pytest.raises(ValueError, match=r"maps\[2\] must be \(N, 32, H, W\), got \(1, 10, 2, 2\)"):
        model.eval()(torch.randn(1, 3, 64, 64))


def test_image_size_of_the_configuration() -> None:
    assert on_meta("tf_efficientdet_d0", image_size=640).config.image_size == (640, 640)
    assert on_meta("tf_efficientdet_d0", image_size=(384, 640)).config.image_size == (384, 640)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 64, 64), ValueError, r"must be \(N, 3, H, W\), got \(3, 64, 64\)"),
        (torch.zeros(1, 64, 64, 3), ValueError, r"got \(1, 64, 64, 3\) \(channels last\? use .*"),
        (torch.zeros(1, 1, 64, 64), ValueError, r"must be \(N, 3, H, W\), got \(1, 1, 64, 64\)"),
        (torch.zeros(1, 3, 0, 64), ValueError, "images must have at least one pixel"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "be torch.float32 .*torch.uint8"),
        (torch.zeros(1, 3, 8, 8).double(), TypeError, "must be torch.float32 .*torch.float64"),
        (torch.zeros(1, 3, 8, 8, device="meta"), ValueError, "must be on cpu .*, got meta"),
        ([[0.0]], TypeError, "images must be a tensor, got list"),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_images(
    small: edet.EfficientDet, images: Tensor, error: type[Exception], message: str, grad: bool
) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        small(images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(
    small: edet.EfficientDet,
    dtype: torch.dtype,
    fused: Callable[..., list[Tensor]],
    layers: Callable[..., list[Tensor]],
) -> None:
    images = torch.randn(1, 3, 64, 64).to(dtype)
    small.to(dtype)
    truths = layers(copy.deepcopy(small).double(), images.double())
    found, eager = fused(small, images), layers(small, images)
    assert {x.dtype for x in found} == {dtype}
    mine, theirs = (relative_difference(x, truths) for x in (found, eager))
    # that of an op: maps are rounded to 16 bits between all layers, more often than fused ones are
    check_errors("a small model", {"fused": mine}, theirs, dtype, factor=OP_FACTOR)


def test_autocast(small: edet.EfficientDet, fused: Callable[..., list[Tensor]]) -> None:
    images = torch.randn(1, 3, 64, 64)
    exact = fused(small, images)
    with torch.autocast("cpu", torch.bfloat16):
        found = fused(small, images)
    assert {x.dtype for x in found} == {torch.bfloat16}
    for x, y in zip(found, exact, strict=True):
        assert 0 < (x - y).abs().max() <= 0.05 * y.abs().max()
    assert all(x.equal(y) for x, y in zip(fused(small, images), exact, strict=True))


def test_training_step(small: edet.EfficientDet) -> None:
    small.train()
    classes, boxes = small(torch.randn(2, 3, 64, 64))
    sum((x**2).sum() for x in (*classes, *boxes)).backward()
    assert not [name for name, p in small.named_parameters() if p.grad is None]


@pytest.mark.slow
def test_export_holds_only_torch_operations(
    small: edet.EfficientDet, fused: Callable[..., list[Tensor]]
) -> None:
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        program = torch.export.export(small, (images,))
    assert not [n for n in program.graph.nodes if "edet" in str(n.target)]
    found = fused(program.module(), images)
    for x, y in zip(found, fused(small, images), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_without_a_graph_break(
    small: edet.EfficientDet, fused: Callable[..., list[Tensor]]
) -> None:
    images = torch.randn(1, 3, 64, 64)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        found = fused(compiled, images)
        for x, y in zip(found, fused(small, images), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        with torch.no_grad():  # the weights are inputs of the compiled graph
            small.fpn.cells[0].nodes[0].after_combine.conv.bn.bias.add_(1.0)
