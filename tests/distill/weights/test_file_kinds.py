"""Every kind of file around a backbone is read, and every other kind is refused with what it is and what to do."""

import gzip
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.errors import CheckpointError
from distill.export.convert import convert
from distill.listing import storage
from distill.weights.containers import Container, is_finite, open_weights, read_again, reading
from distill.weights.inspect import inspect
from distill.weights.load import identify_layout, load_backbone
from distill.weights.teacher_files import files_of_weights
from tests.support.command import exit_code_of
from tests.support.weights import VIT, folder_of, heads, random_weights, translate

Weights = dict[str, Tensor]
META = translate(random_weights(VIT), VIT, "hf", "meta")
OTHER = {name: tensor + 1 for name, tensor in META.items() if "rope" not in name} | {
    "rope_embed.periods": META["rope_embed.periods"]
}


def saved(path: Path, tensors: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)
    return path


def under(prefix: str, tensors: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def final_norm(path: Path, prefix: str | None = None) -> Tensor:
    tensor: Tensor = load_backbone(path, prefix=prefix)[0].state_dict()["norm.weight"]
    return tensor


WRAPPERS = (
    "state_dict.", "model.", "model_ema.", "model_ema.module.", "ema.", "ema_model.", "net.", "encoder.",
    "teacher.", "student.", "backbone.", "module.", "_orig_mod.", "model._orig_mod.module.backbone.", "visual.trunk.",
    "state_dict.model.encoder.", "ema/backbone.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_load_backbone__understands_every_wrapper(prefix: str, tmp_path: Path) -> None:
    flat = saved(tmp_path / "flat.pth", {**under(prefix, META), "epoch": 3})
    tree: dict[str, object] = dict(META)
    for part in reversed(prefix.rstrip(".").split(".")):
        tree = {part: tree}
    nested = saved(tmp_path / "nested.pth", {**tree, "args": "none", "optimizer": {"lr": 0.1}})
    save_file(under(prefix, META), tmp_path / "of.safetensors")
    for path in (flat, nested, tmp_path / "of.safetensors"):
        assert torch.equal(final_norm(path), META["norm.weight"]), path


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("model.", "ema."),
        ("module.", "teacher."),
        ("student.backbone.", "teacher.backbone."),
        ("gram_teacher.backbone.", "teacher.backbone."),
        ("state_dict.", "state_dict_ema."),
        ("", "ema."),
        ("online/backbone.", "ema/backbone."),
        ("optimizer.exp_avg.", "model."),
        ("student.", "net."),
    ],
)
def test_load_backbone__of_two_takes_the_teacher_or_the_average(
    first: str, second: str, tmp_path: Path
) -> None:
    for order in ((first, OTHER), (second, META)), ((second, META), (first, OTHER)):
        tensors = {name: t for prefix, each in order for name, t in under(prefix, each).items()}
        path = saved(tmp_path / "two.pth", tensors)
        assert torch.equal(final_norm(path), META["norm.weight"])
        notes = inspect(path).notes
        is_choice = not {"student", "optimizer", "gram_teacher"} & set(first.split("."))
        assert is_choice == any(f"{second!r} is taken (teacher or EMA first)" in n for n in notes)


@pytest.mark.parametrize(
    ("first", "second"), [("model.", "net."), ("teacher.", "ema."), ("a.teacher.", "b.teacher.")]
)
def test_load_backbone__of_two_alike_takes_none_but_the_one_that_is_named(
    first: str, second: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "two.pth", {**under(first, META), **under(second, OTHER)})
    with pytest.raises(CheckpointError) as caught:
        load_backbone(path)
    assert f"holds 2 backbones, under {first!r} and {second!r}" in caught.value.message
    assert "--prefix" in caught.value.fix
    assert torch.equal(final_norm(path, first), META["norm.weight"])
    convert(path, tmp_path / "out", layout="hf", dtype=None, prefix=second.rstrip("."))
    assert torch.equal(final_norm(tmp_path / "out"), OTHER["norm.weight"])
    with pytest.raises(CheckpointError, match="no backbone under 'x'; it has"):
        load_backbone(path, prefix="x")
    words = [
        "weights",
        "convert",
        str(path),
        str(tmp_path / "cli"),
        "--to",
        "hf",
        "--prefix",
        first,
    ]
    assert exit_code_of(*words) == 0
    assert torch.equal(final_norm(tmp_path / "cli"), META["norm.weight"])


def test_open_weights__goes_by_what_is_in_a_file(tmp_path: Path) -> None:
    save_file(META, tmp_path / "named.pth")
    folder = folder_of(tmp_path / "folder")
    (folder / "model.safetensors").unlink()
    saved(folder / "pytorch_model.bin", random_weights(VIT))
    assert files_of_weights(folder) == [folder / "pytorch_model.bin"]
    assert inspect(folder).num_bytes == (folder / "pytorch_model.bin").stat().st_size
    for path in (tmp_path / "named.pth", folder):
        assert identify_layout(open_weights(path)).spec.width == VIT.width


def text(words: str, name: str = "of.pth") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(words)
        return folder / name

    return make


def of_names(*names: str) -> Callable[[Path], Path]:
    return lambda folder: saved(folder / "of.pth", {name: torch.zeros(2, 2) for name in names})


def changed(**tensors: Tensor | None) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        weights = {**META, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
        return saved(folder / "of.pth", {k: v for k, v in weights.items() if v is not None})

    return make


def in_folder(name: str, words: str | None) -> Callable[[Path], Path]:
    """A good folder in which one file is another, or gone."""

    def make(folder: Path) -> Path:
        folder_of(folder / "good")
        (folder / "good" / name).unlink(missing_ok=True)
        if words is not None:
            (folder / "good" / name).write_text(words)
        return folder / "good"

    return make


def folder_with(*names: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name in names:
            (folder / name).write_bytes(b"x")
        return folder

    return make


def sharded(*present: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder_of(folder / "good")
        (path / "model.safetensors").rename(path / "a.safetensors")
        index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        for name in present:
            (path / name).write_text(POINTER)
        return path

    return make


def zipped(*names: str, name: str = "of.pth") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / name, "w") as file:
            for member in names:
                file.writestr(member, "x")
        return folder / name

    return make


def gzipped(folder: Path) -> Path:
    (folder / "of.pth").write_bytes(gzip.compress(b"x"))
    return folder / "of.pth"


def tarred(folder: Path) -> Path:
    (folder / "x").write_text("x")
    with tarfile.open(folder / "of.pth", "w") as file:
        file.add(folder / "x", "x")
    return folder / "of.pth"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 86400000\n"
V2 = ("cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight", "blocks.0.ls1.gamma")
V2_HF = (
    "embeddings.cls_token",
    "embeddings.position_embeddings",
    "encoder.layer.0.layer_scale1.lambda1",
)
REFUSED: dict[str, tuple[Callable[[Path], Path], str, str]] = {  # kind: file, what it is, what to do
    "DINOv2": (of_names(*V2), "DINOv2: it has learned position embeddings", "DINOv3"),
    "DINOv2 in a wrapper": (of_names(*(f"teacher.backbone.{n}" for n in V2)), "DINOv2", "DINOv3"),
    "DINOv2 of transformers": (of_names(*V2_HF), "DINOv2", "DINOv3"),
    "a folder of DINOv2": (
        in_folder("config.json", '{"model_type": "dinov2"}'),
        "model_type = 'dinov2'.* learned position embeddings",
        "DINOv3",
    ),
    "a plain ViT": (of_names(*V2[:2], "blocks.0.norm1.weight"), "no register tokens", "DINOv3"),
    "no registers": (changed(storage_tokens=None), "a ViT with no register tokens", "DINOv3"),
    "ViT of torchvision": (
        of_names("class_token", "conv_proj.weight", "encoder.layers.encoder_layer_0.ln_1.weight"),
        "a ViT of torchvision",
        "DINOv3",
    ),
    "ConvNeXt of torchvision": (of_names("features.0.0.weight"), "of torchvision", "DINOv3"),
    "ResNet": (of_names("conv1.weight", "layer1.0.conv1.weight"), "a ResNet", "DINOv3"),
    "CLIP": (of_names("visual.class_embedding"), "a CLIP or SigLIP network", "DINOv3"),
    "language model": (of_names("model.embed_tokens.weight"), "a language model", "DINOv3"),
    "LoRA": (of_names("base.layer.0.q.lora_A.weight"), "a LoRA adapter", "merge_and_unload"),
    "folder of LoRA": (folder_with("adapter_model.safetensors"), "a LoRA adapter", "merge"),
    "optimizer": (of_names("state.0.exp_avg"), "the state of an optimizer", "weights"),
    "quantised": (of_names("layer.0.q_proj.qweight"), "a quantised network", "fp32"),
    "fp8": (
        changed(blocks__0__mlp__fc1__weight=torch.zeros(32, 16).to(torch.float8_e4m3fn)),
        "blocks.0.mlp.fc1.weight holds fp8 .* numbers",
        "fp32, fp16 or bf16",
    ),
    "integers": (
        changed(norm__weight=torch.zeros(16, dtype=torch.int8)),
        "norm.weight holds int8 numbers",
        "fp32, fp16 or bf16",
    ),
    "pointer": (text(POINTER), "a Git LFS pointer, not the file of 86.4 MB", "git lfs pull"),
    "pointer .safetensors": (text(POINTER, "a.safetensors"), "a Git LFS pointer", "git lfs pull"),
    "pointer in a folder": (in_folder("model.safetensors", POINTER), "Git LFS pointer", "pull"),
    "pointer as a config": (in_folder("config.json", POINTER), "config.json: a Git LFS", "pull"),
    "pointer as an index": (
        in_folder("model.safetensors.index.json", POINTER),
        "index.json: a Git LFS",
        "pull",
    ),
    "pointer as a shard": (sharded("b.safetensors"), "b.safetensors: a Git LFS pointer", "pull"),
    "missing shard": (sharded(), "1 of 2 shards are missing, first b.safetensors", "all shards"),
    "empty": (text(""), "an empty file", "completely"),
    "empty .safetensors": (text("", "a.safetensors"), "an empty file", "completely"),
    "web page": (text("<!DOCTYPE html><html>"), "a web page saved under this name", "licence"),
    "web page .safetensors": (text("\n<html>", "a.safetensors"), "a web page", "Download"),
    "error": (text('{"error": "gated"}'), "the error message of a server", "Download"),
    "GGUF": (text("GGUF\x03"), "a GGUF file", "Convert"),
    "ONNX": (text("\x08\x07", "a.onnx"), "an ONNX graph", "Convert"),
    "Flax": (text("\x81", "a.msgpack"), "Flax weights", "Convert"),
    "Keras": (text("x", "a.h5"), "a Keras file", "Convert"),
    "TensorFlow folder": (folder_with("saved_model.pb"), "a TensorFlow or Flax model", "Convert"),
    "TorchScript": (zipped("a/data.pkl", "a/constants.pkl"), "a TorchScript program", "state_dict"),
    "torch": (zipped("a/data.pkl", name="a.safetensors"), "of torch.save", "Rename it to .pth"),
    "zip": (zipped("weights.pth"), "a zip archive", "Unpack"),
    "NumPy": (zipped("a.npy"), "NumPy arrays", "Convert"),
    "picture": (text("GIF89a", "a.gif"), "not a file of weights", "Give a folder"),
    "gzip": (gzipped, "a gzip archive", "Unpack"),
    "tar": (tarred, "a tar archive", "Unpack"),
    "distributed": (folder_with("__0_0.distcp"), "a distributed checkpoint", "dcp_to_torch"),
    "a run": (folder_with("job.json"), "a run folder of distill", "students/NAME"),
    "folder of a file": (folder_with("a.pth"), "no model.safetensors, but a.pth", "file itself"),
    "folder of pictures": (folder_with("a.jpg", "b.JPG"), r"no weights in it \(2 .jpg\)", "DINOv3"),
    "empty folder": (folder_with(), r"no weights in it \(it is empty\)", "Hugging Face"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_load_backbone__refuses_with_what_it_is_and_what_to_do(kind: str, tmp_path: Path) -> None:
    make, what, fix = REFUSED[kind]
    path = make(tmp_path)
    with pytest.raises(CheckpointError, match=what) as caught:
        load_backbone(path)
    assert fix in caught.value.fix
    assert "\n" not in caught.value.message and str(tmp_path) in caught.value.message


def test_inspect__names_what_is_refused(tmp_path: Path) -> None:
    found = inspect(of_names(*V2)(tmp_path))
    assert found.what == "no backbone that can be used"
    assert "DINOv2" in found.notes[0] and "DINOv3" in found.notes[1]
    eight = torch.zeros(2, dtype=torch.float8_e4m3fn)
    assert is_finite(eight)
    found = inspect(changed(norm__weight=eight)(tmp_path), check_values=True)
    assert found.has_nan is False


def test_inspect__says_what_differs_from_the_published(tmp_path: Path) -> None:
    periods = 7.0 ** (torch.arange(2) / 2)
    notes = inspect(changed(rope_embed__periods=periods)(tmp_path)).notes
    assert "not as published: RoPE base 7" in notes


def test_identify__a_training_file_has_heads_in_its_wrapper(tmp_path: Path) -> None:
    training = {"teacher": {**under("backbone.", META), **heads()}, "student": under("a.", OTHER)}
    assert inspect(saved(tmp_path / "of.pth", training)).what == "training file: backbone and heads"


def test_zip__with_names_that_are_no_text_is_one_error(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data/é.pkl", b"x")
    file.write_bytes(file.read_bytes().replace("é".encode(), b"\xf0\x28"))
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        inspect(file, check_values=True)


def test_open_weights__a_zip_that_states_a_version_no_reader_has_is_one_line(
    tmp_path: Path,
) -> None:
    path = saved(tmp_path / "w.pth", META)
    data = bytearray(path.read_bytes())
    central = data.rindex(b"PK\x01\x02")
    data[central + 6 : central + 8] = (111).to_bytes(2, "little")  # version needed: 11.1
    path.write_bytes(data)
    with pytest.raises(NotImplementedError):
        zipfile.ZipFile(path)
    try:  # torch's reader may take it
        open_weights(path)
    except CheckpointError as error:
        assert "cannot be read" in error.message


@pytest.mark.parametrize("kind", [NotImplementedError, MemoryError, EOFError, OverflowError])
def test_reading__whatever_a_reader_raises_is_one_line(
    kind: type[Exception], tmp_path: Path
) -> None:
    with (
        pytest.raises(CheckpointError, match=r"f: cannot be read \(the first"),
        reading(tmp_path / "f"),
    ):
        raise kind("the first line\nand more")


REFUSALS = {
    "python": OSError(5, "Input/output error"),
    "safetensors": FileNotFoundError("No such file or directory: w"),
    "torch": RuntimeError("unable to open file <w> in read-only mode: Input/output error (5)"),
}


@pytest.mark.parametrize("reader", REFUSALS)
def test_read_again__what_storage_refuses_is_tried_again(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tries, lines = saved(tmp_path / "w.pth", META), list[int](), list[str]()
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.001)

    def attempt() -> Container:
        tries.append(1)
        with reading(path):
            if len(tries) < 3:
                raise REFUSALS[reader]
        return open_weights(path)

    found = read_again(storage.Storage(lines.append), path, attempt)
    assert len(tries) == 3 and found.shapes.keys() == META.keys()


def test_read_again__a_wrong_file_is_refused_at_once(tmp_path: Path) -> None:
    path, tries = tmp_path / "w.safetensors", list[int]()

    def attempt() -> Container:
        tries.append(1)
        return open_weights(path)

    for content in (None, b"{" * 600):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError):
            read_again(storage.Storage(), path, attempt)
    assert len(tries) == 2
