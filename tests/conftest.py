import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.support.command import Result, Run, exit_code_of

# Their tests start whole jobs or many ranks: of two workers neither may end alone with one of them.
LONG_FILES = ("test_journeys.py", "test_pretraining.py", "test_ranks.py", "test_faults.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; within a file and between the others the order stays."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def distill(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line in this process: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")
    # no rank starts here, and a process has one fork server: that of tests.support.spawn
    monkeypatch.setattr("distill.engine.forkserver.choose_start_method", lambda _: "spawn")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DISTILL_ALLOW_CODE", "")  # what a command allows ends with the test

    def run(*words: object) -> Result:
        code = exit_code_of(*map(str, words))
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run
