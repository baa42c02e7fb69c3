"""Average precision on real data: what a detector reaches, and the paper's comparisons in kind.

    edet train DATA -m tf_efficientdet_lite0 --backbone imagenet ... -o run
    python -m benchmarks.accuracy detector person-lite0 --run run --data DATA --command "edet ..."
    python -m benchmarks.accuracy compare table6 --data DATA
    python -m benchmarks.accuracy page

Each writes a file under benchmarks/results: figures, curves, seed, command, versions, machine. The
page docs/results.md is made of these files alone. A comparison trains small models for a short time
on one data set: it says how two variants differ there, nothing about COCO.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import edet
import edet_kernels
from benchmarks.cpu import machine, revision
from benchmarks.update_readme import updated
from edet.files import replacing
from edet.models.described import load_described, read_training
from edet.training import Augmentation, Dataset, Trainer, evaluate, open_dataset
from edet.training.evaluation import Evaluation, score

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
SCHEMA = "edet-accuracy/1"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
#: Backend of each way to run a network.
WAYS = {"fused": "auto", "layers": "reference"}
#: Precisions a detector is evaluated in.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Images to learn from that an int8 copy takes its ranges from.
CALIBRATION_IMAGES = 32
#: Boxes of an image that is not a crowd.
FEW_BOXES = 10
#: Student's t for a two-sided interval of 95 %, by degrees of freedom from 1.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Variant:
    """One side of a comparison.

    Attributes:
        options: of :func:`edet.create_model`.
        network: a feature network of :data:`edet.layers.NETWORKS` in the BiFPN's place.
        way: which of :data:`WAYS` it is trained by.
    """

    options: dict[str, Any] = field(default_factory=dict)
    network: str | None = None
    way: str = "fused"


@dataclass(frozen=True)
class Comparison:
    """Variants that are trained alike.

    Attributes:
        title: heading of the page.
        asks: what it compares, in a sentence.
        variants: by name; differences are to the first.
        options: of all models.
        image_size, epochs, learning_rate, augmentation, seeds: of all trainings.
    """

    title: str
    asks: str
    variants: dict[str, Variant]
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "tf_efficientdet_lite0"
    backbone: str | None = "imagenet"
    image_size: int = 160
    epochs: int = 15
    batch_size: int = 8
    learning_rate: float = 0.08
    augmentation: float = 0.3
    seeds: int = 3


#: What the small models share. Lite models add maps up without weights by themselves.
SMALL = {"width": 48, "cells": 2, "head_repeats": 2, "fusion": "fast"}

COMPARISONS = {
    "table4": Comparison(
        "FPN against BiFPN (table 4 in kind)",
        "One backbone, once with a top-down FPN without weights, once with a BiFPN.",
        {
            "FPN": Variant({"cells": 1, "fusion": "sum"}, "fpn"),
            "BiFPN": Variant(),
        },
        SMALL,
    ),
    "table5": Comparison(
        "Feature networks (table 5 in kind)",
        "The feature networks of `edet.layers` on one backbone, data and schedule; a top-down FPN "
        "is repeated twice as often, as it has half the nodes.",
        {
            "repeated top-down FPN": Variant({"cells": 4, "fusion": "sum"}, "fpn"),
            "repeated FPN + PANet": Variant({"fusion": "sum"}, "panet"),
            "NAS-FPN": Variant({"fusion": "sum"}, "nas_fpn"),
            "fully-connected FPN": Variant({"fusion": "sum"}, "fully_connected"),
            "BiFPN without weights": Variant({"fusion": "sum"}),
            "BiFPN with weights": Variant(),
        },
        SMALL,
        seeds=1,
    ),
    "table6": Comparison(
        "Fast against softmax fusion (table 6 in kind)",
        "The same network with softmax and with fast normalised fusion.",
        {"softmax": Variant({"fusion": "softmax"}), "fast": Variant()},
        SMALL,
    ),
    "figure6": Comparison(
        "Scaling one dimension or all (figure 6 in kind)",
        "A small network, made wider, deeper or finer alone, and all three a little.",
        {
            "base": Variant({"width": 24, "cells": 1, "head_repeats": 1, "image_size": 128}),
            "width × 4": Variant({"width": 96, "cells": 1, "head_repeats": 1, "image_size": 128}),
            "depth × 4": Variant({"width": 24, "cells": 4, "head_repeats": 4, "image_size": 128}),
            "resolution × 1.5": Variant(
                {"width": 24, "cells": 1, "head_repeats": 1, "image_size": 192}
            ),
            "all": Variant({"width": 40, "cells": 2, "head_repeats": 2, "image_size": 160}),
        },
        {"fusion": "fast"},
        seeds=1,
    ),
    "fused": Comparison(
        "Training by the fused path and by PyTorch's layers",
        "One model, trained by the fused kernels and by PyTorch's layers.",
        {"layers": Variant(way="layers"), "fused": Variant()},
        SMALL,
        seeds=2,
    ),
}


# --- files ----------------------------------------------------------------------------------------


def write(name: str, content: dict[str, Any]) -> Path:
    """Writes a result file; NaN becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(x) for key, x in value.items()}
        if isinstance(value, list):
            return [plain(x) for x in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    versions = {"torch": torch.__version__, "edet-kernels": edet.__version__}
    versions["python"] = platform.python_version()
    about: dict[str, Any] = {"schema": SCHEMA, "name": name, "date": time.strftime("%Y-%m-%d")}
    about |= {"revision": revision(), "machine": machine(), "versions": versions}
    path = RESULTS / f"accuracy-{name}.json"
    with replacing(path) as temporary:
        text = json.dumps(plain(about | content), indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def log(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def about(data: Dataset) -> dict[str, Any]:
    """What a data set holds."""
    return {"images": len(data), "boxes": data.report.per_class}


def figures(found: Evaluation) -> dict[str, Any]:
    """An evaluation's figures, and those of each class where there are several."""
    classes = {n: {"AP": ap, "AP50": found.class_ap50[n]} for n, ap in found.class_ap.items()}
    return found.figures | ({"classes": classes} if len(classes) > 1 else {})


# --- detectors ------------------------------------------------------------------------------------


def detector(run: Path, data: Dataset, validation: Dataset, command: str) -> dict[str, Any]:
    """Figures of a run of ``edet train``, in each precision, fused and by layers, and in int8."""
    training = read_training(run / "last.pt")
    _, description = load_described(run / "best.pt")
    precisions = {}
    for dtype in DTYPES:
        for way, backend in WAYS.items():
            if dtype == torch.float16 and way == "layers":
                continue  # takes minutes on a CPU
            model, _ = load_described(run / "best.pt")
            with edet_kernels.backend(backend):
                found = evaluate(model.to(dtype), validation)
            name = str(dtype).removeprefix("torch.")
            precisions[f"{name}, {way}"] = figures(found)
            log(f"{name}, {way}: {found}")
            if not len(precisions) - 1:
                truths = [validation.truth(i) for i in range(len(validation))]
                few = [i for i, truth in enumerate(truths) if len(truth.boxes) <= FEW_BOXES]
                part = score(
                    [truths[i] for i in few], [found.found[i] for i in few], data.class_names
                )
    step = max(len(data) // CALIBRATION_IMAGES, 1)
    seen = [data[i].image for i in range(0, len(data), step)][:CALIBRATION_IMAGES]
    model, _ = load_described(run / "best.pt")
    found = evaluate(edet.quantize(model, seen), validation)
    precisions["int8"] = figures(found)
    log(f"int8: {found}")
    config = description.config
    return {
        "kind": "detector",
        "command": command,
        "model": config.name,
        "image_size": list(config.image_size),
        "settings": training["settings"],
        "data": {"train": about(data), "validation": about(validation)},
        "precisions": precisions,
        "few_boxes": {"images": len(few), "at_most": FEW_BOXES} | figures(part),
        "curve": training["rows"],
    }


# --- comparisons ----------------------------------------------------------------------------------


def network(comparison: Comparison, variant: Variant, data: Dataset) -> edet.EfficientDet:
    """A variant's model, from the comparison's backbone."""
    options = {"image_size": comparison.image_size} | comparison.options | variant.options
    model = edet.create_model(comparison.model, num_classes=len(data.class_names), **options)
    if comparison.backbone is not None:
        edet.load_backbone(model)
    if variant.network is not None:
        config = model.config
        model.fpn = edet.layers.feature_network(
            variant.network,
            model.fpn.in_channels,
            config.width,
            config.cells,
            fusion=config.fusion,
            activation=config.activation,
        )
    return model


def train(
    comparison: Comparison, variant: Variant, data: Dataset, validation: Dataset, seed: int
) -> tuple[edet.EfficientDet, dict[str, Any]]:
    """One training; its model and what came out."""
    torch.manual_seed(seed)
    model = network(comparison, variant, data)
    with edet_kernels.backend(WAYS[variant.way]):
        trainer = Trainer(
            model, batch_size=comparison.batch_size, learning_rate=comparison.learning_rate
        )
        start, wall = time.process_time(), time.perf_counter()
        history = trainer.fit(
            data,
            epochs=comparison.epochs,
            augmentation=Augmentation.of_strength(comparison.augmentation),
            workers=0,
            seed=seed,
        )
    if history.interrupted:
        sys.exit(f"interrupted in epoch {trainer.epoch + 1}: nothing was written")
    seconds = {"cpu": time.process_time() - start, "wall": time.perf_counter() - wall}
    found = evaluate(trainer.average.model, validation)
    row = {
        "seed": seed,
        "figures": figures(found),
        "steps": trainer.step_count,
        "seconds": seconds,
        "curve": history.rows,
    }
    return trainer.average.model, row


def _predict(model: edet.EfficientDet, image: torch.Tensor, backend: str) -> None:
    with torch.inference_mode(), edet_kernels.backend(backend):
        model(image)


def latencies(
    models: dict[str, edet.EfficientDet], size: Callable[[str], tuple[int, int]], rounds: int = 15
) -> dict[str, dict[str, float]]:
    """Median milliseconds of one image through each network, fused and by layers, in turns.

    On one thread the processor's time is taken, which other programs hardly lengthen.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, model in models.items():
        image = torch.rand(1, 3, *size(name))
        for way, backend in WAYS.items():
            calls[name, way] = partial(_predict, model, image, backend)
        model.eval()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for round_number in range(rounds + 2):
        for key, call in calls.items():
            start = clock()
            call()
            if round_number >= 2:
                times[key].append(1e3 * (clock() - start))
    return {name: {way: statistics.median(times[name, way]) for way in WAYS} for name in models}


def difference(rows: list[dict[str, Any]], others: list[dict[str, Any]], key: str) -> Any:
    """Mean of the differences of the same seeds, and half of its interval of 95 %."""
    pairs = [a["figures"][key] - b["figures"][key] for a, b in zip(rows, others, strict=True)]
    half = math.nan
    if 1 < len(pairs) <= len(T_95) + 1:
        half = T_95[len(pairs) - 2] * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return {"mean": statistics.mean(pairs), "half_interval": half}


def compare(
    comparison: Comparison, data: Dataset, validation: Dataset, command: str = ""
) -> dict[str, Any]:
    """Trains all variants with all seeds, the variants in turns."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in comparison.variants}
    models: dict[str, edet.EfficientDet] = {}
    for seed in range(comparison.seeds):
        for name, variant in comparison.variants.items():
            models[name], row = train(comparison, variant, data, validation, seed)
            rows[name].append(row)
            found = row["figures"]
            log(
                f"{name}, seed {seed}: AP {found['AP']:.4f}, AP50 {found['AP50']:.4f}, "
                f"{row['seconds']['cpu']:.0f} s of CPU"
            )
    first = next(iter(rows.values()))
    times = latencies(models, lambda name: models[name].config.image_size)
    variants = {
        name: {
            "parameters": sum(p.numel() for p in models[name].parameters()),
            "image_size": list(models[name].config.image_size),
            "inference_ms": times[name],
            "AP": statistics.mean(row["figures"]["AP"] for row in runs),
            "AP50": statistics.mean(row["figures"]["AP50"] for row in runs),
            "step_ms": statistics.median(1e3 * r["seconds"]["cpu"] / r["steps"] for r in runs),
            "against_first": {key: difference(runs, first, key) for key in ("AP", "AP50")},
            "runs": runs,
        }
        for name, runs in rows.items()
    }
    return {
        "kind": "comparison",
        "command": command,
        "title": comparison.title,
        "asks": comparison.asks,
        "model": comparison.model,
        "backbone": comparison.backbone,
        "epochs": comparison.epochs,
        "batch_size": comparison.batch_size,
        "learning_rate": comparison.learning_rate,
        "seeds": comparison.seeds,
        "data": {"train": about(data), "validation": about(validation)},
        "variants": variants,
    }


# --- page -----------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _detector_page(result: dict[str, Any]) -> list[str]:
    keys = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"]
    rows = [
        [name, *(_number(found[key]) for key in keys)]
        for name, found in result["precisions"].items()
    ]
    few = result["few_boxes"]
    rows.append(
        [
            f"{few['images']} images with at most {few['at_most']} boxes",
            *map(_number, (few[k] for k in keys)),
        ]
    )
    size = "×".join(map(str, result["image_size"]))
    data = result["data"]
    blocks = [
        f"## {result['name']}",
        f"`{result['model']}` at {size}, {data['train']['images']} images to learn from, "
        f"{data['validation']['images']} to evaluate on; seed {result['settings']['seed']}, "
        f"{result['settings']['epochs']} epochs.",
        f"    {result['command']}",
        _table(["inference", *keys], rows),
    ]
    classes = next(iter(result["precisions"].values())).get("classes")
    if classes:
        lines = [[n, _number(c["AP"]), _number(c["AP50"])] for n, c in classes.items()]
        blocks.append(_table(["class", "AP", "AP50"], lines))
    evaluated = [row for row in result["curve"] if row.get("AP") is not None]
    lines = [
        [str(int(r["epoch"])), _number(r["loss"]), _number(r["AP"]), _number(r["AP50"])]
        for r in evaluated
    ]
    blocks.append(_table(["epoch", "loss", "AP", "AP50"], lines))
    return blocks


def _comparison_page(result: dict[str, Any]) -> list[str]:
    def change(variant: dict[str, Any]) -> str:
        value = variant["against_first"]["AP"]
        half = value["half_interval"]
        return f"{value['mean']:+.4f}" + ("" if half is None else f" ± {half:.4f}")

    names = list(result["variants"])
    rows = [
        [
            name,
            _number(v["AP"], 4),
            "" if name == names[0] else change(v),
            _number(v["AP50"], 4),
            f"{v['parameters'] / 1e6:.2f} M",
            f"{v['step_ms']:.0f}",
            f"{v['inference_ms']['layers']:.1f}",
            f"{v['inference_ms']['fused']:.1f}",
        ]
        for name, v in result["variants"].items()
    ]
    header = ["", "AP", f"against {names[0]}", "AP50", "parameters", "CPU ms of a step"]
    data, seeds = result["data"], "one seed"
    if result["seeds"] > 1:
        seeds = f"{result['seeds']} seeds, intervals of 95 % over them"
    return [
        f"## {result['title']}",
        f"{result['asks']} {result['epochs']} epochs on {data['train']['images']} images, "
        f"evaluated on {data['validation']['images']}; {seeds}.",
        f"    {result['command']}",
        _table([*header, "ms of an image, layers", "fused"], rows),
    ]


def page(text: str, files: list[Path]) -> str:
    """``text`` with its block made of the result files."""
    blocks = []
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        make = _detector_page if result["kind"] == "detector" else _comparison_page
        blocks += [*make(result), f"[{file.name}](../benchmarks/results/{file.name})"]
    return updated(text, blocks, BEGIN, END)


def result_files() -> list[Path]:
    """Detectors first."""
    files = sorted(RESULTS.glob("accuracy-*.json"))
    return sorted(files, key=lambda file: '"kind": "detector"' not in file.read_text("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    one = commands.add_parser("detector", help="figures of a run of edet train")
    one.add_argument("name", help="of the result file")
    one.add_argument("--run", type=Path, required=True, help="the run's folder")
    one.add_argument("--command", required=True, help="the command that trained it")
    several = commands.add_parser("compare", help="trains and compares variants")
    several.add_argument("name", choices=COMPARISONS)
    for option in ("epochs", "seeds", "image-size"):
        several.add_argument(f"--{option}", type=int)
    for each in (one, several):
        each.add_argument("--data", required=True, help="with splits train and val")
        each.add_argument("--threads", type=int, default=1)
    commands.add_parser("page", help="makes docs/results.md of the result files")
    args = parser.parse_args()
    if args.what == "page":
        text = page(PAGE.read_text(encoding="utf-8"), result_files())
        with replacing(PAGE) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return
    torch.set_num_threads(args.threads)
    data, validation = open_dataset(args.data), open_dataset(args.data, "val")
    if args.what == "detector":
        content = detector(args.run, data, validation, args.command)
    else:
        given = {k: getattr(args, k) for k in ("epochs", "seeds", "image_size")}
        chosen = {k: v for k, v in given.items() if v is not None}
        shown = "".join(f" --{k.replace('_', '-')} {v}" for k, v in chosen.items())
        command = f"python -m benchmarks.accuracy compare {args.name} --data DATA{shown}"
        comparison = replace(COMPARISONS[args.name], **chosen)
        content = compare(comparison, data, validation, command)
    log(f"wrote {write(args.name, content)}")


if __name__ == "__main__":
    main()
