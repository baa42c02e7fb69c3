"""Tables of what benchmarks/gpu.py measured: as such, and beside what the gauge predicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from edet.bench.result import OURS

#: By how much of it a measured time may differ from a predicted one before it is named.
OFF = 0.3
#: The gauge's ops (docs/gpu-model.md) that a part of a model is made of.
PART_OPS = {
    "BiFPN": ("lateral", "bifpn"),
    "heads": ("head",),
    "backbone": ("stem", "mbconv"),
    "network": ("stem", "mbconv", "lateral", "bifpn", "head"),
}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int) -> list[str]:
    """Lines of a Markdown table; all but the first columns are of numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _us(row: dict[str, Any], name: str) -> str:
    time = row["times"].get(name)
    return f"{1e3 * time['median_ms']:.1f}" if time else ""


def _best(row: dict[str, Any], *, ours: bool) -> tuple[str, float] | None:
    """The fastest variant of ours or of the others, and its µs; Triton's are ours too."""
    times = {
        name: 1e3 * time["median_ms"]
        for name, time in row["times"].items()
        if name.startswith((OURS, "Triton")) == ours
    }
    return min(times.items(), key=lambda item: item[1]) if times else None


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for r in rows for name in r["times"]))


def _gain(row: dict[str, Any]) -> str:
    """How many times longer the fastest of the others takes than the fastest of ours."""
    mine, theirs = (_best(row, ours=ours) for ours in (True, False))
    return f"**{theirs[1] / mine[1]:.2f}×**" if mine and theirs else ""


def models_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Whole models in µs, and the best of the others against the best of ours."""
    names = _names(rows)
    cells = [
        [
            *(r["model"], str(r["batch"]), r["dtype"], r["part"]),
            *(_us(r, name) for name in names),
            _gain(r),
        ]
        for r in rows
    ]
    return _table(["model", "batch", "dtype", "part", *names, "best"], cells, words=4)


def ops_table(rows: Sequence[dict[str, Any]], ceilings: dict[str, dict[str, float]]) -> list[str]:
    """Ops in µs, and the share of the measured copy and product that the best of ours reaches."""
    names = _names(rows)
    cells = []
    for r in rows:
        peak = ceilings[r["dtype"]]
        mine = _best(r, ours=True)
        seconds = 1e-6 * mine[1] if mine else float("inf")
        shares = [r["bytes"] / seconds / peak["bytes_per_second"],
                  r["operations"] / seconds / peak["operations_per_second"]]  # fmt: skip
        cells.append([
            *(r["case"], r["model"], str(r["batch"]), r["dtype"], r["cache"]),
            *(_us(r, name) for name in names),
            *(f"{share:.0%}" for share in shares),
            _gain(r),
        ])  # fmt: skip
    head = ["op", "model", "batch", "dtype", "L2", *names, "of copy", "of product", "best"]
    return _table(head, cells, words=5)


def missing(result: dict[str, Any]) -> list[str]:
    """Lines that name what a result lacks and why."""
    lines = [f"* Not measured: {what}" for what in result["left_out"]]
    lines += [f"* Failed: {what}: {why}" for what, why in result["failures"].items()]
    reasons: dict[str, list[str]] = {}
    for r in [*result["models"], *result["rows"]]:
        for name, why in r["unavailable"].items():
            what = f"{r.get('part') or r['case']}, {r['model']}, batch {r['batch']}"
            reasons.setdefault(f"{name}: {why}", []).append(what)
    for reason, where in reasons.items():
        few = "; ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        lines.append(f"* Without {reason} ({few})")
    return lines


def markdown(result: dict[str, Any]) -> str:
    """All that a result holds, in µs."""
    peaks = "; ".join(
        f"{dtype}: copy {peak['bytes_per_second'] / 1e12:.2f} TB/s, product "
        f"{peak['operations_per_second'] / 1e12:.0f} TFLOP/s"
        for dtype, peak in result["ceilings"].items()
    )
    lines = [f"**{result['device']}**, torch {result['torch']}, {result['date'][:10]}; {peaks}. "
             "Medians, µs; best: the fastest of the others against ours."]  # fmt: skip
    if result["models"]:
        lines += ["", *models_table(result["models"])]
    if result["rows"]:
        lines += ["", *ops_table(result["rows"], result["ceilings"])]
    absent = missing(result)
    return "\n".join([*lines, *(["", *absent] if absent else [])])


# ---- beside the gauge's predictions ----


def _predicted(
    result: dict[str, Any], predicted: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """What was measured and is predicted: its name, its row, and the gauge's rows it is made of."""
    known = {
        (r["model"], r["batch"], r["op"]): r
        for r in predicted["rows"]
        if r["gpu"] in result["device"]
    }
    for row in result["models"]:
        ops = PART_OPS.get(row["part"], ())
        guesses = [known[key] for op in ops if (key := (row["model"], row["batch"], op)) in known]
        if ops and len(guesses) == len(ops) and row["dtype"] == "float16":
            yield f"{row['part']}, {row['model']}, batch {row['batch']}", row, guesses
    for row in result["rows"]:
        guess = known.get((row["model"], row["batch"], row["case"]))
        # an op of several calls is not of the same shape in all
        if guess and guess["calls"] == 1 and (row["dtype"], row["cache"]) == ("float16", "warm"):
            yield f"{row['case']}, {row['model']}, batch {row['batch']}", row, [guess]


def beside_predicted(
    result: dict[str, Any], predicted: dict[str, Any], *, by_kernel: bool = True
) -> str:
    """Measured times beside what the gauge (docs/gpu-model.md) predicts, as Markdown.

    Parts of models, and ops that a model calls once; float16 and warm, which is what the gauge
    predicts. Kernels by name, where a result has launches and the gauge knows the kernel: what was
    measured is from the end of the launch before when a CUDA graph was profiled, as what is
    predicted, else each launch by itself.

    Args:
        result: of benchmarks/gpu.py.
        predicted: the content of ``results/gpu-model.json``.
        by_kernel: whether there is a table of kernels.

    Returns:
        two tables, and a line that names what is off by more than :data:`OFF`; empty when nothing
        that was measured is predicted.
    """
    wholes, kernels, off = [], [], []
    for what, row, guesses in _predicted(result, predicted):
        mine = _best(row, ours=True)
        if mine is None:
            continue
        guess = sum(g["predicted_us"] for g in guesses)
        wholes.append([what, f"{guess:.1f}", f"{mine[1]:.1f}", f"{mine[1] / guess - 1:+.0%}"])
        if abs(mine[1] / guess - 1) > OFF:
            off.append(what)
        kernels += _kernels(what, row, guesses)
    if not wholes:
        return ""
    lines = _table(["", "predicted µs", "measured µs", "off by"], wholes, words=1)
    lines += ["", f"Off by more than {OFF:.0%}: {', '.join(off) or 'nothing'}"]
    if kernels and by_kernel:
        head = ["", "kernel", "launches, predicted", "measured", "predicted µs", "measured µs",
                "off by"]  # fmt: skip
        lines += ["", *_table(head, kernels, words=2)]
        lines += ["", "*as calls*: with the wait for the launch before of those that begin early."]
    return "\n".join(lines)


def _kernels(what: str, row: dict[str, Any], guesses: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Lines of the kernels of a row by name: launches and µs, predicted and measured."""
    if not row.get("launches"):
        return []
    in_graph = row["launched_as"] == "graph"
    key, how = ("step_us", "") if in_graph else ("us", ", *as calls*")
    measured: dict[str, tuple[int, float]] = {}
    for launch in row["launches"]:
        count, us = measured.get(launch["kernel"], (0, 0.0))
        measured[launch["kernel"]] = count + launch["launches"], us + launch[key]
    guessed: dict[str, tuple[int, float]] = {}
    for kernel in (kernel for guess in guesses for kernel in guess["kernels"]):
        count, us = guessed.get(kernel["kernel"], (0, 0.0))
        times = kernel["launches"]
        guessed[kernel["kernel"]] = count + times, us + times * kernel["time_us"]
    lines = []
    for name in dict.fromkeys([*measured, *guessed]):
        has, is_guessed = measured.get(name), guessed.get(name)
        off = f"{has[1] / is_guessed[1] - 1:+.0%}" if has and is_guessed else ""
        counts = [str(x[0]) if x else "" for x in (is_guessed, has)]
        times_us = [f"{x[1]:.1f}" if x else "" for x in (is_guessed, has)]
        lines.append([f"{what}{how}", f"`{name}`", *counts, *times_us, off])
    return lines


# ---- in the docs ----


def page(result: dict[str, Any], predicted: dict[str, Any]) -> list[str]:
    """The blocks of docs/cuda.md that are made from a result: measured, and beside predicted."""
    blocks = [markdown(result)]
    if beside := beside_predicted(result, predicted, by_kernel=False):
        blocks += ["Beside what [the gauge](gpu-model.md) predicts:", beside]
    return blocks
