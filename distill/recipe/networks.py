"""Keys that say which networks there are: shapes, heads, students, the family's teacher."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from distill.errors import RecipeError
from distill.recipe.types import (
    Arch,
    CatalogueName,
    Ints,
    Name,
    Section,
    arch_mapping,
    is_custom,
    machine,
    rank_range,
    ranks_or_range,
    science,
)
from students.shapes import CATALOG, STEM, BackboneSpec, ConvNeXtSpec
from teacher.shapes import ViTSpec

RESERVED_NETWORKS = ("teacher", "heads")


class ArchSpec(Section):
    """A network: a catalogue name, or a free size.

    ``untie_local_norm``: the class tokens of local crops have a separate final norm, in training only.
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
    ranks: Annotated[int | str, AfterValidator(ranks_or_range)] = machine("auto")

    @property
    def label(self) -> str:
        """Its name, by default its architecture's."""
        return self.name or self.arch

    @property
    def requested_ranks(self) -> int | range | None:
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
    ``arch`` names what the weights are, so that a plan can be made before they are there.
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
Student = Annotated[StudentSpec, BeforeValidator(arch_mapping)]
Model = Annotated[ArchSpec, BeforeValidator(arch_mapping)]
