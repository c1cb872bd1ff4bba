"""Copies in the memory of nodes: complete or absent, of this run alone, and enough to go on from when a node and the disk are lost."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distill.engine import held_copies, peer_copies
from distill.engine.held_copies import Nodes, Target, find_copies, open_memory
from distill.engine.node_memory import VARIABLE
from distill.engine.peer_copies import PeerCopies, copy_distance, map_file
from distill.runfolder.manifest import find_latest
from distill.runfolder.saver import CheckpointPolicy
from distill.runfolder.tensor_file import read_tensors
from tests.support.jobs import ENVIRONMENT, RUN, differing, status_of, wait_for_step, write_recipes
from tests.support.spawn import on_ranks

PHASE, HASH = "family", "hash"


def world() -> dist.ProcessGroup:
    """The group of all ranks."""
    group = dist.group.WORLD
    assert group is not None, "no ranks"
    return group


# One copy, by ranks without a job


def state_of(name: str, step: int) -> dict[str, Tensor]:
    """What a network's state is after some steps."""
    size = 1000 if name == "large" else 11
    weight = torch.arange(size, dtype=torch.float32) + step
    return {"weight/a": weight, "ema/a": weight / 2, "step": torch.tensor([float(step)])}


def phase_at(step: int, networks: Mapping[str, int], rank: int) -> Any:
    """A phase whose networks, by the rank that writes each, have the state of a step."""
    placements = [SimpleNamespace(name=name, first_rank=at) for name, at in networks.items()]

    def trainer_of(placement: Any) -> Any:
        def state(*, collect: bool, into: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
            state = state_of(placement.name, step)
            if into is not None:
                state = {name: into[name].copy_(tensor) for name, tensor in state.items()}
            return state if collect else {"step": state["step"]}  # as the state of some rank

        return SimpleNamespace(name=placement.name, placement=placement, state=state)

    return SimpleNamespace(
        name=PHASE,
        world_rank=rank,
        plan=SimpleNamespace(placements=placements, num_ranks=dist.get_world_size()),
        trainers=[trainer_of(placement) for placement in placements],
        teacher=SimpleNamespace(anchor_state=lambda: {"a": torch.full((3,), float(step))}),
    )


def memory_of(folder: Path, rank: int, ranks_per_node: int) -> Path:
    """The memory of a rank's node, made if it is not there."""
    path = folder / f"memory-{rank // ranks_per_node}"
    path.mkdir(exist_ok=True)
    return path


def opened(folder: Path, ranks_per_node: int, run_hash: str = HASH) -> tuple[Nodes, list[str]]:
    """The nodes of a start, after the newest copy was taken over, and what was reported."""
    run, lines = folder / "run", list[str]()
    os.environ[VARIABLE] = str(memory_of(folder, dist.get_rank(), ranks_per_node))
    target = Target(run / "checkpoints", run_hash, None, "name: tiny\n", 3, [PHASE])
    return open_memory(run, target, world(), lines.append), lines


def copies_of(folder: Path, nodes: Nodes, networks: Mapping[str, int]) -> PeerCopies:
    """Prepared copies of the networks of a rank."""
    policy = CheckpointPolicy(folder / "run/checkpoints", HASH, {}, "name: tiny\n", 3, None)
    copies = PeerCopies(policy, nodes, world(), 5)
    written = [name for name, rank in networks.items() if rank == nodes.rank]
    copies.prepare(PHASE, {f"{name}.safetensors": state_of(name, 0) for name in written})
    return copies


def copy_steps(
    folder: Path, ranks_per_node: int, networks: dict[str, int], steps: list[int]
) -> Any:
    """Copies some steps; the last cost, and the files in this node's memory."""
    nodes, _ = opened(folder, ranks_per_node)
    copies, rank = copies_of(folder, nodes, networks), dist.get_rank()
    for step in steps:
        copies.copy(phase_at(step, networks, rank), step)
    copies.wait()
    files = sorted(str(each.relative_to(nodes.folder)) for each in nodes.folder.rglob("*.*"))
    return copies.cost, files


def resume(folder: Path, ranks_per_node: int, run_hash: str = HASH) -> tuple[int | None, list[str]]:
    nodes, lines = opened(folder, ranks_per_node, run_hash)
    return nodes.newest_slot, lines


def compare_checkpoint(folder: Path, networks: Mapping[str, int], step: int) -> None:
    """The run's newest checkpoint is the state of a step."""
    found = find_latest(folder / "run/checkpoints", HASH, lambda _: None)
    assert found is not None and found[1].step == step
    for name in networks:
        tensors, expected = read_tensors(found[0] / f"{name}.safetensors"), state_of(name, step)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    anchor = read_tensors(found[0] / "gram-anchor.safetensors")
    assert torch.equal(anchor["a"], torch.full((3,), float(step)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path


NETWORKS = {"small": 0, "large": 1}


def test_copies__every_file_lies_in_two_nodes_and_either_is_enough(folder: Path) -> None:
    (cost, files), (_, others) = on_ranks(2, copy_steps, folder, 1, NETWORKS, [5, 10, 15])
    names = ["gram-anchor.safetensors", "manifest.json", "small.safetensors"]
    mine = [f"rank0-{slot}/{name}" for slot in (0, 1) for name in names]
    theirs = [f"rank1-{slot}/{name}" for slot in (0, 1) for name in ("large.safetensors", names[1])]
    assert files == others == sorted(mine + theirs)
    assert (cost.phase, cost.step) == (PHASE, 15) and cost.bytes > 8_000
    noted = json.loads((folder / "run/copies.json").read_text())["last"]
    assert noted["bytes"] == cost.bytes and 0.0 < noted["share"] <= 1.0
    shutil.rmtree(folder / "memory-0")
    first, _ = on_ranks(2, resume, folder, 1)
    host = socket.gethostname()
    assert first == (
        0,
        [f"resumes from family-0000015 (family step 15) (copy in memory of {host})"],
    )
    compare_checkpoint(folder, NETWORKS, 15)
    again, _ = on_ranks(2, resume, folder, 1)
    assert again == (0, [])  # the checkpoint is as new


def lose_parts(folder: Path) -> list[Any]:
    """What is gone on from when parts of copies are lost, one after another."""
    rank, found = dist.get_rank(), []

    def look(run_hash: str = HASH) -> None:
        dist.barrier()
        os.environ[VARIABLE] = str(memory_of(folder, rank, 1))
        nodes = held_copies.find_nodes(folder / "run", world())
        target = Target(folder / "run/checkpoints", run_hash, None, "", 3, [PHASE])
        copies = find_copies(nodes, target, world())
        found.append(sorted((copy.manifest.step, copy.slot) for copy in copies))

    copy_steps(folder, 1, NETWORKS, [5, 10])
    look()
    look("another recipe")
    flip(folder / "memory-0", "rank1-1/large.safetensors", rank)  # the other node has it
    look()
    flip(folder / "memory-1", "rank1-1/large.safetensors", rank)
    look()
    for memory in ("memory-0", "memory-1"):  # as if it had been killed while it wrote this one
        path = only(folder / memory, "rank0-0/manifest.json")
        dist.barrier()
        if rank == 0:
            path.unlink()
    look()
    copy_steps(folder, 1, NETWORKS, [15])
    dist.barrier()
    if rank == 0:
        (folder / "run/copies.json").unlink()  # the run was started over
    look()
    left = [str(each) for each in memory_of(folder, rank, 1).rglob("*.safetensors")]
    return [*found, left]


def only(memory: Path, name: str) -> Path:
    """The one file of that name in a node's memory."""
    (path,) = memory.rglob(name)
    return path


def flip(memory: Path, name: str, rank: int) -> None:
    """Changes the last byte of a file, by rank 0."""
    if rank == 0:
        path = only(memory, name)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)


def test_copies__count_while_every_file_is_sound_somewhere(folder: Path) -> None:
    for found in on_ranks(2, lose_parts, folder):
        assert found == [[(5, 0), (10, 1)], [], [(5, 0), (10, 1)], [(5, 0)], [], [], []]


def copy_on_one_node(folder: Path) -> Any:
    nodes, _ = opened(folder, 4)
    sent: list[Any] = []
    dist.isend, isend = lambda *parts, **_: sent.append(parts), dist.isend
    try:
        networks = {"small": 0, "large": 1, "last": 0}
        copies = copies_of(folder, nodes, networks)
        copies.copy(phase_at(5, networks, nodes.rank), 5)
        copies.remove(is_saved=False)
        copies.wait()
        files = len(list(nodes.folder.rglob("*.safetensors")))
        dist.barrier()
        copies.remove(is_saved=nodes.rank == 0)  # rank 0 knows
        dist.barrier()
        return (
            nodes.holder_of(nodes.rank),
            len(sent),
            files,
            list(nodes.folder.parents[1].iterdir()),
        )
    finally:
        dist.isend = isend


def test_copies__of_one_node_are_not_sent_and_go_when_the_state_is_on_disk(folder: Path) -> None:
    assert on_ranks(2, copy_on_one_node, folder) == [(None, 0, 8, [])] * 2


def copy_with_faults(folder: Path) -> Any:
    """Copies while something is wrong on rank 1; whether another one is due after each."""
    nodes, _ = opened(folder, 1)
    copies, due = copies_of(folder, nodes, NETWORKS), []
    map_file, facts_of = peer_copies.map_file, peer_copies._facts

    def full(path: Path, size: int) -> Tensor:
        raise OSError(28, "No space left on device")

    def other(content: Tensor) -> dict[str, Any]:
        return {**facts_of(content), "sha256": "0" * 64}

    def copy(step: int) -> None:
        copies.copy(phase_at(step, NETWORKS, nodes.rank), step)
        copies.wait()
        due.append((copies.is_due(step + 5, 1000), copies.cost and copies.cost.step))

    copy(5)
    if nodes.rank == 1:
        peer_copies._facts = other
    copy(10)
    peer_copies._facts = facts_of
    copy(15)
    if nodes.rank == 1:
        peer_copies.map_file = full
    copies = copies_of(folder, nodes, NETWORKS)  # maps its files anew
    copy(20)
    copies.copy(phase_at(25, NETWORKS, nodes.rank), 25)
    peer_copies.map_file = map_file
    return due


def test_copies__what_fails_is_one_line_and_no_end(folder: Path) -> None:
    due, others = on_ranks(2, copy_with_faults, folder)
    assert due == others == [(True, 5), (True, 5), (True, 15), (False, None)]
    events = [json.loads(line) for line in (folder / "run/events.jsonl").read_text().splitlines()]
    damaged, full = (event["text"] for event in events)
    assert [event["kind"] for event in events] == ["not copied"] * 2
    host = socket.gethostname()
    assert damaged == (
        f"no copy in memory: what rank 1 sent to rank 0 on {host} is damaged; "
        "the next one follows, checkpoints go on"
    )
    assert re.fullmatch(
        f"no copy in memory: rank 1 on {host} has no room for [0-9,]+ bytes in {folder}/memory-1, "
        r"where [0-9,]+ are free \(No space left on device\); no more until the next start, checkpoints go on",
        full,
    )


def end_without_copies(folder: Path) -> Any:
    """What a node holds of this run and of another, after the end of a start that makes no copies."""
    nodes, _ = opened(folder, 1)
    other = folder / "another"
    if nodes.rank == 0:
        other.mkdir()
    dist.barrier()
    others = held_copies.find_nodes(other, world())
    copy_steps(folder, 1, NETWORKS, [5])
    counts = []
    for is_saved in (False, True):
        held_copies.remove_where_saved(
            folder / "run", world(), is_saved=is_saved and nodes.rank == 0
        )
        dist.barrier()
        counts.append((any(nodes.folder.rglob("*.safetensors")), nodes.folder.is_dir()))
    return counts, others.folder.is_dir()


def test_remove_where_saved__frees_what_an_earlier_start_left_of_this_run(folder: Path) -> None:
    for counts, has_others in on_ranks(2, end_without_copies, folder):
        assert counts == [(True, True), (False, False)] and has_others


@pytest.mark.parametrize("every", [1, 2, 5, 50])
def test_copy_distance__loses_at_most_so_many_steps(every: int) -> None:
    for lag in range(3 * every):
        distance = copy_distance(every, lag)
        assert every / 2 <= distance <= every
        if lag <= every // 2:  # lost are the steps before a copy is complete
            assert distance + lag == every
    assert copy_distance(every, 0) == every


def due_steps(folder: Path) -> list[int]:
    """Steps that are copied when a copy takes as long as two of them on one rank, and no time on the other."""
    nodes, _ = opened(folder, 1)
    clock = SimpleNamespace(now=0.0)
    peer_copies.time = SimpleNamespace(monotonic=lambda: clock.now)  # type: ignore[assignment]
    copies, rank = copies_of(folder, nodes, NETWORKS), dist.get_rank()
    facts_of, found = peer_copies._facts, list[int]()

    def slow(content: Tensor) -> dict[str, Any]:
        clock.now += 1.0 if rank == 1 else 0.0
        return facts_of(content)

    peer_copies._facts = slow
    for step in range(1, 31):
        clock.now = float(max(step, clock.now))
        if copies.is_due(step, 30):
            found.append(step)
            copies.copy(phase_at(step, NETWORKS, rank), step)
            copies.wait()
    return found


def test_is_due__copies_are_nearer_by_the_steps_that_one_takes_on_any_rank(folder: Path) -> None:
    first, second = on_ranks(2, due_steps, folder)
    assert first == second
    assert first[0] == 3 and first[-1] == 30, "half the distance, as long as nothing is known"
    assert {3, 4} >= {b - a for a, b in pairwise(first[1:-1])}


@pytest.mark.parametrize(
    ("of_rank", "holders"),
    [
        ((0, 0, 0), [None] * 3),
        ((0, 1), [1, 0]),
        ((0, 0, 1, 1, 2, 2), [2, 3, 4, 5, 0, 1]),
        ((0, 1, 0, 1), [1, 0, 3, 2]),
        ((0, 0, 0, 1), [3, 3, 3, 0]),
    ],
)
def test_holder_of__is_on_the_next_node(of_rank: tuple[int, ...], holders: list[Any]) -> None:
    nodes = Nodes(0, ("host",) * len(of_rank), of_rank, Path())
    assert [nodes.holder_of(rank) for rank in range(len(of_rank))] == holders


def test_make_private__refuses_what_others_may_enter(tmp_path: Path) -> None:
    assert not held_copies._make_private(tmp_path / "one", "run")
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o700
    (tmp_path / "two").mkdir(mode=0o755)
    assert "others may enter it" in held_copies._make_private(tmp_path / "two", "run")
    (tmp_path / "three").symlink_to(tmp_path / "one")
    assert "others may enter it" in held_copies._make_private(tmp_path / "three", "run")
    assert "cannot be made" in held_copies._make_private(tmp_path / "no/four", "run")


def test_map_file__another_size_is_another_file(tmp_path: Path) -> None:
    before = map_file(tmp_path / "a", 10)
    before[:] = 7
    assert map_file(tmp_path / "a", 10).tolist() == [7] * 10
    after = map_file(tmp_path / "a", 5)
    assert before.tolist() == [7] * 10 and after.tolist() == [0] * 5


# A job on two nodes


def start_node(recipe: Path, rank: int, port: int) -> "subprocess.Popen[str]":
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        VARIABLE: str(memory_of(recipe.parent, rank, 1)),
    }
    train = [sys.executable, "-m", "distill", "train", recipe, "--out", recipe.parent]
    cores = sorted(os.sched_getaffinity(0))  # one for each node: threads that share one only spin
    return subprocess.Popen(
        ["taskset", "-c", str(cores[rank % len(cores)]), *map(str, train), "--name", RUN],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**ENVIRONMENT, **variables},
        start_new_session=True,
    )


def start_nodes(recipe: Path) -> "list[subprocess.Popen[str]]":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start_node(recipe, rank, port) for rank in range(2)]


@pytest.fixture
def processes() -> Iterator["list[subprocess.Popen[str]]"]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def job_in(folder: Path) -> Path:
    """A job that copies every 5 steps."""
    folder.mkdir()
    recipe = write_recipes(folder, stage_steps=10, steps=30, save_every=1000)
    for path in (recipe, folder / "teacher.yaml"):
        peer = "checkpoint: {every: 10, peer: true, peer_every: 5}"
        text = path.read_text().replace("checkpoint: {every: 1000}", peer)
        path.write_text(text.replace("precision: fp32}", "precision: fp32, log_every: 1}"))
    return recipe


def last_copy(run: Path) -> int:
    """The step of the family at which the last copy was complete."""
    last = json.loads((run / "copies.json").read_text()).get("last", {})
    return int(last["step"]) if last.get("phase") == "family" else 0


@pytest.mark.slow
def test_job__goes_on_from_a_neighbour_when_a_node_and_the_disk_are_lost(
    tmp_path: Path, processes: "list[subprocess.Popen[str]]"
) -> None:
    untouched, lost = job_in(tmp_path / "untouched"), job_in(tmp_path / "lost")
    processes += start_nodes(untouched)
    for process in processes:
        assert process.wait(timeout=300) == 0, process.communicate()[0]
    assert not any(
        (tmp_path / "untouched" / f"memory-{node}").iterdir() for node in (0, 1)
    ) or not [*(tmp_path / "untouched").glob("memory-*/*")]
    run = lost.parent / RUN
    started = start_nodes(lost)
    processes += started
    wait_for_step(started[0], run, "family", 11)
    while (copied := last_copy(run)) < 15:
        assert started[0].poll() is None, started[0].communicate()[0]
        time.sleep(0.02)
    reached = status_of(run)["step"]
    started[1].kill()  # node 1: its rank, and what its memory holds
    started[0].wait(timeout=120)
    shutil.rmtree(lost.parent / "memory-1")
    for path in (run / "checkpoints").glob("*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-4] + b"lost")
    again = start_nodes(lost)
    processes += again
    words, _ = again[0].communicate(timeout=300)
    assert again[0].returncode == 0, words
    line = re.search(
        r"resumes from family-\d+ \(family step (\d+)\) \(copy in memory of (\S+)\)", words
    )
    assert line is not None, words
    assert int(line[1]) >= copied and line[2] == socket.gethostname(), words
    assert reached - int(line[1]) <= 2 * 5, "5 steps; more where a copy took longer than one before"
    assert again[1].wait(timeout=60) == 0
    assert differing(untouched.parent / RUN, run) == []
