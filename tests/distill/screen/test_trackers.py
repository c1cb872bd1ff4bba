"""Each tracker in its offline form: what is written is read back; a resume goes on in the same run."""

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from distill.errors import SetupError
from distill.screen import trackers
from tests.support.command import Run
from tests.support.run_folders import write_run


def needs(name: str) -> pytest.MarkDecorator:
    is_missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(is_missing, reason=f"{name} is not installed")


def log(run: Path, tracker: str, **environment: str) -> int:
    """``distill log`` in a process of its own, since trackers hold state; the rows that were handed over."""
    ended = subprocess.run(
        [sys.executable, "-m", "distill", "log", str(run), "--to", tracker, "--json"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    return int(json.loads(ended.stdout)["rows"])


def halves(run: Path) -> list[tuple[Path, str]]:
    """Cuts every metric file in half; the full texts."""
    texts = [(path, path.read_text()) for path in sorted((run / "metrics").glob("*.jsonl"))]
    for path, text in texts:
        lines = text.splitlines(keepends=True)
        path.write_text("".join(lines[: len(lines) // 2]))
    return texts


def log_twice(run: Path, tracker: str, **environment: str) -> None:
    """Hands half of the rows over, then the rest."""
    texts = halves(run)
    assert log(run, tracker, **environment) == 40
    for path, text in texts:
        path.write_text(text)
    assert log(run, tracker, **environment) == 40
    assert log(run, tracker, **environment) == 0


@pytest.mark.slow
@needs("tensorboard")
def test_tensorboard__is_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = write_run(tmp_path / "mine", picture=False)
    log_twice(run, "tensorboard")
    for network, first, last in (("teacher", 10, 400), ("small", 410, 600), ("tiny", 410, 600)):
        read = EventAccumulator(str(run / "tb" / network))
        read.Reload()
        scalars = read.Scalars("loss")
        assert [each.step for each in scalars] == list(range(first, last + 1, 10))
        assert scalars[0].value == pytest.approx(9.9 if network == "tiny" else 8.9)
        assert "term/koleo" in read.Tags()["scalars"]


BLOCK = 2**15


def wandb_steps(path: Path) -> list[int]:
    """Steps of the rows in an offline file, a log of LevelDB: blocks of records, some of them in parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, offset, parts, found = path.read_bytes(), 7, b"", list[int]()
    while offset + 7 <= len(data):
        if BLOCK - offset % BLOCK < 7:
            offset += BLOCK - offset % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in {1, 4}:  # all of a record, or its last part
            record = Record()
            record.ParseFromString(parts)
            items = {".".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            found += [int(items["train_step"])] if "train_step" in items else []
            parts = b""
    return found


@pytest.mark.slow
@needs("wandb")
def test_wandb__offline_goes_on_in_the_same_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", picture=False)
    log_twice(run, "wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    folders = sorted((run / "wandb").glob("offline-run-*"))
    ids = {folder.name.rpartition("-")[2] for folder in folders}
    stored = json.loads((run / "trackers" / "wandb.json").read_text())
    assert ids == {entry["id"] for entry in stored.values()} and len(ids) == 3
    steps = {name: list[int]() for name in ids}
    for folder in folders:
        (path,) = folder.glob("*.wandb")
        steps[folder.name.rpartition("-")[2]] += wandb_steps(path)
    counted = [
        sorted(steps[stored[name]["id"]], key=float) for name in ("teacher", "small", "tiny")
    ]
    assert counted == [list(range(10, 401, 10)), *[list(range(410, 601, 10))] * 2]


@pytest.mark.slow
@needs("mlflow")
def test_mlflow__is_read_back(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", picture=False)
    log_twice(run, "mlflow")
    with sqlite3.connect(run / "mlflow.db") as database:
        runs = dict(database.execute("select name, status from runs").fetchall())
        query = "select step from metrics join runs using (run_uuid) where name = ? and key = ?"
        steps = database.execute(query, ("mine/small", "loss")).fetchall()
    assert runs == dict.fromkeys(("mine/teacher", "mine/small", "mine/tiny"), "FINISHED")
    assert sorted(step for (step,) in steps) == list(range(410, 601, 10))


@pytest.mark.slow
@needs("trackio")
def test_trackio__is_read_back(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", picture=False)
    log_twice(run, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    (path,) = (tmp_path / "trackio").glob("mine*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select run_name, step from metrics").fetchall()
    assert len({name for name, _ in rows}) == 3
    assert sorted(step for name, step in rows if name.startswith("small")) == list(
        range(410, 601, 10)
    )


def test_log__names_a_tracker_that_is_not_known_or_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distill: Run
) -> None:
    run = write_run(tmp_path / "mine", picture=False)
    unknown = distill("log", str(run), "--to", "comet")
    assert unknown.code == 2 and "Give one of: tensorboard, wandb" in unknown.err

    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(trackers, "import_module", missing)
    absent = distill("log", str(run), "--to", "wandb")
    assert absent.code == SetupError.exit_code
    assert (
        "wandb is not installed" in absent.err
        and 'pip install "distill-family[wandb]"' in absent.err
    )
    assert distill("log", str(tmp_path), "--to", "wandb").code == 2
