"""What tests and benchmarks share: sample calls of every op, the error rule, the timer.

It is part of the package so that whoever changes a kernel, or builds on one, judges it by the same
measure; it needs torch and numpy only.
"""
