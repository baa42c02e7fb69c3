"""Whole models on a GPU: their parts, the network, and pixels on the host to detections.

Each is checked against PyTorch's layers in float64 (in float32 for the largest models, to save
time) before it is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import edet_kernels
from benchmarks import gpu_launches, gpu_timing
from edet import Predictor
from edet.bench.result import OURS
from edet.bench.variants import eager_copy, part_calls, photographs, prepare, random_model
from edet.detection.pipeline import Selection, columns, stages
from edet.models.efficientdet import EfficientDet
from edet_kernels.names import Size
from edet_kernels.testing import timing
from edet_kernels.testing.numeric import CheckFailed, check_network, relative_difference

#: Rows of a model, in the order in which they are measured. BiFPN: with its projections; network:
#: normalised images on the GPU to the heads' outputs; predictor: uint8 pixels on the host to boxes.
PARTS = ("BiFPN", "heads", "backbone", "network", "predictor")
#: Those whose launches are listed: the network's are theirs.
PROFILED = ("BiFPN", "heads", "backbone")
#: Ours and PyTorch's layers, as calls and as one CUDA graph; in predictor's rows the layers take
#: the place of the network, its pre- and post-processing being ours.
VARIANTS = (
    OURS,
    "ours, graph",
    "eager",
    "eager, graph",
    "compile, graph",
    "compile, max-autotune, graph",
)
#: Models that are compared with float32, not float64.
LARGE = ("d5", "d6", "d7", "d7x")
#: Images of a batch that are compared: the first and the last.
COMPARED = 4


class Subject:
    """A model and its eager copy, and the inputs of their parts, the same for both.

    Args:
        name: of the model.
        batch: images, of noise.
        dtype: of the maps.
        image_size: (H, W).
    """

    def __init__(self, name: str, batch: int, dtype: torch.dtype, image_size: Size) -> None:
        device = torch.device(gpu_timing.DEVICE)
        self.name, self.batch, self.dtype, self.size = name, batch, dtype, image_size
        images = torch.randn(batch, 3, *image_size, device=device)
        self.model = prepare(random_model(name, images[:1]), device, dtype)
        self.eager = eager_copy(self.model)
        self.model.freeze()
        images = images.to(dtype).contiguous(memory_format=torch.channels_last)
        features = self.eager.backbone(images)
        self.inputs = images, features, self.eager.fpn(features)
        few = range(COMPARED // 2)
        self.compared = sorted({*few, *(batch - 1 - i for i in few)} & {*range(batch)})
        self._known: dict[str, tuple[list[Tensor], float]] = {}

    @property
    def what(self) -> str:
        """For messages."""
        return f"{self.name}, batch {self.batch}, {self.dtype}"

    def parts_of(self, model: EfficientDet) -> dict[str, timing.Call]:
        """A call for each part but the predictor's, by its name in :data:`PARTS`."""
        calls = part_calls(model, *self.inputs)
        calls["network"] = calls.pop("whole")
        return calls

    def exact(self, part: str) -> tuple[list[Tensor], float]:
        """What a part gives for the images that are compared, and how far off eager is."""
        if part not in self._known:
            exact = torch.float32 if self.name.rpartition("_")[2] in LARGE else torch.float64
            images, features, pyramid = self.inputs
            picked = [
                images[self.compared].to(exact),
                *([x[self.compared].to(exact) for x in maps] for maps in (features, pyramid)),
            ]
            calls = part_calls(copy.deepcopy(self.eager).to(exact), *picked)  # type: ignore[arg-type]
            truths = list(calls["whole" if part == "network" else part]())
            own = [x[self.compared] for x in self.parts_of(self.eager)[part]()]
            self._known[part] = truths, relative_difference(own, truths)
        return self._known[part]

    def check(self, part: str, name: str, result: Any) -> float:
        """The error of a variant as a fraction of the largest value.

        Raises:
            CheckFailed: it is wrong.
        """
        exact, eager = self.exact(part)
        error = relative_difference([x[self.compared] for x in result], exact)
        check_network(f"{self.what}, {part}, {name}", error, eager, self.dtype)
        return error


class Detector:
    """Pixels on the host to detections, by stages as they are and by a planned predictor.

    Args:
        model: the detector.
        size: (H, W) of the network's input.
        batch: photographs.
    """

    def __init__(self, model: EfficientDet, size: Size, batch: int) -> None:
        self.images = photographs(batch)
        self.predictor = Predictor(model, image_size=size, batch_size=batch, score_threshold=0.0)
        sizes = [(int(x.shape[1]), int(x.shape[2])) for x in self.images]
        self.stages = stages(self.predictor.network, sizes, size, Selection())

    def by_calls(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Boxes, scores and labels of each image, on the host."""
        values = [x.to(self.predictor.device) for x in self.images]
        for stage in self.stages:
            values = stage(values)
        return [columns(rows) for rows in values[0].cpu()]

    def by_plan(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The same from the predictor, which replays its graph from the third call on."""
        return [(x.boxes, x.scores, x.labels) for x in self.predictor(self.images)]

    def expected(self, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The same of the first images, post-processed by the references."""
        letterbox, network, finish = self.stages
        outputs = network(letterbox([x.to(self.predictor.device) for x in self.images]))
        with edet_kernels.backend("reference"):
            [rows] = finish([x[:count] for x in outputs])
        return [columns(one) for one in rows.cpu()]


def check_objects(
    what: str,
    found: Sequence[tuple[Tensor, Tensor, Tensor]],
    expected: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> None:
    """Boxes, scores and labels of images must be those expected, in their order.

    Raises:
        CheckFailed: they are not.
    """
    for (boxes, scores, labels), (b, s, n) in zip(found, expected, strict=False):
        same = torch.equal(labels, n)
        if not same or relative_difference([boxes, scores], [b, s]) > 1e-6:
            raise CheckFailed(f"{what} finds other boxes than the references")


def predictor_row(
    subject: Subject, names: Sequence[str], effort: gpu_timing.Effort
) -> tuple[dict[str, Any], dict[str, str]]:
    """Times of the detectors, by the host's clock, and what could not be measured."""
    times: dict[str, Any] = {}
    unavailable: dict[str, str] = {}
    clock = timing.host_clock(torch.device(gpu_timing.DEVICE))
    for layers in (OURS, "eager"):
        mine = [name for name in names if name in (layers, f"{layers}, graph")]
        if not mine:
            continue
        try:
            model = subject.model if layers == OURS else subject.eager
            detector = Detector(model, subject.size, subject.batch)
            expected = detector.expected(min(subject.batch, COMPARED // 2))
            for name in mine:
                call = detector.by_plan if name.endswith("graph") else detector.by_calls
                for _ in range(3):
                    found = call()
                check_objects(f"{subject.what}, predictor, {name}", found, expected)
                times[name] = gpu_timing.measure([call], effort.seconds, clock)
        except Exception as reason:
            if layers == OURS:
                raise
            unavailable |= {name: gpu_timing.first_line(reason) for name in mine}
    return times, unavailable


def compiled(model: EfficientDet, part: str, name: str, subject: Subject) -> timing.Call:
    """A part's layers compiled, without a CUDA graph of the compiler's own."""
    torch.compiler.reset()
    mode = "max-autotune-no-cudagraphs" if "max-autotune" in name else None
    compile_ = partial(torch.compile, mode=mode, fullgraph=True, dynamic=False)
    run: Callable[[], Any] = compile_(subject.parts_of(model)[part])
    return run


def part_row(
    subject: Subject, part: str, names: Sequence[str], effort: gpu_timing.Effort
) -> dict[str, Any]:
    """Errors, times and launches of a part by the variants ``names``."""
    row: dict[str, Any] = {"errors": {}, "times": {}, "unavailable": {}}
    ours: dict[str, Callable[[], Any]] = {}
    for name in names:
        try:
            model = subject.model if name.startswith(OURS) else subject.eager
            call = subject.parts_of(model)[part]
            if name.startswith("compile"):
                call = compiled(model, part, name, subject)
                with gpu_timing.within(effort.compile_seconds):
                    call()
            if name.endswith("graph"):
                call = gpu_timing.Graph(call)
            row["errors"][name] = subject.check(part, name, call())
            row["times"][name] = gpu_timing.measure([call], effort.seconds)
            if name.startswith(OURS):
                ours["graph" if name.endswith("graph") else "call"] = call
        except Exception as reason:
            if name == OURS:
                raise
            row["unavailable"][name] = gpu_timing.first_line(reason)
    if part in PROFILED and effort.launches:
        row |= gpu_launches.of_variants(ours)
    if row["errors"]:
        row["errors"]["layers"] = subject.exact(part)[1]
    return row


def row_of(
    subject: Subject,
    part: str,
    names: Sequence[str],
    effort: gpu_timing.Effort,
) -> dict[str, Any]:
    """A row of a result: one part of one model at one batch.

    Raises:
        CheckFailed: ours is wrong.
        RuntimeError: ours cannot run.
    """
    row: dict[str, Any] = {
        "model": subject.name,
        "batch": subject.batch,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "part": part,
    }
    if part != "predictor":
        return row | part_row(subject, part, names, effort)
    times, unavailable = predictor_row(subject, names, effort)
    return row | {"errors": {}, "times": times, "unavailable": unavailable}
