"""Which plan is in force at which step."""

from collections.abc import Sequence

from distill.plan.plan import Plan

RETAINED_PLANS = 3  # that steps in preparation may still refer to


class PlanSchedule:
    """The plan in force at each step. It changes only at steps that all ranks agree on, and only ahead of them.

    ``later`` are changes known from the start, ascending: networks that finish early.
    """

    def __init__(self, plan: Plan, later: Sequence[tuple[int, Plan]] = ()) -> None:
        self._entries = [(0, plan), *later]

    def at(self, step: int) -> Plan:
        """The plan of a step."""
        return next(plan for start, plan in reversed(self._entries) if start <= step)

    def share(self, world_rank: int, step: int) -> range:
        """The positions that a rank teaches at a step."""
        return self.at(step).share(world_rank, step)

    def change(self, from_step: int, plan: Plan) -> None:
        """Puts another plan in force from a step on that no rank has begun to prepare, until the next known change."""
        before = [entry for entry in self._entries if entry[0] <= from_step]
        assert before[-1][0] < from_step, "one plan per step"
        later = self._entries[len(before) :]
        self._entries = [*before[-RETAINED_PLANS:], (from_step, plan), *later]

    def has_same_networks(self, from_step: int, to_step: int) -> bool:
        """No network finishes between two steps."""
        return self.at(from_step).placements == self.at(to_step).placements

    def most_images(self, world_rank: int) -> int:
        """The most images a rank ever teaches in one step of the plans known now."""
        return max(plan.largest_shares[world_rank] for _, plan in self._entries)
