"""Which lines of some files are run: a trace of this process and its later threads, and the lines there are to run."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

Lines = dict[str, set[int]]  # by file


@contextmanager
def traced_lines(folder: Path) -> Iterator[Lines]:
    """Inside, notes the lines that are run of the files of a folder."""
    lines, prefix = Lines(), f"{folder.resolve()}/"

    def in_file(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            lines[frame.f_code.co_filename].add(frame.f_lineno)
        return in_file

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(prefix):
            return None
        lines.setdefault(name, set()).add(frame.f_lineno)
        return in_file

    before = sys.gettrace()
    sys.settrace(on_call)
    threading.settrace(on_call)
    try:
        yield lines
    finally:
        sys.settrace(before)
        threading.settrace(None)  # type: ignore[arg-type]


def executable_lines(path: Path) -> set[int]:
    """Lines that the compiler makes code of."""
    todo, found = [compile(path.read_text(), str(path), "exec")], set[int]()
    while todo:
        code = todo.pop()
        found |= {line for *_, line in code.co_lines() if line}
        todo += [each for each in code.co_consts if isinstance(each, CodeType)]
    return found
