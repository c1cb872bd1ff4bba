"""Where copies of the state lie in the memory of a node. Imports no torch."""

import os
from pathlib import Path

MEMORY = "/dev/shm"  # a folder in it is made for this user alone, and checked
VARIABLE = "DISTILL_MEMORY_FOLDER"  # another file system in memory
PREFIX = "distill-copies-"


def memory_folder() -> Path:
    """The file system in memory that copies lie in."""
    return Path(os.environ.get(VARIABLE, MEMORY))
