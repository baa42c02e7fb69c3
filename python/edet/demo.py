"""``python -m edet.demo``: every part of EfficientDet-D0 at work on a photograph."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import edet_kernels
from edet_kernels.testing.numeric import CheckFailed

from .bench import plot_table, random_model, run_bench, write_json
from .detection.anchors import generate_anchors
from .detection.draw import draw_detections, to_pil
from .detection.images import load_image
from .detection.predictor import Predictor
from .detection.preprocess import fit, letterbox_fill, preprocess, resize
from .extras import require
from .files import replacing
from .models.configs import get_config
from .models.efficientdet import EfficientDet
from .models.factory import create_model

if TYPE_CHECKING:
    from PIL.Image import Image

MODEL = "tf_efficientdet_d0"


def photograph() -> Path:
    """The portrait of Grace Hopper that matplotlib ships (US Navy, public domain).

    Raises:
        ImportError: matplotlib (extra ``plot``) is not installed.
    """
    folder = Path(require("matplotlib", "plot").get_data_path())
    return folder / "sample_data" / "grace_hopper.jpg"


def draw_input(path: Path, model: EfficientDet) -> Image:
    """What the network sees of an image: input with padding, one level's cells, one cell's anchors.

    For a model with random weights, which has no detections to show.
    """
    image_draw, image_font = require("PIL.ImageDraw", "image"), require("PIL.ImageFont", "image")
    config = model.config
    pixels = load_image(path)
    _, (h, w) = fit((pixels.shape[1], pixels.shape[2]), config.image_size)
    height, width = config.image_size
    fill = torch.tensor(letterbox_fill(config.mean), dtype=torch.uint8).view(3, 1, 1)
    canvas = fill.expand(3, height, width).clone()
    canvas[:, :h, :w] = resize(pixels, (h, w))
    picture = to_pil(canvas)
    draw = image_draw.Draw(picture)
    level = config.max_level - 1
    stride = 2**level
    for x in range(stride, width, stride):
        draw.line([x, 0, x, height], fill=(255, 255, 255))
    for y in range(stride, height, stride):
        draw.line([0, y, width, y], fill=(255, 255, 255))
    anchors = generate_anchors(
        config.image_size,
        min_level=level,
        max_level=level,
        num_scales=config.num_scales,
        aspect_ratios=config.aspect_ratios,
        anchor_scale=config.anchor_scale,
    )
    columns = width // stride
    middle = (height // stride // 2 * columns + columns // 2) * config.num_anchors
    for y1, x1, y2, x2 in anchors[middle : middle + config.num_anchors].tolist():
        draw.rectangle([x1, y1, x2, y2], outline=(255, 200, 0), width=2)
    caption = (
        "RANDOM WEIGHTS, NO DETECTIONS\n"
        f"Shown is the network's input, the {height // stride}x{columns} cells of P{level}\n"
        f"and the {config.num_anchors} anchors of one cell."
    )
    captioned = picture.crop((0, 0, width, height + 62))  # the added rows are black
    image_draw.Draw(captioned).multiline_text(
        (8, height + 4), caption, font=image_font.load_default(size=14), fill=(255, 255, 255)
    )
    return captioned


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
        print("No checkpoint: the weights are random. Times are real, detections mean nothing.\n")
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

    written = {"table": output / "bench.json", "plot": output / "bench.png"}
    write_json(table, written["table"])
    plot_table(table, written["plot"])
    if checkpoint is None:
        written["input"] = output / "input.png"
        picture = draw_input(path, model)
    else:
        found = predictor(path)
        print(f"Found: {found}")
        written["detections"] = output / "detections.png"
        written["boxes"] = output / "detections.json"
        found.to_json(written["boxes"])
        picture = draw_detections(path, found)
    with replacing(written.get("input") or written["detections"]) as temporary:
        picture.save(temporary)
    print()
    for name, file in written.items():
        print(f"{name + ':':<12}{file}")


if __name__ == "__main__":
    sys.exit(main())
