"""``distill weights`` as a person meets it: what it prints, what it writes, exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.cli import app as cli
from distill.export.save import write_heads
from students.shapes import ConvNeXtSpec
from tests.support.weights import VIT, folder_of, heads, random_weights, translate


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs ``distill weights`` through the real entry point; gives exit code, output, errors."""

    def call(*words: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["weights", *map(str, words)])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def released_file(folder: Path) -> Path:
    path = folder / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    torch.save(translate(random_weights(VIT), VIT, "hf", "meta"), path)
    return path


def fixture_file(kind: str, folder: Path) -> Path:
    if kind == "folder":
        return folder_of(folder / "f")
    if kind == "released":
        return released_file(folder)
    path = folder / f"{kind}.safetensors"
    if kind == "heads":
        write_heads(path, heads())
    else:
        save_file({"x": torch.full((2,), float("nan"))}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("folder", ["backbone", "hf layout", "free size"]),
        ("released", ["backbone", "meta layout", "vits16"]),
        ("heads", ["heads"]),
        ("other", ["no backbone that can be used", "not finite"]),
    ],
)
def test_inspect__says_what_a_file_is(
    kind: str, expected: list[str], run: Any, tmp_path: Path
) -> None:
    code, out, _ = run("inspect", fixture_file(kind, tmp_path), "--check-values")
    assert code == 0
    assert [word for word in expected if word not in out] == []


def test_inspect__json_is_all_that_is_printed(run: Any, tmp_path: Path) -> None:
    code, out, _ = run("inspect", folder_of(tmp_path / "f"), "--json")
    found = json.loads(out)
    assert code == 0 and (found["what"], found["layout"]) == ("backbone", "hf")


def test_convert__to_meta_and_back_is_the_same_network(run: Any, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "f")
    assert run("convert", source, tmp_path / "f.pth", "--to", "meta")[0] == 0
    code, out, _ = run("convert", tmp_path / "f.pth", tmp_path / "back", "--to", "hf", "--json")
    assert code == 0 and json.loads(out)["layout"] == "hf"
    before, after = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_convert__bf16_is_half_the_size(run: Any, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "f")
    code, _, _ = run("convert", source, tmp_path / "half", "--to", "hf", "--dtype", "bf16")
    assert code == 0
    tensors = load_file(tmp_path / "half" / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def test_convert__a_free_size_has_no_name_in_timm(run: Any, tmp_path: Path) -> None:
    code, _, err = run("convert", folder_of(tmp_path / "f"), tmp_path / "t", "--to", "timm")
    assert code == 1 and "free size" in err and not (tmp_path / "t").exists()


@pytest.mark.parametrize("depths", [(1, 1), (1, 1, 1), (1, 1, 1, 1, 1)])
def test_convert__a_convnext_that_metas_class_has_no_place_for(
    depths: tuple[int, ...], run: Any, tmp_path: Path
) -> None:
    spec = ConvNeXtSpec(depths, (8,) * len(depths))
    code, _, err = run(
        "convert", folder_of(tmp_path / "f", spec), tmp_path / "f.pth", "--to", "meta"
    )
    assert code == 1 and not (tmp_path / "f.pth").exists()
    assert f"a ConvNeXt of {len(depths)} stages: Meta's class has 4" in err and "--to hf" in err


def test_convert__the_local_norm_of_a_7b_survives(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta's class does not load without it; a folder has none, and the final norm stands for it."""
    monkeypatch.setattr("distill.export.convert.catalogue_name", lambda _: "vit7b16")
    source = tmp_path / "7b.pth"
    stored = translate(random_weights(VIT), VIT, "hf", "meta")
    local = {f"local_cls_norm.{kind}": torch.randn(16) for kind in ("weight", "bias")}
    torch.save(stored | local, source)
    assert run("convert", source, tmp_path / "copy.pth", "--to", "meta")[0] == 0
    copy = torch.load(tmp_path / "copy.pth")
    assert copy.keys() == stored.keys() | local.keys()
    assert all(torch.equal(copy[name], tensor) for name, tensor in local.items())
    folder = folder_of(tmp_path / "f")
    assert run("convert", folder, tmp_path / "new.pth", "--to", "meta", "--dtype", "bf16")[0] == 0
    new = torch.load(tmp_path / "new.pth")
    assert torch.equal(new["local_cls_norm.bias"], new["norm.bias"])
    assert new["local_cls_norm.bias"].dtype == torch.bfloat16


@pytest.mark.parametrize("verb", ["inspect", "convert"])
def test_weights__a_file_that_is_not_there(verb: str, run: Any, tmp_path: Path) -> None:
    target = [tmp_path / "out", "--to", "hf"] if verb == "convert" else []
    code, out, err = run(verb, tmp_path / "gone.safetensors", *target)
    assert (code, out) == (2, "") and "gone.safetensors" in err and "Fix:" in err
    assert list(tmp_path.iterdir()) == []
