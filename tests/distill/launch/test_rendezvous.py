"""Ranks of another launcher: nothing that a killed launch left is believed, and one that cannot start ends all with one line."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, not listed

from distill.engine.variables import LaunchedRank
from distill.errors import DataError, SetupError, UserError
from distill.job.prepare import launch_of
from distill.launch import rendezvous
from distill.launch.rendezvous import Rendezvous, open_store
from tests.support.jobs import ENVIRONMENT, write_recipes


def write_job(folder: Path, nonce: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "job.json").write_text(json.dumps({"request": {"launch": nonce}}))


def lead(
    store: Any, folder: Path, prepare: Callable[[str], None], num_ranks: int = 2, words: Any = ()
) -> str:
    leader = Rendezvous(LaunchedRank(0, num_ranks, "here", 1), store)
    with leader.failing_together():
        prepare(leader.nonce)
        leader.admit(folder, words)
    return leader.nonce


def follow(store: Any, folder: Path, rank: int = 1, words: Any = ()) -> str:
    follower = Rendezvous(LaunchedRank(rank, 3, "here", 1), store)
    follower.join(folder, words)
    return follower.nonce


def test_join__believes_nothing_of_an_earlier_launch(tmp_path: Path) -> None:
    """The store outlives a launch too, as one of torch elastic may: then its keys are those of before."""
    store, run = HashStore(), tmp_path / "run"
    (tmp_path / ".ready-0-0-1").touch()

    def prepare(nonce: str) -> None:
        time.sleep(0.5)  # the other rank has long asked
        assert launch_of(run) != nonce
        write_job(run, nonce)

    for _ in range(2):
        before = launch_of(run)
        with ThreadPoolExecutor(2) as ranks:
            follower = ranks.submit(follow, store, run)
            nonce = lead(store, run, prepare)
            assert follower.result(10) == nonce == launch_of(run) != before


def test_join__ends_with_the_line_of_rank_0(tmp_path: Path) -> None:
    def fail(_: str) -> None:
        raise DataError("/data: holds no images", fix="Give another.", exit_code=7)

    def break_(_: str) -> None:
        raise OSError("disk gone")

    for prepare, told, code in ((fail, "/data: holds no images", 7), (break_, "disk gone", 1)):
        store, began = HashStore(), time.monotonic()
        with ThreadPoolExecutor(2) as ranks:
            others = [ranks.submit(follow, store, tmp_path, rank) for rank in (1,)]
            with pytest.raises((DataError, OSError), match=told):
                lead(store, tmp_path, prepare)
            for other in others:
                with pytest.raises(UserError, match=told) as error:
                    other.result(10)
                assert error.value.exit_code == code and error.value.fix
        assert time.monotonic() - began < rendezvous.LEAVE_S


@pytest.mark.parametrize("case", ["overrides", "storage"])
def test_admit__one_rank_that_cannot_take_part_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(rendezvous, "STORAGE_S", 0.3)
    store, mine, theirs = HashStore(), tmp_path / "mine", tmp_path / "theirs"
    write_job(theirs, "of an earlier launch")
    other = (theirs, 2, ("seed=1",)) if case == "storage" else (mine, 2, ("seed=2",))
    told = {
        "storage": f"rank 2 on {HOST} does not find in {theirs} what rank 0 on {HOST} prepared in {mine}",
        "overrides": f"rank 2 on {HOST} was started with the overrides seed=2, rank 0 on {HOST} with seed=1",
    }[case]
    with ThreadPoolExecutor(3) as ranks:
        others = [
            ranks.submit(follow, store, mine, 1, ("seed=1",)),
            ranks.submit(follow, store, *other),
        ]
        with pytest.raises(SetupError, match=re.escape(told)):
            lead(store, mine, lambda nonce: write_job(mine, nonce), 3, ("seed=1",))
        for each in others:
            with pytest.raises(UserError, match=re.escape(told)) as error:
                each.result(10)
            assert error.value.exit_code == SetupError.exit_code


def test_waits__have_an_end_and_say_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seconds in (("CONNECT_S", 0.5), ("PREPARED_S", 0.5), ("SAY_EVERY_S", 0.2)):
        monkeypatch.setattr(rendezvous, name, seconds)
    monkeypatch.setattr(rendezvous, "LEAVE_S", 0.1)
    with pytest.raises(SetupError, match=r"rank 1 on \S+ waited for rank 0 at here to prepare"):
        follow(HashStore(), tmp_path)
    with pytest.raises(SetupError, match=r"rank 0 on \S+ waited for 2 of 3 ranks: 1, 2, \d s"):
        lead(HashStore(), tmp_path, lambda _: None, 3)
    with pytest.raises(SetupError, match=r"waited for rank 0 at 127.0.0.1:\d+ \(.*refused"):
        open_store(LaunchedRank(1, 2, "127.0.0.1", free_port()))
    said = capsys.readouterr().err.splitlines()
    for who in ("rank 0 at here to prepare", "2 of 3 ranks: 1, 2", "rank 0 at 127.0.0.1"):
        lines = [line for line in said if f"waits for {who}" in line]
        assert lines and all(re.search(r", \d+ s; (check that|rank 0's)", line) for line in lines)


def test_name_missing__counts_and_guesses_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert rendezvous._name_missing([5, 6, 7], 16) == "3 of 16 ranks: 5, 6, 7"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert rendezvous._name_missing([5, 6, 7], 16) == "3 of 16 ranks: 5, 6, 7 (node 1?)"
    many = rendezvous._name_missing(range(4, 4096), 4096)
    assert many.startswith("4092 of 4096 ranks: 4, 5, 6, 7, 8, 9, 10, 11 and 4084 more (node 1, 2,")
    assert many.endswith(" and 1015 more?)")


HOST = socket.gethostname()
ROOT = Path(__file__).parents[3]


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def start_rank(
    rank: int, port: int, recipe: Path, *words: str, code: Path = ROOT
) -> subprocess.Popen[str]:
    """A rank as torchrun starts it, with the code that lies in a folder."""
    command = [sys.executable, "-m", "distill", "train", str(recipe), *words]
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    place |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        command,
        env={**ENVIRONMENT, **place, "PYTHONPATH": str(code)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=recipe.parent,
    )


@pytest.mark.slow
def test_train__two_ranks_of_a_launch_and_what_a_killed_one_left(tmp_path: Path) -> None:
    recipe = write_recipes(tmp_path, stage_steps=11, steps=4, save_every=1000)
    port, run = free_port(), tmp_path / "runs" / "tiny"
    killed = [start_rank(rank, port, recipe, "seed=5") for rank in (0, 1)]
    deadline = time.monotonic() + 120
    while not (run / "heartbeat").is_dir() and time.monotonic() < deadline:
        time.sleep(0.1)
    for rank in killed:
        rank.kill()
        rank.communicate()
    left = launch_of(run)
    assert left
    (run / f".ready-0-0-{port}").touch()  # as 0.1.0 left it
    late = start_rank(1, port, recipe)
    time.sleep(3.0)
    ranks = [start_rank(0, port, recipe), late]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    assert launch_of(run) not in {"", left}
    facts = json.loads((run / "students/plain/distill.json").read_text())
    assert facts["steps"] == 4 and (run / "summary.json").is_file()
    assert "seed: 0" in (run / "recipe.resolved.yaml").read_text()


@pytest.mark.slow
def test_train__rank_0_cannot_prepare_and_both_end_with_its_line(tmp_path: Path) -> None:
    recipe = write_recipes(tmp_path, stage_steps=11, steps=4, save_every=1000)
    for image in (tmp_path / "images").rglob("*.png"):
        os.truncate(image, 10)
    port = free_port()
    ranks = [start_rank(rank, port, recipe) for rank in (1, 0)]
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    for output in outputs:
        assert "cannot be used" in output and "30 of 30 images are broken" in output
        assert "Traceback" not in output


@pytest.mark.slow
def test_train__a_node_with_other_code_is_named(tmp_path: Path) -> None:
    recipe = write_recipes(tmp_path, stage_steps=11, steps=4, save_every=1000)
    other, port = tmp_path / "other", free_port()
    for package in ("distill", "students", "teacher", "recipes"):
        shutil.copytree(ROOT / package, other / package)
    changed = other / "distill" / "train" / "loop.py"
    changed.write_text(changed.read_text() + "\n")
    ranks = [start_rank(0, port, recipe), start_rank(1, port, recipe, code=other)]
    outputs = [rank.communicate(timeout=180)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [3, 3], "\n".join(outputs)
    for output in outputs:
        assert "distill is not the same on all ranks: rank 0 on" in output
        assert re.search(r"rank 1 on \S+ with \S+, files [0-9a-f]{12}", output), output
        assert "Fix: Install the same distill on every node." in output
    assert not (tmp_path / "runs" / "tiny" / "teacher").exists()
