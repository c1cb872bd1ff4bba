"""Weights that a network starts from: found, compared with the network from headers alone, copied into it.

The backbone must be of the network's shape. Two differences can be adapted where ``init.adapt`` is true:

    patch size       the patch embedding is resampled bicubically, and multiplied by (old side / new side)^2, so that
                     an even patch gives the token that it gave before
    input channels   each has the mean over the file's channels, times their number over the new number

Heads and projectors are taken tensor by tensor where the file holds all of one in the shape that it has here.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.errors import CheckpointError
from distill.runfolder.manifest import checkpoints
from distill.runfolder.status import TEACHER
from distill.runfolder.tensor_file import SUFFIX
from distill.weights.containers import Container, is_finite, open_weights
from distill.weights.heads import heads_beside, stored_name
from distill.weights.identity import Identity
from distill.weights.load import copy_backbone, identify_layout
from students.shapes import BackboneSpec
from students.student import build_empty
from teacher.heads import Head
from teacher.shapes import HeadShape

IN_TRAINING = {
    "layerscale_init",
    "untie_local_norm",
}  # of a spec: no tensor of a file differs by it
ADAPTED = ("patch", "in_channels")
STATED = ("norm_eps", "key_bias")  # keys of a recipe's network by the same names
LOCAL_NORM, NORM = "local_cls_norm.", "norm."
PATCH_EMBEDDING = (
    "embeddings.patch_embeddings.weight",
    "stages.0.downsample_layers.0.weight",
)
CPU = torch.device("cpu")
NO_HEADS, BESIDE = "none", "beside"  # of `init.heads`
Shapes = Mapping[str, tuple[int, ...]]


@runtime_checkable
class InitKeys(Protocol):
    """What a recipe has under ``init``, as far as it decides which tensors are read."""

    @property
    def from_(self) -> str:
        """A folder, a file, or ``RUN:NAME``."""

    @property
    def heads(self) -> str | None:
        """A file, ``NO_HEADS`` or ``BESIDE``; None for those that are there and fit."""

    @property
    def adapt(self) -> bool:
        """Whether the patch embedding may be changed."""


@dataclass(frozen=True)
class InitialFiles:
    """Where the weights are: of the backbone, and of heads or projectors (None: in no file)."""

    weights: Path
    parts: Path | None


@dataclass(frozen=True)
class Taken:
    """Which heads and projectors come from the file, and why the others are fresh."""

    parts: tuple[str, ...]
    fresh: Mapping[str, str]

    def describe(self) -> str:
        """In one clause."""
        taken = ", ".join(("backbone", *self.parts))
        fresh = "".join(f"; fresh {name} ({why})" for name, why in self.fresh.items())
        return f"{taken}{fresh}"


def init_key(name: str) -> str:
    """The key in messages: of a student by its name, or of the network of pretraining."""
    return "model.init" if name == TEACHER else f"students.{name}.init"


def find_initial(key: str, init: InitKeys) -> InitialFiles:
    """The files that an ``init`` means; ``key`` is its name in messages.

    Raises:
        CheckpointError: there is no such file, folder or network of a run.
    """
    path = Path(init.from_)
    run, colon, name = init.from_.rpartition(":")
    is_of_run = not path.exists() and colon and (Path(run) / "job.json").is_file()
    if (path / "job.json").is_file():
        _refuse(f"{key} = {path}: is a run", f"Write {path}:NAME, {_networks(path)}.")
    if not path.exists() and not is_of_run:
        _refuse(f"{key} = {path}: no such file or folder, nor RUN:NAME", "Check the path.")
    if not is_of_run:
        return InitialFiles(path, _parts_of(key, init, path))
    folder = Path(run)
    weights = folder / TEACHER if name == TEACHER else folder / "students" / name
    if not weights.is_dir():
        _refuse(
            f"{key} = {init.from_}: no finished network {name!r}", f"It has {_networks(folder)}."
        )
    saved = [
        path / f"{name}{SUFFIX}"
        for path, manifest in checkpoints(folder / "checkpoints")
        if f"{name}{SUFFIX}" in manifest.files
    ]
    beside = saved[0] if saved and name != TEACHER else None
    return InitialFiles(weights, _parts_of(key, init, weights, beside))


def _networks(run: Path) -> str:
    """The finished networks of a run, for people."""
    found = [path.parent.name for path in sorted(run.glob("students/*/config.json"))]
    found = ([TEACHER] if (run / TEACHER).is_dir() else []) + found
    return f"NAME one of {', '.join(found)}" if found else "no finished network"


def _parts_of(key: str, init: InitKeys, weights: Path, beside: Path | None = None) -> Path | None:
    """The file of heads or projectors."""
    if init.heads == NO_HEADS:
        return None
    if init.heads not in (None, BESIDE):
        path = Path(str(init.heads))
        if not path.is_file():
            _refuse(
                f"{key}.heads = {path}: no such file", f"Give a file, {BESIDE!r} or {NO_HEADS!r}."
            )
        return path
    path = beside or heads_beside(weights)
    if path.is_file():
        return path
    if init.heads == BESIDE:
        _refuse(f"{key}.heads = {BESIDE}: no {path}", "Remove the key, and fresh heads are made.")
    return None


def check_initial(key: str, init: InitKeys, spec: BackboneSpec, parts: Shapes) -> Taken:
    """Compares files with a network from names and shapes alone; ``parts``: shapes of its heads or projectors.

    Raises:
        CheckpointError: a file is missing or damaged, the backbone is another, or heads that were named do not fit.
    """
    found = find_initial(key, init)
    _identify(key, init, spec, found.weights)
    if found.parts is None:
        reason = "heads: none" if init.heads == NO_HEADS else "the source has none"
        return Taken((), dict.fromkeys(_groups(parts), reason))
    container, fresh = open_weights(found.parts), dict[str, str]()
    for group, names in _groups(parts).items():
        for name in names:
            stored = stored_name(container, name)
            shape = None if stored is None else container.shapes[stored]
            if shape != parts[name]:
                wrong = f"{name} has shape {list(shape or ())} there, {list(parts[name])} here"
                fresh.setdefault(group, "the source has none" if shape is None else wrong)
    if fresh and init.heads is not None:
        group, why = next(iter(fresh.items()))
        _refuse(
            f"{key}.heads = {init.heads}: {found.parts} does not fit, {group}: {why}",
            "Make the heads of the recipe alike, or remove the key, and fresh heads are made.",
        )
    return Taken(tuple(group for group in _groups(parts) if group not in fresh), fresh)


def head_parts(shapes: tuple[HeadShape, HeadShape]) -> Shapes:
    """Shapes of the tensors of a DINO and an iBOT head, by their names in a task."""
    names = ("dino_head", "ibot_head")
    return _shapes({name: partial(Head, shape) for name, shape in zip(names, shapes, strict=True)})


def projector_parts(width: int, teacher_dim: int) -> Shapes:
    """Shapes of the tensors of both projectors, by their names in a task."""
    make = partial(nn.Linear, width, teacher_dim)
    return _shapes({"class_projector": make, "patch_projector": make})


def _shapes(modules: Mapping[str, Callable[[], nn.Module]]) -> Shapes:
    """Shapes of all tensors by name; nothing is allocated."""
    with torch.device("meta"):
        return {
            f"{name}.{key}": tuple(tensor.shape)
            for name, make in modules.items()
            for key, tensor in make().state_dict().items()
        }


def _groups(parts: Shapes) -> dict[str, list[str]]:
    """Names of tensors by head or projector."""
    groups: dict[str, list[str]] = {}
    for name in parts:
        groups.setdefault(name.split(".")[0], []).append(name)
    return groups


def _identify(
    key: str, init: InitKeys, spec: BackboneSpec, weights: Path
) -> tuple[Container, Identity]:
    container = open_weights(weights)
    identity = identify_layout(container, spec if spec.probe_call else None)
    theirs, ours = _sizes(identity.spec), _sizes(spec)
    differ = [name for name in ours if theirs.get(name) != ours[name]]
    if type(identity.spec) is type(spec) and init.adapt:
        differ = [name for name in differ if name not in ADAPTED]
    if not differ:
        return container, identity
    fix = "Give the network of the recipe the shape of the weights."
    if set(differ) <= set(STATED):
        keys = ", ".join(f"{name}: {json.dumps(theirs[name])}" for name in differ)
        fix = f"Write {keys} for the network of the recipe."
    elif set(differ) <= set(ADAPTED):
        fix = f"Write the same in the recipe, or {key}.adapt=true to adapt the patch embedding."
    there, here = (_describe(each, differ) for each in (identity.spec, spec))
    raise CheckpointError(f"{key} = {weights}: {there} there, {here} in the recipe", fix=fix)


def _sizes(spec: BackboneSpec) -> dict[str, object]:
    sizes = {name: value for name, value in vars(spec).items() if name not in IN_TRAINING}
    return {"kind": type(spec).__name__, **sizes}


def _describe(spec: BackboneSpec, names: list[str]) -> str:
    """``ViT of width 64, heads 2``: the sizes in which two networks differ, or their kinds."""
    kind = type(spec).__name__.removesuffix("Spec")
    if "kind" in names:
        return f"{kind} of width {spec.width}"
    return f"{kind} of {', '.join(f'{name} {getattr(spec, name)}' for name in names)}"


def load_initial(key: str, init: InitKeys, spec: BackboneSpec, network: nn.Module) -> None:
    """Copies the weights into a task: its ``backbone``, and of its heads or projectors those that fit. No communication: each rank reads.

    Raises:
        CheckpointError: as ``check_initial``, or a tensor holds numbers that are not finite.
    """
    found = find_initial(key, init)
    backbone = network.get_submodule("backbone")
    load_initial_backbone(key, init, spec, backbone)
    others = {k: v for k, v in network.state_dict().items() if not k.startswith("backbone.")}
    shapes = {name: tuple(tensor.shape) for name, tensor in others.items()}
    taken = check_initial(key, init, spec, shapes)
    if found.parts is None:
        return
    container = open_weights(found.parts)
    with torch.no_grad():
        for name, target in others.items():
            if name.split(".")[0] not in taken.parts:
                continue
            stored = stored_name(container, name)
            assert stored is not None, "compared"
            tensor = container.read(stored)
            if not tensor.is_floating_point() or not is_finite(tensor):
                _refuse(
                    f"{found.parts}: {stored} holds numbers that are not finite or not floating point",
                    "Use another file of heads.",
                )
            target.copy_(tensor)


def load_initial_backbone(
    key: str, init: InitKeys, spec: BackboneSpec, backbone: nn.Module
) -> None:
    """Copies the backbone alone, adapted where that is wanted; the norm of local crops starts as the final norm.

    Raises:
        CheckpointError: as ``check_initial``.
    """
    container, identity = _identify(key, init, spec, find_initial(key, init).weights)
    shapes = {name: tensor.shape for name, tensor in backbone.state_dict().items()}

    def change(name: str, tensor: Tensor) -> Tensor:
        return adapted(tensor, shapes[name]) if name in PATCH_EMBEDDING else tensor

    copy_backbone(container, identity, backbone, change)
    tensors = backbone.state_dict()
    if spec.untie_local_norm:
        with torch.no_grad():
            for name in [name for name in tensors if name.startswith(LOCAL_NORM)]:
                tensors[name].copy_(tensors[name.replace(LOCAL_NORM, NORM)])


def initial_backbone(key: str, init: InitKeys, spec: BackboneSpec) -> dict[str, Tensor]:
    """The weights of the backbone by name, fp32 on the CPU: what a Gram anchor starts from.

    Raises:
        CheckpointError: as ``check_initial``.
    """
    backbone = build_empty(spec.build, CPU)
    load_initial_backbone(key, init, spec, backbone)
    return backbone.state_dict()


def adapted(kernel: Tensor, shape: torch.Size) -> Tensor:
    """A patch embedding [width, channels, side, side] for other channels and another side, by the rules above."""
    if kernel.shape[1] != shape[1]:
        kernel = kernel.mean(1, keepdim=True) * (kernel.shape[1] / shape[1])
        kernel = kernel.expand(-1, shape[1], -1, -1)
    if kernel.shape[2:] == shape[2:]:
        return kernel
    scale = kernel.shape[2] * kernel.shape[3] / (shape[2] * shape[3])
    size = (shape[2], shape[3])
    resampled = F.interpolate(
        kernel.float(), size, mode="bicubic", align_corners=False, antialias=True
    )
    return resampled * scale


def _refuse(text: str, fix: str) -> NoReturn:
    raise CheckpointError(text, fix=fix)
