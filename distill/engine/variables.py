"""Which rank another launcher made of this process, by the variables that it set.

    RANK, WORLD_SIZE            which of how many ranks; either one makes the process a rank of a launch
    MASTER_ADDR, MASTER_PORT    where the store of the launch is
    LOCAL_RANK, LOCAL_WORLD_SIZE    which of how many ranks of this node; may be left out

Half of them would wait for ranks that never come, or train something else: refused with all values and
the line to type, before a process, a socket or a file is made.
"""

import re
import shlex
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from distill.errors import RecipeError

OF_RANK = ("RANK", "WORLD_SIZE")
OF_STORE = ("MASTER_ADDR", "MASTER_PORT")
OF_NODE = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
MOST_DIGITS = 9
LAST_PORT = 65535
EXAMPLE_HOST, EXAMPLE_PORT = "gpu01", "29500"
LONGEST = 60  # letters of a value in a message


@dataclass(frozen=True)
class LaunchedRank:
    """Which rank this is, and where the store of its launch is."""

    rank: int
    num_ranks: int
    address: str
    port: int

    def __str__(self) -> str:
        """As the lines name the process."""
        return f"rank {self.rank} on {socket.gethostname()}"


def is_launched(environment: Mapping[str, str]) -> bool:
    """Returns whether this process is a rank of another launcher, or was meant to be."""
    return any(environment.get(name) for name in OF_RANK)


def is_first(environment: Mapping[str, str]) -> bool:
    """Returns whether this process is alone, or rank 0 of another launcher."""
    return not is_launched(environment) or environment.get("RANK") == "0"


def launched_rank(environment: Mapping[str, str], command: str) -> LaunchedRank:
    """Returns which rank this process is; ``command`` is the command line, for the line to type.

    Raises:
        RecipeError: a variable is missing, is no number, or contradicts another one.
    """
    variables = {name: environment.get(name, "") for name in (*OF_RANK, *OF_STORE, *OF_NODE)}
    problem = _missing(variables) or _wrong_number(variables) or _wrong_address(variables)
    problem = problem or _contradiction(variables)
    if problem:
        raise RecipeError(f"{_values(variables)}: {problem}", fix=_line_to_type(variables, command))
    return LaunchedRank(
        int(variables["RANK"]),
        int(variables["WORLD_SIZE"]),
        variables["MASTER_ADDR"],
        int(variables["MASTER_PORT"]),
    )


def is_number(text: str) -> bool:
    """Returns whether a variable holds an integer of 0 or more, of a size that ranks and ports have."""
    return text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS


def _missing(variables: Mapping[str, str]) -> str:
    missing = [name for name in (*OF_RANK, *OF_STORE) if not variables[name]]
    needed = ", ".join((*OF_RANK, *OF_STORE))
    return f"a rank of another launcher has {needed}" if missing else ""


def _wrong_number(variables: Mapping[str, str]) -> str:
    for name, text in variables.items():
        if name == "MASTER_ADDR" or (name in OF_NODE and not text):
            continue
        if not is_number(text):
            return f"{name} is not an integer of 0 or more"
    if not 1 <= int(variables["MASTER_PORT"]) <= LAST_PORT:
        return f"ports go from 1 to {LAST_PORT}"
    return ""


def _wrong_address(variables: Mapping[str, str]) -> str:
    address = variables["MASTER_ADDR"]
    try:
        address.encode("idna")
    except UnicodeError:
        is_host = False
    else:
        is_host = re.fullmatch(r"[\w.:%-]+", address) is not None and address.count(":") != 1
    return "" if is_host else "MASTER_ADDR is a host name or an address, without a port"


def _contradiction(variables: Mapping[str, str]) -> str:
    rank, num_ranks = (int(variables[name]) for name in OF_RANK)
    if rank >= num_ranks:
        return "RANK goes from 0 to WORLD_SIZE - 1"
    if not variables["LOCAL_WORLD_SIZE"]:  # LOCAL_RANK alone chooses a GPU
        return ""
    size, local_rank = int(variables["LOCAL_WORLD_SIZE"]), int(variables["LOCAL_RANK"] or 0)
    if not 1 <= size <= num_ranks:
        return "LOCAL_WORLD_SIZE goes from 1 to WORLD_SIZE"
    if local_rank >= size:
        return "LOCAL_RANK goes from 0 to LOCAL_WORLD_SIZE - 1"
    return "LOCAL_RANK is at most RANK" if local_rank > rank else ""


def _values(variables: Mapping[str, str]) -> str:
    shown = [name for name, text in variables.items() if text or name not in OF_NODE]
    texts = {name: f" = {shortened(variables[name])}" for name in shown}
    return ", ".join(name + (texts[name] if variables[name] else " not set") for name in shown)


def shortened(text: str) -> str:
    """Returns a value as one line of at most ``LONGEST`` letters."""
    shown = text if text.isprintable() else repr(text)  # on one line
    return f"{shown[:LONGEST]}..." if len(shown) > LONGEST else shown


def _line_to_type(variables: Mapping[str, str], command: str) -> str:
    """Both ways out, each as a line for a shell; ``RANK`` and so on with their values where these are possible."""
    rank, num_ranks = (
        int(variables[name]) if is_number(variables[name]) else -1 for name in OF_RANK
    )
    num_ranks = num_ranks if num_ranks > 0 else max(rank + 1, 2)
    rank = rank if 0 <= rank < num_ranks else 0
    port = variables["MASTER_PORT"]
    is_port = is_number(port) and 1 <= int(port) <= LAST_PORT
    host = variables["MASTER_ADDR"]
    host = EXAMPLE_HOST if not host or _wrong_address(variables) else host
    given = f"RANK={rank} WORLD_SIZE={num_ranks} MASTER_ADDR={shlex.quote(host)} "
    given += f"MASTER_PORT={port if is_port else EXAMPLE_PORT}"
    unset = "".join(f"-u {name} " for name in OF_RANK if variables[name])
    alone = f"env {unset}{command}" if unset else f"{command} engine.launcher=auto"
    return (
        f"On one machine: {alone}. On several, for each rank: "
        f"{given} {command}, or torchrun, which sets them."
    )
