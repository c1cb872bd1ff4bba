"""The launcher starts a job again by itself."""

import json
from pathlib import Path

import pytest

from distill.runfolder.events import read_events
from distill.runfolder.parked import PARKED_EXIT_CODE, read_parked
from tests.support import jobs

SHAKY = """\
import os
from pathlib import Path
from torch import nn


class Shaky(nn.Module):
    def __init__(self):
        super().__init__()
        self.width, self.stride, self.calls = 16, 8, 0
        self.layer = nn.Conv2d(3, 16, 8, 8)

    def forward(self, image):
        if self.training and os.environ.get("RANK") == "1":
            self.calls += 1
            if self.calls > 40 and Path(r"MARK").exists():
                raise ValueError("no more of this")
        patches = self.layer(image)
        return patches.mean(dim=(2, 3)), patches
"""


def write_shaky(folder: Path) -> Path:
    """A family of two students on both ranks; one of them raises on rank 1 after some steps while ``mark`` exists."""
    recipe = jobs.write_recipes(folder, stage_steps=10, steps=30, save_every=10)
    (folder / "shaky.py").write_text(SHAKY.replace("MARK", str(folder / "mark")))
    lines = recipe.read_text().splitlines()
    kept = [line for line in lines if "name: gated" not in line and "name: conv" not in line]
    kept = [line.replace("{name: plain,", "{name: plain, ranks: 2,") for line in kept]
    widths = "head_widths: {dino_hidden: 16, ibot_hidden: 16}"
    shaky = f'  - {{name: shaky, arch: "shaky:Shaky", ranks: 2, {widths}}}'
    place = kept.index("students:") + 1
    recipe.write_text("\n".join([*kept[:place], shaky, *kept[place:]]) + "\n")
    return recipe


@pytest.mark.slow
def test_run__goes_on_without_a_student_that_failed_on_one_of_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_shaky(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, code in (("calm", 0), ("shaken", PARKED_EXIT_CODE)):
        process = jobs.start(recipe, tmp_path / name)
        said, _ = process.communicate(timeout=240)
        assert process.returncode == code, said
        (tmp_path / "mark").touch()
    calm, shaken = tmp_path / "calm" / jobs.RUN, tmp_path / "shaken" / jobs.RUN
    parked = read_parked(shaken, "shaky")
    assert parked is not None and parked.reason == "ValueError: no more of this"
    steps = json.loads((shaken / "students/shaky/distill.json").read_text())["steps"]
    ending = f"shaky is parked since step {parked.step}, trained for {steps} steps"
    assert steps in {10, 20} and said.splitlines()[-1].endswith(ending), said
    kinds = [event.kind for event in read_events(shaken)]
    assert kinds == ["failed", "restarted"]
    different = jobs.differing(calm, shaken)
    assert different and all(name.startswith("shaky/") for name in different)
