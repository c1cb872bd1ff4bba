"""Which task of a scheduler this process is, from the variables that each of them sets, and which ranks the task is.

    torchrun             RANK, WORLD_SIZE, LOCAL_RANK: a rank already, nothing is derived
    Open MPI             OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE
    MPICH (hydra)        PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS
    srun                 SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE, SLURM_STEP_NODELIST
    PMI-1 and PMI-2      PMI_RANK, PMI_SIZE
    Kubeflow             PET_NODE_RANK, PET_NNODES, PET_MASTER_ADDR, PET_MASTER_PORT: a task for each node

The order is that of the nesting: Open MPI and MPICH start their helpers on other nodes through srun. Variables of
SLURM count only inside a step: the script of a batch job has some of them and is no task. One task of its node
with several GPUs starts a rank for each; else a task is a rank. MASTER_ADDR and MASTER_PORT win where they are set.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from distill.engine.variables import OF_RANK, is_launched, is_number, shortened
from distill.errors import RecipeError, SetupError

FIRST_PORT, NUM_PORTS = 15000, 10000  # below the ports that kernels give to connections
BATCH_STEPS = 4294967280  # SLURM numbers the steps that no srun made from here on
THIS_NODE = "127.0.0.1"
# Files that name the hosts of a job, that of rank 0 first
HOST_FILES = ("PBS_NODEFILE", "LSB_DJOB_HOSTFILE", "PE_HOSTFILE")
OF_JOB = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


@dataclass(frozen=True)
class LaunchedTask:
    """One of the processes that a scheduler started by one command; ``address`` is "" where no variable names the host of task 0."""

    launcher: str
    index: int
    num_tasks: int
    local_index: int
    num_local: int
    address: str
    port: int

    def to_variables(self, num_ranks: int, local_rank: int = 0) -> dict[str, str]:
        """Returns the variables of a rank, as torchrun names them, where every task is ``num_ranks`` ranks."""
        is_rank = num_ranks == 1
        return {
            "RANK": str(self.index * num_ranks + local_rank),
            "WORLD_SIZE": str(self.num_tasks * num_ranks),
            "LOCAL_RANK": str(self.local_index if is_rank else local_rank),
            "LOCAL_WORLD_SIZE": str(self.num_local if is_rank else num_ranks),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def task_of(environment: Mapping[str, str], command: str) -> LaunchedTask | None:
    """Returns which task this process is; None for a rank of torchrun, and for a process that is alone.

    Raises:
        RecipeError: variables contradict each other; the line to type is in it, made of ``command``.
        SetupError: no variable names the host of task 0.
    """
    if _is_numbered(environment):
        _require_same_rank(environment, command)
        return None
    found = (
        _open_mpi(environment)
        or _hydra(environment)
        or _slurm(environment)
        or _pmi(environment)
        or _kubeflow(environment)
    )
    if found is None:
        _require_no_lone_rank(environment, command)
        return None
    names, task = found
    _require_numbers(environment, names, task, command)
    if task.num_tasks == 1 and task.launcher != "PET":
        return None
    given = environment.get("MASTER_ADDR") or task.address
    if not given:
        raise SetupError(
            f"{task.launcher}: task {task.index} of {task.num_tasks}, and no variable names the host of task 0",
            fix=f"Set MASTER_ADDR to the host of task 0 for every task: mpirun -x MASTER_ADDR=gpu01 ... {command}.",
        )
    return replace(task, address=given, port=_port(environment, task.port))


def line_of(task: LaunchedTask, num_ranks: int) -> str:
    """Returns the line that names the choice: a task is a rank, or starts several."""
    each = f"each starts {num_ranks} ranks" if num_ranks > 1 else "each is a rank"
    return (
        f"{task.launcher}: {task.num_tasks} tasks, {task.num_local} on this node, {each}; "
        f"rank 0 is at {task.address}:{task.port}"
    )


def ranks_of_task(task: LaunchedTask, wanted: int | None, available: int, command: str) -> int:
    """Returns the ranks of one task: ``wanted`` or, for the only one of its node, ``available``.

    Raises:
        RecipeError: several tasks are on this node, and another number is wanted.
    """
    if task.num_local == 1:
        return wanted or available
    if wanted not in (None, 1, task.num_local):
        raise RecipeError(
            f"--gpus {wanted}, and {task.launcher} started {task.num_local} tasks on this node, each of which is a rank",
            fix=f"Leave --gpus out, or start one task on each node: srun --ntasks-per-node=1 {command}.",
        )
    return 1


def first_host(hosts: str) -> str:
    """Returns the first host of a list as SLURM writes it, such as ``gpu[007-012,20],login1``; "" for none."""
    found = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\]([^\[,]*))?", hosts.strip())
    if found is None:
        return ""
    head, number, tail = found.groups(default="")
    rest = hosts.strip()[found.end() :]
    return head + number + tail + (first_host(rest) if rest.startswith("[") else "")


def _is_numbered(environment: Mapping[str, str]) -> bool:
    """RANK is this rank's; under PyTorchJob it is the number of the pod, whose ranks nothing has started yet."""
    is_pod = "PET_NNODES" in environment and "LOCAL_RANK" not in environment
    return is_launched(environment) and not is_pod


def _require_same_rank(environment: Mapping[str, str], command: str) -> None:
    """Refuses a RANK of somewhere else, such as one value that a script exports to all tasks."""
    is_torchrun = "TORCHELASTIC_RUN_ID" in environment or "LOCAL_RANK" in environment
    for read in () if is_torchrun else (_open_mpi, _hydra, _slurm, _pmi):
        found = read(environment)
        if found is None:
            continue
        names, task = found
        rank, size = (environment.get(name, "") for name in OF_RANK)
        if size == str(task.num_tasks) and is_number(rank) and int(rank) != task.index >= 0:
            shown = _values(environment, (*OF_RANK, *names[:2]))
            unset = " ".join(f"-u {name}" for name in OF_RANK)
            raise RecipeError(
                f"{shown}: two numbers for one rank", fix=f"Type env {unset} {command}."
            )


def _require_no_lone_rank(environment: Mapping[str, str], command: str) -> None:
    if environment.get("PMIX_RANK", "0") != "0":
        raise RecipeError(
            f"{_values(environment, ('PMIX_RANK',))}: no variable names how many ranks there are",
            fix=f"Start the ranks with srun, mpirun or torchrun, or type env -u PMIX_RANK {command}.",
        )


Found = tuple[tuple[str, ...], LaunchedTask]


def _open_mpi(environment: Mapping[str, str]) -> Found | None:
    part = "OMPI_COMM_WORLD_"
    names = tuple(part + name for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    return _mpi(environment, "Open MPI", names) if names[0] in environment else None


def _hydra(environment: Mapping[str, str]) -> Found | None:
    names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    return _mpi(environment, "MPICH", names) if names[2] in environment else None


def _pmi(environment: Mapping[str, str]) -> Found | None:
    names = ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")
    return _mpi(environment, "PMI", names) if {*names[:2]} <= {*environment} else None


def _mpi(environment: Mapping[str, str], launcher: str, names: tuple[str, ...]) -> Found:
    index, size, local, num_local = (_number(environment, name) for name in names)
    num_local = 1 if num_local < 0 else num_local  # PMI-1 names the ranks of no node
    address = THIS_NODE if num_local == size else _host_of_job(environment)
    port = _port_of(next((environment[each] for each in OF_JOB if each in environment), ""))
    return names, LaunchedTask(launcher, index, size, max(local, 0), num_local, address, port)


def _slurm(environment: Mapping[str, str]) -> Found | None:
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    step = _number(environment, "SLURM_STEP_ID")
    is_step = 0 <= step < BATCH_STEPS and {*names[:2]} <= {*environment}
    if not is_step:
        return None
    index, size, local = (_number(environment, name) for name in names)
    num_local = _tasks_of_node(environment, size)
    address = THIS_NODE
    if num_local != size:
        hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        address = first_host(hosts)
    job = environment.get("SLURM_JOB_ID", "")
    port = _port_of(f"{job}.{step}.{environment.get('SLURM_RESTART_COUNT', '0')}")
    return names, LaunchedTask("SLURM", index, size, max(local, 0), num_local, address, port)


def _tasks_of_node(environment: Mapping[str, str], size: int) -> int:
    """Tasks on this node, by a text such as ``8(x4),3`` with a part for each node."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    each = [int(tasks) for tasks, times in parts for _ in range(min(int(times or 1), 1 << 20))]
    node = _number(environment, "SLURM_NODEID")
    return each[node] if 0 <= node < len(each) else size


def _kubeflow(environment: Mapping[str, str]) -> Found | None:
    """A pod of a TrainJob or a PyTorchJob, or of a job with the same variables: the only task of its node."""
    names = ("PET_NODE_RANK", "PET_NNODES", "PET_MASTER_ADDR", "PET_MASTER_PORT")
    if names[1] not in environment or "LOCAL_RANK" in environment:
        return None
    index, size, _, port = (_number(environment, name) for name in names)
    if index < 0 and is_number(environment.get("RANK", "")):
        index = int(environment["RANK"])
    address = environment.get("PET_MASTER_ADDR") or environment.get("MASTER_ADDR", "")
    if size == 1:
        address, index = address or THIS_NODE, 0
    port = port if port > 0 else _port_of("")
    return names, LaunchedTask("PET", index, size, 0, 1, address, port)


def _host_of_job(environment: Mapping[str, str]) -> str:
    """The first host of the job that mpirun runs in, as its scheduler names it; "" for none."""
    if "SLURM_JOB_NODELIST" in environment:
        return first_host(environment["SLURM_JOB_NODELIST"])
    for name in HOST_FILES:
        path = Path(environment.get(name, ""))
        if path.is_file() and (words := path.read_text(errors="replace").split()):
            return words[0]
    return ""


def _port_of(job: str) -> int:
    """A port that all tasks of a job derive, and that two jobs of one node rarely share."""
    return FIRST_PORT + zlib.crc32(job.encode()) % NUM_PORTS


def _port(environment: Mapping[str, str], derived: int) -> int:
    text = environment.get("MASTER_PORT", "")
    return int(text) if is_number(text) else derived


def _number(environment: Mapping[str, str], name: str) -> int:
    """The value of a variable; -1 where it is not set or is no number."""
    text = environment.get(name, "")
    return int(text) if is_number(text) or (name == "SLURM_STEP_ID" and text.isdecimal()) else -1


def _require_numbers(
    environment: Mapping[str, str], names: tuple[str, ...], task: LaunchedTask, command: str
) -> None:
    is_right = 0 <= task.index < task.num_tasks and 1 <= task.num_local <= task.num_tasks
    if not is_right or task.local_index >= task.num_local:
        unset = " ".join(f"-u {name}" for name in names if name in environment)
        raise RecipeError(
            f"{_values(environment, names)}: no task of {task.launcher} has these",
            fix=f"On this machine alone: env {unset} {command}. On several, start it with srun, mpirun or torchrun.",
        )


def _values(environment: Mapping[str, str], names: tuple[str, ...]) -> str:
    return ", ".join(
        f"{name} = {shortened(environment[name])}" if name in environment else f"{name} not set"
        for name in names
    )
