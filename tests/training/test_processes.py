"""Two processes train as one does on the joined batch; one that dies ends the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import drawn_shapes
import edet
import edet_kernels
from edet.models.described import read_training
from edet.training.datasets import open_dataset
from edet.training.processes import distributed

#: Where the processes find the packages.
PACKAGES = os.pathsep.join(
    str(Path(str(p.__file__)).resolve().parents[1]) for p in (edet, edet_kernels)
)

SCRIPT = """
import os, sys, torch, edet
from edet.training import Trainer, evaluate, open_dataset, start_processes
from edet.training.processes import gathered
from torch import distributed as dist

torch.set_num_threads(1)
start_processes(torch.device("cpu"))
folder, mode = sys.argv[1:]
def new_trainer(dtype, batch_size):
    torch.manual_seed(1)
    size = dict(width=16, cells=1, head_repeats=1, num_classes=2, image_size=64)
    model = edet.create_model("tf_efficientdet_d0", **size).to(dtype)
    return Trainer(model, batch_size=batch_size, learning_rate=0.02)

data = open_dataset("data")
if mode == "new":  # one step, of the fused layers and of PyTorch's
    for dtype in (torch.float32, torch.float64):
        name = f"{folder}-{dtype}"
        new_trainer(dtype, 8).fit(data, epochs=1, folder=name, workers=0)
trainer = new_trainer(torch.float64, 4)
rank = int(os.environ.get("RANK", 0))

def callback(event):
    if mode == "die" and rank == 1 and event.kind == "epoch":
        os._exit(7)
    if mode == "stop" and rank == 1 and event.step == 3:
        trainer.stopping = True

history = trainer.fit(
    data, validation=open_dataset("data", "val"), epochs=2, folder=folder,
    workers=0, resume=mode == "resume", callbacks=[callback],
)
if dist.is_initialized():
    # every process holds the same model, average and figures
    state = [*trainer.model.state_dict().values(), *trainer.average.model.state_dict().values()]
    flat = torch.cat([x.double().flatten() for x in state])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    assert all(torch.equal(x, flat) for x in others)
    figures = gathered(str(history.evaluation and history.evaluation.figures))
    assert len(set(figures)) == 1
    dist.destroy_process_group()
"""


#: Pairs of processes that end at once after their last exchange, forked so that one import serves
#: all; gloo's threads get the interpreter's lock only at the end. Prints how each pair ended.
LAST_EXCHANGE = """
import os, socket, sys, torch, edet
from edet.training.processes import from_first, gathered, start_processes, summed

exchanges = {
    "sum": lambda rank: int(summed(torch.ones(3)).sum()) == 6,
    "gather": lambda rank: gathered(["x" * rank, rank]) == [["", 0], ["x", 1]],
    "first": lambda rank: from_first({"rank": rank}) == {"rank": 0},
}
for name in sys.argv[1:]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")
    children = []
    for rank in range(2):
        os.environ["RANK"] = str(rank)
        if child := os.fork():
            children.append(child)
            continue
        start_processes(torch.device("cpu"))
        sys.setswitchinterval(100)
        assert gathered("a" * 1000) == ["a" * 1000] * 2
        assert exchanges[name](rank)
        sys.exit()
    print(name, *(os.waitpid(child, 0)[1] for child in children), flush=True)
"""


def launch(root: Path, folder: str, mode: str = "new", processes: int = 2) -> Any:
    """Runs the script, by torchrun when there is more than one process."""
    (root / "script.py").write_text(SCRIPT)
    runner = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(runner if processes > 1 else []), "script.py", folder, mode]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PACKAGES}
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of which one image of five has no objects, so that a process can be without any."""
    folder = tmp_path_factory.mktemp("processes")
    drawn_shapes.write_coco(folder / "data", count=9)
    drawn_shapes.write_coco(folder / "data", "val", count=5, seed=1)
    return folder


def assert_close_runs(a: Path, b: Path, figures: float, weights: float) -> None:
    """The same run up to rounding, as a share of each tensor's largest value.

    Args:
        figures: tolerance of losses, gradients' norm and the batch norms' statistics.
        weights: that of weights, which pass through the gradients of many layers.
    """
    x, y = read_training(a / "last.pt"), read_training(b / "last.pt")
    for kind in ("model", "average"):
        for key, value in x["trainer"][kind].items():
            other = y["trainer"][kind][key].double()
            scale = float(other.abs().max()) + 1e-2
            tolerance = figures if "running" in key else weights
            error = float((value.double() - other).abs().max()) / scale
            assert error < tolerance, (kind, key, error)
    for row, others in zip(x["rows"], y["rows"], strict=True):
        for key in ("loss", "class_loss", "box_loss", "gradient_norm"):
            assert row[key] == pytest.approx(others[key], rel=figures), key


@pytest.mark.slow
def test_two_processes_are_one(root: Path) -> None:
    one = launch(root, "one", processes=1)
    assert one.returncode == 0, one.stderr
    two = launch(root, "two")
    assert two.returncode == 0, two.stderr
    assert_close_runs(root / "one-torch.float32", root / "two-torch.float32", 1e-3, 1e-2)
    assert_close_runs(root / "one-torch.float64", root / "two-torch.float64", 1e-11, 1e-11)
    # six steps: rounding grows, by norms over a few pixels, about tenfold in each
    assert_close_runs(root / "one", root / "two", 1e-5, 1e-5)
    # the logs are the first process's, once
    assert (root / "two/log.csv").read_text().count("\n") == 3
    # gathered evaluation: the figures are those of the checkpoint in one process
    found = edet.evaluate(root / "two/last.pt", open_dataset(root / "data", "val"))
    rows = read_training(root / "two/last.pt")["rows"]
    for key, value in found.figures.items():
        assert str(rows[-1][key]) == str(value)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_which_one_process_goes_on_with(root: Path) -> None:
    died = launch(root, "died", "die")
    assert died.returncode != 0
    assert "exitcode  : 7" in died.stderr
    assert read_training(root / "died/last.pt")["trainer"]["epoch"] == 1
    resumed = launch(root, "died", "resume", processes=1)
    assert resumed.returncode == 0, resumed.stderr
    straight = root / "one"
    if not (straight / "last.pt").exists():
        assert launch(root, "one", processes=1).returncode == 0
    assert_close_runs(straight, root / "died", 1e-5, 1e-5)


@pytest.mark.slow
def test_one_process_that_is_stopped_stops_all(root: Path) -> None:
    stopped = launch(root, "stopped", "stop")
    assert stopped.returncode == 0, stopped.stderr
    # asked for after the third step, agreed on in the fourth
    assert read_training(root / "stopped/last.pt")["trainer"]["step_count"] == 4


@pytest.mark.slow
def test_processes_may_end_right_after_an_exchange(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text(LAST_EXCHANGE)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PACKAGES}
    kinds = 2 * ["sum", "gather", "first"]
    ended = subprocess.run(
        [sys.executable, tmp_path / "ends.py", *kinds], env=environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert ended.stdout.splitlines() == [f"{kind} 0 0" for kind in kinds], ended.stderr
    assert ended.returncode == 0


def test_without_processes() -> None:
    model = edet.create_model("tf_efficientdet_lite0", width=8, cells=1, head_repeats=1)
    with pytest.raises(ValueError, match=r"torch\.distributed must be initialised first: run by"):
        distributed(model)
    assert not any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules())
