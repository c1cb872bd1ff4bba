from pathlib import Path

from distill.runfolder.parked import Parked, is_parked, read_parked, write_parked


def test_parked__is_read_back_until_a_person_deletes_it(tmp_path: Path) -> None:
    assert not is_parked(tmp_path, "small") and read_parked(tmp_path, "small") is None
    write_parked(tmp_path, "small", Parked(7, "no memory"))
    assert is_parked(tmp_path, "small") and not is_parked(tmp_path, "tiny")
    assert read_parked(tmp_path, "small") == Parked(7, "no memory")
    (tmp_path / "parked/small.json").unlink()
    assert read_parked(tmp_path, "small") is None


def test_parked__a_damaged_file_parks_all_the_same(tmp_path: Path) -> None:
    write_parked(tmp_path, "small", Parked(7, "no memory"))
    for text in ("", "{", "[]", '{"step": "x", "reason": ""}'):
        (tmp_path / "parked/small.json").write_text(text)
        parked = read_parked(tmp_path, "small")
        assert parked is not None and "small.json cannot be read" in parked.describe()
