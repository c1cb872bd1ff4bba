"""Keeps the sockets of a job on one machine away from its network: gloo and NCCL listen on loopback only.

Neither asks who connects. Left alone, both take the interface that the host's name belongs to.
"""

import socket
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from distill.errors import SetupError

INTERFACES = Path("/sys/class/net")
UP, LOOPBACK = 0x1, 0x8  # of the kernel's flags of an interface
ADDRESSES = ("127.0.0.1", "::1")
ANSWER_S = 5.0
VARIABLES: Mapping[str, str] = {  # NCCL takes a name for the start of one, without the sign
    "GLOO_SOCKET_IFNAME": "{}",
    "NCCL_SOCKET_IFNAME": "={}",
}


def stay_on_loopback(environment: MutableMapping[str, str]) -> None:
    """Sets the variables that name an interface, where the user has not set them.

    Raises:
        SetupError: no loopback interface is up, and a variable is not set.
    """
    missing = [name for name in VARIABLES if not environment.get(name)]
    if not missing:
        return
    interface = loopback_interface()
    for name in missing:
        environment[name] = VARIABLES[name].format(interface)


def require_loopback(environment: Mapping[str, str]) -> None:
    """Tries what the ranks of one machine do, unless the user has named their interfaces: listen on loopback, and connect.

    Raises:
        SetupError: nothing can be reached there.
    """
    if all(environment.get(name) for name in VARIABLES):
        return
    loopback_interface()
    errors = [connect_to_itself(address) for address in ADDRESSES]
    if all(errors):
        raise SetupError(
            f"{ADDRESSES[0]} cannot be reached ({errors[0]}): the ranks of one machine talk over loopback",
            fix=_how_to_mend(),
        )


def connect_to_itself(address: str) -> str:
    """Listens on an address and connects to it; returns why that fails, empty where it does not."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as server:
            server.bind((address, 0))
            server.listen()
            socket.create_connection(server.getsockname()[:2], ANSWER_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def loopback_interface(interfaces: Path = INTERFACES) -> str:
    """Returns the name of the loopback interface, ``lo`` on Linux.

    Raises:
        SetupError: there is none, or it is down.
    """
    names = sorted(name for _, name in socket.if_nameindex())
    if not interfaces.is_dir():  # not Linux
        found = [name for name in names if name.startswith("lo")]
    else:
        found = [name for name in names if _is_loopback_up(interfaces / name / "flags")]
    if not found:
        raise SetupError(
            f"no loopback interface is up (interfaces: {', '.join(names) or 'none'}): "
            "the ranks of one machine talk over it",
            fix=_how_to_mend(),
        )
    return found[0]


def _how_to_mend() -> str:
    return f"Bring it up: ip link set lo up. Or name an interface in {' and '.join(VARIABLES)}."


def _is_loopback_up(flags: Path) -> bool:
    try:
        value = int(flags.read_text(), 16)
    except OSError:  # gone meanwhile
        return False
    return value & (UP | LOOPBACK) == UP | LOOPBACK
