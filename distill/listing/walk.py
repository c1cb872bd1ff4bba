"""The files below a folder, the same whatever the order on disk, and all that is passed over on the way."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from distill.listing.passed_over import folder_reason, in_words, reason_of
from distill.listing.storage import Storage, is_of_file

REPEATED = "link to a folder that is read already"


@dataclass
class Walked:
    """Paths relative to the folder: ``files`` sorted by their parts, ``folders``, and what was passed over, by folder and reason."""

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    passed: Counter[tuple[str, str]] = field(default_factory=Counter)

    def pass_over(self, path: str, reason: str) -> None:
        """Counts a file by the folder that it lies in, or a folder by itself."""
        self.passed[path, reason] += 1

    @property
    def reasons(self) -> Counter[str]:
        """All that was passed over, by reason."""
        total = Counter[str]()
        for (_, reason), count in self.passed.items():
            total[reason] += count
        return total

    def lost(self, images: list[str], depth: int) -> list[str]:
        """Folders at a depth that hold none of the images, each with what it holds."""
        full = {"/".join(name.split("/")[:depth]) for name in images}
        empty = {f for f in self.folders if f.count("/") == depth - 1 and f not in full}
        held: dict[str, Counter[str]] = {folder: Counter() for folder in empty}
        for (folder, reason), count in self.passed.items():
            top = "/".join(folder.split("/")[:depth])
            if top in held:
                held[top][reason] += count
        return [f"{name} ({in_words(held[name]) or 'empty'})" for name in sorted(empty)]


class _Walk:
    def __init__(self, root: str, wanted: Callable[[str], bool], max_depth: int | None) -> None:
        self._root, self._wanted, self._max_depth = root, wanted, max_depth
        self.walked, self._storage = Walked(), Storage()
        self._folders = [""]
        self._links: list[str] = []
        self._visited: set[tuple[int, int]] = set()

    def run(self) -> Walked:
        """Enters folders first and links to folders last: a folder counts under its name, not under that of a link to it."""
        while self._folders or self._links:
            is_link = not self._folders
            if is_link:
                self._links.sort(key=lambda path: path.split("/"))
            self._enter(self._links.pop(0) if is_link else self._folders.pop(), is_link)
        self.walked.files.sort(key=lambda path: path.split("/"))
        self.walked.folders.sort(key=lambda path: path.split("/"))
        return self.walked

    def _enter(self, folder: str, is_link: bool) -> None:
        if folder:
            self.walked.folders.append(folder)
        if self._max_depth is not None and folder and folder.count("/") + 1 >= self._max_depth:
            return
        path = f"{self._root}/{folder}"
        try:
            facts = self._storage.read(path, partial(os.stat, path))
            if (facts.st_dev, facts.st_ino) in self._visited:
                self.walked.pass_over(folder, REPEATED if is_link else "folder read already")
                return
            self._visited.add((facts.st_dev, facts.st_ino))
            found = self._storage.read(path, partial(_entries, path))
        except OSError as error:
            if not folder:
                raise
            self.walked.pass_over(folder, f"unreadable folder ({error.strerror})")
            return
        for entry in found:
            self._look(folder, entry)

    def _look(self, folder: str, entry: "os.DirEntry[str]") -> None:
        path = f"{folder}/{entry.name}" if folder else entry.name
        try:
            if entry.is_dir():
                if reason := folder_reason(entry.name):
                    self._count(path, reason, is_link=entry.is_symlink())
                else:
                    (self._links if entry.is_symlink() else self._folders).append(path)
                return
            is_file, is_link = entry.is_file(), entry.is_symlink()
        except OSError as error:
            full = f"{self._root}/{path}"
            if not is_of_file(error, full):
                self._storage.read(full, entry.stat)
                self._look(folder, entry)
                return
            self.walked.pass_over(folder, f"unreadable file ({error.strerror})")
            return
        if not self._wanted(path):
            return
        if reason := reason_of((), entry.name):
            self.walked.pass_over(folder, reason)
        elif is_file:
            self.walked.files.append(path)
        else:
            self.walked.pass_over(folder, "broken link" if is_link else "no regular file")

    def _count(self, folder: str, reason: str, *, is_link: bool) -> None:
        """Counts the files in a folder that is not entered; of a link the link."""
        parent = folder.rpartition("/")[0]
        if is_link:
            self.walked.pass_over(parent, reason)
            return
        for inner, _, names in os.walk(f"{self._root}/{folder}"):
            below = inner[len(self._root) + 1 :]
            for name in names:
                if self._wanted(f"{below}/{name}"):
                    self.walked.pass_over(parent, reason)


def _entries(path: str) -> "list[os.DirEntry[str]]":
    with os.scandir(path) as entries:
        return list(entries)


def walk(
    root: str, *, wanted: Callable[[str], bool] = lambda _: True, max_depth: int | None = None
) -> Walked:
    """Walks a folder and, after its folders, the links to folders outside of it.

    Args:
        root: the folder, without a slash at its end.
        wanted: takes a relative path; files that it refuses are neither listed nor counted.
        max_depth: folders at this depth are listed and not entered.

    Raises:
        OSError: the folder itself may not be read.
        StorageError: the storage has refused a folder for minutes; a part of it is no data set.
    """
    return _Walk(root, wanted, max_depth).run()
