"""A heap of which it is known what is a copy of what, and how copies that were found are judged."""

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.long_tail import COPIED, PARTS, Evidence, judge, kind_of, origin, write_heap


def test_write_heap__has_a_long_tail_and_copies_of_each_kind(tmp_path: Path) -> None:
    count = write_heap(tmp_path / "a", seed=0, tile=256, test=tmp_path / "test")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("t*"))
    assert len(files) == count
    kinds = Counter(kind_of(str(path)) for path in files)
    for kind in ("exact", "encoded", "cropped"):
        assert abs(kinds[kind] - COPIED * kinds[""]) < 4 * np.sqrt(0.16 * kinds[""])
    classes = Counter(path.parent.name for path in files if not kind_of(str(path)))
    sizes = sorted(classes.values(), reverse=True)
    assert len(classes) == 17 and sizes[0] > 7 * sizes[9]  # two are smaller than a tile
    bank, query = (len(list((tmp_path / "test" / part).rglob("*.png"))) for part in PARTS)
    assert query <= bank <= query + 17
    cropped = next(path for path in files if kind_of(str(path)) == "cropped")
    with Image.open(tmp_path / "a" / cropped) as picture:
        assert picture.size == (230, 230)


def test_judge__counts_copies_by_kind_and_drops_by_their_twins() -> None:
    paths = ["x/t1.png", "x/t1.exact.png", "x/t1.encoded.jpg", "x/t1.cropped.png", "x/t2.png"]
    assert [origin(path) for path in paths] == ["x/t1"] * 4 + ["x/t2"]
    # the tile gave way to its exact copy, the JPEG leads there through the tile; the other tile is no copy
    found = judge(paths, [1, -1, 0, -1, 3])
    assert found["exact"] == Evidence(1, 1) and found["encoded"] == Evidence(1, 1)
    assert found["cropped"] == Evidence(0, 1) and found["precision"] == Evidence(2, 3)
    assert Evidence(0, 0).share == 1.0
