"""Two nodes under another launcher, each with host name, processes and rank to itself: who is named when one fails."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.launch.board import MEMORY, PREFIX, all_records
from distill.runfolder.heartbeat import BEAT_S, read_record
from tests.support.jobs import ENVIRONMENT, RUN, status_of, wait_for_step, write_recipes

NODES = ("node-a", "node-b")
NAMESPACES = ("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
START = 'hostname "$0" && exec "$@"'
LOST = 4  # the exit code of a run that lost a rank
Nodes = list[subprocess.Popen[str]]

pytestmark = pytest.mark.slow  # whole jobs


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"{' '.join(NAMESPACES)} is refused here: {tried.stderr.strip()}")
    return write_recipes(tmp_path, stage_steps=400, steps=400, save_every=5)


@pytest.fixture
def nodes(recipe: Path) -> Iterator[Nodes]:
    """Two nodes that train together, past the first checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [_start(recipe, node, rank, port) for rank, node in enumerate(NODES)]
    try:
        wait_for_step(started[0], recipe.parent / RUN, "base", 6)
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        for board in MEMORY.glob(f"{PREFIX}{os.getuid()}-*"):  # of killed ranks in other containers
            if any(record.host in NODES for record in all_records(board)):
                shutil.rmtree(board)


def _start(recipe: Path, node: str, rank: int, port: int) -> "subprocess.Popen[str]":
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    train = [sys.executable, "-m", "distill", "train", recipe, "--out", recipe.parent]
    return subprocess.Popen(
        [*NAMESPACES, "sh", "-c", START, node, *map(str, train), "--name", RUN],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**ENVIRONMENT, **variables},
    )


def rank_on(node: "subprocess.Popen[str]") -> int:
    """The process id of a node's rank, as it is outside of the node."""
    (child,) = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    return int(child)


def stop_in_short_work(pid: int, run: Path) -> None:
    """Stops rank 1 where its last record allows a minute; loading and saving may take several before they are a fault."""
    for _ in range(100):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2 * BEAT_S)  # what it wrote last has arrived
        record = read_record(run, 1)
        if record is not None and record.allowed_s <= 60.0:
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(BEAT_S)
    raise AssertionError(f"never in short work: {record}")


@pytest.mark.parametrize("victim", [0, 1])
def test_nodes__a_killed_rank_is_named_with_its_host(
    recipe: Path, nodes: Nodes, victim: int
) -> None:
    os.kill(rank_on(nodes[victim]), signal.SIGKILL)
    said = nodes[1 - victim].communicate(timeout=120)[0]
    assert nodes[1 - victim].returncode == LOST, said
    assert f"rank {victim} on {NODES[victim]}: " in said, said
    assert "the same command resumes" in said.lower()


def test_nodes__a_stopped_rank_is_ended_and_named_and_no_other_process(
    recipe: Path, nodes: Nodes
) -> None:
    """The other node sees the record only: a signal to that number would hit a process of its own."""
    stop_in_short_work(rank_on(nodes[1]), recipe.parent / RUN)
    said = nodes[0].communicate(timeout=240)[0]
    assert nodes[0].returncode == LOST, said
    assert f"rank 1 on {NODES[1]}: " in said and "rank 0 on" not in said, said
    assert status_of(recipe.parent / RUN)["state"] == "failed"
