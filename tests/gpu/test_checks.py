"""The script for a GPU, on the CPU: every check with tiny sizes, the runner with checks that raise, lines that were run."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import exact, networks, speed
from tests.gpu.checks import CHECKS
from tests.gpu.clock import NO_MEMORY, Figures, NotHereError
from tests.gpu.report import problems_of, table
from tests.gpu.runner import Check, Runner, is_usable
from tests.gpu.sizes import FULL, TINY, Sizes
from tests.support.lines_run import executable_lines

FOLDER, ROOT = Path(__file__).parent, Path(__file__).parents[2]
MODULES = [path for path in sorted(FOLDER.glob("*.py")) if not path.name.startswith("test_")]
NOT_ON_A_CPU = {"two ranks"}
BUDGET_S = 540.0
LEAST_RUN = 0.95
CPU = torch.device("cpu")
# In a process of its own: DeepSpeed's import and the process group stay for as long as a process lives.
TRACED = """
import json, sys
from pathlib import Path
from tests.support.lines_run import traced_lines
with traced_lines(Path(sys.argv[1])) as lines:
    from tests.gpu.__main__ import main
    code = main(sys.argv[3:])
    import pytest
    fast = [sys.argv[1] + "/test_checks.py", "-m", "not slow", "-p", "no:cacheprovider"]
    code = code or int(pytest.main([*fast, "-o", "addopts=", "-o", "filterwarnings=default"]))
Path(sys.argv[2]).write_text(json.dumps({name: sorted(found) for name, found in lines.items()}))
sys.exit(code)
"""
WITHOUT = """
import sys
for name in ("nvidia", "nvidia.dali", "matplotlib", "skimage", "pyarrow", "torchvision", "timm"):
    sys.modules[name] = None
import tests.gpu.__main__
import distill.bench.measure, distill.job.resume, distill.launch.doctor, distill.launch.watchdog
import tests.support.jobs
"""


def fine(device: torch.device, sizes: Sizes) -> Figures:
    return {"figure": 1.5}


def raises(device: torch.device, sizes: Sizes) -> Figures:
    raise RuntimeError("first line\nsecond line")


def misses(device: torch.device, sizes: Sizes) -> Figures:
    raise NotHereError("not on a CPU")


def runner(path: Path, budget_s: float = 100.0, **options: Any) -> Runner:
    options = {
        "probe": lambda _: True,
        **options,
    }  # a collection of this process's garbage takes long
    return Runner(CPU, TINY, path, budget_s, **options)


def test_runner__an_error_is_a_row_and_the_next_check_runs(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    checks = [
        Check("raises", 1, raises),
        Check("infinite", 1, lambda *_: {"figure": float("inf")}),
        Check("no plain data", 1, lambda *_: {"figure": CPU}),
        Check("problem", 1, lambda *_: {"problems": ["too slow", "too large"]}),
        Check("exit", 1, lambda *_: sys.exit(3)),
        Check("misses", 1, misses),
        Check("fine", 1, fine),
    ]
    made = runner(path)
    assert not made.run(checks)
    report = json.loads(path.read_text())
    assert problems_of(report) == []
    states = [row["state"] for row in report["rows"]]
    assert states == ["failed"] * 5 + ["not here", "ok"]
    assert report["rows"][0]["error"] == "RuntimeError: first line"
    assert "second line" in report["rows"][0]["figures"]["traceback"]
    assert report["rows"][3]["error"] == "too slow; too large"
    assert "1 ok, 5 failed, 1 not here" in table(made.rows)


def test_runner__keeps_the_budget_and_writes_after_every_check(tmp_path: Path) -> None:
    now, seen, path = [0.0], list[int](), tmp_path / "gpu.json"

    def slow(device: torch.device, sizes: Sizes) -> Figures:
        now[0] += 40.0
        seen.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        return {}

    made = runner(path, clock=lambda: now[0])
    assert not made.run([Check(f"slow {i}", 40, slow) for i in range(3)] + [Check("fast", 5, fine)])
    assert [row.state for row in made.rows] == ["ok", "ok", "not run", "ok"]
    assert made.rows[2].error == "20 s of the budget are left"
    assert seen == [0, 1]


def test_runner__stops_using_a_device_that_is_lost(tmp_path: Path) -> None:
    checks = [Check("raises", 1, raises), Check("fine", 1, fine)]
    made = runner(tmp_path / "gpu.json", probe=lambda _: False)
    assert not made.run([*checks, Check("on the host", 1, fine, uses_device=False)])
    assert [row.state for row in made.rows] == ["failed", "not run", "ok"]
    assert made.rows[0].error == "RuntimeError: first line; the device is unusable from now on"
    assert not is_usable(torch.device("cuda", 99))


def test_runner__gives_up_a_check_that_does_not_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, codes = tmp_path / "gpu.json", list[int]()
    made = runner(path)
    made.run([Check("fine", 1, lambda *_: made.give_up(codes.append) or {})])
    assert codes == [1] and "did not end" in capsys.readouterr().out
    timer = made.watched()
    assert 100 < timer.interval < 150 and timer.daemon
    assert [row.state for row in made.rows] == ["failed", "ok"]


def test_problems_of__finds_what_is_not_well_formed() -> None:
    assert problems_of([]) == ["the report is no object"]
    row = {"name": "a", "state": "fine", "seconds": 1.0, "share_s": "x", "figures": {}, "error": ""}
    found = problems_of({"rows": [row, {**row, "state": "failed", "share_s": 1}]})
    assert len(found) == 7 and found[-1].startswith("rows[1]: an error")


def test_halving__goes_down_to_what_fits() -> None:
    def work(images: int) -> None:
        if images > 2:
            raise torch.OutOfMemoryError("no room")

    assert networks.halving(16, CPU, work) == 2
    with pytest.raises(torch.OutOfMemoryError):
        networks.halving(16, CPU, lambda _: work(9))


def test_teacher__a_size_that_raises_is_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure_s", lambda *_: raises(CPU, TINY))
    figures = speed._by_images(CPU, TINY, None, (1, 2))
    assert figures["1 images"] == "RuntimeError: first line" and len(figures["problems"]) == 2


def test_exact__on_a_cpu_every_step_has_the_bits_of_the_first() -> None:
    assert exact.count_different("cpu", TINY.name, "deterministic") == {"vit": 0, "convnext": 0}


def test_checks__fit_in_the_budget_and_their_modules_are_short() -> None:
    assert sum(check.share_s for check in CHECKS) <= BUDGET_S
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, node.name
                assert len(node.args.args) + len(node.args.kwonlyargs) <= 8, node.name


def test_full__networks_are_built_on_the_meta_device() -> None:
    for spec in FULL.networks.values():
        with torch.device("meta"):
            assert sum(p.numel() for p in spec.build().parameters()) == spec.parameters
        assert FULL.crops.global_size % spec.stride == FULL.crops.local_size % 16 == 0
    assert all((ROOT / path).is_file() for path in FULL.gpu_tests)


@pytest.mark.slow
def test_imports__do_without_dali_and_matplotlib() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, check=True, timeout=60)


@pytest.mark.slow
def test_script__every_check_on_the_cpu_and_nearly_every_line(tmp_path: Path) -> None:
    out, traced = tmp_path / "gpu.json", tmp_path / "lines.json"
    words = ["--device", "cpu", "--sizes", "tiny", "--out", str(out), "--budget", "1200"]
    command = [sys.executable, "-c", TRACED, str(FOLDER), str(traced), *words]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # more wait for each other, spinning
    ended = subprocess.run(
        command, cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=1200
    )
    report = json.loads(out.read_text())
    assert problems_of(report) == []
    failed = {row["name"]: row["error"] for row in report["rows"] if row["state"] != "ok"}
    assert failed.keys() == NOT_ON_A_CPU, failed
    assert ended.returncode == 0 and "not here" in ended.stdout, ended.stderr
    by_name = {row["name"]: row["figures"] for row in report["rows"]}
    assert by_name.keys() == {check.name for check in CHECKS}
    assert by_name["memory against the plan"]["tiny"]["measured"] == NO_MEMORY
    found = json.loads(traced.read_text())
    expected = {path: executable_lines(path) for path in MODULES}
    missed = {p.name: sorted(lines - set(found.get(str(p), ()))) for p, lines in expected.items()}
    share = 1.0 - sum(map(len, missed.values())) / sum(map(len, expected.values()))
    sys.stdout.write(f"{share:.1%} of the lines were run; not run: {missed}\n")
    assert share >= LEAST_RUN, missed
