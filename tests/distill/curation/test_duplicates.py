"""Copies in three tiers, against every pair compared one by one."""

import numpy as np
import pytest
import torch

from distill.curation import duplicates as module
from distill.curation.duplicates import Duplicates, find_copies, find_semantic_copies
from distill.curation.hashes import ImageHashes
from distill.curation.rows import VectorsInMemory
from distill.errors import DataError


def hashes(count: int, seed: int = 0) -> ImageHashes:
    """Images whose bytes, bits and thumbnails are all far apart."""
    random = np.random.default_rng(seed)
    return ImageHashes(
        random.integers(0, 256, (count, 32), np.uint8),
        random.integers(0, 2**64, (2, count), np.uint64),
        random.integers(0, 256, (2, count, 192), np.uint8),
        np.full(count, 100, np.int64),
        np.ones(count, np.bool_),
    )


def copy(
    found: ImageHashes, source: int, target: int, bits: int, shift: int = 0, of: int = 0
) -> None:
    """Makes one image a copy of another, or of its inside, that differs in so many of the lowest bits, and in brightness."""
    found.bits[0, target] = found.bits[of, source] ^ np.uint64(2**bits - 1)
    shifted = found.thumbnails[of, source].astype(int) + shift
    found.thumbnails[0, target] = np.clip(shifted, 0, 255)


def test_find_copies__same_bytes_keep_the_first_and_broken_ones_have_no_twin() -> None:
    made = hashes(5)
    made.sha256[3] = made.sha256[1]
    made.sha256[4] = made.sha256[1]
    made.usable[0] = False
    found = find_copies(made, np.full(5, 64, np.int64))
    assert found.reasons == ["broken", "", "", "exact", "exact"]
    assert found.twins.tolist() == [-1, -1, -1, 1, 1] and found.similarity[3] == 1
    assert found.remaining().tolist() == [1, 2]


def test_find_copies__the_largest_of_a_connected_group_stays() -> None:
    made = hashes(6)
    copy(made, 0, 2, bits=6)
    copy(made, 2, 4, bits=0)
    made.bits[0, 4] ^= np.uint64(0b111111 << 20)  # 12 bits from 0, 6 from 2
    pixels = np.array([64, 64, 64, 64, 256, 64], np.int64)
    found = find_copies(made, pixels, hamming=6)
    assert found.reasons == ["perceptual", "", "perceptual", "", "", ""]
    assert found.twins.tolist() == [4, -1, 4, -1, -1, -1]
    assert found.similarity[[0, 2]].tolist() == [1 - 6 / 64, 1 - 6 / 64]
    assert find_copies(made, pixels, hamming=5).remaining().tolist() == list(range(6))
    made.num_bytes[2] = 200
    assert find_copies(made, np.full(6, 64, np.int64), hamming=6).remaining().tolist() == [
        1,
        2,
        3,
        5,
    ]


def test_find_copies__a_copy_of_the_inside_is_cropped_and_insides_alone_make_none() -> None:
    made = hashes(6)
    copy(made, 0, 1, bits=3, of=1)
    copy(made, 1, 2, bits=0)  # a copy of the cropped one is one of its kind
    made.bits[1, 3], made.thumbnails[1, 3] = made.bits[1, 4], made.thumbnails[1, 4]
    found = find_copies(made, np.array([100, 81, 60, 100, 100, 100]))
    assert found.reasons == ["", "cropped", "perceptual", "", "", ""]
    assert found.twins.tolist() == [-1, 0, 1, -1, -1, -1]
    assert found.similarity[[1, 2]].tolist() == [1 - 3 / 64, 1.0]


def test_find_copies__thumbnails_tell_pictures_of_the_same_bits_apart() -> None:
    made = hashes(3)
    made.thumbnails[0, 0] = np.random.default_rng(1).integers(60, 190, 192)
    copy(made, 0, 1, bits=0, shift=3)
    copy(made, 0, 2, bits=0, shift=30)
    assert find_copies(made, np.full(3, 64, np.int64)).remaining().tolist() == [0, 2]
    made.thumbnails[0, 0] = np.tile([9, 11], 96)  # nearly one colour: a difference of 3 is much
    copy(made, 0, 1, bits=0, shift=3)
    assert find_copies(made, np.full(3, 64, np.int64)).remaining().tolist() == [0, 1, 2]


def test_find_copies__blocks_miss_no_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    made = hashes(300, seed=2)
    random = np.random.default_rng(3)
    made.thumbnails[0] = random.integers(0, 200, (300, 1)) + random.integers(0, 40, (300, 192))
    for target in range(200, 300):
        copy(
            made,
            int(random.integers(100)),
            target,
            int(random.integers(12)),
            int(random.integers(6)),
        )
    wide, bits = made.thumbnails[0].astype(float), made.bits[0]
    spread = wide.reshape(300, 64, 3).std(axis=1).mean(axis=1)
    wanted = {
        (one, other)
        for one in range(300)
        for other in range(one)
        if int(bits[one] ^ bits[other]).bit_count() <= 8
        and np.sqrt(((wide[one] - wide[other]) ** 2).mean())
        <= min(4.0, 0.7 * spread[one], 0.7 * spread[other])
    }
    monkeypatch.setattr(module, "BLOCK", 7)
    pairs = list(module._close_pairs(bits, made.thumbnails[0], 8))
    assert {(max(a, b), min(a, b)) for a, b, _ in pairs} == wanted and len(wanted) > 40
    assert len(pairs) == len(wanted)
    assert all(equal == 1 - int(bits[a] ^ bits[b]).bit_count() / 64 for a, b, equal in pairs)


def nothing(count: int) -> Duplicates:
    """No copies yet."""
    return Duplicates([""] * count, np.full(count, -1, np.int64), np.zeros(count))


def test_find_semantic_copies__equals_the_nested_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base = torch.randn(20, 8)
    values = base[torch.arange(60) % 20] + 0.25 * torch.randn(60, 8)
    values[7] = 0  # a picture without features
    random = np.random.default_rng(0)
    sizes = random.integers(1, 4, 60), random.integers(1, 4, 60)
    has_features = np.arange(60) != 7
    found = nothing(60)
    found.drop(5, "exact", 0, 1.0)
    monkeypatch.setattr(module, "BLOCK", 7)
    find_semantic_copies(found, VectorsInMemory(values), 0.1, sizes, has_features)
    order = [
        row
        for row in sorted(range(60), key=lambda row: (-sizes[0][row], -sizes[1][row], row))
        if row not in (5, 7)
    ]
    unit = torch.nn.functional.normalize(values, dim=1)
    wanted = {5: 0}
    for at, row in enumerate(order):
        cosines = [float(unit[row] @ unit[before]) for before in order[:at]]
        if cosines and max(cosines) > 0.9:
            wanted[row] = order[int(np.argmax(cosines))]
    assert {int(row): int(found.twins[row]) for row in np.flatnonzero(found.twins >= 0)} == wanted
    assert len(wanted) > 20 and found.reasons[5] == "exact" and found.reasons[7] == ""


def test_find_semantic_copies__a_large_pool_compares_inside_clusters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    base = torch.nn.functional.normalize(torch.randn(30, 16), dim=1)
    values = base.repeat(4, 1) + 1e-3 * torch.randn(120, 16)
    monkeypatch.setattr(module, "FULL_POOL", 100)
    monkeypatch.setattr(module, "CLUSTER_IMAGES", 30)
    found, done = nothing(120), []
    same = np.ones(120, np.int64)
    find_semantic_copies(
        found,
        VectorsInMemory(values),
        0.02,
        (same, same),
        same > 0,
        lambda *each: done.append(each),
    )
    assert found.remaining().tolist() == list(range(30)) and done[-1] == (120, 120)


@pytest.mark.parametrize(("eps", "value"), [(0.0, 1.0), (1.0, 1.0), (0.1, torch.inf)])
def test_find_semantic_copies__refuses_what_it_cannot_compare(eps: float, value: float) -> None:
    same = np.ones(3, np.int64)
    rows = VectorsInMemory(torch.full((3, 4), value))
    with pytest.raises(DataError, match=r"--semantic|not finite"):
        find_semantic_copies(nothing(3), rows, eps, (same, same), same > 0)
