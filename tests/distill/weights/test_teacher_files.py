"""A run goes on with the teacher that it began with, wherever its files lie now."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.errors import CheckpointError
from distill.export.save import ExportFacts, write_backbone
from distill.job.prepare import CHECKPOINTS, Job, JobRequest, prepare, read_job
from distill.runfolder.files import make_folder
from distill.runfolder.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    TeacherFacts,
    commit,
    read_manifest,
    staging_folder,
)
from distill.weights import teacher_files
from distill.weights.teacher_files import (
    CHECKSUMS,
    read_checksums,
    refuse_another_teacher,
    teacher_facts,
)
from teacher.shapes import ViTSpec
from tests.support.jobs import write_images

SPEC = ViTSpec(width=16, depth=1, heads=2, ffn_width=32, patch=8)
RECIPE = """\
name: mine
teacher: {weights: TEACHER, heads: none}
students: [{name: one, arch: vit, width: 16, depth: 1, heads: 2, patch: 8}]
data: {sources: [{path: images}]}
crops: {global: {size: 32}, local: {count: 2, size: 16}}
schedule: {batch: 4, steps: 10, lr: {peak: 1.0e-3}}
engine: {device: cpu, processes: 1, precision: fp32}
"""


def found(teacher: TeacherFacts | None, phase: str = "family") -> tuple[Path, Manifest]:
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        number=1,
        phase=phase,
        step=4,
        num_ranks=1,
        is_milestone=False,
        recipe_hash="hash",
        networks={},
        files={},
        teacher=teacher,
    )
    return Path("checkpoints/family-0000004"), manifest


def test_teacher_facts__a_file_is_hashed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, hashed = tmp_path / "teacher.pth", list[Path]()
    file.write_bytes(b"one")
    read_back = teacher_files.read_back
    monkeypatch.setattr(teacher_files, "read_back", lambda p: (hashed.append(p), read_back(p))[1])
    checksums = read_checksums(tmp_path)
    first = teacher_facts(file, None, checksums)
    (tmp_path / CHECKSUMS).write_text(json.dumps(checksums))
    assert teacher_facts(file, None, read_checksums(tmp_path)) == first and len(hashed) == 1
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert teacher_facts(file, None, checksums).weights_sha256 != first.weights_sha256
    (tmp_path / CHECKSUMS).write_text("[1]")
    assert read_checksums(tmp_path) == {}


def test_teacher_facts__a_folder_is_its_shards_without_the_heads(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors", "heads.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    heads = tmp_path / "heads.safetensors"
    first = teacher_facts(tmp_path, heads, {})
    heads.write_bytes(b"other")
    second = teacher_facts(tmp_path, heads, {})
    assert first.weights_sha256 == second.weights_sha256
    assert first.heads_sha256 != second.heads_sha256
    (tmp_path / "model-2.safetensors").write_bytes(b"other")
    assert teacher_facts(tmp_path, heads, {}).weights_sha256 != first.weights_sha256


def test_refuse_another_teacher__names_both_files_and_the_next_move() -> None:
    before = TeacherFacts(weights="/a", weights_sha256="0" * 64, heads="", heads_sha256="")
    moved = before.model_copy(update={"weights": "/elsewhere"})
    refuse_another_teacher(moved, found(before))
    refuse_another_teacher(moved, None)
    refuse_another_teacher(moved, found(None))  # of 0.1.0
    other = before.model_copy(update={"weights": "/b", "weights_sha256": "1" * 64})
    told = r"teacher\.weights = /b \(sha256 1{16}\): the run was trained from /a \(sha256 0{16}\)"
    with pytest.raises(CheckpointError, match=told) as error:
        refuse_another_teacher(other, found(before))
    assert "--fresh" in str(error.value.fix)
    heads = before.model_copy(update={"heads": "/h", "heads_sha256": "2" * 64})
    with pytest.raises(CheckpointError, match=r"teacher\.heads = /h .* from none \(sha256 none\)"):
        refuse_another_teacher(heads, found(before))


def test_manifest__without_a_teacher_is_the_text_that_010_wrote(tmp_path: Path) -> None:
    manifest = found(None)[1]
    assert '"teacher"' not in manifest.to_text()
    (tmp_path / MANIFEST).write_text(manifest.to_text())
    read = read_manifest(tmp_path / MANIFEST)
    assert read is not None and read.to_text() == manifest.to_text()


def write_teacher(folder: Path, seed: int) -> None:
    network = SPEC.build()
    SPEC.init_(network, torch.Generator().manual_seed(seed))
    facts = ExportFacts(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), {})
    write_backbone(folder, network.state_dict(), SPEC, facts)


def test_prepare__refuses_another_teacher_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images")
    for seed in (0, 1):
        write_teacher(tmp_path / f"teacher{seed}", seed)

    def start(teacher: str) -> Job:
        Path("mine.yaml").write_text(RECIPE.replace("TEACHER", str(tmp_path / teacher)))
        request = JobRequest(str(tmp_path / "mine.yaml"), (), str(tmp_path / "run"), "")
        return prepare(request, num_ranks=1, fresh=False, say=lambda _: None)

    job = start("teacher0")
    assert job.teacher is not None and job == read_job(tmp_path / "run")
    request = replace(job.request, ranks_per_node=2)
    prepare(request, num_ranks=1, fresh=False, say=lambda _: None)
    read = read_job(
        tmp_path / "run"
    )  # what every rank plans with; the run's recipe has no such line
    assert (read.recipe.engine.ranks_per_node, read.hash) == (2, job.hash)
    assert "ranks_per_node" not in (tmp_path / "run/recipe.resolved.yaml").read_text()
    folder = tmp_path / "run" / CHECKPOINTS
    staging = staging_folder(folder, "family", 4)
    make_folder(staging)
    manifest = found(job.teacher)[1].model_copy(update={"recipe_hash": job.hash})
    commit(folder, staging, manifest, 3)
    stored = (tmp_path / "run/job.json").read_text()
    with pytest.raises(CheckpointError, match=r"teacher1 .* the run was trained from .*teacher0 "):
        start("teacher1")
    assert (tmp_path / "run/job.json").read_text() == stored
    (tmp_path / "teacher0").rename(tmp_path / "moved")
    assert start("moved").teacher is not None
