"""One line for each machine, for people who start ranks by ssh."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from distill.errors import RecipeError


def lines_of(hosts: str, port: int, folder: Path, command: Sequence[str]) -> list[str]:
    """Returns a line for a shell for each of the comma-separated hosts; rank 0 is on the first.

    Raises:
        RecipeError: there is no host, one twice, or one with letters that no host name has.
    """
    names = [name.strip() for name in hosts.split(",")]
    for name in names:
        if not re.fullmatch(r"(?:\w[\w.-]*@)?\w[\w.:-]*", name):
            raise RecipeError(
                f"--hosts {hosts!r}: {name!r} is no host name",
                fix="Write --hosts gpu01,gpu02, the one of rank 0 first.",
            )
    if len(set(names)) < len(names):
        raise RecipeError(f"--hosts {hosts}: a host twice", fix="Write every host once.")
    first = names[0].rpartition("@")[2]
    lines = []
    for index, name in enumerate(names):
        variables = f"PET_NNODES={len(names)} PET_NODE_RANK={index}"
        variables += f" PET_MASTER_ADDR={shlex.quote(first)} PET_MASTER_PORT={port}"
        remote = f"cd {shlex.quote(str(folder))} && {variables} {shlex.join(command)}"
        lines.append(f"ssh {name} {shlex.quote(remote)} &")
    return lines
