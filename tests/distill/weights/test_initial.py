"""What networks start from: bit-equal features, adapted embeddings, and one line for what does not fit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.errors import CheckpointError
from distill.recipe.init_keys import InitSpec
from distill.recipe.networks import ArchSpec
from distill.weights.initial import (
    Shapes,
    adapted,
    check_initial,
    find_initial,
    head_parts,
    initial_backbone,
    load_initial,
    projector_parts,
)
from distill.weights.load import load_backbone
from students.shapes import BackboneSpec, ConvNeXtSpec
from students.student import build_network, seeded
from teacher.shapes import HeadShape, ViTSpec
from teacher.task import DistillationTask, TaskOptions
from tests.support.weights import HEAD, SMALL, VIT, folder_of, heads, random_weights, translate

KEY = "students.small.init"
OPTIONS = TaskOptions(masks_input=False, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
SPECS = [SMALL["mlp"], SMALL["swiglu"], SMALL["convnext"]]


def starts(path: Path | str, **keys: Any) -> InitSpec:
    return InitSpec.model_validate({"from": str(path), **keys})


def task_of(spec: BackboneSpec, head: HeadShape) -> nn.Module:
    shape = replace(head, width=spec.width)
    network = build_network(spec, (shape, shape), seeded(1, "a"))
    return DistillationTask(*network, OPTIONS, None, 1, koleo_is_local=True)  # type: ignore[arg-type]


def features(network: nn.Module, channels: int = 3) -> tuple[Tensor, Tensor]:
    pixels = torch.rand(2, channels, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = network.eval()(pixels)
    return found.class_token, found.patch_tokens


def test_load__features_are_those_of_the_source_bit_for_bit(tmp_path: Path) -> None:
    for index, spec in enumerate(SPECS):
        folder = folder_of(tmp_path / f"hf{index}", spec)
        meta = tmp_path / f"meta{index}.pth"
        torch.save(translate(random_weights(spec), spec, "hf", "meta"), meta)
        run = tmp_path / f"run{index}"
        (run / "students").mkdir(parents=True)
        (run / "job.json").write_text("{}")
        shutil.copytree(folder, run / "students" / "small")
        theirs = features(load_backbone(folder)[0])
        for source in (folder, folder / "model.safetensors", meta, f"{run}:small"):
            task = task_of(spec, HEAD)
            before = sum(p.numel() for p in task.parameters())
            load_initial(KEY, starts(source), spec, task)
            assert sum(p.numel() for p in task.parameters()) == before
            ours = features(task.get_submodule("backbone"))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), source
            trained = dict(task.get_submodule("backbone").named_parameters())
            assert all(parameter.requires_grad for parameter in trained.values())


@pytest.mark.parametrize(
    ("keys", "spec"),
    [
        ({"key_bias": True, "norm_eps": 0.001}, replace(VIT, norm_eps=1e-3, key_bias=True)),
        ({"norm_eps": 0.001}, replace(SMALL["convnext"], norm_eps=1e-3)),
    ],
)
def test_load__what_a_source_states_is_written_in_the_recipe(
    keys: dict[str, Any], spec: ViTSpec | ConvNeXtSpec, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "a", spec)
    sizes: dict[str, Any] = {"arch": "convnext"}
    if isinstance(spec, ViTSpec):
        same = ("width", "depth", "heads", "patch", "ffn", "ffn_width")
        sizes = {"arch": "vit", **{name: getattr(spec, name) for name in same}}
    else:
        sizes |= {"depths": spec.depths, "widths": spec.widths}
    plain, stated = (
        ArchSpec.model_validate({**sizes, **each}).backbone_spec() for each in ({}, keys)
    )
    with pytest.raises(CheckpointError, match=r"there, .* in the recipe") as caught:
        check_initial(KEY, starts(folder), plain, {})
    text = ", ".join(f"{key}: {json.dumps(value)}" for key, value in keys.items())
    assert text in caught.value.fix
    task = task_of(stated, HEAD)
    load_initial(KEY, starts(folder), stated, task)
    theirs = features(load_backbone(folder)[0])
    ours = features(task.get_submodule("backbone"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    other = plain.build()
    other.load_state_dict(random_weights(spec), strict=False)
    assert not torch.equal(ours[0], features(other)[0])  # what is stated matters


def test_load__the_norm_of_local_crops_starts_as_the_final_norm(tmp_path: Path) -> None:
    spec = replace(VIT, untie_local_norm=True, layerscale_init=0.3)
    weights = initial_backbone(KEY, starts(folder_of(tmp_path / "a")), spec)
    assert torch.equal(weights["local_cls_norm.weight"], random_weights(VIT)["norm.weight"])


@pytest.mark.parametrize("name", ["heads.safetensors", "other.safetensors"])
def test_load__heads_that_fit_come_along(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    save_file(heads(), folder / name)
    keys = {} if name.startswith("heads") else {"heads": str(folder / name)}
    task = task_of(VIT, HEAD)
    load_initial(KEY, starts(folder, **keys), VIT, task)
    assert torch.equal(
        task.state_dict()["dino_head.mlp.0.weight"], heads()["dino_head.mlp.0.weight"]
    )
    assert check_initial(KEY, starts(folder, **keys), VIT, parts_of(HEAD)).parts == (
        "dino_head",
        "ibot_head",
    )


def parts_of(head: HeadShape) -> Shapes:
    return head_parts((head, head))


def test_load__heads_that_do_not_fit_are_fresh_and_reported(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    save_file(heads(), folder / "heads.safetensors")
    wider = replace(HEAD, hidden=14)
    taken = check_initial(KEY, starts(folder), VIT, parts_of(wider))
    assert taken.parts == () and "[12, 16] there, [14, 16] here" in taken.fresh["dino_head"]
    task = task_of(VIT, wider)
    fresh = {k: v.clone() for k, v in task.state_dict().items() if "head" in k}
    load_initial(KEY, starts(folder), VIT, task)
    assert all(torch.equal(task.state_dict()[name], tensor) for name, tensor in fresh.items())
    with pytest.raises(CheckpointError, match=r"heads = beside: .* does not fit, dino_head"):
        check_initial(KEY, starts(folder, heads="beside"), VIT, parts_of(wider))
    none = check_initial(KEY, starts(folder, heads="none"), VIT, parts_of(HEAD))
    assert none.parts == () and none.fresh["dino_head"] == "heads: none"


@pytest.mark.parametrize(
    ("keys", "spec", "message"),
    [
        ({}, replace(VIT, width=32), r"ViT of width 16 there, ViT of width 32 in the recipe"),
        ({}, replace(VIT, depth=3), r"depth 1 there, ViT of depth 3"),
        ({}, replace(VIT, patch=16), r"patch 8 there, ViT of patch 16"),
        ({"adapt": True}, replace(VIT, patch=16, depth=2), r"depth 1 there, ViT of depth 2"),
        ({}, replace(VIT, norm_eps=1e-3), r"norm_eps 1e-05 there, ViT of norm_eps 0.001"),
        ({}, replace(VIT, rope_base=50.0), r"rope_base 100.0 there, ViT of rope_base 50.0"),
        ({}, ConvNeXtSpec((1, 1), (8, 16)), r"ViT of width 16 there, ConvNeXt of width 16"),
        ({"heads": "beside"}, VIT, r"heads = beside: no .*heads.safetensors"),
        ({"heads": "absent.pth"}, VIT, r"heads = absent.pth: no such file"),
    ],
)
def test_check__one_line_for_what_does_not_fit(
    keys: dict[str, Any], spec: BackboneSpec, message: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "a")
    with pytest.raises(CheckpointError, match=message) as caught:
        check_initial(KEY, starts(folder, **keys), spec, parts_of(HEAD))
    assert "\n" not in caught.value.message and caught.value.message.startswith(KEY)


def test_check__another_patch_names_the_key_that_adapts(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    with pytest.raises(CheckpointError) as caught:
        check_initial(KEY, starts(folder), replace(VIT, patch=16), {})
    assert f"{KEY}.adapt=true" in caught.value.fix


def test_adapted__an_even_patch_gives_the_token_that_it_gave() -> None:
    kernel = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).cumsum(-1)
    for side in (6, 8, 16):
        new = adapted(kernel, torch.Size((4, 3, side, side)))
        even = torch.ones(1, 3, side, side)
        token = nn.functional.conv2d(even, new).flatten()
        torch.testing.assert_close(token, kernel.sum((1, 2, 3)), rtol=0.1, atol=1.0)
    grey = adapted(kernel, torch.Size((4, 5, 8, 8)))
    assert torch.allclose(grey, kernel.mean(1, keepdim=True).expand(-1, 5, -1, -1) * 3 / 5)
    pattern = torch.rand(1, 1, 8, 8)
    many, few = (
        nn.functional.conv2d(pattern.expand(1, count, -1, -1), weight)
        for count, weight in ((5, grey), (3, kernel))
    )
    torch.testing.assert_close(many, few)


def test_load__adapts_patch_and_channels_where_the_key_wants_it(tmp_path: Path) -> None:
    folder, spec = folder_of(tmp_path / "a"), replace(VIT, patch=16, in_channels=5)
    weights = initial_backbone(KEY, starts(folder, adapt=True), spec)
    name, source = "embeddings.patch_embeddings.weight", random_weights(VIT)
    assert torch.equal(weights[name], adapted(source[name], torch.Size((16, 5, 16, 16))))
    others = {key for key in weights if key != name}
    assert all(torch.equal(weights[key], source[key]) for key in others)


def run_of(folder: Path) -> Path:
    """A finished run with a student of which a checkpoint is left."""
    (folder / "job.json").parent.mkdir(parents=True)
    (folder / "job.json").write_text("{}")
    folder_of(folder / "students" / "small")
    return folder


def test_find__a_network_of_a_run(tmp_path: Path) -> None:
    run = run_of(tmp_path / "x")
    assert find_initial(KEY, starts(f"{run}:small")).weights == run / "students" / "small"
    for wrong, message in (
        (f"{run}:large", r"no finished network 'large'"),
        (str(run), r"is a run"),
        (str(tmp_path / "y"), r"no such file or folder"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            find_initial(KEY, starts(wrong))
    with pytest.raises(CheckpointError) as caught:
        find_initial(KEY, starts(str(run)))
    assert "small" in caught.value.fix


def test_load__of_a_checkpoint_the_average(tmp_path: Path) -> None:
    """Projectors come from the EMA, not from the weights or the moments."""
    folder, parts = folder_of(tmp_path / "a"), projector_parts(16, 24)
    saved = {
        f"{kind}/{name}": torch.full(shape, value)
        for value, kind in enumerate(("exp_avg", "weight", "ema"), 1)
        for name, shape in parts.items()
        for value in (float(value),)
    }
    save_file(saved, tmp_path / "small.safetensors")
    task = nn.Module()
    task.backbone = VIT.build()
    task.class_projector, task.patch_projector = nn.Linear(16, 24), nn.Linear(16, 24)
    load_initial(KEY, starts(folder, heads=str(tmp_path / "small.safetensors")), VIT, task)
    assert (task.class_projector.weight == 3.0).all() and (task.patch_projector.bias == 3.0).all()


def test_load__refuses_numbers_that_are_not_finite(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    broken = heads()
    broken["ibot_head.mlp.0.bias"][0] = float("nan")
    save_file(broken, folder / "heads.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        load_initial(KEY, starts(folder), VIT, task_of(VIT, HEAD))


def test_check__reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "a")
    save_file(heads(), folder / "heads.safetensors")

    def read(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("distill.weights.containers._Safetensors.read", read)
    assert check_initial(KEY, starts(folder), VIT, parts_of(HEAD)).parts
    described = check_initial(KEY, starts(folder), VIT, projector_parts(16, 8)).describe()
    assert described.startswith("backbone; fresh class_projector (the source has none)")
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 16
    assert isinstance(VIT, ViTSpec)
