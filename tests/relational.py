"""What the relational loss changes: the quickstart's family with and without it, from one teacher.

    python -m distill pretrain quickstart_teacher
    python -m tests.relational runs/quickstart-teacher FOLDER

Three seeds, without the loss and with both of its forms; differences are of pairs with the same seed. Scores: k-NN of the
summary, agreement of patches with the teacher, and the linear segmentation of mosaics.
"""

import json
import sys
from pathlib import Path
from subprocess import run
from typing import Any

import torch

from distill.data.build_index import build_index
from distill.protocols.images import Preparation, Scored, read_split, splits_of
from distill.protocols.knn import BASELINE_PX
from distill.protocols.mosaics import DenseProbe
from distill.protocols.score import mean_interval
from distill.weights.load import load_backbone

SEEDS, STEPS, K = (0, 1, 2), 150, 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ARMS = {
    "without": [],
    "softmax": ["objective.relational={form: softmax, weight: 1.0}"],
    "gram": ["objective.relational={form: gram, weight: 2.0}"],
}


def train(teacher: Path, folder: Path, name: str, words: list[str]) -> Path:
    """Trains one family by the command line; its run folder."""
    command = [sys.executable, "-m", "distill", "train", "quickstart", "--plain", "--fresh"]
    command += ["--name", name, "--out", str(folder), "teacher.train=null"]
    run([*command, f"teacher.weights={teacher}", f"schedule.steps={STEPS}", *words], check=True)
    return folder / name


def probe_of(tiles: Path) -> tuple[DenseProbe, Preparation]:
    """Mosaics of the quickstart's tiles."""
    preparation = Preparation(64, MEAN, STD)
    indices = [build_index([tiles / part], max_bad_fraction=0.0) for part in ("train", "held_out")]
    parts: list[Scored] = [
        read_split(each, BASELINE_PX, None).split for each in splits_of(*indices, K)[:2]
    ]
    return DenseProbe((parts[0], parts[1]), preparation, 8), preparation


def scores_of(folder: Path, probe: DenseProbe, preparation: Preparation) -> dict[str, float]:
    """k-NN, agreement of patches and mean IoU of every student of a run."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    found = {}
    for name, entry in summary["students"].items():
        backbone = load_backbone(folder / "students" / name)[0]
        found[f"{name} k-NN"] = entry["knn"]
        found[f"{name} patch agreement"] = summary["agreement"]["networks"][name]["patch"][
            "mutual_knn"
        ]
        found[f"{name} dense"] = probe.score(backbone, preparation)[0]
    return found


def main(teacher_run: Path, folder: Path) -> None:
    """Trains, scores and prints means of differences with 95% intervals (Student's t over the seeds)."""
    probe, preparation = probe_of(teacher_run.parent / ".photographs")
    scores = {
        arm: [
            scores_of(
                train(teacher_run / "teacher", folder, f"{arm}-{seed}", [*words, f"seed={seed}"]),
                probe,
                preparation,
            )
            for seed in SEEDS
        ]
        for arm, words in ARMS.items()
    }
    (folder / "scores.json").write_text(json.dumps(scores, indent=2))
    for key in scores["without"][0]:
        values = {
            arm: torch.tensor([each[key] for each in found], dtype=torch.float64)
            for arm, found in scores.items()
        }
        before = values.pop("without")
        for arm, after in values.items():
            low, high = mean_interval(after - before)
            mean = (after - before).mean()
            sys.stdout.write(
                f"{key}, without {before.mean():.3f}, {arm}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]\n"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
