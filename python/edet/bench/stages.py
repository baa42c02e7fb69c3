"""Each stage of a model in PyTorch's eager layers and here: prepared, checked, timed, set down."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import edet_kernels
from edet_kernels.testing.numeric import (
    check_detections,
    check_network,
    relative_difference,
)
from edet_kernels.testing.timing import Call, copy_bandwidth, host_clock, measure, product_peak

from ..models.counts import count_macs, count_parameters
from ..models.efficientdet import EfficientDet
from ..models.factory import model_config
from .measure import machine_name
from .result import OURS
from .table import PAIRS, PARTS, Bench, Row
from .variants import (
    eager_copy,
    node_calls,
    outer_calls,
    part_calls,
    predictor_calls,
    prepare,
    random_model,
)

#: Rounds that are run and not counted: weights are packed and caches filled in them.
WARM_UP = 3


@torch.no_grad()
def run_bench(
    model: EfficientDet | str = "tf_efficientdet_d0",
    *,
    images: Tensor | None = None,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    rounds: int = 20,
    seconds: float = 120.0,
    progress: Callable[[int, int], None] | None = None,
) -> Bench:
    """Checks the fused parts of a model against a float64 reference, then times them.

    Compared are the model's plain PyTorch layers ("eager": eval mode, no gradients, channels_last)
    with softmax fusion and with the model's own, and the fused ops. All variants take turns in
    rounds (:func:`edet_kernels.testing.timing.measure`).

    Args:
        model: a model, which is not changed; or the name of one, which gets random weights.
        images: (N, 3, H, W) normalised; random when None.
        batch_size: of random images.
        dtype: float32, bfloat16 or float16.
        device: where to run.
        rounds: timed rounds, after a few that are not counted.
        seconds: no further round is begun after this long, once there have been three.
        progress: called with the number of finished and of all rounds.

    Raises:
        CheckFailed: a part is wrong; nothing is timed then.
        ValueError: unknown model, or not at least one round and one image.
    """
    if rounds < 1 or batch_size < 1:
        raise ValueError(f"rounds and batch_size must be at least 1, got {rounds} and {batch_size}")
    device = torch.device(device)
    if images is None:
        config = model_config(model) if isinstance(model, str) else model.config
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, 3, *config.image_size)
        images = torch.randn(shape, dtype=torch.float32, generator=generator)
    subject = prepare_subject(model, images, device, dtype)
    pairs, differences = check_subject(subject)
    turns = {
        (part, name): calls[part]
        for part in PARTS
        for name, calls in subject.variants.items()
        if part in calls
    }
    turns |= {(part, name): call for part, calls in pairs.items() for name, call in calls.items()}
    samples = measure(
        turns,
        host_clock(device),
        rounds=rounds,
        limit=seconds,
        warm_up=WARM_UP,
        progress=progress,
    )
    return assemble(subject, samples, differences)


class Subject(NamedTuple):
    """A model made ready to be compared.

    Attributes:
        ours: the model with its fused ops, frozen.
        eager: the same weights in PyTorch's layers.
        images, features, pyramid: the inputs of the backbone, the BiFPN and the heads.
        variants: the calls of each variant by part, ours last.
    """

    ours: EfficientDet
    eager: EfficientDet
    images: Tensor
    features: list[Tensor]
    pyramid: list[Tensor]
    variants: dict[str, dict[str, Call]]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        return int(self.images.shape[2]), int(self.images.shape[3])


def prepare_subject(
    model: EfficientDet | str, images: Tensor, device: torch.device, dtype: torch.dtype
) -> Subject:
    """A copy of the model, or a random one of that name, as all variants that are compared."""
    source = random_model(model, images) if isinstance(model, str) else copy.deepcopy(model)
    ours = prepare(source.eval(), device, dtype)
    images = images.to(device, dtype, memory_format=torch.channels_last)
    eager = eager_copy(ours)
    features = eager.backbone(images)
    pyramid = eager.fpn(features)
    fusion = ours.config.fusion
    variants = {f"eager {fusion}": part_calls(eager, images, features, pyramid)}
    if fusion != "softmax":
        softmax = EfficientDet(
            replace(ours.config, fusion="softmax"),
            backbone=copy.deepcopy(ours.backbone),
            backbone_channels=ours.fpn.in_channels,
        )
        prepare(softmax, device, dtype)
        softmax.load_state_dict(ours.state_dict(), strict=False)  # a sum has no edge weights
        calls = part_calls(eager_copy(softmax), images, features, pyramid)
        # the other parts are the same
        variants = {"eager softmax": {p: calls[p] for p in ("BiFPN", "whole")}, **variants}
    variants[OURS] = part_calls(ours.freeze(), images, features, pyramid)
    return Subject(ours, eager, images, features, pyramid, variants)


def check_subject(
    subject: Subject,
) -> tuple[dict[str, dict[str, Call]], dict[str, tuple[float, float]]]:
    """Checks every part of ours; what runs around the network joins the variant.

    Returns:
        the calls of each of :data:`PAIRS`, and the differences of ours and of eager for each part.

    Raises:
        CheckFailed: a part is wrong.
    """
    ours, eager, images, features, pyramid, variants = subject
    dtype = images.dtype
    exact = part_calls(
        eager_copy(ours).double(),
        images.double(),
        [x.double() for x in features],
        [x.double() for x in pyramid],
    )
    differences = {"pre-processing": (0.0, 0.0)}  # there is one only
    for part in exact:
        reference = exact[part]()
        mine, theirs = (
            relative_difference(variants[v][part](), reference)
            for v in (OURS, f"eager {ours.config.fusion}")
        )
        check_network(part, mine, theirs, dtype)
        differences[part] = mine, theirs
    del exact, reference
    before, after, by_references = outer_calls(ours, images)
    differences["post-processing"] = (
        check_detections("post-processing", after(), by_references()),
        0.0,
    )
    variants[OURS] |= {"pre-processing": before, "post-processing": after}
    pairs = {"BiFPN nodes": node_calls(ours.fpn, features)}
    found = pairs["BiFPN nodes"]
    difference = relative_difference(found[OURS](), found[PAIRS["BiFPN nodes"]]())
    check_network("BiFPN nodes", difference, 0.0, dtype)
    differences["BiFPN nodes"] = difference, 0.0
    pairs["predictor"], mine, theirs = predictor_calls(ours, eager, subject.size, images.shape[0])
    check_network("predictor", mine, theirs, dtype)
    differences["predictor"] = mine, theirs
    return pairs, differences


def costs(subject: Subject) -> dict[str, dict[str, int]]:
    """Multiply-adds, parameters and bytes of each part that is computed by convolutions."""
    ours, images = subject.ours, subject.images
    features, pyramid = subject.features, subject.pyramid
    macs, parameters = count_macs(ours, subject.size), count_parameters(ours)
    heads = parameters.class_net + parameters.box_net
    outputs = subject.variants[OURS]["whole"]()
    counts = {
        "BiFPN": (macs.fpn, parameters.fpn, [*features, *pyramid]),
        "heads": (macs.class_net + macs.box_net, heads, [*pyramid, *pyramid, *outputs]),
        "backbone": (macs.backbone, parameters.backbone, [images, *features]),
        "whole": (macs.total, parameters.total, [images, *outputs]),
    }
    return {
        part: {
            "macs": operations * images.shape[0],
            "parameters": weights,
            "bytes": (weights + sum(x.numel() for x in maps)) * images.element_size(),
        }
        for part, (operations, weights, maps) in counts.items()
    }


def assemble(
    subject: Subject,
    samples: dict[tuple[str, str], list[float]],
    differences: dict[str, tuple[float, float]],
) -> Bench:
    """The table of what was measured, with the conditions and the roofs of the machine."""
    device, dtype = subject.images.device, subject.images.dtype
    times: dict[str, dict[str, list[float]]] = {part: {} for part, _ in samples}
    for (part, name), milliseconds in samples.items():
        times[part][name] = milliseconds
    counted = costs(subject)
    # a CPU's kernels compute in float32 whatever the maps are
    peak = product_peak(device, torch.float32 if device.type == "cpu" else dtype)
    return Bench(
        model=subject.ours.config.name,
        image_size=subject.size,
        batch_size=subject.images.shape[0],
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        threads=torch.get_num_threads(),
        rounds=len(next(iter(samples.values()))),
        machine=machine_name(device),
        python=platform.python_version(),
        torch=torch.__version__,
        edet_kernels=edet_kernels.__version__,
        backends={c.op: c.backend for c in edet_kernels.explain(device, dtype)},
        variants=list(subject.variants),
        rows=[
            Row(part, milliseconds, *differences[part], **counted.get(part, {}))
            for part, milliseconds in times.items()
        ],
        peak_gflops=1e-9 * peak,
        bandwidth_gbs=1e-9 * copy_bandwidth(device),
    )
