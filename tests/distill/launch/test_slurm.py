"""The script for sbatch: what it holds, that values cannot break out of it, and that a missing sbatch is one line."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from distill.errors import RecipeError, SetupError
from distill.launch.slurm import SlurmJob, script_of, submit

JOB = SlurmJob(
    name="my family",
    command=("python", "-m", "distill", "train", "my recipe.yaml", "a=[1, $(date)]"),
    run_folder=Path("/shared/runs/family"),
    folder=Path("/shared"),
    nodes=8,
    gpus_per_node=4,
    passed_on={"partition": "gpu", "constraint": "a100&ib"},
)


def test_script__has_what_a_requeue_needs_and_quotes_the_command() -> None:
    script = script_of(JOB)
    lines = script.splitlines()
    for option in (
        "nodes=8",
        "ntasks-per-node=1",
        "gpus-per-node=4",
        "signal=TERM@300",
        "open-mode=append",
        "job-name=my_family",
        "partition=gpu",
        "constraint=a100&ib",
        "requeue",
        "exclusive",
    ):
        assert f"#SBATCH --{option}" in lines
    assert "srun --kill-on-bad-exit=1 --cpu-bind=none python -m distill train 'my recipe.yaml' 'a=[1, $(date)]'" in lines  # fmt: skip
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("code", "state", "restarts", "is_again"),
    [
        (0, "finished", "", False),
        (0, "stopped", "30", True),
        (4, "failed", "", True),
        (137, "training", "9", True),  # a node was lost with its task
        (4, "failed", "10", False),
        (1, "failed", "", False),
        (2, "failed", "", False),
    ],
)
def test_script__queues_again_what_stopped_or_lost_a_rank(
    code: int, state: str, restarts: str, is_again: bool, tmp_path: Path
) -> None:
    (tmp_path / "status.json").write_text(f'{{\n  "state": "{state}"\n}}')
    for name, text in (("srun", f"exit {code}"), ("scontrol", f'echo "$@" > {tmp_path}/asked')):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    variables |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    done = subprocess.run(
        ["bash"], input=script_of(replace(JOB, run_folder=tmp_path)), text=True, env=variables
    )
    assert done.returncode == code
    asked = tmp_path / "asked"
    assert (asked.read_text() == "requeue 7\n") if is_again else not asked.exists()


def test_script__shares_a_node_and_runs_in_a_container() -> None:
    script = script_of(replace(JOB, cpus_per_task=16, container="nvcr.io#nvidia/pytorch:25.01"))
    assert "--exclusive" not in script and "srun --kill-on-bad-exit=1 --cpus-per-task=16" in script
    assert "--container-mounts=/shared:/shared,/shared/runs:/shared/runs" in script


@pytest.mark.parametrize("value", ["gpu\n#SBATCH --uid=0", "a b", "$(date)", ""])
def test_script__refuses_values_that_would_be_more_than_a_value(value: str) -> None:
    with pytest.raises(RecipeError, match=r"--partition .*: a line of an sbatch script"):
        script_of(replace(JOB, passed_on={"partition": value}))


def test_submit__returns_the_id_or_why_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="sbatch: not found, nothing was submitted"):
        submit("#!/bin/bash\n")
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\nread first; echo '81;cluster'\n")
    sbatch.chmod(0o755)
    assert submit("#!/bin/bash\n") == "81"
    sbatch.write_text("#!/bin/sh\necho 'invalid partition' >&2; exit 1\n")
    with pytest.raises(SetupError, match="sbatch refuses it: invalid partition"):
        submit("#!/bin/bash\n")
