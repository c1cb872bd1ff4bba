"""The cause of a rank's end is on disk before anything is destroyed."""

import os
import subprocess
import sys
import time
from pathlib import Path

from distill.launch.rank import GRACE_S, LEAVE_S
from distill.runfolder.failure import read_failure
from distill.runfolder.heartbeat import ROOT, read_record

RANK = """
import sys, threading
from pathlib import Path
from types import SimpleNamespace
import torch.distributed as dist
from distill.errors import SetupError
from distill.launch import rank
from distill.runfolder.failure import FILE

folder = Path(sys.argv[1])

def destroy():
    print("on disk:", (folder / FILE).exists(), flush=True)
    threading.Event().wait()

def work(*_):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    raise SetupError("the real cause", fix="Mend it.")

engine = SimpleNamespace(hang_limit_s=30.0)
request = SimpleNamespace(ranks_per_node=None)
job = SimpleNamespace(request=request, recipe=SimpleNamespace(engine=engine))
rank.read_job, rank.work, rank.dist.destroy_process_group = lambda _: job, work, destroy
rank.entry(str(folder), None, "")
"""


def test_entry__the_cause_is_on_disk_though_the_group_cannot_be_left(tmp_path: Path) -> None:
    """As on NCCL, whose shutdown waits for kernels of ranks that are gone: the rank ends by itself, with the code of its cause."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    gone_s = time.time() - (tmp_path / "failure.json").stat().st_mtime
    assert "on disk: True" in ended.stdout, ended.stderr
    assert ended.returncode == 3
    assert gone_s < LEAVE_S + GRACE_S
    failure, record = read_failure(tmp_path), read_record(tmp_path, 0)
    assert failure is not None and failure.message == "the real cause"
    assert record is not None and "the real cause" in record.end
