"""Metric sinks that hand rows to a tracker: TensorBoard, W&B, MLflow, trackio. One run of the tracker per network.

They are ``distill.runfolder.metrics.MetricSink``, but no rank ever holds one: ``distill.screen.follower`` feeds them
from ``metrics/*.jsonl`` in a separate process, so that a tracker that hangs or raises costs nothing but its rows.
A tracker's run has the same id after a resume: it is stored in the run folder.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from distill.errors import SetupError
from distill.runfolder.metrics import MetricSink, MetricsRow

NUMBERS = ("loss", "grad_norm", "lr", "wait", "images_per_s", "skipped")
TB_FOLDER = "tb"  # in a run folder, as the folder that TensorBoard is started on


class TrackerSink(MetricSink, Protocol):
    """Takes the scores of a network too, which come later than the rows of their step."""

    def write_scores(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the scores after ``step`` steps."""
        ...


OpenTracker = Callable[[Path, str, str, int], TrackerSink]
"""Makes the sink of a run folder, a network, the stored id of the tracker's run, and the steps it has already."""


def values_of(row: MetricsRow) -> dict[str, float]:
    """The numbers of a row by name; terms of the loss as ``term/NAME``."""
    return {
        **{name: float(getattr(row, name)) for name in NUMBERS},
        **{f"term/{name}": value for name, value in row.terms.items()},
    }


class TensorBoardSink:
    """Event files in ``RUN/tb/NETWORK``; TensorBoard shows a folder's networks in the same charts."""

    def __init__(self, run_folder: Path, network: str, run_id: str, done_steps: int) -> None:  # noqa: ARG002
        """Opens one more event file."""
        writer = _package("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(str(run_folder / TB_FOLDER / network))

    def write(self, row: MetricsRow) -> None:
        """Adds the numbers at the step of the row."""
        for name, value in values_of(row).items():
            self._writer.add_scalar(name, value, row.step, walltime=row.time_unix)

    def write_scores(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the scores at their step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases, in a group named after the run; WANDB_MODE=offline sends nothing."""

    def __init__(self, run_folder: Path, network: str, run_id: str, done_steps: int) -> None:  # noqa: ARG002
        """Starts the run, or goes on with it."""
        self._run = _package("wandb").init(
            project="distill",
            group=run_folder.resolve().name,
            name=f"{run_folder.resolve().name}/{network}",
            id=run_id,
            resume="allow",
            reinit="create_new",  # a run of each network at the same time
            dir=str(run_folder),
            settings={"console": "off"},
        )
        self._run.define_metric("*", step_metric="train_step")

    def write(self, row: MetricsRow) -> None:
        """Logs the numbers."""
        self._run.log({**values_of(row), "train_step": row.step})

    def write_scores(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the scores; the charts have ``train_step`` as their axis."""
        self._run.log({**values, "train_step": step})

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class MlflowSink:
    """A run of MLflow in the experiment ``distill``; MLFLOW_TRACKING_URI names where, by default ``RUN/mlflow.db``."""

    def __init__(self, run_folder: Path, network: str, run_id: str, done_steps: int) -> None:
        """Starts the run, or goes on with it."""
        import os

        package = _package("mlflow")
        here = f"sqlite:///{run_folder.resolve() / 'mlflow.db'}"
        uri = os.environ.get("MLFLOW_TRACKING_URI", here)
        self._client, self._metric = package.tracking.MlflowClient(uri), package.entities.Metric
        found = self._client.get_experiment_by_name("distill")
        experiment = found.experiment_id if found else self._client.create_experiment("distill")
        name = f"{run_folder.resolve().name}/{network}"
        query = f"tags.distill_id = '{run_id}'"
        runs = self._client.search_runs([experiment], query)
        tags = {"distill_id": run_id, "mlflow.runName": name}
        self._run = runs[0] if runs else self._client.create_run(experiment, tags=tags)
        if runs and done_steps:
            self._client.set_terminated(self._run.info.run_id, "RUNNING")

    def write(self, row: MetricsRow) -> None:
        """Logs the numbers at the step of the row."""
        self._log(values_of(row), row.step, row.time_unix)

    def write_scores(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the scores at their step."""
        self._log(values, step, time.time())

    def _log(self, values: Mapping[str, float], step: int, unix: float) -> None:
        at = {"timestamp": int(unix * 1000), "step": step}
        metrics = [self._metric(name, value, **at) for name, value in values.items()]
        self._client.log_batch(self._run.info.run_id, metrics=metrics)

    def close(self) -> None:
        """Ends the run."""
        self._client.set_terminated(self._run.info.run_id)


class TrackioSink:
    """A run of trackio in the project of the run's name, on this machine; TRACKIO_DIR names where."""

    def __init__(self, run_folder: Path, network: str, run_id: str, done_steps: int) -> None:
        """Starts the run, or goes on with it."""
        resume = "must" if done_steps else "never"
        name = f"{network}-{run_id[:8]}"
        project = run_folder.resolve().name
        self._trackio = _package("trackio")
        self._run = self._trackio.init(
            project=project,
            name=name,
            resume=resume,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, row: MetricsRow) -> None:
        """Logs the numbers at the step of the row."""
        self._run.log(values_of(row), step=row.step)

    def write_scores(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the scores at their step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run, and the one that trackio would end, with a line on the screen, when Python does."""
        self._run.finish()
        with suppress(RuntimeError):  # none is left
            self._trackio.finish()


TRACKERS: Mapping[str, OpenTracker] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
    "trackio": TrackioSink,
}


def new_id() -> str:
    """An id for the run of a tracker."""
    return uuid.uuid4().hex[:16]


def _package(module: str, package: str = "") -> Any:
    """Imports the package of a tracker.

    Raises:
        SetupError: it is not installed.
    """
    package = package or module
    try:
        return import_module(module)
    except ImportError as error:
        raise SetupError(
            f"{package} is not installed ({error})",
            fix=f'Run `pip install "distill-family[{package}]"`; the metrics are in metrics/*.jsonl meanwhile.',
        ) from error
