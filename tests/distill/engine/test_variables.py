"""Variables of another launcher: half of them starts nothing, and the line to type is printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from distill.engine.variables import LaunchedRank, is_launched, launched_rank
from distill.errors import RecipeError
from tests.support.jobs import ENVIRONMENT, write_recipes

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
COMMAND = "distill train my.yaml"


def test_launched_rank__what_torchrun_sets() -> None:
    local = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for environment in (TORCHRUN, {**TORCHRUN, **local}, {**TORCHRUN, "LOCAL_RANK": "7"}):
        assert launched_rank(environment, COMMAND) == LaunchedRank(1, 2, "10.0.0.1", 29500)
    for address in ("::1", "fe80::1%eth0", "gpu_01.cluster", "localhost"):
        assert launched_rank({**TORCHRUN, "MASTER_ADDR": address}, COMMAND).address == address


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"WORLD_SIZE": None}, "RANK = 1, WORLD_SIZE not set, MASTER_ADDR = 10.0.0.1"),
        ({"RANK": None}, "RANK not set, WORLD_SIZE = 2, MASTER_ADDR = 10.0.0.1"),
        ({"MASTER_ADDR": ""}, "a rank of another launcher has RANK, WORLD_SIZE, MASTER_ADDR, MA"),
        ({"MASTER_PORT": None}, "MASTER_ADDR = 10.0.0.1, MASTER_PORT not set"),
        ({"RANK": "2"}, "RANK = 2, WORLD_SIZE = 2, .*: RANK goes from 0 to WORLD_SIZE - 1"),
        ({"RANK": "-1"}, "RANK is not an integer"),
        ({"RANK": "a\nb"}, r"^RANK = 'a\\nb', WORLD_SIZE = 2, .*: RANK is not an integer"),
        ({"MASTER_ADDR": "\x1b]52;c;x"}, r"MASTER_ADDR = '\\x1b]52;c;x'"),
        ({"MASTER_PORT": "٢"}, "MASTER_PORT is not an integer"),
        ({"RANK": "1" * 5000}, "RANK is not an integer"),
        ({"WORLD_SIZE": "٢"}, "WORLD_SIZE is not an integer"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is not an integer"),
        ({"MASTER_PORT": "70000"}, "ports go from 1 to 65535"),
        ({"MASTER_ADDR": "10.0.0.1:29500"}, "without a port"),
        ({"MASTER_ADDR": "tcp://gpu01"}, "MASTER_ADDR is a host name or an address"),
        ({"MASTER_ADDR": "a" * 70}, "MASTER_ADDR is a host name or an address"),
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK = one: LOCAL_RANK is not an integer"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "from 0 to LOCAL_WORLD_SIZE - 1"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE goes from 1 to WORLD_SIZE"),
        ({"RANK": "0", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is at most RANK"),
    ],
)
def test_launched_rank__half_set_variables(change: dict[str, str | None], told: str) -> None:
    environment = {k: v for k, v in {**TORCHRUN, **change}.items() if v is not None}
    assert is_launched(environment)
    with pytest.raises(RecipeError, match=told) as error:
        launched_rank(environment, COMMAND)
    assert error.value.exit_code == 2 and len(error.value.message) < 400
    line = re.search(r"(RANK=\d+ WORLD_SIZE=\d+ \S+ \S+) distill train my.yaml", error.value.fix)
    assert line is not None, error.value.fix
    typed = dict(word.split("=", 1) for word in line[1].split())
    assert launched_rank(typed, COMMAND).num_ranks == int(typed["WORLD_SIZE"])


def test_launched_rank__the_recipe_names_a_launcher_that_is_not_there() -> None:
    assert not is_launched({"LOCAL_RANK": "1", "MASTER_ADDR": "left"})
    with pytest.raises(RecipeError, match="RANK not set") as error:
        launched_rank({}, COMMAND)
    assert "distill train my.yaml engine.launcher=auto" in error.value.fix


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_train__half_set_variables_start_nothing(tmp_path: Path, name: str) -> None:
    recipe = write_recipes(tmp_path, stage_steps=11, steps=1, save_every=1000)
    command = [sys.executable, "-m", "distill", "train", str(recipe), "--out", str(tmp_path / "o")]
    ended = subprocess.run(
        command,
        env={**ENVIRONMENT, name: "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 2, ended.stderr
    assert f"{name} = 1" in ended.stderr and f"env -u {name} distill train" in ended.stderr
    assert not (tmp_path / "o").exists()
