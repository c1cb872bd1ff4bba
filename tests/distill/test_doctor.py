import pytest

from distill import doctor


def test_examine__this_machine_is_fine() -> None:
    findings = doctor.examine()
    assert [finding.what for finding in findings if not finding.is_ok] == []
    assert {"image decoder", "gloo", "free disk"} <= {finding.what for finding in findings}


def test_examine__a_missing_library_comes_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LIBRARIES", ("no-such-library",))
    finding = doctor.examine()[0]
    assert not finding.is_ok and "pip install" in finding.fix and finding.to_json()["what"] == "no-such-library"


def test_examine__a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_GIB", 1e9)
    finding = doctor.examine()[-1]
    assert not finding.is_ok and "Free some space" in finding.fix
