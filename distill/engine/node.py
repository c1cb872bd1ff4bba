"""How many ranks another launcher started on this machine, and whether that is what the job was planned for.

torchrun  LOCAL_WORLD_SIZE
Open MPI  OMPI_COMM_WORLD_LOCAL_SIZE
MPICH     MPI_LOCALNRANKS
srun      SLURM_STEP_TASKS_PER_NODE, such as 8(x4); all nodes in one text
"""

import re
import socket
from collections.abc import Mapping

from distill.engine.variables import LONGEST, is_number
from distill.errors import PlanError, SetupError

OF_THIS_NODE = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
OF_ALL_NODES = "SLURM_STEP_TASKS_PER_NODE"
FIX = (
    "Start as many ranks on every node, or write engine.ranks_per_node: the plan is then for that."
)


def ranks_on_node(environment: Mapping[str, str]) -> int | None:
    """Returns the ranks on this machine as the launcher names them; None where it names none.

    Raises:
        SetupError: a variable of the launcher holds no number of ranks.
        PlanError: by the launcher nodes have different numbers of ranks.
    """
    for name in OF_THIS_NODE:
        if name in environment:
            return _number(name, environment[name])
    if OF_ALL_NODES not in environment:
        return None
    text = environment[OF_ALL_NODES]
    numbers = {
        _number(OF_ALL_NODES, re.sub(r"\(x\d+\)$", "", part), text) for part in text.split(",")
    }
    if len(numbers) > 1:
        raise PlanError(
            f"{OF_ALL_NODES} = {text}: groups are laid out for nodes with one number of ranks",
            fix=FIX,
        )
    return numbers.pop()


def require_node_size(environment: Mapping[str, str], planned: int | None) -> None:
    """Refuses a node that has another number of ranks than that of rank 0; ``planned`` is None where the recipe has the key.

    Raises:
        PlanError: names this node, its ranks, and those of rank 0's.
    """
    local = ranks_on_node(environment)
    if planned is not None and local is not None and local != planned:
        raise PlanError(
            f"{local} ranks on {socket.gethostname()}, {planned} on the node of rank 0: "
            "groups are laid out for nodes with one number of ranks",
            fix=FIX,
        )


def _number(name: str, text: str, full: str | None = None) -> int:
    if not is_number(text) or int(text) < 1:
        shown = repr(full or text)
        shown = f"{shown[:LONGEST]}..." if len(shown) > LONGEST else shown
        raise SetupError(
            f"{name} = {shown}: must be a number of ranks, at least 1",
            fix="Unset it, or start the ranks with torchrun.",
        )
    return int(text)
