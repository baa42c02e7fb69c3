"""``python -m edet.demo``: EfficientDet-D0 timed, and the person in a photograph found."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import edet_kernels
from edet_kernels.testing.numeric import CheckFailed

from .bench import plot_table, random_model, run_bench, write_json
from .detection.draw import draw_detections
from .detection.predictor import Predictor
from .detection.preprocess import preprocess
from .extras import require
from .files import replacing
from .models.configs import get_config
from .models.factory import create_model

MODEL = "tf_efficientdet_d0"
#: Comes with its weights.
FINDER = "edet_lite0_person"


def photograph() -> Path:
    """The portrait of Grace Hopper that matplotlib ships (US Navy, public domain).

    Raises:
        ImportError: matplotlib (extra ``plot``) is not installed.
    """
    folder = Path(require("matplotlib", "plot").get_data_path())
    return folder / "sample_data" / "grace_hopper.jpg"


def time_predictor(predictor: Predictor, path: Path, rounds: int = 5) -> str:
    """Milliseconds from file to boxes, of it the network; the best of ``rounds``."""
    config = predictor.model.config
    images = preprocess(path, predictor.image_size, mean=config.mean, std=config.std).images
    whole, network = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        predictor(path)
        whole.append(time.perf_counter() - start)
        start = time.perf_counter()
        with torch.no_grad():
            predictor.model(images)
        network.append(time.perf_counter() - start)
    return f"{1e3 * min(whole):.0f} ms, of which the network takes {1e3 * min(network):.0f} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m edet.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), metavar="FOLDER")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=os.environ.get("EDET_CHECKPOINT") or None,
        metavar="FILE",
        help=f"weights of {MODEL} (default: EDET_CHECKPOINT; random weights without it)",
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="timed rounds")
    options = parser.parse_args(arguments)
    try:
        run(options.output, options.checkpoint, options.rounds)
    except (OSError, ValueError, ImportError, CheckFailed) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def run(output: Path, checkpoint: Path | None, rounds: int) -> None:
    """Times and checks the model on the photograph and writes table, plot and image to ``output``.

    Raises:
        OSError: ``output`` cannot be written.
        ValueError: the checkpoint does not fit.
        CheckFailed: a part of the model disagrees with the reference.
    """
    path = photograph()
    config = get_config(MODEL)
    images = preprocess(path, config.image_size, mean=config.mean, std=config.std).images
    if checkpoint is None:
        print(f"{MODEL} with random weights, for its times; {FINDER} then finds the person.\n")
        model = random_model(MODEL, images)
    else:
        model = create_model(MODEL, checkpoint=checkpoint).eval()
    output.mkdir(parents=True, exist_ok=True)
    reference = [c for c in edet_kernels.explain() if c.backend == "reference"]
    for choice in reference:
        print(f"Note: {choice.op} runs its PyTorch reference: {choice.reason}")

    table = run_bench(model, images=images, rounds=rounds)
    print(table)
    worst = max(table.rows, key=lambda row: row.difference)
    print(
        f"\nAgreement with the float64 reference: within {worst.difference:.0e} of the largest "
        f"value (PyTorch's\nown layers: {worst.eager_difference:.0e})."
    )
    predictor = Predictor(model)
    print(f"From the photograph's file to boxes: {time_predictor(predictor, path)}.")

    finder = predictor if checkpoint is not None else Predictor(FINDER)
    found = finder(path)
    print(f"\nFound by {MODEL if checkpoint is not None else FINDER}: {found}")
    written = {
        "table": output / "bench.json",
        "plot": output / "bench.png",
        "detections": output / "detections.png",
        "boxes": output / "detections.json",
    }
    write_json(table, written["table"])
    plot_table(table, written["plot"])
    found.to_json(written["boxes"])
    with replacing(written["detections"]) as temporary:
        draw_detections(path, found).save(temporary)
    print()
    for name, file in written.items():
        print(f"{name + ':':<12}{file}")


if __name__ == "__main__":
    sys.exit(main())
