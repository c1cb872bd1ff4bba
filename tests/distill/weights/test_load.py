"""Networks and heads out of every kind of file, hostile files refused, and what loading costs."""

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.errors import CheckpointError
from distill.export.convert import convert
from distill.export.save import write_backbone, write_heads, write_tensors
from distill.weights.containers import read_object
from distill.weights.hf_config import hf_config
from distill.weights.inspect import inspect
from distill.weights.load import load_backbone, shape_of
from students.custom import probe
from students.shapes import BackboneSpec, ConvNeXtSpec
from teacher.shapes import ViTSpec
from tests.support.memory import uninitialized_memory_is_nan
from tests.support.weights import (
    FACTS,
    SMALL,
    VIT,
    folder_of,
    heads,
    random_weights,
    translate,
)


def outputs(path: Path, spec: BackboneSpec) -> Tensor:
    backbone, read = load_backbone(path)
    assert (read.width, read.stride) == (spec.width, spec.stride)
    generator = torch.Generator().manual_seed(0)
    shape = (2, spec.in_channels, 2 * spec.stride, 3 * spec.stride)
    found = backbone(torch.randn(shape, generator=generator))
    return torch.cat([found.class_token, found.patch_tokens.flatten(1)], dim=1)


def test_load_backbone__brings_back_the_running_statistics_of_batch_norm(tmp_path: Path) -> None:
    args = {"depths": [1], "layer_type": "basic", "hidden_sizes": [8], "embedding_size": 8}
    spec = probe("transformers:resnet", json.dumps(args))
    network = spec.build()
    spec.init_(network, torch.Generator().manual_seed(0))
    weights = network.state_dict()
    for name, tensor in weights.items():
        tensor.copy_(torch.full_like(tensor, 3 if name.endswith("tracked") else 0.5))
    write_backbone(tmp_path / "resnet", weights, spec, FACTS)
    loaded, _ = load_backbone(tmp_path / "resnet", spec=spec)
    assert loaded.state_dict().keys() == weights.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == weights[name].dtype and torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("kind", ["mlp", "swiglu", "convnext"])
def test_load_backbone__every_container_gives_the_same_network(kind: str, tmp_path: Path) -> None:
    spec, weights = SMALL[kind], random_weights(SMALL[kind])
    folder = folder_of(tmp_path / "whole", spec)
    expected = outputs(folder, spec)
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "config.json").write_text(json.dumps(hf_config(spec)))
    write_tensors(shards, weights, shard_bytes=4000)
    released = translate(weights, spec, "hf", "meta")
    (tmp_path / "bare").mkdir()
    torch.save(released, tmp_path / "bare" / "released.pth")
    training = {"teacher": {f"backbone.{k}": v for k, v in released.items()}, "iteration": 7}
    torch.save(training, tmp_path / "bare" / "training.pth")
    bare = tmp_path / "bare" / "named.safetensors"
    save_file({f"module.{k}": v.clone() for k, v in released.items()}, bare)
    for path in (
        shards,
        bare,
        tmp_path / "bare" / "released.pth",
        tmp_path / "bare" / "training.pth",
    ):
        assert torch.equal(outputs(path, spec), expected), path


@pytest.mark.parametrize("kind", SMALL)
def test_load_backbone__leaves_no_number_as_it_lay_in_memory(kind: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "whole", SMALL[kind])
    with uninitialized_memory_is_nan():
        network, _ = load_backbone(folder)
    assert all(tensor.isfinite().all() for tensor in (*network.parameters(), *network.buffers()))


@pytest.mark.parametrize("kind", ["mlp", "no bias", "convnext"])
def test_convert__meta_hf_meta_is_bit_equal(kind: str, tmp_path: Path) -> None:
    four_stages = ConvNeXtSpec((1, 2, 1, 1), (8, 12, 16, 16))  # Meta's class has no other number
    spec = four_stages if kind == "convnext" else SMALL[kind]
    released = translate(random_weights(spec), spec, "hf", "meta")
    torch.save(released, tmp_path / "released.pth")
    assert (
        convert(tmp_path / "released.pth", tmp_path / "hf", layout="hf", dtype=None).what
        == "backbone"
    )
    convert(tmp_path / "hf", tmp_path / "again.pth", layout="meta", dtype=None)
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again.keys() == released.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in released.items())


def test_convert__halves_and_refuses_to_overwrite(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    found = convert(folder, tmp_path / "b", layout="hf", dtype=torch.bfloat16)
    assert found.dtypes == ("bf16",)
    assert json.loads((tmp_path / "b/config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(CheckpointError, match="exists"):
        convert(folder, tmp_path / "b", layout="hf", dtype=None)
    with pytest.raises(CheckpointError, match="a network of a free size has no name in timm"):
        convert(folder, tmp_path / "c", layout="timm", dtype=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def _truncated(path: Path) -> Path:
    file = folder_of(path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    return path


def _greedy_header(path: Path) -> Path:
    file = folder_of(path) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**40) + file.read_bytes()[8:])
    return path


def _changed(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        weights = random_weights(VIT)
        change(weights)
        folder_of(path)
        save_file(weights, path / "model.safetensors")
        return path

    return make


def _config(**changes: Any) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        folder_of(path)
        (path / "config.json").write_text(json.dumps({**hf_config(VIT), **changes}))
        return path

    return make


def _index(mapping: Any) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        folder_of(path)
        (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
        return path

    return make


def _no_config(path: Path) -> Path:
    (folder_of(path) / "config.json").unlink()
    return path


def _pickle_with_code(path: Path) -> Path:
    path.mkdir()
    torch.save({"cls_token": Bomb(path / "executed")}, path / "evil.pth")
    return path / "evil.pth"


def _old_pickle(path: Path) -> Path:
    path.mkdir()
    (path / "old.pth").write_bytes(pickle.dumps({"cls_token": Bomb(path / "executed")}))
    return path / "old.pth"


def _text(path: Path) -> Path:
    path.mkdir()
    (path / "notes.txt").write_text("hello")
    return path / "notes.txt"


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (_truncated, "cannot be read"),
    "greedy header": (_greedy_header, "cannot be read"),
    "integers": (
        _changed(lambda w: w.update({"norm.bias": torch.zeros(16, dtype=torch.int32)})),
        "norm.bias holds int32 numbers",
    ),
    "nan": (
        _changed(lambda w: w["norm.bias"].fill_(float("nan"))),
        "norm.bias holds numbers that are not finite",
    ),
    "missing": (_changed(lambda w: w.__delitem__("norm.bias")), r"1 missing \(norm.bias\)"),
    "other config": (_config(num_hidden_layers=2), r"missing \(layer.1"),
    "other model": (_config(model_type="bert"), "model_type = 'bert'"),
    "absurd config": (_config(hidden_size=-4), "do not fit|at most"),
    "no config": (_no_config, "config.json: missing"),
    "index outside": (
        _index({"norm.bias": "../../etc/passwd"}),
        "no weight_map of plain file names",
    ),
    "index of nothing": (
        _index({"ghost": "model-00001-of-00001.safetensors"}),
        "1 tensors of the index are in no shard",
    ),
    "code": (
        _pickle_with_code,
        r"holds more than tensors \(it names posix.mkdir\); it was not executed",
    ),
    "old code": (_old_pickle, "not in the zip format"),
    "text": (_text, "not a file of weights"),
    "nothing": (lambda path: path, "no such file or folder"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_load_backbone__refuses_in_one_line_and_executes_nothing(kind: str, tmp_path: Path) -> None:
    make, message = HOSTILE[kind]
    path = make(tmp_path / "given")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_backbone(path)
    assert "\n" not in caught.value.message and caught.value.fix
    assert not list(tmp_path.rglob("executed"))


def test_inspect__names_every_kind(tmp_path: Path) -> None:
    small = random_weights(VIT)
    released = translate(small, VIT, "hf", "meta")
    torch.save(released, tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    found = inspect(tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth", check_values=True)
    assert (found.what, found.layout, found.arch) == ("backbone", "meta", "free size")
    assert (found.released, found.has_nan, found.dtypes) == ("vits16", False, ("float32",))
    assert any("heads: fit" in note for note in found.notes)
    write_heads(tmp_path / "heads.safetensors", heads())
    assert inspect(tmp_path / "heads.safetensors").what == "heads"
    torch.save(
        {"teacher": {**{f"backbone.{k}": v for k, v in released.items()}, **heads()}},
        tmp_path / "t.pth",
    )
    assert inspect(tmp_path / "t.pth").what == "training file: backbone and heads"
    save_file({"x": torch.full((2,), float("nan"))}, tmp_path / "x.safetensors")
    other = inspect(tmp_path / "x.safetensors", check_values=True)
    assert (other.what, other.has_nan, other.arch) == ("no backbone that can be used", True, None)
    assert inspect(folder_of(tmp_path / "f")).to_json()["parameters"] == sum(
        map(Tensor.numel, small.values())
    )


def test_shape_of__reads_no_tensor(tmp_path: Path) -> None:
    spec = ConvNeXtSpec((1, 1), (8, 12))
    assert shape_of(folder_of(tmp_path / "c", spec)) == spec


MEASURE = """
import sys, threading
from pathlib import Path
import torch
from distill.weights.load import load_backbone, shape_of

def resident_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

path, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
shape_of(path)
load_backbone(Path(sys.argv[3]))  # everything that is loaded once
before = peak = resident_mb()
stop = threading.Event()

def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, resident_mb())

watcher = threading.Thread(target=watch)
watcher.start()
backbone, _ = load_backbone(path, dtype=dtype)
stop.set()
watcher.join()
print(max(peak, resident_mb()) - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["folder", "pth"])
def test_load_backbone__costs_its_own_size_and_one_tensor(
    dtype: str, form: str, tmp_path: Path
) -> None:
    spec = ViTSpec(width=768, depth=8, heads=12, ffn_width=3072)  # 230 MB in fp32
    weights = random_weights(spec)
    path = tmp_path / "big"
    if form == "folder":
        write_backbone(path, weights, spec, FACTS)
    else:
        path = tmp_path / "big.pth"
        torch.save(translate(weights, spec, "hf", "meta"), path)
    folder_of(tmp_path / "small")
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), dtype, str(tmp_path / "small")],
        capture_output=True,
        text=True,
        check=True,
    )
    grown_mb = float(ended.stdout)
    item = 4 if dtype == "float32" else 2
    own_mb = sum(map(Tensor.numel, weights.values())) * item / 2**20
    tensor_mb = max(map(Tensor.numel, translate(weights, spec, "hf", "meta").values())) * 4 / 2**20
    # a tensor is there twice when it is fused or cast on the way: mapped, and made; 8 MB for the allocator
    assert grown_mb < own_mb + 2 * tensor_mb + 8, (grown_mb, own_mb, tensor_mb)


@pytest.mark.parametrize(
    ("text", "told"), [("{", "cannot be read"), ("[1]", "holds list, not an object")]
)
def test_read_object__of_anything_else_is_one_line(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "distill.json").write_text(text)
    with pytest.raises(CheckpointError, match=told):
        read_object(tmp_path / "distill.json")
