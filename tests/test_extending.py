"""CONTRIBUTING's "to add X, touch Y", each tried from outside: a toy package adds one of every kind, and no file of the tree changes."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distill.errors import RecipeError
from distill.job.family import extra_terms
from distill.job.resolved_yaml import resolved_yaml
from distill.listing.extensions import ExtensionKind, find
from distill.recipe.keys import FamilyRecipe, extension
from distill.recipe.reader import load_job
from distill.recipe.recipe_hash import recipe_hash
from tests.support.command import Run
from tests.support.jobs import ENVIRONMENT, write_images

ROOT = Path(__file__).parent.parent
PACKAGE = "toy_family"
ENTRY_POINTS = """\
[distill.losses]
toy_spread = toy_family.losses:make
toy_greedy = toy_family.losses:make_greedy
[distill.sources]
toy_box = toy_family.sources:list_box
[distill.exporters]
toy_npz = toy_family.exporters:EXPORTER
[distill.launchers]
toy_start = toy_family.launchers:launch
[distill.sinks]
toy_tracker = toy_family.sinks:Tracker
[distill.keys]
toy_keys = toy_family.keys:ToyKeys
toy_bare = toy_family.keys:Bare
"""
MODULES = {
    "__init__": "",
    "networks": """\
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.width, self.stride = 8, 8
        self.layer = nn.Conv2d(3, 8, 8, 8)

    def forward(self, image):
        patch_map = self.layer(image)
        return patch_map.mean(dim=(2, 3)), patch_map
""",
    "keys": """\
from pydantic import BaseModel

from distill.recipe.types import Section, machine, science


class ToyKeys(Section):
    margin: float = science(1.0, gt=0.0, description="Radius that class features are pulled to.")
    colour: str = machine("red", description="Colour of the curve.")


class Bare(BaseModel):
    margin: float = 1.0
""",
    "losses": """\
from torch import nn

from distill.recipe.keys import extension
from toy_family.keys import ToyKeys


def make(recipe):
    keys = extension(recipe, ToyKeys)

    def spread(globals_, locals_, batch):
        norms = globals_.class_token.float().norm(dim=1)
        return (norms - keys.margin).square().sum() / (2 * batch.images_global)

    return spread


def make_greedy(recipe):
    return nn.Linear(1, 1)
""",
    "sources": """\
import json

from distill.data.locations import Kind, Location
from distill.data.sources import Found


def list_box(path):
    for name, offset, length, label in json.loads(path.with_suffix(".json").read_text()):
        yield Found(Location(Kind.TAR, str(path), name, offset, length), label)
""",
    "exporters": """\
import numpy as np
from safetensors.torch import load_file

from distill.export.exporter import Exporter
from distill.weights.load import load_backbone


def write(name, source, folder, dtype):
    folder.mkdir()
    weights = load_file(source / "model.safetensors")
    np.savez(folder / "weights.npz", **{key: value.numpy() for key, value in weights.items()})
    (folder / "origin.txt").write_text(str(source))


def read_back(folder, stride):
    backbone = load_backbone(folder.parent / (folder / "origin.txt").read_text())[0].eval()

    def forward(pixels):
        found = backbone(pixels)
        return found.class_token, found.patch_tokens

    return forward


def usage(name, spec, files):
    return ["import numpy"]


EXPORTER = Exporter("toy_npz", "numpy", "numpy", write, read_back, usage)
""",
    "launchers": """\
import os
import socket
from pathlib import Path

from distill.launch.local import run_as_rank


def launch(request, options, engine):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    options.out.mkdir(exist_ok=True)
    Path(request.run_folder).with_suffix(".launched").touch()
    return run_as_rank(request, options, engine)
""",
    "sinks": """\
class Tracker:
    def __init__(self, run_folder, network):
        self.path = run_folder / f"toy-{network}.txt"

    def write(self, row):
        with self.path.open("a") as file:
            file.write(f"{row.step} {row.loss} {sorted(row.terms)}\\n")

    def close(self):
        with self.path.open("a") as file:
            file.write("closed\\n")
""",
}
HEADS = "{dino: {hidden: 8, bottleneck: 4, prototypes: 8}, ibot: {hidden: 8, bottleneck: 4, prototypes: 8}}"
SHARED = """\
format: 2
data: {sources: [{path: "BOX", lister: toy_box}]}
crops: {global: {size: 16}, local: {count: 1, size: 8}}
engine: {device: cpu, precision: fp32, launcher: toy_start, metric_sinks: [toy_tracker]}
"""
TEACHER = f"""\
name: toy-teacher
{SHARED}model: {{arch: vit, width: 8, depth: 1, heads: 2, patch: 8}}
heads: {HEADS}
schedule: {{batch: 4, lr: {{peak: 1.0e-3}}}}
stages: [{{name: base, steps: 1}}]
"""
FAMILY = f"""\
name: toys
{SHARED}teacher: {{train: teacher.yaml}}
students:
  - {{name: toy, arch: "toy_family.networks:make", head_widths: {{dino_hidden: 8, ibot_hidden: 8}}}}
  - {{name: plain, arch: vit, width: 8, depth: 1, heads: 2, patch: 8, head_widths: {{dino_hidden: 8, ibot_hidden: 8}}}}
objective: {{extra: {{toy_spread: 0.5}}}}
schedule: {{batch: 4, steps: 1, lr: {{peak: 1.0e-3}}}}
extensions: {{toy_keys: {{margin: 0.25}}}}
""".replace("networks:make", "networks:Net")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that names a toy of every kind; the package lies in ``tmp_path`` as an installer would leave it."""
    for name, text in MODULES.items():
        path = tmp_path / "site" / PACKAGE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    facts = tmp_path / "site" / f"{PACKAGE}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(ENTRY_POINTS)
    box = write_box(tmp_path / "images.box", write_images(tmp_path / "images"))
    (tmp_path / "teacher.yaml").write_text(TEACHER.replace("BOX", str(box)))
    (tmp_path / "family.yaml").write_text(FAMILY.replace("BOX", str(box)))
    return tmp_path / "family.yaml"


@pytest.fixture
def installed(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe, with its package installed for this process; afterwards it is gone again."""
    monkeypatch.syspath_prepend(recipe.parent / "site")
    forget_toys()
    return recipe


def write_box(box: Path, images: Path) -> Path:
    """Images one after another in a file of a kind that nothing else reads; what is where lies beside it."""
    listed, data = [], b""
    for path in sorted(images.rglob("*.png")):
        bytes_ = path.read_bytes()
        listed.append((path.name, len(data), len(bytes_), path.parent.name))
        data += bytes_
    box.write_bytes(data)
    box.with_suffix(".json").write_text(json.dumps(listed))
    return box


def toys() -> set[str]:
    """The modules of the toy package that are imported."""
    return {name.removeprefix(f"{PACKAGE}.") for name in sys.modules if name.startswith(PACKAGE)}


def forget_toys() -> None:
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]


def tree() -> str:
    """A hash of every file that the project ships, tests included."""
    digest = hashlib.sha256()
    for top in ("distill", "students", "teacher", "recipes", "tests", "docs"):
        for path in sorted((ROOT / top).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path}{path.stat().st_size}".encode() + path.read_bytes())
    return digest.hexdigest()


def test_toys__are_imported_only_where_a_recipe_names_them(installed: Path) -> None:
    load_job("quickstart")
    assert toys() == set()
    loaded, _ = load_job(str(installed))
    assert toys() == {PACKAGE, "keys"}  # what checks the recipe; the rest is found by its name
    assert isinstance(loaded, FamilyRecipe)
    (term,) = extra_terms(loaded)
    assert (term.key, term.weight) == ("extra_toy_spread", 0.5)
    assert toys() == {PACKAGE, "keys", "losses"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.extra={toy_spred: 1.0}", "toy_spred: not known - did you mean 'toy_spread'"),
        ("data.sources.0.lister=toy_bx", "toy_bx: not known - did you mean 'toy_box'"),
        ("engine.launcher=torch_run", "torch_run: not known; known: local, external, toy_start"),
        ("engine.metric_sinks=[toy_trackr]", "toy_trackr: not known - did you mean 'toy_tracker'"),
        ("extensions={toy_key: {}}", "toy_key': not known - did you mean 'toy_keys'"),
        ("extensions={toy_bare: {}}", "toy_bare': not a Section whose every key is declared"),
        ("extensions={toy_keys: {margn: 1.0}}", "margn' - did you mean 'margin'"),
        (
            "extensions={toy_keys: {margin: -1.0}}",
            r"toy_keys.margin': Input should be greater than 0 \(got -1.0",
        ),
        ("data.sources.0.path=builtin:photographs", "toy_box: builtin:photographs takes none"),
        ("objective.extra={toy_spread: 0.0}", r"extra': Input should be greater than 0 \(got 0.0"),
    ],
)
def test_load_job__a_wrong_name_is_a_problem_at_its_key(
    installed: Path, override: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_job(str(installed), [override])


def test_extensions__science_keys_are_in_the_hash_and_machine_keys_are_not(installed: Path) -> None:
    def hashed(*overrides: str) -> str:
        return recipe_hash(load_job(str(installed), overrides)[0])

    assert hashed("extensions={toy_keys: {margin: 0.25, colour: blue}}") == hashed()
    assert hashed("extensions={toy_keys: {margin: 0.5}}") != hashed()
    assert hashed("extensions=null", "objective.extra={toy_spread: 0.5}") != hashed()
    assert hashed("engine.launcher=auto", "engine.metric_sinks=[]") == hashed()


def test_extensions__a_resolved_recipe_reads_back(installed: Path) -> None:
    loaded = load_job(str(installed))[0]
    text = resolved_yaml(str(installed), [], loaded)
    assert "colour: red" in text
    resolved = installed.with_name("resolved.yaml")
    resolved.write_text(text)
    again = load_job(str(resolved))[0]
    keys = find(ExtensionKind.KEYS, "toy_keys", "extensions")
    assert extension(again, keys) == extension(loaded, keys) == keys(margin=0.25)
    assert recipe_hash(again) == recipe_hash(loaded)


def test_extra_terms__one_with_parameters_is_refused(installed: Path) -> None:
    loaded = load_job(str(installed), ["objective.extra={toy_greedy: 1.0}"])[0]
    assert isinstance(loaded, FamilyRecipe)
    with pytest.raises(RecipeError, match="toy_greedy: has parameters, and no optimizer would"):
        extra_terms(loaded)


def test_explain__a_key_of_an_installed_package(installed: Path, distill: Run) -> None:
    ended = distill("explain", "extensions.toy_keys.margin")
    assert ended.code == 0 and "Radius that class features are pulled to" in ended.out
    assert "did you mean 'toy_keys'" in distill("explain", "extensions.toy_kys.margin").err


def test_check__a_recipe_that_names_toys(installed: Path, distill: Run) -> None:
    listed = distill("check", installed)
    named = ("engine.launcher = toy_start", "students.0.arch = toy_family.networks:")
    assert listed.code == 0 and all(f"not loaded: {name}" in listed.out for name in named)
    assert "images.box" not in listed.out.splitlines()[-1]  # its lister would have to run
    ended = distill("check", installed, "--allow-code")
    assert ended.code == 0 and "images.box: 30 images" in ended.out, ended.err


def test_external_launcher__is_refused_where_no_rank_is_set(installed: Path, distill: Run) -> None:
    ended = distill("train", installed, "engine.launcher=external", "--out", installed.parent)
    assert ended.code == 2 and "RANK not set, WORLD_SIZE not set, MASTER_ADDR not set" in ended.err


@pytest.mark.slow
def test_train__a_step_with_a_toy_of_every_kind_leaves_the_tree_as_it_was(
    installed: Path, distill: Run
) -> None:
    before, out = tree(), installed.parent / "runs"
    path = os.pathsep.join([str(installed.parent / "site"), ENVIRONMENT.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "distill",
            "train",
            str(installed),
            "--allow-code",
            "--out",
            str(out),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**ENVIRONMENT, "PYTHONPATH": path},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run = out / "toys"
    assert (out / "toys.launched").is_file()
    assert json.loads((run / "data/train/index.json").read_text())["containers"] == [
        [1, str(installed.parent / "images.box")]
    ]
    assert "toy_family.networks:Net" in (run / "students/toy/config.json").read_text()
    for network in ("toy", "plain"):
        (row,) = map(json.loads, (run / f"metrics/{network}.jsonl").read_text().splitlines())
        parts = row["dino"] + row["ibot"] + 0.1 * row["koleo"] + 0.5 * row["extra_toy_spread"]
        assert row["extra_toy_spread"] > 0 and row["loss"] == pytest.approx(parts, rel=1e-5)
        tracked = (run / f"toy-{network}.txt").read_text().splitlines()
        assert re.fullmatch(r"1 \S+ .*'extra_toy_spread'.*", tracked[0]) and tracked[1:] == [
            "closed"
        ]
    assert "margin: 0.25" in (run / "recipe.resolved.yaml").read_text()
    exported = distill("export", run, "--student", "plain", "--to", "toy_npz")
    assert exported.code == 0, exported.err
    assert (run / "export/toy_npz/plain/weights.npz").is_file()
    assert tree() == before
