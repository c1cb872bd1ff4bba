"""Numbers are written, and requests agreed on, at the interval of the recipe."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from distill.engine.delayed_reduce import DelayedAllReduce
from distill.runfolder.requests import STOP, StopSaveRequests, leave_request
from distill.runfolder.status import PhaseStatus
from distill.train import recorder as module
from distill.train.phase import Phase
from distill.train.recorder import Recorder, RecordPolicy


def phase_of(num_steps: int, lookahead: int) -> Phase:
    """A phase without networks, with what a recorder looks at."""
    plan = SimpleNamespace(images_global=4, placements=())
    parts = {
        "name": "family",
        "trainers": (),
        "plan": plan,
        "num_steps": num_steps,
        "first_step": 0,
        "lookahead": lookahead,
        "schedule": SimpleNamespace(at=lambda _: None),
        "plan_schedule": SimpleNamespace(at=lambda _: plan),
        "loader": SimpleNamespace(wait_s=0.0),
        "exchange": SimpleNamespace(wait_s=0.0),
    }
    phase = object.__new__(Phase)
    for name, value in parts.items():
        object.__setattr__(phase, name, value)
    return phase


@pytest.fixture
def group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield dist.group.WORLD
    dist.destroy_process_group()


def steps_until_stop(
    folder: Path, group: Any, log_every: int, lookahead: int, step_s: float = 0.0
) -> tuple[list[int], int, Recorder]:
    """Steps at which the status was written, and the step of the stop that is requested at step 15."""
    requests = StopSaveRequests(folder)
    phases = [PhaseStatus("family", 40, 1.0, ())]
    policy = RecordPolicy(log_every, None, ())
    recorder = Recorder(folder, phases, requests, policy, "again", group)
    recorder._take_faults = lambda *_: None  # type: ignore[method-assign]  # of no network
    phase = phase_of(40, lookahead)
    recorder.start(phase, 0)
    written = []
    for step in range(1, 41):
        time.sleep(step_s)
        if step == 15:
            leave_request(folder, STOP)
            requests.look()
        decision = recorder.record(phase, step, list)
        if recorder.status.step == step:
            written.append(step)
        if decision.stop:
            return written, step, recorder
    return written, 0, recorder


@pytest.mark.parametrize(("log_every", "lookahead"), [(1, 0), (1, 2), (7, 0), (10, 2)])
def test_record__a_request_is_answered_at_the_interval_and_the_lookahead(
    log_every: int, lookahead: int, tmp_path: Path, group: Any
) -> None:
    written, stopped, _ = steps_until_stop(tmp_path, group, log_every, lookahead)
    assert written == list(range(log_every, stopped + 1, log_every))
    # a vote that is open when the request comes is answered first
    assert 15 + lookahead <= stopped <= 15 + max(1, 2 * lookahead) + log_every


@pytest.mark.parametrize(("lookahead", "most"), [(0, 2), (1, 2), (2, 4)])
def test_record__long_steps_answer_at_once_whatever_the_interval(
    lookahead: int, most: int, tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "VOTE_S", 0.01)
    written, stopped, recorder = steps_until_stop(tmp_path, group, 1000, lookahead, step_s=0.011)
    assert not written and 15 < stopped <= 15 + most
    assert recorder.status.message == f"stopping after family step {stopped}"
    recorder.saving()
    recorder.saved("family", stopped, "checkpoints/family")
    assert recorder._save_s is not None


def test_record__short_steps_vote_less_often(
    tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    votes = list[int]()
    start = DelayedAllReduce.start

    def counted(self: DelayedAllReduce, step: int, *rest: Any) -> None:
        votes.append(step)
        start(self, step, *rest)

    monkeypatch.setattr(DelayedAllReduce, "start", counted)
    steps_until_stop(tmp_path, group, 20, 0)
    assert votes[0] == 1 and 20 in votes and len(votes) < 10


def test_save_more__saves_are_due_at_both_intervals(tmp_path: Path, group: Any) -> None:
    phases = [PhaseStatus("family", 40, 1.0, ())]
    policy = RecordPolicy(5, None, [20])
    recorder = Recorder(tmp_path, phases, StopSaveRequests(tmp_path), policy, "again", group)
    recorder._take_faults = lambda *_: None  # type: ignore[method-assign]  # of no network
    recorder.save_more(None, None)
    recorder.save_more(None, 15)
    phase = phase_of(60, 0)
    recorder.start(phase, 0)
    saved = [step for step in range(1, 41) if recorder.record(phase, step, list).save]
    assert saved == [15, 20, 30, 40]
    recorder.save_more(0.0, None)  # by the clock, at every vote
    assert any(recorder.record(phase, step, list).save for step in range(41, 56))
