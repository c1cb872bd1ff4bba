"""The command line in the process of the test, and what it gives back."""

from collections.abc import Callable
from typing import NamedTuple


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def exit_code_of(*words: str) -> int:
    """Runs the program as its console script does; every run of it ends in ``SystemExit``."""
    from distill.cli.app import main  # not before a test asks: most need no command line

    try:
        main(list(words))
    except SystemExit as ended:
        return int(ended.code or 0)
    raise AssertionError(f"distill {words} came back without an exit code")
