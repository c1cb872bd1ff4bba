"""Which addresses processes listen on, by the kernel's tables."""

import ipaddress
import struct
from contextlib import suppress
from pathlib import Path

LISTEN = "0A"


def listening_sockets(pid: int) -> list[tuple[str, int]]:
    """Address and port of every TCP socket of a process that waits for connections."""
    own = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            target = str(path.readlink())
            if target.startswith("socket:["):
                own.add(target[len("socket:[") : -1])
    found = []
    for table in ("tcp", "tcp6"):
        with suppress(FileNotFoundError):  # a host without IPv6
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTEN and fields[9] in own:
                    address, port = fields[1].split(":")
                    found.append((_readable(address), int(port, 16)))
    return found


def listening_addresses(pid: int) -> list[str]:
    """As ``listening_sockets``, the addresses alone."""
    return [address for address, _ in listening_sockets(pid)]


def _readable(address: str) -> str:
    """The kernel writes words of four bytes in the order of the machine."""
    words = [int(address[i : i + 8], 16) for i in range(0, len(address), 8)]
    return str(ipaddress.ip_address(struct.pack(f"={len(words)}I", *words)))


def is_loopback(address: str) -> bool:
    """Returns whether only processes of this host reach an address."""
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return parsed.is_loopback or (mapped is not None and mapped.is_loopback)
