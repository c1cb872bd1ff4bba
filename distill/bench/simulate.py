"""Days of a family's job with jitter, failures, saves and restarts: what of the time and of the GPU hours is kept.

Steps are simulated one by one on ``distill.bench.timeline``, some thousands of them; between two events the clock
then advances by blocks of steps, drawn with the mean and the spread of the blocks that were simulated. Failures
come at random, exponentially, of every GPU alike. A failure costs what was trained since the last complete save
began, and the time until the job trains again; it may fail again meanwhile.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distill.bench.modes import OURS, PUBLISHED, modes_of
from distill.bench.timeline import StepTimes, Timeline, drawn
from distill.engine.peer_copies import copy_distance
from distill.plan.copies import COPY_GB_PER_S, DISK_GB_PER_S, largest_state_gb
from distill.plan.flops import Device
from distill.plan.from_recipe import TeacherShape, family_footprint, plan_family
from distill.plan.plan import Plan
from distill.recipe.keys import FamilyRecipe

COPIES, DISK = "in memory", "on disk"
BLOCK = 50  # steps that advance at once
LEAST_STEPS = 1_000  # simulated one by one, after the first ones
WARMUP_STEPS = 100  # not counted, nor is what live balance needs to settle
INTERVALS_S = (15, 30, 60, 120, 180, 300, 450, 600, 900, 1200, 1800, 3600)
SEEDS = 8  # lives of which the best interval is the best on average


@dataclass(frozen=True)
class Assumptions:
    """What no plan knows, in seconds and GB/s; each has its source in docs/planning.md.

    ``detect_s``: from a failure until all ranks are gone. ``restart_s``: until training goes on. ``requeue_s``:
    wait for a node in the place of a lost one. ``copy``: a rank's state into host memory, ``send``: to the next
    node, ``disk``: to a shared disk, verified; ``net``: the exchange, of one rank.
    """

    detect: float = 15.0
    restart: float = 60.0
    requeue: float = 0.0
    copy: float = COPY_GB_PER_S
    send: float = 2.0
    disk: float = DISK_GB_PER_S
    net: float = 25.0


@dataclass(frozen=True)
class Chances:
    """What is simulated: relative ``jitter``, mean seconds between failures of one GPU, days, seed."""

    jitter: float
    gpu_mtbf_s: float
    days: float
    seed: int


@dataclass(frozen=True)
class Saving:
    """One way of saving. ``every`` steps, the loop waits ``stall_s`` for each, which counts ``lag_s`` after it began."""

    name: str
    every: int
    stall_s: float
    lag_s: float


@dataclass(frozen=True)
class Life:
    """Days of a job in seconds: ``wall_s`` is all of them, the others are what it went into."""

    wall_s: float
    trained_s: float
    stalled_s: float
    lost_s: float
    down_s: float
    failures: int

    @property
    def goodput(self) -> float:
        """Part of the time in which steps were trained that count."""
        return self.trained_s / self.wall_s


@dataclass(frozen=True)
class Rhythm:
    """Mean and standard deviation of the seconds of ``BLOCK`` steps."""

    mean_s: float
    deviation_s: float

    @property
    def step_s(self) -> float:
        """Mean seconds of a step."""
        return self.mean_s / BLOCK

    def sample(self, generator: np.random.Generator, steps: int, count: int) -> np.ndarray:
        """Seconds of ``count`` stretches of ``steps`` steps, [count]."""
        deviation_s = self.deviation_s * math.sqrt(steps / BLOCK)
        return np.maximum(generator.normal(self.step_s * steps, deviation_s, count), 1e-9)


def rhythm_of(times: StepTimes) -> Rhythm:
    """The blocks of steps that were simulated one by one."""
    blocks_s = times.block_s(BLOCK)
    return Rhythm(times.step_s * BLOCK, float(blocks_s.std(ddof=1)))


def live(
    rhythm: Rhythm, saving: Saving, mtbf_s: float, down: tuple[float, float], chances: Chances
) -> Life:
    """One life of a job: from one failure to the next, and how long it is away after each.

    ``mtbf_s``: of the job. ``down``: seconds until a failure is noticed, and until training goes on.
    """
    # apart, so that every way of saving meets the same failures
    of_failures, of_steps = (np.random.default_rng([chances.seed, k]) for k in range(2))
    end_s = chances.days * 86_400
    now_s = trained_s = stalled_s = lost_s = down_s = 0.0
    failures = 0
    while now_s < end_s:
        until_s = min(of_failures.exponential(mtbf_s), end_s - now_s)
        trained, stalled, lost = _until_failure(rhythm, saving, until_s, of_steps)
        now_s += until_s
        if now_s >= end_s:  # nothing failed
            trained, lost = trained + lost, 0.0
        trained_s, stalled_s, lost_s = trained_s + trained, stalled_s + stalled, lost_s + lost
        if now_s >= end_s:
            break
        failures += 1
        away_s = _away(of_failures, mtbf_s, *down)
        down_s += min(away_s, end_s - now_s)
        now_s += away_s
    return Life(end_s, trained_s, stalled_s, lost_s, down_s, failures)


def _until_failure(
    rhythm: Rhythm, saving: Saving, until_s: float, generator: np.random.Generator
) -> tuple[float, float, float]:
    """Of the seconds until a failure: trained and kept, stalled by saves, lost."""
    count = int(until_s / (rhythm.step_s * saving.every * 0.8)) + 2
    work_s = rhythm.sample(generator, saving.every, count)
    began_s = np.cumsum(work_s) + saving.stall_s * np.arange(count)  # of each save
    saves = int(np.searchsorted(began_s + saving.lag_s, until_s, side="right"))
    started = int(np.searchsorted(began_s, until_s, side="right"))
    stalled_s = min(started * saving.stall_s, until_s)
    kept_s = float(work_s[:saves].sum())
    return kept_s, stalled_s, max(0.0, until_s - stalled_s - kept_s)


def _away(generator: np.random.Generator, mtbf_s: float, notice_s: float, return_s: float) -> float:
    """Seconds from a failure until training goes on; what fails meanwhile is noticed and starts once more."""
    away_s = notice_s
    while (fails_s := generator.exponential(mtbf_s)) < return_s:
        away_s += fails_s + notice_s
    return away_s + return_s


def simulate(
    family: FamilyRecipe,
    shape: TeacherShape,
    num_ranks: int,
    device: Device,
    chances: Chances,
    assumed: Assumptions = Assumptions(),
) -> dict[str, Any]:
    """Figures of this job, of the published procedure and of one job per student, as plain data.

    ``modes``: seconds of a step and where they go. ``lives``: goodput of modes and ways of saving.
    ``best``: by way of saving, the distance with the highest goodput.

    Raises:
        PlanError: the recipe cannot run on so many ranks.
    """
    modes = modes_of(family, (PUBLISHED, "separate"), num_ranks)
    found, rhythms, plans = dict[str, Any](), dict[str, Rhythm](), dict[str, Plan]()
    for name, recipe in modes.items():
        plan = plans[name] = plan_family(recipe, shape, num_ranks, device)
        # what all-gather takes is not counted: its figures are the better for it
        footprint = family_footprint(recipe, shape, plan)
        sent_s = max(footprint.sliced_bytes) / 1e9 / assumed.net if name == OURS else 0.0
        times = simulate_steps(plan, recipe, chances, sent_s)
        rhythms[name] = rhythm_of(times)
        found[name] = _mode_figures(plan, times)
    largest_gb = largest_state_gb(plans[OURS], family_footprint(family, shape, plans[OURS]))
    mtbf_s, down = (
        chances.gpu_mtbf_s / num_ranks,
        (assumed.detect, assumed.requeue + assumed.restart),
    )
    ours = rhythms[OURS]
    ways = ways_of_saving(family, ours.step_s, largest_gb, assumed)
    disk = next(way for way in ways if way.name == DISK)
    published = replace(disk, every=_steps_in(disk.every * ours.step_s, rhythms[PUBLISHED].step_s))
    lives = [
        _life_figures(
            name, way, rhythms[name], live(rhythms[name], way, mtbf_s, down, chances), num_ranks
        )
        for name, way in (*((OURS, way) for way in ways), (PUBLISHED, published))
    ]
    separate_s = sum(found[name]["step_s"] for name in found if name not in (OURS, PUBLISHED))
    return {
        "recipe": family.name,
        "ranks": num_ranks,
        "batch": plans[OURS].images_global,
        "jitter": chances.jitter,
        "mtbf_h": mtbf_s / 3600,
        "days": chances.days,
        "seed": chances.seed,
        "assumptions": vars(assumed),
        "largest_state_gb": largest_gb,
        "modes": found,
        "faster_than_published": found[PUBLISHED]["step_s"] / found[OURS]["step_s"],
        "faster_than_separate": separate_s / found[OURS]["step_s"],
        "lives": lives,
        "best": {way.name: best_distance(ours, way, mtbf_s, down, chances) for way in ways},
    }


def simulate_steps(
    plan: Plan, recipe: FamilyRecipe, chances: Chances, exchange_s: float
) -> StepTimes:
    """Steps of a plan one by one, once look-ahead is full and live balance has settled."""
    engine = recipe.engine
    timeline = Timeline(
        plan,
        engine.lookahead,
        drawn(chances.seed, chances.jitter, plan.num_ranks),
        every=engine.balance,
        exchange_s=exchange_s,
    )
    first = WARMUP_STEPS + 2 * engine.balance
    count = max(LEAST_STEPS, 2 * engine.balance)
    return timeline.run(0, first + count + engine.lookahead).between(first, first + count)


def ways_of_saving(
    family: FamilyRecipe, step_s: float, largest_gb: float, assumed: Assumptions
) -> tuple[Saving, ...]:
    """Copies in memory as far apart as the recipe's ``peer_every``, and saves on disk as its ``every``."""
    keys = family.checkpoint
    stall_s = largest_gb / assumed.copy
    send_s, disk_s = largest_gb / assumed.send, largest_gb / assumed.disk
    lag_steps = math.ceil((stall_s + send_s) / step_s)
    apart = copy_distance(keys.peer_every, lag_steps)
    on_disk = keys.every_steps or _steps_in(keys.every_s or 0.0, step_s)
    return (
        Saving(COPIES, max(apart, lag_steps), stall_s, stall_s + send_s),
        Saving(DISK, on_disk, stall_s, stall_s + disk_s),
    )


def best_distance(
    rhythm: Rhythm, way: Saving, mtbf_s: float, down: tuple[float, float], chances: Chances
) -> dict[str, float]:
    """The distance of two saves with the highest goodput, by lives with the same failures; beside it Young's sqrt(2 stall mtbf)."""

    def goodput(every: int) -> float:
        lives = [
            live(
                rhythm,
                replace(way, every=every),
                mtbf_s,
                down,
                replace(chances, seed=chances.seed + 1 + k),
            )
            for k in range(SEEDS)
        ]
        return sum(each.goodput for each in lives) / SEEDS

    least = math.ceil(way.lag_s / rhythm.step_s)  # a save begins when the one before is complete
    tried = sorted({max(least, _steps_in(seconds, rhythm.step_s)) for seconds in INTERVALS_S})
    by_goodput = {every: goodput(every) for every in tried}
    best = max(tried, key=lambda every: by_goodput[every])
    return {
        "every_steps": best,
        "every_s": best * rhythm.step_s,
        "goodput": by_goodput[best],
        "young_s": math.sqrt(2.0 * way.stall_s * mtbf_s),
    }


def _steps_in(seconds: float, step_s: float) -> int:
    return max(1, round(seconds / step_s))


def _mode_figures(plan: Plan, times: StepTimes) -> dict[str, float]:
    """Where the time of all ranks goes in a mode, as parts of it; ``spread``: of the posts of an exchange, in steps."""
    return {
        "planned_step_s": plan.step_s,
        "step_s": times.step_s,
        "utilisation": times.share("work_s"),
        "exchange_wait": times.share("exchange_wait_s"),
        "group_wait": times.share("group_wait_s"),
        "spread": float(np.median(times.spread_s)) / times.step_s,
    }


def _life_figures(
    mode: str, way: Saving, rhythm: Rhythm, life: Life, num_ranks: int
) -> dict[str, Any]:
    gpu_hours = num_ranks * life.wall_s / 3600
    return {
        "mode": mode,
        "saving": way.name,
        "every_steps": way.every,
        "every_s": way.every * rhythm.step_s,
        "stall_s": way.stall_s,
        "goodput": life.goodput,
        "stalled": life.stalled_s / life.wall_s,
        "lost": life.lost_s / life.wall_s,
        "down": life.down_s / life.wall_s,
        "failures": life.failures,
        "steps": life.trained_s / rhythm.step_s,
        "gpu_hours_lost": gpu_hours * (1.0 - life.goodput),
    }
