"""Files of DINO and iBOT heads: heads alone, or a training file that holds them beside the backbone."""

from pathlib import Path

import torch

from distill.errors import CheckpointError
from distill.runfolder.status import TRAINED_HEADS
from distill.weights.containers import Container, is_finite, open_weights
from distill.weights.identity import FIRST, NO_WEIGHTS, words_of
from teacher.heads import Head
from teacher.shapes import HeadShape

LARGEST_HEAD = 2**20  # rows or columns of a head's matrices; more is not a head
_HEADS = ("dino_head", "ibot_head")
PROTOTYPES = "prototypes.weight"


def _head_names(container: Container) -> dict[str, dict[str, str]]:
    """For each head, our name of every tensor and its name in the file; only complete heads."""
    needed = [f"mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")]
    found = {}
    for head in _HEADS:
        names = {name: stored_name(container, f"{head}.{name}") for name in (*needed, PROTOTYPES)}
        names_of = {name: stored for name, stored in names.items() if stored is not None}
        if names_of.keys() == names.keys():
            found[head] = names_of
    return found


def stored_name(container: Container, name: str) -> str | None:
    """The name in a file of a tensor outside the backbone; the teacher's or an average's first, never a student's or an optimizer's."""
    ends = (name, name.replace(PROTOTYPES, "last_layer.weight"))
    found = [
        (words_of(stored.removesuffix(end)), stored)
        for stored in container.shapes
        for end in dict.fromkeys(ends)
        if stored.endswith(end) and stored.removesuffix(end)[-1:] in ("", ".", "/")
    ]
    usable = [each for each in found if not each[0] & NO_WEIGHTS]
    return min(usable, key=lambda each: not each[0] & FIRST)[1] if usable else None


def heads_beside(weights: Path) -> Path:
    """The file in which the heads of a network should be: its training file, or ``heads.safetensors`` beside the weights."""
    if weights.is_file() and has_heads(weights):
        return weights
    return (weights if weights.is_dir() else weights.parent) / TRAINED_HEADS


def has_heads(path: Path) -> bool:
    """Both heads are in the file, by names alone."""
    return path.exists() and holds_heads(open_weights(path))


def holds_heads(container: Container) -> bool:
    """Both heads are in an open file."""
    return len(_head_names(container)) == len(_HEADS)


def head_shapes_of(path: Path, width: int) -> tuple[HeadShape, HeadShape]:
    """Shapes of the DINO and iBOT heads in a file.

    Raises:
        CheckpointError: they are missing, or belong to a teacher of another width.
    """
    return _head_shapes(_open_heads(path), width)


def _open_heads(path: Path) -> Container:
    if not path.is_file():
        raise CheckpointError(
            f"teacher.heads = {path}: no such file",
            fix="Name the heads.safetensors of this teacher, or write `heads: fit` or `heads: none`.",
        )
    return open_weights(path)


def _head_shapes(container: Container, width: int) -> tuple[HeadShape, HeadShape]:
    names, shapes = _head_names(container), container.shapes
    both = []
    for head in _HEADS:
        if head not in names:
            raise CheckpointError(
                f"{container.path}: no complete {head} in it",
                fix="Use a heads file written by distill, or a training file with both heads.",
            )
        names_of = names[head]
        shape = HeadShape(
            width=shapes[names_of["mlp.0.weight"]][1],
            hidden=shapes[names_of["mlp.0.weight"]][0],
            bottleneck=shapes[names_of["mlp.4.weight"]][0],
            prototypes=shapes[names_of["prototypes.weight"]][0],
        )
        if shape.width != width:
            raise CheckpointError(
                f"{container.path}: heads for a teacher of width {shape.width}, this teacher has width {width}",
                fix="Use the heads that were trained with this teacher.",
            )
        with torch.device("meta"):
            expected = {k: tuple(v.shape) for k, v in Head(shape).state_dict().items()}
        wrong = [key for key, each in expected.items() if shapes[names_of[key]] != each]
        if wrong or max(shape.hidden, shape.prototypes) > LARGEST_HEAD:
            raise CheckpointError(
                f"{container.path}: {head} does not fit together, first {(wrong or ['its size'])[0]}",
                fix="Check that the file was copied completely.",
            )
        both.append(shape)
    return both[0], both[1]


def load_heads(path: Path, width: int) -> tuple[Head, Head]:
    """The DINO and iBOT heads of a teacher of ``width``, fp32 on the CPU; shapes come from the file.

    Raises:
        CheckpointError: the file is missing or damaged, has no heads, or heads of another width.
    """
    container = _open_heads(path)
    shapes, names = _head_shapes(container, width), _head_names(container)
    heads = []
    for name, shape in zip(_HEADS, shapes, strict=True):
        head = Head(shape)
        with torch.no_grad():
            for key, target in head.state_dict().items():
                tensor = container.read(names[name][key])
                if not tensor.is_floating_point() or not is_finite(tensor):
                    raise CheckpointError(
                        f"{path}: {name}.{key} holds numbers that are not finite or not floating point",
                        fix="Use another heads file.",
                    )
                target.copy_(tensor)
        heads.append(head)
    return heads[0], heads[1]
