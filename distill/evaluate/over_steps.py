"""How a run's features changed while it trained: scores of the EMA in every checkpoint that was kept.

    k-NN    on class features of held-out images (``distill.protocols.knn``)
    dense   mean IoU of a linear segmentation from patch features (``distill.protocols.mosaics``)
    drift   mean squared change of patch similarities since the first checkpoint

Several runs side by side show what a change of the recipe does at equal steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill.errors import UserError
from distill.job.prepare import CHECKPOINTS, read_job
from distill.job.to_data import decoding_of
from distill.plan.from_recipe import ONLINE
from distill.protocols.images import Preparation, extract, read_split, read_splits
from distill.protocols.knn import BASELINE_PX, knn
from distill.protocols.mosaics import DenseProbe, drift
from distill.recipe.keys import TeacherRecipe
from distill.runfolder.manifest import checkpoints
from distill.runfolder.status import KNN_K, write_json
from distill.runfolder.tensor_file import SUFFIX
from students.shapes import BackboneSpec

PREFIX = "ema/backbone."


@dataclass(frozen=True)
class StepScores:
    """Scores after ``step`` steps of the run."""

    stage: str
    step: int
    knn: float
    dense: float
    drift: float


def score_steps(run_folder: Path, say: Callable[[str], None]) -> list[StepScores]:
    """Scores of the teacher in each kept checkpoint of a pretraining run, also written to ``progress.json``.

    Raises:
        UserError: no checkpoint of a teacher is there, or its images have no classes.
    """
    job = read_job(run_folder)
    recipe = job.recipe if isinstance(job.recipe, TeacherRecipe) else job.teacher_recipe
    found = [] if recipe is None else checkpoints_of(run_folder, recipe)
    if recipe is None or not found:
        raise UserError(
            f"{run_folder}: no checkpoint of a teacher in training",
            fix="Train with checkpoint.every=STEPS checkpoint.keep=N to keep some.",
        )
    train, test, reason = read_splits(run_folder, KNN_K, part="teacher")
    if reason:
        raise UserError(
            f"{run_folder}: {reason}", fix="Scores need labels, and images that are held out."
        )
    spec = recipe.model.backbone_spec()
    size, data = recipe.crops.input_size, recipe.data
    background = decoding_of(data).background
    preparation = Preparation(size, data.mean, data.std, background)
    train, test = (read_split(split, BASELINE_PX, background).split for split in (train, test))
    probe = DenseProbe((train, test), preparation, spec.stride)
    backbone, cpu = spec.build().eval(), torch.device("cpu")
    history: list[StepScores] = []
    first: Tensor | None = None
    for stage, step, path in found:
        backbone.load_state_dict(read_ema(path))
        known, query = (
            extract(backbone, split.locations, preparation, device=cpu) for split in (train, test)
        )
        dense, patches = probe.score(backbone, preparation)
        first = patches if first is None else first
        scores = StepScores(
            stage,
            step,
            knn(known, train.labels, query, test.labels),
            dense,
            drift(patches, first),
        )
        history.append(scores)
        say(
            f"{stage} step {step}: k-NN {scores.knn:.3f}, dense {dense:.3f}, drift {scores.drift:.4f}"
        )
    write_json(run_folder / "progress.json", [asdict(scores) for scores in history])
    return history


def checkpoints_of(run_folder: Path, recipe: TeacherRecipe) -> list[tuple[str, int, Path]]:
    """Stage, steps since the start of the run, and file of the teacher in each checkpoint, in order."""
    stages, file = {stage.name: stage for stage in recipe.stages}, ONLINE + SUFFIX
    found = [
        (manifest.phase, recipe.first_step(stages[manifest.phase]) + manifest.step, path / file)
        for path, manifest in checkpoints(run_folder / CHECKPOINTS)
        if manifest.phase in stages and file in manifest.files
    ]
    return sorted(found, key=lambda each: each[1])


def read_ema(path: Path) -> dict[str, Tensor]:
    """The EMA's backbone in a checkpoint's file; nothing else of it is read."""
    with safe_open(path, framework="pt") as file:
        return {
            name.removeprefix(PREFIX): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118  # not a mapping
            if name.startswith(PREFIX)
        }


def load_ema(path: Path, spec: BackboneSpec) -> nn.Module:
    """The EMA's backbone in a checkpoint's file, in evaluation mode."""
    backbone = spec.build().eval()
    backbone.load_state_dict(read_ema(path))
    return backbone


def plot_progress(runs: Mapping[str, Sequence[StepScores]], out: Path) -> Path:
    """``out``, now holding the three scores over the steps, a line per run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {
        "knn": "class features: k-NN, balanced accuracy",
        "dense": "patch features: linear segmentation, mean IoU",
        "drift": "patch similarities: change since the first point",
    }
    for axes, (key, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        for name, history in runs.items():
            values: list[Any] = [getattr(scores, key) for scores in history]
            axes.plot([m.step for m in history], values, marker="o", ms=3, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    return out
