"""Numbers are written, and requests agreed on, at the interval of the recipe."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from distill.runfolder.requests import STOP, StopSaveRequests, leave_request
from distill.runfolder.status import PhaseStatus
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


@pytest.mark.parametrize(("log_every", "lookahead"), [(1, 0), (1, 2), (7, 0), (10, 2)])
def test_record__a_request_is_answered_at_the_interval_and_the_lookahead(
    log_every: int, lookahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        requests = StopSaveRequests(tmp_path)
        group: Any = dist.group.WORLD
        phases = [PhaseStatus("family", 40, 1.0, ())]
        policy = RecordPolicy(log_every, None, ())
        recorder = Recorder(tmp_path, phases, requests, policy, "again", group)
        monkeypatch.setattr(recorder, "_take_faults", lambda *_: None)  # of no network
        phase = phase_of(40, lookahead)
        recorder.start(phase, 0)
        written, stopped = [], 0
        for step in range(1, 41):
            if step == 15:
                leave_request(tmp_path, STOP)
                requests.look()
            decision = recorder.record(phase, step, list)
            if recorder.status.step == step:
                written.append(step)
            if decision.stop:
                stopped = step
                break
    finally:
        dist.destroy_process_group()
    assert written == list(range(log_every, stopped + 1, log_every))
    # a vote that is open when the request comes is answered first
    assert 15 + lookahead <= stopped <= 15 + 2 * lookahead + log_every
