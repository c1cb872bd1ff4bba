"""Folders, shards, lists and Parquet files give the same images; hostile tar files give names and bytes, nothing else."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distill.data.build_index import build_index
from distill.errors import DataError
from distill.listing.locations import Kind, Location, Reader
from distill.listing.sources import Found, list_source
from tests.support.pictures import picture

NAMES = ("cat/1.png", "cat/2.jpg", "dog/3.webp")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(path)
    return tmp_path / "images"


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    return info, data


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], **options: int) -> Path:
    with tarfile.open(path, "w", **options) as file:  # type: ignore[call-overload]
        for info, data in members:
            file.addfile(info, io.BytesIO(data))
    return path


def as_other_kinds(folder: Path, target: Path) -> dict[str, Path]:
    """The same images as a list, a shard and a Parquet file."""
    files = {name: (folder / name).read_bytes() for name in NAMES}
    target.mkdir()
    (target / "list.txt").write_text("# a list\n\n" + "\n".join(str(folder / n) for n in NAMES))
    write_tar(target / "shard.tar", [member(name, data) for name, data in files.items()])
    rows = [{"bytes": data, "path": name} for name, data in files.items()]
    labels = [name.split("/")[0] for name in NAMES]
    table = pyarrow.table({"image": rows, "label": labels})
    pyarrow.parquet.write_table(table, target / "rows.parquet", row_group_size=2)
    return {path.suffix: path for path in target.iterdir()}


def test_list_source__every_kind_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    reader = Reader()
    expected = [(folder / name).read_bytes() for name in NAMES]
    for suffix, path in {"": folder, **as_other_kinds(folder, tmp_path / "other")}.items():
        found = list_source(path)
        assert [reader.read(each.location).tobytes() for each in found] == expected, suffix
        labels = ["", "", ""] if suffix == ".txt" else ["cat", "cat", "dog"]
        assert [each.label for each in found] == labels
        assert build_index([path], max_bad_fraction=0.0).hw.tolist() == [[48, 64]] * 3


def test_list_source__a_folder_of_shards_in_order(folder: Path, tmp_path: Path) -> None:
    for number in (1, 0):
        data = (folder / NAMES[number]).read_bytes()
        write_tar(
            tmp_path / f"{number}.tar",
            [member(f"{number}.png", data), member(f"{number}.cls", b"7")],
        )
    (folder / "cat").rename(tmp_path / "unseen")
    (tmp_path / "unseen").joinpath("1.png").unlink()
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).rename(shards / name)
    found = list_source(shards)
    assert [each.location.name for each in found] == ["0.png", "1.png"]
    assert [each.label for each in found] == ["7", "7"]


def test_list_source__hostile_members_are_names_and_nothing_else(tmp_path: Path) -> None:
    data = b"payload"
    link, device = (
        member("link.jpg", kind=tarfile.SYMTYPE),
        member("device.jpg", kind=tarfile.CHRTYPE),
    )
    link[0].linkname = "/etc/passwd"
    long = "d/" + "x" * 300 + ".jpg"
    members = [
        member("../../up.jpg", data),
        member("/abs.jpg", data),
        link,
        device,
        member(long, data),
    ]
    hard = member("hard.jpg", kind=tarfile.LNKTYPE)
    hard[0].linkname = "/etc/passwd"
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / f"{kind}.tar", [*members, hard], format=kind)
        found = list_source(path)
        assert [each.location.name for each in found] == ["../../up.jpg", "/abs.jpg", long]
        assert all(Reader().read(each.location).tobytes() == data for each in found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.tar", "2.tar"]


def test_list_source__a_header_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [member("a.jpg", b"x" * 100)])
    whole = path.read_bytes()
    path.write_bytes(whole[:550])
    with pytest.raises(DataError, match=r"'a\.jpg' reaches past the end of the file"):
        list_source(path)
    path.write_bytes(b"\x01" * 512 + whole)
    with pytest.raises(DataError, match="damaged header at byte 0"):
        list_source(path)
    info = tarfile.TarInfo("././@PaxHeader")  # a name of 10 MB is no name
    info.type, info.size = tarfile.XHDTYPE, 10_000_000
    path.write_bytes(info.tobuf() + bytes(10_000_384) + whole)
    assert [each.location.name for each in list_source(path)] == ["a.jpg"]


@settings(max_examples=100, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, 2559), st.integers(0, 255)), min_size=1, max_size=6)
)
def test_list_source__a_damaged_tar_gives_images_or_one_line(
    places: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.tar"
    write_tar(path, [member("a.jpg", b"1" * 600), member("b.cls", b"3"), member("c.png", b"2")])
    data = bytearray(path.read_bytes())
    for position, value in places:
        data[position] = value
    path.write_bytes(data)
    try:
        found = list_source(path)
    except DataError as error:
        assert "\n" not in error.message
    else:
        assert all(each.location.offset + each.location.length <= len(data) for each in found)


def test_list_source__links_in_circles_end(folder: Path) -> None:
    (folder / "cat/again").symlink_to(folder)
    assert len(list_source(folder)) == 3


def test_list_source__by_a_lister_whatever_the_suffix(folder: Path, tmp_path: Path) -> None:
    files = [folder / name for name in NAMES]
    box = tmp_path / "images.box"
    box.write_bytes(b"".join(path.read_bytes() for path in files))

    def lister(path: Path) -> Iterator[Found]:
        offset = 0
        for file in files:
            length = file.stat().st_size
            yield Found(Location(Kind.TAR, str(path), file.name, offset, length), "")
            offset += length

    found = list_source(box, lister)
    read = [Reader().read(each.location).tobytes() for each in found]
    assert read == [path.read_bytes() for path in files]
    assert list_source(tmp_path / "*.box", lister) == found
    assert len(build_index([box], max_bad_fraction=0.0, listers={box: lister})) == len(files)
    with pytest.raises(DataError, match="gone is not there"):
        list_source(tmp_path / "gone", lister)
    with pytest.raises(DataError, match="holds no images"):
        list_source(box, lambda _: [])


def test_list_source__what_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    table = pyarrow.table({"text": ["a"]})
    pyarrow.parquet.write_table(table, tmp_path / "text.parquet")
    for name, told in {
        "x.zip": "is no source of images",
        "none.tar": "is not there",
        "x.parquet": "x.parquet",
        "text.parquet": "no column of images among text",
    }.items():
        with pytest.raises(DataError, match=told):
            list_source(tmp_path / name)


def test_read__a_row_without_an_image(tmp_path: Path) -> None:
    table = pyarrow.table({"image": pyarrow.array([b"x", None], pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    first, second = list_source(tmp_path / "x.parquet")
    assert Reader().read(first.location).tobytes() == b"x"
    with pytest.raises(OSError, match="the row holds no image"):
        Reader().read(second.location)


def test_read__a_shard_that_was_cut(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [member("a.jpg", b"x" * 100)])
    (found,) = list_source(path)
    path.write_bytes(path.read_bytes()[:560])
    with pytest.raises(OSError, match=r"ends before a\.jpg does"):
        Reader().read(found.location)
    assert np.fromfile(path, np.uint8).size == 560
