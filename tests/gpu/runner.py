"""Runs checks one after the other: whatever one raises is its row, and the report is on disk after each.

The order is that of the list. A check is not begun when its share of the budget no longer fits; after an error
that leaves the device unusable only checks that do not use it are begun. A check that does not end is given up
``GRACE_S`` after the budget, together with the process: nothing else ends a kernel that hangs.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.runfolder.files import replace_text
from tests.gpu.clock import Figures, NotHereError, reason_of, release
from tests.gpu.report import Row, table, to_text
from tests.gpu.sizes import Sizes

GRACE_S = 45.0


@dataclass(frozen=True)
class Check:
    """A name, seconds of the budget, and what is run. ``uses_device``: not begun once the device is lost."""

    name: str
    share_s: float
    run: Callable[[torch.device, Sizes], Figures]
    uses_device: bool = True


def is_usable(device: torch.device) -> bool:
    """The device still computes: an error inside a kernel stays with the process."""
    try:
        release(device)
        return float(torch.ones(2, device=device).sum()) == 2.0
    except Exception:
        return False


class Runner:
    """One run: its rows so far, and where they are written."""

    def __init__(
        self,
        device: torch.device,
        sizes: Sizes,
        path: Path,
        budget_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        probe: Callable[[torch.device], bool] = is_usable,
    ) -> None:
        """``path``: of the JSON. ``probe``: whether the device is usable, asked after each check."""
        self.device, self.sizes, self.rows = device, sizes, list[Row]()
        self._path, self._budget_s, self._clock, self._probe = path, budget_s, clock, probe
        self._started, self._is_lost = clock(), False
        self._now = ("", self._started, 0.0)
        self._lock = threading.Lock()

    @property
    def is_passed(self) -> bool:
        """Every check that this machine can make was made and holds."""
        return all(row.state in ("ok", "not here") for row in self.rows)

    def run(self, checks: Sequence[Check]) -> bool:
        """Runs the checks; True if all passed."""
        for check in checks:
            sys.stderr.write(f"{self._clock() - self._started:6.1f} s  {check.name}\n")
            self._now = (check.name, self._clock(), check.share_s)
            row = self._row(check)
            with self._lock:
                self.rows.append(row)
                self._write()
        return self.is_passed

    def give_up(self, end: Callable[[int], None] = os._exit) -> None:
        """Writes the check at work down as one that did not end, prints the table, ends the process."""
        with self._lock:
            name, began, share_s = self._now
            seconds = self._clock() - began
            error = f"did not end within {seconds:.0f} s; the process was ended"
            self.rows.append(Row(name, "failed", round(seconds, 2), share_s, error=error))
            self._write()
            sys.stdout.write(table(self.rows))
            sys.stdout.flush()
            end(1)

    def watched(self) -> threading.Timer:
        """A timer, not started, that gives up when budget and grace are over."""
        left_s = self._budget_s + GRACE_S - (self._clock() - self._started)
        timer = threading.Timer(left_s, self.give_up)
        timer.daemon = True
        return timer

    def _write(self) -> None:
        head: dict[str, Any] = {
            "device": str(self.device),
            "sizes": self.sizes.name,
            "budget_s": self._budget_s,
            "seconds": round(self._clock() - self._started, 2),
        }
        replace_text(self._path, to_text(head, self.rows))

    def _row(self, check: Check) -> Row:
        began = self._clock()
        left_s = self._budget_s - (began - self._started)
        if check.share_s > left_s:
            reason = f"{max(left_s, 0.0):.0f} s of the budget are left"
            return Row(check.name, "not run", 0.0, check.share_s, error=reason)
        if check.uses_device and self._is_lost:
            reason = "an earlier error left the device unusable"
            return Row(check.name, "not run", 0.0, check.share_s, error=reason)
        figures, state, error = Figures(), "ok", ""
        try:
            figures = check.run(self.device, self.sizes)
            to_text({}, [Row(check.name, "ok", 0.0, 0.0, figures)])  # is plain data
            if problems := figures.pop("problems", None):
                state, error = "failed", "; ".join(problems)
        except NotHereError as reason_here:
            state, error = "not here", str(reason_here)
        except (Exception, SystemExit) as caught:
            figures, state = {"traceback": traceback.format_exc()[-4000:]}, "failed"
            error = reason_of(caught)
        if check.uses_device and not self._probe(self.device):
            self._is_lost, state = True, "failed"
            error = f"{error}; the device is unusable from now on".removeprefix("; ")
        seconds = round(self._clock() - began, 2)
        return Row(check.name, state, seconds, check.share_s, figures, error)  # type: ignore[arg-type]
