"""Ranks of one machine: their exit codes, output, results and store, and what their sockets listen on."""

import json
import os
import stat
import subprocess
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distill.engine import loopback
from distill.engine.join import join_ranks
from distill.engine.local_ranks import OWNER, PREFIX, LocalRanks, remove_abandoned
from distill.engine.loopback import (
    VARIABLES,
    connect_to_itself,
    loopback_interface,
    require_loopback,
    stay_on_loopback,
)
from distill.errors import SetupError
from distill.runfolder.process_identity import identity_of, this_process
from tests.support.jobs import is_running
from tests.support.sockets import is_loopback, listening_addresses
from tests.support.spawn import context_for

TIMEOUT = timedelta(seconds=60)


def add_up(amount: int, store: str) -> tuple[float, list[str], int]:
    """The sum over the ranks of a number of each, what the rank listens on meanwhile, and who may enter the store's folder."""
    join_ranks("cpu", TIMEOUT, store)
    total = torch.tensor(float(amount + dist.get_rank()))
    dist.all_reduce(total)
    found = listening_addresses(os.getpid())
    mode = stat.S_IMODE(Path(store).parent.stat().st_mode)
    dist.barrier()
    dist.destroy_process_group()
    return float(total), found, mode


def end_in_its_way(store: str) -> None:
    """Rank 0 ends with 3 after a line on each stream, rank 1 by a signal, rank 2 not at all."""
    rank = int(os.environ["RANK"])
    sys.stdout.write("for standard output\n")
    sys.stderr.write("for standard error\n")
    sys.stdout.flush()
    if rank == 0:
        os._exit(3)
    if rank == 1:
        os.kill(os.getpid(), 9)
    time.sleep(600)


@pytest.fixture(autouse=True)
def fork_server() -> None:
    """The server of the whole suite, should it start here."""
    context_for("cpu")


def wait_for_end(ranks: LocalRanks, num_ended: int, wait_s: float = 100.0) -> None:
    deadline = time.monotonic() + wait_s
    while len(ranks.exit_codes) < num_ended:
        assert time.monotonic() < deadline, ranks.exit_codes
        ranks.wait(0.5)


def test_local_ranks__meet_by_a_private_file_and_listen_on_loopback_only() -> None:
    with LocalRanks("forkserver", 2) as ranks:
        ranks.start(add_up, 10)
        wait_for_end(ranks, 2)
        ranks.wait(0.0)
        assert ranks.exit_codes == {0: 0, 1: 0}
        folder = Path(ranks._folder)
    assert not folder.exists()
    for rank in range(2):
        total, addresses, mode = ranks.results[rank]
        assert total == 21.0 and mode == 0o700
        assert addresses and all(map(is_loopback, addresses))


def test_local_ranks__give_exit_codes_and_output_and_leave_nothing(tmp_path: Path) -> None:
    with LocalRanks("forkserver", 3, tmp_path) as ranks:
        ranks.start(end_in_its_way)
        wait_for_end(ranks, 2)
        assert ranks.exit_codes == {0: 3, 1: -9} and ranks.are_running
        pids = [process.pid for process in ranks.processes if process.pid is not None]
    assert not any(map(is_running, pids))
    assert ranks.results == {}
    for rank in range(2):
        folder = tmp_path / str(rank)
        assert (folder / "stdout.log").read_text() == "for standard output\n"
        assert (folder / "stderr.log").read_text() == "for standard error\n"


def test_local_ranks__never_share_a_folder() -> None:
    with LocalRanks("forkserver", 1) as one, LocalRanks("forkserver", 1) as other:
        assert one._folder != other._folder
        assert [path.name for path in Path(one._folder).iterdir()] == [OWNER]


def test_remove_abandoned__takes_what_a_killed_launcher_left_and_nothing_else(
    tmp_path: Path,
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owners = {
        "left": identity_of(ended.pid),
        "at-work": this_process(),
        "elsewhere": replace(identity_of(ended.pid), host="another"),
    }
    ended.communicate(b"\n")
    for name, owner in owners.items():
        (tmp_path / f"{PREFIX}{name}").mkdir()
        (tmp_path / f"{PREFIX}{name}" / OWNER).write_text(json.dumps(asdict(owner)))
    (tmp_path / f"{PREFIX}users").mkdir()
    (tmp_path / f"{PREFIX}damaged").mkdir()
    (tmp_path / f"{PREFIX}damaged" / OWNER).write_text("{")
    remove_abandoned(tmp_path)
    names = {path.name.removeprefix(PREFIX) for path in tmp_path.iterdir()}
    assert names == {"at-work", "elsewhere", "users", "damaged"}


def test_stay_on_loopback__leaves_what_the_user_has_set() -> None:
    environment = {"GLOO_SOCKET_IFNAME": "eth7"}
    stay_on_loopback(environment)
    name = loopback_interface()
    assert environment == {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": f"={name}"}


def test_loopback_interface__says_that_none_is_up(tmp_path: Path) -> None:
    (tmp_path / "lo").mkdir()
    (tmp_path / "lo" / "flags").write_text("0x8\n")
    with pytest.raises(SetupError, match="no loopback interface is up") as caught:
        loopback_interface(tmp_path)
    assert "ip link set lo up" in caught.value.fix
    (tmp_path / "lo" / "flags").write_text("0x9\n")
    assert loopback_interface(tmp_path) == "lo"


def test_require_loopback__tries_it_unless_the_user_names_interfaces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_loopback({})
    assert connect_to_itself("127.0.0.1") == ""
    nowhere = "192.0.2.1"  # of no machine
    assert "assign" in connect_to_itself(nowhere)
    monkeypatch.setattr(loopback, "ADDRESSES", (nowhere,))
    with pytest.raises(SetupError, match=r"192\.0\.2\.1 cannot be reached \(.*assign"):
        require_loopback({"GLOO_SOCKET_IFNAME": "eth7"})
    require_loopback(dict.fromkeys(VARIABLES, "eth7"))
