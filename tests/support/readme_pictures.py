"""The pictures of README.md, each from files that a real run or measurement wrote:

python -m tests.support.readme_pictures panel RUN docs/panel.svg              while RUN trains
python -m tests.support.readme_pictures timeline BENCH.json docs/timeline.png
python -m tests.support.readme_pictures family docs/quickstart.md docs/family.png
"""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich._export_format import CONSOLE_SVG_FORMAT

from distill.bench.report import plot_report
from distill.screen.console import make_console
from distill.screen.panel import render_panel
from distill.screen.snapshot import RunFiles, RunSnapshot

COLUMNS, LINES = 120, 40
HINT = "Ctrl-C saves and stops"
SHOWN_MODES = ("ours", "published")
FIRST_NAMES = {"exchanging": "exchange", "voting": "agreeing", "following": "post-step"}  # in 0.1.0


def panel(snapshot: RunSnapshot) -> str:
    """The live panel as an SVG that loads nothing: fonts of the reader, none from a server."""
    console = make_console(
        file=io.StringIO(),
        width=COLUMNS,
        record=True,
        force_terminal=True,
        color_system="truecolor",
    )
    console.print(render_panel(snapshot, COLUMNS, HINT, LINES))
    form = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    title = f"distill train {snapshot.name}"
    return console.export_svg(title=title, code_format=form, unique_id="panel")


def timeline(report: dict[str, Any], path: Path) -> None:
    """One measured step of every rank: this job, and even shares with a barrier."""
    modes = {}
    for name in SHOWN_MODES:
        found = report["modes"][name]
        rows = [
            [[*span[:2], FIRST_NAMES.get(span[2], span[2]), span[3]] for span in row]
            for row in found["timeline"]
        ]
        modes[name] = {**found, "timeline": rows}
    plot_report({**report, "modes": modes}, path)


def family(page: str, path: Path) -> None:
    """k-NN over parameters: the networks of the quickstart, trained and untrained, and what needs no network."""
    row = r"^\| (\w+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| \+[\d.]+ \|$"
    networks = re.findall(row, page, re.MULTILINE)
    floors = re.search(r"Raw pixels give ([\d.]+) .*? of a tile ([\d.]+)", page)
    assert floors is not None and len(networks) == 4, "the table of docs/quickstart.md"
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    for index, (name, count, trained, untrained) in enumerate(networks):
        colour = "black" if name == "teacher" else f"C{index - 1}"
        size = int(count.replace(",", "")) / 1000
        axes.plot([size, size], [float(untrained), float(trained)], color=colour)
        axes.plot(size, float(trained), "o", color=colour)
        axes.plot(size, float(untrained), "o", color=colour, markerfacecolor="white")
        axes.annotate(f"  {name} {trained}", (size, float(trained)), va="center", color=colour)
    for label, score in zip(("raw pixels", "colour mean and spread"), floors.groups(), strict=True):
        axes.axhline(float(score), color="grey", linestyle=":")
        axes.annotate(label, (418, float(score)), va="bottom", ha="right", color="grey")
    axes.set(xlim=(135, 420), ylim=(0.35, 0.9), xlabel="thousand parameters", ylabel="k-NN")
    axes.set_title("k-NN on held-out tiles: filled trained, hollow untrained", loc="left")
    figure.savefig(path, dpi=110)


def main(kind: str, source: str, target: str) -> None:
    """Makes one picture."""
    if kind == "panel":
        Path(target).write_text(panel(RunFiles(Path(source)).take_snapshot()), encoding="utf-8")
    elif kind == "timeline":
        timeline(json.loads(Path(source).read_text(encoding="utf-8")), Path(target))
    else:
        family(Path(source).read_text(encoding="utf-8"), Path(target))


if __name__ == "__main__":
    main(*sys.argv[1:])
