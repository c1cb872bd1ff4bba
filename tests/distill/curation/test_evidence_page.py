"""The page about a choice: what it shows of each kind, and that it loads nothing."""

import base64
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from distill.curation.chosen import write_chosen
from distill.curation.evidence_page import CELL, COLOURS
from distill.data.build_index import build_index
from tests.distill.curation.test_evidence import classes
from tests.support.command import Run


def pictures(page: str) -> list[Image.Image]:
    """Those inside a page, in their order."""
    data = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB") for each in data]


def test_report__of_curate_frames_the_chosen_of_the_largest_and_rarest_clusters(
    tmp_path: Path, distill: Run
) -> None:
    index = build_index([classes(tmp_path / "in", {"a": 5, "b": 2})], max_bad_fraction=0.0)
    times, clusters = np.array([0, 0, 1, 0, 0, 1, 0]), np.array([[0] * 5 + [1] * 2], np.int32)
    arrays = {"clusters": clusters, "similarity": np.ones(7, np.float32)}
    write_chosen(tmp_path / "<b>", index, times, {"by": "curate", "target": 2}, arrays)
    (tmp_path / "in" / "b" / "1.png").unlink()
    result = distill("data", "report", tmp_path / "<b>")
    assert result.code == 0
    page = (tmp_path / "<b>" / "report.html").read_text()
    assert "<b>" not in page and "&lt;b&gt;" in page and "http" not in page.split("<main>")[1]
    assert re.findall(r"Of (\d): (\d) chosen", page) == [("5", "1"), ("2", "1")]
    largest, rarest = pictures(page)
    assert largest.size == (5 * CELL, CELL) and rarest.size == (2 * CELL, CELL)
    blue = np.array([int(COLOURS["chosen"][at : at + 2], 16) for at in (1, 3, 5)])
    frames = [np.asarray(largest)[30, at * CELL + 1].astype(int) for at in range(5)]
    is_framed = [bool(np.abs(each - blue).max() < 40) for each in frames]
    assert is_framed == [True, False, False, False, False]  # the chosen come first
    gone = np.asarray(rarest)[CELL // 2, CELL + CELL // 2].astype(int)
    assert gone[0] > 150 and gone[1] < 120  # a red cell stands for a picture that is gone
    assert "<td>1.000</td>" in page and "random, same size" in page
    missing = distill("data", "report", tmp_path / "<b>", "-o", tmp_path / "no" / "page.html")
    assert missing.code == 1 and "no folder" in missing.err


def test_report__of_dedup_has_twins_side_by_side_and_of_retrieve_the_nearest(
    tmp_path: Path, distill: Run
) -> None:
    index = build_index([classes(tmp_path / "in", {"a": 15})], max_bad_fraction=0.0)
    dropped = [
        {"row": row, "reason": "exact", "duplicate_of": 0, "similarity": 1.0}
        | {"image": f"x{row}.png", "twin": "x0.png"}
        for row in range(1, 14)
    ]
    dropped.append({"row": 14, "reason": "broken", "duplicate_of": None, "similarity": 0.0})
    dropped[-1] |= {"image": "y.png", "twin": None}
    facts = {"by": "dedup", "dropped": {"broken": 1, "exact": 13}}
    times = (np.arange(15) == 0).astype(np.int64)
    write_chosen(tmp_path / "out", index, times, facts, {}, dropped)
    assert distill("data", "report", tmp_path / "out", "-o", tmp_path / "a.html").code == 0
    page = (tmp_path / "a.html").read_text()
    assert "exact: 13, 12 of them shown" in page and "broken: 1, 1 of them shown" in page
    assert [each.size[0] // CELL for each in pictures(page)] == [1, *[2] * 12]
    assert "No labels" in page and "clusters" not in page.split("<main>")[1]
    similarity = {"similarity": np.linspace(0, 1, 15, dtype=np.float32)}
    write_chosen(tmp_path / "like", index, (times + 1).clip(0, 1), {"by": "retrieve"}, similarity)
    assert distill("data", "report", tmp_path / "like").code == 0
    page = (tmp_path / "like" / "report.html").read_text()
    assert "Nearest: cosine to a seed 0.000 to 1.000" in page and len(pictures(page)) == 1
