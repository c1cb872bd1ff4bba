"""Throughput, measured: this job, the published procedure, and one separate job per student, side by side in one run.

    ours       filled shares, slices, look-ahead (the recipe's own engine settings)
    published  even shares, everything gathered by everybody, all ranks meet every step
    separate   one student after the other on all ranks, each with the teacher to itself

Every rank runs the real loop with the real exchange. The modes take turns, a block of steps each, so
that a disturbance of the machine meets all of them; figures are medians over blocks. With ``sleep``
the networks are replaced by sleeps in the proportion of the plan's costs: then a few cores can stand
for many devices, and what is measured is the orchestration alone.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.assemble import (
    Scene,
    Site,
    build_phase,
    family_phase,
    freeze,
)
from distill.balance import Balancer
from distill.cost import DEFAULT_DEVICE, find_device
from distill.data.crops import NUM_GLOBAL
from distill.data.index import ImageIndex, make_index
from distill.data.places import Place
from distill.data.sources import Found
from distill.engine import prepare_deepspeed
from distill.errors import PlanError
from distill.exchange import AllGather, Slices
from distill.groups import Groups, make_groups
from distill.isolation import Isolation
from distill.loop import Phase, run_phase
from distill.plan import Placement, Plan
from distill.planning import TeacherShape, plan_family
from distill.prepare import teacher_shape
from distill.pulse import Pulse
from distill.pupil import Attempt
from distill.recipe import FamilyRecipe
from distill.recipe_file import load_job
from distill.record import Wishes
from distill.stopwatch import Stopwatch
from students.catalog import build_backbone, init_weights_
from students.student import build_heads, seeded
from teacher.batch import CropBatch, LessonBatch, PatchMasks, TeacherTargets
from teacher.frozen import FrozenTeacher
from teacher.trainee import Objective

BLOCK = 10  # measured steps of one mode before the next has its turn
POOL = 64  # different synthetic images; a loader that only copies is not what is measured
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Request:
    """What to measure. ``slow_rank`` (with ``sleep_s``) works ``slow_factor`` times as long.

    ``index``: a folder with the index of the recipe's images; synthetic ones where it is None.
    """

    recipe: str
    overrides: tuple[str, ...]
    against: tuple[str, ...]
    num_ranks: int
    num_steps: int
    warmup_steps: int
    sleep_s: float | None
    slow_rank: int | None
    slow_factor: float
    index: str | None = None

    @property
    def num_blocks(self) -> int:
        """Turns of each mode."""
        return -(-self.num_steps // BLOCK)


def block_steps(lookahead: int) -> int:
    """Steps of a turn: the first ones fill the look-ahead, the last ones use it up, neither is counted."""
    return BLOCK + 2 * lookahead + 1


def measure(request: Request) -> dict[str, Any]:
    """Runs the ranks and puts their figures together.

    Raises:
        UserError: the recipe or the plan cannot work.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    family, shape = _family(request)
    plan = plan_family(family, shape, request.num_ranks)  # what cannot work is said here, once
    if plan.is_teacher_sharded and request.sleep_s is None:
        raise PlanError(
            "bench compares teachers that are whole on every rank; this one would be sharded",
            fix="Write engine.teacher_sharding=replicated, or use --sleep.",
        )
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=request.num_ranks,
            run_id="bench",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            start_method="spawn",
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=Std.NONE),
        )
        results = elastic_launch(config, measure_rank)(asdict(request))
    return _report(request, family, shape, [results[rank] for rank in range(request.num_ranks)])


def _family(request: Request) -> tuple[FamilyRecipe, TeacherShape]:
    """The recipe, long enough for what is measured, and its teacher."""
    recipe, teacher = load_job(request.recipe, request.overrides)
    assert isinstance(recipe, FamilyRecipe), "checked by the command"
    least = request.warmup_steps + request.num_blocks * block_steps(recipe.engine.lookahead)
    steps = {"steps": max(recipe.schedule.steps, least)}
    recipe = recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update=steps)})
    return recipe, teacher_shape(recipe, teacher, has_files=False)


def measure_rank(fields: dict[str, Any]) -> dict[str, Any]:
    """What one rank measured, by mode."""
    request = Request(**fields)
    family, shape = _family(request)
    has_gpu = family.engine.device != "cpu" and torch.cuda.is_available()
    if request.sleep_s is not None:
        has_gpu = False
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    else:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // request.num_ranks))
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=TIMEOUT)
    try:
        prepare_deepspeed(device.type)
        return _Bench(request, family, shape, device).run()
    finally:
        dist.destroy_process_group()


def modes_of(
    family: FamilyRecipe, against: Sequence[str], num_ranks: int
) -> dict[str, FamilyRecipe]:
    """The recipe of every mode, by name: ``ours``, ``published``, ``separate NAME``."""
    modes = {"ours": family}
    if "published" in against:
        engine = family.engine.model_copy(
            update={"exchange": "all_gather", "lookahead": 0, "balance": 0}
        )
        modes["published"] = family.model_copy(update={"engine": engine})
    if "separate" in against:
        for student in family.students:
            alone = student.model_copy(update={"ranks": num_ranks})
            modes[f"separate {student.label}"] = family.model_copy(update={"students": (alone,)})
    return modes


class _Witness:
    """Stands in for the recorder: notes when each step ended and what the clocks said."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float, float, float, float, int]] = []

    def record(
        self,
        phase: Phase,
        step: int,  # noqa: ARG002  # the recorder's signature
        faults: Sequence[float],  # noqa: ARG002
    ) -> Wishes:
        """One step is over."""
        training = sum(pupil.training.read_s() for pupil in phase.pupils)
        exchange = phase.exchange
        self.marks.append(
            (
                time.monotonic(),
                phase.teaching.read_s(),
                training,
                exchange.wait_s,
                phase.loader.wait_s,
                exchange.received_bytes,
            )
        )
        return Wishes(save=False, stop=False)


class _Bench:
    """All modes on one rank."""

    def __init__(
        self, request: Request, family: FamilyRecipe, shape: TeacherShape, device: torch.device
    ) -> None:
        self.request, self.shape, self.device = request, shape, device
        self.rank = dist.get_rank()
        self.pulse = Pulse(Path(), self.rank)  # nobody watches
        self.modes = modes_of(family, request.against, request.num_ranks)
        self.teacher = None if request.sleep_s is not None else self._teacher(family)
        plan = plan_family(family, shape, request.num_ranks)
        self.scale = None if request.sleep_s is None else request.sleep_s / plan.step_s
        self.phases = {name: self._phase(recipe) for name, recipe in self.modes.items()}
        self.isolations = {name: Isolation(phase, Path()) for name, phase in self.phases.items()}

    def _teacher(self, family: FamilyRecipe) -> FrozenTeacher:
        generator = seeded(family.seed, "teacher")
        backbone = build_backbone(self.shape.spec)
        init_weights_(backbone, generator)
        heads = None if self.shape.heads is None else build_heads(*self.shape.heads, generator)
        return freeze(family, self.device, backbone, heads)

    def _phase(self, recipe: FamilyRecipe) -> Phase:
        plan = plan_family(recipe, self.shape, self.request.num_ranks)
        groups = make_groups(plan, TIMEOUT)
        folder = self.request.index
        index = _no_images() if folder is None else ImageIndex.load(Path(folder))
        site = Site(self.device, Path(folder or ""), index)
        scene = Scene(recipe, plan, groups, site, self.shape.spec, self._tell)
        if self.scale is None:
            assert self.teacher is not None, "only sleeps need no teacher"
            starts = dict.fromkeys((student.label for student in recipe.students), 0)
            phase = family_phase(scene, self.teacher, self.shape, starts)
        else:
            phase = self._sleeping_phase(scene, recipe, groups)
        if folder is not None:
            return phase
        loader = SyntheticLoader(
            recipe, phase, self.rank, self.device, is_tiny=self.scale is not None
        )
        balance = recipe.engine.balance
        if self.scale is not None and balance and plan.is_dithered:
            clocks = (phase.teaching, [pupil.training for pupil in phase.pupils])
            balancer = Balancer(
                phase.timetable,
                self.rank,
                groups.control,
                loader,
                clocks,
                lookahead=phase.lookahead,
                every=balance,
                tell=self._tell,
            )
            phase = replace(phase, after_step=balancer.after_step)
        return replace(phase, loader=loader)  # type: ignore[arg-type]  # the same calls

    def _tell(self, event: str) -> None:
        if self.rank == 0:
            sys.stderr.write(event + "\n")

    def _sleeping_phase(self, scene: Scene, recipe: FamilyRecipe, groups: Groups) -> Phase:
        assert self.scale is not None, "sleeps have a scale"
        plan = scene.plan
        factor = self.request.slow_factor if self.rank == self.request.slow_rank else 1.0
        pace = self.scale * factor
        teacher = SleepingTeacher(plan.teach_s * pace)
        phase = build_phase(
            scene,
            "family",
            (0, 1),
            teacher,  # type: ignore[arg-type]  # the same calls
            (),
            Objective(1.0, 1.0, 0.0, 1.0),
            lambda _: None,
            lookahead=recipe.engine.lookahead,
            exchange=AllGather if recipe.engine.exchange == "all_gather" else Slices,
        )
        pupils = tuple(
            SleepingPupil(placement, groups.by_network[placement.name], image_s * pace, self.rank)
            for placement, image_s in zip(plan.placements, plan.image_s, strict=True)
            if self.rank in placement.world_ranks
        )
        return replace(phase, pupils=pupils)  # type: ignore[arg-type]  # the same calls

    def run(self) -> dict[str, Any]:
        """Blocks of steps, the modes in turn."""
        request = self.request
        steps_done = dict.fromkeys(self.phases, 0)
        witnesses: dict[str, list[_Witness]] = {name: [] for name in self.phases}
        num_blocks = request.num_blocks
        for block in range(-1 if request.warmup_steps else 0, num_blocks):
            for name, phase in self.phases.items():
                length = request.warmup_steps if block < 0 else block_steps(phase.lookahead)
                dist.barrier()
                witness = _Witness()
                start = steps_done[name]
                run_phase(
                    replace(phase, num_steps=start + length),
                    witness,  # type: ignore[arg-type]  # what the loop asks of a recorder
                    _NoSaver(),  # type: ignore[arg-type]  # what the loop asks of a saver
                    self.isolations[name],
                    self.pulse,
                    start,
                )
                steps_done[name] += length
                if block >= 0:
                    first = phase.lookahead
                    witness.marks = witness.marks[first : first + BLOCK + 1]
                    witnesses[name].append(witness)
            self._tell(f"block {max(block, 0) + 1} of {num_blocks}")
        return {name: [w.marks for w in blocks] for name, blocks in witnesses.items()}


class _NoSaver:
    """Nothing is saved, so there is nothing to tell."""

    def report(self) -> None:
        """No save has ended."""


class SyntheticLoader:
    """Random pixels in the place of photographs: no files, no decoder."""

    def __init__(
        self,
        recipe: FamilyRecipe,
        phase: Phase,
        world_rank: int,
        device: torch.device,
        *,
        is_tiny: bool,
    ) -> None:
        self.wait_s = 0.0
        self._timetable, self._rank = phase.timetable, world_rank
        generator = torch.Generator().manual_seed(0)

        def pixels(count: int, size: int) -> Tensor:
            side = 1 if is_tiny else size
            shape = (POOL, count, 3, side, side)
            return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)

        crops = recipe.crops
        self._pool = CropBatch(
            pixels(NUM_GLOBAL, crops.global_.size), pixels(crops.local.count, crops.local.size)
        )

    def fetch(self, step: int) -> CropBatch:
        """The crops of this rank's share."""
        share = self._timetable.at(step).share(self._rank, step)
        ids = torch.arange(share.start, share.stop, device=self._pool.global_crops.device) % POOL
        return CropBatch(self._pool.global_crops[ids], self._pool.local_crops[ids])

    def make_room(self, max_images: int) -> None:
        """Nothing to do: any share fits."""

    def close(self) -> None:
        """Nothing to let go of."""


class SleepingTeacher:
    """Takes its time for every image and says nothing of interest."""

    def __init__(self, image_s: float) -> None:
        self._image_s = image_s

    def teach(self, crops: CropBatch, masks: PatchMasks) -> TeacherTargets:
        """Zeros, one number per token."""
        num_images = len(crops.global_crops)
        time.sleep(num_images * self._image_s)
        return TeacherTargets(
            torch.zeros(num_images, NUM_GLOBAL, 1), torch.zeros(sum(masks.counts), 1)
        )


class SleepingPupil:
    """Takes its time for its slice, and meets the others of its group as gradients would."""

    def __init__(
        self, placement: Placement, group: dist.ProcessGroup, image_s: float, world_rank: int
    ) -> None:
        self.name, self.placement = placement.name, placement
        self.training = Stopwatch(torch.device("cpu"))
        self._group, self._image_s = group, image_s
        self._seconds = len(placement.slice_of(world_rank)) * image_s

    def is_finished(self, step: int) -> bool:  # noqa: ARG002  # a pupil's signature
        """Never: a bench trains everyone."""
        return False

    @property
    def targets(self) -> "SleepingPupil":
        """Nothing to make."""
        return self

    def state(self) -> dict[str, Tensor]:
        """Nothing to go back to."""
        return {}

    def learn(self, lesson: LessonBatch, *_: object) -> Attempt:  # noqa: ARG002  # a pupil's signature
        """Sleeps, then one all-reduce over the group."""
        with self.training.running():
            time.sleep(self._seconds)
        dist.all_reduce(torch.zeros(1), group=self._group)
        return Attempt(is_applied=True, terms={})


def _no_images() -> ImageIndex:
    """An index for a scene whose loader is replaced: one file that is never opened."""
    return make_index([Found(Place.of(Path("none")), "")], [(1, 1)], (("none", 1),))


def _report(
    request: Request, family: FamilyRecipe, shape: TeacherShape, ranks: list[dict[str, Any]]
) -> dict[str, Any]:
    batch, num_ranks = family.schedule.batch, request.num_ranks
    modes = modes_of(family, request.against, num_ranks)
    found = {name: _mode_report([rank[name] for rank in ranks], batch) for name in modes}
    plans = {
        name: plan_family(recipe, shape, num_ranks, DEFAULT_DEVICE)
        for name, recipe in modes.items()
    }
    scale = 1.0 if request.sleep_s is None else request.sleep_s / plans["ours"].step_s
    for name, figures in found.items():
        plan = plans[name]
        published = name == "published"
        predicted_s = max(plan.even_load_s) if published else plan.step_s
        figures["predicted_utilisation"] = (
            plan.utilisation_even_barrier if published else plan.utilisation
        )
        # without sleeps only ratios between modes are predictions for this machine
        figures["predicted_step_s"] = (
            predicted_s * scale
            if request.sleep_s is not None
            else predicted_s / plans["ours"].step_s * found["ours"]["step_s"]["median"]
        )
    report: dict[str, Any] = {
        "recipe": family.name,
        "ranks": num_ranks,
        "batch": batch,
        "is_sleeping": request.sleep_s is not None,
        "slow": None if request.slow_rank is None else [request.slow_rank, request.slow_factor],
        "modes": found,
    }
    ours = found["ours"]["step_s"]["median"]
    if "published" in found:
        report["faster_than_published"] = found["published"]["step_s"]["median"] / ours
    alone = [figures for name, figures in found.items() if name.startswith("separate ")]
    if alone:
        report["gain"] = sum(figures["step_s"]["median"] for figures in alone) / ours
        report["gain_bound"] = _gain_bound(found["ours"], alone, plans["ours"])
        report["of_bound"] = report["gain"] / report["gain_bound"]
    if request.sleep_s is None:
        device = find_device("measured")
        plan = plans["ours"]
        tflops = sum(plan.load_s) * DEFAULT_DEVICE.tflops_per_s * DEFAULT_DEVICE.efficiency
        share = num_ranks if torch.cuda.is_available() else 1  # the cores of one machine are shared
        report["mfu"] = tflops / (ours * share * device.tflops_per_s)
        report["matmul_tflops_per_s"] = device.tflops_per_s
    return report


def _gain_bound(ours: dict[str, Any], alone: list[dict[str, Any]], plan: Plan) -> float:
    """(S C_T + sum C_i) / (C_T + sum C_i) from the seconds measured in the joint job and alone."""
    teaching = sum(ours["teach_s"])
    training = [sum(figures["train_s"]) for figures in alone]
    assert len(training) == len(plan.placements), "one separate job per student"
    return (len(training) * teaching + sum(training)) / (teaching + sum(training))


def _mode_report(ranks: list[list[list[tuple[float, ...]]]], batch: int) -> dict[str, Any]:
    """Figures of one mode from the marks of every rank: [rank][block][step] clocks."""
    num_blocks = len(ranks[0])
    step_s, busy, per_rank = [], [], []
    for block in range(num_blocks):
        spans = []
        for marks in ranks:
            first, last = marks[block][0], marks[block][-1]
            spans.append([b - a for a, b in zip(first, last, strict=True)])
        steps = len(ranks[0][block]) - 1
        wall = max(span[0] for span in spans)
        step_s.append(wall / steps)
        busy.append(sum(span[1] + span[2] for span in spans) / (len(spans) * wall))
        per_rank.append([[value / steps for value in span] for span in spans])
    middle = sorted(range(num_blocks), key=lambda block: step_s[block])[num_blocks // 2]
    columns = list(zip(*per_rank[middle], strict=True))
    return {
        "step_s": {
            "median": statistics.median(step_s),
            "min": min(step_s),
            "max": max(step_s),
            "blocks": num_blocks,
        },
        "images_per_s": batch / statistics.median(step_s),
        "utilisation": statistics.median(busy),
        "teach_s": list(columns[1]),
        "train_s": list(columns[2]),
        "wait_s": list(columns[3]),
        "loader_s": list(columns[4]),
        "host_s": [wall - sum(rest) for wall, *rest in zip(*columns[:5], strict=True)],
        "exchange_bytes_max": max(columns[5]),
    }


def tables(report: dict[str, Any]) -> list[Any]:
    """The figures for people: a row per mode, and what follows from them."""
    from rich.table import Table

    title = f"{report['recipe']} on {report['ranks']} ranks, batch {report['batch']}"
    table = Table(title=title, title_justify="left")
    for column in (
        "mode",
        "step s (min - max)",
        "predicted",
        "images/s",
        "busy",
        "predicted",
        "MB",
    ):
        table.add_column(column)
    for name, found in report["modes"].items():
        step = found["step_s"]
        table.add_row(
            name,
            f"{step['median']:.3f} ({step['min']:.3f} - {step['max']:.3f})",
            f"{found['predicted_step_s']:.3f}",
            f"{found['images_per_s']:,.0f}",
            f"{found['utilisation']:.1%}",
            f"{found['predicted_utilisation']:.1%}",
            f"{found['exchange_bytes_max'] / 1e6:.2f}",
        )
    facts = Table(show_header=False, box=None, padding=(0, 2))
    if "faster_than_published" in report:
        facts.add_row("published", f"{report['faster_than_published']:.2f}x as long per step")
    if "gain" in report:
        told = f"{report['gain']:.2f}x of at most {report['gain_bound']:.2f}x ({report['of_bound']:.1%})"
        facts.add_row("gain over separate jobs", told)
    host_s = statistics.median(report["modes"]["ours"]["host_s"])
    facts.add_row("beside all that", f"{host_s * 1000:.1f} ms of a step of ours")
    if "mfu" in report:
        peak = report["matmul_tflops_per_s"]
        facts.add_row("MFU", f"{report['mfu']:.1%} of a matrix product's {peak:.3g} TFLOP/s")
    return [table, facts]


def draw(report: dict[str, Any], path: Path) -> None:
    """A picture: for each of the joint modes, what every rank does during a mean step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes = [name for name in ("ours", "published") if name in report["modes"]]
    longest = max(report["modes"][name]["step_s"]["median"] for name in modes)
    ranks = report["ranks"]
    figure = Figure(figsize=(8, 0.9 + len(modes) * (0.7 + 0.22 * ranks)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(len(modes), 1, squeeze=False).flat, modes, strict=True):
        found = report["modes"][name]
        step_s = found["step_s"]["median"]
        for rank in range(ranks):
            teach, train = found["teach_s"][rank], found["train_s"][rank]
            rest = max(0.0, step_s - teach - train)
            left = 0.0
            for length, colour in ((teach, "#4477aa"), (train, "#ee8866"), (rest, "#dddddd")):
                axes.barh(rank, length, left=left, color=colour, edgecolor="white", linewidth=0.5)
                left += length
        axes.set_title(
            f"{name}: {step_s:.3f} s a step, busy {found['utilisation']:.0%}", loc="left"
        )
        axes.set_xlim(0, longest * 1.02)
        axes.set_ylabel("rank")
        axes.set_yticks(range(ranks))
        axes.invert_yaxis()
    axes.set_xlabel("seconds: teaching (blue), training (orange), idle (grey)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def save_report(report: dict[str, Any], path: Path) -> None:
    """Writes the figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
