"""What a source holds besides the images that are read, counted by reason, so that nothing vanishes in silence."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

SYSTEM_FILES = ("._*", ".DS_Store", "Thumbs.db", "ehthumbs*.db", "desktop.ini", "Icon\r")
SYSTEM_FOLDERS = (
    "__MACOSX",
    "@eaDir",
    "@Recycle",
    "@Recently-Snapshot",
    "#recycle",
    "#snapshot",
    "$RECYCLE.BIN",
    "RECYCLER",
    "System Volume Information",
    "lost+found",
    "__pycache__",
    ".thumbnails",
    ".ipynb_checkpoints",
    ".Trash*",
    ".AppleDouble",
    ".Spotlight-V100",
    ".fseventsd",
    ".TemporaryItems",
    ".snapshot",
)
LISTED = 10  # names or reasons in one line; JSON has all


@dataclass
class PassedOver:
    """Counts of one or several sources.

    Args:
        reasons: number of files (of folders that may not be read, of links) by reason.
        lost_classes: class folders without any picture that is read, with what is in them.
        remarks: further lines to show, such as a label column that holds no labels.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    lost_classes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, other: "PassedOver") -> None:
        """Adds what another source passed over."""
        self.reasons += other.reasons
        self.lost_classes += other.lost_classes
        self.remarks += [line for line in other.remarks if line not in self.remarks]

    def describe(self) -> str:
        """The counts in a few words; empty where nothing was passed over."""
        return in_words(self.reasons)

    def lines(self) -> list[str]:
        """What is shown besides the counts: lost classes and remarks."""
        lost = f"no picture that is read in {listed(self.lost_classes)}"
        return [*([lost] if self.lost_classes else []), *self.remarks]

    def all_lines(self) -> list[str]:
        """Everything, a line each; empty where nothing was passed over."""
        over = [f"passed over: {self.describe()}"] if self.reasons else []
        return [*over, *self.lines()]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {
            "passed_over": dict(self.reasons.most_common()),
            "lost_classes": self.lost_classes,
            "remarks": self.remarks,
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "PassedOver":
        """What ``to_json`` wrote; absent keys, as in indexes of before, are empty."""
        reasons = Counter({str(k): int(v) for k, v in facts.get("passed_over", {}).items()})
        return cls(reasons, list(facts.get("lost_classes", ())), list(facts.get("remarks", ())))


def in_words(reasons: Mapping[str, int]) -> str:
    """Counts by reason, the most frequent first."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return listed([f"{count:,} {reason}" for reason, count in ordered])


def listed(names: Sequence[str]) -> str:
    """Names in a line; the number of those that are too many."""
    left = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {left:,} more" if left > 0 else "")


def reason_of(folders: Iterable[str], name: str) -> str:
    """Why a file is passed over by the folders it lies in or by its name; empty where it is not."""
    for folder in folders:
        if reason := folder_reason(folder):
            return reason
    if pattern := _matching(name, SYSTEM_FILES):
        return f"system file {pattern}".strip()
    return "hidden" if name.startswith(".") else ""


def folder_reason(name: str) -> str:
    """Why all that lies in a folder of this name is passed over; empty where it is not."""
    if pattern := _matching(name, SYSTEM_FOLDERS):
        return f"in system folder {pattern}"
    return "hidden" if name.startswith(".") and name not in (".", "..") else ""


def _matching(name: str, patterns: Sequence[str]) -> str:
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), "")


def suffix_reason(suffix: str) -> str:
    """The reason of a file whose suffix is not read."""
    return f"with suffix {suffix}" if suffix else "without suffix"
