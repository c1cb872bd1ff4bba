"""Files of weights: what they are, and networks out of them.

    Hugging Face folder   config.json and model.safetensors, whole or in shards with an index
    .safetensors          tensors alone, in any of the three layouts
    .pth                  as released by Meta: a backbone, or a training file with teacher and heads

Tensors are read memory-mapped, one by one, straight into the target's dtype and device: loading
costs the network's own size and one tensor (``distill.weights.containers``).
"""

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import CheckpointError
from distill.weights.containers import SINGLE, Container, is_finite, open_weights, read_json
from distill.weights.heads import holds_heads
from distill.weights.identity import Identity, catalogue_name, identify
from distill.weights.layouts import Layout, Origin, origins
from distill.weights.save import write_tensors
from students.catalog import build_backbone, hf_config, spec_from_hf_config
from students.shapes import BackboneSpec, CustomSpec

CONFIG = "config.json"
CPU = torch.device("cpu")
# First eight hex digits of the sha256 of the released files, as in their names
RELEASED = {
    "08c60483": "vits16",
    "4057cbaa": "vits16plus",
    "73cec8be": "vitb16",
    "8aa4cbdd": "vitl16",
    "7c1da9a5": "vith16plus",
    "a955f4ea": "vit7b16",
    "21b726bb": "convnext_tiny",
    "296db49d": "convnext_small",
    "801f2ba9": "convnext_base",
    "61fa432d": "convnext_large",
    "eadcf0ff": "vitl16 (satellite)",
    "a6675841": "vit7b16 (satellite)",
}
TIMM_NAMES = {
    "vits16": "vit_small_patch16_dinov3_qkvb",
    "vits16plus": "vit_small_plus_patch16_dinov3_qkvb",
    "vitb16": "vit_base_patch16_dinov3_qkvb",
    "vitl16": "vit_large_patch16_dinov3_qkvb",
    "vith16plus": "vit_huge_plus_patch16_dinov3_qkvb",
    "vit7b16": "vit_7b_patch16_dinov3",
    "convnext_tiny": "convnext_tiny",
    "convnext_small": "convnext_small",
    "convnext_base": "convnext_base",
    "convnext_large": "convnext_large",
}


def _identify(container: Container, spec: BackboneSpec | None = None) -> Identity:
    """What is in it; a config.json beside it is believed where shapes cannot tell, and ``spec`` before that."""
    folder = container.path if container.path.is_dir() else container.path.parent
    config = folder / CONFIG
    is_folder = container.path.is_dir() or container.path.name == SINGLE
    try:
        if spec is not None:
            return identify(container.shapes, spec)
        if config.is_file():
            described = read_json(config)
            if isinstance(described, dict) and "model_type" in described:
                spec = spec_from_hf_config(described)
        elif is_folder:
            raise CheckpointError(
                f"{config}: missing", fix=f"Give a Hugging Face folder with {CONFIG}."
            )
        return identify(container.shapes, spec)
    except (ValueError, TypeError, OverflowError, AssertionError) as error:
        beside = "the config.json beside it" if config.is_file() else "its own shapes"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{container.path}: {reason}",
            fix=f"Judged by {beside}. Give weights and config of the same network.",
        ) from error


def shape_of(path: Path) -> BackboneSpec:
    """The shape of a backbone, from names and config alone.

    Raises:
        CheckpointError: as ``load_backbone``, as far as it can be told without reading tensors.
    """
    return _identify(open_weights(path)).spec


def load_backbone(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    spec: BackboneSpec | None = None,
) -> tuple[nn.Module, BackboneSpec]:
    """The network in a file or folder, in eval mode, and its shape.

    ``spec``: what the network is, where the caller knows. A custom network is loaded only then: the
    code that a file names is not run because a file names it.

    Raises:
        CheckpointError: it is damaged, is something else, does not fit its config, or holds numbers
            that are not finite; nothing is returned half-loaded.
    """
    container = open_weights(path)
    identity = _identify(container, spec)
    if isinstance(identity.spec, CustomSpec):
        backbone = build_backbone(identity.spec).to(device, dtype)
    else:
        with torch.device("meta"):
            backbone = build_backbone(identity.spec)
        backbone.to(dtype).to_empty(device=device)
    table = origins(identity.spec, identity.layout, "hf")
    with torch.no_grad():
        for name, target in backbone.state_dict().items():
            if name in table:  # not the norm that acts in training only
                target.copy_(_made(container, identity, table[name], name))
    for parameter in backbone.parameters():
        parameter.requires_grad_(True)
    return backbone.eval(), identity.spec


def _made(container: Container, identity: Identity, origin: Origin, name: str) -> Tensor:
    """One tensor of our layout, checked."""
    made: Tensor = origin.make(*(container.read(identity.prefix + part) for part in origin.sources))
    if not made.is_floating_point():
        raise CheckpointError(
            f"{container.path}: {name} holds {str(made.dtype).removeprefix('torch.')} numbers",
            fix="Give weights in fp32, fp16 or bf16.",
        )
    if not is_finite(made):
        raise CheckpointError(
            f"{container.path}: {name} holds numbers that are not finite",
            fix="Use a checkpoint from before the training went wrong.",
        )
    return made


@dataclass(frozen=True)
class Inspection:
    """What a file is, in words and numbers. ``has_nan`` is None where values were not read."""

    path: str
    what: str
    layout: str | None
    arch: str | None
    released: str | None
    parameters: int
    tensors: int
    num_bytes: int
    dtypes: tuple[str, ...]
    has_heads: bool
    has_nan: bool | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def inspect(path: Path, *, check_values: bool = False) -> Inspection:
    """Names what a file or folder is; reads values only when asked.

    Raises:
        CheckpointError: it cannot be read at all. A readable file of something else is described.
    """
    container = open_weights(path)
    identity: Identity | None = None
    notes: list[str] = []
    try:
        identity = _identify(container)
    except CheckpointError as error:
        notes.append(error.message.removeprefix(f"{container.path}: "))
    heads = holds_heads(container)
    if identity is None:
        what = "heads" if heads else "tensors of something else"
        notes = [] if heads else notes
    else:
        what = "training file: backbone and heads" if heads else "backbone"
        if not heads:
            notes.append("no heads: as a teacher it needs heads: fit or heads: none")
        if identity.ignored:
            notes.append(
                f"{len(identity.ignored)} tensors are not needed, first {identity.ignored[0]}"
            )
    has_nan = None
    if check_values:
        has_nan = any(
            tensor.is_floating_point() and not is_finite(tensor)
            for tensor in map(container.read, container.shapes)
        )
    known = [arch for digits, arch in RELEASED.items() if digits in path.name]
    return Inspection(
        path=str(path),
        what=what,
        layout=identity.layout if identity else None,
        arch=(identity.arch or "free size") if identity else None,
        released=known[0] if known else None,
        parameters=sum(math.prod(shape) for shape in container.shapes.values()),
        tensors=len(container.shapes),
        num_bytes=sum(file.stat().st_size for file in _files_of(path)),
        dtypes=tuple(sorted(set(container.dtypes.values()))),
        has_heads=heads,
        has_nan=has_nan,
        notes=tuple(notes),
    )


def _files_of(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def convert(source: Path, target: Path, *, layout: Layout, dtype: torch.dtype | None) -> Inspection:
    """Writes the backbone of ``source`` in another layout and dtype (None: as it is read, fp32).

    ``hf`` and ``timm`` write a folder, ``meta`` a ``.pth`` file; aside first, then renamed.

    Raises:
        CheckpointError: the source cannot be read, or the target exists.
    """
    if target.exists():
        raise CheckpointError(f"{target}: exists", fix="Choose another place, or remove it first.")
    backbone, spec = load_backbone(source, dtype=dtype or torch.float32)
    own = backbone.state_dict()
    tensors = {
        name: origin.make(*(own[part] for part in origin.sources)).detach().clone().contiguous()
        for name, origin in origins(spec, "hf", layout).items()
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.converting")
    _remove(aside)
    try:
        if layout == "meta":
            torch.save(tensors, aside)
        else:
            aside.mkdir()
            config = _config(spec, layout, dtype or torch.float32, source)
            (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            write_tensors(aside, tensors)
            beside = source if source.is_dir() else source.parent
            if layout == "hf" and (beside / "preprocessor_config.json").is_file():
                shutil.copyfile(
                    beside / "preprocessor_config.json", aside / "preprocessor_config.json"
                )
        aside.rename(target)
    finally:
        _remove(aside)
    return inspect(target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _config(spec: BackboneSpec, layout: Layout, dtype: torch.dtype, source: Path) -> dict[str, Any]:
    if layout == "hf":
        return {**hf_config(spec), "dtype": str(dtype).removeprefix("torch.")}
    arch = timm_architecture(spec)
    is_vit = arch.startswith("vit")
    beside = (source if source.is_dir() else source.parent) / "preprocessor_config.json"
    processor = read_json(beside) if beside.is_file() else {}
    mean = processor.get("image_mean", [0.485, 0.456, 0.406])  # ImageNet's
    std = processor.get("image_std", [0.229, 0.224, 0.225])
    return {
        "architecture": TIMM_NAMES[arch],
        "num_classes": 0,
        "num_features": spec.width,
        # without it the class token would be replaced by an average, silently
        **({"model_args": {"global_pool": "token"}} if is_vit else {}),
        "pretrained_cfg": {
            "input_size": [spec.in_channels, 256, 256],
            "mean": mean,
            "std": std,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "pool_size": None,
            "num_classes": 0,
            "first_conv": "patch_embed.proj" if is_vit else "stem.0",
            "classifier": "head" if is_vit else "head.fc",
            "license": "see README.md",
        },
    }


def timm_architecture(spec: BackboneSpec) -> str:
    """The catalogue name of a shape, for a library that knows networks by name.

    Raises:
        CheckpointError: it is a free size.
    """
    name = catalogue_name(spec)
    if name is None:
        raise CheckpointError(
            "a network of a free size has no name in timm",
            fix="Use --to hf or --to onnx, which take any size.",
        )
    return name
