"""What a finished run leaves and what to do next: in a box on a terminal, in lines elsewhere, in ``RUN/README.md``."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from distill.screen.results import conclusion_lines
from distill.screen.tables import score_rows, score_text, scores_table, unfinished_students

SUMMARY_LINE = "conclusion"  # of summary.json: text, reason, next


@dataclass(frozen=True)
class Ending:
    """Folders of networks by name, and commands with what each is for."""

    folders: Mapping[str, str]
    commands: Mapping[str, str]

    def lines(self) -> list[str]:
        """The same as plain lines."""
        width = max(map(len, self.commands), default=0)
        return [
            *(f"{name} is in {folder}" for name, folder in self.folders.items()),
            *(f"next: {command:<{width}}   {use}" for command, use in self.commands.items()),
        ]


def ending_of(run_folder: Path, summary: Mapping[str, Any]) -> Ending:
    """What is there of a run, and three commands that fit it."""
    students = {n: e for n, e in summary.get("students", {}).items() if e.get("steps") != 0}
    folders = {name: str(run_folder / "students" / name) for name in students}
    if not students:
        folders = {"teacher": str(run_folder / "teacher")}
    run = shlex.quote(str(run_folder))
    has_custom = any(map(_is_custom, folders.values()))
    form, forms = ("onnx", "onnxruntime") if has_custom else ("hf", "Hugging Face")
    others = "factory" if has_custom else "timm, meta, onnx"
    export = f"distill export {run} --to {form}" + ("" if students else " --student teacher")
    commands = {f"distill report {run}": "the page of the run again, or of several beside it"}
    commands[export] = f"files for {forms}; also {others}"
    if students:
        commands[f"distill compare {run} OTHER"] = "recipe and scores of both"
    else:
        commands[f"distill eval {run} --over-steps"] = "scores of every checkpoint that is left"
    return Ending(folders, commands)


def _is_custom(folder: str) -> bool:
    """Whether a factory made the network, which has no form of a library."""
    from distill.weights.hf_config import CUSTOM_TYPE

    config = Path(folder) / "config.json"
    return config.is_file() and CUSTOM_TYPE in config.read_text(encoding="utf-8")


def ending_box(run_folder: Path, summary: Mapping[str, Any]) -> Panel:
    """Scores, folders and next commands."""
    ending = ending_of(run_folder, summary)
    lines = [Text(line) for line in conclusion_lines(summary)]
    if lines:
        lines[0].stylize("bold")
    body = Group(scores_table(summary), Text(), *lines, Text(), Text("\n".join(ending.lines())))
    title = Text(f" {run_folder.name} is finished ", style="bold")
    return Panel(body, title=title, title_align="left", border_style="green", expand=False)


def ending_page(run_folder: Path, summary: Mapping[str, Any]) -> str:
    """The same as the text of ``README.md``."""
    ending = ending_of(run_folder, summary)
    line = summary.get(SUMMARY_LINE)
    found = line if isinstance(line, Mapping) else {}
    parts = [f"# {_plain(run_folder.resolve().name)}", ""]
    parts += [f"{_plain(found[key])}\n" for key in ("text", "reason", "next") if found.get(key)]
    parts += ["| network | k-NN | untrained copy | last loss |", "| --- | --- | --- | --- |"]
    parts += [
        f"| {_plain(name)} | {' | '.join(map(score_text, values))} |"
        for name, *values in score_rows(summary)
    ]
    if summary.get("knn_reason"):
        parts += ["", f"No scores: {_plain(summary['knn_reason'])}"]
    parts += ["", *map(_plain, unfinished_students(summary, has_reason=True))]
    parts += [f"- {_plain(name)}: `{_plain(each)}`" for name, each in ending.folders.items()]
    commands = [f"{_plain(command)}   # {use}" for command, use in ending.commands.items()]
    parts += ["", "```", *commands, "```", ""]
    parts.append(
        "`report.html` shows the run, `summary.json` holds its scores, `log.txt` its lines."
    )
    return "\n".join(parts) + "\n"


def _plain(value: object) -> str:
    """A text of a run in one line, without what Markdown or HTML takes for markup."""
    text = " ".join(str(value).split())
    return "".join("?" if letter in "`|<>[]\\" else letter for letter in text)
