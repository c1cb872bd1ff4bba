"""``report.html``: one file that shows one run or several, opened from disk, printed, or attached to a mail.

It loads nothing and sends nothing: the policy in its head forbids every request, and every script but the one
whose hash it names, so a class name that slipped through as markup could not run.
"""

import base64
import hashlib
import io
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

from distill.errors import UserError
from distill.report.hover import HOVER, hover_parts
from distill.report.looks import SCRIPT, STYLE
from distill.report.markup import Html, element, escaped, joined, note
from distill.report.run_record import RunRecord, read_run
from distill.report.sections import (
    agreement,
    colours_of,
    conclusions,
    cost,
    data,
    events,
    family,
    recipes,
    repeat,
    time_text,
)
from distill.report.time_use import curves, over_steps, plan_and_measured, ranks
from distill.runfolder.files import replace_text

MOST_BYTES = 5_000_000  # what mail programs and reviewers still take
REPORT = "report.html"  # in a run folder
TITLES = {
    "summary": "Summary",
    "family": "Scores of the family",
    "agreement": "Agreement with the teacher",
    "curves": "Curves",
    "cost": "Score over size",
    "pictures": "PCA and cosine maps",
    "time": "Time per rank",
    "plan": "Plan and measurement",
    "events": "Events and faults",
    "data": "Images",
    "recipe": "Recipe",
    "repeat": "How to repeat it",
}
WIDTHS_PX = (1600, 1200, 900, 600)  # of a picture, tried until it fits


def write_page(folders: Sequence[Path], out: Path, *, has_pictures: bool = True) -> int:
    """Writes the page of one run or several, and returns its size in bytes.

    Raises:
        UserError: the page would be larger than ``MOST_BYTES``.
        OSError: it cannot be written.
    """
    text = make_page([read_run(folder) for folder in folders], has_pictures=has_pictures)
    size = len(text.encode())
    if size > MOST_BYTES:
        raise UserError(
            f"{out}: the page of {len(folders)} runs would have {size / 1e6:.1f} MB, at most {MOST_BYTES / 1e6:.0f}",
            fix="Name fewer runs, or add --no-pictures.",
        )
    replace_text(out, text)
    return size


def make_page(runs: Sequence[RunRecord], *, has_pictures: bool = True) -> str:
    """Returns the page as text."""
    body = make_body(runs, has_pictures=False)
    room = MOST_BYTES - len(body.text.encode()) - 100_000
    if has_pictures:
        body = make_body(runs, has_pictures=True, room_bytes=room)
    title = ", ".join(run.name for run in runs)
    return document(title, body, SCRIPT)


def document(title: str, body: Html, script: str, connects: str = "'none'") -> str:
    """Returns a page around its body; ``connects`` is where the script may connect to."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        f"connect-src {connects}; base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="viewport", content="width=device-width"),
        element("title", f"{title} - distill"),
        element("style", Html(STYLE)),
    )
    main = element("body", element("main", body), element("div", id="tip"))
    return f'<!doctype html>\n<html lang="en">{escaped(head)}\n{escaped(main)}\n<script>{script}</script></html>\n'


def make_body(
    runs: Sequence[RunRecord], *, has_pictures: bool, room_bytes: int = MOST_BYTES
) -> Html:
    """Returns all sections; ``room_bytes`` are left for pictures."""
    colour_of = colours_of(runs)
    parts = {
        "summary": conclusions(runs),
        "family": _each(runs, family),
        "agreement": joined([_each(runs, agreement), over_steps(runs, colour_of)]),
        "curves": curves(runs, colour_of),
        "cost": cost(runs, colour_of),
        "pictures": _pictures(runs, room_bytes) if has_pictures else note("Left out."),
        "time": _each(runs, lambda run: ranks(run, colour_of)),
        "plan": _each(runs, plan_and_measured),
        "events": _each(runs, events),
        "data": _each(runs, data),
        "recipe": recipes(runs),
        "repeat": _each(runs, repeat),
    }
    names = ", ".join(run.name for run in runs)
    heading = element("h1", names, element("small", f"as of {time_text(time.time())}"))
    sections = [
        element("section", element("h2", TITLES[key]), part, id=key) for key, part in parts.items()
    ]
    return joined([heading, *sections])


def _each(runs: Sequence[RunRecord], part: Callable[[RunRecord], Html]) -> Html:
    """The part of every run, under its name where there are several."""
    names = [element("h3", run.name) for run in runs] if len(runs) > 1 else [Html("")] * len(runs)
    return joined(joined([name, part(run)]) for name, run in zip(names, runs, strict=True))


def _pictures(runs: Sequence[RunRecord], room_bytes: int) -> Html:
    parts = []
    for run in runs:
        if len(runs) > 1:
            parts.append(element("h3", run.name))
        if run.picture is None:
            parts.append(note("features.png is not there: it is made at the end of a run."))
            continue
        source = embedded(run.picture, room_bytes // len(runs))
        label = f"{run.name}: PCA of patch features and similarity to the marked patch"
        if source is None:
            parts.append(note("features.png cannot be read, or does not fit."))
        else:
            parts.append(element("img", src=source, alt=label))
        bands = hover_parts(run.picture.with_name(HOVER), _small_address)
        room = room_bytes // len(runs) - len((source or "").encode())
        parts += _fitting(bands, room)
    parts.append(
        note(
            "Colours are three principal components, turned to one basis: the first network's. "
            "A cosine map shows what resembles the patch marked on the photograph, or the one under the mouse."
        )
    )
    return joined(parts)


def _fitting(bands: Sequence[Html], room_bytes: int) -> list[Html]:
    """As many of the first as have room."""
    sizes = accumulate(len(band.text.encode()) + 1 for band in bands)
    return [band for band, size in zip(bands, sizes, strict=True) if size < room_bytes]


def _small_address(stream: io.BytesIO) -> str | None:
    return embedded(stream, MOST_BYTES)


def embedded(path: Path | io.BytesIO, room_bytes: int) -> str | None:
    """Returns a picture as an address that holds its pixels and nothing else of the file; None where it cannot be read or has no room."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                pixels = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError):
        return None
    clean = Image.new("RGB", pixels.size)
    clean.paste(pixels)  # the pixels without EXIF, text and colour profile
    for width in WIDTHS_PX:
        small = clean.copy()
        small.thumbnail((width, 4 * width))
        stream = io.BytesIO()
        small.save(stream, "WEBP", quality=82, method=4)
        text = base64.b64encode(stream.getvalue()).decode()
        if len(text) < room_bytes:
            return f"data:image/webp;base64,{text}"
    return None
