"""Which task and which ranks the variables of each scheduler make of a process, and what is refused."""

from pathlib import Path

import pytest

from distill.errors import RecipeError, SetupError
from distill.launch.detect import LaunchedTask, first_host, line_of, ranks_of_task, task_of

COMMAND = "distill train my.yaml"
STEP = {
    "SLURM_JOB_ID": "81",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
PODS = {
    "PET_NODE_RANK": "1",
    "PET_NNODES": "2",
    "PET_MASTER_ADDR": "w-0.w",
    "PET_MASTER_PORT": "29400",
}


def found(environment: dict[str, str]) -> LaunchedTask:
    task = task_of(environment, COMMAND)
    assert task is not None
    return task


def test_srun__a_task_is_a_rank_at_the_first_host() -> None:
    task = found(STEP)
    assert (task.index, task.num_tasks, task.local_index, task.num_local) == (3, 4, 1, 2)
    assert task.address == "gpu007" and 15000 <= task.port < 25000
    assert task.port == found({**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).port
    again = found({**STEP, "SLURM_RESTART_COUNT": "1"})
    assert again.port != task.port  # nothing of the killed launch answers there
    assert ranks_of_task(task, None, 8, COMMAND) == 1
    variables = task.to_variables(1)
    assert variables["RANK"] == "3" and variables["LOCAL_RANK"] == "1"
    assert variables["WORLD_SIZE"] == "4" and variables["LOCAL_WORLD_SIZE"] == "2"


def test_srun__the_only_task_of_a_node_starts_a_rank_for_each_gpu() -> None:
    task = found(
        {**STEP, "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
        | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    )
    assert ranks_of_task(task, None, 8, COMMAND) == 8
    assert ranks_of_task(task, 2, 8, COMMAND) == 2
    variables = task.to_variables(8, 5)
    assert (variables["RANK"], variables["WORLD_SIZE"]) == ("13", "16")
    assert (variables["LOCAL_RANK"], variables["LOCAL_WORLD_SIZE"]) == ("5", "8")
    assert "2 tasks, 1 on this node, each starts 8 ranks" in line_of(task, 8)


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_ID": None, "SLURM_STEP_NUM_TASKS": None, "SLURM_NTASKS": "4"},  # a script
        {"SLURM_STEP_ID": "4294967291"},  # its step
        {"SLURM_STEP_ID": "4294967290"},  # the shell of salloc
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        | {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NODEID": "0"},
        {"RANK": "3", "WORLD_SIZE": "4"},
        {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"},  # torchrun in a step
    ],
)
def test_task_of__none_in_a_script_alone_and_under_torchrun(change: dict[str, str | None]) -> None:
    environment = {k: v for k, v in {**STEP, **change}.items() if v is not None}
    assert task_of(environment, COMMAND) is None
    assert task_of({}, COMMAND) is None


def test_open_mpi__inside_of_the_step_that_starts_its_helpers(tmp_path: Path) -> None:
    task = found({**STEP, **OPEN_MPI})
    assert (task.launcher, task.index, task.num_tasks) == ("Open MPI", 1, 2)
    assert task.address == "127.0.0.1"
    apart = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    assert found({**apart, "SLURM_JOB_NODELIST": "n[3-4]"}).address == "n3"
    (tmp_path / "hosts").write_text("node7\nnode8\n")
    assert found({**apart, "PBS_NODEFILE": str(tmp_path / "hosts")}).address == "node7"
    with pytest.raises(SetupError, match="no variable names the host") as error:
        task_of(apart, COMMAND)
    assert "mpirun -x MASTER_ADDR=gpu01" in error.value.fix
    assert found({**apart, "MASTER_ADDR": "x", "MASTER_PORT": "5"}).port == 5


def test_pmi__with_and_without_the_ranks_of_a_node() -> None:
    of_all = {"PMI_RANK": "1", "PMI_SIZE": "2"}
    task = found({**of_all, "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"})
    assert (task.launcher, task.local_index, task.num_local) == ("MPICH", 1, 2)
    assert found({**of_all, "MASTER_ADDR": "a"}).num_local == 1
    with pytest.raises(RecipeError, match="PMIX_RANK = 1: no variable names how many"):
        task_of({"PMIX_RANK": "1"}, COMMAND)


def test_kubeflow__a_pod_is_a_task_until_torchrun_has_made_ranks_of_it() -> None:
    task = found(PODS)
    assert (task.index, task.num_tasks, task.address, task.port) == (1, 2, "w-0.w", 29400)
    assert task.to_variables(4, 2)["RANK"] == "6"
    pod = {
        "PET_NNODES": "2",
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "m",
        "MASTER_PORT": "9",
    }
    assert (found(pod).index, found(pod).address, found(pod).port) == (1, "m", 9)  # PyTorchJob
    assert task_of({**PODS, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, COMMAND) is None
    assert found({"PET_NNODES": "1"}).to_variables(2, 1)["RANK"] == "1"


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({**STEP, "SLURM_PROCID": "4"}, "SLURM_PROCID = 4, SLURM_STEP_NUM_TASKS = 4"),
        ({**STEP, "SLURM_PROCID": "one"}, "SLURM_PROCID = one"),
        ({**STEP, "SLURM_LOCALID": "2"}, "SLURM_LOCALID = 2"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "0"}, "OMPI_COMM_WORLD_SIZE = 0"),
        ({**PODS, "PET_NODE_RANK": "2"}, "PET_NODE_RANK = 2, PET_NNODES = 2"),
        ({**STEP, "RANK": "0", "WORLD_SIZE": "4"}, "RANK = 0, WORLD_SIZE = 4, SLURM_PROCID = 3"),
    ],
)
def test_task_of__refuses_what_contradicts(environment: dict[str, str], told: str) -> None:
    with pytest.raises(RecipeError, match=told) as error:
        task_of(environment, COMMAND)
    assert COMMAND in error.value.fix and "env -u" in error.value.fix


def test_ranks_of_task__another_number_than_there_are_tasks_on_the_node() -> None:
    assert ranks_of_task(found(STEP), 2, 8, COMMAND) == 1
    with pytest.raises(RecipeError, match="--gpus 8, and SLURM started 2 tasks on this node"):
        ranks_of_task(found(STEP), 8, 8, COMMAND)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[007-012,20],login1", "gpu007"),
        ("r[01-02]n[3,5]-ib", "r01n3-ib"),
        ("a-b.c,d", "a-b.c"),
        ("", ""),
    ],
)
def test_first_host__of_a_list_as_slurm_writes_it(hosts: str, first: str) -> None:
    assert first_host(hosts) == first
