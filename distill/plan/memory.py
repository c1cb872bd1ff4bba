"""What a plan needs: GiB per rank by part, and bytes per rank and step on the wire. From shapes alone.

Weights, optimizer state and EMA are exact; gradients were measured on DeepSpeed's engines of one and two ranks.
Activations and logits are within 10% of what autograd keeps, by tracing; all in bf16. Other parts are estimates: ``FIXED_GIB``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.plan.flops import CropShapes, Heads
from distill.plan.plan import Plan, run_lengths
from distill.plan.traffic import WireShape, gathered_bytes, slice_bytes
from students.shapes import BackboneSpec
from teacher.shapes import PROTOTYPES_AT_ONCE, ViTSpec

GIB = 2**30
PARAMETER_BYTES = 2  # bf16 weights
OPTIMIZER_BYTES = 12  # fp32 master weight and two moments; sharded over the group
EMA_BYTES = 4  # fp32; sharded like them
REDUCED_AT_ONCE = (
    500_000_000  # gradients in DeepSpeed's bucket, as ``distill.engine.engine`` sets it
)
# Bytes in the bucket per gradient, and of the rank's shard: its bf16 gradients and their fp32 sum
ONE_PART_BYTES, SEVERAL_PARTS_BYTES, STAGE_3_BYTES = (2, 6), (4, 4), (2, 4)
SUM_BYTES = (
    4  # of micro-batches that stage 1 adds up before it reduces (``distill.engine.added_up``)
)
# Per row and prototype of a chunk: logits and targets in fp32, and their makings
LOGIT_BYTES = 12
PROJECTED_BYTES = (
    12  # per row and channel of a projected feature: in fp32, normalised, and its target normalised
)
# What depends on no shape. Source of each: an estimate, to be measured by `make gpu`.
FIXED_GIB: Mapping[str, float] = MappingProxyType(
    {
        "CUDA context and libraries": 1.0,
        "communicators of NCCL": 1.0,
    }
)
CONTEXT_GIB = sum(FIXED_GIB.values())
STUDENT_PARTS = ("weights", "gradients", "optimizer", "ema", "activations", "logits")


@dataclass(frozen=True)
class Student:
    """What a student's memory follows from.

    ``parameters`` count backbone, heads or projectors; ``row_bytes`` are kept by heads or projectors
    per class token and per masked patch.
    """

    name: str
    spec: BackboneSpec
    parameters: int
    row_bytes: tuple[int, int]
    crop_scale: float = 1.0


@dataclass(frozen=True)
class Training:
    """How networks are trained, as far as memory follows from it.

    Args:
        zero_stage: what is sharded over a group.
        survival: part of the rows that pass through a block.
        is_checkpointing: of each block only the input is kept.
        lookahead: steps that the teacher works ahead, whose batches wait.
    """

    zero_stage: int
    survival: float = 1.0
    is_checkpointing: bool = False
    lookahead: int = 0


@dataclass(frozen=True)
class Memory:
    """GiB of one rank by part."""

    teacher: float
    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    logits: float
    buffers: float
    context: float

    @property
    def total(self) -> float:
        """All parts together."""
        return float(sum(vars(self).values()))

    def describe(self) -> str:
        """The total and the largest parts, for people."""
        parts = sorted(asdict(self).items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {value:.1f}" for name, value in parts[:4])
        return f"{self.total:.0f} GiB ({shown})"


def head_parameters(heads: Heads) -> int:
    """Weights and biases of both heads."""
    return sum(head.parameters for head in heads)


def wire_shape(
    crops: CropShapes,
    heads: Heads | None,
    teacher_width: int,
    patches: int,
    *,
    has_pixel_stats: bool,
) -> WireShape:
    """Values per image on the wire; the teacher's rows travel in bf16."""
    dino, ibot = (
        (teacher_width, teacher_width)
        if heads is None
        else (heads[0].bottleneck, heads[1].bottleneck)
    )
    return WireShape(
        global_crop_values=2 * 3 * crops.global_size**2,
        local_crop_values=crops.num_locals * 3 * crops.local_size**2,
        class_row_values=2 * dino,
        patch_row_values=ibot,
        value_bytes=2,
        patches=patches,
        stat_values=2 * 3 if has_pixel_stats else 0,
    )


@dataclass(frozen=True)
class Footprint:
    """What a family needs on some ranks. ``memory`` is per rank; bytes are per rank and step."""

    memory: tuple[Memory, ...]
    sliced_bytes: tuple[int, ...]
    sliced_bytes_bound: tuple[int, ...]
    gathered_bytes: int

    @property
    def fullest(self) -> Memory:
        """The rank that needs most."""
        return self.memory[self.fullest_rank]

    @cached_property
    def fullest_rank(self) -> int:
        """Its number."""
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].total)

    def to_json(self) -> dict[str, Any]:
        """Plain data, to join the plan's."""
        parts = {name: round(value, 3) for name, value in asdict(self.fullest).items()}
        return {
            "memory_gib_max": round(self.fullest.total, 3),
            "memory_gib": parts,
            "memory_gib_ranks": run_lengths([round(each.total, 3) for each in self.memory]),
            "exchange_bytes_max": max(self.sliced_bytes),
            "exchange_bytes_bound": max(self.sliced_bytes_bound),
            "exchange_bytes_all_gather": self.gathered_bytes,
        }


def footprint_of(
    plan: Plan,
    students: Sequence[Student],
    teacher_spec: BackboneSpec,
    heads: Heads | None,
    crops: CropShapes,
    training: Training,
    wire: WireShape,
) -> Footprint:
    """Memory and traffic of every rank of a family's plan; masked patches at their mean."""
    of_teacher = _teacher_parameters(plan, teacher_spec, heads)
    image_bytes = wire.slice_image_bytes + crops.masked_per_image * wire.slice_patch_bytes
    parts = _student_bytes(plan, students, crops, training, has_heads=heads is not None) / GIB
    largest = plan.largest_shares
    teaching = [PARAMETER_BYTES * of_teacher if most else 0 for most in largest]
    held = [sum(map(len, plan.required_positions[rank])) for rank in range(plan.num_ranks)]
    memory = tuple(
        Memory(
            teacher=teaching[rank] / GIB,
            **dict(zip(STUDENT_PARTS, parts[rank].tolist(), strict=True)),
            buffers=(training.lookahead + 1) * (held[rank] + largest[rank]) * image_bytes / GIB,
            context=CONTEXT_GIB,
        )
        for rank in range(plan.num_ranks)
    )
    masked = np.full(plan.images_global, round(crops.masked_per_image), np.int64)
    return Footprint(
        memory=memory,
        sliced_bytes=tuple(slice_bytes(plan, 0, wire, masked)),
        sliced_bytes_bound=tuple(int(count * image_bytes) for count in held),
        gathered_bytes=gathered_bytes(plan, wire),
    )


def _teacher_parameters(plan: Plan, spec: BackboneSpec, heads: Heads | None) -> int:
    """Numbers that one rank holds of the teacher."""
    of_backbone = spec.parameters
    if plan.is_teacher_sharded:  # the rank's part, the block at work and the next one
        block = 2 * of_backbone // spec.equal_blocks
        of_backbone = of_backbone // plan.num_ranks + block
    return of_backbone + (0 if heads is None else head_parameters(heads))


def _student_bytes(
    plan: Plan,
    students: Sequence[Student],
    crops: CropShapes,
    training: Training,
    *,
    has_heads: bool,
) -> NDArray[np.float64]:
    """Bytes of all students of each rank by ``STUDENT_PARTS``, [num_ranks, 6]."""
    parts = np.zeros((plan.num_ranks, len(STUDENT_PARTS)))
    for student, placement in zip(students, plan.placements, strict=True):
        group, count = len(placement.slices), student.parameters
        per_image = kept_bytes(student, crops)
        for rank in placement.world_ranks:
            images = placement.images_at_once(rank)
            logits = images * logit_bytes(crops) if has_heads else 0.0
            is_added_up = images < len(placement.slice_of(rank))
            parts[rank, :4] += (
                count * PARAMETER_BYTES,
                gradient_bytes(count, group, training.zero_stage, is_added_up=is_added_up),
                count * OPTIMIZER_BYTES / group,
                count * EMA_BYTES / group,
            )
            # students of a rank train one after the other: what is alive at once is the largest
            parts[rank, 4:] = np.maximum(parts[rank, 4:], (images * per_image, logits))
    return parts


def kept_bytes(student: Student, crops: CropShapes) -> float:
    """What the backward pass of a student keeps of an image, logits aside."""
    inside = activation_bytes(student.spec, crops.scaled(student.crop_scale))
    return inside + kept_by_rows(student.row_bytes, crops)


def pretraining_footprint(
    plan: Plan,
    spec: ViTSpec,
    heads: Heads,
    kinds: Sequence[CropShapes],
    training: Training,
    *,
    has_anchor: bool,
) -> Footprint:
    """Memory of every rank of a network that teaches itself. Nothing travels.

    Args:
        plan: of one network on all ranks.
        spec: its backbone.
        heads: its heads.
        kinds: crops of its batches; the largest count.
        training: with ZeRO stage 3 the EMA and the anchor are sharded, too.
        has_anchor: there is a Gram anchor.
    """
    num_ranks = plan.num_ranks
    backbone, of_heads = spec.parameters, head_parameters(heads)
    block = backbone // spec.depth
    if training.zero_stage == 3:  # the rank's part, the block at work and the next one
        frozen = backbone // num_ranks + 2 * block
        weights = (backbone + of_heads) / num_ranks + 2 * block + of_heads
    else:
        frozen, weights = backbone, backbone + of_heads
    networks = frozen * (2 if has_anchor else 1) + of_heads  # EMA, anchor
    counts = _Counts(teaching=networks, computing=weights, trained=backbone + of_heads)
    of_rows = row_bytes(heads)
    saved_bytes = max(
        _saved_bytes(spec, crops, training) + kept_by_rows(of_rows, crops) for crops in kinds
    )
    return _footprint_alone(plan, counts, training, saved_bytes, max(map(logit_bytes, kinds)))


def fitting_footprint(
    plan: Plan, spec: BackboneSpec, heads: Heads, crops: CropShapes, training: Training
) -> Footprint:
    """Memory of every rank while heads are learned on a frozen backbone, which keeps nothing but the block at work. Nothing travels."""
    backbone, count = spec.parameters, head_parameters(heads)
    saved_bytes = activation_bytes(spec, crops) / spec.equal_blocks
    saved_bytes += kept_by_rows(row_bytes(heads), crops)
    # the EMA of the heads teaches
    counts = _Counts(teaching=backbone + count, computing=count, trained=count)
    return _footprint_alone(plan, counts, training, saved_bytes, logit_bytes(crops))


@dataclass(frozen=True)
class _Counts:
    """Numbers of parameters that teach, that a rank computes with, and that are trained."""

    teaching: float
    computing: float
    trained: int


def _footprint_alone(
    plan: Plan, counts: _Counts, training: Training, saved_bytes: float, of_logits: float
) -> Footprint:
    """Memory of one network on all ranks; ``saved_bytes`` for the backward pass and bytes ``of_logits`` are per image."""
    placement, num_ranks = plan.placements[0], plan.num_ranks
    trained = counts.trained
    memory = []
    for rank in placement.world_ranks:
        images = placement.images_at_once(rank)
        is_added_up = images < len(placement.slice_of(rank))
        stage = training.zero_stage
        gradients = gradient_bytes(trained, num_ranks, stage, is_added_up=is_added_up)
        memory.append(
            Memory(
                teacher=PARAMETER_BYTES * counts.teaching / GIB,
                weights=PARAMETER_BYTES * counts.computing / GIB,
                gradients=gradients / GIB,
                optimizer=OPTIMIZER_BYTES * trained / num_ranks / GIB,
                ema=EMA_BYTES * trained / num_ranks / GIB,
                activations=images * saved_bytes / GIB,
                logits=images * of_logits / GIB,
                buffers=0.0,
                context=CONTEXT_GIB,
            )
        )
    nothing = (0,) * num_ranks
    return Footprint(tuple(memory), nothing, nothing, 0)


def _saved_bytes(spec: ViTSpec, crops: CropShapes, training: Training) -> float:
    """Bytes kept for the backward pass of one image's crops; with checkpointing the inputs of all blocks and the inside of one."""
    inside = training.survival * activation_bytes(spec, crops)
    if not training.is_checkpointing:
        return inside
    sides = [crops.global_size] * 2 + [crops.local_size] * crops.num_locals
    tokens = sum(spec.tokens(side) for side in sides)
    return inside / spec.depth + PARAMETER_BYTES * tokens * spec.width * spec.depth


def activation_bytes(spec: BackboneSpec, crops: CropShapes) -> float:
    """Bytes kept for the backward pass of all crops of one image."""
    sides = [crops.global_size] * 2 + [crops.local_size] * crops.num_locals
    return float(sum(spec.activation_bytes(side) for side in sides))


def gradient_bytes(count: int, group: int, zero_stage: int, *, is_added_up: bool) -> float:
    """Bytes of the gradients of ``count`` parameters on one of ``group`` ranks, with DeepSpeed's bucket; added up over micro-batches or not."""
    by_stage = {
        1: ONE_PART_BYTES,
        2: SEVERAL_PARTS_BYTES if is_added_up else ONE_PART_BYTES,
        3: STAGE_3_BYTES,
    }
    bucket, shard = by_stage[zero_stage]
    added_up = SUM_BYTES * count if zero_stage == 1 and is_added_up else 0
    return added_up + bucket * min(count, REDUCED_AT_ONCE) + shard * count / group


def row_bytes(heads: Heads) -> tuple[int, int]:
    """Bytes that the DINO and the iBOT head keep of one row."""
    return heads[0].activation_bytes, heads[1].activation_bytes


def kept_by_rows(of_rows: tuple[int, int], crops: CropShapes) -> float:
    """Bytes that heads or projectors keep of one image: of all class tokens and of masked patches."""
    return of_rows[0] * (2 + crops.num_locals) + of_rows[1] * crops.masked_per_image


def logit_bytes(crops: CropShapes) -> float:
    """Bytes of one image's logits in the loss: of the DINO and the iBOT loss, one after the other, the larger."""
    return max(2 + crops.num_locals, crops.masked_per_image) * PROTOTYPES_AT_ONCE * LOGIT_BYTES
