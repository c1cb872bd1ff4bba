"""Folders of custom students: the factory that they name runs where it may, and what it makes fits them."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.cli.options import allow_code_of
from distill.errors import CheckpointError, RecipeError, UserError
from distill.export.convert import convert
from distill.listing.outside_code import ALLOWED
from distill.plan.teacher_source import describe_teacher, teacher_shape
from distill.recipe.keys import FamilyRecipe
from distill.weights.custom_folders import custom_spec, factory_of
from distill.weights.inspect import inspect
from distill.weights.load import load_backbone, shape_of
from students.custom import probe
from tests.support.custom_nets import ARGS, forget, write_module, write_student
from tests.support.exports import VIT, write_network

NAME = "folder_nets"


@pytest.fixture
def student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a student, from a module in ``here``, where the user stands; nothing is imported yet."""
    factory = write_module(tmp_path / "here", NAME)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv(ALLOWED, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    forget(factory)
    folder, _ = write_student(tmp_path / "student", factory)
    forget(factory)
    yield folder
    forget(factory)


def test_load_backbone__a_factory_in_the_folder_one_stands_in(student: Path) -> None:
    backbone, spec = load_backbone(student)
    assert (factory_of(student), spec.width, spec.stride) == (f"{NAME}:Normed", 16, 8)
    assert shape_of(student / "model.safetensors") == spec == custom_spec(student)
    assert int(backbone.state_dict()["network.layers.1.num_batches_tracked"]) == 7
    assert not backbone.training


def test_load_backbone__a_factory_elsewhere_runs_only_when_it_is_allowed(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / f"{NAME}.py").rename(student / f"{NAME}.py")
    with pytest.raises(CheckpointError, match="run distill in the folder that holds the module"):
        load_backbone(student)
    monkeypatch.syspath_prepend(student)
    with pytest.raises(RecipeError) as refused:
        load_backbone(student)
    path = student / f"{NAME}.py"
    assert refused.value.message == (
        f"{student}/config.json: factory = {NAME}:Normed: runs code of {path}, "
        "which is not in the folder you stand in"
    )
    assert refused.value.fix == "If you trust it, pass --allow-code."
    assert NAME not in sys.modules
    sys.path.remove(str(student))
    monkeypatch.setenv(ALLOWED, "")
    allow_code_of(student, is_given=True)
    assert load_backbone(student)[1].width == 16
    assert sys.modules[NAME].__file__ == str(path)


def test_load_backbone__code_that_came_with_the_weights_runs_only_when_it_is_allowed(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    download = student.rename(here / "download")
    (here / f"{NAME}.py").rename(download / f"{NAME}.py")
    config = download / "config.json"
    config.write_text(config.read_text().replace(f"{NAME}:", f"download.{NAME}:"))
    with pytest.raises(RecipeError, match="which came with the weights"):
        load_backbone(download)
    assert f"download.{NAME}" not in sys.modules
    monkeypatch.setenv(ALLOWED, "1")
    assert load_backbone(download)[1].width == 16
    for module in ("download", f"download.{NAME}"):
        sys.modules.pop(module)
    probe.cache_clear()


def test_inspect_and_teachers__run_nothing(student: Path, tmp_path: Path) -> None:
    found = inspect(student)
    assert found.arch is None
    assert found.notes[0] == f"a custom student, made by '{NAME}:Normed'"
    images = {"sources": [{"path": str(tmp_path)}]}
    recipe = FamilyRecipe.model_validate(
        {
            "name": "x",
            "teacher": {"weights": str(student), "heads": "none"},
            "students": ["vits16"],
            "data": images,
            "schedule": {"batch": 8, "steps": 2, "lr": {"peak": 1e-3}},
        }
    )
    for read in (lambda: teacher_shape(recipe, None), lambda: describe_teacher(recipe)):
        with pytest.raises(CheckpointError, match="a custom student, made by") as refused:
            read()
        assert refused.value.fix.endswith("and no teacher.")
    with pytest.raises(CheckpointError, match="has no meta form") as no_form:
        convert(student, tmp_path / "x.pth", layout="meta", dtype=None)
    assert "--to factory" in no_form.value.fix
    assert NAME not in sys.modules


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factory": None}, "factory = 'None': must be module:function"),
        ({"factory": "timm:hf-hub:somebody/net"}, "must be module:function"),
        (
            {"factory": "os:system", "args": {"command": "true"}},
            "os:system: the modules of Python hold no networks",
        ),
        ({"args": [16]}, r"args = '\[16\]': must be the arguments of folder_nets:Normed by name"),
        ({"args": {"widht": 16}}, "unexpected keyword argument 'widht'"),
        ({"factory": f"{NAME}:Norm"}, "no such factory - did you mean 'Normed'"),
        ({"width": 12}, "width = 12, folder_nets:Normed makes 16"),
        ({"stride": 16}, "stride = 16, folder_nets:Normed makes 8"),
        ({"args": {"width": 12}, "width": 12}, "tensors do not fit folder_nets:Normed, first"),
        (
            {"factory": "transformers:detr", "args": {"use_pretrained_backbone": True}},
            "use_pretrained_backbone: not allowed",
        ),
    ],
)
def test_load_backbone__what_a_folder_may_not_say(
    change: dict[str, Any], message: str, student: Path
) -> None:
    config = student / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(UserError, match=message) as refused:
        load_backbone(student)
    assert "\n" not in refused.value.message


def test_custom_spec__other_networks_are_none(tmp_path: Path) -> None:
    folder = write_network(tmp_path / "small", VIT)
    assert factory_of(folder) == "" and custom_spec(folder) is None
    assert factory_of(tmp_path) == ""


def test_load_backbone__under_the_names_of_the_factorys_network(student: Path) -> None:
    before = load_backbone(student)[0].state_dict()
    file = student / "model.safetensors"
    plain = {name.removeprefix("network."): each for name, each in load_file(file).items()}
    save_file(plain, file)
    after = load_backbone(student)[0].state_dict()
    assert all(torch.equal(after[name], each) for name, each in before.items())
    assert ARGS["width"] == shape_of(student).width
