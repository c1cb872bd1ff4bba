"""The job from end to end as a user starts it: processes, engines, DALI, files. Tiny networks, a few steps.

photographs -> teacher (two stages) -> three students -> folders, scores, picture
stopped by a signal and started again = never stopped, bit for bit
torchrun with three ranks, one process, broken images, a killed rank
"""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.command import Run
from tests.support.jobs import (
    ENVIRONMENT,
    FAMILY,
    TEACHER,
    assert_equal_students,
    is_in,
    left_after,
    ranks_of,
    run_and_interrupt,
    run_distill,
    servers_of,
    start,
    students_of,
    wait_for_step,
    without_heads,
    write_images,
    write_recipes,
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    data = write_images(folder / "images")
    (folder / "teacher.yaml").write_text(TEACHER.replace("DATA", str(data)))
    (folder / "family.yaml").write_text(FAMILY.replace("DATA", str(data)).replace("STEPS", "20"))
    return folder / "family.yaml"


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    out = recipe.parent / "runs"
    ended = run_distill("train", str(recipe), "--out", str(out))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (recipe.parent / "screen.txt").write_text(ended.stdout)
    return out / "tiny"


def test_train__leaves_everything_a_user_expects(finished: Path, recipe: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["students"]) == {"plain", "gated", "conv"}
    assert all({"knn", "loss"} <= set(scores) for scores in summary["students"].values())
    assert {"pixels", "colour", "untrained"} <= set(summary["baselines"])
    assert set(summary["phases_s"]) == {"base", "gram", "family"} and summary["images_per_s"] > 0
    for name in (
        "recipe.yaml",
        "recipe.resolved.yaml",
        "plan.json",
        "env.json",
        "status.json",
        "features.png",
        "features.json",
    ):
        assert (finished / name).stat().st_size > 0
    status = json.loads((finished / "status.json").read_text())
    assert status["state"] == "finished" and status["work_done"] == 1.0
    rows = [
        json.loads(line)
        for line in (finished / "metrics" / "teacher.jsonl").read_text().splitlines()
    ]
    assert [(row["phase"], row["step"]) for row in rows] == [
        ("base", 10),
        ("base", 20),
        ("gram", 10),
    ]
    assert "gram" in rows[-1] and "gram" not in rows[0] and all(row["skipped"] == 0 for row in rows)
    screen = (recipe.parent / "screen.txt").read_text()
    assert "\x1b" not in screen and "finished" in screen


def test_eval__a_full_disk_costs_the_picture_only(
    distill: Run, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_disk(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    picture = finished / "features.png"
    before = picture.read_bytes()
    for is_full in (True, False):
        with monkeypatch.context() as patch:
            if is_full:
                patch.setattr("distill.report.pictures.render", fill_disk)
            ended = distill("eval", str(finished))
        assert ended.code == 0 and "teacher" in ended.out, ended.err
        status = json.loads((finished / "status.json").read_text())
        assert status["state"] == "finished"
        assert ("No space left" in status["message"]) == ("No space left" in ended.err) == is_full
        assert picture.read_bytes() == before


def test_train__folders_load_in_transformers(finished: Path) -> None:
    from transformers import AutoModel

    for folder in (finished / "teacher", *(finished / "students").iterdir()):
        model, facts = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not facts["missing_keys"] and not facts["unexpected_keys"]
        assert model(torch.randn(1, 3, 32, 32)).last_hidden_state.isfinite().all()


@pytest.mark.slow
def test_train__one_process_equals_two(finished: Path, recipe: Path) -> None:
    out = recipe.parent / "runs1"
    assert run_distill("train", str(recipe), "--out", str(out), "--gpus", "1").returncode == 0
    for name, weights in students_of(out / "tiny").items():
        for key, tensor in students_of(finished)[name].items():
            # 50 steps of AdamW turn a last-bit difference of a gradient into about a learning rate, 1e-3, at worst
            torch.testing.assert_close(weights[key], tensor, rtol=0, atol=5e-3)
    one, two = (
        json.loads((run / "metrics" / "plain.jsonl").read_text().splitlines()[0])["loss"]
        for run in (out / "tiny", finished)
    )
    assert one == pytest.approx(two, rel=1e-3)


def test_stop__in_every_phase_and_resume_equals_never_stopping(
    finished: Path, recipe: Path
) -> None:
    out = recipe.parent / "stopped"
    words = ["train", str(recipe), "--out", str(out)]
    for phase in ("base", "gram", "family"):
        run_and_interrupt(words, out / "tiny/status.json", phase)
    resumed = run_distill(*words)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert_equal_students(out / "tiny", finished)


@pytest.mark.slow
def test_train__students_that_leave_and_join_do_not_touch_the_others(
    recipe: Path, finished: Path, tmp_path: Path
) -> None:
    sizes = "ranks: 1, head_widths: {dino_hidden: 16, ibot_hidden: 16}"
    vit = f"arch: vit, width: 16, depth: 1, heads: 2, patch: 8, {sizes}"
    stays, leaves = f"{{name: stays, {vit}}}", f"{{name: leaves, ffn: swiglu, {vit}}}"
    joins = f"{{name: joins, arch: convnext, depths: [1, 1], widths: [8, 12], {sizes}}}"
    words = ["train", str(recipe), f"teacher={{weights: {finished / 'teacher'}}}"]
    words += ["schedule.steps=40", "--out"]
    before, after = f"students=[{stays}, {leaves}]", f"students=[{stays}, {joins}]"
    ended = run_distill(*words, str(tmp_path / "once"), before)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run = tmp_path / "twice/tiny"
    run_and_interrupt([*words, str(tmp_path / "twice"), before], run / "status.json", "family")
    step = json.loads((run / "status.json").read_text())["last_checkpoint"]["step"]
    assert 0 < step < 40
    ended = run_distill(
        *words, str(tmp_path / "twice"), after.replace("name: stays,", "name: stays, lr: 1.0e-4,")
    )
    assert ended.returncode == 1 and "students.stays: its lines in the recipe" in ended.stderr
    ended = run_distill(*words, str(tmp_path / "twice"), after)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"joins: new, starts at step {step} with fresh weights" in ended.stdout
    assert f"leaves: no longer in the recipe, left at step {step}" in ended.stdout
    assert set(students_of(run)) == {"stays", "joins"}
    rows = [json.loads(line) for line in (run / "metrics/joins.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(step + 10 - step % 10, 41, 10))
    once = students_of(tmp_path / "once/tiny")["stays"]
    for key, tensor in students_of(run)["stays"].items():
        assert torch.equal(tensor, once[key]), key


@pytest.mark.slow
def test_train__a_teacher_whose_features_are_learned(
    recipe: Path, finished: Path, tmp_path: Path
) -> None:
    words = ["train", str(recipe), *without_heads(finished, "none"), "--out"]
    ended = run_distill(*words, str(tmp_path / "once"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run_and_interrupt(
        [*words, str(tmp_path / "twice")], tmp_path / "twice/tiny/status.json", "family"
    )
    ended = run_distill(*words, str(tmp_path / "twice"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert_equal_students(tmp_path / "once/tiny", tmp_path / "twice/tiny")
    row = json.loads((tmp_path / "once/tiny/metrics/conv.jsonl").read_text().splitlines()[-1])
    assert {"cosine", "smooth_l1"} <= row.keys() and "dino" not in row


@pytest.mark.slow
def test_train__a_network_from_outside(recipe: Path, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.width, self.stride = 12, 8\n"
        "        self.conv = nn.Conv2d(3, 12, 8, 8)\n"
        "    def forward(self, image):\n"
        "        patch_map = self.conv(image)\n"
        "        return patch_map.mean((2, 3)), patch_map\n"
    )
    student = '{name: mine, arch: "mynet:Net", head_widths: {dino_hidden: 16, ibot_hidden: 16}}'
    words = [f"teacher={{weights: {finished / 'teacher'}}}", f"students=[{student}]"]
    (tmp_path / "teacher").mkdir()  # a user's own; ours are found first
    (tmp_path / "students.py").write_text("raise ImportError('not ours')\n")
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "distill", "train", str(recipe), *words),
            *("schedule.steps=10", "--out", str(tmp_path / "runs")),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=ENVIRONMENT,
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = json.loads((tmp_path / "runs/tiny/summary.json").read_text())
    assert summary["students"]["mine"]["knn"] > 0
    ended = run_distill("train", str(recipe), *words, "--out", str(tmp_path / "elsewhere"))
    assert (
        ended.returncode == 2 and "run distill in the folder that holds the module" in ended.stderr
    )


@pytest.mark.slow
def test_train__students_of_every_kind_in_one_job(
    recipe: Path, finished: Path, tmp_path: Path
) -> None:
    sizes = (
        "arch: vit, width: 16, depth: 1, heads: 2, head_widths: {dino_hidden: 16, ibot_hidden: 16}"
    )
    students = f"[{{name: early, ranks: 1, patch: 8, steps: 12, {sizes}}}, {{name: half, ranks: 1, patch: 4, crop_scale: 0.5, {sizes}}}]"
    words = ["train", str(recipe), f"teacher={{weights: {finished / 'teacher'}}}"]
    words += [
        f"students={students}",
        "schedule.batch=32",
        "engine.micro_batch=16",
        "schedule.steps=30",
        "--out",
    ]
    ended = run_distill(*words, str(tmp_path / "once"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run = tmp_path / "once/tiny"
    steps = {
        name: [json.loads(line)["step"] for line in rows.read_text().splitlines()]
        for name, rows in ((n, run / f"metrics/{n}.jsonl") for n in ("early", "half"))
    }
    assert steps == {"early": [10, 20], "half": [10, 20, 30]}
    for name, size in {"early": 32, "half": 16}.items():
        said = json.loads((run / f"students/{name}/preprocessor_config.json").read_text())
        assert said["size"] == {"height": size, "width": size}
    words[-1:] = ["engine.teacher_sharding=sharded", "engine.lookahead=1", "--out"]  # no matter
    words.append(str(tmp_path / "twice"))
    run_and_interrupt(words, tmp_path / "twice/tiny/status.json", "family")
    ended = run_distill(*words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    plan = json.loads((tmp_path / "twice/tiny/plan.json").read_text())
    assert any("sharded" in note for note in plan["notes"])
    for name in steps:
        once, twice = (
            load_file(folder / f"tiny/students/{name}/model.safetensors")
            for folder in (tmp_path / "once", tmp_path / "twice")
        )
        assert all(torch.equal(once[key], twice[key]) for key in once)


@pytest.mark.slow
def test_fit_heads__then_train_equals_train(recipe: Path, finished: Path, tmp_path: Path) -> None:
    words = [str(recipe), *without_heads(finished, "fit"), "--out"]
    ended = run_distill("train", *words, str(tmp_path / "once"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    ended = run_distill("weights", "fit-heads", *words, str(tmp_path / "twice"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "heads/teacher.safetensors" in ended.stdout
    fitted = load_file(tmp_path / "twice/tiny/heads/teacher.safetensors")
    assert not (tmp_path / "twice/tiny/students").exists()
    ended = run_distill("train", *words, str(tmp_path / "twice"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert_equal_students(tmp_path / "once/tiny", tmp_path / "twice/tiny")
    straight = load_file(tmp_path / "once/tiny/heads/teacher.safetensors")
    assert all(torch.equal(straight[key], tensor) for key, tensor in fitted.items())


def test_check__says_what_a_teacher_without_heads_needs(
    distill: Run, recipe: Path, finished: Path, tmp_path: Path
) -> None:
    for path in (finished / "teacher").iterdir():
        if path.name != "heads.safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    ended = distill("check", str(recipe), f"teacher={{weights: {tmp_path}}}")
    assert ended.code == 1
    assert "no heads.safetensors beside them" in ended.err and "`heads: fit`" in ended.err
    for mode, said in (("fit", "20 steps (heads: fit)"), ("none", "features (heads: none)")):
        ended = distill("check", str(recipe), *without_heads(finished, mode))
        assert ended.code == 0 and said in ended.out, ended.err


@pytest.mark.slow
def test_torchrun__three_ranks(recipe: Path, finished: Path) -> None:
    out = recipe.parent / "runs3"
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "3",
        "-m",
        "distill",
        "train",
        str(recipe),
    ]
    ended = subprocess.run(
        [sys.executable, *words, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=240,
        env=ENVIRONMENT,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert json.loads((out / "tiny" / "plan.json").read_text())["num_ranks"] == 3
    assert set(students_of(out / "tiny")) == set(students_of(finished))
    assert (out / "tiny" / "summary.json").is_file()


@pytest.mark.slow
def test_eval__needs_the_run_folder_only(
    distill: Run, recipe: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads((finished / "summary.json").read_text())
    texts = {path: path.read_text() for path in (recipe, recipe.with_name("teacher.yaml"))}
    monkeypatch.chdir(tmp_path)
    try:
        for path in texts:
            path.unlink()
        ended = distill("eval", str(finished))
    finally:
        for path, text in texts.items():
            path.write_text(text)
    assert ended.code == 0, ended.err
    assert json.loads((finished / "summary.json").read_text()) == before


@pytest.mark.slow
def test_train__a_restart_reads_the_run_folder_only(finished: Path, tmp_path: Path) -> None:
    mine = write_recipes(tmp_path, stage_steps=20, steps=20, save_every=5)
    process = start(mine, tmp_path / "runs", "--max-restarts", "1", "checkpoint.every=5")
    run = tmp_path / "runs" / "tiny"
    wait_for_step(process, run, "base", 10)
    mine.write_text(mine.read_text().replace("peak: 1.0e-3", "peak: 9.0e-3"))
    mine.with_name("teacher.yaml").unlink()
    os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "restart 1 of 1" in output
    assert_equal_students(run, finished)


def test_train__another_recipe_does_not_mix_with_a_run(
    distill: Run, recipe: Path, finished: Path
) -> None:
    ended = distill("train", str(recipe), "seed=1", "--out", str(finished.parent))
    assert ended.code == 1
    assert (
        "belongs to another version of this recipe" in ended.err
        and "Fix: Pass --fresh" in ended.err
    )
    # the run was not touched
    assert "override" not in (finished / "recipe.resolved.yaml").read_text()


def test_train__a_folder_of_something_else_is_left_alone(
    distill: Run, recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "precious.txt").write_text("mine")
    ended = distill("train", str(recipe), "--out", str(tmp_path), "--fresh")
    assert ended.code == 1 and "holds files but is not a run folder" in ended.err
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["precious.txt"]


def test_train__a_broken_folder_is_one_clear_line(
    distill: Run, recipe: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    ended = distill("train", str(recipe), "--data", str(empty), "--out", str(tmp_path / "runs"))
    assert ended.code == 2 and "holds no image" in ended.err and "Traceback" not in ended.err
    (empty / "a.jpg").write_bytes(b"not a jpeg")
    ended = distill("train", str(recipe), "--data", str(empty), "--out", str(tmp_path / "runs"))
    assert ended.code == 1 and "a.jpg: cannot be used" in ended.err
    assert not (tmp_path / "runs" / "tiny").exists()


def test_train__a_killed_rank_ends_the_job_and_is_named(recipe: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "distill",
        "train",
        str(recipe),
        "schedule.steps=100000",
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 120
    while not is_in(tmp_path / "tiny" / "status.json", "family"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    time.sleep(2.0)  # four heartbeats: each rank has told that it is in this phase
    ranks, servers = ranks_of(process.pid), servers_of(process.pid)
    assert len(ranks) == 2 and len(servers) == 1  # on a CPU
    os.kill(ranks[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 4 and "The same command resumes" in output
    assert re.search(r"rank \d on \S+: .*, family step \d+; ended by SIGKILL", output), output
    assert not left_after([*ranks, *servers], wait_s=5.0)


@pytest.mark.slow
def test_train__sigusr1_saves_and_goes_on_and_sigterm_saves_and_ends(
    recipe: Path, tmp_path: Path
) -> None:
    words = ["train", str(recipe), "schedule.steps=100000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "distill", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )
    status = tmp_path / "tiny" / "status.json"

    def saved_step() -> int:
        saved = json.loads(status.read_text())["last_checkpoint"] if status.is_file() else None
        return int(saved["step"]) if saved and saved["phase"] == "family" else 0

    deadline = time.monotonic() + 120
    while not is_in(status, "family"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    while not saved_step():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    step = saved_step()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert saved_step() > step and json.loads(status.read_text())["state"] == "stopped"
