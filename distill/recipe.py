"""The recipe as typed, frozen models, and every rule about it that needs no device.

Two kinds, told apart by their keys: a *family* recipe has ``students``, a *teacher* recipe has
``stages``. Each key is marked *science* (it decides the result) or *machine* (where and how fast);
the recipe's hash covers the science keys only, so moving a run to another machine does not make it
another run.

``distill.recipe_file`` reads YAML into these models and says what is wrong, where. Imports no
torch, so that the command line starts fast.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

if TYPE_CHECKING:
    from students.catalog import BackboneSpec

VIT_PATCHES = dict.fromkeys(
    ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16"), 16
)
CONVNEXT_STRIDES = dict.fromkeys(
    ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"), 32
)
ARCHITECTURES = (*VIT_PATCHES, *CONVNEXT_STRIDES)
FREE_SIZES = ("vit", "convnext")
CONVNEXT_STEM = 4

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

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", populate_by_name=False)


def _known_arch(name: str) -> str:
    if name in ARCHITECTURES or name in FREE_SIZES:
        return name
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
    """``30min``, ``90s`` or ``2h`` as seconds in a tuple ("s", seconds); a whole number means steps."""
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


def _size_mapping(value: object) -> object:
    return {"size": value} if isinstance(value, int) and not isinstance(value, bool) else value


def _arch_mapping(value: object) -> object:
    return {"arch": value} if isinstance(value, str) else value


Arch = Annotated[str, AfterValidator(_known_arch)]
Name = Annotated[str, AfterValidator(_safe_name)]
Pair = Annotated[tuple[float, float], Strict(False)]
Triple = Annotated[tuple[float, float, float], Strict(False)]
Ints = Annotated[tuple[int, ...], Strict(False)]
Every = Annotated[int | str, AfterValidator(_duration)]


class ArchSpec(Section):
    """A network: a catalogue name, or a free size."""

    arch: Arch = science()
    width: int | None = science(None, ge=8)
    depth: int | None = science(None, ge=1)
    heads: int | None = science(None, ge=1)
    patch: int | None = science(None, ge=2)
    ffn: Literal["mlp", "swiglu"] | None = science(None)
    ffn_width: int | None = science(None, ge=8)
    layerscale: float | None = science(None, gt=0.0)
    depths: Ints | None = science(None)
    widths: Ints | None = science(None)

    @property
    def stride(self) -> int:
        """Pixels per side of a patch of the network's map."""
        if self.arch == "convnext":
            return int(CONVNEXT_STEM * 2 ** (len(self.depths or ()) - 1))
        if self.arch == "vit":
            return self.patch or 16
        return VIT_PATCHES.get(self.arch) or CONVNEXT_STRIDES[self.arch]

    def backbone_spec(self) -> "BackboneSpec":
        """The shape to build."""
        from students.catalog import CATALOG
        from students.convnext import ConvNeXtSpec
        from teacher.vit import ViTSpec

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
                layerscale_init=self.layerscale or 1e-5,
            )
        return CATALOG[self.arch]


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
    """All crops; a bare number for a crop is its size."""

    global_: Annotated[GlobalCropsSpec, BeforeValidator(_size_mapping)] = science(
        GlobalCropsSpec(), alias="global"
    )
    local: Annotated[LocalCropsSpec, BeforeValidator(_size_mapping)] = science(LocalCropsSpec())
    flip: float = science(0.0, ge=0.0, le=1.0)


class MasksSpec(Section):
    """iBOT masks: share of global crops masked, and the range of their ratios."""

    probability: float = science(0.5, ge=0.0, le=1.0)
    ratio: Pair = science((0.1, 0.5))


class ObjectiveSpec(Section):
    """Weights of the loss terms; ``local`` scales the local part of DINO."""

    dino: float = science(1.0, gt=0.0)
    ibot: float = science(1.0, ge=0.0)
    koleo: float = science(0.1, ge=0.0)
    local: float = science(1.0, ge=0.0)


class GramSpec(Section):
    """Gram anchoring: which earlier EMA network is the anchor, how often it is replaced, at which multiple of the crop it looks."""

    teacher: str = science()
    weight: float = science(2.0, gt=0.0)
    refresh: int = science(10_000, ge=1)
    max_refreshes: int = science(3, ge=0)
    resolution: int = science(2, ge=1, le=4)


class LrSpec(Section):
    """Learning rate over the steps."""

    peak: float = science(gt=0.0)
    end: float = science(1.0e-6, ge=0.0)
    warmup: int = science(0, ge=0)
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
    clip: float = science(3.0, gt=0.0)
    ema: float = science(0.994, ge=0.0, le=1.0)
    teacher_temperature: TemperatureSpec = science(TemperatureSpec())
    freeze_prototypes: int = science(0, ge=0)
    rope_rescale: Pair | None = science(None)


class FamilyScheduleSpec(ScheduleSpec):
    """A family's schedule has a length; a teacher's stages have theirs."""

    steps: int = science(ge=1)


class StageSpec(Section):
    """One stage of pretraining; it goes on from the stage before."""

    name: Name = science()
    steps: int = science(ge=1)
    objective: ObjectiveSpec = science(ObjectiveSpec())
    gram: GramSpec | None = science(None)
    lr: LrSpec | None = science(None)


class SourceSpec(Section):
    """A folder of images, or ``builtin:photographs``."""

    path: str = machine(min_length=1)


class DataSpec(Section):
    """Images and how their pixels are normalised."""

    sources: Annotated[tuple[SourceSpec, ...], Strict(False)] = machine(min_length=1)
    max_bad_fraction: float = machine(0.01, ge=0.0, le=1.0)
    held_out: float = science(0.2, gt=0.0, lt=1.0)
    mean: Triple = science((0.485, 0.456, 0.406))
    std: Triple = science((0.229, 0.224, 0.225))
    num_threads: int = machine(1, ge=1)


class EngineSpec(Section):
    """Where and how fast. ``processes`` counts local ranks; ``auto`` is one per GPU."""

    device: Literal["auto", "cpu", "cuda"] = machine("auto")
    processes: int | Literal["auto"] = machine("auto")
    precision: Literal["fp32", "bf16"] = science("bf16")
    zero: Literal[1, 2] = machine(1)
    teacher_micro_batch: int = machine(16, ge=1)


class CheckpointSpec(Section):
    """How often to save ("30min" or a number of steps) and how many to keep."""

    every: Every = machine("30min")
    keep: int = machine(3, ge=1)

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
    """One student. ``lr`` replaces the schedule's peak; ``ranks`` is a number, or ``auto``."""

    name: Name | None = science(None)
    head_widths: StudentHeadsSpec = science(StudentHeadsSpec())
    lr: float | None = science(None, gt=0.0)
    ranks: int | Literal["auto"] = machine("auto")

    @property
    def label(self) -> str:
        """Its name, by default its architecture's."""
        return self.name or self.arch


class TeacherSource(Section):
    """The family's teacher: a recipe to train it first, or a folder with weights and heads."""

    train: str | None = science(None)
    weights: str | None = machine(None)
    heads: str | None = machine(None)


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


class TeacherRecipe(Section):
    """Pretrains a teacher in stages."""

    name: Name = machine()
    seed: int = science(0, ge=0)
    model: Model = science()
    heads: HeadsSpec = science(HeadsSpec())
    data: DataSpec = science()
    crops: CropsSpec = science(CropsSpec())
    masks: MasksSpec = science(MasksSpec())
    schedule: ScheduleSpec = science()
    stages: Annotated[tuple[StageSpec, ...], Strict(False)] = science(min_length=1)
    engine: EngineSpec = science(EngineSpec())
    checkpoint: CheckpointSpec = machine(CheckpointSpec())


Recipe = FamilyRecipe | TeacherRecipe


def recipe_hash(recipe: Recipe) -> str:
    """Twelve hex digits over the science keys."""
    values = _science_values(recipe)
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


# --- Rules across keys. Each gets the parts that validated, keyed by name, and yields what is wrong; missing parts are skipped. ---

Parts = Mapping[str, Any]


def _arch_rules(loc: Loc, spec: ArchSpec) -> Iterator[Problem]:
    """A free size needs its numbers; a catalogue name has them already."""
    vit, convnext = ("width", "depth", "heads"), ("depths", "widths")
    needed = {"vit": vit, "convnext": convnext}.get(spec.arch, ())
    for key in needed:
        if getattr(spec, key) is None:
            yield (*loc, "arch"), f"arch {spec.arch!r} is a free size: it needs {key!r}"
    optional = ("patch", "ffn", "ffn_width")
    allowed = {"vit": (*vit, *optional, "layerscale"), "convnext": (*convnext, "layerscale")}.get(
        spec.arch, ()
    )
    for key in (*vit, *optional, "layerscale", *convnext):
        if key not in allowed and getattr(spec, key) is not None:
            yield (*loc, key), f"{key!r} does not apply to arch {spec.arch!r}"
    if (
        spec.arch == "vit"
        and spec.width
        and spec.heads
        and (spec.width % spec.heads or spec.width // spec.heads % 4)
    ):
        yield (
            (*loc, "heads"),
            f"width {spec.width} over {spec.heads} heads: each needs a whole multiple of 4",
        )
    if (
        spec.arch == "convnext"
        and spec.depths
        and spec.widths
        and len(spec.depths) != len(spec.widths)
    ):
        yield (
            (*loc, "widths"),
            f"{len(spec.widths)} widths for {len(spec.depths)} depths: give one of each per stage",
        )
    if spec.arch == "convnext" and spec.depths is not None and len(spec.depths) < 2:
        yield (*loc, "depths"), "a ConvNeXt needs two stages at least"


def _crop_rules(crops: CropsSpec, spec: ArchSpec, whose: str) -> Iterator[Problem]:
    """Crops must be whole patches of every network that sees them."""
    if spec.arch == "convnext" and not spec.depths:
        return
    for key, crop in (("global", crops.global_), ("local", crops.local)):
        if crop.size % spec.stride and (key == "global" or crops.local.count):
            near = max(spec.stride, round(crop.size / spec.stride) * spec.stride)
            yield (
                ("crops", key, "size"),
                f"{crop.size} is not a multiple of {spec.stride} ({whose}) - did you mean {near}?",
            )


def _shared_rules(parts: Parts) -> Iterator[Problem]:
    if "crops" in parts:
        for key, crop in (("global", parts["crops"].global_), ("local", parts["crops"].local)):
            low, high = crop.scale
            if not 0.0 < low <= high <= 1.0:
                yield ("crops", key, "scale"), f"[{low}, {high}]: must satisfy 0 < low <= high <= 1"
    if "masks" in parts:
        low, high = parts["masks"].ratio
        if not 0.0 <= low <= high <= 1.0:
            yield ("masks", "ratio"), f"[{low}, {high}]: must satisfy 0 <= low <= high <= 1"
    if "schedule" in parts:
        schedule = parts["schedule"]
        bounds = schedule.rope_rescale
        if bounds is not None and not 0.0 < bounds[0] <= bounds[1]:
            yield ("schedule", "rope_rescale"), f"{list(bounds)}: must satisfy 0 < low <= high"
    if "engine" in parts:
        processes = parts["engine"].processes
        if processes != "auto" and processes < 1:
            yield ("engine", "processes"), f"{processes}: at least 1"
        if processes != "auto" and "schedule" in parts and processes > parts["schedule"].batch:
            batch = parts["schedule"].batch
            yield (
                ("schedule", "batch"),
                f"{batch} images for {processes} processes: at least one image each is needed",
            )
    if "data" in parts:
        for index, source in enumerate(parts["data"].sources):
            if source.path.startswith("builtin:") and source.path != "builtin:photographs":
                yield (
                    ("data", "sources", index, "path"),
                    f"{source.path!r}: the only built-in images are 'builtin:photographs'",
                )


def family_rules(parts: Parts) -> Iterator[Problem]:
    """Everything across keys that a family recipe can get wrong."""
    yield from _shared_rules(parts)
    seen: set[str] = set()
    for index, student in parts.get("students", {}).items():
        yield from _arch_rules(("students", index), student)
        if student.label in seen:
            yield (
                ("students", index),
                f"two students are called {student.label!r}: give one a 'name'",
            )
        if student.label == "teacher":
            yield ("students", index, "name"), "'teacher' is the teacher's name: choose another"
        seen.add(student.label)
        if student.ranks != "auto" and student.ranks < 1:
            yield ("students", index, "ranks"), f"{student.ranks}: at least 1, or auto"
        if "crops" in parts:
            yield from _crop_rules(parts["crops"], student, f"students.{index}: {student.label}")
    if "teacher" in parts:
        teacher = parts["teacher"]
        if (teacher.train is None) == (teacher.weights is None):
            yield ("teacher",), "give either 'train' (a teacher recipe) or 'weights' (a folder)"
        if teacher.heads is not None and teacher.weights is None:
            yield (
                ("teacher", "heads"),
                "'heads' goes with 'weights'; a trained teacher brings its own",
            )


def teacher_rules(parts: Parts) -> Iterator[Problem]:
    """Everything across keys that a teacher recipe can get wrong."""
    yield from _shared_rules(parts)
    if "model" in parts:
        model = parts["model"]
        yield from _arch_rules(("model",), model)
        if model.arch.startswith("convnext"):
            yield ("model", "arch"), f"{model.arch!r} has no mask token: a teacher must be a ViT"
        elif "crops" in parts:
            yield from _crop_rules(parts["crops"], model, f"patch of {model.arch}")
    before: dict[str, int] = {}
    for index, stage in parts.get("stages", {}).items():
        if stage.name in before or stage.name == "family":
            yield (
                ("stages", index, "name"),
                f"{stage.name!r} is taken: stages need different names, none 'family'",
            )
        if stage.gram is not None:
            yield from _gram_rules(("stages", index, "gram", "teacher"), stage.gram.teacher, before)
        before[stage.name] = stage.steps


def _gram_rules(loc: Loc, moment: str, before: Mapping[str, int]) -> Iterator[Problem]:
    match = re.fullmatch(r"([^@]+)@(\d+)", moment)
    if match is None:
        yield loc, f"{moment!r}: write an earlier stage and a step of it, such as 'base@200'"
        return
    name, step = match[1], int(match[2])
    if name not in before:
        yield (
            loc,
            f"{moment!r}: {name!r} is not an earlier stage (earlier: {', '.join(before) or 'none'})",
        )
    elif not 1 <= step <= before[name]:
        yield loc, f"{moment!r}: stage {name!r} has steps 1 to {before[name]}"


RULES: Mapping[type[Section], Callable[[Parts], Iterator[Problem]]] = {
    FamilyRecipe: family_rules,
    TeacherRecipe: teacher_rules,
}
