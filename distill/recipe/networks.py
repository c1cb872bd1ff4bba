"""Keys that say which networks there are: shapes, heads, students, the family's teacher."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from distill.errors import RecipeError
from distill.listing.outside_code import require_allowed
from distill.recipe.init_keys import Init, Licence
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
    """A network: a catalogue name, or a free size."""

    arch: Arch = science(
        description=(
            "Name of the network in the catalogue, `vit` or `convnext` for a free size, or a "
            "network from outside such as `timm:NAME`."
        )
    )
    width: int | None = science(
        None,
        ge=8,
        description="Channels of every token of a free `vit`. Null where the catalogue knows the size.",
    )
    depth: int | None = science(
        None,
        ge=1,
        description="Number of transformer blocks of a free `vit`. Null where the catalogue knows the size.",
    )
    heads: int | None = science(
        None,
        ge=1,
        description="Attention heads per block of a free `vit`; `width` over `heads` must be a multiple of 4. Null where the catalogue knows it.",
    )
    patch: int | None = science(
        None,
        ge=2,
        description="Side of a patch in pixels, for a ViT. Null means the catalogue's, or 16 for a free `vit`.",
    )
    ffn: Literal["mlp", "swiglu"] | None = science(
        None,
        description="Feed-forward layer of a free `vit`. Null means `mlp`, the layer of the small published networks.",
    )
    ffn_width: int | None = science(
        None,
        ge=8,
        description="Hidden channels of the feed-forward layer of a free `vit`. Null means 4 times `width`, as published.",
    )
    layerscale: float | None = science(
        None,
        gt=0.0,
        description="Initial LayerScale factor of a free size. Null means the published value: 1e-5 for `vit`, 1e-6 for `convnext`.",
    )
    norm_eps: float | None = science(
        None,
        since=3,
        gt=0.0,
        le=0.01,
        description="Epsilon of every LayerNorm. Null means the published value: 1e-5 for a ViT, 1e-6 for a ConvNeXt.",
    )
    key_bias: bool | None = science(
        None,
        since=3,
        description="Whether the keys of a ViT's attention have a bias, as queries and values have. Null means no, as published.",
    )
    untie_local_norm: bool | None = science(
        None,
        description="Whether class tokens of local crops have a separate final norm, in training only. Null means no.",
    )
    depths: Ints | None = science(
        None,
        description="Blocks in each stage of a free `convnext`, at least two stages. Null for every other network.",
    )
    widths: Ints | None = science(
        None,
        description="Channels in each stage of a free `convnext`, as many as `depths`. Null for every other network.",
    )
    args: dict[str, Any] | None = science(
        None,
        description="Keyword arguments for the factory of a network from outside. Null means none.",
    )
    init: Init | None = science(
        None,
        since=2,
        description="Weights that the network starts from; a bare text is where they are. Null means fresh ones.",
    )

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

            require_allowed(self.arch)

            try:
                return probe(self.arch, json.dumps(self.args or {}, sort_keys=True))
            except ValueError as error:
                fix = "See docs/custom-students.md for what a factory returns."
                raise RecipeError(str(error), fix=fix) from error
        stated: dict[str, Any] = {"norm_eps": self.norm_eps, "key_bias": self.key_bias}
        stated = {name: value for name, value in stated.items() if value is not None}
        if self.arch == "convnext":
            assert self.depths is not None and self.widths is not None, "checked by the rules"
            layerscale = self.layerscale or 1e-6
            return ConvNeXtSpec(self.depths, self.widths, layerscale_init=layerscale, **stated)
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
                **stated,
            )
        known = CATALOG[self.arch]
        if isinstance(known, ViTSpec):
            stated |= {"patch": self.stride, "untie_local_norm": bool(self.untie_local_norm)}
        return replace(known, **stated)  # type: ignore[type-var]  # the catalogue has dataclasses


class HeadSpec(Section):
    """One head: hidden width, bottleneck width, prototypes."""

    hidden: int = science(ge=1, description="Channels of the hidden layers of the head.")
    bottleneck: int = science(
        ge=1, description="Channels of the head's bottleneck, on which the prototypes are compared."
    )
    prototypes: int = science(ge=2, description="Number of prototypes, the outputs of the head.")


class HeadsSpec(Section):
    """Both heads of a teacher; the defaults are the 7B's."""

    dino: HeadSpec = science(
        HeadSpec(hidden=8192, bottleneck=512, prototypes=262_144),
        description="Head of the class token. The default is the 7B teacher's.",
    )
    ibot: HeadSpec = science(
        HeadSpec(hidden=4096, bottleneck=384, prototypes=98_304),
        description="Head of the masked patches. The default is the 7B teacher's.",
    )


class StudentHeadsSpec(Section):
    """Hidden widths of a student's heads; bottlenecks and prototypes are the teacher's."""

    dino_hidden: int = science(
        2048,
        ge=1,
        description="Channels of the hidden layers of the student's class head; the default is the published one.",
    )
    ibot_hidden: int = science(
        2048,
        ge=1,
        description="Channels of the hidden layers of the student's patch head; the default is the published one.",
    )


class StudentSpec(ArchSpec):
    """One student. ``lr`` replaces the schedule's peak; ``ranks`` is a number, ``FIRST-LAST``, or ``auto``."""

    name: Name | None = science(
        None,
        description="Name of the student's folder and metrics. Null means the name of its architecture.",
    )
    head_widths: StudentHeadsSpec = science(
        StudentHeadsSpec(),
        description="Hidden channels of the student's two heads; bottlenecks and prototypes are the teacher's.",
    )
    lr: float | None = science(
        None,
        gt=0.0,
        description="Peak learning rate of this student alone. Null means `schedule.lr.peak`.",
    )
    steps: int | None = science(
        None,
        ge=1,
        description="Steps after which this student is finished; its ranks only compute teacher targets from then on. Null means `schedule.steps`.",
    )
    koleo_group: int | None = science(
        None,
        since=3,
        ge=2,
        description="Images that KoLeo compares with each other, for this student alone. Null means `schedule.koleo_group`.",
    )
    crop_scale: float = science(
        1.0,
        gt=0.0,
        le=1.0,
        description="Fraction of every crop's side that the student gets. 1 is the full crop.",
    )
    ranks: Annotated[int | str, AfterValidator(ranks_or_range)] = machine(
        "auto",
        description="Number of ranks that train the student, or which ones, as FIRST-LAST. `auto` leaves both to the plan.",
    )

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

    steps: int = science(
        10_000,
        ge=1,
        description="Steps for which the heads are trained on the frozen teacher. The default is a starting point for catalogue sizes.",
    )
    lr: float = science(
        4.0e-4,
        gt=0.0,
        description="Peak learning rate of the heads; it falls to 0 along a cosine. The default is a starting point.",
    )  # falls to zero along a cosine
    warmup: int = science(
        500, ge=0, description="Steps in which the rate rises from 0 to its peak."
    )
    ema: float = science(
        0.994,
        ge=0.0,
        le=1.0,
        description="Momentum per step of the heads' average, which gives the targets. The default is the same as for a family.",
    )
    heads: HeadsSpec = science(
        HeadsSpec(), description="Sizes of the heads to fit. The defaults are the 7B teacher's."
    )


HeadsMode = Literal["file", "fit", "none"]


class TeacherSource(Section):
    """The family's teacher: a recipe to train it first, or its weights."""

    train: str | None = science(
        None,
        description="Teacher recipe that is trained first, relative to this file. Null where `weights` are given.",
    )
    weights: str | None = machine(
        None,
        description="Folder or file of the teacher's weights, any supported layout. Null where `train` is given.",
    )
    arch: CatalogueName | None = machine(
        None,
        description="Catalogue name of the weights, so that a plan can be made before the file is there. Null means: look into the file.",
    )
    heads: str | None = machine(
        None,
        description="File of the teacher's heads, `fit` to train them first, or `none` to learn from features. Null means the heads beside the weights.",
    )
    licence: Licence | None = machine(
        None,
        since=2,
        description="Licence of a teacher whose folder states none; a bare text is its name. Null means: as its folder states.",
    )
    fit: FitSpec = science(FitSpec(), description="How heads are trained, for `heads: fit`.")
    crop_scale: float = science(
        1.0,
        since=3,
        gt=0.0,
        le=1.0,
        description="Fraction of every crop's side that the teacher gets; masks and patch targets lie on the grid of that size. 1 is the full crop.",
    )

    @property
    def heads_mode(self) -> HeadsMode:
        """Where the heads come from."""
        return "file" if self.heads is None else HEADS_MODES.get(self.heads, "file")


HEADS_MODES: Mapping[str, HeadsMode] = {"fit": "fit", "none": "none"}
Student = Annotated[
    StudentSpec, BeforeValidator(arch_mapping, json_schema_input_type=StudentSpec | Arch)
]
Model = Annotated[ArchSpec, BeforeValidator(arch_mapping, json_schema_input_type=ArchSpec | Arch)]
