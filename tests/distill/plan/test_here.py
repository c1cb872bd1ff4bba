"""This machine as a device: by its files, without torch; a plan that says which device its seconds are of."""

import json
from pathlib import Path

import pytest
from PIL import Image

from distill.listing.document import find_recipe
from distill.plan import here
from distill.plan.flops import DEFAULT_DEVICE, DEVICES
from distill.plan.from_recipe import TeacherShape, head_shapes, heads_of_student
from distill.plan.here import RATE, THIS_CPU, device_here, timed_as, timed_on, why_not_compiled
from distill.plan.warnings import find_warnings
from distill.recipe.keys import FamilyRecipe
from distill.recipe.networks import FitSpec
from distill.recipe.reader import load_recipe
from students.shapes import CATALOG
from tests.support.command import Run


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose device files a test writes."""
    monkeypatch.setattr(here, "DEVICES_FOLDER", tmp_path / "dev")
    monkeypatch.setattr(here, "MODELS_FOLDER", tmp_path / "gpus")
    monkeypatch.setattr(here, "_cpu_rate", lambda: 0.2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "dev").mkdir()
    return tmp_path


def add_gpu(machine: Path, model: str) -> None:
    (machine / "dev" / "nvidia0").touch()
    (machine / "gpus" / "0").mkdir(parents=True)
    (machine / "gpus" / "0" / "information").write_text(f"Model: \t\t {model}\nIRQ: 1\n")


def test_device_here__ranks_share_the_cpu(machine: Path) -> None:
    one, two = device_here("auto", 1), device_here("cpu", 2)
    assert one.name == two.name == THIS_CPU
    assert (one.tflops_per_s, two.tflops_per_s) == (0.2, 0.1)
    assert two.memory_gib == pytest.approx(one.memory_gib / 2)


def test_why_not_compiled__a_gpu_without_triton_gets_one_line(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    recipe = load_recipe(find_recipe("family_vit"))
    assert why_not_compiled([recipe, None]) == []
    add_gpu(machine, "NVIDIA H100 80GB HBM3")
    (line,) = why_not_compiled([recipe, recipe])
    assert line == "engine.compile: nothing is compiled, the package triton is not installed"


@pytest.mark.parametrize(
    ("model", "name", "memory_gib"),
    [
        ("NVIDIA H100 80GB HBM3", "h100", 80.0),
        ("NVIDIA H200", "h200", 141.0),
        ("NVIDIA A100-SXM4-40GB", "a100", 40.0),
        ("NVIDIA GeForce RTX 4090", "rtx4090", 24.0),
        ("NVIDIA GeForce RTX 5090", "rtx5090", 32.0),
        (
            "NVIDIA GeForce RTX 4090 Laptop GPU",
            "NVIDIA GeForce RTX 4090 Laptop GPU, taken for an h100",
            80.0,
        ),
        ("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 3090, taken for an h100", 80.0),
    ],
)
def test_device_here__a_gpu_by_its_name(
    model: str, name: str, memory_gib: float, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_gpu(machine, model)
    found = device_here("auto", 8)
    assert (found.name, found.memory_gib) == (name, memory_gib)
    assert device_here("cpu", 1).name == THIS_CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_here("auto", 1).name == THIS_CPU


def test_device_here__a_recipe_for_a_gpu_on_a_laptop(machine: Path) -> None:
    assert device_here("cuda", 1) == DEFAULT_DEVICE


def test_timed_on__the_seconds_are_of_the_named_device(machine: Path) -> None:
    facts = {"step_s": 2.0, "images_per_s": 100.0, "days": 1.0, "num_ranks": 2}
    timed = timed_on(facts, device_here("cpu", 2))
    slower = DEFAULT_DEVICE.tflops_per_s * DEFAULT_DEVICE.efficiency / (0.1 * 0.5)
    assert timed["device"] == THIS_CPU and timed["num_ranks"] == 2
    assert timed["step_s"] == pytest.approx(2.0 * slower)
    assert timed["images_per_s"] == pytest.approx(100.0 / slower)
    assert timed["days"] == pytest.approx(slower)
    again = timed_as({"step_s": 2.0, "images_per_s": 100.0}, timed)
    assert (again["step_s"], again["device"]) == (timed["step_s"], THIS_CPU)
    assert again[RATE] == timed[RATE] and timed_as(facts, {}) == facts


def test_plan__takes_this_machine_and_tells_what_for_gpus(machine: Path, distill: Run) -> None:
    result = distill("plan", "family_vit", "--ranks", "1")
    assert result.code == 0 and "for this CPU; for GPUs: --device h100" in result.out
    assert "warning: family: rank 0 needs" in result.err
    found = json.loads(distill("plan", "quickstart", "--json").out)
    assert found["device"] == THIS_CPU and found["estimate"].startswith("an estimate: this CPU")
    assert found["images_per_s"] < 1000, "two cores, not two H100"
    assert distill("plan", "family_vit", "--ranks", "1", "--device", "cpu").code == 2, "asked for"


def test_plan__on_a_machine_with_a_gpu(machine: Path, distill: Run) -> None:
    add_gpu(machine, "NVIDIA H200")
    words = ("plan", "family_vit", "--ranks", "8")
    assert json.loads(distill(*words, "--json").out)["device"] == "h200"
    assert "--device h100" not in distill(*words).out


@pytest.mark.parametrize("device", ["rtx4090", "rtx5090"])
def test_plan__own_pictures_ends_overnight_on_one_gpu_of_a_desktop(
    device: str, distill: Run
) -> None:
    found = distill("plan", "own_pictures", "--ranks", "1", "--device", device, "--json")
    assert found.code == 0, found.err
    plan = json.loads(found.out)
    assert plan["device"] == device and len(plan["ranks"]) == 3
    assert 3 < 24 * plan["days"] < 9, "from the evening to the morning"
    assert DEVICES[device].memory_gib > 2 * plan["memory_gib_max"]


def test_own_pictures__heads_are_scaled_to_its_students() -> None:
    recipe = load_recipe(find_recipe("own_pictures"))
    assert isinstance(recipe, FamilyRecipe)
    usual, scaled = FitSpec().heads, recipe.teacher.fit.heads
    for ours, published in ((scaled.dino, usual.dino), (scaled.ibot, usual.ibot)):
        assert 20 * ours.prototypes < published.prototypes
    shapes = head_shapes(scaled, 768)
    for student in recipe.students:
        spec = student.backbone_spec()
        num_of_heads = sum(head.parameters for head in heads_of_student(student, spec, shapes))
        assert num_of_heads < spec.parameters, student.label


TEACHER = """\
name: t
model: {arch: vit, width: 64, depth: 2, heads: 2, patch: 8}
data: {sources: [pictures]}
crops: {global: 48, local: {count: 2, size: 24}}
heads: {dino: {hidden: 64, bottleneck: 16, prototypes: 8}, ibot: {hidden: 64, bottleneck: 16, prototypes: 8}}
schedule: {batch: 8, lr: {peak: 2e-4}}
stages: [{name: base, steps: 10}, {name: more, steps: 5}]
engine: {device: cpu, processes: 1}
"""
FAMILY = """\
name: f
teacher: {train: t.yaml}
students: [{name: small, arch: vit, width: 64, depth: 2, heads: 2, patch: 8, head_widths: {dino_hidden: 64, ibot_hidden: 64}}]
data: {sources: [pictures]}
crops: {global: 48, local: {count: 2, size: 24}}
schedule: {batch: 8, steps: 10, lr: {peak: 2e-4}}
engine: {device: cpu, processes: 1}
"""


@pytest.fixture
def recipes(machine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Recipes without anything to warn of, and ten pictures."""
    monkeypatch.chdir(machine)
    (machine / "pictures").mkdir()
    for i in range(10):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(machine / "pictures" / f"{i}.png")
    (machine / "t.yaml").write_text(TEACHER)
    (machine / "f.yaml").write_text(FAMILY)
    return machine


WARNINGS = [
    ("f.yaml", "schedule.lr.warmup=10", "schedule.lr.warmup = 10: not shorter than the run"),
    ("f.yaml", "schedule.teacher_temperature.warmup=99", "teacher_temperature.warmup = 99: not"),
    ("f.yaml", "schedule.freeze_prototypes=10", "schedule.freeze_prototypes = 10: not shorter"),
    ("f.yaml", "schedule.batch=16", "schedule.batch = 16: more than the 10 images"),
    ("f.yaml", "objective.cosine=2", "objective.cosine = 2: has no effect, since students learn"),
    ("f.yaml", "engine.device=cuda", "engine.device = cuda: this machine has no such device"),
    ("f.yaml", "engine.processes=8", "engine.processes = 8: this machine has"),
    ("f.yaml", "teacher:schedule.lr.warmup=20", "teacher:schedule.lr.warmup = 20: not shorter"),
    ("f.yaml", "teacher:heads.dino.prototypes=64", "teacher:heads.dino.prototypes = 64: 0.16 images for each; heads.dino={hidden: 64, bottleneck: 16, prototypes: 8} has one"),
    ("f.yaml", "students.0.head_widths.dino_hidden=4096", "small: its heads have 17.1 million parameters, 152 times"),
    ("t.yaml", "stages.1.lr={peak: 1e-4, warmup: 5}", "stages.1.lr.warmup = 5: not shorter than the run"),
    ("t.yaml", "stages.1.gram={teacher: base@5, refresh: 5}", "stages.1.gram.refresh = 5: the refresh at the stage's last step (5) never acts"),
    ("t.yaml", "stages.1.batch=12", "stages.1.batch = 12: more than the 10 images"),
    ("t.yaml", "stages.0.objective={smooth_l1: 1.0}", "stages.0.objective.smooth_l1 = 1: has no effect"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "override", "expected"), WARNINGS, ids=[w[1] for w in WARNINGS])
def test_check__warns_of(
    recipe: str, override: str, expected: str, recipes: Path, distill: Run
) -> None:
    result = distill("check", recipe, override)
    assert result.code == 0, result.err
    warnings = [line for line in result.out.splitlines() if line.startswith("warning: ")]
    assert any(expected in line for line in warnings), result.out
    found = json.loads(distill("check", recipe, override, "--json").out)["warnings"]
    assert [f"warning: {line}" for line in found] == warnings


LENT = FAMILY.replace("{train: t.yaml}", "{weights: /w, heads: fit}")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "teacher.fit={warmup: 50, steps: 50}",
            "teacher.fit.warmup = 50: not shorter than the run",
        ),
        ("teacher.fit.heads={}", "teacher.fit.heads.dino.prototypes = 262,144: 0.0038"),
        ("teacher.heads=none", "objective.koleo = 0.5: has no effect, since teacher.heads: none"),
        (
            "students=[{arch: vits16, patch: 8}, {arch: vitb16, patch: 8, steps: 5}]",
            "warmup = 6: vitb16 ends at step 5, within it",
        ),
    ],
)
def test_find_warnings__of_a_given_teacher(override: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(LENT)
    always = ["objective.koleo=0.5", "schedule.lr.warmup=6"]
    recipe = load_recipe(tmp_path / "f.yaml", [*always, override])
    found = find_warnings(recipe, None, None, [1000])
    assert any(expected in line for line in found), found


def test_find_warnings__heads_of_the_default_for_a_tiny_student(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(LENT)
    recipe = load_recipe(tmp_path / "f.yaml")
    assert isinstance(recipe, FamilyRecipe)
    spec = CATALOG["vits16"]
    shape = TeacherShape(spec, head_shapes(recipe.teacher.fit.heads, spec.width))
    found = find_warnings(recipe, None, shape, [0])
    assert (
        len(found) == 1
        and "times its backbone's 0.1; turn down teacher.fit.heads (dino." in found[0]
    )


def test_check__counts_epochs_and_warns_of_nothing(recipes: Path, distill: Run) -> None:
    found = json.loads(distill("check", "f.yaml", "--json").out)
    assert found["warnings"] == [] and found["device"] == THIS_CPU
    phases = {each["phase"]: (each["steps"], each["epochs"]) for each in found["phases"]}
    assert phases == {"base": (10, 8.0), "more": (5, 4.0), "family": (10, 8.0)}
    assert all(each["seconds"] > 0 and each["memory_gib"] > 0 for each in found["phases"])
    assert ": 10 steps of 8 images, 8 epochs, about " in distill("check", "f.yaml").out
