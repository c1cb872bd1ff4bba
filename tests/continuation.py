"""What continued pretraining retains and changes: the quickstart's teacher goes on with drawings of its photographs.

    python -m distill pretrain quickstart_teacher
    python -m tests.continuation runs/quickstart-teacher FOLDER

Every third tile becomes a drawing (its edges, dark on white). Three seeds go on from the teacher, with the anchor and
without; old and new pictures are scored by k-NN and by the linear segmentation of mosaics. Differences are of pairs
with the same seed.
"""

import json
import sys
from pathlib import Path
from subprocess import run

import torch
from PIL import Image, ImageFilter, ImageOps

from distill.data.build_index import build_index
from distill.protocols.images import Preparation, Scored, extract, read_split, splits_of
from distill.protocols.knn import BASELINE_PX, knn
from distill.protocols.mosaics import DenseProbe
from distill.protocols.score import mean_interval
from distill.weights.load import load_backbone

EVERY, SEEDS, STEPS, K = 3, (0, 1, 2), 30, 20
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GRAM = "gram: {teacher: init, weight: 2.0, max_refreshes: 0, resolution: 2}"


def draw(tiles: Path, out: Path) -> None:
    """Writes every third tile as it is and as a drawing, under ``old`` and ``new``."""
    for index, path in enumerate(sorted(tiles.glob("*/*/*.png"))):
        if index % EVERY:
            continue
        with Image.open(path) as opened:
            tile = opened.convert("RGB")
        edges = ImageOps.invert(
            ImageOps.autocontrast(tile.convert("L").filter(ImageFilter.FIND_EDGES))
        )
        for kind, picture in (("old", tile), ("new", edges.convert("RGB"))):
            target = out / kind / path.relative_to(tiles)
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)


def go_on(teacher: Path, folder: Path, name: str, seed: int, *, has_anchor: bool) -> Path:
    """Trains one continuation by the command line; its teacher."""
    gram = f", {GRAM}" if has_anchor else ""
    words = [
        f"model.init={{from: '{teacher}', heads: beside}}",
        f"data.sources=[{{path: '{folder / 'new' / 'train'}'}}]",
        "data.held_out=0",
        f"stages=[{{name: base, steps: {STEPS}{gram}}}]",
        "schedule.lr={peak: 2.0e-4, warmup: 5}",
        "schedule.batch=32",
        "schedule.freeze_prototypes=0",
        f"seed={seed}",
        "engine.processes=2",
    ]
    command = [sys.executable, "-m", "distill", "pretrain", "quickstart_teacher", *words]
    run([*command, "--plain", "--name", name, "--out", str(folder), "--fresh"], check=True)
    return folder / name / "teacher"


def score(networks: dict[str, Path], folder: Path) -> dict[str, dict[str, float]]:
    """k-NN and mean IoU on old and new pictures."""
    preparation, found = Preparation(64, MEAN, STD), dict[str, dict[str, float]]()
    for kind in ("old", "new"):
        train, test = (
            build_index([folder / kind / part], max_bad_fraction=0.0)
            for part in ("train", "held_out")
        )
        splits = splits_of(train, test, K)
        parts: list[Scored] = [read_split(each, BASELINE_PX, None).split for each in splits[:2]]
        probe = DenseProbe((parts[0], parts[1]), preparation, 8)
        for name, path in networks.items():
            backbone = load_backbone(path)[0]
            known, query = (
                extract(backbone, each.locations, preparation, device=torch.device("cpu"))
                for each in parts
            )
            voted = knn(known, parts[0].labels, query, parts[1].labels)
            dense, _ = probe.score(backbone, preparation)
            found.setdefault(name, {}).update({f"{kind} k-NN": voted, f"{kind} dense": dense})
            sys.stdout.write(f"{name} {kind} k-NN {voted:.3f} dense {dense:.3f}\n")
    return found


def main(teacher_run: Path, folder: Path) -> None:
    """Trains, scores and prints means of differences with 95% intervals (Student's t over the seeds)."""
    draw(teacher_run.parent / ".photographs", folder)
    teacher = teacher_run / "teacher"
    networks = {"source": teacher}
    for seed in SEEDS:
        for word in ("free", "anchored"):
            name = f"{word}-{seed}"
            networks[name] = go_on(teacher, folder, name, seed, has_anchor=word == "anchored")
    scores = score(networks, folder)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2))
    for key, before in scores["source"].items():
        free, anchored = (
            torch.tensor([scores[f"{word}-{seed}"][key] for seed in SEEDS], dtype=torch.float64)
            for word in ("free", "anchored")
        )
        rows = {"free - source": free - before, "anchored - source": anchored - before}
        for what, values in (rows | {"anchored - free": anchored - free}).items():
            low, high = mean_interval(values)
            sys.stdout.write(
                f"{key}, source {before:.3f}, {what}: {values.mean():+.3f} [{low:+.3f}, {high:+.3f}]\n"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
