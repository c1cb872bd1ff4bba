"""Each kind of fault with a small count, through the same commands that run it with a large one."""

import importlib

import pytest

RUNS = {
    "kills": "--count 2 --seed 1 --steps 30 --stage-steps 10",
    "hang": "--count 1 --limit 5",
    "nan": "--count 6",
    "corpus": "--count 1000 --entries 20000",
    "moments": "--count 1 --moments export",
    "soak": "--count 3 --steps 60 --kinds storage save signal",
    "steps": "--count 500",
    "watcher": "--nodes 16 --per-node 2 --seconds 20",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_chaos__every_claim_holds(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    failed = importlib.import_module(f"tests.chaos.{kind}").run(RUNS[kind].split())
    assert not failed, capsys.readouterr().out
