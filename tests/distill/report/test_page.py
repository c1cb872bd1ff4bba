"""The page: complete, small, closed to markup of a run folder, and silent on the network."""

import base64
import hashlib
import io
import json
import re
import shutil
import socket
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.errors import UserError
from distill.report import page
from distill.report.hover import HOVER, pack, write_hover
from distill.report.page import MOST_BYTES, TITLES, write_page
from distill.runfolder.events import Event, note
from distill.runfolder.metrics import MetricsWriter
from distill.runfolder.progress import add_progress
from distill.runfolder.status import NetworkStatus, StatusFile, write_json
from tests.support.browser import BROWSER, browsing
from tests.support.command import Run
from tests.support.pictures import blob, picture
from tests.support.run_folders import scored_row, with_summary, write_run
from tests.support.status import ROW, STATUS

MARKUP = "\"'></text></style></script><script>document.title='ran'</script><img src=x onerror=alert(1)>\x1b[2J"
FILE_NAME = "<img src=x onerror=document.title='ran'>"  # without a slash: it names a file
DRAWN = frozenset(
    re.findall(
        r"\w+",
        "html head meta title style body main div span section h1 h2 h3 small p b table thead tbody tr th td "
        "dl dt dd details summary pre code img canvas figure figcaption script svg line polyline circle rect text",
    )
)


class Elements(HTMLParser):
    """Tags with their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.script = self.words = ""
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self._tag == "script":
            self.script += data
        else:
            self.words += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(*runs: Path, has_pictures: bool = True) -> Elements:
    out = runs[0].parent / "page.html"
    assert write_page(runs, out, has_pictures=has_pictures) == out.stat().st_size < MOST_BYTES
    return Elements(out.read_text())


def test_page__has_every_section_and_what_the_run_holds(tmp_path: Path) -> None:
    found = page_of(write_run(tmp_path / "mine"))
    assert [each["id"] for each in found.named("section")] == list(TITLES)
    for text in ("0.810", "0.350", "raw pixels", "6,400", "its loss is nan", "peak: 1.0e-3"):
        assert text in found.words, text
    assert "loss term koleo" in found.words and "ranks 0-1" in found.words
    labels = [each["aria-label"] for each in found.named("svg") if "aria-label" in each]
    assert labels.count("loss") == 2, "one of the teacher's stages, one of the family"
    names = [each["data-name"] for each in found.named("polyline")]
    assert {"teacher", "small", "tiny"} == set(names)
    strokes = {(each["data-name"], each["stroke"]) for each in found.named("polyline")}
    assert len(strokes) == 3, "one colour for each network in all charts"


def test_page__names_what_was_not_computed(tmp_path: Path) -> None:
    words = page_of(write_run(tmp_path / "mine")).words
    assert (
        "Summary line: not computed" in words
        and "Agreement with the teacher: not computed" in words
    )
    assert "by task and protocol: not computed" in words


def test_page__scores_over_the_steps_are_curves_of_every_student_and_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", picture=False)
    out = tmp_path / "page.html"
    write_page([run], out)
    assert "No scores over the steps: evaluate.every computes them" in out.read_text()
    add_progress(run, [scored_row(name, step) for name in ("small", "tiny") for step in (50, 100)])
    write_page([run], out)
    text = out.read_text()
    assert text.count('data-name="small"') == text.count('data-name="tiny"')
    title = "neighbours shared with the teacher, class features"
    chart = text[text.index(f'aria-label="{title}"') :].split("</svg>")[0]
    assert chart.count("<polyline") == 2 and "k-NN of held-out images" not in text
    assert chart.count("<circle") == 0
    write_page([run, write_run(tmp_path / "other", picture=False)], out)
    assert 'data-name="mine/small"' in out.read_text()


def test_page__shows_scores_agreement_and_the_summary_line_once_they_are_there(
    tmp_path: Path,
) -> None:
    scores = {
        "small": {"linear": {"value": 0.625, "interval": [0.5, 0.75], "protocol": "frozen"}},
        "teacher": {"linear": {"value": 0.875, "interval": None, "protocol": "frozen"}},
    }
    near = {"class": {"cka": 0.4321, "effective_rank": 12}, "patch": {"cka": 0.1234}}
    agreement = {
        "reference": "teacher",
        "images": 764,
        "part": "held_out",
        "k": 10,
        "chance": 0.0131,
        "networks": {"small": {**near, "untrained": near}},
        "floors": {"pixels": {"class": {"cka": 0.0111}}},
    }
    timed = {"megabytes": 0.25, "images_per_s": 777.0, "reason": ""}
    cost = {
        "device": "a CPU, 2 threads",
        "batch": 32,
        "choices": ["small"],
        "choice": "Take small.",
        "networks": {
            "small": {
                "size": 64,
                "parameters": 1000,
                "gflop": 0.5,
                "megabytes": 0.004,
                "latency_ms": {"1 thread": 1.25},
                "images_per_s": 321.0,
                "graphs": {
                    "onnx": {**timed, "latency_ms": {"1 thread": 0.875}, "knn": None},
                    "onnx int8": {**timed, "latency_ms": {"1 thread": 0.625}, "knn": 0.5},
                },
            }
        },
    }
    line = {"text": "small beats its floors", "reason": "0.81 against 0.35", "next": "train longer"}
    run = with_summary(
        write_run(tmp_path / "mine"), scores=scores, agreement=agreement, conclusion=line, cost=cost
    )
    words = page_of(run).words
    for text in (
        "0.500 to 0.750",
        "frozen",
        "teacher on 764 held-out",
        "0.432",
        "12.0",
        "0.011",
        "Take small.",
        "1.25",
        "small, onnx",
        "small, onnx int8",
        "0.875",
        "0.625",
        "777",
    ):
        assert text in words, text
    assert (
        "mine: small beats its floors" in words.replace("\n", "") and "Next: train longer" in words
    )
    assert "not computed" not in words


def test_page__of_a_run_in_progress(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", state="training", picture=False)
    words = page_of(run).words
    assert "State: training, in progress, family step 20, 73% done" in words
    assert "features.png is not there" in words and "before the end of the run" in words
    for file in run.rglob("*.json*"):
        file.write_bytes(file.read_bytes()[:20])  # as a crash leaves them
    assert "Could not be read: plan.json" in page_of(run).words
    shutil.rmtree(run)
    run.mkdir()
    assert "has not trained yet" in page_of(run).words


def test_page__of_two_runs_has_their_differences(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", peak="5.0e-4")]
    found = page_of(*runs)
    assert "2 keys differ" in found.words  # the name is the other one
    assert "schedule.lr.peak" in found.words and "0.0005" in found.words
    names = {each["data-name"] for each in found.named("polyline")}
    assert {"one/small", "two/small", "two/teacher"} <= names
    labels = [each["aria-label"] for each in found.named("svg") if "aria-label" in each]
    assert labels.count("loss") == 2, "the students of both runs are in the same chart"
    dashes = {each["data-name"]: each.get("stroke-dasharray") for each in found.named("polyline")}
    assert dashes["one/small"] != dashes["two/small"]


def test_pictures__are_pixels_only_and_can_be_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine")
    assert b"taken by somebody" in (run / "features.png").read_bytes()
    (image,) = page_of(run).named("img")
    kind, _, data = str(image["src"]).partition(",")
    assert kind == "data:image/webp;base64"
    embedded = base64.b64decode(data)
    assert b"somebody" not in embedded
    with Image.open(io.BytesIO(embedded)) as picture:
        assert picture.size == (300, 60) and not picture.getexif()
    assert not page_of(run, has_pictures=False).named("img")


def test_page__stays_small_whatever_the_run_holds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine")
    with MetricsWriter(run, "small") as writer:
        for step in range(6000):
            writer.write(replace(ROW, phase="family", step=step, loss=float(step % 97)))
    for index in range(1000):
        note(run, Event("skipped", "x" * 5000, f"network {index}"))
    (run / "recipe.yaml").write_text("# " + "x" * 1_000_000)
    Image.effect_noise((1700, 1300), 80).convert("RGB").save(run / "features.png")
    out = tmp_path / "page.html"
    assert write_page([run] * 3, out) < MOST_BYTES
    assert "The last 200 of 1,001 events" in out.read_text()


def test_page__that_would_be_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "mine")
    monkeypatch.setattr(page, "MOST_BYTES", 10_000)
    with pytest.raises(UserError, match="page of 1 runs would have") as refused:
        write_page([run], tmp_path / "page.html")
    assert "fewer runs" in refused.value.fix and not (tmp_path / "page.html").exists()


def write_hostile_run(folder: Path) -> Path:
    """A run folder of somebody else: every text of it is markup."""
    write_run(folder)
    phase = replace(STATUS.phases[-1], name=MARKUP, networks=(FILE_NAME,))
    networks = {FILE_NAME: NetworkStatus((0,), "parked")}
    status = replace(STATUS, phases=(phase,), phase=MARKUP, networks=networks, message=MARKUP)
    StatusFile(folder).write(status)
    with MetricsWriter(folder, FILE_NAME) as writer:
        writer.write(replace(ROW, phase=MARKUP, terms={MARKUP: 1.0}))
    note(folder, Event("skipped", MARKUP, MARKUP))
    (folder / "recipe.yaml").write_text(f"# {MARKUP.replace(chr(27), '')}")
    plan: dict[str, Any] = {"placements": {FILE_NAME: [0, 1]}, "slices": {FILE_NAME: [[1, 2]]}}
    plan |= {"image_s": {FILE_NAME: 0.1}, "teach_s": 0.1, "shares": [[1, 2]], "step_s": MARKUP}
    write_json(folder / "plan.json", {**plan, "notes": [MARKUP], "device": MARKUP})
    write_json(folder / "timing.json", {MARKUP: {"s": 1.0}})
    write_json(folder / "env.json", {"python": MARKUP, "platform": MARKUP})
    request = {"resume_command": MARKUP, "overrides": [MARKUP]}
    write_json(folder / "job.json", {"request": request, "data_fingerprint": MARKUP})
    entry = {"loss": 1.0, "knn": 0.5, "steps": MARKUP, "parked": {"step": 1, "reason": MARKUP}}
    return with_summary(
        folder,
        images={
            "train": 3,
            "remarks": [MARKUP],
            "lost_classes": [MARKUP],
            "passed_over": {MARKUP: 1},
        },
        students={FILE_NAME: entry, MARKUP: {**entry, "parked": None}},
        scores={MARKUP: {MARKUP: {"reason": MARKUP, "settings": {MARKUP: MARKUP}}}},
        agreement={
            "reference": MARKUP,
            "images": 3,
            "part": MARKUP,
            "k": MARKUP,
            "chance": 0.1,
            "networks": {MARKUP: {"untrained": {}}},
            "floors": {MARKUP: {}},
        },
        conclusion={"text": MARKUP, "reason": MARKUP, "next": MARKUP},
        knn_reason=MARKUP,
    )


def test_page__of_hostile_texts_holds_no_markup_of_theirs(tmp_path: Path) -> None:
    run = write_hostile_run(tmp_path / FILE_NAME)
    found = page_of(run, write_run(tmp_path / "good"))
    assert {tag for tag, _ in found.tags} <= DRAWN
    assert len(found.named("script")) == 1 and len(found.named("img")) == 2
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert not attributes.keys() & {"href", "action", "style"}, (tag, attributes)
    assert found.words.count("<script>document.title='ran'</script>") > 20, "shown as text"
    assert "\x1b" not in found.words and r"\x1b[2J" in found.words


def test_page__allows_no_script_but_the_one_it_has(tmp_path: Path) -> None:
    found = page_of(write_run(tmp_path / "mine"))
    (policy,) = [m["content"] for m in found.named("meta") if m.get("http-equiv")]
    digests = re.findall(r"'sha256-([^']+)'", str(policy))
    text = (tmp_path / "page.html").read_text()
    script = text.partition("<script>")[2].partition("</script>")[0]
    assert digests == [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()]
    for rule in ("default-src 'none'", "img-src data:", "connect-src 'none'", "form-action 'none'"):
        assert rule in str(policy)
    assert "unsafe" not in str(policy).replace("style-src 'unsafe-inline'", "")


def test_page__has_no_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    run = with_summary(
        write_run(tmp_path / "mine"), knn_reason="see /home/somebody/images", baselines={}
    )
    words = page_of(run).words
    assert f"{Path.cwd()}/" not in words and "distill train my.yaml" in words
    assert "somebody" not in words and "see ~/images" in words


def test_report__makes_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distill: Run
) -> None:
    run = write_run(tmp_path / "mine")

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr(socket, "create_connection", refused)
    ended = distill("report", str(run), "--json")
    assert (
        ended.code == 0 and json.loads(ended.out)["bytes"] == (run / "report.html").stat().st_size
    )


def test_report__names_what_it_wrote_and_what_is_wrong(tmp_path: Path, distill: Run) -> None:
    run, out = write_run(tmp_path / "mine"), tmp_path / "a.html"
    ended = distill("report", str(run), "-o", str(out), "--no-pictures")
    assert ended.code == 0 and ended.out.startswith(f"wrote {out} (")
    assert "<img" not in out.read_text()
    missing = distill("report", str(tmp_path))
    assert missing.code == 2 and "not a run folder" in missing.err
    nowhere = distill("report", str(run), "-o", str(tmp_path / "no" / "a.html"))
    assert nowhere.code == 2 and "no folder" in nowhere.err and "Fix: Make it first." in nowhere.err


def test_report__plots_as_many_pictures_as_are_wanted_first(
    tmp_path: Path, distill: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "mine")

    def replot(folder: Path, count: int) -> list[str]:
        write_hover(folder / HOVER, [(picture(0), [pack(blob(), "teacher")])] * count)
        return ["one line"]

    monkeypatch.setattr("distill.report.summary.replot_pictures", replot)
    found = distill("report", run, "--pictures", 3)
    assert (found.code, found.err) == (0, "one line\n")
    assert len(Elements((run / "report.html").read_text()).named("canvas")) == 3
    assert distill("report", run, "--pictures", 0).code == 2


LOSS = "document.querySelector('svg[aria-label=loss]')"


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_browser__shows_all_sections_without_an_error_or_a_request(tmp_path: Path) -> None:
    run, out = write_hostile_run(tmp_path / "hostile"), tmp_path / "page.html"
    there = "http://127.0.0.1:9"
    for text in (f"<img src={there}/a>", f"</style><link rel=stylesheet href={there}/b>"):
        note(run, Event("failed", text))
    write_page([run, write_run(tmp_path / "good")], out)
    with browsing(tmp_path / "profile") as tab:
        tab.open(f"file://{out}")
        sections = "[...document.querySelectorAll('section')].map((each) => each.id)"
        assert tab.value(sections) == list(TITLES)
        assert tab.value("document.title").endswith(" - distill")
        assert tab.value("[...document.images].every((each) => each.naturalWidth > 0)")
        assert tab.complaints() == [] and tab.requests() == [f"file://{out}"]
        # what a name could try had it become markup: the policy forbids it, and that shows here
        tab.value(
            f"document.body.insertAdjacentHTML('beforeend', '<img src={there}/c onerror=x()>')"
        )
        tab.value("new Promise((done) => setTimeout(done, 300))")
        assert "Content Security Policy" in str(tab.complaints())


def write_features(run: Path) -> list[np.ndarray]:
    """Features of two networks of one picture beside the picture of a run; the cosines of each pair of patches of the first."""
    patches = blob(12, 16, 6)
    write_hover(
        run / HOVER,
        [(picture(0, 24, 32), [pack(patches, "teacher"), pack(patches[:, :8] ** 2, MARKUP)])],
    )
    unit = torch.nn.functional.normalize(patches.flatten(0, 1), dim=-1)
    return list((unit @ unit.T).numpy())


def test_hover__is_close_to_the_features_and_small(tmp_path: Path) -> None:
    patches = torch.randn(64, 43, 8, generator=torch.Generator().manual_seed(0))
    packed = pack(patches[:32, :20], "x")
    rows = np.frombuffer(base64.b64decode(packed["data"]), np.int8).reshape(640, -1).astype(float)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    unit = torch.nn.functional.normalize(patches[:32, :20].flatten(0, 1), dim=-1).numpy()
    np.testing.assert_allclose(rows @ rows.T, unit @ unit.T, atol=0.03)
    large = pack(patches.repeat(1, 1, 50), "x")
    assert large["grid"] == [32, 22] and len(large["data"]) < 16_000


def test_hover__of_a_hostile_file_is_left_out_or_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine")
    write_features(run)
    found = page_of(run)
    assert len(found.named("canvas")) == 2 and MARKUP[:4] in found.words
    assert {name for name, _ in found.tags} <= DRAWN
    good = json.loads((run / HOVER).read_text())
    for damage in (
        {"networks": [{"grid": [9000, 9000], "data": "", "title": "x"}]},
        {"networks": [{"grid": [2, 2], "data": "AAA=", "title": "x"}]},
        {"networks": [{"grid": [2, 2], "data": '"><script>', "title": "x"}]},
        {"picture": "AAAA"},
        {"picture": 3},
    ):
        (run / HOVER).write_text(json.dumps([{**good[0], **damage}]))
        assert not page_of(run).named("canvas"), damage
    (run / HOVER).write_text("{")
    assert not page_of(run).named("canvas")
    write_features(run)
    assert not page_of(run, has_pictures=False).named("canvas")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_browser__compares_with_the_patch_under_the_mouse(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine")
    cosines = write_features(run)
    write_page([run], tmp_path / "page.html")
    with browsing(tmp_path / "profile") as tab:
        tab.open(f"file://{tmp_path / 'page.html'}")
        band = "document.querySelector('.hover')"
        assert tab.value(f"{band}.hidden") is False
        tab.value(f"{band}.scrollIntoView()")
        box = tab.value(
            f"(() => {{ const b = {band}.querySelector('img').getBoundingClientRect(); return [b.x, b.y, b.width, b.height] }})()"
        )
        pixels = (
            f"[...{band}.querySelector('canvas').getContext('2d').getImageData(0, 0, 16, 12).data]"
        )
        for row, column in ((4, 9), (0, 0)):
            x, y = box[0] + (column + 0.5) / 16 * box[2], box[1] + (row + 0.5) / 12 * box[3]
            tab.move_mouse(x, y)
            light = np.asarray(tab.value(pixels), float).reshape(-1, 4)[:, :3].sum(1)
            expected = cosines[row * 16 + column]
            assert light.argmax() in np.flatnonzero(expected > 0.97)
            assert np.corrcoef(light, expected)[0, 1] > 0.95
        complaints = [each for each in tab.complaints() if "willReadFrequently" not in str(each)]
        assert complaints == [], "but for this test, which reads the canvas again and again"
        assert tab.requests() == [f"file://{tmp_path / 'page.html'}"]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_browser__shows_the_values_under_the_mouse(tmp_path: Path) -> None:
    write_page([write_run(tmp_path / "mine")], tmp_path / "page.html")
    with browsing(tmp_path / "profile") as tab:
        tab.open(f"file://{tmp_path / 'page.html'}")
        tab.value(f"{LOSS}.scrollIntoView()")
        middle = f"(() => {{ const b = {LOSS}.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] }})()"
        tab.move_mouse(*tab.value(middle))
        step, curve = tab.value("document.getElementById('tip').textContent").split("\n")
        count = int(step.removeprefix("step "))
        assert count % 10 == 0 and 100 < count < 300
        name, value = curve.split("  ")
        assert name == "teacher" and float(value) == pytest.approx(9.0 - count / 100, abs=2e-3)
        tab.move_mouse(1, 1)
        assert tab.value("document.getElementById('tip').style.display") == "none"
