"""Writes weights in another layout."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.errors import CheckpointError
from distill.export.save import write_tensors
from distill.runfolder.files import make_folder, replaced
from distill.weights.containers import open_weights
from distill.weights.custom_folders import factory_of
from distill.weights.hf_config import hf_config, preprocessor_config
from distill.weights.identity import catalogue_name
from distill.weights.inspect import Inspection, inspect
from distill.weights.layouts import Layout, origins
from distill.weights.load import CONFIG, identify_layout, load_backbone
from distill.weights.stated_inputs import PREPARATION, stated_inputs
from students.shapes import BackboneSpec

WITH_LOCAL_NORM = "vit7b16"  # the one that Meta's hub builds with a norm of local class tokens
USUAL_SIZE = 224  # pixels, of the published folders
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


def convert(
    source: Path,
    target: Path,
    *,
    layout: Layout,
    dtype: torch.dtype | None,
    prefix: str | None = None,
) -> Inspection:
    """Writes the backbone of ``source`` in another layout and dtype (None: as it is read, fp32).

    ``prefix``: before the names of the backbone that is meant, where the file holds several.

    ``hf`` and ``timm`` write a folder, ``meta`` a ``.pth`` file; aside first, then renamed.

    Raises:
        CheckpointError: the source cannot be read, has what the layout cannot hold, or the target exists.
    """
    if target.exists():
        raise CheckpointError(f"{target}: exists", fix="Choose another place, or remove it first.")
    if factory := factory_of(source):
        raise CheckpointError(
            f"{source}: a custom student, made by {factory}, has no {layout} form",
            fix="Use distill export --to onnx or --to factory.",
        )
    backbone, spec = load_backbone(source, dtype=dtype or torch.float32, prefix=prefix)
    _require_room(spec, layout)
    state = backbone.state_dict()
    tensors = {
        name: origin.make(*(state[part] for part in origin.sources)).detach().clone().contiguous()
        for name, origin in origins(spec, "hf", layout).items()
    }
    if layout == "meta":
        tensors |= _local_norm(source, prefix, spec, tensors)
    make_folder(target.parent)
    with replaced(target) as aside:
        if layout == "meta":
            torch.save(tensors, aside)
        else:
            aside.mkdir()
            config = _config(spec, layout, dtype or torch.float32, source)
            (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            write_tensors(aside, tensors)
            if layout == "hf":
                _write_preparation(source, aside)
    return inspect(target)


def _local_norm(
    source: Path, prefix: str | None, spec: BackboneSpec, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The norm of local class tokens, which Meta's 7B will not load without; the final norm stands for it where the source has none.

    It acts in training only.
    """
    if catalogue_name(spec) != WITH_LOCAL_NORM:
        return {}
    container = open_weights(source)
    identity, found = identify_layout(container, None, prefix), {}
    for kind in ("weight", "bias"):
        stored = identity.stored_name(f"local_cls_norm.{kind}")
        norm = tensors[f"norm.{kind}"]
        is_there = stored in container.shapes
        found[f"local_cls_norm.{kind}"] = (
            container.read(stored).to(norm.dtype) if is_there else norm
        ).clone()
    return found


def _require_room(spec: BackboneSpec, layout: Layout) -> None:
    """Refuses a network whose stages or norms are not those that the layout's code has: its files do not name them."""
    if layout == "meta" and "number of stages" in spec.unpublished:
        stages, published = spec.unpublished["number of stages"]
        raise CheckpointError(
            f"a ConvNeXt of {stages} stages: Meta's class has {published}",
            fix="Use --to hf or --to onnx, which take any number of stages.",
        )
    if layout != "hf" and "norm epsilon" in spec.unpublished:
        value, published = spec.unpublished["norm epsilon"]
        raise CheckpointError(
            f"a network with norm epsilon {value:g}: {layout} files hold none and stand for {published:g}",
            fix="Use --to hf or --to onnx.",
        )


def _write_preparation(source: Path, aside: Path) -> None:
    """What is stated beside the source about its images, if anything is."""
    beside = (source if source.is_dir() else source.parent) / PREPARATION
    stated = stated_inputs(source)
    if beside.is_file():
        shutil.copyfile(beside, aside / PREPARATION)
    elif stated.mean is not None and stated.std is not None:
        config = preprocessor_config(stated.size or USUAL_SIZE, stated.mean, stated.std)
        (aside / PREPARATION).write_text(json.dumps(config, indent=2) + "\n")


def _config(spec: BackboneSpec, layout: Layout, dtype: torch.dtype, source: Path) -> dict[str, Any]:
    if layout == "hf":
        return {**hf_config(spec), "dtype": str(dtype).removeprefix("torch.")}
    arch = timm_architecture(spec)
    is_vit = arch.startswith("vit")
    stated = stated_inputs(source)
    return {
        "architecture": TIMM_NAMES[arch],
        "num_classes": 0,
        "num_features": spec.width,
        # without it the class token would be replaced by an average, silently
        **({"model_args": {"global_pool": "token"}} if is_vit else {}),
        "pretrained_cfg": {
            "input_size": [spec.in_channels, 256, 256],
            "mean": list(stated.mean or (0.485, 0.456, 0.406)),  # ImageNet's
            "std": list(stated.std or (0.229, 0.224, 0.225)),
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
            fix="Use --to hf or --to onnx, which take any size, RoPE base and key bias.",
        )
    return name
