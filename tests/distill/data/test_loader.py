"""The loader and its DALI graph: the same batch however it is divided, and each operation against NumPy or Pillow."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from distill.bench.pillow_reference import Blur, cut
from distill.data.bad_samples import BadSamples, count_bad
from distill.data.build_index import build_index
from distill.data.crops import (
    CropParameters,
    CropSchedule,
    CropSpec,
    draw_parameters,
    source_outputs,
)
from distill.data.feed import Feed
from distill.data.index import ImageIndex
from distill.data.loader import Loader
from distill.data.pipeline import build_pipeline
from distill.data.sampler import Pool, Sampler
from distill.errors import DataError
from distill.listing.decode import Decoding, decode_rgb
from distill.listing.headers import Decoder
from teacher.batch import CropBatch
from tests.support.odd_pictures import odd_pictures
from tests.support.pictures import NEUTRAL, picture

BACKGROUND = (124, 116, 104)
TURNED_BY_XMP = frozenset(f"jpeg/xmp/{i}" for i in (5, 6, 7, 8))
SPEC = CropSpec(32, (0.32, 1.0), 2, 16, (0.05, 0.32), None, 0.5, (0.1, 2.0))
IMAGES = 12
OPEN: list[Loader] = []  # by the test at work; closed after it


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    folder = tmp_path_factory.mktemp("images")
    for i in range(20):
        Image.fromarray(picture(i, 40 + i, 60)).save(folder / f"{i:02}.png")
    return build_index([folder], max_bad_fraction=0.0)


def loader(
    index: ImageIndex,
    positions: range,
    spec: CropSpec = SPEC,
    num_threads: int = 1,
    crops: CropSchedule | None = None,
    bad: BadSamples | None = None,
    pools: Sequence[Pool] | None = None,
) -> Loader:
    crops = crops or CropSchedule.one(spec)
    feed = Feed(
        index,
        crops,
        Sampler(pools or [Pool(0, len(index))], 5, [(0, IMAGES)]),
        bad or BadSamples(None, 1.0),
        positions=lambda step: positions,
        stop_step=100,
        decoding=Decoding(64.0, BACKGROUND),
    )
    made = Loader(
        feed,
        crops,
        max_images=len(positions),
        num_threads=num_threads,
        device=torch.device("cpu"),
    )
    OPEN.append(made)
    return made


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def same(first: CropBatch, second: CropBatch) -> bool:
    return torch.equal(first.global_crops, second.global_crops) and torch.equal(
        first.local_crops, second.local_crops
    )


@pytest.mark.parametrize("borders", [(0, 12), (0, 6, 12), (0, 1, 8, 12), (0, 5, 5, 12)])
def test_fetch__any_division_of_the_batch_gives_the_same_bits(
    borders: tuple[int, ...], index: ImageIndex
) -> None:
    whole = loader(index, range(IMAGES), num_threads=2)
    parts = [loader(index, range(a, b)) for a, b in pairwise(borders)]
    for step in (0, 1, 2):
        expected, got = whole.fetch(step), [part.fetch(step) for part in parts]
        together = CropBatch(
            torch.cat([part.global_crops for part in got]),
            torch.cat([part.local_crops for part in got]),
        )
        assert same(together, expected)


def digest(batch: CropBatch) -> str:
    assert batch.anchor_crops is not None
    whole = hashlib.sha256()
    for crops in (batch.global_crops, batch.local_crops, batch.anchor_crops):
        whole.update(crops.numpy().tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize("seed", range(8))
def test_fetch__layouts_and_resume_points_give_the_same_digest(
    seed: int, index: ImageIndex
) -> None:
    """Up to four ranks with any shares, from any step on, any number of threads, two sizes of crops in turns.

    Drawn by NumPy: the decoder's threads use Python's generator, which hypothesis wants for itself.
    """
    draws = np.random.default_rng(seed)
    borders = draws.integers(0, IMAGES + 1, size=draws.integers(4)).tolist()
    first_step, num_threads = int(draws.integers(98)), int(draws.integers(1, 4))
    spec = replace(SPEC, anchor_size=48)
    sizes = CropSchedule.of([spec, replace(spec, global_size=48, anchor_size=64)], [0.5, 0.5], 3)
    whole = loader(index, range(IMAGES), crops=sizes)
    ends = sorted([0, *borders, IMAGES])
    parts = [
        loader(index, range(a, b), crops=sizes, num_threads=num_threads) for a, b in pairwise(ends)
    ]
    whole.fetch(max(0, first_step - 2))  # began earlier and goes on
    for step in (first_step, first_step + 1):
        got = [part.fetch(step) for part in parts]
        together = CropBatch(
            *(
                torch.cat([getattr(part, name) for part in got])
                for name in ("global_crops", "local_crops", "anchor_crops")
            )
        )
        assert digest(together) == digest(whole.fetch(step))


def test_fetch__starting_late_or_going_back_gives_the_same_bits(index: ImageIndex) -> None:
    through, late = loader(index, range(4)), loader(index, range(4))
    batches = [through.fetch(step) for step in range(5)]
    assert (
        same(late.fetch(3), batches[3])
        and same(late.fetch(4), batches[4])
        and same(late.fetch(1), batches[1])
    )
    assert not same(batches[0], batches[1])


def test_fetch__a_batch_keeps_its_pixels_while_others_are_made(index: ImageIndex) -> None:
    """Crops are the decoder's own memory, not copies: look-ahead and exchange hold them for several steps."""
    images = loader(index, range(4), replace(SPEC, anchor_size=64))
    held = [images.fetch(step) for step in range(6)]
    digests = [digest(batch) for batch in held]
    for step in range(6, 20):
        images.fetch(step)
    images.close()
    assert [digest(batch) for batch in held] == digests and len(set(digests)) == 6


def test_fetch__global_crops_reduced_from_those_of_the_anchor(index: ImageIndex) -> None:
    """Anchor and local crops are as without it, whatever the number of threads; and so is everything where sides are equal."""
    spec = replace(SPEC, anchor_size=64)
    plain = loader(index, range(8), spec).fetch(0)
    made = [
        loader(index, range(8), replace(spec, reduces_anchors=True), num_threads).fetch(0)
        for num_threads in (1, 2)
    ]
    assert same(*made) and not torch.equal(made[0].global_crops, plain.global_crops)
    assert torch.equal(made[0].local_crops, plain.local_crops)
    assert plain.anchor_crops is not None and made[0].anchor_crops is not None
    assert torch.equal(made[0].anchor_crops, plain.anchor_crops)
    level = replace(spec, anchor_size=32)
    reduced = loader(index, range(8), replace(level, reduces_anchors=True)).fetch(1)
    assert same(loader(index, range(8), level).fetch(1), reduced)


def test_fetch__shapes_and_anchor_crops(index: ImageIndex) -> None:
    batch = loader(index, range(3), replace(SPEC, anchor_size=64)).fetch(0)
    assert batch.global_crops.shape == (3, 2, 3, 32, 32) and batch.local_crops.shape == (
        3,
        2,
        3,
        16,
        16,
    )
    assert batch.anchor_crops is not None and batch.anchor_crops.shape == (3, 2, 3, 64, 64)
    empty = loader(index, range(3, 3), replace(SPEC, num_local=0)).fetch(0)
    assert empty.global_crops.shape == (0, 2, 3, 32, 32) and empty.local_crops.shape == (
        0,
        0,
        3,
        16,
        16,
    )


def spoil(path: Path, how: str) -> None:
    """Breaks a PNG of the index so that it is found in different places."""
    whole = path.read_bytes()
    if how == "cut":  # seen by its end
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "scrambled":  # seen by the decoder only
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes(40) + whole[middle + 40 :])
    elif how == "other":  # another size than the index says
        Image.fromarray(picture(0, 16, 16)).save(path)
    else:
        path.unlink()


@pytest.fixture
def spoiled(tmp_path: Path) -> ImageIndex:
    for i in range(20):
        Image.fromarray(picture(i, 40 + i, 60)).save(tmp_path / f"{i:02}.png")
    index = build_index([tmp_path], max_bad_fraction=0.0)
    for image, how in enumerate(("cut", "scrambled", "other", "gone", "scrambled")):
        spoil(tmp_path / f"{3 * image:02}.png", how)
    return index


def test_fetch__bad_images_are_replaced_and_named_once(spoiled: ImageIndex, tmp_path: Path) -> None:
    names = tmp_path / "bad.jsonl"
    whole = loader(spoiled, range(IMAGES), bad=BadSamples(names, 1.0))
    parts = [
        loader(spoiled, part, bad=BadSamples(names, 1.0)) for part in (range(5), range(5, IMAGES))
    ]
    for step in range(6):  # more than three times every image
        expected, got = whole.fetch(step), [part.fetch(step) for part in parts]
        together = CropBatch(
            torch.cat([part.global_crops for part in got]),
            torch.cat([part.local_crops for part in got]),
        )
        assert same(together, expected)
    assert same(loader(spoiled, range(IMAGES)).fetch(3), whole.fetch(3))
    told = [json.loads(line) for line in names.read_text().splitlines()]
    reasons = {Path(row["sample"]).name: row["reason"] for row in told}
    assert len(told) == 5 and sorted(reasons) == ["00.png", "03.png", "06.png", "09.png", "12.png"]
    assert "truncated" in reasons["00.png"] and reasons["09.png"] == "no such file"
    assert reasons["06.png"] == "is 16 x 16 px now, was 60 x 46 when it was indexed"
    assert count_bad(names) == 5


def test_fetch__too_many_bad_images_end_it(spoiled: ImageIndex) -> None:
    careful = loader(spoiled, range(IMAGES), bad=BadSamples(None, 0.01))
    with pytest.raises(DataError, match=r"were bad, more than data.max_bad_fraction = 0.01 allows"):
        for step in range(20):
            careful.fetch(step)


def test_fetch__a_source_that_vanishes_ends_it(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(picture(i)).save(folder / f"{i}.jpg")
    index = build_index([folder], max_bad_fraction=0.0)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"images: the source is gone"):
        loader(index, range(IMAGES)).fetch(0)


def test_fetch__images_that_only_pillow_decodes_are_used(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned; DALI 2.4 cannot parse this block in a lossless WebP
    for i in range(3):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.webp", exif=exif, lossless=True)
        Image.fromarray(picture(i)).rotate(-90, expand=True).save(tmp_path / f"{i}.png")
    odd, plain = (
        index.subset(np.flatnonzero([str(index.location(i)).endswith(kind) for i in range(6)]))
        for index in [build_index([tmp_path], max_bad_fraction=0.0)]
        for kind in (".webp", ".png")
    )
    bad = BadSamples(tmp_path / "bad.jsonl", 0.0)
    assert odd.hw.tolist() == plain.hw.tolist() == [[64, 48]] * 3
    assert same(loader(odd, range(6), bad=bad).fetch(0), loader(plain, range(6)).fetch(0))
    assert count_bad(tmp_path / "bad.jsonl") == 0


def nearly_same(first: CropBatch, second: CropBatch) -> bool:
    """Within what colour jitter makes of one level, by which the decoders differ on some pictures."""
    pairs = ((first.global_crops, second.global_crops), (first.local_crops, second.local_crops))
    return all(int((a.int() - b.int()).abs().max()) <= 3 for a, b in pairs)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageIndex, ImageIndex]:
    """Every odd picture among good ones, and the same pictures as plain PNG files."""
    folder = tmp_path_factory.mktemp("odd")
    for part in ("odd", "plain"):
        (folder / part).mkdir()
    made = odd_pictures()
    good = {f"png/good/{i}": made["png/chunks/comment"] for i in range(20)}
    for number, (name, data) in enumerate({**made, **good}.items()):
        suffix = {"jpeg": "jpg"}.get(name.split("/")[0], name.split("/")[0])
        (folder / "odd" / f"{number:04}.{suffix}").write_bytes(data)
        drawn = decode_rgb(np.frombuffer(data, np.uint8), BACKGROUND)
        Image.fromarray(drawn).save(folder / "plain" / f"{number:04}.png")
    indices = [build_index([folder / p], max_bad_fraction=0.0) for p in ("odd", "plain")]
    assert len(indices[0]) == len(made) + 20
    return indices[0], indices[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about odd EXIF
def test_fetch__odd_pictures_give_the_crops_of_what_pillow_shows(
    odd: tuple[ImageIndex, ImageIndex], tmp_path: Path
) -> None:
    """All of them in an epoch and a half; none is replaced, and a loader that starts later gives the same."""
    bad = BadSamples(tmp_path / "bad.jsonl", 0.0)
    ours, plain = loader(odd[0], range(IMAGES), bad=bad), loader(odd[1], range(IMAGES))
    assert odd[0].hw.tolist() == odd[1].hw.tolist()
    steps = 3 * len(odd[0]) // (2 * IMAGES)
    for step in range(steps):
        batch = ours.fetch(step)
        assert nearly_same(batch, plain.fetch(step)), f"step {step}"
    assert same(loader(odd[0], range(IMAGES)).fetch(steps - 1), batch)
    assert count_bad(tmp_path / "bad.jsonl") == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fetch__an_index_of_before_gives_the_same(odd: tuple[ImageIndex, ImageIndex]) -> None:
    """Who decodes is decided when an image is read; version 0.1.0 saw no orientation in XMP, so its sizes lie."""
    lying = np.array(odd[0].hw)
    turned = np.array([name in TURNED_BY_XMP for name in odd_pictures()] + [False] * 20)
    lying[turned] = lying[turned][:, ::-1]
    before = replace(odd[0], decoders=None, hw=lying)
    ours, plain = (
        loader(before, range(IMAGES), bad=BadSamples(None, 0.0)),
        loader(odd[1], range(IMAGES)),
    )
    assert all(nearly_same(ours.fetch(step), plain.fetch(step)) for step in range(60))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fetch__a_picture_that_a_wrong_index_gives_to_the_decoder_ends_nothing(
    odd: tuple[ImageIndex, ImageIndex],
) -> None:
    """Were the rule wrong: DALI turns this one as it does not lie, and the window lies outside."""
    names = list(odd_pictures())
    chosen = np.array([names.index("jpeg/markers/6-1"), len(names)])  # and a good one
    index = replace(odd[0].subset(chosen), decoders=np.full(2, Decoder.DALI, np.uint8))
    spec = replace(SPEC, global_scale=(1.0, 1.0))
    ours = loader(index, range(IMAGES), spec, bad=BadSamples(None, 0.0))
    plain = loader(odd[1].subset(chosen), range(IMAGES), spec)
    for step in range(4):
        assert same(ours.fetch(step), plain.fetch(step))


def test_fetch__each_batch_has_one_of_several_sizes(index: ImageIndex) -> None:
    large = replace(SPEC, global_size=48, local_size=24, anchor_size=64)
    small = replace(SPEC, anchor_size=48)
    crops = CropSchedule.of([small, large], [0.75, 0.25], seed=1)
    steps = loader(index, range(3), crops=crops)
    sizes = []
    for step in range(40):
        batch = steps.fetch(step)
        assert batch.anchor_crops is not None
        shapes = (batch.global_crops.shape, batch.local_crops.shape, batch.anchor_crops.shape)
        sizes.append(tuple(shape[-1] for shape in shapes))
        only = loader(index, range(3), crops.at(step)) if step in (0, 7, 13) else None
        assert only is None or same(batch, only.fetch(step))
    assert set(sizes) == {(32, 16, 48), (48, 24, 64)}
    assert 2 <= sizes.count((48, 24, 64)) <= 20  # 10 on average


def test_fetch__sources_are_mixed_by_weight_and_pure_batches_are_pure(index: ImageIndex) -> None:
    pixel_stats = [((n / 10, 0.5, 0.5), (0.2, 0.2, 0.2)) for n in range(3)]
    pools = [
        Pool(0, 10, 0.6, pixel_stats=pixel_stats[0]),
        Pool(10, 15, 0.2, pixel_stats=pixel_stats[1]),
        Pool(15, 20, 0.2, is_pure=True, pixel_stats=pixel_stats[2]),
    ]
    first = loader(index, range(IMAGES), pools=pools)
    second = loader(index, range(4, 9), pools=pools)
    reds = []
    for step in range(12):
        whole, part = first.fetch(step), second.fetch(step)
        assert whole.pixel_stats is not None and part.pixel_stats is not None
        assert torch.equal(whole.global_crops[4:9], part.global_crops)
        assert torch.equal(whole.pixel_stats[4:9], part.pixel_stats)
        reds.append({round(red, 1) for red in whole.pixel_stats[:, 0, 0].tolist()})
    assert {0.2} in reds and {0.0, 0.1} in reds  # pure, and mixed
    assert not any(0.2 in red for red in reds if len(red) > 1)


def run_graph(
    image: NDArray[np.uint8],
    window: list[float],
    photometric: list[float],
    tmp_path: Path,
    crop: int = 0,
    contrast_about: Literal["mean", "middle"] = "mean",
) -> NDArray[np.uint8]:
    """One crop of one image through the graph with fixed parameters, [height, width, 3]."""
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    spec = replace(SPEC, num_local=0, anchor_size=None, contrast_about=contrast_about)
    parameters = CropParameters(
        np.array([[window, window]], np.float32), np.array([[photometric, photometric]], np.float32)
    )
    encoded = [np.fromfile(path, np.uint8)]
    batch = source_outputs(encoded, parameters, spec)
    pipeline = build_pipeline(spec, lambda: batch, 1, 1, None, 1)
    output = torch.from_dlpack(pipeline.run()[0].as_tensor())[0, crop]
    return output.permute(1, 2, 0).numpy().copy()


def test_graph__resize_is_pillows_bicubic(tmp_path: Path) -> None:
    image = picture(1)
    got = run_graph(image, [4, 8, 36, 56], NEUTRAL, tmp_path)
    expected = (
        Image.fromarray(image).crop((8, 4, 56, 36)).resize((32, 32), Image.Resampling.BICUBIC)
    )
    assert (
        np.abs(got.astype(int) - np.asarray(expected)).max() <= 3
    )  # rounding, and DALI reads past the window's edge
    mirrored = run_graph(image, [4, 56, 36, 8], NEUTRAL, tmp_path)
    assert (
        np.abs(mirrored.astype(int) - got[:, ::-1]).max() <= 1
    )  # rounding of mirrored coordinates


def test_graph__a_reduced_crop_is_the_anchors_at_the_smaller_size(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(picture(1)).save(path)
    spec = replace(SPEC, num_local=0, anchor_size=48, reduces_anchors=True)
    windows = np.array([[[4, 8, 36, 56], [2, 60, 30, 20]]], np.float32)  # the second is mirrored
    neutral = CropParameters(windows, np.array([[NEUTRAL, NEUTRAL]], np.float32))
    batch = source_outputs([np.fromfile(path, np.uint8)], neutral, spec)
    outputs = build_pipeline(spec, lambda: batch, 1, 1, None, 1).run()
    crops, anchors = (torch.from_dlpack(output.as_tensor())[0] for output in outputs)
    smaller = F.interpolate(anchors, (32, 32), mode="bicubic", antialias=True)
    assert crops.shape == (2, 3, 32, 32) and torch.equal(crops, smaller)


def exact_crop(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    return image[:32, :32].astype(np.float64)


@pytest.mark.parametrize("about", ["mean", "middle"])
@pytest.mark.parametrize(
    ("brightness", "contrast", "saturation"),
    [(1.3, 1.0, 1.0), (1.0, 0.7, 1.0), (1.0, 1.0, 0.0), (0.8, 1.2, 1.1)],
)
def test_graph__colour_equals_its_definition(
    brightness: float,
    contrast: float,
    saturation: float,
    about: Literal["mean", "middle"],
    tmp_path: Path,
) -> None:
    image = picture(2)
    photometric = [brightness, contrast, saturation, 0.0, 0.0, 0.0]
    got = run_graph(image, [0, 0, 32, 32], photometric, tmp_path, contrast_about=about)
    pixels = exact_crop(image)
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    mixed = grey[..., None] + saturation * (pixels - grey[..., None])
    centre = grey.mean() if about == "mean" else 128.0
    if about == "mean":  # two operators, with pixels between them, as torchvision's
        mixed = np.clip(mixed, 0, 255)
    expected = np.clip(((mixed - centre) * contrast + centre) * brightness, 0, 255)
    # saturation, contrast, brightness; one level for rounding, one for luma weights that differ in the third decimal
    assert np.abs(got - expected).max() <= 2


@pytest.mark.parametrize(("about", "moves"), [("mean", 2.0), ("middle", 25.0)])
def test_graph__contrast_of_a_dark_picture(
    about: Literal["mean", "middle"], moves: float, tmp_path: Path
) -> None:
    """About its mean grey it keeps that but for what is cut at 0; about 128 a mean of 19 moves by tens of levels."""
    dark = np.random.default_rng(0).integers(0, 38, (32, 32, 3), dtype=np.uint8)
    change = []
    for contrast in (0.7, 1.3):
        got = run_graph(
            dark, [0, 0, 32, 32], [1.0, contrast, 1.0, 0.0, 0.0, 0.0], tmp_path, 0, about
        )
        change.append(got.mean() - dark.mean())
    spread = max(change) - min(change)
    assert spread < moves if about == "mean" else spread > moves


def test_graph__hue_keeps_luma_and_turns_colour(tmp_path: Path) -> None:
    image = picture(3)
    got = run_graph(image, [0, 0, 32, 32], [1.0, 1.0, 1.0, 36.0, 0.0, 0.0], tmp_path).astype(float)
    pixels = exact_crop(image)
    weights = np.array([0.299, 0.587, 0.114])
    inside = ((got > 0) & (got < 255)).all(axis=2)
    assert (
        np.abs(got @ weights - pixels @ weights)[inside].max() < 4
    )  # a rotation in YIQ leaves Y alone
    assert np.abs(got - pixels).mean() > 5


def test_graph__blur_equals_pillows_gaussian(tmp_path: Path) -> None:
    image = picture(4)
    got = run_graph(image, [0, 0, 32, 32], [1.0, 1.0, 1.0, 0.0, 1.2, 0.0], tmp_path)
    expected = np.asarray(
        Image.fromarray(image[:32, :32]).filter(ImageFilter.GaussianBlur(1.2)), dtype=int
    )
    assert (
        np.abs(got.astype(int) - expected)[5:-5, 5:-5].max() <= 4
    )  # Pillow approximates by box filters


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_graph__blur_is_nine_taps_of_a_gaussian_with_mirrored_borders(
    sigma: float, tmp_path: Path
) -> None:
    image = picture(6)
    got = run_graph(image, [0, 0, 32, 32], [1.0, 1.0, 1.0, 0.0, sigma, 0.0], tmp_path)
    taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    expected = exact_crop(image).astype(float)
    for axis in (0, 1):
        padded = np.pad(expected, [(4, 4) if a == axis else (0, 0) for a in range(3)], "reflect")
        shifted = [padded.take(range(k, k + 32), axis) for k in range(9)]
        expected = np.einsum("k,khwc->hwc", taps / taps.sum(), np.stack(shifted))
    assert np.abs(got - expected).max() <= 1.0  # rounded after each axis


def test_graph__solarise_inverts_from_the_threshold_and_on_the_second_crop_only(
    tmp_path: Path,
) -> None:
    image = picture(5)
    photometric = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    pixels = exact_crop(image).astype(int)
    second = run_graph(image, [0, 0, 32, 32], photometric, tmp_path, crop=1).astype(int)
    assert np.array_equal(second, np.where(pixels < 128, pixels, 255 - pixels))
    assert np.array_equal(run_graph(image, [0, 0, 32, 32], photometric, tmp_path), pixels)


@pytest.mark.parametrize("reduces", [False, True])
def test_reference__gives_what_the_graph_gives(index: ImageIndex, *, reduces: bool) -> None:
    """To 3 levels of 255, but for hue, whose definition differs, contrast, which turns about another grey,

    and what Pillow clips between two operations where DALI clips once.
    """
    spec = replace(SPEC, anchor_size=48, reduces_anchors=reduces)
    positions = np.arange(6)
    hw = index.hw[:6]
    parameters = draw_parameters(
        spec, seed=0, step=0, positions=positions, sample_ids=positions, hw=hw
    )
    photometric = parameters.photometric
    photometric[..., 0] = np.minimum(photometric[..., 0], 1.0)
    photometric[..., 1], photometric[..., 3] = 1.0, 0.0
    encoded = [np.fromfile(str(index.location(image)), np.uint8) for image in range(6)]
    batch = source_outputs(encoded, parameters, spec)
    outputs = build_pipeline(spec, lambda: batch, 6, 1, None, 1).run()
    kinds = [torch.from_dlpack(output.as_tensor()) for output in outputs]
    got = [crops for kind in kinds for crops in kind.unbind(dim=1)]  # global, local, anchor
    for number in range(6):
        expected = cut(encoded[number], parameters, number, spec, Blur.TAPS)
        for crop, pixels in enumerate(expected):
            ours = got[crop][number].permute(1, 2, 0).numpy().astype(int)
            inside = np.abs(ours - pixels)[4:-4, 4:-4]  # DALI reads past a window's edge
            is_solarised = crop < spec.num_crops and parameters.photometric[number, crop, 5]
            assert np.percentile(inside, 95 if is_solarised else 100) <= 3, (number, crop)


def test_draw_parameters__have_the_published_ranges_and_rates() -> None:
    count = 4000
    hw = np.tile(np.array([[300, 500]], np.int32), (count, 1))
    positions = np.arange(count)
    spec = replace(SPEC, flip_probability=0.5)
    drawn = draw_parameters(spec, seed=0, step=0, positions=positions, sample_ids=positions, hw=hw)
    top, left, bottom, right = (drawn.windows[..., i] for i in range(4))
    mirrored = left > right
    assert abs(mirrored.mean() - 0.5) < 0.02
    area = np.abs(right - left) * (bottom - top) / (300 * 500)
    assert (
        top.min() >= 0
        and bottom.max() <= 300
        and min(left.min(), right.min()) >= 0
        and max(left.max(), right.max()) <= 500
    )
    assert area[:, :2].min() > 0.31 and area[:, :2].max() <= 1.0
    assert area[:, 2:].min() > 0.048 and area[:, 2:].max() < 0.325
    photo = drawn.photometric
    jittered = photo[..., 3] != 0.0
    assert abs(jittered.mean() - 0.8) < 0.02 and abs((photo[..., 2] == 0.0).mean() - 0.2) < 0.02
    assert (
        np.abs(photo[..., 3]).max() <= 36
        and photo[..., 0].min() >= 0.6
        and photo[..., 1].max() <= 1.4
    )
    blurred = (photo[..., 4] > 0).mean(axis=0)
    assert (
        blurred[0] == 1.0
        and abs(blurred[1] - 0.1) < 0.02
        and np.abs(blurred[2:] - 0.5).max() < 0.03
    )
    solarised = photo[..., 5].mean(axis=0)
    sigma = photo[..., 4][photo[..., 4] > 0]
    assert 0.1 <= sigma.min() < 0.11 and 1.99 < sigma.max() <= 2.0
    assert abs(solarised[1] - 0.2) < 0.02 and not solarised[[0, 2, 3]].any()


def test_draw_parameters__blur_has_the_probabilities_of_the_recipe() -> None:
    """Those of the released networks, which a slip gave to the other crop."""
    positions = np.arange(4000)
    spec = replace(SPEC, blur=(0.0, 0.9, 0.5))
    hw = np.full((4000, 2), 64, np.int32)
    drawn = draw_parameters(spec, seed=0, step=0, positions=positions, sample_ids=positions, hw=hw)
    blurred = (drawn.photometric[..., 4] > 0).mean(axis=0)
    assert blurred[0] == 0.0
    assert blurred[1:] == pytest.approx([0.9, 0.5, 0.5], abs=0.03)


def test_draw_parameters__fall_back_to_the_centre_of_extreme_shapes() -> None:
    hw = np.array([[10, 1000], [1000, 10], [1, 1]], np.int32)
    ids = np.arange(3)
    spec = replace(SPEC, flip_probability=0.0, global_scale=(1.0, 1.0))
    windows = draw_parameters(spec, seed=0, step=0, positions=ids, sample_ids=ids, hw=hw).windows[
        :, 0
    ]
    assert windows[0].tolist() == [0, 493, 10, 506] and windows[1].tolist() == [493, 0, 506, 10]
    assert windows[2].tolist() == [0, 0, 1, 1]
