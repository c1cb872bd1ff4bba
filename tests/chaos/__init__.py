"""Faults on purpose, counted: kills, crashes while saving, flipped bits, NaN, hangs, mutated files, other layouts.

``python -m tests.chaos NAME [--count N] [--seed S]``; each module has its own options.
"""
