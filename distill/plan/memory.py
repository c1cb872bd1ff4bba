"""What a plan needs: GiB per rank by part, and bytes per rank and step on the wire. From shapes alone.

Weights, gradients and optimizer state are exact. Activations are an estimate of the network's spec.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from distill.plan.flops import CropShapes, Heads
from distill.plan.plan import Plan, run_lengths
from distill.plan.traffic import WireShape, gathered_bytes, slice_bytes
from students.shapes import BackboneSpec
from teacher.shapes import PROTOTYPES_AT_ONCE, ViTSpec

GIB = 2**30
PARAMETER_BYTES = 2  # bf16 weights, and as much for gradients
SUM_BYTES = 4  # gradients of micro-batches are added up in fp32, sharded over the group
OPTIMIZER_BYTES = 12  # fp32 master weight and two moments; sharded over the group
EMA_BYTES = 4  # fp32; sharded like them
HIDDEN_BYTES = 4  # per unit of a head's hidden layer: before and after its GELU
LOGIT_BYTES = 12  # three fp32 matrices of [rows, chunk] at once
CONTEXT_GIB = 1.5  # driver, communicators, kernels


@dataclass(frozen=True)
class Student:
    """What a student's memory follows from. ``parameters`` count backbone, heads or projectors."""

    name: str
    spec: BackboneSpec
    parameters: int
    crop_scale: float = 1.0


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
    *,
    zero_stage: int,
    lookahead: int,
    micro_batch: int | None,
    patches: int,
    has_pixel_stats: bool,
) -> Footprint:
    """Memory and traffic of every rank of a family's plan; masked patches at their mean."""
    wire = wire_shape(crops, heads, teacher_spec.width, patches, has_pixel_stats=has_pixel_stats)
    of_backbone = teacher_spec.parameters
    if plan.is_teacher_sharded:  # the rank's part, the block at work and the next one
        block = 2 * of_backbone // teacher_spec.equal_blocks
        of_backbone = of_backbone // plan.num_ranks + block
    of_teacher = of_backbone + (0 if heads is None else head_parameters(heads))
    image_bytes = wire.slice_image_bytes + crops.masked_per_image * wire.slice_patch_bytes
    # weights, gradients, optimizer, EMA, activations, logits
    parts = np.zeros((plan.num_ranks, 6))
    for student, placement in zip(students, plan.placements, strict=True):
        group = len(placement.slices)
        for rank in placement.world_ranks:
            count = student.parameters
            sharded = count / group if zero_stage >= 2 else count
            images = max(p.stop - p.start for p in placement.parts_of(rank, micro_batch))
            rows = images * (2 + crops.num_locals + crops.masked_per_image)
            logits = 0.0 if heads is None else rows * PROTOTYPES_AT_ONCE * LOGIT_BYTES
            added_up = count * SUM_BYTES / group if images < len(placement.slice_of(rank)) else 0
            parts[rank, :4] += (
                count * PARAMETER_BYTES,
                sharded * PARAMETER_BYTES + added_up,
                count * OPTIMIZER_BYTES / group,
                count * EMA_BYTES / group,
            )
            # students of a rank train one after the other: what is alive at once is the largest
            activations = images * activation_bytes(student.spec, crops.scaled(student.crop_scale))
            parts[rank, 4:] = np.maximum(parts[rank, 4:], (activations, logits))
    largest = plan.largest_shares
    teaching = [PARAMETER_BYTES * of_teacher if most else 0 for most in largest]
    held = [sum(map(len, plan.required_positions[rank])) for rank in range(plan.num_ranks)]
    memory = tuple(
        Memory(
            teacher=teaching[rank] / GIB,
            weights=float(parts[rank, 0]) / GIB,
            gradients=float(parts[rank, 1]) / GIB,
            optimizer=float(parts[rank, 2]) / GIB,
            ema=float(parts[rank, 3]) / GIB,
            activations=float(parts[rank, 4]) / GIB,
            logits=float(parts[rank, 5]) / GIB,
            buffers=(lookahead + 1) * (held[rank] + largest[rank]) * image_bytes / GIB,
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


def pretraining_footprint(
    plan: Plan,
    spec: ViTSpec,
    heads: Heads,
    kinds: Sequence[CropShapes],
    *,
    zero_stage: int,
    micro_batch: int | None,
    survival: float,
    is_checkpointing: bool,
    has_anchor: bool,
) -> Footprint:
    """Memory of every rank of a network that teaches itself. Nothing travels.

    Args:
        plan: of one network on all ranks.
        spec: its backbone.
        heads: its heads.
        kinds: crops of its batches; the largest count.
        zero_stage: what is sharded; with 3 the EMA and the anchor are, too.
        micro_batch: images at once.
        survival: part of the rows that pass through a block.
        is_checkpointing: of each block only the input is kept.
        has_anchor: there is a Gram anchor.
    """
    placement, num_ranks = plan.placements[0], plan.num_ranks
    backbone, of_heads = spec.parameters, head_parameters(heads)
    block = backbone // spec.depth
    if zero_stage == 3:  # the rank's part, the block at work and the next one
        frozen = backbone // num_ranks + 2 * block
        weights = (backbone + of_heads) / num_ranks + 2 * block + of_heads
    else:
        frozen, weights = backbone, backbone + of_heads
    networks = frozen * (2 if has_anchor else 1) + of_heads  # EMA, anchor
    memory = []
    for rank in placement.world_ranks:
        images = max(p.stop - p.start for p in placement.parts_of(rank, micro_batch))
        per_image = max(_saved_bytes(spec, crops, survival, is_checkpointing) for crops in kinds)
        rows = images * max(2 + c.num_locals + c.masked_per_image for c in kinds)
        memory.append(
            _of_training(
                networks,
                weights,
                backbone + of_heads,
                num_ranks,
                zero_stage,
                is_added_up=images < len(placement.slice_of(rank)),
                saved_bytes=images * per_image,
                rows=rows,
            )
        )
    nothing = (0,) * num_ranks
    return Footprint(tuple(memory), nothing, nothing, 0)


def fitting_footprint(
    plan: Plan,
    spec: BackboneSpec,
    heads: Heads,
    crops: CropShapes,
    *,
    zero_stage: int,
    micro_batch: int | None,
) -> Footprint:
    """Memory of every rank while heads are learned on a frozen backbone, which keeps nothing but the block at work. Nothing travels."""
    placement, num_ranks = plan.placements[0], plan.num_ranks
    backbone, count = spec.parameters, head_parameters(heads)
    dino, ibot = heads
    hidden = 2 * (2 + crops.num_locals) * dino.hidden + 2 * crops.masked_per_image * ibot.hidden
    memory = []
    for rank in placement.world_ranks:
        images = max(p.stop - p.start for p in placement.parts_of(rank, micro_batch))
        per_image = activation_bytes(spec, crops) / spec.equal_blocks + HIDDEN_BYTES * hidden
        memory.append(
            _of_training(
                backbone + count,  # and the EMA of the heads, which teaches
                count,
                count,
                num_ranks,
                zero_stage,
                is_added_up=images < len(placement.slice_of(rank)),
                saved_bytes=images * per_image,
                rows=images * (2 + crops.num_locals + crops.masked_per_image),
            )
        )
    nothing = (0,) * num_ranks
    return Footprint(tuple(memory), nothing, nothing, 0)


def _of_training(
    teacher_parameters: float,
    computed_with: float,
    trained: int,
    num_ranks: int,
    zero_stage: int,
    *,
    is_added_up: bool,
    saved_bytes: float,
    rows: float,
) -> Memory:
    """A rank of one network that trains on all ranks: numbers of parameters that teach, compute and train; bytes kept for the backward pass; rows of logits."""
    gradients = PARAMETER_BYTES * (trained / num_ranks if zero_stage >= 2 else trained)
    gradients += is_added_up * SUM_BYTES * trained / num_ranks
    return Memory(
        teacher=PARAMETER_BYTES * teacher_parameters / GIB,
        weights=PARAMETER_BYTES * computed_with / GIB,
        gradients=gradients / GIB,
        optimizer=OPTIMIZER_BYTES * trained / num_ranks / GIB,
        ema=EMA_BYTES * trained / num_ranks / GIB,
        activations=saved_bytes / GIB,
        logits=rows * PROTOTYPES_AT_ONCE * LOGIT_BYTES / GIB,
        buffers=0.0,
        context=CONTEXT_GIB,
    )


def _saved_bytes(
    spec: ViTSpec, crops: CropShapes, survival: float, is_checkpointing: bool
) -> float:
    """Bytes kept for the backward pass of one image's crops; with checkpointing the inputs of all blocks and the inside of one."""
    inside = survival * activation_bytes(spec, crops)
    if not is_checkpointing:
        return inside
    sides = [crops.global_size] * 2 + [crops.local_size] * crops.num_locals
    tokens = sum(spec.tokens(side) for side in sides)
    return inside / spec.depth + PARAMETER_BYTES * tokens * spec.width * spec.depth


def activation_bytes(spec: BackboneSpec, crops: CropShapes) -> float:
    """Bytes kept for the backward pass of all crops of one image."""
    sides = [crops.global_size] * 2 + [crops.local_size] * crops.num_locals
    return float(sum(spec.activation_bytes(side) for side in sides))
