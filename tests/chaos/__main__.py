"""``python -m tests.chaos NAME ...``: runs one kind of fault and prints what it counted."""

import importlib
import sys

KINDS = (
    "kills",
    "crashpoints",
    "bitflips",
    "nan",
    "hang",
    "fuzz",
    "resume",
    "stall",
    "corpus",
    "watcher",
    "moments",
    "soak",
    "steps",
)


def main() -> int:
    """Exit code 0 when every claim held, 1 when one did not, 2 for a kind that is not known."""
    if len(sys.argv) < 2 or sys.argv[1] not in KINDS:
        sys.stderr.write(f"usage: python -m tests.chaos {{{'|'.join(KINDS)}}} [options]\n")
        return 2
    failed = importlib.import_module(f"tests.chaos.{sys.argv[1]}").run(sys.argv[2:])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
