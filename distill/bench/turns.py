"""The steps of a benchmark's turn, and how long a simulation of the same turns takes."""

import statistics

import numpy as np

from distill.bench.timeline import Factors, Timeline, jitter_factors
from distill.plan.plan import Plan
from distill.recipe.keys import FamilyRecipe

BLOCK = 10  # measured steps of one mode before the next has its turn


def block_steps(lookahead: int) -> int:
    """Steps of a turn: the first ones fill the look-ahead, the last ones use it up, neither is counted."""
    return BLOCK + 2 * lookahead + 1


def traced_steps(lookahead: int) -> int:
    """Steps of a turn whose middle one is drawn."""
    return 2 * lookahead + 3


def rank_factors(jitter: float, world_rank: int) -> Factors:
    """The factors of a sleeping rank's work, one at each call, from one teaching to the next."""
    generator = np.random.default_rng([0, world_rank])
    return lambda: jitter_factors(generator, jitter, 1)


def simulated_step_s(
    plan: Plan,
    recipe: FamilyRecipe,
    steps: tuple[int, int],
    jitter: float,
    slow: tuple[int, float] | None,
) -> float:
    """Planned seconds of a counted step: the median of simulated turns after the warm-up, with the factors of the sleeping ranks.

    ``steps``: of the warm-up, and number of turns. ``slow``: a rank and its factor.
    """
    warmup, num_turns = steps
    pace = np.ones(plan.num_ranks)
    if slow is not None:
        pace[slow[0]] = slow[1]
    ranks = [rank_factors(jitter, rank) for rank in range(plan.num_ranks)]
    lookahead, every = recipe.engine.lookahead, recipe.engine.balance
    timeline = Timeline(
        plan, lookahead, lambda: np.concatenate([f() for f in ranks]), every=every, pace=pace
    )
    timeline.run(0, warmup)
    length, counted_s = block_steps(lookahead), list[float]()
    for turn in range(num_turns):
        timeline.meet()
        start = warmup + turn * length
        timeline.run(start, start + length, (lookahead + 1, lookahead + 1 + BLOCK))
        before, after = timeline.marks[-2:]
        counted_s.append(float((after - before).max()) / BLOCK)  # of the rank that takes longest
    return statistics.median(counted_s)
