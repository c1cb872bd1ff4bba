"""The faults of ``python -m tests.chaos`` about state on disk and hostile files, a few of each."""

import importlib
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.runfolder.files import write_file
from distill.runfolder.manifest import checkpoints
from distill.runfolder.saver import CheckpointPolicy, Saver
from distill.runfolder.tensor_file import read_tensors
from tests.chaos import bitflips, crashpoints, fuzz, resume, saves
from tests.chaos.__main__ import KINDS
from tests.support.full_disk import small_files

MEMORY = Path("/dev/shm")  # where there is one, a sync costs nothing
SMALL_COUNTS = {"crashpoints": 12, "bitflips": 15, "fuzz": 80}


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(MEMORY if MEMORY.is_dir() else tmp_path))


@pytest.mark.parametrize("kind", SMALL_COUNTS)
def test_chaos__a_few_of_each(kind: str) -> None:
    assert kind in KINDS
    module = importlib.import_module(f"tests.chaos.{kind}")
    assert not module.run(["--count", str(SMALL_COUNTS[kind]), "--seed", "5"])


@pytest.mark.slow
def test_resume__on_as_many_ranks_and_on_others() -> None:
    assert not resume.run(["--layouts", "2,1", "--steps", "10"])


def test_resume__a_run_that_differs_is_found_out(capsys: pytest.CaptureFixture[str]) -> None:
    places = {(step, 0): step for step in range(10, 12)}
    names = ("plain", "gated", "conv")
    whole = resume.Trace({(name, step): 2.0 for name in names for step in (10, 11)}, places, {})
    near = {key: loss * (1 + 1e-8) for key, loss in whole.losses.items()}
    far = {key: loss * (1 + 1e-5) for key, loss in whole.losses.items()}
    assert resume.report(2, whole, whole, 2)
    assert resume.report(3, whole, resume.Trace(near, places, {}), 2)
    assert not resume.report(2, whole, resume.Trace(near, places, {}), 2)
    assert not resume.report(3, whole, resume.Trace(far, places, {}), 2)
    assert not resume.report(3, whole, resume.Trace(near, {**places, (10, 0): 9}, {}), 2)
    assert not resume.report(3, whole, resume.Trace(dict(list(near.items())[1:]), places, {}), 2)
    assert "samples DIFFER" in capsys.readouterr().out


def test_crashpoints__a_save_that_syncs_nothing_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write_in_place(path: Path, text: str) -> None:
        write_file(path, [text.encode()])

    monkeypatch.setattr("distill.runfolder.manifest.replace_text", write_in_place)
    monkeypatch.setattr(
        "distill.runfolder.manifest.rename", lambda source, target: source.rename(target)
    )
    monkeypatch.setattr("distill.runfolder.manifest.sync_folder", lambda folder: None)
    assert crashpoints.run(["--count", "20"])


def test_bitflips__a_manifest_that_nobody_checks_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distill.runfolder.manifest.find_damage", lambda folder, manifest: None)
    assert bitflips.run(["--count", "10"])


def test_fuzz__finds_what_raises_runs_or_takes_too_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(path: Path) -> None:
        kind = int(path.read_text())
        if kind == 0:
            raise KeyError("name")
        if kind == 1:
            __import__("os").system("true")
        if kind == 2:
            bytearray(300_000_000)[::4096] = b"x" * 73243

    def damage(folder: Path, draw: object) -> Path:
        numbers.append(len(numbers))
        path = folder / "file"
        path.write_text(str((numbers[-1] - 1) % 3))
        return path

    numbers: list[int] = []
    target = fuzz.Target("own", damage, read)
    monkeypatch.setattr(fuzz, "targets", lambda _: [target])
    assert fuzz.run(["--count", "4"])
    told = capsys.readouterr().out
    for problem in ("KeyError: 'name'", "it started something: os.system", "MB, more than"):
        assert problem in told
    monkeypatch.setattr(fuzz, "MOST_S", 0.0)
    numbers.clear()
    assert fuzz.run(["--count", "4"]) and "s, more than 0" in capsys.readouterr().out


@small_files()
def test_save__a_full_disk_is_one_line_and_old_checkpoints_stay(tmp_path: Path) -> None:
    assert saves.save(tmp_path, 10, keep=1).saved_steps == [10]
    told = saves.save(tmp_path, 20, keep=1, scale=10)
    assert told.saved_steps == [] and len(told.messages) == 1
    line = told.messages[0]
    assert line.startswith("checkpoint family-0000020 was not saved: rank 1 could not write large")
    assert "File too large" in line and "the checkpoints before it are kept" in line
    assert saves.loaded_step(tmp_path, []) == 10
    assert not list(tmp_path.glob(".*"))
    assert saves.save(tmp_path, 30, keep=1).saved_steps == [30]


def test_save__milestones_are_the_first_at_or_past_each_multiple(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        saves.save(tmp_path, step, keep=1, milestones=25)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["family-0000030", "family-0000050", "latest"]


def test_save__writes_over_the_memory_of_the_one_before(tmp_path: Path) -> None:
    """Its first touch takes many times longer than a copy into it."""
    placement = SimpleNamespace(name="small", first_rank=0)
    policy = CheckpointPolicy(tmp_path / "checkpoints", saves.HASH, {}, "name: tiny\n", 2, None)
    recorder: Any = saves.Teller()
    saver = Saver(policy, recorder, None)

    def phase(step: int, name: str = saves.PHASE) -> Any:
        return SimpleNamespace(
            name=name,
            world_rank=0,
            trainers=[saves.StudentTrainer("small", placement, step, 1)],
            plan=SimpleNamespace(placements=[placement], num_ranks=1),
            teacher=SimpleNamespace(anchor_state=dict),
        )

    memory = saver.prepare(phase(0))["small.safetensors"]
    for step in (1, 2):
        saver.save(phase(step), step)
        saver.wait()
        assert all(
            torch.equal(memory[n], each) for n, each in saves.state_of("small", step).items()
        )
    steps = []
    for path, _ in checkpoints(policy.folder):
        steps.append(int(read_tensors(path / "small.safetensors")["step"]))
    assert steps == [2, 1]
    assert saver.prepare(phase(0, "another"))["small.safetensors"] is not memory
