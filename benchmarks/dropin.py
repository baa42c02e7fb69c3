"""Times effdet's own models before and after ``edet.accelerate``: checked first, then in turns.

    make bench-dropin    # in the environment of `make test-peers`, which has the real effdet

The baseline is effdet in eval mode without gradients, as it is created and in channels_last; ours
is the former after ``edet.accelerate(model)``, nothing else. Weights are random, images are noise.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python")]  # as a program, only its own folder is searched

import edet  # noqa: E402
import edet_kernels  # noqa: E402
from benchmarks.case import factor_of, log  # noqa: E402
from benchmarks.cpu import machine, revision  # noqa: E402
from benchmarks.cpu_rows import measure  # noqa: E402
from edet.bench import report  # noqa: E402
from edet.bench.result import OURS  # noqa: E402
from edet.bench.variants import set_batch_norms  # noqa: E402
from edet_kernels.testing.numeric import (  # noqa: E402
    CheckFailed,
    check_errors,
    relative_difference,
)
from edet_kernels.testing.timing import CPU_SIDES, TURN_SECONDS, Call, product_peak  # noqa: E402

#: The baselines' columns.
EFFDET, CHANNELS_LAST = "effdet", "effdet, channels_last"


def create(name: str, size: int | None) -> tuple[Any, Tensor]:
    """effdet's model with random weights and edge weights that differ, and an image for it.

    Raises:
        SystemExit: effdet is not installed.
    """
    try:
        import effdet
    except ImportError:
        sys.exit("effdet is needed here: make bench-dropin runs this in an environment that has it")
    config = effdet.get_efficientdet_config(name)
    if size is not None:
        config.update({"image_size": (size, size)})
    torch.manual_seed(0)
    model = effdet.EfficientDet(config, pretrained_backbone=False).eval()
    for parameter_name, parameter in model.named_parameters():
        if "edge_weights" in parameter_name:
            nn.init.uniform_(parameter, 0.3, 1.5)
    images = torch.randn(1, 3, *config.image_size)
    set_batch_norms(model, images)
    return model, images


def stage_calls(
    model: Any, images: Tensor, features: Sequence[Tensor], pyramid: Sequence[Tensor]
) -> dict[str, Call]:
    """A call for each stage of ``model``; effdet's BiFPN appends to the list it is given."""

    def predict(maps: list[Tensor]) -> list[Tensor]:
        return [*model.class_net(maps), *model.box_net(maps)]

    def network() -> list[Tensor]:
        classes, boxes = model(images)
        return [*classes, *boxes]

    return {
        "backbone": lambda: model.backbone(images),
        "BiFPN": lambda: model.fpn(list(features)),
        "heads": lambda: predict(list(pyramid)),
        "BiFPN + heads": lambda: predict(model.fpn(list(features))),
        "network": network,
    }


@torch.no_grad()
def run(
    name: str, *, size: int | None = None, threads: int = 2, timing: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of the result file for one model.

    Raises:
        CheckFailed: a stage computes something else after ``accelerate``, or was not replaced.
    """
    torch.set_num_threads(threads)
    model, images = create(name, size)
    moved = copy.deepcopy(model).to(memory_format=torch.channels_last)
    fused = copy.deepcopy(model)
    done = edet.accelerate(fused, images, rounds=0)
    if missing := {"backbone", "fpn", "class_net", "box_net"} - set(done.replaced):
        raise CheckFailed(f"{name}: {', '.join(sorted(missing))} must be replaced, got\n{done}")
    features = [x.contiguous() for x in model.backbone(images)]
    pyramid = model.fpn(list(features))

    def channels_last(maps: Sequence[Tensor]) -> list[Tensor]:
        return [x.contiguous(memory_format=torch.channels_last) for x in maps]

    def double(maps: Sequence[Tensor]) -> list[Tensor]:
        return [x.double() for x in maps]

    # what the stage before it hands over: plain maps to effdet, channels_last ones to the others
    last = channels_last([images])[0], channels_last(features), channels_last(pyramid)
    variants = {
        EFFDET: stage_calls(model, images, features, pyramid),
        CHANNELS_LAST: stage_calls(moved, *last),
        OURS: stage_calls(fused, images, *last[1:]),
    }
    exact = stage_calls(
        copy.deepcopy(model).double(), images.double(), double(features), double(pyramid)
    )
    macs = edet.count_macs(edet.create_model(name, image_size=size))
    heads = macs.class_net + macs.box_net
    counts = {"backbone": macs.backbone, "BiFPN": macs.fpn, "heads": heads}
    counts |= {"BiFPN + heads": macs.fpn + heads, "network": macs.total}
    rows = []
    for stage in counts:
        calls = {variant: stages[stage] for variant, stages in variants.items()}
        reference = exact[stage]()
        errors = {v: relative_difference(call(), reference) for v, call in calls.items()}
        factor = factor_of(stage)
        check_errors(f"{name}, {stage}", errors, errors[EFFDET], images.dtype, factor=factor)
        log(f"{name}: {stage}")
        times = measure(calls, **timing)
        for variant, error in errors.items():
            times[variant]["error"] = error
        best, ratios = report.compare(times)
        rows.append(
            {
                "model": name,
                "image_size": list(images.shape[2:]),
                "dtype": "float32",
                "stage": stage,
                "macs": counts[stage],
                "rounds": len(times[OURS]["samples_ms"]),
                "times": times,
                "unavailable": {},
                "best_rival": best,
                "ratios": ratios,
                "peak_fraction": {},
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description="Times effdet's models on this CPU before and after edet.accelerate.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=["tf_efficientdet_d0"])
    parser.add_argument("--size", type=int, help="side of the image instead of the model's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20, help="at least this many for every row")
    parser.add_argument("--seconds", type=float, default=1.0, help="at least so long per cell")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds a row may take")
    parser.add_argument("--note", default="", help="a sentence to stand above the table")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/dropin.json")
    args = parser.parse_args(argv)
    if not args.output.parent.is_dir():
        parser.error(f"the folder of --output does not exist: {args.output.parent}")
    timing = {"rounds": args.rounds, "seconds": args.seconds, "limit": args.limit}
    peak = 1e-9 * product_peak(torch.device("cpu"), torch.float32, CPU_SIDES)
    try:
        rows = [
            row
            for name in args.models
            for row in run(name, size=args.size, threads=args.threads, timing=timing)
        ]
    except CheckFailed as error:
        sys.exit(str(error))
    for row in rows:
        row["peak_fraction"] = {
            variant: 2e-6 * row["macs"] / times["median_ms"] / peak
            for variant, times in row["times"].items()
        }
    result = {
        "schema": report.SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "revision": revision(),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "edet_kernels": edet_kernels.__version__,
            **{p: importlib.metadata.version(p) for p in ("torch", "effdet", "timm")},
        },
        "threads": args.threads,
        "settings": {
            **timing,
            "turn_seconds": TURN_SECONDS,
            "peak": "fastest of torch.mm and the pointwise product",
            "note": args.note,
        },
        "peak_gflops": {"float32": peak},
        "rows": rows,
        "scaling": [],
        "memory": [],
        "fusion": [],
    }
    report.write(result, args.output)
    print(report.markdown(result))


if __name__ == "__main__":
    main()
