"""Where the number of ranks per node comes from, and that all nodes agree on it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, not listed

from distill.engine.node import ranks_on_node, require_node_size
from distill.errors import PlanError, SetupError
from distill.job.prepare import JobRequest
from distill.launch import local

OPTIONS = local.Options(processes=3, out=Path("runs"), name=None, fresh=False, plain=True)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_STEP_TASKS_PER_NODE": "1"}, 4),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "6"}, 6),
        ({"MPI_LOCALNRANKS": "2"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4),8"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "3"}, 3),
        ({"SLURM_TASKS_PER_NODE": "1"}, None),  # of the allocation, not of these ranks
        ({}, None),
    ],
)
def test_ranks_on_node__as_each_launcher_says_it(
    environment: dict[str, str], expected: int | None
) -> None:
    assert ranks_on_node(environment) == expected


def test_ranks_on_node__refuses_what_is_no_number_and_nodes_that_differ() -> None:
    with pytest.raises(SetupError, match=r"LOCAL_WORLD_SIZE = 'four': must be a number of ranks"):
        ranks_on_node({"LOCAL_WORLD_SIZE": "four"})
    with pytest.raises(SetupError, match=r"LOCAL_WORLD_SIZE = '9{59}\.\.\.: must be"):
        ranks_on_node({"LOCAL_WORLD_SIZE": "9" * 5000})
    with pytest.raises(SetupError, match=r"TASKS_PER_NODE = '8\(x2\),0': must be a number"):
        ranks_on_node({"SLURM_STEP_TASKS_PER_NODE": "8(x2),0"})
    with pytest.raises(PlanError, match=r"TASKS_PER_NODE = 8\(x2\),4: .* one number of ranks"):
        ranks_on_node({"SLURM_STEP_TASKS_PER_NODE": "8(x2),4"})


def test_require_node_size__names_both_numbers_and_the_way_out() -> None:
    require_node_size({"LOCAL_WORLD_SIZE": "4"}, 4)
    require_node_size({"LOCAL_WORLD_SIZE": "4"}, None)  # the recipe has the key
    require_node_size({}, 4)
    with pytest.raises(PlanError, match=r"^4 ranks on .*, 8 on the node of rank 0: ") as error:
        require_node_size({"LOCAL_WORLD_SIZE": "4"}, 8)
    assert "engine.ranks_per_node" in str(error.value.fix)


@pytest.mark.parametrize(
    ("environment", "overrides", "expected"),
    [
        ({}, [], 3),  # local: all ranks are on this machine
        ({}, ["engine.ranks_per_node=2"], None),
        ({"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4"}, [], 4),
        ({"RANK": "0", "WORLD_SIZE": "16"}, [], None),
        ({"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4"}, ["engine.ranks_per_node=2"], None),
    ],
)  # fmt: skip
def test_run__puts_what_the_launcher_says_into_the_request_for_all_ranks(
    environment: dict[str, str],
    overrides: list[str],
    expected: int | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr("distill.launch.rendezvous.open_store", lambda _: HashStore())
    monkeypatch.setattr("distill.launch.rendezvous.LEAVE_S", 0.0)
    requests: list[JobRequest] = []

    def note(request: JobRequest, **_: Any) -> None:
        requests.append(request)
        raise StopIteration

    monkeypatch.setattr("distill.job.prepare.prepare", note)
    monkeypatch.setattr("distill.engine.forkserver.choose_start_method", lambda _: "spawn")
    with pytest.raises(StopIteration):
        local.run("quickstart", overrides, replace(OPTIONS, out=tmp_path))
    assert requests[0].ranks_per_node == expected
