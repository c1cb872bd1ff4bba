"""Counts how often the main thread changes file in one steady step of a family: what a reader of that step has to follow.

    python -m tests.support.way_of_a_batch RECIPE OUT RESULT

Runs a whole job of one rank in this process; between two deliveries of the family phase every call of a
function of the project is noted. A change is a call whose file is another one than the last call's.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import distill.job.run
from distill.recipe.keys import FAMILY_PHASE
from distill.train.loop import run_phase
from distill.train.phase import Phase

ROOT = Path(__file__).parents[2]
PACKAGES = tuple(f"{ROOT / package}{os.sep}" for package in ("distill", "students", "teacher"))
STEADY_STEP = 4


def main(recipe: str, out: str, result: str) -> None:
    files: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(PACKAGES):
            name = str(Path(path).relative_to(ROOT))
            if not files or files[-1] != name:
                files.append(name)

    def noted(phase: Phase, *parts: Any) -> bool:
        if phase.name == FAMILY_PHASE:
            wait, num_waits = phase.exchange.wait, 0

            def at_step(pending: Any) -> Any:
                nonlocal num_waits
                num_waits += 1
                if num_waits == STEADY_STEP + 1:
                    sys.setprofile(None)
                    Path(result).write_text(json.dumps(files))
                elif num_waits == STEADY_STEP:
                    sys.setprofile(note)
                return wait(pending)

            phase.exchange.wait = at_step  # type: ignore[method-assign]
        return run_phase(phase, *parts)

    distill.job.run.run_phase = noted
    sys.argv = ["distill", "train", recipe, "--out", out, "--plain"]
    runpy.run_module("distill", run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
