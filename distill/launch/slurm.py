"""The script that runs a job under SLURM: the command line that people type, with what a requeue needs."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from distill.errors import RecipeError
from distill.launch.submit import hand_over
from distill.runfolder.failure import LOST_EXIT_CODE

GRACE_S = 300  # from the signal to the end of the time limit
STARTS = 10  # after which a job that loses ranks is not started again
PLAIN = re.compile(r"[\w.,:/@%+=&|()\[\]*~-]+")  # of a value in a line that sbatch reads


@dataclass(frozen=True)
class SlurmJob:
    """What the script is made of; ``passed_on`` has options of sbatch such as ``partition``, by name."""

    name: str
    command: tuple[str, ...]
    run_folder: Path
    folder: Path  # the job's working folder
    nodes: int
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    container: str | None = None
    passed_on: dict[str, str] = field(default_factory=dict)
    grace_s: int = GRACE_S


def script_of(job: SlurmJob) -> str:
    """Returns the script for ``sbatch``: one task on each node, which starts the ranks of its GPUs.

    Raises:
        RecipeError: a value holds letters that a line of options cannot.
    """
    out = job.run_folder.parent / f"{job.run_folder.name}-%j.out"
    options = {
        "job-name": re.sub(r"[^\w.-]", "_", job.name),
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        "chdir": str(job.folder),
        "output": str(out),
        "open-mode": "append",
        "signal": f"TERM@{job.grace_s}",
    }
    if job.gpus_per_node is not None:
        options["gpus-per-node"] = str(job.gpus_per_node)
    if job.cpus_per_task is not None:
        options["cpus-per-task"] = str(job.cpus_per_task)
    options |= job.passed_on
    for name, value in options.items():
        if not PLAIN.fullmatch(value):
            raise RecipeError(
                f"--{name} {value!r}: a line of an sbatch script cannot hold it",
                fix="Use letters, digits and . , : / @ % + = & | ( ) [ ] * ~ - only, without spaces.",
            )
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items()]
    lines += ["#SBATCH --requeue"]
    lines += [] if job.cpus_per_task is not None else ["#SBATCH --exclusive"]
    status = shlex.quote(str(job.run_folder / "status.json"))
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "",
            shlex.join([*_srun(job), *job.command]),
            "code=$?",
            "# saved because the time was nearly over, or a rank was lost: queued again, and the same command goes on; scancel ends it for good",
            f'if {{ [ $code = 0 ] && grep -q \'"state": "stopped"\' {status}; }} ||',
            f'   {{ {{ [ $code = {LOST_EXIT_CODE} ] || [ $code -gt 128 ]; }} && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {STARTS} ]; }}; then',
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            "exit $code",
            "",
        ]
    )


def _srun(job: SlurmJob) -> list[str]:
    words = ["srun", "--kill-on-bad-exit=1"]
    is_shared = job.cpus_per_task is not None
    words += [f"--cpus-per-task={job.cpus_per_task}"] if is_shared else ["--cpu-bind=none"]
    if job.container is not None:
        folders = dict.fromkeys([str(job.folder), str(job.run_folder.parent)])
        words += [
            f"--container-image={job.container}",
            f"--container-mounts={','.join(f'{each}:{each}' for each in folders)}",
            f"--container-workdir={job.folder}",
        ]
    return words


def submit(script: str) -> str:
    """Hands the script to ``sbatch``; returns the id of the job.

    Raises:
        SetupError: there is no sbatch here, or it refuses the script.
    """
    words = ["sbatch", "--parsable"]
    printed = hand_over(script, words, look_at="squeue", correct="Correct the options.")
    return printed.partition(";")[0]
