"""Pictures with maps and key points, from the command line to the scores."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.evaluate import dense_self_test
from distill.evaluate.files import evaluate_files
from distill.evaluate.scoring import Wanted
from distill.evaluate.self_test import write_network
from distill.listing.decode import Rgb, decode_rgb
from distill.protocols import images, map_set
from distill.protocols.dense_tasks import open_dense
from tests.support.command import Run
from tests.support.scored_run import CPU

ALL = ("seg", "depth", "correspondence")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("network") / "vit", dense_self_test.SIDE)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return dense_self_test.write_dense(tmp_path / "data")


def test_eval__three_tasks_in_one_call_with_protocol_interval_and_resolution(
    network: Path, data: Path, distill: Run
) -> None:
    ended = distill(
        "eval",
        str(network),
        "--data",
        str(data),
        "--tasks",
        "agreement,seg,depth,correspondence",
        "--json",
    )
    assert ended.code == 0, ended.err
    scores = json.loads(ended.out)["scores"]["vit"]
    assert scores.keys() == set(ALL)
    assert scores["seg"]["value"] == pytest.approx(0.6, abs=1e-6)
    assert scores["correspondence"]["value"] == 0.75
    for entry in scores.values():
        assert entry["protocol"] == "quick" and "untrained" in entry
        low, high = entry["interval"]
        assert low - 1e-6 <= entry["value"] <= high + 1e-6
    assert scores["seg"]["settings"]["maps"] == "as stored, 64 x 48 px"


def test_evaluate_files__each_picture_is_decoded_once_and_no_mask_is_an_image(
    network: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: Counter[int] = Counter()

    def counted(encoded: np.ndarray, background: Rgb | None) -> np.ndarray:
        decoded[hash(encoded.tobytes())] += 1
        return decode_rgb(encoded, background)

    for path in (data / "images").rglob("*.png"):  # so that no two are the same
        with Image.open(path) as image:
            image.putpixel((0, 0), (int(path.stem), len(path.parent.name), 0))
        image.save(path)
    monkeypatch.setattr(images, "decode_rgb", counted)
    wanted = Wanted(("knn",), dense=ALL)
    summary = evaluate_files([network, network], data, wanted, lambda _: None, device=CPU)
    pictures = 24 + 8 + 2 * dense_self_test.PAIRS
    assert len(decoded) == pictures and set(decoded.values()) == {1}
    assert summary["images"] == {"train": 0, "images": 24 + 8}
    assert "left_out_of_scores" not in summary


def test_evaluate_files__maps_beside_pictures_of_class_folders(
    network: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "beside"
    for index, path in enumerate(sorted((data / "images").rglob("*.png"))):
        target = folder / ("odd" if index % 2 else "even") / f"{index}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.save(target, quality=95)
        mask = data / "masks" / path.relative_to(data / "images")
        target.with_suffix(".png").write_bytes(mask.read_bytes())
    wanted = Wanted(("knn",), dense=("seg",))
    summary = evaluate_files([network], folder, wanted, lambda _: None, device=CPU)
    assert sum(summary["images"].values()) == 32  # without the masks
    assert summary["scores"]["vit"].keys() == {"knn", "seg"}
    assert summary["scores"]["vit"]["seg"]["value"] == pytest.approx(0.6, abs=0.02)


def test_eval__what_cannot_be_scored_has_a_line_and_the_rest_is_scored(
    network: Path, data: Path, distill: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torn map, a mask of another size, points outside, a bad line, and no depth at all."""
    (data / "masks" / "train" / "0.png").write_bytes(b"torn")
    with Image.open(data / "masks" / "train" / "1.png") as mask:
        mask.resize((32, 24), Image.Resampling.NEAREST).save(data / "masks" / "train" / "1.png")
    lines = (data / "pairs.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    first["points"][0][2] = 1000
    lines[:1] = [json.dumps(first), "no pair"]
    (data / "pairs.jsonl").write_text("\n".join(lines))
    for path in (data / "depth").rglob("*.*"):
        path.unlink()
    ended = distill(
        "eval",
        str(network),
        "--data",
        str(data),
        "--tasks",
        "seg,depth,correspondence,nonsense",
        "--json",
    )
    assert ended.code == 2 and "--tasks nonsense: not known" in ended.err
    summary = json.loads(ended.out)
    scores = summary["scores"]["vit"]
    assert scores["seg"]["value"] == pytest.approx(0.6, abs=1e-6)
    assert scores["correspondence"]["value"] == 0.75
    assert scores["depth"] == {"reason": f"{data}: no picture has a depth map (.npy or .png)"}
    reasons = {Path(each["sample"]).name: each["reason"] for each in summary["left_out_of_scores"]}
    assert "not an image" in reasons["0.png"]
    assert reasons["1.png"].startswith("is 32 x 24 px, its picture 64 x 48 px")
    assert reasons["pairs.jsonl:2"].startswith("not as {")
    assert "lies outside of [64, 48] and [64, 48] px" in reasons["0-b.png"]


def test_eval__of_a_run_maps_have_to_be_given(run_folder: Path, distill: Run) -> None:
    (run_folder / "job.json").touch()
    ended = distill("eval", str(run_folder), "--tasks", "seg,knn")
    assert "--tasks seg: give its pictures with --data SRC" in ended.err
    assert ended.code != 0


def test_open_dense__without_torchmetrics_key_points_are_scored(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(map_set, "find_spec", lambda _: None)
    opened = open_dense(ALL, data, "quick", None)
    assert opened.tasks.keys() == {"correspondence"} and opened.reasons.keys() == {"seg", "depth"}
    assert opened.reasons["seg"].startswith("wants torchmetrics: pip install")


def test_open_dense__no_pair_can_be_used(tmp_path: Path) -> None:
    pair = {"a": "a.png", "b": "b.png", "points": [[1, 1, 1, 1]]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    opened = open_dense(("correspondence",), tmp_path, "quick", None)
    assert opened.reasons == {"correspondence": "1 pairs of pictures, none that can be used"}


def test_open_dense__a_published_training_counts_its_pictures(data: Path) -> None:
    opened = open_dense(("seg",), data, "dinov3", None)
    assert opened.tasks["seg"].pictures == 40_000 * 16 + 8
