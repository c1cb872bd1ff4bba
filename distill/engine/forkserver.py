"""Starts CPU ranks by fork from one server process that has imported what every rank needs.

    launcher -> fork server (imports torch, DeepSpeed, DALI and our packages once) -> ranks

A spawned rank pays for these imports itself, about six CPU-seconds each. GPU ranks are still
spawned: a process must not be forked once CUDA is in use.

The server is started with our packages' folder on its path and without the folder that the user stands
in, so that a user's ``teacher/`` or ``students.py`` is never taken for ours; the ranks then get the
launcher's search path. It ignores Ctrl-C and SIGTERM, and ends when the launcher and every rank have ended.
"""

import multiprocessing
import os
import signal
import site
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

from distill.engine.device import has_gpu
from distill.engine.engine import DEEPSPEED_MODULES

PRELOADED = ["distill.job.run", "distill.data.pipeline", *DEEPSPEED_MODULES]
ROOT = Path(__file__).parents[2]  # the folder that distill, students and teacher are imported from


def choose_start_method(engine_device: str) -> str:
    """Returns ``"spawn"`` where ranks use a GPU; elsewhere starts the fork server and returns ``"forkserver"``.

    ``engine_device`` is the recipe's ``engine.device``. Returns at once: the server imports meanwhile.
    """
    if has_gpu(engine_device):
        return "spawn"
    multiprocessing.set_forkserver_preload(PRELOADED)
    with _environment(_server_variables()), _ignoring_signals():
        forkserver.ensure_running()
    return "forkserver"


def _server_variables() -> dict[str, str]:
    """Environment variables of the server, which its ranks inherit."""
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    if str(ROOT) not in (*folders, *site.getsitepackages()):
        folders.insert(0, str(ROOT))
    variables = {"DS_ACCELERATOR": "cpu", "PYTHONSAFEPATH": "1"}
    return {**variables, "PYTHONPATH": os.pathsep.join(folders)} if folders else variables


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables while inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _ignoring_signals() -> Iterator[None]:
    """Ignores SIGINT, SIGTERM and SIGHUP while inside, which a process started here inherits; only the main thread may change that.

    They reach every process of a group at once. The launcher and the ranks answer them; without the server
    they would lose each other before anything is saved.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in ignored}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
