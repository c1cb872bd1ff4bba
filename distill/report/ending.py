"""The page and the ``README.md`` of a run that has just ended. Neither may cost the run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.report.page import MOST_BYTES, REPORT, make_page
from distill.report.run_record import read_run
from distill.runfolder.files import replace_text
from distill.runfolder.status import Status
from distill.screen.console import printable
from distill.screen.ending import ending_page


def write_ending(
    run_folder: Path, summary: Mapping[str, Any], status: Status, messages: Sequence[str]
) -> Status:
    """Writes both files, and returns the status of the finished run: its message has a line for each that could not be written."""
    messages = list(messages)
    finished = status.ended("finished", "; ".join(messages))
    for name in ("README.md", REPORT):
        try:
            if name == REPORT:
                run = replace(read_run(run_folder), status=finished, summary=summary)
                text = make_page([run])
                if len(text.encode()) > MOST_BYTES:
                    text = make_page([run], has_pictures=False)
            else:
                text = printable(ending_page(run_folder, summary))
            replace_text(run_folder / name, text)
        except Exception as error:  # whatever it is: everything that was trained is there
            reason = str(error).strip().splitlines() or [type(error).__name__]
            again = f"run `distill eval {run_folder}`"
            messages.append(f"{name} was not written ({reason[0]}): {again}")
    return replace(finished, message="; ".join(messages))
