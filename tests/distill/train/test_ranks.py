"""Claims about several processes: the real loop on real gloo groups and real engines, with tiny networks."""

import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distill.engine.engine import prepare_deepspeed
from distill.plan.placement import NetworkCost
from distill.plan.plan import PlanOptions, make_plan
from distill.plan.traffic import gathered_bytes, slice_bytes
from distill.runfolder.events import read_events
from distill.runfolder.heartbeat import Heartbeat
from distill.train.faults import FaultHandler
from distill.train.groups import Groups, make_groups
from distill.train.loop import run_phase
from distill.train.phase import Decision, Phase, Trainer
from distill.train.schedule import StepNumbers
from distill.train.student import Attempt, StudentTrainer
from teacher.batch import StudentBatch
from teacher.chunks import sinkhorn
from teacher.losses import koleo_sum
from tests.support.families import (
    IMAGES,
    WHOLE,
    NoSaver,
    Ways,
    batch_of,
    family_phase,
)
from tests.support.spawn import on_ranks


class Recorder:
    """Reads every network's numbers after each step, so that they are of one step."""

    def __init__(self, phase: Phase) -> None:
        self.losses: dict[str, list[float]] = {trainer.name: [] for trainer in phase.trainers}
        self.skipped = dict.fromkeys(self.losses, 0)

    def record(self, phase: Phase, step: int, faults: object) -> Decision:
        for trainer in phase.trainers:
            values = trainer.read_metrics(wait=0.0)
            if values is not None:  # it is finished
                self.losses[trainer.name].append(values["loss"])
                self.skipped[trainer.name] += int(values["skipped"])
        return Decision(save=False, stop=False)


def run_steps(phase: Phase, groups: Groups, start_step: int = 0) -> tuple[Recorder, list[str]]:
    """Trains a phase in the real loop with a real fault handler; the numbers, and the texts of the run's events."""
    with tempfile.TemporaryDirectory() as name:
        folder, recorder = Path(name), Recorder(phase)
        fault_handler = FaultHandler(phase, folder)
        fault_handler.start(start_step, groups.control)
        heartbeat = Heartbeat(folder, phase.world_rank)
        assert run_phase(phase, recorder, NoSaver(), fault_handler, heartbeat, start_step)
        fault_handler.before_save(phase.num_steps)
        return recorder, [event.text for event in read_events(folder)]


def spoil_(trainer: StudentTrainer, step: int) -> None:
    """Makes a weight of the network that it computes with NaN, right before one step."""
    train_step = trainer.train_step

    def spoiled(batch: StudentBatch, numbers: StepNumbers) -> Attempt:
        if numbers.run_step == step:
            with torch.no_grad():
                next(iter(trainer.engine.module.dino_head.parameters()))[0, 0] = float("nan")
        return train_step(batch, numbers)

    trainer.train_step = spoiled  # type: ignore[method-assign]


def predicted_bytes(phase: Phase, ways: Ways) -> int:
    """What the exchange should have brought to this rank."""
    if ways.is_published:
        return phase.num_steps * gathered_bytes(phase.plan, ways.wire)
    per_step = []
    for step in range(phase.num_steps):
        per_image = batch_of(step, images=ways.images)[1].sum(dim=(1, 2)).numpy()
        sent = slice_bytes(phase.plan_schedule.at(step), step, ways.wire, per_image)
        per_step.append(sent[phase.world_rank])
    return sum(per_step)


def train_family(
    works: list[NetworkCost],
    num_steps: int,
    zero: int,
    precision: str,
    bad: tuple[str, int] | None = None,
    ways: Ways = WHOLE,
) -> dict[str, Any]:
    """Losses, EMA and targets of every student this rank trains, and what the exchange brought to it."""
    prepare_deepspeed("cpu")
    plan = make_plan(
        works,
        1.0,
        ways.images,
        dist.get_world_size(),
        PlanOptions(
            lookahead=ways.lookahead,
            has_full_groups=ways.micro_batch is not None,
            has_even_shares=ways.is_published,
            is_teacher_sharded=ways.is_sharded,
        ),
    )
    groups = make_groups(plan, timedelta(seconds=60))
    phase = family_phase(plan, groups, num_steps, ways, zero, precision)
    trainers: dict[str, Any] = {trainer.name: trainer for trainer in phase.trainers}
    if bad is not None and bad[0] in trainers:
        spoil_(trainers[bad[0]], bad[1])
    recorder, events = run_steps(phase, groups)
    return {
        "losses": recorder.losses,
        "targets": {name: trainer.targets.state() for name, trainer in trainers.items()},
        "ema": {name: trainer.ema() for name, trainer in trainers.items()},
        "skipped": recorder.skipped,
        "events": events,
        "received_bytes": phase.exchange.received_bytes,
        "predicted_bytes": predicted_bytes(phase, ways),
    }


def merged(results: list[dict[str, Any]], key: str, name: str) -> Any:
    return next(result[key][name] for result in results if name in result[key])


FAMILY = [NetworkCost("a", 3.0), NetworkCost("b", 2.0), NetworkCost("c", 1.0)]
APART = [replace(work, ranks=1) for work in FAMILY]  # without, groups overlap on three ranks


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Three students in one process."""
    return on_ranks(1, train_family, FAMILY, 4, 1, "fp32")[0]


@pytest.mark.parametrize(
    ("num_ranks", "zero"),
    [
        pytest.param(2, 1, marks=pytest.mark.slow),
        (3, 2),
        pytest.param(5, 1, marks=pytest.mark.slow),
    ],
)
def test_family__many_processes_equal_one(num_ranks: int, zero: int, alone: dict[str, Any]) -> None:
    results = on_ranks(num_ranks, train_family, FAMILY, 4, zero, "fp32")
    for name in "abc":
        # fp32 sums in another order; measured 1e-7, four steps of AdamW included
        assert merged(results, "losses", name) == pytest.approx(alone["losses"][name], rel=2e-6)
        for key, tensor in merged(results, "ema", name).items():
            torch.testing.assert_close(tensor, alone["ema"][name][key], rtol=0, atol=2e-5)


def test_family__a_student_with_siblings_equals_the_student_alone(alone: dict[str, Any]) -> None:
    single = on_ranks(1, train_family, [NetworkCost("b", 2.0)], 4, 1, "fp32")[0]
    assert single["losses"]["b"] == alone["losses"]["b"]
    assert all(
        torch.equal(single["ema"]["b"][key], tensor) for key, tensor in alone["ema"]["b"].items()
    )


def test_family__a_fault_of_one_student_leaves_the_others_bit_equal(alone: dict[str, Any]) -> None:
    hurt = on_ranks(1, train_family, FAMILY, 4, 1, "fp32", ("b", 2))[0]
    assert hurt["skipped"] == {"a": 0, "b": 1, "c": 0}  # which restores what it computes with
    assert hurt["events"] == ["b: step 2 skipped, its dino loss is not finite"]
    assert all(tensor.isfinite().all() for tensor in hurt["ema"]["b"].values())
    for name in "ac":
        assert hurt["losses"][name] == alone["losses"][name]
        assert all(
            torch.equal(hurt["ema"][name][key], tensor)
            for key, tensor in alone["ema"][name].items()
        )


@pytest.mark.slow
def test_family__bf16_follows_fp32(alone: dict[str, Any]) -> None:
    half = on_ranks(2, train_family, FAMILY, 4, 1, "bf16")
    for name in "abc":
        assert merged(half, "losses", name) == pytest.approx(
            alone["losses"][name], rel=2e-2
        )  # 8 bits of mantissa


WAYS = [  # look-ahead, published
    pytest.param(0, False, marks=pytest.mark.slow),
    pytest.param(1, False, marks=pytest.mark.slow),
    (3, False),
    pytest.param(0, True, marks=pytest.mark.slow),
    (2, True),
]


@pytest.fixture(scope="module")
def filled() -> list[dict[str, Any]]:
    """Three students on three ranks, shares filled, no look-ahead."""
    return on_ranks(3, train_family, APART, 6, 1, "fp32")


@pytest.mark.parametrize(("lookahead", "is_published"), WAYS)
def test_exchange__every_way_gives_the_same_bits_and_the_predicted_bytes(
    lookahead: int, is_published: bool, filled: list[dict[str, Any]]
) -> None:
    results = on_ranks(
        3, train_family, APART, 6, 1, "fp32", None, Ways(True, lookahead, is_published)
    )
    for rank, result in enumerate(results):
        assert result["losses"] == filled[rank]["losses"]
        for name, weights in result["ema"].items():
            for key, tensor in weights.items():
                assert torch.equal(tensor, filled[rank]["ema"][name][key]), (name, key)
        assert result["received_bytes"] == result["predicted_bytes"]


def test_family__a_sharded_teacher_gives_the_same_bits(filled: list[dict[str, Any]]) -> None:
    ways = Ways(lookahead=2, is_sharded=True)
    results = on_ranks(3, train_family, APART, 6, 1, "fp32", None, ways)  # 11, 10 and 11 images
    for rank, result in enumerate(results):
        assert result["losses"] == filled[rank]["losses"]
        assert result["received_bytes"] == result["predicted_bytes"]


def test_family__sees_crops_at_half_their_size_and_gets_the_predicted_bytes() -> None:
    """Full crops travel; targets are those of the size that the teacher sees."""
    ways = [Ways(lookahead=ahead, crop_scale=0.5) for ahead in (0, 2)]
    at_once, ahead = (on_ranks(3, train_family, APART, 3, 1, "fp32", None, way) for way in ways)
    for result, other in zip(at_once, ahead, strict=True):
        assert result["losses"] == other["losses"]
        assert result["received_bytes"] == other["received_bytes"] == result["predicted_bytes"]


@pytest.mark.slow
def test_exchange__lookahead_gives_the_same_bits_where_groups_overlap() -> None:
    runs = [
        on_ranks(3, train_family, FAMILY, 4, 1, "fp32", None, Ways(lookahead=lookahead))
        for lookahead in (0, 2)
    ]
    assert sum(len(result["losses"]) for result in runs[0]) > len(FAMILY)
    for at_once, ahead in zip(*runs, strict=True):
        assert at_once["losses"] == ahead["losses"]
        assert ahead["received_bytes"] == ahead["predicted_bytes"]


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_exchange__counts_what_arrives_from_other_ranks(num_ranks: int) -> None:
    results = on_ranks(num_ranks, train_family, FAMILY, 3, 1, "fp32", None, Ways(lookahead=2))
    plan = make_plan(FAMILY, 1.0, IMAGES, num_ranks, PlanOptions(lookahead=2))
    for rank, result in enumerate(results):
        expected = 0
        for step in range(3):
            per_image = batch_of(step)[1].sum(dim=(1, 2))
            share = plan.share(rank, step)
            foreign = [i for part in plan.required_positions[rank] for i in part if i not in share]
            pixels = 2 * 3 * 16 * 16 + 2 * 3 * 8 * 8
            expected += len(foreign) * (pixels + 2 * 6 * 4 + 2 * 3 * 4)
            expected += sum(int(per_image[i]) for i in foreign) * 6 * 4
        assert result["received_bytes"] == expected


@pytest.mark.parametrize(
    ("num_ranks", "zero", "has_heads"),
    [
        pytest.param(1, 1, True, marks=pytest.mark.slow),
        pytest.param(1, 2, False, marks=pytest.mark.slow),
        (2, 2, True),
    ],
)
def test_family__micro_batches_add_up_to_the_whole_slice(
    num_ranks: int, zero: int, has_heads: bool, alone: dict[str, Any]
) -> None:
    whole = alone
    if not has_heads:
        whole = on_ranks(1, train_family, FAMILY, 4, 1, "fp32", None, Ways(has_heads=False))[0]
    ways = Ways(has_heads, micro_batch=16)
    results = on_ranks(num_ranks, train_family, FAMILY, 4, zero, "fp32", None, ways)
    for name in "abc":
        assert merged(results, "losses", name) == pytest.approx(whole["losses"][name], rel=2e-6)
        for key, tensor in merged(results, "ema", name).items():
            torch.testing.assert_close(tensor, whole["ema"][name][key], rtol=0, atol=2e-5)


@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_family__a_rank_with_a_group_less_has_an_empty_micro_batch(zero: int) -> None:
    """Slices of 16 and 32 images in two micro-batches: as many gradients are added up on every rank of a student."""
    uneven = [replace(work, ranks=2) for work in FAMILY[1:]]
    whole = on_ranks(1, train_family, FAMILY[1:], 3, 1, "fp32", None, Ways(images=48))[0]
    ways = Ways(images=48, micro_batch=16)
    results = on_ranks(2, train_family, uneven, 3, zero, "fp32", None, ways)
    for name in "bc":
        assert merged(results, "losses", name) == pytest.approx(whole["losses"][name], rel=2e-6)
        for key, tensor in merged(results, "ema", name).items():
            torch.testing.assert_close(tensor, whole["ema"][name][key], rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [None, 5])
def test_family__koleo_groups_of_another_size_are_those_of_one_process(
    micro_batch: int | None,
) -> None:
    """Groups of 12 of 32 images, which slices of ranks and micro-batches cut."""
    works, ways = [NetworkCost("a", 1.0)], Ways(koleo_group=12)
    whole = on_ranks(1, train_family, works, 3, 1, "fp32", None, ways)[0]
    cut = replace(ways, micro_batch=micro_batch)
    results = on_ranks(3, train_family, [NetworkCost("a", 1.0, 3)], 3, 1, "fp32", None, cut)
    assert merged(results, "losses", "a") == pytest.approx(whole["losses"]["a"], rel=2e-6)
    for key, tensor in merged(results, "ema", "a").items():
        torch.testing.assert_close(tensor, whole["ema"]["a"][key], rtol=0, atol=2e-5)
    other = on_ranks(1, train_family, works, 3, 1, "fp32", None, Ways())[0]
    assert other["losses"]["a"] != pytest.approx(whole["losses"]["a"], rel=1e-4)


@pytest.mark.slow
def test_family__micro_batches_in_bf16_add_up_in_fp32(alone: dict[str, Any]) -> None:
    results = on_ranks(2, train_family, FAMILY, 4, 1, "bf16", None, Ways(micro_batch=16))
    for name in "abc":
        losses = merged(results, "losses", name)
        assert losses == pytest.approx(alone["losses"][name], rel=2e-2)  # 8 bits of mantissa


@pytest.mark.parametrize("lookahead", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_family__a_student_that_finishes_early_leaves_the_others_as_they_were(
    lookahead: int, filled: list[dict[str, Any]]
) -> None:
    ways = Ways(lookahead=lookahead, ends=(("a", 3),))
    results = on_ranks(3, train_family, APART, 6, 1, "fp32", None, ways)
    for rank, result in enumerate(results):
        assert result["received_bytes"] == result["predicted_bytes"]
        for name, losses in result["losses"].items():
            assert losses == filled[rank]["losses"][name][: 3 if name == "a" else 6]
            for key, tensor in result["ema"][name].items():
                same = torch.equal(tensor, filled[rank]["ema"][name][key])
                assert same or name == "a", (name, key)
    (rank,) = (rank for rank, result in enumerate(results) if "a" in result["losses"])
    assert results[rank]["received_bytes"] < filled[rank]["received_bytes"]  # nothing for nobody


def sinkhorn_and_koleo(num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's columns, KoLeo sum and KoLeo gradient for an uneven split of some rows."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, 6, dtype=torch.float64, generator=generator)
    prototypes = torch.randn(9, 6, dtype=torch.float64, generator=generator)
    borders = [num_rows * part // num_ranks for part in range(num_ranks + 1)]
    start, stop = borders[rank], borders[rank + 1]
    group = dist.group.WORLD if num_ranks > 1 else None
    assignment = sinkhorn(rows[start:stop], prototypes, 0.07, group)
    own = rows[start:stop].clone().requires_grad_()
    loss = koleo_sum(own, 4, start, num_rows, group)
    (grad,) = torch.autograd.grad(loss, own)
    return assignment.columns(0, 9), loss.detach(), grad


@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_losses__over_ranks_equal_one_process(num_ranks: int) -> None:
    (columns, loss, grad), *_ = on_ranks(1, sinkhorn_and_koleo, 11)
    parts = on_ranks(num_ranks, sinkhorn_and_koleo, 11)
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), columns, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(sum(p[1] for p in parts), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([p[2] for p in parts]), grad, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_family__without_heads_many_processes_equal_one() -> None:
    alone = on_ranks(1, train_family, FAMILY, 4, 1, "fp32", None, Ways(has_heads=False))[0]
    results = on_ranks(3, train_family, FAMILY, 4, 2, "fp32", None, Ways(has_heads=False))
    for name in "abc":
        losses = merged(results, "losses", name)
        # fp32 sums in another order; the statistics are float64 sums
        assert losses == pytest.approx(alone["losses"][name], rel=2e-6)
        for key, tensor in merged(results, "targets", name).items():
            torch.testing.assert_close(tensor, alone["targets"][name][key], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "zero", "micro_batch"), [(1, 1, 16), (2, 1, None), (2, 3, 16)]
)
def test_family__with_batch_norm_ranks_and_micro_batches_equal_one(
    num_ranks: int, zero: int, micro_batch: int | None
) -> None:
    works, ways = [NetworkCost("a", 1.0, num_ranks)], Ways(has_norms=True)
    alone = on_ranks(1, train_family, [NetworkCost("a", 1.0)], 4, 1, "fp32", None, ways)[0]
    cut = replace(ways, micro_batch=micro_batch)
    results = on_ranks(num_ranks, train_family, works, 4, zero, "fp32", None, cut)
    assert merged(results, "losses", "a") == pytest.approx(alone["losses"]["a"], rel=2e-6)
    found = merged(results, "ema", "a")
    assert found.keys() == alone["ema"]["a"].keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, alone["ema"]["a"][key], rtol=0, atol=2e-5)
    norm = "backbone.network.layers.1"
    assert found[f"{norm}.num_batches_tracked"] == 4
    assert found[f"{norm}.running_mean"].abs().max() > 1e-2


def one_student(num_steps: int) -> tuple[Phase, Groups, Trainer]:
    """A phase of one student on all ranks."""
    prepare_deepspeed("cpu")
    num_ranks = dist.get_world_size()
    plan = make_plan([NetworkCost("a", 1.0, num_ranks)], 1.0, IMAGES, num_ranks)
    assert plan.is_local
    groups = make_groups(plan, timedelta(seconds=60))
    phase = family_phase(plan, groups, num_steps)
    (trainer,) = phase.trainers
    return phase, groups, trainer


def train_to(num_steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of some steps, and the full state of the engine over all ranks after them."""
    phase, groups, trainer = one_student(num_steps)
    return run_steps(phase, groups)[0].losses["a"], trainer.state()


def go_on_from(state: dict[str, Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    phase, groups, trainer = one_student(4)
    trainer.load_state(state)
    restored = trainer.state()
    assert all(torch.equal(restored[key], tensor) for key, tensor in state.items())
    return run_steps(phase, groups, 2)[0].losses["a"], trainer.state()


def test_state__two_ranks_go_on_as_two_bitwise_and_as_three_closely() -> None:
    losses, final = on_ranks(2, train_to, 4)[0]
    _, state = on_ranks(2, train_to, 2)[0]
    same_losses, same_final = on_ranks(2, go_on_from, state)[0]
    assert same_losses == losses[2:]
    assert all(torch.equal(same_final[key], tensor) for key, tensor in final.items())
    other_losses, _ = on_ranks(3, go_on_from, state)[0]
    assert other_losses == pytest.approx(losses[2:], rel=2e-6)
