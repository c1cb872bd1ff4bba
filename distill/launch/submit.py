"""Hands a job's text to the program of a scheduler."""

import shutil
import subprocess
from collections.abc import Sequence

from distill.errors import SetupError

SUBMIT_S = 60.0


def hand_over(text: str, words: Sequence[str], *, look_at: str, correct: str) -> str:
    """Runs a program with a text on its standard input; returns what it prints.

    ``look_at`` is the command that shows whether the job is there; ``correct`` what helps where the program refuses.

    Raises:
        SetupError: the program is not here, does not answer, or refuses the text.
    """
    program = words[0]
    if shutil.which(program) is None:
        raise SetupError(
            f"{program}: not found, nothing was submitted",
            fix=f"Type the command where {program} reaches the cluster, or add --dry-run to see what it is given.",
        )
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, timeout=SUBMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise SetupError(
            f"{program} has not answered in {SUBMIT_S:.0f} s",
            fix=f"Look at {look_at} before you submit again: the job may be there.",
        ) from error
    if done.returncode != 0:
        reason = " ".join(done.stderr.split())[:300] or f"exit code {done.returncode}"
        raise SetupError(f"{program} refuses it: {reason}", fix=correct)
    return done.stdout.strip()
