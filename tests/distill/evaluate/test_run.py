import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data.build_index import build_index
from distill.data.index import ImageIndex
from distill.errors import UserError
from distill.evaluate.run import evaluate_run, network_folders
from distill.evaluate.scoring import Wanted
from distill.listing.decode import Rgb, decode_rgb
from distill.protocols.images import (
    BF16_FROM,
    Extracted,
    extract_all,
    scoring_dtype,
)
from tests.support.scored_run import (
    CPU,
    write_run,
    write_splits,
)


def test_evaluate_run__scores_everything_and_keeps_the_rest(run_folder: Path) -> None:
    (run_folder / "summary.json").write_text(
        json.dumps(
            {
                "students": {"vit": {"loss": 2.5}},
                "images_per_s": 150.0,
                "phases_s": {"base": 12.0},
                "knn_reason": "of an earlier evaluation",
            }
        )
    )
    told: list[str] = []
    summary = evaluate_run(run_folder, told.append)
    assert json.loads((run_folder / "summary.json").read_text()) == summary
    fresh = {"teacher", "students", "baselines", "agreement", "scores", "conclusion"}
    assert summary.keys() == {*fresh, "images_per_s", "phases_s"}
    assert summary["students"].keys() == {"vit", "conv"}
    assert summary["students"]["vit"]["loss"] == 2.5
    assert summary["students"]["conv"]["loss"] is None
    assert summary["baselines"].keys() == {"pixels", "colour", "untrained"}
    assert summary["baselines"]["untrained"].keys() == {"teacher", "vit", "conv"}
    assert summary["baselines"]["colour"] == 1.0
    # the exported networks learned nothing either, but their seed is another one
    assert 0.0 <= summary["teacher"]["knn"] <= 1.0
    assert summary["teacher"]["knn"] == summary["students"]["vit"]["knn"]
    assert len(told) == 6 and "colours" in told[1] and "teacher" in told[2]
    assert evaluate_run(run_folder) == summary


def test_evaluate_run__damage_behind_a_good_header_is_left_out_and_named(
    run_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In sets of more than 20,000 only headers were read; a file that vanished since is treated alike."""
    whole = evaluate_run(run_folder)
    folder = tmp_path_factory.mktemp("damaged")
    for part in ("train", "held_out"):
        place = ImageIndex.load(run_folder / "data" / part).containers[0][1]
        shutil.copytree(place, folder / part)
        extra = folder / part / "blue" / "damaged.png"
        shutil.copy(folder / part / "blue" / "0.png", extra)
        build_index([folder / part], max_bad_fraction=0.0).save(run_folder / "data" / part)
        data = extra.read_bytes()
        extra.write_bytes(data[:200] + bytes(50) + data[250:])
    (folder / "held_out" / "blue" / "damaged.png").unlink()
    summary = evaluate_run(run_folder)
    left_out = summary.pop("left_out_of_scores")
    assert [Path(each["sample"]).parts[-3] for each in left_out] == ["train", "held_out"]
    assert left_out[1]["reason"] == "no such file" and left_out[0]["reason"]
    assert summary == whole


def test_evaluate_run__a_source_that_is_gone_ends_it(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            tile = np.full((16, 16, 3), 20 * number, np.uint8)
            Image.fromarray(tile).save(folder / name / f"{number}.png")
    for part in ("train", "held_out"):
        build_index([folder], max_bad_fraction=0.0).save(run_folder / "data" / part)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="source: the source is gone"):
        evaluate_run(run_folder)


def test_evaluate_run__in_bf16_where_told_or_where_a_large_network_is_on_a_gpu(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scoring_dtype(BF16_FROM, torch.device("cuda")) == torch.bfloat16
    assert scoring_dtype(BF16_FROM - 1, torch.device("cuda")) == torch.float32
    assert scoring_dtype(BF16_FROM, CPU) == torch.float32
    assert scoring_dtype(BF16_FROM, torch.device("cuda"), "fp32") == torch.float32
    in_fp32 = evaluate_run(run_folder)
    seen = []

    def extract(*args: Any, dtype: torch.dtype, **kwargs: Any) -> Extracted:
        seen.append(dtype)
        return extract_all(*args, dtype=dtype, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("distill.protocols.sharing.extract_all", extract)
        in_bf16 = evaluate_run(run_folder, wanted=Wanted(precision="bf16"))
    assert in_bf16["teacher"]["knn_in"] == "bfloat16"
    assert in_bf16["teacher"]["knn"] == pytest.approx(in_fp32["teacher"]["knn"], abs=0.2)
    assert set(seen) == {torch.bfloat16}
    assert evaluate_run(run_folder) == in_fp32  # what was computed in is not left behind


def test_evaluate_run__images_without_classes(run_folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (16, 16)).save(flat / "a.png")
    build_index([flat], max_bad_fraction=0.0).save(run_folder / "data" / "train")
    shutil.rmtree(run_folder / "data" / "held_out")
    summary = evaluate_run(run_folder)
    assert "the images have no labels" in summary["knn_reason"]
    assert summary["teacher"]["knn"] is None
    assert summary["baselines"]["untrained"] == {"teacher": None, "vit": None, "conv": None}


def test_evaluate_run__too_few_images(run_folder: Path) -> None:
    summary = evaluate_run(run_folder, wanted=Wanted(k=25))
    assert summary["knn_reason"] == (
        "24 training and 12 held-out images are too few for k-NN with k = 25"
    )


def test_evaluate_run__index_missing(run_folder: Path) -> None:
    shutil.rmtree(run_folder / "data" / "held_out")
    with pytest.raises(UserError, match="held_out: missing"):
        evaluate_run(run_folder)


def test_network_folders__nothing_exported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no exported network in teacher/ or students/"):
        network_folders(tmp_path, tmp_path / "teacher")


def test_network_folders__a_teacher_may_be_a_file(run_folder: Path) -> None:
    file = run_folder / "teacher" / "model.safetensors"
    assert network_folders(run_folder, file)["teacher"] == file


def test_network_folders__teacher_from_elsewhere_comes_first(run_folder: Path) -> None:
    folders = network_folders(run_folder, run_folder / "students" / "vit")
    assert list(folders) == ["teacher", "conv", "vit"]
    assert folders["teacher"] == folders["vit"]


@pytest.fixture(scope="module")
def more_splits(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageIndex, ImageIndex]:
    return write_splits(tmp_path_factory.mktemp("more"), (8, 12))


def test_evaluate_run__each_file_is_decoded_once_whatever_sides_are_wanted(
    tmp_path: Path,
    more_splits: tuple[ImageIndex, ImageIndex],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Six networks, sides of 16, 32 and 64 px."""
    run_folder = write_run(tmp_path, more_splits)
    decoded: Counter[int] = Counter()

    def counted(encoded: np.ndarray, background: Rgb | None) -> np.ndarray:
        decoded[hash(encoded.tobytes())] += 1
        return decode_rgb(encoded, background)

    monkeypatch.setattr("distill.protocols.images.decode_rgb", counted)
    summary = evaluate_run(run_folder, wanted=Wanted(("knn",)))
    assert len(decoded) == 24 + 36 and set(decoded.values()) == {1}
    monkeypatch.setattr("distill.protocols.images.MOST_BYTES", 1)  # then again for each network
    assert evaluate_run(run_folder, wanted=Wanted(("knn",))) == summary
    assert set(decoded.values()) == {1 + 1 + 6}


def test_evaluate_run__agreement_beside_its_floors(
    tmp_path: Path, more_splits: tuple[ImageIndex, ImageIndex]
) -> None:
    run_folder = write_run(tmp_path, more_splits)
    agreement = evaluate_run(run_folder)["agreement"]
    assert (agreement["reference"], agreement["images"], agreement["part"]) == (
        "teacher",
        36,
        "held_out",
    )
    twin = agreement["networks"]["vit"]  # the same weights as the teacher
    for kind in ("class", "patch"):
        assert twin[kind]["mutual_knn"] == 1.0 and twin[kind]["cka"] == pytest.approx(1)
        teacher = agreement["networks"]["teacher"]
        assert teacher[kind] == {"effective_rank": twin[kind]["effective_rank"]}
        assert teacher["untrained"][kind]["mutual_knn"] < 1.0
        assert agreement["networks"]["conv"][kind]["mutual_knn"] < 1.0
    assert agreement["floors"].keys() == {"pixels", "colour"}


def test_evaluate_run__agreement_without_labels(
    tmp_path: Path, more_splits: tuple[ImageIndex, ImageIndex]
) -> None:
    run_folder = write_run(tmp_path, more_splits)
    replace(more_splits[0], labels=None).save(run_folder / "data" / "train")
    shutil.rmtree(run_folder / "data" / "held_out")
    replace(more_splits[1], labels=None).save(run_folder / "data" / "held_out")
    summary = evaluate_run(run_folder, wanted=Wanted(("knn",)))
    assert summary["knn_reason"] and summary["scores"] == {}
    assert summary["agreement"]["images"] == 36
    conclusion = summary["conclusion"]
    assert conclusion["networks"]["vit"]["is_better"]
    assert "vit shares 100% of nearest neighbours with teacher" in conclusion["reason"]
    shutil.rmtree(run_folder / "data" / "held_out")
    assert evaluate_run(run_folder)["agreement"] == {
        "reason": "24 images are too few to compare neighbours, 30 are the least"
    }


def test_evaluate_run__scores_have_the_protocol_and_an_interval(run_folder: Path) -> None:
    summary = evaluate_run(run_folder, wanted=Wanted(("knn",)))
    entry = summary["scores"]["conv"]["knn"]
    assert entry["protocol"] == "quick" and entry["value"] == summary["students"]["conv"]["knn"]
    assert entry["interval"][0] <= entry["value"] <= entry["interval"][1]
    assert entry["untrained"] == summary["baselines"]["untrained"]["conv"]
    assert summary["conclusion"]["networks"]["conv"]["floor"] == "pixels"
    published = evaluate_run(run_folder, wanted=Wanted(("knn",), "dinov3"))["scores"]["conv"]["knn"]
    assert published["protocol"] == "dinov3" and published["settings"]["by_k"].keys() == {
        "10",
        "20",
    }


def test_evaluate_run__costs_are_measured_where_they_are_wanted_and_then_go(
    run_folder: Path,
) -> None:
    summary = evaluate_run(run_folder, wanted=Wanted(has_cost=True))
    networks = summary["cost"]["networks"]
    assert networks.keys() == {"teacher", "vit", "conv"}
    assert all(each["images_per_s"] > 0 for each in networks.values())
    assert summary["cost"]["choices"] and "teacher" not in summary["cost"]["choices"]
    assert summary["cost"]["choice"].startswith("Take ")
    assert "cost" not in evaluate_run(run_folder)
