"""Storage that refuses files, for whole jobs: by a module that every process of a job imports first, or by strace."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAULT = """\
import errno, os
import distill.listing.storage as storage

storage.PATIENCE_S = PATIENCE
read = storage.read_file
count = {}

def read_file(path):
    count[path] = count.get(path, 0) + path.endswith(NAMES)
    if count[path] == 1 and IS_ONCE or count[path] > 2 and os.path.exists(MARK):
        raise OSError(errno.EIO, "Input/output error", path)
    return read(path)

storage.read_file = read_file
"""


def environment(
    folder: Path, names: tuple[str, ...], *, once: bool = False, patience_s: float = 300.0
) -> dict[str, str]:
    """Variables of a job whose files of these names answer EIO: the first time in every process, or from their third reading on while ``folder / "mark"`` is there."""
    folder.mkdir(exist_ok=True)
    text = FAULT.replace("PATIENCE_S = PATIENCE", f"PATIENCE_S = {patience_s}")
    text = text.replace("NAMES", repr(names)).replace("MARK", repr(str(folder / "mark")))
    (folder / "sitecustomize.py").write_text(text.replace("IS_ONCE", str(once)))
    paths = os.pathsep.join([str(folder), str(ROOT)])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def why_no_strace() -> str:
    """Why system calls cannot be made to fail here; empty where they can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(
        ["strace", "-e", "inject=openat:error=EIO:when=1", "true"], capture_output=True, text=True
    )
    return "" if "INJECTED" in tried.stderr else f"strace cannot inject: {tried.stderr[-200:]}"
