"""Benchmarks of models, stage by stage, and reports of their results."""
