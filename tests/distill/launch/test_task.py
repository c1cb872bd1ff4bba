"""A task becomes a rank by variables, or starts ranks, passes signals on and has their exit code."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from distill.errors import SetupError
from distill.launch import task
from distill.launch.task import run_as_task, run_ranks
from distill.recipe.keys import EngineSpec

STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "localhost,other",
}
COMMAND = "distill train my.yaml"
CPU = EngineSpec(device="cpu")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that the end of the test removes what the task sets
        monkeypatch.delenv(name)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_run_as_task__is_a_rank_and_says_so_once(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_as_task(COMMAND, None, lambda: CPU) is None
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "2")
    assert os.environ["MASTER_ADDR"] == "localhost"
    assert "SLURM: 2 tasks, 1 on this node, each is a rank" in capsys.readouterr().err
    assert run_as_task(COMMAND, None, lambda: CPU) is None  # it is a rank by now
    assert capsys.readouterr().err == ""


def test_run_as_task__starts_the_ranks_of_its_node(environment: pytest.MonkeyPatch) -> None:
    started = []
    environment.setattr(task, "run_ranks", lambda *given: started.append(given) or 7)
    assert run_as_task(COMMAND, 3, lambda: CPU) == 7
    (_, variables, _) = started[0]
    assert [each["RANK"] for each in variables] == ["0", "1", "2"]
    assert {each["WORLD_SIZE"] for each in variables} == {"6"}
    assert "RANK" not in os.environ


def test_run_as_task__a_host_without_an_address(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SLURM_STEP_NODELIST", "no-such-host.invalid,other")
    with pytest.raises(SetupError, match=r"no-such-host\.invalid, the host of rank 0") as error:
        run_as_task(COMMAND, None, lambda: CPU)
    assert "MASTER_ADDR=10.0.0.1 srun" in error.value.fix


def test_run_ranks__the_first_failure_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "ENDS_S", 0.5)
    code = "import os, sys, time; time.sleep(60) if os.environ['RANK'] == '0' else sys.exit(4)"
    began = time.monotonic()
    assert run_ranks([sys.executable, "-c", code], [{"RANK": "0"}, {"RANK": "1"}]) == 4
    assert time.monotonic() - began < 30
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_ranks([sys.executable, "-c", kill], [{"RANK": "0"}]) == 128 + signal.SIGKILL


def test_run_ranks__a_signal_to_stop_reaches_every_rank(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        f"open(r'{tmp_path}/' + os.environ['RANK'], 'w').close()\n"
        "time.sleep(60); sys.exit(9)"
    )

    def stop_when_ready() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_ready, daemon=True).start()
    assert run_ranks([sys.executable, "-c", code], [{"RANK": "0"}, {"RANK": "1"}]) == 0


def test_run_ranks__a_stopped_rank_has_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "ENDS_S", 0.0)  # the other one would be killed
    code = "import os, sys, time; time.sleep(float(os.environ['WAIT'])); sys.exit(75)"
    both = [{"WAIT": "0"}, {"WAIT": "1.5"}]
    assert run_ranks([sys.executable, "-c", code], both, 75) == 75
    assert run_ranks([sys.executable, "-c", "import sys; sys.exit(75)"], [{}]) == 75
    assert (
        run_ranks(
            [sys.executable, "-c", "import os, sys; sys.exit(int(os.environ['C']))"],
            [{"C": "75"}, {"C": "4"}],
            75,
        )
        == 4
    )
