"""Ranks that would train something else end the job before its first step, and the one that differs is named."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from distill.data.index import ImageIndex
from distill.errors import SetupError
from distill.job import agreement
from distill.job.agreement import FIXES, ROW_BYTES, _shortened, compare, facts_of, require_agreement
from distill.job.prepare import JobRequest, prepare, read_job
from distill.train.groups import make_control
from tests.distill.weights.test_teacher_files import write_teacher
from tests.support.jobs import write_images
from tests.support.spawn import on_ranks

RECIPE = """\
name: mine
teacher: {weights: teacher, heads: none}
students:
  - {name: theirs, arch: "my_networks:Net"}
  - {name: one, arch: vit, width: 16, depth: 1, heads: 2, patch: 8}
data: {sources: [images]}
crops: {global: {size: 32}, local: {count: 2, size: 16}}
schedule: {batch: 8, steps: 10, lr: {peak: 1.0e-3}}
engine: {device: cpu, processes: 2, precision: fp32}
"""
NETWORK = """\
import torch

class Net(torch.nn.Module):
    width, stride = 8, 8

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 8, 8)

    def forward(self, images):
        features = self.stem(images)
        return features.mean((2, 3)), features
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prepared run folder, with a student and a teacher from outside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    write_images(tmp_path / "images")
    write_teacher(tmp_path / "teacher", 0)
    (tmp_path / "my_networks.py").write_text(NETWORK)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    request = JobRequest("mine.yaml", (), "run", "")
    prepare(request, num_ranks=2, fresh=False, say=lambda _: None)
    return tmp_path / "run"


def differing(run: Path, before: dict[str, str]) -> set[str]:
    after = facts_of(read_job(run))
    return {key for key in FIXES if after.get(key) != before.get(key)}


def test_facts_of__change_with_what_a_node_reads(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = facts_of(read_job(run))
    assert set(before) == set(FIXES) - {"teacher.heads", "init"}
    assert differing(run, before) == set()

    teacher = next((run.parent / "teacher").glob("*.safetensors"))
    first = ImageIndex.load(run / "data/train").location(0)
    spoilt = {
        "teacher.weights": teacher,
        "images": Path(first.container) / first.name,
        "students' modules": run.parent / "my_networks.py",
    }
    for key, path in spoilt.items():
        held = path.read_bytes()
        path.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
        assert differing(run, before) == {key}
        path.unlink()
        assert differing(run, before) == {key}
        path.write_bytes(held)

    recipe = run / "recipe.resolved.yaml"
    held = recipe.read_bytes()
    recipe.write_bytes(held.replace(b"batch: 8", b"batch: 16"))
    assert differing(run, before) == {"recipe"}
    recipe.write_bytes(held)
    (run / "data").rename(run / "aside")
    assert differing(run, before) == {"index", "images"}
    (run / "aside").rename(run / "data")
    monkeypatch.setattr(agreement, "version", lambda _: "9.9")
    assert differing(run, before) == {"distill", "versions"}
    monkeypatch.undo()
    monkeypatch.setattr(agreement, "PACKAGES", ("distill", "teacher"))
    assert differing(run, before) == {"distill"}


def test_shortened__any_path_fits_into_a_row_and_differs_from_others() -> None:
    paths = ["/" + letter * 5000 + "/weights" for letter in "aé\\"]
    short = [_shortened(path) for path in paths]
    assert len({*short}) == len(paths) and all(text.endswith("/weights") for text in short)
    facts = dict.fromkeys(FIXES, max(short, key=lambda text: len(json.dumps(text))))
    assert len(json.dumps(["host" * 15, facts])) <= ROW_BYTES
    assert _shortened("/data/teacher, 1234") == "/data/teacher, 1234"


def test_compare__names_ranks_hosts_both_values_and_the_next_move() -> None:
    facts = {"distill": "0.2.0", "versions": "torch 2.13.0", "recipe": "aaa"}
    same = [("one", facts)] * 4
    compare(same)
    old = {**facts, "versions": "torch 2.12.0", "recipe": "bbb"}
    with pytest.raises(SetupError) as error:
        compare([*same, *[("two", old)] * 6, ("three", {})])
    assert error.value.message == (
        "distill is not the same on all ranks: rank 0 on one runs with 0.2.0, "
        "rank 10 on three with nothing that can be read"
    )
    with pytest.raises(SetupError) as error:
        compare([*same, *[("two", old)] * 6])
    assert error.value.message == (
        "versions is not the same on all ranks: rank 0 on one runs with torch 2.13.0, "
        "ranks 4, 5, 6, 7 and 2 more on two with torch 2.12.0"
    )
    assert error.value.fix == FIXES["versions"] and error.value.exit_code == 3
    with pytest.raises(SetupError, match="and 96 more groups"):
        compare([*same, *[(f"host{i}", old) for i in range(100)]])


def agree(run: Path) -> list[str]:
    control, found = make_control(timedelta(seconds=60)), []
    for packages in (("distill", "teacher"), ("distill",)):
        if dist.get_rank() == 1:
            agreement.PACKAGES = packages
        try:
            require_agreement(read_job(run), control)
        except SetupError as error:
            found.append(error.message)
        agreement.PACKAGES = ("distill", "teacher", "students")
        require_agreement(read_job(run), control)
    return found


@pytest.mark.slow
def test_require_agreement__every_rank_ends_with_the_same_line(run: Path) -> None:
    one, other = on_ranks(2, agree, run)
    assert one == other and len(one) == 2
    assert one[0].startswith("distill is not the same on all ranks: rank 0 on ")
