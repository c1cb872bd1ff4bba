"""The recipe as typed, frozen models.

Two kinds, told apart by their keys: a *family* recipe has ``students``, a *teacher* recipe has
``stages``. Each key is marked *science* (it decides the result) or *machine* (where and how fast);
the recipe's hash covers the science keys only, so moving a run to another machine does not make it
another run.

``distill.recipe.reader`` reads YAML into these models and says what is wrong, where. Imports no
torch, so that the command line starts fast.

Longer than 400 lines because the keys are one contract; the rules between them are in
``distill.recipe.rules``.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from distill.errors import RecipeError
from students.shapes import CATALOG, STEM, BackboneSpec, ConvNeXtSpec
from teacher.shapes import ViTSpec

ARCHITECTURES = tuple(CATALOG)
FREE_SIZES = ("vit", "convnext")
BUILTIN_PHOTOGRAPHS = "builtin:photographs"
HEADS_PHASE, FAMILY_PHASE = RESERVED_PHASES = ("heads", "family")

RESERVED_NETWORKS = ("teacher", "heads")

Loc = tuple[str | int, ...]
Problem = tuple[Loc, str]


def science(default: Any = ..., **constraints: Any) -> Any:
    """A key that decides the result."""
    return Field(default, json_schema_extra={"role": "science"}, **constraints)


def machine(default: Any = ..., **constraints: Any) -> Any:
    """A key about where and how fast, with no influence on the result."""
    return Field(default, json_schema_extra={"role": "machine"}, **constraints)


class Section(BaseModel):
    """A part of a recipe: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def is_custom(arch: str) -> bool:
    """A network from outside: ``package.module:factory``, ``transformers:NAME`` or ``timm:NAME``."""
    return ":" in arch


def _known_arch(name: str) -> str:
    if name in ARCHITECTURES or name in FREE_SIZES:
        return name
    if is_custom(name):
        if re.fullmatch(r"[A-Za-z_][\w.]*:[\w./-]+", name):
            return name
        raise ValueError(f"{name!r}: write package.module:factory, transformers:NAME or timm:NAME")
    close = difflib.get_close_matches(name, [*ARCHITECTURES, *FREE_SIZES], n=1)
    hint = (
        f" - did you mean {close[0]!r}?"
        if close
        else f"; known: {', '.join([*ARCHITECTURES, *FREE_SIZES])}"
    )
    raise ValueError(f"{name!r} is not known{hint}")


def _safe_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise ValueError(f"{name!r}: use letters, digits, '-', '_' and '.', at most 64 of them")
    return name


def _duration(value: object) -> object:
    """The value itself if it is a duration such as ``30min`` or ``2h``, or a number of steps."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", value)
        if match is None:
            raise ValueError(
                f"{value!r}: write a duration such as '30min', '90s' or '2h', or a number of steps"
            )
    elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{value!r}: write a duration such as '30min', or a number of steps, at least 1"
        )
    return value


def rank_range(text: str) -> range:
    """The ranks that ``FIRST-LAST`` names; both ends belong.

    Raises:
        ValueError: the text says something else.
    """
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise ValueError(f"{text!r}: write a number of ranks, FIRST-LAST such as '8-15', or auto")
    return range(int(match[1]), int(match[2]) + 1)


def _ranks(value: int | str) -> int | str:
    if isinstance(value, int):
        if value < 1:
            raise ValueError(f"{value}: at least 1, or auto")
    elif value != "auto":
        rank_range(value)
    return value


def _size_mapping(value: object) -> object:
    return {"size": value} if isinstance(value, int) and not isinstance(value, bool) else value


def _arch_mapping(value: object) -> object:
    return {"arch": value} if isinstance(value, str) else value


def _catalogue_name(name: str) -> str:
    if name in FREE_SIZES:
        raise ValueError(f"{name!r}: a catalogue name, or leave it out: the weights tell")
    return _known_arch(name)


Arch = Annotated[str, AfterValidator(_known_arch)]
CatalogueName = Annotated[str, AfterValidator(_catalogue_name)]
Name = Annotated[str, AfterValidator(_safe_name)]
Pair = Annotated[tuple[float, float], Strict(False)]
Triple = Annotated[tuple[float, float, float], Strict(False)]
Ints = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Strict(False)]
Every = Annotated[int | str, AfterValidator(_duration)]


class ArchSpec(Section):
    """A network: a catalogue name, or a free size.

    ``untie_local_norm``: the class tokens of local crops have a final norm of their own, in training only.
    """

    arch: Arch = science()
    width: int | None = science(None, ge=8)
    depth: int | None = science(None, ge=1)
    heads: int | None = science(None, ge=1)
    patch: int | None = science(None, ge=2)
    ffn: Literal["mlp", "swiglu"] | None = science(None)
    ffn_width: int | None = science(None, ge=8)
    layerscale: float | None = science(None, gt=0.0)
    untie_local_norm: bool | None = science(None)
    depths: Ints | None = science(None)
    widths: Ints | None = science(None)
    args: dict[str, Any] | None = science(None)

    @property
    def stride(self) -> int:
        """Pixels per side of a patch of the network's map. A custom network is built to find out."""
        if is_custom(self.arch):
            return self.backbone_spec().stride
        if self.arch == "convnext":
            return int(STEM * 2 ** (len(self.depths or ()) - 1))
        if self.arch == "vit":
            return self.patch or 16
        return self.patch or CATALOG[self.arch].stride

    def backbone_spec(self) -> BackboneSpec:
        """The shape to build.

        Raises:
            RecipeError: a custom network cannot be built or does not keep to the protocol.
        """
        if is_custom(self.arch):
            from students.custom import probe

            try:
                return probe(self.arch, json.dumps(self.args or {}, sort_keys=True))
            except ValueError as error:
                fix = "See docs/custom-students.md for what a factory returns."
                raise RecipeError(str(error), fix=fix) from error
        if self.arch == "convnext":
            assert self.depths is not None and self.widths is not None, "checked by the rules"
            return ConvNeXtSpec(self.depths, self.widths, layerscale_init=self.layerscale or 1e-6)
        if self.arch == "vit":
            assert self.width is not None and self.depth is not None and self.heads is not None, (
                "checked by the rules"
            )
            ffn_width = self.ffn_width or 4 * self.width
            return ViTSpec(
                self.width,
                self.depth,
                self.heads,
                ffn_width,
                self.stride,
                self.ffn or "mlp",
                untie_local_norm=bool(self.untie_local_norm),
                layerscale_init=self.layerscale or 1e-5,
            )
        known = CATALOG[self.arch]
        if isinstance(known, ViTSpec):
            return replace(known, patch=self.stride, untie_local_norm=bool(self.untie_local_norm))
        return known


class HeadSpec(Section):
    """One head: hidden width, bottleneck width, prototypes."""

    hidden: int = science(ge=1)
    bottleneck: int = science(ge=1)
    prototypes: int = science(ge=2)


class HeadsSpec(Section):
    """Both heads of a teacher; the defaults are the 7B's."""

    dino: HeadSpec = science(HeadSpec(hidden=8192, bottleneck=512, prototypes=262_144))
    ibot: HeadSpec = science(HeadSpec(hidden=4096, bottleneck=384, prototypes=98_304))


class GlobalCropsSpec(Section):
    """The two global crops of an image."""

    count: Literal[2] = science(2)
    size: int = science(256, ge=8)
    scale: Pair = science((0.32, 1.0))


class LocalCropsSpec(Section):
    """The local crops of an image."""

    count: int = science(8, ge=0, le=32)
    size: int = science(112, ge=8)
    scale: Pair = science((0.05, 0.32))


class CropsSpec(Section):
    """All crops; a bare number for a crop is its size. ``eval_size`` is the finished networks' input."""

    global_: Annotated[GlobalCropsSpec, BeforeValidator(_size_mapping)] = science(
        GlobalCropsSpec(), alias="global"
    )
    local: Annotated[LocalCropsSpec, BeforeValidator(_size_mapping)] = science(LocalCropsSpec())
    flip: float = science(0.0, ge=0.0, le=1.0)
    blur_sigma: Pair = science((0.1, 2.0))
    eval_size: int | None = machine(None, ge=8)

    @property
    def input_size(self) -> int:
        """Pixels per side that the finished networks are scored at and that their folders name."""
        return self.eval_size or self.global_.size


class MasksSpec(Section):
    """iBOT masks: share of global crops masked, and the range of their ratios."""

    probability: float = science(0.5, ge=0.0, le=1.0)
    ratio: Pair = science((0.1, 0.5))


class ObjectiveSpec(Section):
    """Weights of the loss terms; ``local`` scales the part of local crops.

    With heads the terms are dino, ibot and koleo; with ``teacher.heads: none`` cosine and smooth_l1.
    """

    dino: float = science(1.0, gt=0.0)
    ibot: float = science(1.0, ge=0.0)
    koleo: float = science(0.1, ge=0.0)
    local: float = science(1.0, ge=0.0)
    cosine: float = science(1.0, gt=0.0)
    smooth_l1: float = science(0.1, ge=0.0)


class GramSpec(Section):
    """Gram anchoring: which earlier EMA network is the anchor and how often it is replaced.

    ``resolution``: the anchor looks at crops of this multiple of the global crop's size, whole patches.
    """

    teacher: str = science()
    weight: float = science(2.0, gt=0.0)
    refresh: int = science(10_000, ge=1)
    max_refreshes: int = science(3, ge=0)
    resolution: float = science(2.0, ge=1.0, le=4.0)


class LrSpec(Section):
    """Learning rate over the steps; ``ramp`` is how it rises from 0 to its peak in the warm-up."""

    peak: float = science(gt=0.0)
    end: float = science(1.0e-6, ge=0.0)
    warmup: int = science(0, ge=0)
    ramp: Literal["linear", "cosine"] = science("linear")
    decay: Literal["constant", "cosine"] = science("constant")
    scale: Literal["none", "sqrt_1024"] = science("none")


class TemperatureSpec(Section):
    """Teacher temperature: linear from start to end over the warm-up steps."""

    start: float = science(0.04, gt=0.0)
    end: float = science(0.07, gt=0.0)
    warmup: int = science(0, ge=0)


class ScheduleSpec(Section):
    """Batch, optimiser and everything that depends on the step."""

    batch: int = science(ge=1)
    lr: LrSpec = science()
    weight_decay: float = science(0.04, ge=0.0)
    beta2: float = science(0.99, ge=0.0, lt=1.0)
    clip: float = science(3.0, gt=0.0)
    ema: float = science(0.994, ge=0.0, le=1.0)
    teacher_temperature: TemperatureSpec = science(TemperatureSpec())
    freeze_prototypes: int = science(0, ge=0)
    rope_rescale: Pair | None = science(None)


class FamilyScheduleSpec(ScheduleSpec):
    """A family's schedule has a length; a teacher's stages have theirs."""

    steps: int = science(ge=1)


class TeacherScheduleSpec(ScheduleSpec):
    """What only pretraining has: stochastic depth, and learning rates that differ between layers.

    ``drop_path``: how often a row skips a residual branch. ``layer_decay``: factor from each block to
    the one before it. ``patch_embed_lr``: further factor of the patch embedding. ``weight_decay_end``,
    ``ema_end``: what a cosine over all steps leads to; constant without.
    """

    weight_decay_end: float | None = science(None, ge=0.0)
    ema_end: float | None = science(None, ge=0.0, le=1.0)

    drop_path: float = science(0.0, ge=0.0, lt=1.0)
    layer_decay: float = science(1.0, gt=0.0, le=1.0)
    patch_embed_lr: float = science(1.0, gt=0.0, le=1.0)


class StageCropsSpec(Section):
    """Sizes of the crops of some of a stage's batches, in the share ``ratio``; the rest is as in ``crops``."""

    global_: int = science(ge=8, alias="global")
    local: int = science(ge=8)
    ratio: float = science(1.0, gt=0.0)


class StageSpec(Section):
    """One stage of pretraining; it goes on from the stage before.

    ``lr`` counts its steps from the start of the stage; without one the schedule's goes on. ``batch``
    and ``ema`` replace the schedule's. ``crops`` are sizes that take turns, each batch of one.
    """

    name: Name = science()
    steps: int = science(ge=1)
    objective: ObjectiveSpec = science(ObjectiveSpec())
    gram: GramSpec | None = science(None)
    lr: LrSpec | None = science(None)
    batch: int | None = science(None, ge=1)
    ema: float | None = science(None, ge=0.0, le=1.0)
    crops: Annotated[tuple[StageCropsSpec, ...], Strict(False)] | None = science(None, min_length=1)


class SourceSpec(Section):
    """A folder, ``.tar`` shards, a ``.txt`` list, a ``.parquet`` file, or ``builtin:photographs``.

    ``weight``: its share of all images; without, sources are one pool. ``batches: pure``: its images fill
    batches of their own, in the share of its weight; those of the others are mixed. ``mean`` and ``std``
    replace the data's for its images.
    """

    path: str = machine(min_length=1)
    weight: float | None = science(None, gt=0.0)
    batches: Literal["mixed", "pure"] = science("mixed")
    mean: Triple | None = science(None)
    std: Triple | None = science(None)


def _source_mapping(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class DataSpec(Section):
    """Images and how their pixels are normalised.

    ``index``: a folder in which what is known about the images is kept from run to run.
    """

    sources: Annotated[
        tuple[Annotated[SourceSpec, BeforeValidator(_source_mapping)], ...], Strict(False)
    ] = science(min_length=1)
    index: str | None = machine(None, min_length=1)
    max_bad_fraction: float = machine(0.01, ge=0.0, le=1.0)
    max_megapixels: float = machine(64.0, gt=0.0)
    held_out: float = science(0.2, gt=0.0, lt=1.0)
    mean: Triple = science((0.485, 0.456, 0.406))
    std: Triple = science((0.229, 0.224, 0.225))
    num_threads: int = machine(1, ge=1)

    @property
    def has_own_colours(self) -> bool:
        """Images are normalised by their source's mean and standard deviation, which travel with them."""
        return any(source.mean or source.std for source in self.sources)


class EngineSpec(Section):
    """Where and how fast. ``processes`` counts local ranks; ``auto`` is one per GPU.

    ``lookahead``: steps that a frozen teacher may work ahead of its students. ``exchange``: to each
    rank its slice, or everything to everybody with even teacher shares, as published. ``balance``:
    steps between two measurements of every rank's speed, after which shares follow it; 0 for never.
    ``teacher_sharding``: the whole teacher on every rank, or a part of it (ZeRO-3) with even shares;
    ``auto`` for whole where it fits. ``micro_batch``: images that a trained network takes at once, whole KoLeo groups of 16; by default
    all of a rank's slice. ``zero``: what is sharded over the ranks of a trained network - 1 optimizer state,
    2 gradients too, 3 weights too. ``activation_checkpointing``: each block's insides are computed again
    for the backward pass instead of kept. ``hang_limit_s``: a rank that does not move this long is named
    and the job ended; steps and saves that took longer before may again.
    """

    device: Literal["auto", "cpu", "cuda"] = machine("auto")
    processes: int | Literal["auto"] = machine("auto")
    precision: Literal["fp32", "bf16"] = science("bf16")
    zero: Literal[1, 2, 3] = machine(1)
    activation_checkpointing: bool = machine(False)
    teacher_micro_batch: int = machine(16, ge=1)
    teacher_sharding: Literal["auto", "replicated", "sharded"] = machine("auto")
    micro_batch: int | None = machine(None, ge=16, multiple_of=16)
    lookahead: int = machine(2, ge=0, le=16)
    exchange: Literal["slices", "all_gather"] = machine("slices")
    balance: int = machine(200, ge=0)
    hang_limit_s: float = machine(30.0, ge=2.0)


class CheckpointSpec(Section):
    """How often to save ("30min" or a number of steps) and how many to keep.

    ``milestones``: every so many steps of a phase a checkpoint is written and kept for ever.
    """

    every: Every = machine("30min")
    keep: int = machine(3, ge=1)
    milestones: int | None = machine(None, ge=1)

    @property
    def every_steps(self) -> int | None:
        """Steps between saves, if counted in steps."""
        return self.every if isinstance(self.every, int) else None

    @property
    def every_s(self) -> float | None:
        """Seconds between saves, if counted in time."""
        if isinstance(self.every, int):
            return None
        number, unit = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", self.every).groups()  # type: ignore[union-attr]
        return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


class StudentHeadsSpec(Section):
    """Hidden widths of a student's heads; bottlenecks and prototypes are the teacher's."""

    dino_hidden: int = science(2048, ge=1)
    ibot_hidden: int = science(2048, ge=1)


class StudentSpec(ArchSpec):
    """One student. ``lr`` replaces the schedule's peak; ``ranks`` is a number, ``FIRST-LAST``, or ``auto``.

    ``steps``: it is finished earlier than the schedule, and its ranks teach from then on.
    ``crop_scale``: it sees every crop at this part of its size.
    """

    name: Name | None = science(None)
    head_widths: StudentHeadsSpec = science(StudentHeadsSpec())
    lr: float | None = science(None, gt=0.0)
    steps: int | None = science(None, ge=1)
    crop_scale: float = science(1.0, gt=0.0, le=1.0)
    ranks: Annotated[int | str, AfterValidator(_ranks)] = machine("auto")

    @property
    def label(self) -> str:
        """Its name, by default its architecture's."""
        return self.name or self.arch

    @property
    def asked_ranks(self) -> int | range | None:
        """How many ranks, or which; None leaves both to the plan."""
        if isinstance(self.ranks, int):
            return self.ranks
        return None if self.ranks == "auto" else rank_range(self.ranks)


class FitSpec(Section):
    """Learning DINO and iBOT heads on a frozen teacher, for ``teacher.heads: fit``."""

    steps: int = science(10_000, ge=1)
    lr: float = science(4.0e-4, gt=0.0)  # falls to zero along a cosine
    warmup: int = science(500, ge=0)
    ema: float = science(0.994, ge=0.0, le=1.0)
    heads: HeadsSpec = science(HeadsSpec())


HeadsMode = Literal["file", "fit", "none"]


class TeacherSource(Section):
    """The family's teacher: a recipe to train it first, or its weights.

    ``heads``: a file; ``fit`` to learn them on the frozen teacher first; ``none`` to learn from its
    features instead. By default the ones that lie beside the weights or that the recipe trains.
    ``arch`` says what the weights are, so that a plan can be made before they are there.
    """

    train: str | None = science(None)
    weights: str | None = machine(None)
    arch: CatalogueName | None = machine(None)
    heads: str | None = machine(None)
    fit: FitSpec = science(FitSpec())

    @property
    def heads_mode(self) -> HeadsMode:
        """Where the heads come from."""
        return "file" if self.heads is None else HEADS_MODES.get(self.heads, "file")


HEADS_MODES: Mapping[str, HeadsMode] = {"fit": "fit", "none": "none"}


Student = Annotated[StudentSpec, BeforeValidator(_arch_mapping)]
Model = Annotated[ArchSpec, BeforeValidator(_arch_mapping)]


class FamilyRecipe(Section):
    """Distils every student from one frozen teacher, in one job."""

    name: Name = machine()
    seed: int = science(0, ge=0)
    teacher: TeacherSource = science()
    students: Annotated[tuple[Student, ...], Strict(False)] = science(min_length=1)
    data: DataSpec = science()
    crops: CropsSpec = science(CropsSpec())
    masks: MasksSpec = science(MasksSpec())
    objective: ObjectiveSpec = science(ObjectiveSpec())
    schedule: FamilyScheduleSpec = science()
    engine: EngineSpec = science(EngineSpec())
    checkpoint: CheckpointSpec = machine(CheckpointSpec())

    def input_size_of(self, name: str) -> int:
        """Pixels per side that a finished network is scored at, the teacher included."""
        from teacher.shapes import scaled_size

        scales = {student.label: student.crop_scale for student in self.students}
        return scaled_size(self.crops.input_size, scales.get(name, 1.0))


class TeacherRecipe(Section):
    """Pretrains a teacher in stages."""

    name: Name = machine()
    seed: int = science(0, ge=0)
    model: Model = science()
    heads: HeadsSpec = science(HeadsSpec())
    data: DataSpec = science()
    crops: CropsSpec = science(CropsSpec())
    masks: MasksSpec = science(MasksSpec())
    schedule: TeacherScheduleSpec = science()
    stages: Annotated[tuple[StageSpec, ...], Strict(False)] = science(min_length=1)
    engine: EngineSpec = science(EngineSpec())
    checkpoint: CheckpointSpec = machine(CheckpointSpec())

    def at_stage(self, stage: StageSpec) -> "TeacherRecipe":
        """The recipe with the schedule that a stage has; the other stages keep theirs."""
        own = {"lr": stage.lr, "batch": stage.batch, "ema": stage.ema}
        given = {key: value for key, value in own.items() if value is not None}
        kept = tuple(
            each.model_copy(update={"batch": each.batch or self.schedule.batch})
            for each in self.stages
        )
        settings = self.schedule.model_copy(update=given)
        return self.model_copy(update={"schedule": settings, "stages": kept})

    def first_step(self, stage: StageSpec) -> int:
        """Steps of the stages before one."""
        names = [each.name for each in self.stages]
        return sum(each.steps for each in self.stages[: names.index(stage.name)])


Recipe = FamilyRecipe | TeacherRecipe


def recipe_hash(part: Section) -> str:
    """Twelve hex digits over the science keys of a recipe, or of a part of one."""
    values = _science_values(part)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _science_values(section: Section) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if not isinstance(extra, dict) or extra["role"] != "science":
            continue
        values[name] = _plain(getattr(section, name))
    return values


def _plain(value: object) -> object:
    if isinstance(value, Section):
        return _science_values(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
