"""Each stage of a model in PyTorch's eager layers and here, checked, then timed."""

from __future__ import annotations

import copy
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import edet_kernels

from ..detection.anchors import model_anchors
from ..detection.postprocess import postprocess
from ..detection.predictor import Predictor, columns
from ..detection.preprocess import geometry, letterbox, letterbox_fill, preprocess
from ..extras import require
from ..files import replacing
from ..fused.module import PackedModule
from ..fused.plan import record
from ..models.bifpn import BiFPN
from ..models.configs import get_config
from ..models.counts import count_macs, count_parameters
from ..models.efficientdet import EfficientDet
from ..models.efficientnet import normalise_pixels
from ..models.factory import create_model
from . import report

#: The rows of the table. Pre- and post-processing run around the network, which is ``whole``.
PARTS = ("BiFPN", "heads", "backbone", "whole", "pre-processing", "post-processing")

#: Further rows, each compared with another way of ours: all nodes of the BiFPN in one call with a
#: call for each; image to detections with what of it is spent inside operators.
PAIRS = {"BiFPN nodes": "node by node", "predictor": "its kernels"}

#: Rounds that are run and not counted: weights are packed and caches filled in them.
WARM_UP = 3

Call = Callable[[], Any]


class CheckFailed(RuntimeError):
    """A part's result is further from the reference than the error rule allows."""


@dataclass(frozen=True)
class Row:
    """One part of the model.

    Attributes:
        part: one of :data:`PARTS` or :data:`PAIRS`.
        milliseconds: for each variant the time of every round.
        difference: largest difference of ours from the float64 reference, as a fraction of the
            reference's largest value.
        eager_difference: the same of eager.
        macs, parameters: of the whole batch's convolutions, and of the part.
        bytes: what a call must at least read and write: its inputs, weights and outputs.
    """

    part: str
    milliseconds: dict[str, list[float]]
    difference: float
    eager_difference: float
    macs: int = 0
    parameters: int = 0
    bytes: int = 0

    def median(self, variant: str) -> float | None:
        """Median time in milliseconds; None for a variant that does not apply to this part."""
        times = self.milliseconds.get(variant)
        return statistics.median(times) if times else None


@dataclass(frozen=True)
class Bench:
    """A table and what is needed to read it: the conditions under which it was measured."""

    model: str
    image_size: tuple[int, int]
    batch_size: int
    dtype: str
    device: str
    threads: int
    rounds: int
    machine: str
    python: str
    torch: str
    edet_kernels: str
    backends: dict[str, str]
    variants: list[str]
    rows: list[Row]
    peak_gflops: float = 0.0
    bandwidth_gbs: float = 0.0

    def result(self) -> dict[str, Any]:
        """This table as a result of :mod:`edet.report`."""
        return result([self])

    def __str__(self) -> str:
        return format_table(self)


def result(tables: Sequence[Bench]) -> dict[str, Any]:
    """Tables of one machine as one result of :mod:`edet.report`."""
    first = tables[0]
    rows = []
    for table in tables:
        for row in table.rows:
            times = {name: report.summary(samples) for name, samples in row.milliseconds.items()}
            errors = {v: row.eager_difference for v in times} | {report.OURS: row.difference}
            for name in times:
                times[name]["error"] = errors[name]
            best, ratios = report.compare(times)
            peak = table.peak_gflops
            rows.append(
                {
                    "model": table.model,
                    "image_size": list(table.image_size),
                    "batch_size": table.batch_size,
                    "dtype": table.dtype,
                    "device": table.device,
                    "stage": "network" if row.part == "whole" else row.part,
                    "macs": row.macs,
                    "parameters": row.parameters,
                    "bytes": row.bytes,
                    "rounds": table.rounds,
                    "times": times,
                    "unavailable": {},
                    "best_rival": best,
                    "ratios": ratios,
                    "peak_fraction": {
                        name: 2e-6 * row.macs / t["median_ms"] / peak
                        for name, t in times.items()
                        if row.macs and peak
                    },
                }
            )
    return {
        "schema": report.SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "revision": None,
        "machine": {"cpu": first.machine, "system": platform.platform()},
        "versions": {
            "python": first.python,
            "torch": first.torch,
            "edet_kernels": first.edet_kernels,
        },
        "threads": first.threads,
        "settings": {
            "backends": first.backends,
            "peak": "largest torch.mm",
            "bandwidth_gbs": max(table.bandwidth_gbs for table in tables),
        },
        "peak_gflops": {t.dtype: max(u.peak_gflops for u in tables if u.dtype == t.dtype)
                        for t in tables if t.peak_gflops},
        "rows": rows,
        "scaling": [],
        "memory": [],
        "fusion": [],
    }  # fmt: skip


def measured_roofs(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """GFLOP/s of a large matrix product and GB/s of a large copy, the best of a few.

    On a CPU the product is float32's: its kernels compute in float32 whatever the maps are.
    """
    side = 1024 if device.type == "cpu" else 8192
    kind = torch.float32 if device.type == "cpu" else dtype
    a = torch.ones(side, side, device=device, dtype=kind)
    x = torch.ones(2**26 if device.type == "cpu" else 2**30, device=device, dtype=torch.uint8)
    y = torch.empty_like(x)
    product = min(_timed(lambda: [a @ a], device) for _ in range(4))
    copy_ms = min(_timed(lambda: [y.copy_(x)], device) for _ in range(4))
    return 2e-6 * side**3 / product, 2e-6 * x.numel() / copy_ms


def random_model(name: str, images: Tensor) -> EfficientDet:
    """The model ``name`` in eval mode with random weights, the same ones every time.

    How much a random network amplifies rounding is a matter of luck; what is checked and timed
    must not be.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(name).eval()
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
        with torch.no_grad():
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


class KernelTime:
    """A call of which only the time inside operators that do work is measured."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __call__(self) -> Any:
        return self.call()

    def seconds(self) -> float:
        """The time inside operators of one call."""
        with _Operations() as operations:
            self.call()
        return operations.seconds


def call_seconds(call: Call) -> float:
    """Seconds of one call, on the host's clock."""
    if isinstance(call, KernelTime):
        return call.seconds()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def node_calls(fpn: BiFPN, maps: Sequence[Tensor]) -> dict[str, Call]:
    """The nodes of a BiFPN in one ``bifpn`` call and in a ``fusion_node`` call each, both planned.

    The projections of the backbone's ``maps``, the same for both, are not part of the calls.
    """
    dtype = maps[0].dtype
    weights = fpn.pack(dtype)
    inputs, sizes = weights.node_inputs(maps, dtype)
    calls: dict[str, Call] = {}
    for name, run in (
        (PAIRS["BiFPN nodes"], weights.run_node_by_node),
        (report.OURS, weights.run_nodes),
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
    where = geometry([(480, 640)] * batch, size).to(device)
    pixels = letterbox([x.to(device) for x in images], size, letterbox_fill(model.config.mean))
    outputs = predictor._network([pixels, where])
    mean, std = (
        torch.tensor(values, dtype=torch.float64, device=device)
        for values in (model.config.mean, model.config.std)
    )
    normalised = normalise_pixels(pixels.double() / 255, mean, std, torch.float64)
    theirs, exact = eager(normalised.to(predictor.dtype)), copy.deepcopy(eager).double()(normalised)
    differences = [
        relative_difference([*found[0], *found[1]], [*exact[0], *exact[1]])
        for found in ((outputs[:levels], outputs[levels:-1]), theirs)
    ]
    with edet_kernels.backend("reference"):
        [expected] = predictor._postprocess(
            model_anchors(predictor.model.config, size, device=predictor.device), outputs
        )
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
    calls: dict[str, Call] = {report.OURS: call}
    if device.type == "cpu":
        calls = {PAIRS["predictor"]: KernelTime(call), **calls}
    return calls, differences[0], differences[1]


def relative_difference(found: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Largest difference over all maps, each as a fraction of its reference's largest value."""
    return max(
        float((x.double() - r).abs().max() / r.abs().max().clamp(min=1e-300))
        for x, r in zip(found, reference, strict=True)
    )


def check(part: str, ours: float, eager: float, dtype: torch.dtype) -> None:
    """The error rule of whole networks: at most three times eager's own error, or the floor.

    The floor is 2e-5 in float32, four units in the last place in 16 bits: deep networks amplify
    rounding, and by chance eager's may cancel.

    Raises:
        CheckFailed: ``ours`` is larger, or not a number.
    """
    limit = max(3 * eager, 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
    if not ours <= limit:
        raise CheckFailed(
            f"{part} differs from the float64 reference by {ours:.1e} of its largest value, "
            f"allowed is {limit:.1e} (PyTorch's eager layers differ by {eager:.1e}): "
            "no times are reported"
        )


def check_detections(name: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Detections must be those of the reference on the same network outputs.

    Boxes and scores may differ by eight units in the last place of the largest: exp and the sigmoid
    are not rounded alike.

    Args:
        name: what made them, for the message.
        found, expected: boxes, scores, labels and counts as :func:`edet.postprocess.postprocess`
            returns them.

    Returns:
        The largest difference of boxes and scores, as a fraction of the largest.

    Raises:
        CheckFailed: another box, score, label or count; the message says what and how many. NaN is
            only like NaN.
    """
    limit, largest, wrong = 8 * torch.finfo(torch.float32).eps, 0.0, []
    names = ("boxes", "scores", "labels", "counts")
    for what, x, y in zip(names, found, expected, strict=True):
        x, y = x.double(), y.double()
        scale = y.nan_to_num(0, 0, 0).abs().max().clamp(min=1e-300)
        apart = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, (x - y).abs() / scale)
        bad = ~(apart <= (limit if what in ("boxes", "scores") else 0.0))
        if bad.any():
            wrong.append(f"{int(bad.sum())} of {x.numel()} {what} (by {float(apart.max()):.1e})")
        elif what in ("boxes", "scores"):
            largest = max(largest, float(apart.max()))
    if wrong:
        raise CheckFailed(
            f"{name} finds other boxes than the reference, {', '.join(wrong)}: "
            "no times are reported"
        )
    return largest


def _timed(call: Call, device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cpu":
        return 1e3 * call_seconds(call)
    torch.accelerator.synchronize(device)
    start = time.perf_counter()
    call()
    torch.accelerator.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


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
    with softmax fusion and with the model's own, and the fused ops. All variants take turns within
    every round, in an order that is reversed from round to round, so that whatever slows the
    machine slows all of them.

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
        config = get_config(model) if isinstance(model, str) else model.config
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, 3, *config.image_size)
        images = torch.randn(shape, dtype=torch.float32, generator=generator)
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
    variants["ours"] = part_calls(ours.freeze(), images, features, pyramid)

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
            relative_difference(variants[v][part](), reference) for v in ("ours", f"eager {fusion}")
        )
        check(part, mine, theirs, dtype)
        differences[part] = mine, theirs
    del exact, reference
    before, after, by_references = outer_calls(ours, images)
    differences["post-processing"] = (
        check_detections("post-processing", after(), by_references()),
        0.0,
    )
    variants["ours"] |= {"pre-processing": before, "post-processing": after}
    pairs = {"BiFPN nodes": node_calls(ours.fpn, features)}
    found = pairs["BiFPN nodes"]
    difference = relative_difference(found["ours"](), found[PAIRS["BiFPN nodes"]]())
    check("BiFPN nodes", difference, 0.0, dtype)
    differences["BiFPN nodes"] = difference, 0.0
    size = (int(images.shape[2]), int(images.shape[3]))
    pairs["predictor"], mine, theirs = predictor_calls(ours, eager, size, images.shape[0])
    check("predictor", mine, theirs, dtype)
    differences["predictor"] = mine, theirs

    turns = [
        (part, v, calls[part]) for part in PARTS for v, calls in variants.items() if part in calls
    ]
    turns += [(part, v, call) for part, calls in pairs.items() for v, call in calls.items()]
    times: dict[str, dict[str, list[float]]] = {part: {} for part, _, _ in turns}
    for part, v, _ in turns:
        times[part][v] = []
    finished = -WARM_UP
    start = time.perf_counter()
    while finished < min(rounds, 3) or (
        finished < rounds and time.perf_counter() - start < seconds
    ):
        for part, v, call in reversed(turns) if finished % 2 else turns:
            elapsed = _timed(call, device)
            if finished >= 0:
                times[part][v].append(elapsed)
        finished += 1
        if progress is not None and finished > 0:
            progress(finished, rounds)
    macs, parameters = count_macs(ours, (images.shape[2], images.shape[3])), count_parameters(ours)
    heads = parameters.class_net + parameters.box_net
    outputs = variants["ours"]["whole"]()
    counts = {
        "BiFPN": (macs.fpn, parameters.fpn, [*features, *pyramid]),
        "heads": (macs.class_net + macs.box_net, heads, [*pyramid, *pyramid, *outputs]),
        "backbone": (macs.backbone, parameters.backbone, [images, *features]),
        "whole": (macs.total, parameters.total, [images, *outputs]),
    }

    def counted(part: str) -> dict[str, int]:
        if part not in counts:
            return {}
        operations, weights, maps = counts[part]
        moved = (weights + sum(x.numel() for x in maps)) * images.element_size()
        return {"macs": operations * images.shape[0], "parameters": weights, "bytes": moved}

    roofs = measured_roofs(device, dtype)
    return Bench(
        model=ours.config.name,
        image_size=(images.shape[2], images.shape[3]),
        batch_size=images.shape[0],
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        threads=torch.get_num_threads(),
        rounds=finished,
        machine=machine_name(device),
        python=platform.python_version(),
        torch=torch.__version__,
        edet_kernels=edet_kernels.__version__,
        backends={c.op: c.backend for c in edet_kernels.explain(device, dtype)},
        variants=list(variants),
        rows=[
            Row(part, samples, *differences[part], **counted(part))
            for part, samples in times.items()
        ],
        peak_gflops=roofs[0],
        bandwidth_gbs=roofs[1],
    )


def machine_name(device: torch.device) -> str:
    """The processor that ``device`` is, with its instruction set or memory."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def format_table(bench: Bench) -> str:
    """``bench`` as plain text for a terminal of 80 columns."""
    baselines = bench.variants[:-1]
    header = ["part", *bench.variants, *(f"vs {v.split()[1]}" for v in baselines), "difference"]
    lines = [header]
    for row in (row for row in bench.rows if row.part in PARTS):
        ours = row.median("ours")
        medians = [row.median(v) for v in bench.variants]
        assert ours is not None
        lines.append(
            [
                row.part.removesuffix("ing"),  # 80 columns
                *("same" if m is None else f"{m:.2f}" for m in medians),
                *("" if m is None else f"{m / ours:.1f}x" for m in medians[:-1]),
                f"{row.difference:.0e}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    table = "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
    height, width = bench.image_size
    pairs = []
    for row in (row for row in bench.rows if row.part in PAIRS):
        mine, other = row.median("ours"), row.median(PAIRS[row.part])
        assert mine is not None
        against = "" if other is None else f"; {PAIRS[row.part]} {other:.2f} ({other / mine:.2f}x)"
        pairs.append(f"{row.part}: {mine:.2f}{against}")
    return (
        f"{bench.model}, {height}x{width}, batch {bench.batch_size}, {bench.dtype}, "
        f"{bench.device}, {bench.threads} threads\n{bench.machine}; torch {bench.torch}\n\n"
        f"{table}\n\n" + "\n".join(pairs) + "\n\n"
        f"Times are medians of {bench.rounds} rounds in ms. eager: the model's PyTorch layers,\n"
        "eval mode, no gradients, channels_last. difference: of ours from a float64\n"
        "reference, as a fraction of its largest value."
    )


def write_json(bench: Bench, path: str | os.PathLike[str]) -> None:
    """Writes the table as a result file of :mod:`edet.report`.

    Raises:
        OSError: the folder does not exist or cannot be written; nothing is left behind.
    """
    report.write(bench.result(), path)


def plot(bench: Bench, path: str | os.PathLike[str]) -> None:
    """Draws the table as bars, one group per part, to ``path`` (PNG, SVG or PDF).

    Raises:
        ImportError: matplotlib (extra ``plot``) is not installed.
        OSError: the folder does not exist or cannot be written; nothing is left behind.
    """
    figure = require("matplotlib.figure", "plot").Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    colours = ("#b8b8b8", "#7d7d7d", "#d1495b")[-len(bench.variants) :]
    thickness = 0.8 / len(bench.variants)
    rows = [row for row in bench.rows if row.macs]
    for k, (variant, fill) in enumerate(zip(bench.variants, colours, strict=True)):
        for i, row in enumerate(rows):
            value = row.median(variant)
            if value is None:
                continue
            # a part without this variant has its other bars centred
            shift = k - (len(bench.variants) - 1) / 2 - (len(row.milliseconds) < 3) / 2
            y = i + thickness * shift
            axes.barh(y, value, thickness * 0.92, color=fill, label=variant if i == 0 else None)
            baseline = row.median(bench.variants[-2])
            note = f" {value:.1f}"
            if variant == "ours" and baseline is not None:
                note += f"  ({baseline / value:.1f}x)"
            axes.text(value, y, note, va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row.part for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("milliseconds (median)")
    height, width = bench.image_size
    axes.set_title(
        f"{bench.model}, {height}x{width}, batch {bench.batch_size}, {bench.dtype}\n"
        f"{bench.machine}, {bench.threads} threads",
        fontsize=10,
        loc="left",
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


class _Operations(TorchDispatchMode):
    """Counts and times operations that do work: neither views nor bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.seconds = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if not (func.is_view or func.overloadpacket.__name__.startswith("empty")):
            self.seconds += time.perf_counter() - start
            self.count += 1
        return result


@torch.no_grad()
def count_operations(model: EfficientDet) -> dict[str, int]:
    """Operations that each part of ``model`` dispatches: on a GPU, about as many kernel launches.

    Views and allocations are not counted; a fused op is one operation. The image is as small as the
    pyramid allows, which does not change the counts.

    Returns:
        a count for each of ``backbone``, ``fpn``, ``class_net`` and ``box_net``.
    """
    parameter = next(model.parameters())
    side = 2 ** (model.config.max_level + 1)
    maps: Any = torch.zeros(1, 3, side, side, dtype=parameter.dtype, device=parameter.device)
    counts = {}
    for part in ("backbone", "fpn", "class_net", "box_net"):
        module = getattr(model, part)
        module(maps)  # packs the weights
        with _Operations() as operations:
            out = module(maps)
        counts[part] = operations.count
        maps = out if part in ("backbone", "fpn") else maps
    return counts
