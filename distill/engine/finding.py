"""What ``distill doctor`` finds; imports nothing, since it runs where libraries are missing."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    found: str
    is_ok: bool
    fix: str = ""

    def to_json(self) -> dict[str, Any]:
        """The finding as plain data."""
        return asdict(self)
