"""A page that shows a choice beside its pool and a random draw of the same size: one file, nothing is loaded or sent.

It has the look of the page of runs (``distill.report.page``). Pictures are small copies inside the page.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL import Image, ImageOps

from distill.curation.chosen import Chosen
from distill.curation.evidence import Evidence, cluster_sizes, evidence_of
from distill.data.index import ImageIndex
from distill.data.locations import Reader
from distill.errors import DataError
from distill.protocols.images import PICTURE_LIMIT_S, read_pixels
from distill.report.charts import PALETTE, Curve, legend, line_chart, thinned
from distill.report.looks import SCRIPT
from distill.report.markup import Content, Html, element, facts, joined, note, table
from distill.report.page import MOST_BYTES, document, embedded
from distill.runfolder.files import replace_text

CELL, FRAME, COLUMNS = 72, 4, 12  # px of a picture in a mosaic, of its frame; pictures of a row
SHOWN = 24  # pictures of a mosaic
CLUSTERS_SHOWN = 4  # of the largest, and of the rarest
TWINS_SHOWN = 12  # of a reason
BACKGROUND = (124, 116, 104)  # below clear pixels
MISSING = (200, 80, 80)  # the colour of a picture that cannot be read
COLOURS = {"pool": "#888888", "chosen": PALETTE[0], "random": PALETTE[1]}
NAMES = {"pool": "pool", "chosen": "chosen", "random": "random, same size"}


def write_evidence(folder: Path, out: Path) -> int:
    """Writes the page of a folder of chosen images, and returns its size in bytes.

    Raises:
        DataError: the folder holds no choice, or there is no folder for the page.
        OSError: the page cannot be written.
    """
    if not out.absolute().parent.is_dir():
        raise DataError(f"{out}: no folder {out.parent}", fix="Make it first.")
    evidence = evidence_of(Chosen.open(folder))
    parts = {
        "Summary": _numbers(evidence),
        "Cluster sizes": _sizes(evidence),
        "Largest and rarest clusters": _mosaics(evidence),
        "Nearest and farthest images that were retrieved": _retrieved(evidence.chosen),
        "Copies beside what stayed": _twins(evidence.chosen),
        "How it was chosen": _how(evidence.chosen),
    }
    sections = [
        element("section", element("h2", title), part) for title, part in parts.items() if part
    ]
    text = document(folder.name, joined([element("h1", str(folder)), *sections]), SCRIPT)
    replace_text(out, text)
    return len(text.encode())


def _numbers(evidence: Evidence) -> Html:
    found = {name: evidence.facts(times) for name, times in evidence.sets.items()}
    levels = [] if evidence.clusters is None else evidence.clusters.max(axis=1) + 1
    headings = ["", "images", "evenness", "classes"]
    headings += [f"largest 1% of {count:,} clusters" for count in levels]
    rows = [
        [
            NAMES[name],
            f"{each.images:,}",
            "-" if each.evenness is None else f"{each.evenness:.3f}",
            "-" if each.classes is None else f"{each.classes:,}",
            *(f"{share:.1%}" for share in each.largest),
        ]
        for name, each in found.items()
    ]
    lines = [
        "Evenness is the entropy of the shares of classes, 1 where all are as frequent; classes are those with an image."
        if found["pool"].evenness is not None
        else "No labels, so evenness and classes are not known."
    ]
    if evidence.clusters is not None:
        lines.append("The last columns are the share of images in the most frequent hundredth.")
    return joined([table(headings, rows), *map(note, lines)])


def _sizes(evidence: Evidence) -> Html | None:
    if evidence.clusters is None:
        return None
    charts = []
    for level in evidence.clusters:
        curves = []
        for name, times in evidence.sets.items():
            sizes = np.sort(cluster_sizes(level, times))[::-1] / max(1, int(times.sum()))
            points = [(float(at), 100 * float(share)) for at, share in enumerate(sizes, start=1)]
            curves.append(Curve(NAMES[name], COLOURS[name], "", thinned(points, 400)))
        title = f"% of the images, {int(level.max()) + 1:,} clusters"
        charts.append(
            line_chart(title, curves, may_be_log=False, x_label="clusters, from the largest")
        )
    entries = [(NAMES[name], COLOURS[name], "") for name in NAMES]
    return joined([legend(entries), element("div", *charts, class_="charts")])


def _mosaics(evidence: Evidence) -> Html | None:
    if evidence.clusters is None:
        return None
    top, random = evidence.clusters[-1], np.random.default_rng(0)
    counts = {name: cluster_sizes(top, times) for name, times in evidence.sets.items()}
    order = np.argsort(-counts["pool"], kind="stable")
    order = order[counts["pool"][order] > 0]
    parts = [note("Framed pictures are chosen. Clusters are those of the top level.")]
    shown = dict.fromkeys([*order[:CLUSTERS_SHOWN], *order[-CLUSTERS_SHOWN:]])
    for cluster in shown:
        rows = random.permutation(np.flatnonzero(top == cluster))
        is_chosen = evidence.chosen.times[rows] > 0
        rows = rows[np.argsort(~is_chosen, kind="stable")][:SHOWN]
        pool, chosen, drawn = (int(counts[name][cluster]) for name in NAMES)
        parts += [
            element("h3", f"Of {pool:,}: {chosen:,} chosen, {drawn:,} by the random draw"),
            _mosaic(evidence.chosen, rows),
        ]
    return joined(parts)


def _retrieved(chosen: Chosen) -> Html | None:
    similarity = chosen.array("similarity")
    if chosen.facts["by"] != "retrieve" or similarity is None:
        return None
    rows = np.flatnonzero(chosen.times)
    rows = rows[np.argsort(-similarity[rows], kind="stable")]
    parts, farthest = [], rows[SHOWN:][-SHOWN:]
    for word, some in (("Nearest", rows[:SHOWN]), ("Farthest", farthest)):
        if not len(some):
            continue
        low, high = similarity[some].min(), similarity[some].max()
        parts += [
            element("h3", f"{word}: cosine to a seed {low:.3f} to {high:.3f}"),
            _mosaic(chosen, some),
        ]
    return joined(parts)


def _twins(chosen: Chosen) -> Html | None:
    dropped = chosen.dropped()
    if not dropped:
        return None
    parts = [note("A framed one stayed; a twin without a frame is a copy of another.")]
    for reason, count in chosen.facts["dropped"].items():
        every = [each for each in dropped if each["reason"] == reason]
        some = [every[at * count // TWINS_SHOWN] for at in range(TWINS_SHOWN)]
        some = every if count <= TWINS_SHOWN else some
        parts.append(element("h3", f"{reason}: {count:,}, {len(some)} of them shown"))
        rows: list[list[Content]] = []
        for each in some:
            twin = each["duplicate_of"]
            pair = [each["row"]] + ([] if twin is None else [twin])
            names = joined([element("div", each["image"]), element("div", each["twin"])])
            alike = "" if twin is None else f"{each['similarity']:.3f}"
            rows.append([_mosaic(chosen, pair), names, alike])
        parts.append(table(["dropped, and its twin", "files", "similarity"], rows))
    return joined(parts)


def _how(chosen: Chosen) -> Html:
    def text(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    plain = {key: value for key, value in chosen.facts.items() if not isinstance(value, dict)}
    nested = {
        f"{key}: {name}": value
        for key, some in chosen.facts.items()
        if isinstance(some, dict)
        for name, value in some.items()
    }
    return facts((key, text(value)) for key, value in (plain | nested).items())


def _mosaic(chosen: Chosen, rows: Sequence[int] | Int64[np.ndarray, " rows"]) -> Html:
    """Small copies of images of the pool in one picture; chosen ones are framed."""
    count, reader = len(rows), Reader(limit_s=PICTURE_LIMIT_S)
    columns = min(count, COLUMNS)
    size = columns * CELL, -(-count // COLUMNS) * CELL
    canvas = Image.new("RGB", size, "white")
    for at, row in enumerate(int(row) for row in rows):
        inside = CELL - 2 * FRAME
        small = _small(chosen.pool, row, reader, inside)
        frame = COLOURS["chosen"] if chosen.times[row] else "white"
        corner = at % COLUMNS * CELL, at // COLUMNS * CELL
        canvas.paste(ImageOps.expand(small, FRAME, frame), corner)
    stream = io.BytesIO()
    canvas.save(stream, "PNG")
    stream.seek(0)
    source = embedded(stream, MOST_BYTES)
    return element("img", src=source, alt=f"{count} images", width=size[0], height=size[1])


def _small(pool: ImageIndex, row: int, reader: Reader, side: int) -> Image.Image:
    try:
        pixels = read_pixels(reader, pool.location(row), BACKGROUND)
    except OSError:
        return Image.new("RGB", (side, side), MISSING)
    return ImageOps.fit(Image.fromarray(pixels), (side, side), Image.Resampling.BILINEAR)
