"""Benchmarks of models, stage by stage, and reports of their results."""

from . import report
from .measure import KernelTime, count_operations, machine_name
from .stages import run_bench
from .table import PAIRS, PARTS, Bench, Row, plot_table, result, write_json
from .variants import eager_copy, predictor_calls, prepare, random_model, set_batch_norms

__all__ = [
    "PAIRS",
    "PARTS",
    "Bench",
    "KernelTime",
    "Row",
    "count_operations",
    "eager_copy",
    "machine_name",
    "plot_table",
    "predictor_calls",
    "prepare",
    "random_model",
    "report",
    "result",
    "run_bench",
    "set_batch_norms",
    "write_json",
]
