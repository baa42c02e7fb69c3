"""The sub-commands of ``edet``: predict, train, evaluate, export, triton-repository, info, …."""

import io
import sys

from . import bench, evaluate, export, info, models, predict, schedule, train, triton
from .common import app

__all__ = ["app", "main"]

app.command(epilog="Example: edet predict photos/ -c tf_efficientdet_d0.pth -o found/")(
    predict.predict
)
app.command(epilog="Example: edet train data/ -m tf_efficientdet_lite0 --backbone imagenet -o run")(
    train.train
)
app.command(epilog="Example: edet evaluate data/ -c run/best.pt -o evaluation/")(evaluate.evaluate)
app.command(epilog="Example: edet export run/best.pt -o detector.onnx")(export.export)
app.command("triton-repository", epilog="Example: edet triton-repository run/best.pt -o models/")(
    triton.triton_repository
)
app.command()(info.info)
app.add_typer(
    bench.bench_app, name="bench", help="Time a model against PyTorch; compare and report results."
)
app.command()(schedule.schedule)
app.command()(models.models)


def main() -> None:
    """Runs the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error has it
    app(prog_name="edet")
