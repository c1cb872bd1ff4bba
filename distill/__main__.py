"""Runs ``distill``: as a command, and as ``python -m distill``, the form that torchrun and other launchers start.

Python puts the folder that the user stands in first on the search path of ``python -m``, and so does
``PYTHONPATH=.``. It is moved to the end before anything of ours is imported, so that a user's
``teacher/`` or ``students.py`` is never taken for ours and a recipe can still name the user's modules.
"""

import os
import sys
from pathlib import Path

# An editable install is found by a hook that Python asks after every folder of the path, the user's too.
ROOT = str(Path(__file__).resolve().parents[1])


def user_folder_last(search_path: list[str], user_folder: str) -> list[str]:
    """Returns the search path with the user's folder moved to its end, if it is in it."""
    others = [entry for entry in search_path if os.path.realpath(entry) != user_folder]
    return search_path if len(others) == len(search_path) else [*others, user_folder]


def run() -> None:
    """Runs the command line and ends the process with its exit code."""
    search_path = sys.path if ROOT in sys.path else [*sys.path, ROOT]
    sys.path[:] = user_folder_last(search_path, os.path.realpath(os.curdir))

    from distill.cli.app import main

    main()


if __name__ == "__main__":
    run()
