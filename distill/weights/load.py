"""Files of weights: what they are, and networks out of them.

    Hugging Face folder   config.json and model.safetensors, in one file or in shards with an index
    .safetensors          tensors alone, in any of the three layouts
    .pth                  as released by Meta: a backbone, or a training file with teacher and heads

Tensors are read memory-mapped, one by one, straight into the target's dtype and device: loading
costs the network's size and one tensor (``distill.weights.containers``).
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.errors import CheckpointError
from distill.weights.containers import (
    PICKLED,
    SINGLE,
    Container,
    is_finite,
    open_weights,
    read_json,
)
from distill.weights.custom_folders import custom_spec
from distill.weights.hf_config import spec_from_hf_config
from distill.weights.identity import Identity, identify
from distill.weights.layouts import Origin, origins
from distill.weights.stored_values import masked, with_stored_values
from distill.weights.timm_config import TimmArgs, read_timm_args
from students.batch_norm import NUM_TRACKED
from students.foreign import ForeignError
from students.shapes import BackboneSpec
from students.student import build_empty

CONFIG = "config.json"
FLOATS = frozenset(
    {"f64", "f32", "f16", "bf16", "float64", "float32", "float16", "bfloat16"}
)  # as safetensors and torch write them
CPU = torch.device("cpu")


def identify_layout(
    container: Container, spec: BackboneSpec | None = None, prefix: str | None = None
) -> Identity:
    """What is in it; a config.json beside it is believed where shapes are ambiguous, and ``spec`` before that.

    ``prefix``: before the names of the backbone that is meant, where there are several. A few small tensors
    are read (``distill.weights.stored_values``).

    Raises:
        CheckpointError: it is something else, or does not fit its config.
    """
    folder = container.path if container.path.is_dir() else container.path.parent
    config = folder / CONFIG
    is_folder = container.path.is_dir() or container.path.name in (SINGLE, PICKLED)
    try:
        if spec is not None:
            return identify(container.shapes, spec, prefix)
        described = read_json(config) if config.is_file() else None
        if isinstance(described, dict) and "model_type" in described:
            spec = spec_from_hf_config(described)
        elif described is None and is_folder:
            raise CheckpointError(
                f"{config}: missing", fix=f"Give a Hugging Face folder with {CONFIG}."
            )
        is_timm = isinstance(described, dict) and "architecture" in described and spec is None
        args = read_timm_args(described or {}) if is_timm else TimmArgs()
        identity = identify(container.shapes, spec, prefix, args.heads)
        _require_floats(container, identity)
        base = args.rope_base if is_timm else None
        return with_stored_values(container, identity, base, has_base=spec is not None or is_timm)
    except ForeignError as error:
        raise CheckpointError(f"{container.path}: {error}", fix=error.fix) from error
    except (ValueError, TypeError, OverflowError, AssertionError) as error:
        beside = "the config.json beside it" if config.is_file() else "its names and shapes"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{container.path}: {reason}",
            fix=f"Judged by {beside}. Give weights and config of the same network.",
        ) from error


def _require_floats(container: Container, identity: Identity) -> None:
    """Refuses numbers that are not plain floating point, before any is read.

    Raises:
        ForeignError: a tensor of the backbone holds others.
    """
    wanted = {
        name
        for origin in origins(identity.spec, identity.layout, "hf").values()
        for name in origin.sources
    }
    odd = {
        name: container.dtypes[stored]
        for name in sorted(wanted)
        if (stored := identity.stored_name(name)) in container.dtypes
        and container.dtypes[stored] not in FLOATS
        and not name.endswith(NUM_TRACKED)
    }
    if odd:
        name, dtype = next(iter(odd.items()))
        shown = re.sub(r"^i(?=\d)", "int", re.sub(r"^(f8|float8)_", "fp8 ", dtype))
        raise ForeignError(
            f"{name} holds {shown} numbers ({len(odd)} of {len(wanted)} tensors)",
            "Give weights in fp32, fp16 or bf16; fp8 and integers mean something only with their scales.",
        )


def shape_of(path: Path) -> BackboneSpec:
    """The shape of a backbone, from names, config and a few small tensors, or from the factory of a custom student.

    Raises:
        RecipeError: as ``load_backbone``.
        CheckpointError: as ``load_backbone``, as far as it shows without reading the others.
    """
    container = open_weights(path)
    return identify_layout(container, custom_spec(path)).spec


def stated_shape(path: Path) -> BackboneSpec:
    """As ``shape_of``, and runs nothing: a custom student is a CheckpointError."""
    return identify_layout(open_weights(path)).spec


def load_backbone(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    spec: BackboneSpec | None = None,
    prefix: str | None = None,
) -> tuple[nn.Module, BackboneSpec]:
    """The network in a file or folder, in eval mode, and its shape.

    ``spec``: what the network is, where the caller knows. The factory of a custom student is run without it only
    where it may (``distill.weights.custom_folders``). ``prefix``: as ``identify_layout``.

    Raises:
        RecipeError: the factory of a custom student is not allowed to run.
        CheckpointError: it is damaged, is something else, does not fit its config, or holds numbers
            that are not finite; nothing is returned half-loaded.
    """
    container = open_weights(path)
    identity = identify_layout(container, spec or custom_spec(path), prefix)
    backbone = build_empty(identity.spec.build, device, dtype)
    copy_backbone(container, identity, backbone, lambda _, tensor: tensor)
    for parameter in backbone.parameters():
        parameter.requires_grad_(True)
    return backbone.eval(), identity.spec


@torch.no_grad()
def copy_backbone(
    container: Container,
    identity: Identity,
    backbone: nn.Module,
    change: Callable[[str, Tensor], Tensor],
) -> None:
    """Writes a file's backbone into a network, tensor by tensor, each through ``change`` with its name here.

    Raises:
        CheckpointError: as ``load_backbone``.
    """
    table = origins(identity.spec, identity.layout, "hf")
    for name, target in backbone.state_dict().items():
        if name in table:  # not the norm that acts in training only
            target.copy_(change(name, read_parameter(container, identity, table[name], name)))


def read_parameter(container: Container, identity: Identity, origin: Origin, name: str) -> Tensor:
    """One tensor of our layout, checked."""
    made: Tensor = origin.make(*(masked(container, identity, part) for part in origin.sources))
    if not made.is_floating_point() and not name.endswith(NUM_TRACKED):
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
