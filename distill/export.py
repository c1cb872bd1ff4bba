"""Networks as Hugging Face folders, and heads as one safetensors file beside a teacher.

Our parameters carry the published flat names, so a folder is the state dict and a config; nothing
is translated.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.errors import CheckpointError
from students.catalog import (
    BackboneSpec,
    build_backbone,
    hf_config,
    preprocessor_config,
    spec_from_hf_config,
)
from teacher.heads import Head, HeadShape

LOCAL_NORM_PREFIX = (
    "local_cls_norm."  # used on local crops in training only; no other library knows it
)


@dataclass(frozen=True)
class ExportFacts:
    """What a folder says about its network besides the weights: input size, normalisation, where it comes from."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    provenance: dict[str, Any]


def write_backbone(
    folder: Path, weights: Mapping[str, Tensor], spec: BackboneSpec, facts: ExportFacts
) -> None:
    """Writes config, weights (fp32), preprocessor, model card and ``distill.json``; the weights last, in one rename."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in weights.items()
        if not name.startswith(LOCAL_NORM_PREFIX)
    }
    _write_json(folder / "config.json", hf_config(spec))
    _write_json(
        folder / "preprocessor_config.json", preprocessor_config(facts.size, facts.mean, facts.std)
    )
    _write_json(folder / "distill.json", facts.provenance)
    (folder / "README.md").write_text(_card(folder.name, kept, facts))
    aside = folder / ".model.safetensors.part"
    save_file(kept, aside, {"format": "pt"})
    aside.rename(folder / "model.safetensors")


def read_backbone(folder: Path) -> tuple[nn.Module, BackboneSpec]:
    """The network of a Hugging Face folder, fp32 on the CPU, in eval mode, and its shape.

    Raises:
        CheckpointError: files are missing, or keys or shapes do not fit the config.
    """
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise CheckpointError(
                f"{path}: missing", fix=f"Give a Hugging Face folder with {path.name}."
            )
    try:
        spec = spec_from_hf_config(json.loads(config_path.read_text()))
        weights = load_file(weights_path)
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{folder}: {error}", fix="Check that the folder was copied whole."
        ) from error
    except Exception as error:  # safetensors raises its own type for a damaged file
        raise CheckpointError(
            f"{weights_path}: {error}", fix="Check that the file was copied whole."
        ) from error
    backbone = build_backbone(spec)
    expected = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    wrong = sorted(
        name
        for name in expected.keys() | weights.keys()
        if _shape(weights, name) != expected.get(name)
    )
    if wrong:
        raise CheckpointError(
            f"{weights_path}: {len(wrong)} tensors do not fit config.json, first {wrong[0]}: "
            f"file {_shape(weights, wrong[0])}, config {expected.get(wrong[0])}",
            fix="Use the config.json that belongs to these weights.",
        )
    backbone.load_state_dict(weights)
    return backbone.eval(), spec


def _shape(weights: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None


def write_heads(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes ``dino_head.*`` and ``ibot_head.*``, fp32, as one safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in weights.items()
        if "_head." in name
    }
    aside = path.with_name(f".{path.name}.part")
    save_file(kept, aside, {"format": "pt"})
    aside.rename(path)


def read_heads(path: Path, width: int) -> tuple[Head, Head]:
    """The DINO and iBOT heads of a teacher of ``width``; shapes come from the file.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to a teacher of another width.
    """
    if not path.is_file():
        raise CheckpointError(
            f"teacher.heads = {path}: no such file",
            fix="Name the heads.safetensors of this teacher.",
        )
    try:
        weights = load_file(path)
    except Exception as error:  # safetensors raises its own type for a damaged file
        raise CheckpointError(
            f"{path}: {error}", fix="Check that the file was copied whole."
        ) from error
    return _head(weights, "dino_head.", path, width), _head(weights, "ibot_head.", path, width)


def _head(weights: Mapping[str, Tensor], prefix: str, path: Path, width: int) -> Head:
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }
    needed = ("mlp.0.weight", "mlp.4.weight", "prototypes.weight")
    if any(name not in own for name in needed):
        raise CheckpointError(
            f"{path}: no complete {prefix.rstrip('.')} in it",
            fix="Use a heads file written by distill.",
        )
    shape = HeadShape(
        width=own["mlp.0.weight"].shape[1],
        hidden=own["mlp.0.weight"].shape[0],
        bottleneck=own["mlp.4.weight"].shape[0],
        prototypes=own["prototypes.weight"].shape[0],
    )
    if shape.width != width:
        raise CheckpointError(
            f"{path}: heads for a teacher of width {shape.width}, this teacher has width {width}",
            fix="Use the heads that were trained with this teacher.",
        )
    head = Head(shape)
    head.load_state_dict(own)
    return head


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Sixteen hex digits that identify a set of weights: sha256 over names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(
            weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _card(name: str, weights: Mapping[str, Tensor], facts: ExportFacts) -> str:
    millions = sum(tensor.numel() for tensor in weights.values()) / 1e6
    lines = [f"- {key.replace('_', ' ')}: {value}" for key, value in facts.provenance.items()]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: image-feature-extraction",
            "---",
            "",
            f"# {name}",
            "",
            f"Vision backbone with {millions:.2f} M parameters, trained by self-distillation; EMA weights in fp32.",
            "",
            "```python",
            "from transformers import AutoModel",
            f'backbone = AutoModel.from_pretrained("{name}")',
            "```",
            "",
            *lines,
            "",
        ]
    )
