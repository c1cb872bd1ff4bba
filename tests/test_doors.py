"""Nobody from outside reaches a job of one machine: what it listens on, and what comes of talking to that."""

import os
import signal
import socket
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support import jobs
from tests.support.sockets import is_loopback, listening_sockets

NOBODY = 65534
LINES = (b"\0" * 64, b"GET / HTTP/1.0\r\n\r\n", bytes(range(256)) * 16)


def attack(sockets: set[tuple[str, int]]) -> None:
    """Connects to each socket and sends what does not belong there, as another user where this one may change that."""
    "localhost".encode("idna")  # imports what connecting needs, which the other user may not read
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, "nothing could be sent"
        return
    try:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        for where in sockets:
            for line in LINES:
                with suppress(OSError), socket.create_connection(where, timeout=2) as connection:
                    connection.sendall(line)
                    connection.settimeout(0.05)
                    connection.recv(4096)
        os._exit(0)
    except BaseException:
        os._exit(1)


def sockets_of(leader: int) -> set[tuple[str, int]]:
    """What all processes of a job listen on: launcher, fork server, ranks, and what they started."""
    found = set()
    for pid in jobs.session_of(leader):
        with suppress(FileNotFoundError):  # ended meanwhile
            found |= set(listening_sockets(pid))
    return found


@pytest.mark.slow
def test_local_job__listens_on_loopback_only_and_garbage_changes_nothing(tmp_path: Path) -> None:
    recipe = jobs.write_recipes(tmp_path, stage_steps=60, steps=20, save_every=1000)
    recipe = recipe.with_name("teacher.yaml")
    weights = []
    for name in ("calm", "attacked"):
        process = jobs.start(recipe, tmp_path / name, "engine.log_every=1")
        run = tmp_path / name / "tiny-teacher"
        try:
            jobs.wait_for_step(process, run, "base", 2)
            assert len(jobs.ranks_of(process.pid)) == 2
            found = sockets_of(process.pid)
            assert found and all(is_loopback(address) for address, _ in found), found
            if name == "attacked":
                attack(found)
                assert process.poll() is None, "it ended too early to say anything"
            output, _ = process.communicate(timeout=240)
        finally:
            if jobs.session_of(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0, output
        weights.append(load_file(run / "teacher" / "model.safetensors"))
    calm, attacked = weights
    assert calm.keys() == attacked.keys()
    assert all(calm[key].equal(attacked[key]) for key in calm)
