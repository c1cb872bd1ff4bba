"""A SLURM of two nodes on this machine, from Debian's packages and without installing them.

    python -m tests.support.slurm FOLDER      fetches the packages by apt-get and unpacks them there (once, 5 MB)
    DISTILL_TEST_SLURM=FOLDER pytest -m slow tests/test_slurm.py

Without the variable the programs are looked for on PATH. Several slurmd on one machine need a build of SLURM that
allows it, as Debian's does.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FOLDER = "DISTILL_TEST_SLURM"
PACKAGES = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge libmunge2 libhwloc15 liblua5.3-0 libfreeipmi17 libipmimonitoring6"
NODES = ("n1", "n2")
PROGRAMS = ("slurmctld", "slurmd", "slurmstepd", "sbatch", "srun", "scontrol", "sinfo", "scancel")
START_S = 30.0


@dataclass(frozen=True)
class Programs:
    """Where SLURM's programs, plugins and libraries are."""

    paths: dict[str, Path]
    plugins: Path
    libraries: tuple[Path, ...]


def fetch(folder: Path) -> None:
    """Unpacks the packages into a folder; nothing is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES.split()], cwd=folder, check=True)
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg", "-x", package.name, "."], cwd=folder, check=True)
        package.unlink()


def find() -> Programs | str:
    """The programs, or why there are none."""
    root = os.environ.get(FOLDER)
    places = [Path(root) / part for part in ("usr/sbin", "usr/bin")] if root else []
    searched = os.pathsep.join(
        [*map(str, places), *([] if root else [os.environ["PATH"], "/usr/sbin"])]
    )
    found = dict[str, Path]()
    for name in PROGRAMS:
        path = shutil.which(f"{name}-wlm", path=searched) or shutil.which(name, path=searched)
        if path is None:
            return f"no {name}: python -m tests.support.slurm FOLDER, then {FOLDER}=FOLDER"
        found[name] = Path(path)
    if os.geteuid() != 0:
        return "slurmd needs root"
    base = Path(root or "/")
    plugins = next(base.glob("usr/lib/*/slurm-wlm"), None)
    if plugins is None:
        return f"no plugins of Debian's SLURM in {base}"
    return Programs(found, plugins, (plugins.parent, plugins))


@dataclass(frozen=True)
class Cluster:
    """A running SLURM; ``environment`` is for its commands."""

    environment: dict[str, str]

    def call(self, *words: str, timeout_s: float = 60.0) -> str:
        """What a command prints; it must succeed."""
        done = subprocess.run(
            words,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def state_of(self, job: str) -> str:
        """The state of a job, such as RUNNING."""
        fields = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return next(field.partition("=")[2] for field in fields if field.startswith("JobState="))


@contextmanager
def cluster(programs: Programs, folder: Path) -> Iterator[Cluster]:
    """Starts a controller and two nodes; at the end no process of theirs is left."""
    for name in ("state", *NODES):
        (folder / name).mkdir()
    config = folder / "slurm.conf"
    config.write_text(_config(programs, folder))
    bins = {str(path.parent) for path in programs.paths.values()}
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, programs.libraries)),
        "SLURM_CONF": str(config),
        "PATH": os.pathsep.join([*sorted(bins), os.environ["PATH"]]),
    }
    stepd = str(programs.paths["slurmstepd"])
    commands = [[str(programs.paths["slurmctld"]), "-D", "-i", "-c"]]
    cpus = sorted(os.sched_getaffinity(0))
    for index, node in enumerate(NODES):  # its tasks inherit the one CPU
        pin = ["taskset", "--cpu-list", str(cpus[index % len(cpus)])]
        commands += [[*pin, str(programs.paths["slurmd"]), "-D", "-N", node, "-d", stepd]]
    started = list[subprocess.Popen[bytes]]()
    running = Cluster(environment)
    try:
        for index, command in enumerate(commands):
            with (folder / f"out.{index}").open("wb") as out:
                started.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=folder)
                )
        _wait_until_idle(running, folder)
        yield running
    finally:
        subprocess.run(
            ["scancel", "--user=root", "--signal=KILL", "--full"],
            env=environment,
            check=False,
            capture_output=True,
        )
        for each in reversed(started):
            each.send_signal(signal.SIGTERM)
        for each in started:
            try:
                each.wait(10)
            except subprocess.TimeoutExpired:
                each.kill()
                each.wait()


def _wait_until_idle(running: Cluster, folder: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%D %t"],
            env=running.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.stdout.split() == [str(len(NODES)), "idle"]:
            return
        logs = [path.read_text(errors="replace")[-500:] for path in sorted(folder.glob("out.*"))]
        assert time.monotonic() < deadline, (done.stdout, done.stderr, logs)
        time.sleep(0.2)


def _config(programs: Programs, folder: Path) -> str:
    host = socket.gethostname()
    ports = _free_ports(1 + len(NODES))
    nodes = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1"
        for node, port in zip(NODES, ports[1:], strict=True)
    ]
    return "\n".join(
        [
            "ClusterName=tests",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            "AuthType=auth/none",
            "CredType=cred/none",
            "SlurmUser=root",
            "SlurmdUser=root",
            f"StateSaveLocation={folder}/state",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/%n.pid",
            f"SlurmdSpoolDir={folder}/%n",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SwitchType=switch/none",
            "MpiDefault=none",
            "JobAcctGatherType=jobacct_gather/none",
            "SlurmdParameters=config_overrides",
            "ReturnToService=2",
            "KillWait=60",
            f"PluginDir={programs.plugins}",
            *nodes,
            f"PartitionName=tests Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP",
            "",
        ]
    )


def _free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
