"""Claims about several processes, on real gloo groups and real engines with tiny networks."""

from collections import deque
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distill.engine.engine import prepare_deepspeed
from distill.plan.by_step import PlanSchedule
from distill.plan.placement import NetworkCost
from distill.plan.plan import Plan, make_plan, without
from distill.plan.traffic import gathered_bytes, slice_bytes
from distill.train.exchange import AllGather, Outgoing, Pending, Slices
from distill.train.groups import make_groups
from distill.train.student import StudentTrainer
from teacher.batch import PatchMasks, student_batch
from teacher.frozen import FrozenTeacher
from teacher.heads import sinkhorn
from teacher.losses import koleo_sum
from tests.support.families import (
    IMAGES,
    WHOLE,
    WIRE,
    Numbers,
    Ways,
    batch_of,
    make_pupil,
    metrics_of,
    some,
    take,
)
from tests.support.spawn import on_ranks
from tests.support.tiny import MEAN, STD, network, teacher


def train_family(
    works: list[NetworkCost],
    num_steps: int,
    zero: int,
    precision: str,
    bad: tuple[str, int] | None = None,
    ways: Ways = WHOLE,
) -> dict[str, Any]:
    """Losses and EMA of every student this rank trains, through exchange, engines and trainers as in the loop."""
    prepare_deepspeed("cpu")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    lookahead, is_published = ways.lookahead, ways.is_published
    plan = make_plan(
        works,
        1.0,
        IMAGES,
        num_ranks,
        lookahead=lookahead,
        has_even_shares=is_published,
        is_teacher_sharded=ways.is_sharded,
    )
    plan_schedule = PlanSchedule(plan, [(end, without(plan, {name})) for name, end in ways.ends])
    groups = make_groups(plan, timedelta(seconds=60))
    taught = teacher(4, has_heads=ways.has_heads)
    whole = sum(p.numel() for p in taught.backbone.parameters())
    if ways.is_sharded:
        taught.shard(groups.teacher, torch.device("cpu"))
        taught.pad_forwards(max(plan.largest_shares))
        parts = [p.to_local().numel() for p in taught.backbone.parameters()]  # type: ignore[attr-defined]
        assert sum(parts) < whole / num_ranks * 1.3  # rows do not divide evenly
    way = AllGather if is_published else Slices
    exchange = way(plan_schedule, rank, groups.exchange, torch.device("cpu"))
    trainers = [
        make_pupil(plan, groups, p.name, zero, precision, ways)
        for p in plan.placements
        if rank in p.world_ranks
    ]
    losses: dict[str, list[float]] = {trainer.name: [] for trainer in trainers}
    skipped = {trainer.name: 0 for trainer in trainers}
    on_the_way: deque[Pending] = deque()
    predicted_bytes = 0
    for step in range(num_steps):
        for ahead in range(step + len(on_the_way), min(step + lookahead + 1, num_steps)):
            crops, masks = batch_of(ahead)
            now = plan_schedule.at(ahead)
            share = now.share(rank, ahead)
            part = slice(share.start, share.stop)
            mine = some(crops, part)
            asked = PatchMasks.of(torch.ones_like(masks[part]) if is_published else masks[part])
            counts = masks.sum(dim=2).numpy()
            needed = PatchMasks.of(take(masks, now.required_positions[rank]))
            on_the_way.append(
                exchange.start(Outgoing(ahead, mine, taught.teach(mine, asked), needed, counts))
            )
            predicted_bytes += (
                gathered_bytes(plan, WIRE)
                if is_published
                else slice_bytes(now, ahead, WIRE, counts.sum(axis=1))[rank]
            )
        delivery = exchange.wait(on_the_way.popleft())
        for trainer in trainers:
            if trainer.stop_step is not None and step >= trainer.stop_step:
                continue
            batch = student_batch(delivery, trainer.placement.slice_of(rank), (2, 2), IMAGES)
            if bad == (trainer.name, step):
                with torch.no_grad():
                    next(iter(trainer.engine.module.dino_head.parameters()))[0, 0] = float("nan")
            trainer.train_step(batch, Numbers().at(step))
            values = metrics_of(trainer)
            losses[trainer.name].append(values["loss"])
            skipped[trainer.name] += int(values["skipped"])
    return {
        "losses": losses,
        "targets": {trainer.name: trainer.targets.state() for trainer in trainers},
        "ema": {trainer.name: trainer.engine.full("ema") for trainer in trainers},
        "skipped": skipped,
        "received_bytes": exchange.received_bytes,
        "predicted_bytes": predicted_bytes,
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
    plan = make_plan(FAMILY, 1.0, IMAGES, num_ranks, lookahead=2)
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


def state_on(num_ranks_before: int) -> dict[str, Tensor]:
    """The full state of one engine over all ranks after two steps."""
    prepare_deepspeed("cpu")
    plan = make_plan(
        [NetworkCost("a", 1.0, dist.get_world_size())], 1.0, IMAGES, dist.get_world_size()
    )
    groups = make_groups(plan, timedelta(seconds=60))
    trainer = make_pupil(plan, groups, "a", 1, "fp32")
    assert dist.get_world_size() == num_ranks_before
    train_one(trainer, plan, range(2))
    return trainer.state()


def train_one(trainer: StudentTrainer, plan: Plan, steps: range) -> list[float]:
    taught = FrozenTeacher(*network(2), mean=MEAN, std=STD, micro_images=4)
    losses, rank = [], dist.get_rank()
    exchange = Slices(PlanSchedule(plan), rank, dist.group.WORLD, torch.device("cpu"))  # type: ignore[arg-type]
    assert plan.is_local
    for step in steps:
        crops, masks = batch_of(step)
        part = slice(plan.share(rank, step).start, plan.share(rank, step).stop)
        mine = some(crops, part)
        own = PatchMasks.of(masks[part])
        outgoing = Outgoing(step, mine, taught.teach(mine, own), own, masks.sum(dim=2).numpy())
        delivery = exchange.wait(exchange.start(outgoing))
        batch = student_batch(delivery, trainer.placement.slice_of(rank), (2, 2), IMAGES)
        trainer.train_step(batch, Numbers().at(step))
        losses.append(metrics_of(trainer)["loss"])
    return losses


def go_on_from(state: dict[str, Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    prepare_deepspeed("cpu")
    plan = make_plan(
        [NetworkCost("a", 1.0, dist.get_world_size())], 1.0, IMAGES, dist.get_world_size()
    )
    trainer = make_pupil(plan, make_groups(plan, timedelta(seconds=60)), "a", 1, "fp32")
    trainer.load_state(state)
    restored = trainer.state()
    assert all(torch.equal(restored[key], tensor) for key, tensor in state.items())
    return train_one(trainer, plan, range(2, 4)), trainer.state()


def train_through() -> tuple[list[float], dict[str, Tensor]]:
    prepare_deepspeed("cpu")
    plan = make_plan(
        [NetworkCost("a", 1.0, dist.get_world_size())], 1.0, IMAGES, dist.get_world_size()
    )
    trainer = make_pupil(plan, make_groups(plan, timedelta(seconds=60)), "a", 1, "fp32")
    return train_one(trainer, plan, range(4)), trainer.state()


def test_state__two_ranks_go_on_as_two_bitwise_and_as_three_closely() -> None:
    losses, final = on_ranks(2, train_through)[0]
    state = on_ranks(2, state_on, 2)[0]
    same_losses, same_final = on_ranks(2, go_on_from, state)[0]
    assert same_losses == losses[2:]
    assert all(torch.equal(same_final[key], tensor) for key, tensor in final.items())
    other_losses, _ = on_ranks(3, go_on_from, state)[0]
    assert other_losses == pytest.approx(losses[2:], rel=2e-6)
