"""The fork server holds what ranks need, from our folder, and leaves the launcher's environment as it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.engine import forkserver
from distill.engine.forkserver import choose_start_method

ASKS = """\
import multiprocessing, os, signal, sys
from distill.engine import forkserver

def facts(queue):
    import students
    names = ["torch", "deepspeed", "torch._dynamo", "nvidia.dali", "distill.job.run"]
    queue.put((
        [name for name in names if name not in sys.modules], students.__file__, os.environ["DS_ACCELERATOR"],
        [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM)],
    ))

if __name__ == "__main__":
    before = dict(os.environ), signal.getsignal(signal.SIGINT)
    assert forkserver.choose_start_method("cpu") == "forkserver"
    assert (dict(os.environ), signal.getsignal(signal.SIGINT)) == before
    context = multiprocessing.get_context("forkserver")
    queue = context.SimpleQueue()
    process = context.Process(target=facts, args=(queue,))
    process.start()
    print(*queue.get(), sep="\\n")
    process.join()
"""


def test_choose_start_method__gpu_ranks_are_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "has_gpu", lambda wanted: wanted != "cpu")
    assert choose_start_method("auto") == "spawn"


@pytest.mark.slow  # imports torch, DeepSpeed and DALI in processes of its own
def test_choose_start_method__ranks_find_everything_imported_from_our_folder(
    tmp_path: Path,
) -> None:
    for name in ("teacher", "students", "recipes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not ours')\n")
    (tmp_path / "asks.py").write_text(ASKS)
    root = str(Path(forkserver.__file__).parents[2])
    ended = subprocess.run(
        [sys.executable, "-P", "asks.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    missing, students, accelerator, ignores = ended.stdout.splitlines()
    assert missing == "[]"
    assert students == f"{root}/students/__init__.py"
    assert (accelerator, ignores) == ("cpu", "[True, True]")
