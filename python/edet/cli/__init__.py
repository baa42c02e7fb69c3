"""The sub-commands of ``edet``: predict, info, bench, schedule, models."""

from . import bench, info, models, predict, schedule
from .common import app

__all__ = ["app", "main"]

app.command(epilog="Example: edet predict photos/ -c tf_efficientdet_d0.pth -o found/")(
    predict.predict
)
app.command()(info.info)
app.add_typer(
    bench.bench_app, name="bench", help="Time a model against PyTorch; compare and report results."
)
app.command()(schedule.schedule)
app.command()(models.models)


def main() -> None:
    """Runs the command line."""
    app(prog_name="edet")
