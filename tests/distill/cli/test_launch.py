"""``distill launch``: a dry run prints the script and contacts no one; a wrong recipe prints nothing."""

from pathlib import Path

import pytest

from tests.support.command import exit_code_of


def test_slurm__a_dry_run_prints_the_script_and_makes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = (
        "quickstart",
        "schedule.batch=32",
        "checkpoint.grace=90",
        "--nodes",
        "2",
        "--gpus-per-node",
        "4",
    )
    assert exit_code_of("launch", "slurm", *words, "--qos", "high", "--dry-run") == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n") and "#SBATCH --qos=high" in script
    assert "#SBATCH --signal=TERM@90" in script
    assert "train quickstart schedule.batch=32" in script and "--gpus 4" in script
    assert list(tmp_path.iterdir()) == []


def test_k8s__a_dry_run_prints_the_manifest_and_contacts_no_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no kubectl
    words = (
        "quickstart",
        "checkpoint.grace=90",
        "--image",
        "i",
        "--claim",
        "c",
        "--name",
        "My_Run",
        "--nodes",
        "2",
    )
    assert exit_code_of("launch", "k8s", *words, "--dry-run") == 0
    manifest = capsys.readouterr().out
    assert "name: my-run" in manifest and '- "My_Run"' in manifest and "completions: 2" in manifest
    assert "terminationGracePeriodSeconds: 90" in manifest
    assert list(tmp_path.iterdir()) == []
    assert exit_code_of("launch", "k8s", *words) == 3
    assert "kubectl: not found, nothing was submitted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("slurm", "no-such-recipe", "--dry-run"), "no-such-recipe"),
        (("slurm", "quickstart", "--nodes", "0"), "--nodes"),
        (("k8s", "quickstart", "--dry-run"), "--image"),
        (("k8s", "quickstart", "--image", "i", "--claim", "c", "--kind", "pod"), "--kind pod"),
        (("ssh", "quickstart", "--hosts", "a;b"), "is no host name"),
        (("ssh", "quickstart", "no.such.key=1", "--hosts", "a"), "unknown key"),
    ],
)
def test_launch__bad_input_is_a_line_and_exit_code_2(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of("launch", *words) == 2
    given = capsys.readouterr()
    assert told in given.err and "Fix: " in given.err and given.out == ""


def test_ssh__prints_a_line_for_each_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of("launch", "ssh", "quickstart", "--hosts", "gpu01,gpu02") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
