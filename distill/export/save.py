"""Networks as Hugging Face folders, and heads as one safetensors file beside a teacher.

Our parameters carry the published flat names, so a folder is the state dict and a config; nothing
is translated.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.export.card import Background, Inputs, folder_form, model_card
from distill.export.licences import CARD, CONFIG, RECORD, Licences, write_licences
from distill.runfolder.files import make_folder, replace_text, replaced
from distill.weights.hf_config import hf_config, preprocessor_config
from students.shapes import BackboneSpec

LOCAL_NORM_PREFIX = (
    "local_cls_norm."  # used on local crops in training only; no other library knows it
)


SHARD_BYTES = 5 * 10**9  # of one file, as Hugging Face does


@dataclass(frozen=True)
class ExportFacts:
    """What a folder holds about its network besides the weights: input size, normalisation, where it comes from, its licences."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    provenance: dict[str, Any]
    licences: Licences = field(default_factory=Licences)
    scores: Mapping[str, Any] = field(default_factory=dict)  # as in ``summary.json``


def write_backbone(
    folder: Path, weights: Mapping[str, Tensor], spec: BackboneSpec, facts: ExportFacts
) -> None:
    """Writes config, weights (fp32), preprocessor, licences, model card and ``distill.json``; the weights last; each is complete or as it was."""
    make_folder(folder)
    contiguous = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in weights.items()
        if not name.startswith(LOCAL_NORM_PREFIX)
    }
    _write_json(folder / CONFIG, hf_config(spec))
    _write_json(
        folder / "preprocessor_config.json", preprocessor_config(facts.size, facts.mean, facts.std)
    )
    write_licences(folder, facts.licences)
    record = {**facts.provenance, "licences": facts.licences.to_json()}
    _write_json(folder / RECORD, record)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in contiguous.values())
    inputs, background = (
        Inputs(facts.size, facts.mean, facts.std),
        Background(record, facts.licences, facts.scores),
    )
    form = folder_form(folder.name, spec, num_bytes)
    replace_text(folder / CARD, model_card(folder.name, spec, inputs, background, form))
    write_tensors(folder, contiguous)


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes ``model.safetensors``, or shards of at most ``shard_bytes`` and their index; each is complete or as it was."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    count = len(shards)
    files = [
        "model.safetensors" if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
        for i in range(count)
    ]
    for file, shard in zip(files, shards, strict=True):
        with replaced(folder / file) as aside:
            save_file(shard, aside, {"format": "pt"})
    if count > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


def write_heads(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes ``dino_head.*`` and ``ibot_head.*``, fp32, as one safetensors file."""
    make_folder(path.parent)
    contiguous = {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in weights.items()
        if "_head." in name
    }
    with replaced(path) as aside:
        save_file(contiguous, aside, {"format": "pt"})


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Sixteen hex digits that identify a set of weights: sha256 over names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(
            weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    replace_text(path, json.dumps(value, indent=2) + "\n")
