"""Does the evaluation measure what it is meant to: every task on made-up images whose right scores are known.

    images   two colours, 40 training images of each; of 20 held-out images of each, 4 lie in the other's folder.
             Every network can separate the colours, so that every right vote is known
    votes    k-NN, logistic regression, few-shot and linear probe: 1 - 4/20 = 0.8
    mAP      a held-out image in the right folder gets its n = 40 images first, 1; one in the wrong folder gets them
             last, (1/n) sum of i / (n + i)
    copies   of one network agree: mutual k-NN and CKA are 1
    norm     after the final norm of a network without training a class token has mean 0 and variance 1

Then two set-ups that are wrong, which the same scores must not survive: training images in random folders, and a
network without its final norm.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from distill.evaluate import dense_self_test
from distill.evaluate.files import evaluate_files
from distill.evaluate.scoring import Wanted
from distill.export.save import ExportFacts, write_backbone
from distill.protocols.images import Preparation, extract_all
from distill.protocols.map_set import PatchNetwork
from distill.protocols.score import Protocol
from distill.protocols.tasks import TASKS
from distill.weights.load import load_backbone
from teacher.shapes import ViTSpec

PX = 16
KNOWN, HELD_OUT, WRONG = 40, 20, 4  # images of each colour
COLOURS = {"blue": (40, 60, 200), "red": (200, 60, 40)}
NOISE = 12  # levels of grey; the colours differ by 160
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
TOLERANCE = 1e-6
NORM_TOLERANCE = 0.02  # of mean and variance: the norm adds its epsilon
SPEC = ViTSpec(width=32, depth=2, heads=2, ffn_width=64, patch=8, layerscale_init=1.0)


@dataclass(frozen=True)
class Check:
    """One figure and what it has to be; of a wrong set-up: what it must not be."""

    name: str
    expected: float
    found: float
    is_ok: bool
    is_wrong_setup: bool = False

    @property
    def line(self) -> str:
        """As it is printed."""
        relation = "caught: right is" if self.is_wrong_setup else "expected"
        return f"{'ok   ' if self.is_ok else 'FAIL '} {self.name}: {self.found:.4f}, {relation} {self.expected:.4f}"

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def self_test(say: Callable[[str], None], protocol: Protocol = "quick") -> list[Check]:
    """Every check; all are ok where the evaluation is right."""
    with TemporaryDirectory(prefix="distill-self-test-") as name:
        folder = Path(name)
        networks = [write_network(folder / each) for each in ("network", "copy")]
        wanted = Wanted(tuple(TASKS), protocol)
        cpu = torch.device("cpu")
        data = write_images(folder / "images")
        summary = evaluate_files(networks, data, wanted, say, device=cpu)
        checks = right_scores(summary)
        say("the same with training images in random folders")
        mixed = mix_folders(data, folder / "mixed")
        summary = evaluate_files(networks[:1], mixed, wanted, say, device=cpu)
        checks += [_missed(each) for each in right_scores(summary) if "agreement" not in each.name]
        return checks + norm_checks(networks[0]) + dense_checks(folder, say)


def dense_checks(folder: Path, say: Callable[[str], None]) -> list[Check]:
    """The tasks of patch features, by the protocol ``quick``: one network has to see a picture once."""
    network = write_network(folder / "dense", dense_self_test.SIDE)
    data = dense_self_test.write_dense(folder / "maps")
    say("pictures with maps and points")
    found = dense_self_test.found_scores(network, data, say)
    checks = [
        Check(f"{name} (quick)", right, found[name], dense_self_test.is_right(name, found[name]))
        for name, right in dense_self_test.RIGHT.items()
    ]
    setups = (
        ("masks reduced by nearest", dense_self_test.reduce_masks, ("seg",)),
        ("maps and points shuffled", dense_self_test.mix_maps, ("seg", "depth", "corr")),
        ("depth in another unit", dense_self_test.change_unit, ("depth RMSE",)),
    )
    for turn, (what, change, tasks) in enumerate(setups):
        say(f"the same with {what}")
        found = dense_self_test.found_scores(network, change(data, folder / f"wrong-{turn}"), say)
        for name, right in dense_self_test.RIGHT.items():
            if name.startswith(tasks):
                is_caught = not dense_self_test.is_right(name, found[name])
                title = f"{name} (quick), {what}"
                checks.append(Check(title, right, found[name], is_caught, is_wrong_setup=True))
    return checks


def right_scores(summary: dict[str, Any]) -> list[Check]:
    """The figures of a summary beside those that are right for the made-up images."""
    checks = []
    for task, entry in summary["scores"]["network"].items():
        right = right_score(task)
        found = entry.get("value", float("nan"))
        is_ok = abs(found - right) < TOLERANCE
        checks.append(Check(f"{task} ({entry.get('protocol', '-')})", right, found, is_ok))
    copy = summary["agreement"]["networks"].get("copy", {})
    for kind in ("class", "patch") if copy else ():
        for measure in ("mutual_knn", "cka"):
            found = copy[kind][measure]
            is_ok = abs(found - 1) < TOLERANCE
            checks.append(Check(f"agreement of two copies, {kind} {measure}", 1.0, found, is_ok))
    return checks


def right_score(task: str) -> float:
    """In closed form."""
    wrong = WRONG / HELD_OUT
    if task != "retrieval":
        return 1 - wrong
    last = sum(i / (KNOWN + i) for i in range(1, KNOWN + 1)) / KNOWN
    return 1 - wrong + wrong * last


def _missed(check: Check) -> Check:
    """The same figure of a wrong set-up: it is ok where it is not the right one."""
    name = f"{check.name}, training labels shuffled"
    return Check(name, check.expected, check.found, not check.is_ok, is_wrong_setup=True)


def norm_checks(network: Path) -> list[Check]:
    """Variance of class tokens over the width, with the final norm and without."""
    backbone, _ = load_backbone(network)
    images = torch.randint(256, (8, 3, PX, PX), generator=torch.Generator().manual_seed(0))
    checks = []
    for is_wrong in (False, True):
        if is_wrong:
            backbone.add_module("norm", nn.Identity())
        what = "without the final norm" if is_wrong else "with the final norm"
        for kind, spread in variances(backbone, images.to(torch.uint8)).items():
            is_right = abs(spread - 1) < NORM_TOLERANCE
            name = f"variance of {kind} {what}"
            checks.append(Check(name, 1.0, spread, is_right != is_wrong, is_wrong))
    return checks


def variances(backbone: nn.Module, images: Tensor) -> dict[str, float]:
    """Over the width, averaged over images: of class tokens and of the patch features that dense tasks read."""
    preparation, cpu = Preparation(PX, MEAN, STD), torch.device("cpu")
    rows = extract_all(backbone, [images], preparation, device=cpu).class_token
    patches = PatchNetwork(backbone, preparation, SPEC.patch, cpu).patches(images)
    return {
        kind: float(found.var(1, correction=0).mean())
        for kind, found in (("class tokens", rows), ("patch features", patches))
    }


def write_network(folder: Path, px: int = PX) -> Path:
    """A small ViT with initial weights, the same every time, that wants pictures of ``px``."""
    backbone = SPEC.build()
    SPEC.init_(backbone, torch.Generator().manual_seed(0))
    write_backbone(folder, backbone.state_dict(), SPEC, ExportFacts(px, MEAN, STD, {}))
    return folder


def write_images(folder: Path) -> Path:
    """The two colours in ``train`` and ``val``; of ``val`` some lie in the folder of the other colour."""
    random = np.random.default_rng(0)
    names = list(COLOURS)
    for part, count in (("train", KNOWN), ("val", HELD_OUT)):
        for turn, name in enumerate(names):
            for index in range(count):
                is_wrong = part == "val" and index < WRONG
                colour_folder = names[1 - turn] if is_wrong else name
                path = folder / part / colour_folder / f"{name}-{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = random.integers(-NOISE, NOISE + 1, (PX, PX, 3))
                pixels = np.array(COLOURS[name]) + noise
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def mix_folders(data: Path, folder: Path) -> Path:
    """The same images, those to learn from in either folder by chance, half and half."""
    shutil.copytree(data, folder)
    files: Sequence[Path] = sorted((folder / "train").glob("*/*.png"))
    order = np.random.default_rng(1).permutation(len(files))
    shutil.rmtree(folder / "train")
    for turn, index in enumerate(order):
        source = data / "train" / files[index].parent.name / files[index].name
        target = folder / "train" / list(COLOURS)[turn % 2] / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(source) as image:
            image.save(target)
    return folder
