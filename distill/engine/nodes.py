"""Looks at all nodes of a launch before a job: what differs, what is not shared, what is slow, and who it is.

    versions     of Python, distill, torch, DeepSpeed, CUDA and the GPU, and the clock: the same everywhere
    folder       written on one rank and read on others, under its name at once; how long a file takes to be visible
    products     rate of matrix products of each rank against the median
    pairs        every node with every other one, both ways at once, in rounds of disjoint pairs; then one all-reduce

Rounds are as many as nodes, less one: 511 for 512 nodes. A node is slow where most of its pairs are.
"""

import os
import platform
import socket
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from distill.engine.finding import Finding
from distill.runfolder.files import make_folder, remove, replace_text

VERSIONS = ("distill-family", "torch", "deepspeed")
CLOCK_S = 1.0  # between two nodes
VISIBLE_S = 60.0  # for a file of another node
SLOW = 0.6  # of the median
PRODUCTS = {"cpu": (1024, torch.float32), "cuda": (8192, torch.bfloat16)}
SENT_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
TIMES = 5  # the best counts


@runtime_checkable
class Together(Protocol):
    """This rank among others of the default group, whose backend is gloo."""

    @property
    def rank(self) -> int:
        """Which."""

    @property
    def num_ranks(self) -> int:
        """Of how many."""

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks by rank. Collective."""


def examine_nodes(folder: Path, device: torch.device, ranks: Together) -> list[dict[str, Any]]:
    """Every finding about the nodes of a launch, the same on all ranks. Collective over the default group.

    ``folder``: where runs will be; what is written there is removed again.
    """
    hosts = ranks.gathered(socket.gethostname())
    named = [f"{host} (rank {rank})" for rank, host in enumerate(hosts)]
    findings = [
        *compare(hosts, ranks.gathered(_facts(device))),
        _clocks(named, ranks),
        _folder(folder, named, ranks),
        slow_ones("matrix products", "TFLOP/s", named, ranks.gathered(_product_rate(device))),
    ]
    if ranks.num_ranks > 1:
        findings += _network(device, hosts, ranks)
    return [finding.to_json() for finding in findings]


def compare(hosts: Sequence[str], facts: Sequence[Mapping[str, str]]) -> list[Finding]:
    """A finding for every fact: what all ranks have, or who has something else than most."""
    findings = []
    for name in facts[0]:
        values = [each.get(name, "") for each in facts]
        usual, _ = Counter(values).most_common(1)[0]
        others = {h: v for h, v in zip(hosts, values, strict=True) if v != usual}
        shown = ", ".join(f"{value} on {host}" for host, value in others.items())
        fix = f"Make {', '.join(others)} as the others are." if others else ""
        found = f"{usual} on most, {shown}" if others else f"{usual} on all {len(hosts)} ranks"
        findings.append(Finding(name, found, not others, fix))
    return findings


def slow_ones(
    what: str, unit: str, names: Sequence[str], rates: Sequence[float], fix: str = ""
) -> Finding:
    """Whose rate is below ``SLOW`` of the median."""
    median = statistics.median(rates)
    slow = {n: r for n, r in zip(names, rates, strict=True) if r < SLOW * median}
    shown = ", ".join(f"{rate:.3g} on {name}" for name, rate in slow.items())
    found = f"median {median:.3g} {unit}, least {min(rates):.3g}" + (f": {shown}" if slow else "")
    advice = fix or "Look for other work, heat or a lower clock there; leave it out meanwhile."
    return Finding(what, found, not slow, advice if slow else "")


def rounds_of(count: int) -> list[list[tuple[int, int]]]:
    """Every pair of ``count`` nodes once, in rounds in which no node is in two: the circle method."""
    seats: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        facing = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(a, b) for a, b in facing if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def _facts(device: torch.device) -> dict[str, str]:
    facts = {"Python": platform.python_version()}
    for name in VERSIONS:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    if device.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(device)
        facts["CUDA"] = str(torch.version.cuda)
    return facts


def _clocks(named: Sequence[str], ranks: Together) -> Finding:
    """Clocks read right after all ranks met."""
    ranks.gathered(None)
    times = ranks.gathered(time.time())
    off = {h: t - times[0] for h, t in zip(named, times, strict=True)}
    host, largest = max(off.items(), key=lambda each: abs(each[1]))
    is_ok = abs(largest) < CLOCK_S
    found = f"within {abs(largest):.2f} s" + ("" if is_ok else f", {host} is off")
    return Finding("clocks", found, is_ok, "" if is_ok else f"Set the clock of {host} by NTP.")


def _folder(folder: Path, named: Sequence[str], ranks: Together) -> Finding:
    """Each rank writes a file beside its name and renames it, then waits for that of the next rank."""
    token = ranks.gathered(f".nodes-{os.getpid()}-{time.time_ns()}")[0]
    mine, error, waited_s = folder / f"{token}-{ranks.rank}", "", 0.0
    try:
        make_folder(folder)
        replace_text(mine, str(ranks.rank))
    except OSError as raised:
        error = f"cannot be written on {named[ranks.rank]} ({raised.strerror})"
    ranks.gathered(None)
    other = (ranks.rank + 1) % ranks.num_ranks
    if not error:
        waited_s = _wait_for(folder / f"{token}-{other}", str(other))
        if waited_s > VISIBLE_S:
            error = f"{named[ranks.rank]} does not see within {VISIBLE_S:.0f} s what {named[other]} wrote"
    results = ranks.gathered((error, waited_s))
    with suppress(OSError):
        remove(mine)
    errors = [each for each, _ in results if each]
    if errors:
        fix = "Give --folder on a disk that all nodes share, and check its mount there."
        return Finding(f"folder {folder}", "; ".join(dict.fromkeys(errors)), is_ok=False, fix=fix)
    found = f"shared, a file is visible after {max(waited_s for _, waited_s in results):.2f} s"
    return Finding(f"folder {folder}", found, is_ok=True)


def _wait_for(path: Path, text: str) -> float:
    began_s = time.monotonic()
    while (waited_s := time.monotonic() - began_s) <= VISIBLE_S:
        with suppress(OSError):
            if path.read_text() == text:
                return waited_s
        time.sleep(0.05)
    return waited_s


def _product_rate(device: torch.device) -> float:
    """TFLOP/s of the best of some square products."""
    side, dtype = PRODUCTS[device.type]
    one = torch.randn(side, side, device=device, dtype=dtype)
    best_s = _best_s(lambda: one @ one, device)
    return 2 * side**3 / best_s / 1e12


def _best_s(work: Any, device: torch.device) -> float:
    taken = []
    for _ in range(TIMES + 1):  # the first one warms up
        began_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began_s)
    return min(taken[1:])


def _network(device: torch.device, hosts: Sequence[str], ranks: Together) -> list[Finding]:
    """Each rank of a node sends to one of another node and receives from it; ranks of one node pair where there is but one."""
    group = dist.new_group(backend="nccl") if device.type == "cuda" else None
    nodes = [
        [rank for rank, host in enumerate(hosts) if host == name] for name in dict.fromkeys(hosts)
    ]
    if len(nodes) == 1:
        nodes = [[rank] for rank in nodes[0]]
    names = [
        hosts[node[0]] if len(node) > 1 else f"{hosts[node[0]]} (rank {node[0]})" for node in nodes
    ]
    out = torch.ones(SENT_BYTES[device.type], dtype=torch.uint8, device=device)
    rates: dict[int, list[float]] = {node: [] for node in range(len(nodes))}
    for pairs in rounds_of(len(nodes)):
        partner = _partner(ranks.rank, nodes, pairs)
        taken_s = (
            0.0 if partner is None else _best_s(lambda at=partner: _swap(out, at, group), device)
        )
        slowest = ranks.gathered(taken_s)
        for one, two in pairs:
            pair_s = max(slowest[rank] for rank in (*nodes[one], *nodes[two]))
            for node in (one, two):
                rates[node].append(out.nbytes / pair_s / 1e9)
    of_nodes = [statistics.median(rates[node]) for node in range(len(nodes))]
    fix = "Check the cables, the interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME) and other traffic there."
    reduced_s = _best_s(lambda: dist.all_reduce(out, group=group), device)
    bandwidth = out.nbytes / max(ranks.gathered(reduced_s)) / 1e9
    backend = "NCCL" if group is not None else "gloo"
    return [
        slow_ones(f"pairs by {backend}", "GB/s of a rank, each way", names, of_nodes, fix),
        Finding(f"all-reduce by {backend}", f"{bandwidth:.3g} GB/s over all ranks", is_ok=True),
    ]


def _partner(
    rank: int, nodes: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]]
) -> int | None:
    """The rank of the other node in a pair that has the same number there; None for a rank without one."""
    for one, two in (*pairs, *((b, a) for a, b in pairs)):
        if rank in nodes[one]:
            local_rank = nodes[one].index(rank)
            return nodes[two][local_rank] if local_rank < len(nodes[two]) else None
    return None


def _swap(out: Tensor, other: int, group: dist.ProcessGroup | None) -> None:
    arrived = torch.empty_like(out)
    sends = [
        dist.P2POp(dist.isend, out, other, group),
        dist.P2POp(dist.irecv, arrived, other, group),
    ]
    for work in dist.batch_isend_irecv(sends):
        work.wait()
