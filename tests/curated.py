"""What a choice from a long-tailed heap is worth: copies found, evenness, and a student trained on it against a random part.

    python -m distill pretrain quickstart_teacher
    python -m tests.curated runs/quickstart-teacher FOLDER

Three seeds. The heap has tiles of the bundled photographs by a Zipf law with copies (``tests.support.long_tail``). Copies are
dropped, once by bytes and pixels and once by features too; then a balanced part is chosen of what the first left, beside a random
part of the heap of the same size, and a student is trained on each. Its k-NN is on tiles that the heap has not, up to ten of
each photograph; the teacher was trained on tiles of all photographs.
"""

import json
import sys
from pathlib import Path
from subprocess import run
from typing import Any

import numpy as np
import torch

from distill.curation.chosen import Chosen
from distill.curation.evidence import evidence_of
from distill.data.build_index import build_index
from distill.data.index import ImageIndex
from distill.protocols.images import Preparation, extract
from distill.protocols.knn import knn
from distill.protocols.score import mean_interval
from distill.weights.load import load_backbone
from tests.support.long_tail import PARTS, judge, origin, write_heap

SEEDS, STEPS, TARGET, K, EPS = (0, 1, 2), 200, 200, 5, 0.01
PREPARATION = Preparation(64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STUDENT = (
    "students=[{name: small, arch: vit, width: 64, depth: 3, heads: 2, patch: 8, layerscale: 0.5, "
    "head_widths: {dino_hidden: 256, ibot_hidden: 256}}]"
)
Row = dict[str, float]


def distill(*words: object) -> None:
    """Runs a command."""
    run([sys.executable, "-m", "distill", *map(str, words)], check=True)


def found_copies(folder: Path) -> Row:
    """Precision, recall by kind, and the share of dropped images whose twin is of the same photograph."""
    chosen = Chosen.open(folder)
    paths = [str(chosen.pool.location(row)) for row in range(len(chosen.pool))]
    twins, dropped = [-1] * len(paths), chosen.dropped()
    for each in dropped:
        twins[each["row"]] = each["duplicate_of"]
    same = [
        origin(paths[each["row"]]).split("/")[0]
        == origin(paths[each["duplicate_of"]]).split("/")[0]
        for each in dropped
    ]
    shares = {name: each.share for name, each in judge(paths, twins).items()}
    return {**shares, "same photograph": float(np.mean(same))}


def train(teacher: Path, folder: Path, name: str, source: Path, seed: int) -> Path:
    """Trains one student by the command line; its folder."""
    words = [f"teacher.weights={teacher}", "teacher.train=null", STUDENT, f"seed={seed}"]
    words += [f"data.sources=[{{path: '{source}'}}]", "data.held_out=0"]
    words += [f"schedule.steps={STEPS}", "--plain", "--fresh", "--name", name, "--out", str(folder)]
    distill("train", "quickstart", *words)
    return folder / name / "students" / "small"


def accuracy(network: Path, test: Path) -> float:
    """The share of test tiles whose photograph is that of most of their neighbours."""
    backbone, known, parts = load_backbone(network)[0], [], list[Any]()
    for part in PARTS:
        index: ImageIndex = build_index([test / part], max_bad_fraction=0.0)
        assert index.labels is not None
        known.append(torch.from_numpy(np.asarray(index.labels).astype(np.int64)))
        locations = [index.location(image) for image in range(len(index))]
        parts.append(extract(backbone, locations, PREPARATION, device=torch.device("cpu")))
    return knn(parts[0], known[0], parts[1], known[1])


def one_seed(teacher: Path, folder: Path, seed: int) -> dict[str, Row]:
    """All numbers of one heap."""
    folder.mkdir(parents=True, exist_ok=True)
    heap, test, emb = folder / "heap", folder / "test", folder / "embeddings"
    write_heap(heap, seed, test=test)
    distill("data", "embed", heap, "--with", teacher, "-o", emb)
    distill("data", "dedup", emb, "-o", folder / "unique")
    distill("data", "dedup", emb, "--semantic", EPS, "-o", folder / "unlike")
    words = ("--target", TARGET, "--seed", seed, "--among", folder / "unique")
    distill("data", "curate", emb, *words, "-o", folder / "curated")
    distill("data", "report", folder / "curated")
    index = build_index([heap], max_bad_fraction=0.0)
    drawn = np.random.default_rng(seed).permutation(len(index))[:TARGET]
    times = np.bincount(drawn, minlength=len(index)).astype(np.int64)
    index.subset(np.sort(drawn)).save(folder / "random" / "index")
    evidence = evidence_of(Chosen.open(folder / "curated"))
    rows = {name: found_copies(folder / name) for name in ("unique", "unlike")}
    for name, part in (("curated", evidence.chosen.times), ("random", times)):
        facts = evidence.facts(part)
        student = train(teacher, folder, f"run-{name}", folder / name, seed)
        rows[name] = {
            "evenness": facts.evenness or 0.0,
            "classes": float(facts.classes or 0),
            "k-NN": accuracy(student, test),
        }
    (folder / "rows.json").write_text(json.dumps(rows, indent=2))
    return rows


def main(teacher_run: Path, folder: Path) -> None:
    """Prints the numbers of every seed, and the mean difference of k-NN with its 95% interval (Student's t over the seeds)."""
    found = [one_seed(teacher_run / "teacher", folder / str(seed), seed) for seed in SEEDS]
    for name, row in found[0].items():
        for key in row:
            values = ", ".join(f"{rows[name][key]:.3f}" for rows in found)
            sys.stdout.write(f"{name} {key}: {values}\n")
    pairs = [rows["curated"]["k-NN"] - rows["random"]["k-NN"] for rows in found]
    low, high = mean_interval(torch.tensor(pairs, dtype=torch.float64))
    mean = float(np.mean(pairs))
    sys.stdout.write(f"k-NN, curated - random: {mean:+.3f} [{low:+.3f}, {high:+.3f}]\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
