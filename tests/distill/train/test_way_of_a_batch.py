"""How far a reader of one step has to walk: see ``tests.support.way_of_a_batch``."""

import json
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.jobs import ENVIRONMENT, write_recipes

MOST_CHANGES = 80
MOST_INTO_ENGINE = 25
MOST_FILES = 30


@pytest.mark.slow
def test_step__of_three_students_stays_in_few_files(tmp_path: Path) -> None:
    recipe = write_recipes(tmp_path, stage_steps=10, steps=6, save_every=1000)
    for path in tmp_path.glob("*.yaml"):
        text = path.read_text().replace("processes: 2", "processes: 1")
        path.write_text(text.replace("base@10", "base@5"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = dict.fromkeys(("RANK", "LOCAL_RANK"), "0")
    rank |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1")
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    result = tmp_path / "files.json"
    words = ["-m", "tests.support.way_of_a_batch", str(recipe), str(tmp_path / "out"), str(result)]
    command = [sys.executable, *words]
    done = subprocess.run(
        command, env={**ENVIRONMENT, **rank}, capture_output=True, text=True, check=False
    )
    assert result.is_file(), done.stdout + done.stderr
    files = json.loads(result.read_text())
    counts = Counter(files)
    into_engine = sum(n for path, n in counts.items() if path.startswith("distill/engine/"))
    assert counts["distill/train/faults.py"] >= 3, "three students train"
    assert len(files) <= MOST_CHANGES, counts
    assert into_engine <= MOST_INTO_ENGINE, counts
    assert len(counts) <= MOST_FILES, counts
