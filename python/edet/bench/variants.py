"""What is compared: a model's eager and fused calls, stage by stage, on the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import edet_kernels
from edet_kernels.testing.numeric import (
    CheckFailed,
    relative_difference,
)
from edet_kernels.testing.timing import Call

from ..detection.anchors import model_anchors
from ..detection.pipeline import Selection, columns, stages
from ..detection.postprocess import postprocess
from ..detection.predictor import Predictor
from ..detection.preprocess import preprocess
from ..fused.module import PackedModule
from ..fused.packed import pack_nodes
from ..fused.plan import record
from ..models.bifpn import BiFPN
from ..models.efficientdet import EfficientDet
from ..models.efficientnet import normalise_pixels
from ..models.factory import create_model
from .measure import KernelTime
from .result import OURS
from .table import PAIRS


def random_model(name: str, images: Tensor) -> EfficientDet:
    """The model ``name`` in eval mode with random weights, the same ones every time.

    It is on the device of ``images``, which set its batch norms, in float32.

    How much a random network amplifies rounding is a matter of luck; what is checked and timed
    must not be.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(name).eval().to(images.device)
    set_batch_norms(model, images)
    return model


def set_batch_norms(model: nn.Module, images: Tensor) -> None:
    """Makes every batch norm scale its input for ``images`` to a mean square of one.

    Without this the maps of a network with random weights fade away from layer to layer, and
    neither their differences nor the time spent on them mean much. Neither means are taken out nor
    channels scaled one by one: in maps of a few pixels that would enlarge rounding.
    """

    def hook(bn: nn.Module, args: tuple[Tensor, ...]) -> None:
        bn.running_mean.zero_()  # type: ignore[operator]
        bn.running_var.fill_(args[0].square().mean())  # type: ignore[operator]

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(hook) for norm in norms]
    eager = [m for m in model.modules() if isinstance(m, PackedModule)]
    try:
        for module in eager:
            module.training = True
        # a backend that was asked for by name may have no kernels for training
        with torch.no_grad(), edet_kernels.backend("reference"):
            model(images)
    finally:
        for module in eager:
            module.training = False
        for handle in hooks:
            handle.remove()


def eager_copy(model: EfficientDet) -> EfficientDet:
    """A copy of ``model`` that runs its plain PyTorch layers in eval mode and without gradients."""
    copied = copy.deepcopy(model).eval()
    for module in copied.modules():
        if isinstance(module, PackedModule):
            module.fused = False
    return copied


def prepare(model: EfficientDet, device: torch.device, dtype: torch.dtype) -> EfficientDet:
    """Moves ``model`` to ``device``, ``dtype`` and channels_last."""
    return model.to(device=device, dtype=dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def part_calls(
    model: EfficientDet, images: Tensor, features: Sequence[Tensor], pyramid: Sequence[Tensor]
) -> dict[str, Call]:
    """A call for each of :data:`PARTS` on inputs that are the same for all models."""

    def whole() -> list[Tensor]:
        classes, boxes = model(images)
        return [*classes, *boxes]

    return {
        "BiFPN": lambda: model.fpn(features),
        "heads": lambda: [*model.class_net(pyramid), *model.box_net(pyramid)],
        "backbone": lambda: model.backbone(images),
        "whole": whole,
    }


def outer_calls(model: EfficientDet, images: Tensor) -> tuple[Call, Call, Call]:
    """Pre-processing of photographs, post-processing of head outputs, and that by the references.

    The outputs are those of ``model`` for ``images``.
    """
    config, batch = model.config, images.shape[0]
    size = (int(images.shape[2]), int(images.shape[3]))
    originals = photographs(batch)

    def before() -> list[Tensor]:
        arguments: dict[str, Any] = {"device": images.device, "dtype": images.dtype}
        return [preprocess(originals, size, mean=config.mean, std=config.std, **arguments).images]

    anchors = model_anchors(config, size, device=images.device)
    classes, boxes = model(images)

    def after() -> list[Tensor]:
        return list(postprocess(classes, boxes, anchors, sizes=[size] * batch))

    def by_references() -> list[Tensor]:
        with edet_kernels.backend("reference"):
            return after()

    return before, after, by_references


def photographs(batch: int) -> list[Tensor]:
    """As many images of noise, (3, 480, 640) uint8."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 480, 640)
    return [
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(batch)
    ]


def node_calls(fpn: BiFPN, maps: Sequence[Tensor]) -> dict[str, Call]:
    """The nodes of a BiFPN in one ``bifpn`` call and in a ``fusion_node`` call each, both planned.

    The projections of the backbone's ``maps``, the same for both, are not part of the calls.
    """
    dtype = maps[0].dtype
    weights = pack_nodes(fpn.as_fusion_nodes(), dtype)
    inputs, sizes = weights.node_inputs(maps, dtype)
    calls: dict[str, Call] = {}
    for name, run in (
        (PAIRS["BiFPN nodes"], weights.run_node_by_node),
        (OURS, weights.run_nodes),
    ):
        _, plan = record(partial(run, inputs, sizes), inputs)
        calls[name] = partial(run, inputs, sizes) if plan.refusal else partial(plan, inputs)
    return calls


def predictor_calls(
    model: EfficientDet, eager: EfficientDet, size: tuple[int, int], batch: int
) -> tuple[dict[str, Call], float, float]:
    """Photographs to detections by a :class:`Predictor`; on a CPU also its time inside operators.

    Returns:
        the calls, and the differences of the network's and of ``eager``'s outputs from those of
        ``eager`` in float64.

    Raises:
        CheckFailed: the detections are not those of the references on the same outputs.
    """
    images = photographs(batch)
    predictor = Predictor(model, image_size=size, batch_size=batch, score_threshold=0.0)
    device, levels = predictor.device, model.config.levels
    letterbox, network, finish = stages(predictor.network, [(480, 640)] * batch, size, Selection())
    inputs = letterbox([x.to(device) for x in images])
    outputs = network(inputs)
    mean, std = (
        torch.tensor(values, dtype=torch.float64, device=device)
        for values in (model.config.mean, model.config.std)
    )
    normalised = normalise_pixels(inputs[0].double() / 255, mean, std, torch.float64)
    theirs, exact = eager(normalised.to(predictor.dtype)), copy.deepcopy(eager).double()(normalised)
    differences = [
        relative_difference([*found[0], *found[1]], [*exact[0], *exact[1]])
        for found in ((outputs[:levels], outputs[levels:-1]), theirs)
    ]
    with edet_kernels.backend("reference"):
        [expected] = finish(outputs)
    call = partial(predictor, images)
    for _ in range(3):
        found = call()
    for x, rows in zip(found, expected.cpu(), strict=True):
        boxes, scores, labels = columns(rows)
        same = torch.equal(x.labels, labels)
        if not same or relative_difference([x.boxes, x.scores], [boxes, scores]) > 1e-6:
            raise CheckFailed(
                "predictor finds other boxes than the references: no times are reported"
            )
    calls: dict[str, Call] = {OURS: call}
    if device.type == "cpu":
        calls = {PAIRS["predictor"]: KernelTime(call), **calls}
    return calls, differences[0], differences[1]
