"""Every tensor is where its operators are: whole jobs, the benchmark, a fault and pretraining on a GPU that is only pretended."""

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from distill.bench.measure import Bench, Request, family_of
from distill.bench.report import OURS
from distill.engine.device import take_device
from distill.engine.engine import prepare_deepspeed
from distill.errors import SetupError
from distill.job.prepare import JobRequest, prepare, read_job
from distill.job.run import _Run
from distill.recipe.reader import load_recipe
from distill.recipe.recipe_hash import recipe_hash
from distill.report.summary import finish
from distill.runfolder.heartbeat import Heartbeat
from distill.runfolder.requests import StopSaveRequests
from distill.train.faults import IN_A_ROW
from distill.train.groups import make_control
from tests.support.jobs import HEADS, TINY, without_heads, write_recipes
from tests.support.pretend_gpu import GPU, WrongDeviceError, pretending
from tests.support.pretraining import GENTLE, pretrain, write_pretraining
from tests.support.spawn import on_ranks

STEPS = 4
SWITCHES: tuple[tuple[Any, str], ...] = (
    (torch.utils.deterministic, "fill_uninitialized_memory"),  # type: ignore[attr-defined]
    (torch.backends.cudnn, "deterministic"),
    (torch.backends.cudnn, "benchmark"),
)
TIMEOUT_S = 400  # every operator passes through Python


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("HEADS", HEADS))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pretraining(tmp_path_factory.mktemp("pretraining"))


def bench_of(recipe: Path, overrides: tuple[str, ...], against: tuple[str, ...]) -> Bench:
    ranks = dist.get_world_size()
    overrides = (f"engine.processes={ranks}", "engine.teacher_micro_batch=4", *overrides)
    request = Request(str(recipe), overrides, against, ranks, 10, STEPS, None, None, 1.0)
    return Bench(request, *family_of(request), GPU)


def test_pretending__finds_what_a_gpu_would_not_do() -> None:
    assert on_ranks(1, mixed) == [
        (
            "aten::add",
            "aten::stack",
            "numpy",
            "c10d::allreduce_",
            "c10d::allreduce_",
            {"unknown": 2},
        )
    ]


def mixed() -> tuple[str, ...]:
    prepare_deepspeed("cpu")
    with pretending() as gpu:
        there, here = torch.ones(2, device="cuda"), torch.ones(2)
        assert there.is_cuda and (there * 2 + torch.ones(())).device == GPU and not here.is_cuda
        assert there.to(here).device == here.to(GPU).cpu().device == torch.device("cpu")
        control, found = make_control(timedelta(seconds=60)), []
        for wrong in (
            lambda: there + here,
            lambda: torch.stack([there.sum(), here.sum()]),
            lambda: there.numpy(),
            lambda: dist.all_reduce(here),
            lambda: dist.all_reduce(there, group=control),
        ):
            with pytest.raises(WrongDeviceError) as caught:
                wrong()
            found.append(str(caught.value).split(" ")[0].removesuffix(":"))
        gpu.asked.clear()
        assert bool(here.sum() > 0) and bool(there.sum() > 0) and there.sum().item() == 2
    return (*found, dict(gpu.asked))


@pytest.mark.slow
def test_bench__every_mode_and_a_save(recipe: Path) -> None:
    """In fp32: a CPU without instructions for bf16 takes seven times as long, and what waits is the same."""
    overrides = ("engine.precision=fp32",)
    on_ranks(2, run_bench, recipe, overrides, ("published", "saving"), timeout_s=TIMEOUT_S)


def run_bench(recipe: Path, overrides: tuple[str, ...], against: tuple[str, ...]) -> None:
    prepare_deepspeed("cpu")
    os.chdir(recipe.parent)  # a save is written to where the benchmark runs
    with pretending():
        bench = bench_of(recipe, overrides, against)
        bench.run()
        bench.trace()


@pytest.mark.slow
def test_job__teacher_and_students_then_more_from_its_files(tmp_path: Path) -> None:
    recipe = write_recipes(tmp_path, stage_steps=12, steps=4, save_every=4)
    text = recipe.read_text()
    recipe.write_text(text.replace("device: cpu", "device: auto"))
    finished = work_through(recipe, tmp_path / "run")
    for mode in ("fit", "none"):
        words = (*without_heads(finished, mode), "teacher.fit.steps=4", "schedule.steps=4")
        folder = work_through(recipe, tmp_path / mode, *words)
        assert len(list(folder.glob("students/*/model.safetensors"))) == 3


def work_through(recipe: Path, folder: Path, *overrides: str) -> Path:
    request = JobRequest(str(recipe), overrides, str(folder), "")
    prepare(request, num_ranks=2, fresh=True, say=lambda _: None)
    on_ranks(2, work_pretended, folder, timeout_s=TIMEOUT_S)
    return folder


def work_pretended(folder: Path) -> None:
    prepare_deepspeed("cpu")
    with pretending():
        _Run(
            read_job(folder), GPU, StopSaveRequests(folder), Heartbeat(folder, dist.get_rank())
        ).run()
        dist.barrier()
        if dist.get_rank() == 0:  # as the launcher does when the ranks are gone
            with mock.patch.object(torch.cuda, "is_available", lambda: True):
                finish(folder)


@pytest.mark.slow
def test_isolation__rolls_back_and_a_state_comes_back(recipe: Path, tmp_path: Path) -> None:
    told, losses = on_ranks(1, spoil, recipe, tmp_path)[0]
    assert told == (IN_A_ROW, 1, False)
    assert losses[0] == losses[1]


def spoil(recipe: Path, folder: Path) -> Any:
    prepare_deepspeed("cpu")
    with pretending():
        bench = bench_of(recipe, ("schedule.steps=100",), ())
        phase, fault_handler = bench.phases[OURS], bench.fault_handlers[OURS]
        fault_handler._run_folder = folder
        fault_handler.start(0, make_control(timedelta(seconds=60)))
        bench.warm_up(OURS)
        fault_handler.before_save(STEPS)
        trainer = phase.trainers[0]
        state = trainer.state()
        assert all(tensor.device.type == "cpu" for tensor in state.values())
        losses = []
        for _ in range(2):
            trainer.load_state(state)
            trainer.read_metrics(0.0)
            bench.steps_done[OURS] = STEPS
            bench.warm_up(OURS)
            values = trainer.read_metrics(0.0)
            assert values is not None and values["skipped"] == 0
            losses.append(values["loss"])
        with torch.no_grad():
            trainer.engine._shards.weights[0][0] = torch.nan
        bench.warm_up(OURS)
        fault_handler.before_save(4 * STEPS)
        record = fault_handler._records[trainer.name]
    return (record.num_skipped, record.num_rolled_back, record.is_parked), losses


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_pretraining__gives_the_bits_of_a_cpu(
    zero: int,
    images: Path,
    tmp_path: Path,
) -> None:
    words = (f"engine.zero={zero}", *GENTLE)
    (here,) = on_ranks(1, pretrain, images, tmp_path, *words)
    (there,) = on_ranks(1, pretrain_pretended, images, tmp_path, *words, timeout_s=TIMEOUT_S)
    assert here["losses"] == there["losses"]


def pretrain_pretended(images: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    prepare_deepspeed("cpu")
    with pretending():
        return pretrain(images, folder, *overrides, device=GPU)


def test_take_device__names_what_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert take_device("auto") == take_device("cpu") == torch.device("cpu")
    with pytest.raises(SetupError, match="no CUDA device"):
        take_device("cuda")
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert take_device("auto") == torch.device("cuda", 1) == taken[0]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SetupError, match="rank 2 of this machine has no GPU to itself"):
        take_device("cuda")
    assert take_device("cpu") == torch.device("cpu")


def test_take_device__a_task_with_one_visible_gpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert take_device("auto") == torch.device("cuda", 0)  # no LOCAL_RANK
    monkeypatch.setenv("SLURM_LOCALID", "3")
    with pytest.raises(SetupError, match="rank 3 of this machine"):  # one GPU for the machine
        take_device("auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert take_device("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")  # started inside the task, beside others
    with pytest.raises(SetupError, match="rank 1 of this machine"):
        take_device("auto")


@pytest.fixture
def _switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch's switches as they were, afterwards."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for owner, name in SWITCHES:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    yield
    torch.use_deterministic_algorithms(False)


def switches() -> list[Any]:
    """What the process has, cuBLAS's variable first."""
    states = [os.environ.get("CUBLAS_WORKSPACE_CONFIG")]
    states += [torch.are_deterministic_algorithms_enabled()]
    states += [torch.is_deterministic_algorithms_warn_only_enabled()]
    return [*states, *(getattr(owner, name) for owner, name in SWITCHES)]


@pytest.mark.usefixtures("_switches")
def test_take_device__deterministic_gpus_are_so_before_cuda_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual, at_start = switches(), list[Any]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: at_start.append(switches()))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    take_device("cpu", is_deterministic=True)
    take_device("auto")
    assert at_start == [usual] == [switches()]
    take_device("auto", is_deterministic=True)
    assert at_start[1] == [":4096:8", True, False, False, True, False]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    take_device("auto", is_deterministic=True)
    assert at_start[2][0] == ":16:8"  # the other setting with one order


def test_deterministic__is_no_part_of_the_hash() -> None:
    path = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"
    with_it, without = (load_recipe(path, words) for words in (["engine.deterministic=true"], []))
    assert recipe_hash(with_it) == recipe_hash(without)
