"""``python -m tests.gpu``: runs every check, writes one JSON, prints a table; exit code 0 when all passed."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.gpu.checks import CHECKS
from tests.gpu.report import table
from tests.gpu.runner import Runner
from tests.gpu.sizes import BY_NAME
from tests.gpu.world import leave_world

BUDGET_S = 540.0


def main(words: Sequence[str]) -> int:
    """0 when every check that this machine can make passed, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds")
    parser.add_argument("--sizes", choices=sorted(BY_NAME), default="full")
    parser.add_argument("--only", default="", help="checks whose names contain this")
    options = parser.parse_args(words)
    device = torch.device({"cuda": "cuda:0", "cpu": "cpu"}[options.device])
    runner = Runner(device, BY_NAME[options.sizes], options.out, options.budget)
    timer = runner.watched()
    timer.start()
    try:
        is_passed = runner.run([check for check in CHECKS if options.only in check.name])
    finally:
        timer.cancel()
        leave_world()
    sys.stdout.write(table(runner.rows))
    return 0 if is_passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
