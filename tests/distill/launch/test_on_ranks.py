"""``distill eval`` on ranks, as a user types it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import Run
from tests.support.scored_run import write_run, write_splits

COMMAND = [sys.executable, "-m", "distill", "eval"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two exported students and their images."""
    folder, run = (tmp_path_factory.mktemp(name) for name in ("images", "run"))
    write_run(run, write_splits(folder, (30, 30)))
    return [*(str(run / "students" / name) for name in ("vit", "conv")), "--data", str(folder)]


def started(words: list[str], **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [*COMMAND, *words, "--json"], env=environment, stdout=subprocess.PIPE, text=True
    )


def result_of(process: subprocess.Popen[str]) -> Any:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(out) if out else None


@pytest.mark.slow
def test_eval__on_local_ranks_and_as_ranks_of_a_launch_gives_the_same(words: list[str]) -> None:
    alone = result_of(started(words))
    assert alone["students"]["vit"]["knn"] and alone["agreement"]["images"] == 36
    assert result_of(started([*words, "--ranks", "2"])) == alone
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [started(words, RANK=str(r), LOCAL_RANK=str(r), **launch) for r in range(2)]
    assert [result_of(rank) for rank in ranks] == [alone, None]


@pytest.mark.slow
def test_eval__what_a_rank_refuses_is_one_line(
    words: list[str], tmp_path: Path, distill: Run
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    refused = distill("eval", tmp_path, *words[2:], "--ranks", 2)
    assert refused.code == 1 and len(refused.err.splitlines()) <= 3, refused.err
    assert str(tmp_path) in refused.err and "Traceback" not in refused.err
