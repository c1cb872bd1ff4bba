import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from distill.data.build_index import build_index
from distill.data.index import ImageIndex
from distill.data.locations import Location, Reader
from distill.errors import UserError
from distill.evaluate.images import (
    BF16_FROM,
    Preparation,
    Scored,
    count_images,
    decode,
    extract,
    read_preparation,
    read_split,
    read_splits,
    scoring_dtype,
)
from distill.evaluate.knn import (
    balanced_accuracy,
    evaluate_run,
    knn,
    network_folders,
    pixels_score,
    rgb_score,
    rgb_stats,
)
from distill.weights.save import ExportFacts, write_backbone
from students.shapes import BackboneSpec, ConvNeXtSpec
from students.student import build_backbone
from teacher.batch import Features
from teacher.shapes import ViTSpec
from tests.support.gpu import CPU_AND_GPU

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")
TINY_VIT = ViTSpec(width=16, depth=1, heads=2, ffn_width=32, patch=8)
TINY_CONVNEXT = ConvNeXtSpec(depths=(1, 1), widths=(8, 16))


def oracle_knn(train: Tensor, train_y: Tensor, test: Tensor, test_y: Tensor, k: int) -> float:
    """The definition, one pair at a time."""
    right: Counter[int] = Counter()
    total: Counter[int] = Counter()
    for asked, label in zip(test.tolist(), test_y.tolist(), strict=True):
        similarity = []
        for known, known_label in zip(train.tolist(), train_y.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(asked, known, strict=True))
            norms = math.hypot(*asked) * math.hypot(*known)
            similarity.append((dot / norms, known_label))
        nearest = sorted(similarity, key=lambda pair: -pair[0])[:k]
        votes = Counter(known_label for _, known_label in nearest)
        winner = max(
            votes,
            key=lambda candidate: (
                votes[candidate],
                sum(value for value, voter in nearest if voter == candidate),
            ),
        )
        total[label] += 1
        right[label] += winner == label
    return sum(right[label] / total[label] for label in total) / len(total)


@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 6),
    num_classes=st.integers(1, 4),
    num_train=st.integers(6, 20),
    num_test=st.integers(1, 12),
)
@settings(max_examples=40, deadline=None)
def test_knn__equals_the_definition(
    seed: int, k: int, num_classes: int, num_train: int, num_test: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    train = torch.randn(num_train, 3, generator=generator, dtype=torch.float64)
    test = torch.randn(num_test, 3, generator=generator, dtype=torch.float64)
    train_y = torch.randint(num_classes, (num_train,), generator=generator)
    test_y = torch.randint(num_classes, (num_test,), generator=generator)
    expected = oracle_knn(train, train_y, test, test_y, k)
    assert knn(train, train_y, test, test_y, k) == pytest.approx(expected, abs=1e-12)


def test_knn__a_tie_goes_to_the_more_similar_class() -> None:
    train = torch.tensor([[1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [1.0, 0.4]])
    labels = torch.tensor([0, 0, 1, 1])
    assert knn(train, labels, torch.tensor([[1.0, 1.0]]), torch.tensor([1]), 4) == 1.0
    assert knn(train, labels, torch.tensor([[1.0, 0.0]]), torch.tensor([0]), 4) == 1.0


def test_knn__sees_differences_that_fp32_cosines_lose() -> None:
    offsets = torch.tensor([[1e-5, 0.0], [0.0, 1e-5], [1.1e-5, 0.0], [0.0, 1.1e-5]])
    features = torch.cat([torch.ones(4, 1), offsets], dim=1)
    labels = torch.tensor([0, 1, 0, 1])
    assert knn(features[:2], labels[:2], features[2:], labels[2:], 1) == 1.0


def test_knn__euclidean_differs_from_cosine() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 10.0]])
    test, labels = torch.tensor([[0.0, 1.0]]), torch.tensor([0, 1])
    assert knn(train, labels, test, labels[1:], 1) == 1.0
    assert knn(train, labels, test, labels[:1], 1, measure="euclidean") == 1.0


def test_knn__too_few_images() -> None:
    features, labels = torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="k = 5: must be at most the number of training images, 3"):
        knn(features, labels, features, labels)
    with pytest.raises(ValueError, match="no held-out image"):
        knn(features, labels, features[:0], labels[:0], 1)


def test_balanced_accuracy__classes_count_the_same() -> None:
    labels = torch.tensor([0] * 98 + [1] * 2)
    assert balanced_accuracy(torch.zeros_like(labels), labels) == 0.5
    assert balanced_accuracy(labels + 3, labels) == 0.0


def test_colour_statistics__mean_and_spread() -> None:
    images = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8)
    statistics = rgb_stats(images)
    expected = np.concatenate(
        [images.numpy().mean((2, 3)), images.numpy().reshape(2, 3, -1).std(2)], axis=1
    )
    # fp32 means of 35 values up to 255
    np.testing.assert_allclose(statistics.numpy(), expected, rtol=1e-5)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageIndex, ImageIndex]:
    """Three classes of 16 px noise that differ in colour only, 8 training and 4 held-out images."""
    folder = tmp_path_factory.mktemp("tiles")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("held_out", 4)):
        for channel, name in enumerate(("blue", "green", "red")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                tile = random.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                tile[..., 2 - channel] += 120
                Image.fromarray(tile).save(folder / split / name / f"{number}.png")
    return (
        build_index([folder / "train"], max_bad_fraction=0.0),
        build_index([folder / "held_out"], max_bad_fraction=0.0),
    )


def export(folder: Path, spec: BackboneSpec, size: int) -> None:
    backbone = spec.build()
    spec.init_(backbone, torch.Generator().manual_seed(1))
    write_backbone(folder, backbone.state_dict(), spec, ExportFacts(size, MEAN, STD, {}))


@pytest.fixture
def run_folder(tmp_path: Path, splits: tuple[ImageIndex, ImageIndex]) -> Path:
    """A run as the launcher leaves it, with networks that learned nothing."""
    (tmp_path / "data").mkdir()
    splits[0].save(tmp_path / "data" / "train")
    splits[1].save(tmp_path / "data" / "held_out")
    export(tmp_path / "teacher", TINY_VIT, 16)
    export(tmp_path / "students" / "vit", TINY_VIT, 16)
    export(tmp_path / "students" / "conv", TINY_CONVNEXT, 32)
    return tmp_path


def scored(index: ImageIndex) -> Scored:
    assert index.labels is not None
    labels = torch.from_numpy(np.asarray(index.labels).astype(np.int64))
    return Scored([index.location(image) for image in range(len(index))], labels)


def test_colour_score__sees_colour(splits: tuple[ImageIndex, ImageIndex]) -> None:
    read = [read_split(scored(split), 16, None) for split in splits]
    assert rgb_score(read[0], read[1]) == 1.0


def test_pixels_score__is_a_fraction(splits: tuple[ImageIndex, ImageIndex]) -> None:
    read = [read_split(scored(split), 16, None) for split in splits]
    assert 0.0 <= pixels_score(read[0], read[1]) <= 1.0


class MeanColour(nn.Module):
    """Its class token is the mean of each normalised colour."""

    width = 3
    stride = 1

    def forward(
        self,
        pixels: Tensor,
        masks: Tensor | None = None,  # the protocol's
        *,
        rope_scale: float = 1.0,
        is_local: bool = False,
    ) -> Features:
        height, width = pixels.shape[-2:]
        patches = pixels.flatten(2).transpose(1, 2)
        return Features(pixels.mean((2, 3)), patches, (height, width))


@pytest.mark.parametrize("batch", [1, 5, 100])
def test_extract__keeps_the_order_whatever_the_batch(
    splits: tuple[ImageIndex, ImageIndex], batch: int
) -> None:
    locations = [splits[0].location(image) for image in range(len(splits[0]))]
    features = extract(MeanColour(), locations, Preparation(16, MEAN, STD), device=CPU, batch=batch)
    images = np.stack([np.asarray(Image.open(str(place))) for place in locations]) / 255.0
    expected = (images.mean((1, 2)) - np.array(MEAN)) / np.array(STD)
    # fp32 means of 256 normalised pixels
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-5)


def test_decode__resizes_only_when_the_size_differs(tmp_path: Path) -> None:
    tile = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(tile).save(tmp_path / "a.png")
    Image.fromarray(tile[..., 0]).save(tmp_path / "grey.png")
    assert torch.equal(
        decode(Reader(), Location.of(tmp_path / "a.png"), 16, None),
        torch.from_numpy(tile).permute(2, 0, 1),
    )
    assert decode(Reader(), Location.of(tmp_path / "grey.png"), 8, None).shape == (3, 8, 8)


def test_decode__broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"broken\.png: cannot be decoded"):
        decode(Reader(), Location.of(tmp_path / "broken.png"), 16, None)


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
    assert summary.keys() == {"teacher", "students", "baselines", "images_per_s", "phases_s"}
    assert summary["students"].keys() == {"vit", "conv"}
    assert summary["students"]["vit"]["loss"] == 2.5
    assert summary["students"]["conv"]["loss"] is None
    assert summary["baselines"].keys() == {"pixels", "colour", "untrained"}
    assert summary["baselines"]["untrained"].keys() == {"teacher", "vit", "conv"}
    assert summary["baselines"]["colour"] == 1.0
    # the exported networks learned nothing either, but their seed is another one
    assert 0.0 <= summary["teacher"]["knn"] <= 1.0
    assert summary["teacher"]["knn"] == summary["students"]["vit"]["knn"]
    assert len(told) == 4 and "colours" in told[0] and "teacher" in told[1]
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


def test_read_split__lays_clear_pixels_on_the_background(tmp_path: Path) -> None:
    hidden = np.zeros((8, 8, 4), np.uint8)
    hidden[..., 0] = 255  # red that is wholly clear
    Image.fromarray(hidden).save(tmp_path / "a.png")
    split = Scored([Location.of(tmp_path / "a.png")], torch.zeros(1, dtype=torch.int64))
    assert read_split(split, 8, None).pixels[0, :, 0, 0].tolist() == [255, 0, 0]
    assert read_split(split, 8, (1, 2, 3)).pixels[0, :, 0, 0].tolist() == [1, 2, 3]


def test_evaluate_run__a_large_network_on_a_gpu_is_scored_in_bf16(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_fp32 = evaluate_run(run_folder)
    assert scoring_dtype(BF16_FROM, torch.device("cuda")) == torch.bfloat16
    assert scoring_dtype(BF16_FROM - 1, torch.device("cuda")) == torch.float32
    assert scoring_dtype(BF16_FROM, CPU) == torch.float32
    monkeypatch.setattr("distill.evaluate.knn.scoring_dtype", lambda *_: torch.bfloat16)
    in_bf16 = evaluate_run(run_folder)
    assert in_bf16["teacher"]["knn_in"] == "bfloat16"
    assert in_bf16["teacher"]["knn"] == pytest.approx(in_fp32["teacher"]["knn"], abs=0.2)
    monkeypatch.undo()
    assert evaluate_run(run_folder) == in_fp32  # what was computed in is not left behind


@CPU_AND_GPU
def test_extract__in_bf16_keeps_the_fourth_digit(device: str) -> None:
    """That is all in which class tokens of an untrained network differ."""
    spec = ViTSpec(32, 3, 2, 64)
    backbone = build_backbone(spec, torch.Generator().manual_seed(0), torch.device(device)).eval()
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        full = backbone(pixels).class_token
        with torch.autocast(device, torch.bfloat16):
            half = backbone(pixels).class_token.float()
    spread = (full - full.mean(0)).norm()
    assert (half - full - (half - full).mean(0)).norm() < 0.1 * spread


def test_count_images__names_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = [0.0], list[str]()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    on_batch = count_images(lines.append, "k-NN", 1000)
    for _ in range(2):
        now[0] += 30.0
        on_batch(100)
    assert lines == [
        "k-NN: 100 of 1,000 images, 4 min left",
        "k-NN: 200 of 1,000 images, 4 min left",
    ]


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
    summary = evaluate_run(run_folder, k=25)
    assert summary["knn_reason"] == (
        "24 training and 12 held-out images are too few for k-NN with k = 25"
    )


def test_read_splits__images_without_a_label_are_left_out(run_folder: Path) -> None:
    for part, count in (("train", 24), ("held_out", 12)):
        index = ImageIndex.load(run_folder / "data" / part)
        assert index.labels is not None
        labels = np.array(index.labels)
        labels[::3] = -1
        replace(index, labels=labels).save(run_folder / "data" / part)
        assert index.label_counts.total() == count
    train, test, reason = read_splits(run_folder, 5)
    assert not reason and (len(train.locations), len(test.locations)) == (16, 8)
    assert len(train.labels) == 16 and train.labels.min() == 0 and test.labels.min() == 0
    reason = read_splits(run_folder, 17)[2]
    assert reason == (
        "16 training and 8 held-out images with a label are too few for k-NN with k = 17"
    )


def test_read_splits__says_why_nothing_was_held_out(run_folder: Path) -> None:
    shutil.rmtree(run_folder / "data" / "held_out")
    facts = run_folder / "data/images.json"
    facts.write_text('{"no_held_out": "data.held_out is 0"}')
    assert read_splits(run_folder, 5)[2] == "data.held_out is 0"


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


def test_read_preparation__takes_the_runs_where_nothing_usable_is_stated(run_folder: Path) -> None:
    folder, usual = run_folder / "teacher", Preparation(48, (0.1, 0.1, 0.1), (0.9, 0.9, 0.9))
    assert read_preparation(folder, 8) == Preparation(16, MEAN, STD)
    assert read_preparation(folder, 12, usual) == Preparation(48, MEAN, STD)  # 16 is no multiple
    (folder / "preprocessor_config.json").unlink()
    assert read_preparation(folder, 8, usual) == usual
    with pytest.raises(UserError, match="stated nowhere"):
        read_preparation(folder, 8)


def test_network_folders__teacher_from_elsewhere_comes_first(run_folder: Path) -> None:
    folders = network_folders(run_folder, run_folder / "students" / "vit")
    assert list(folders) == ["teacher", "conv", "vit"]
    assert folders["teacher"] == folders["vit"]
