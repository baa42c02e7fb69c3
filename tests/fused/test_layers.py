"""Where fused ops would compute from something else than the layers do, the layers run."""

from __future__ import annotations

import copy
import io
import pickle
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune

import edet
from edet.fused.module import PackedModule

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
Run = Callable[..., list[Tensor]]
PARTS = ("backbone", "fpn", "class_net", "box_net")


def parts(model: nn.Module) -> list[PackedModule]:
    return [m for m in model.modules() if isinstance(m, PackedModule)]


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def assert_layers(model: nn.Module, fused: Run, layers: Run) -> list[Tensor]:
    """Without gradients the result is that of the layers."""
    found = fused(model, IMAGES)
    assert_close(found, layers(model, IMAGES))
    return found


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """The parts in which nothing was exchanged are fused: rounding is another."""
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4 * float(y.abs().max()))


# --- weights that a hook or a parametrisation computes --------------------------------------------


def pruned(model: nn.Module) -> None:
    for conv in convolutions(model):
        prune.l1_unstructured(conv, "weight", 0.5)


def weight_normed(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for conv in convolutions(model):
            nn.utils.weight_norm(conv)


def spectral_normed(model: nn.Module) -> None:
    for part in (model.fpn, model.class_net, model.box_net):
        for conv in convolutions(part):
            nn.utils.spectral_norm(conv)


def weight_normed_by_parametrisation(model: nn.Module) -> None:
    for conv in convolutions(model):
        parametrizations.weight_norm(conv)


class Scaled(nn.Module):
    """A parametrisation that depends on a number."""

    factor = 1.0

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def scaled(model: nn.Module) -> None:
    for conv in convolutions(model):
        parametrize.register_parametrization(conv, "weight", Scaled())


COMPUTED = {
    "pruned": pruned,
    "weight_norm": weight_normed,
    "spectral_norm": spectral_normed,
    "parametrised weight_norm": weight_normed_by_parametrisation,
    "parametrised": scaled,
}


@pytest.mark.parametrize("how", ["frozen", "packed before", "frozen before"])
@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_are_computed_at_every_call(
    name: str, how: str, small: edet.EfficientDet, fused: Run, layers: Run
) -> None:
    if "before" in how:
        fused(small.freeze() if "frozen" in how else small, IMAGES)
    COMPUTED[name](small)
    if how == "frozen":
        small.freeze()
    before = fused(small, IMAGES)
    with torch.no_grad():
        for module in small.modules():  # what the weights are computed from
            if isinstance(module, Scaled):
                module.factor = 1.1
        for key, tensor in small.state_dict().items():
            if key.endswith(("weight_orig", "weight_g", "original0", "weight_mask", "weight_u")):
                tensor.mul_(1.1)
    after = fused(small, IMAGES)
    assert not any(torch.equal(x, y) for x, y in zip(after, before, strict=True))
    small.unfreeze()
    assert_close(after, layers(small, IMAGES))


def test_pruned_weights_of_another_dtype(small: edet.EfficientDet, fused: Run, layers: Run) -> None:
    pruned(small)
    small.double()
    assert_close(fused(small, IMAGES.double()), layers(small, IMAGES.double()))


def test_pruning_made_permanent_is_fused_again(small: edet.EfficientDet, fused: Run) -> None:
    pruned(small)
    fused(small, IMAGES)
    for conv in convolutions(small):
        prune.remove(conv, "weight")
    with torch.no_grad():
        assert small.backbone.packed(IMAGES) is not None
        assert all(
            getattr(small, part).packed(torch.zeros(1, 16, 4, 4)) is not None for part in PARTS[1:]
        )


# --- hooks ----------------------------------------------------------------------------------------


def pre_hook(module: nn.Module, seen: list[object]) -> Any:
    return module.register_forward_pre_hook(lambda *args: seen.append(args))


def forward_hook(module: nn.Module, seen: list[object]) -> Any:
    return module.register_forward_hook(lambda *args: seen.append(args))


def keyword_hook(module: nn.Module, seen: list[object]) -> Any:
    return module.register_forward_hook(lambda *args: seen.append(args), with_kwargs=True)


INNER = {
    "backbone": lambda m: m.backbone.blocks[1][0].bn2,
    "fpn": lambda m: m.fpn.cell[1].fnode[3],
    "fpn resample": lambda m: m.fpn.resample["3"].conv.conv,
    "class_net": lambda m: m.class_net.conv_rep[0],
    "box_net": lambda m: m.box_net.predict.conv_pw,
}


@pytest.mark.parametrize(
    ("hook", "state"),
    [(pre_hook, "packed"), (forward_hook, "replayed"), (keyword_hook, "frozen"), (pre_hook, "")],
)
@pytest.mark.parametrize("name", INNER)
def test_hooks_of_inner_layers_run(
    name: str, hook: Callable[..., Any], state: str, small: edet.EfficientDet, fused: Run
) -> None:
    if state in ("frozen", "replayed"):
        small.freeze()
    for _ in range({"": 0, "packed": 1, "frozen": 1, "replayed": 2}[state]):
        fused(small, IMAGES)
    seen: list[object] = []
    handle = hook(INNER[name](small), seen)
    for calls in (1, 2):
        fused(small, IMAGES)
        levels = 5 if "net" in name else 1
        assert len(seen) == calls * levels
    handle.remove()
    fused(small, IMAGES)
    assert len(seen) == 2 * levels


def test_a_hook_that_changes_a_result(small: edet.EfficientDet, fused: Run, layers: Run) -> None:
    before = fused(small.freeze(), IMAGES)
    small.fpn.cell[0].fnode[0].register_forward_hook(lambda module, args, out: out + 1)
    small.unfreeze()
    after = assert_layers(small, fused, layers)
    assert not any(torch.equal(x, y) for x, y in zip(after, before, strict=True))


def test_hooks_on_every_module(small: edet.EfficientDet, fused: Run) -> None:
    fused(small.freeze(), IMAGES)
    seen = []
    handle = register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        fused(small, IMAGES)
        assert nn.Conv2d in seen
    finally:
        handle.remove()
    seen.clear()
    fused(small, IMAGES)
    assert not seen


@pytest.mark.parametrize("where", ["model", "backbone", "inner"])
def test_a_predictor_runs_hooks(where: str, small: edet.EfficientDet) -> None:
    module = {
        "model": small,
        "backbone": small.backbone,
        "inner": small.fpn.cell[0].fnode[0],
    }[where]
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    predictor = edet.Predictor(small, image_size=(64, 64), score_threshold=0.0)
    expected = [predictor(image) for _ in range(3)][-1]  # planned
    seen: list[object] = []
    handle = module.register_forward_hook(lambda *args: seen.append(args))
    for calls in range(1, 5):
        found = predictor(image)
        assert len(seen) == calls
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-5)
    handle.remove()
    assert torch.equal(predictor(image).boxes, expected.boxes)
    assert len(seen) == 4


# --- layers exchanged for others ------------------------------------------------------------------


class Adapter(nn.Module):
    """A low-rank addition to a convolution, as fine-tuning adds it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.down = nn.Conv2d(conv.in_channels, 4, 1, bias=False)
        self.up = nn.Conv2d(4, conv.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.up(self.down(x))


class AdaptedConv(nn.Conv2d):
    """The same as a class derived from the convolution, whose addition begins at zero."""

    def adapt(self) -> None:
        self.extra = nn.Parameter(torch.zeros(self.out_channels, self.in_channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + nn.functional.conv2d(x, self.extra)


class ChannelAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def adapted(conv: nn.Conv2d) -> AdaptedConv:
    new = AdaptedConv(conv.in_channels, conv.out_channels, 1, bias=conv.bias is not None)
    new.load_state_dict(conv.state_dict())
    new.adapt()
    return new


def group(norm: nn.BatchNorm2d) -> nn.GroupNorm:
    return nn.GroupNorm(8, norm.num_features)


def not_affine(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(norm.num_features, affine=False)


def untracked(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(norm.num_features, track_running_stats=False)


def dropped(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Dropout(0.0), layer)


def identity(layer: nn.Module) -> nn.Identity:
    return nn.Identity()


NORMS = {
    "stem": lambda m: (m.backbone, "bn1"),
    "block": lambda m: (m.backbone.blocks[2][0], "bn2"),
    "node": lambda m: (m.fpn.cell[0].fnode[0].after_combine.conv, "bn"),
    "lateral": lambda m: (m.fpn.cell[0].fnode[2].combine.resample["1"].conv, "bn"),
    "resample": lambda m: (m.fpn.resample["3"].conv, "bn"),
    "class_net": lambda m: (m.class_net.bn_rep[0][1], "bn"),
}
CONVS = {
    "block": lambda m: (m.backbone.blocks[2][0], "conv_pw"),
    "node": lambda m: (m.fpn.cell[0].fnode[0].after_combine.conv, "conv_pw"),
    "lateral": lambda m: (m.fpn.resample["3"].conv, "conv"),
    "class_net": lambda m: (m.class_net.conv_rep[0], "conv_pw"),
    "prediction": lambda m: (m.box_net.predict, "conv_pw"),
}
WHOLE = {
    "squeeze-excite": lambda m: (m.backbone.blocks[1][0], "se", lambda se: ChannelAttention(96)),
    "block": lambda m: (m.backbone.blocks[1], "1", dropped),
    "no block": lambda m: (m.backbone.blocks[1], "1", identity),
    "stage": lambda m: (m.backbone.blocks, "1", lambda stage: nn.Sequential(*stage)),
    "stage in one": lambda m: (m.backbone.blocks, "1", lambda s: nn.Conv2d(16, 24, 3, 2, 1)),
    "stem": lambda m: (m.backbone, "conv_stem", dropped),
    "node": lambda m: (m.fpn.cell[0].fnode[0], "after_combine", dropped),
    "separable": lambda m: (m.fpn.cell[0].fnode[0].after_combine, "conv", dropped),
    "projection": lambda m: (m.fpn.resample, "3", dropped),
    "layer": lambda m: (m.class_net.conv_rep, "0", dropped),
    "prediction": lambda m: (m.class_net, "predict", dropped),
    "no norm": lambda m: (m.fpn.cell[0].fnode[0].after_combine.conv, "bn", identity),
    "stride": lambda m: (
        *(m.backbone.blocks[1][0], "conv_dw"),
        lambda conv: nn.Conv2d(96, 96, 3, 2, 1, groups=96, bias=False),
    ),
    "dilated": lambda m: (
        *(m.fpn.cell[0].fnode[0].after_combine.conv, "conv_dw"),
        lambda conv: nn.Conv2d(16, 16, 3, 1, 2, 2, groups=16, bias=False),
    ),
    "groups": lambda m: (
        *(m.class_net.conv_rep[0], "conv_pw"),
        lambda conv: nn.Conv2d(16, 16, 1, groups=2),
    ),
}


def exchange(model: nn.Module, where: Callable[..., Any], change: Any = None) -> None:
    owner, name, *own = where(model)
    (change,) = own or [change]
    layer = owner[int(name)] if isinstance(owner, nn.ModuleList) else owner.get_submodule(name)
    owner._modules[name] = change(layer)
    model.train(model.training)


EXCHANGES = {
    **{f"{c.__name__} norm of {n}": (w, c) for n, w in NORMS.items() for c in (group, not_affine)},
    **{f"{c.__name__} convolution of {n}": (w, c) for n, w in CONVS.items() for c in (Adapter,)},
    "untracked norm": (NORMS["node"], untracked),
    "untracked norm of the backbone": (NORMS["block"], untracked),
    "derived convolution": (CONVS["node"], adapted),
    "derived convolution of the backbone": (CONVS["block"], adapted),
    "derived convolution of a prediction": (CONVS["prediction"], adapted),
    "in a sequence": (CONVS["node"], dropped),
    **{name: (where, None) for name, where in WHOLE.items()},
}


def write_extras(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, AdaptedConv):
            nn.init.normal_(module.extra)


@pytest.mark.parametrize("name", EXCHANGES)
def test_exchanged_layers_evaluate(
    name: str, small: edet.EfficientDet, fused: Run, layers: Run
) -> None:
    fused(small, IMAGES)  # packed
    exchange(small, *EXCHANGES[name])
    write_extras(small)
    expected = assert_layers(small, fused, layers)
    small.freeze()
    for _ in range(2):
        assert_close(fused(small, IMAGES), expected)


@pytest.mark.parametrize("name", EXCHANGES)
def test_exchanged_layers_train(name: str, small: edet.EfficientDet) -> None:
    small.train()
    # batch norms over the two pixels of the last level answer rounding of the backbone's maps with
    # other numbers, so its own path is compared elsewhere (test_lean_backbone.py)
    small.backbone.fused = False
    exchange(small, *EXCHANGES[name])
    write_extras(small)
    baseline = copy.deepcopy(small)
    for part in parts(baseline):
        part.fused = False
    results = []
    for model in (small, baseline):
        outputs = [x for maps in model(IMAGES) for x in maps]
        sum(x.square().mean() for x in outputs).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append([*outputs, torch.cat(gradients)])
    for x, y in zip(*results, strict=True):
        assert (x - y).norm() <= 1e-3 * y.norm()


def test_another_forward_of_an_instance(small: edet.EfficientDet, fused: Run, layers: Run) -> None:
    fused(small, IMAGES)
    conv = small.class_net.predict.conv_pw
    conv.forward = types.MethodType(lambda self, x: nn.Conv2d.forward(self, x) / 2, conv)
    assert_layers(small, fused, layers)


def test_epsilon_of_a_norm(small: edet.EfficientDet, fused: Run, layers: Run) -> None:
    before = fused(small, IMAGES)
    for module in small.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.5
    for x, y, b in zip(fused(small, IMAGES), layers(small, IMAGES), before, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))
        assert (x - b).abs().max() > 1e-3 * b.abs().max()


def test_synchronised_norms_are_fused(small: edet.EfficientDet) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small)
    with torch.no_grad():
        assert model.backbone.packed(IMAGES) is not None
        assert model.fpn.packed(torch.zeros(1, 16, 4, 4)) is not None


# --- torch.jit.trace ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("state", ["", "packed", "frozen", "training"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_model_can_be_traced(
    state: str, gradients: bool, small: edet.EfficientDet, layers: Run
) -> None:
    small.train(state == "training")
    if state == "training":  # see test_exchanged_layers_train
        small.backbone.fused = False
    if state == "packed":
        with torch.no_grad():
            small(IMAGES)
    expected = layers(copy.deepcopy(small), IMAGES)
    if state == "frozen":
        small.freeze()
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(small, IMAGES, strict=False, check_trace=state != "training")
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        found = torch.jit.load(file)(IMAGES)
    if state == "training":  # statistics of the batch
        expected = layers(small, IMAGES)
    for x, y in zip((x for maps in found for x in maps), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


# --- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_hooked_frozen_model(how: Any, small: edet.EfficientDet, fused: Run) -> None:
    pruned(small)
    expected = fused(small.freeze(), IMAGES)
    for x, y in zip(fused(how(small), IMAGES), expected, strict=True):
        assert torch.equal(x, y)
