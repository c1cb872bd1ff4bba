"""What a set of tensors is: layout, shape and catalogue name, from names and shapes alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from distill.weights.layouts import Layout, renamed_vit, shapes
from students.custom import OUTER
from students.foreign import ForeignError, describe_foreign
from students.shapes import CATALOG, BackboneSpec, ConvNeXtSpec, CustomSpec
from teacher.shapes import ViTSpec

Shapes = Mapping[str, tuple[int, ...]]
HEAD_PREFIXES = ("dino_head.", "ibot_head.", "head.")
PERIODS = ("rope_embed.periods", "rope.periods", "rope_embeddings.inv_freq")  # Meta, timm, hf
RECIPROCAL_PERIODS = "inv_freq"
EXTRA_PREFIXES = ("local_cls_norm.", "projectors.", "norms.", "rope_embed.", *PERIODS[1:])
NESTED = "model."  # transformers 5 has it before blocks in memory, not in its files
ANCHORS = (  # a tensor of every backbone: of a ViT, of a ConvNeXt in the three layouts
    "cls_token",
    "stages.0.0.gamma",
    "stages.0.layers.0.gamma",
    "stages.0.blocks.0.gamma",
)
FIRST = frozenset({"teacher", "ema"})  # words of the prefix that is taken where there are several
NO_WEIGHTS = frozenset(
    {"exp", "momentum", "optimizer", "optim", "grad", "grads", "student", "gram"}
)
LARGEST_SIDE = 65_536  # of a tensor that can be part of a backbone here


@dataclass(frozen=True)
class Identity:
    """What a file's tensors are.

    ``prefix`` stands before every key of the backbone in the file; ``is_nested``: ``model.`` stands before its
    blocks, too. ``left_out``: stands before every name here, and not in the file. ``notes``: what else to report of the file.
    """

    layout: Layout
    spec: BackboneSpec
    arch: str | None
    prefix: str
    ignored: tuple[str, ...]
    has_heads: bool
    is_nested: bool = False
    notes: tuple[str, ...] = ()
    left_out: str = ""

    def stored_name(self, name: str) -> str:
        """The name in the file of a tensor of the backbone."""
        is_inside = self.is_nested and name.startswith(("layer.", "stages."))
        return f"{self.prefix}{NESTED if is_inside else ''}{name.removeprefix(self.left_out)}"


def identify(
    found: Shapes,
    spec: BackboneSpec | None = None,
    prefix: str | None = None,
    heads: int | None = None,
) -> Identity:
    """Layout, shape and catalogue name of the backbone among some tensors, from names and shapes alone.

    Args:
        found: shapes by name, as in the file.
        spec: from the config beside the file, if there is one.
        prefix: before the names of the backbone that is meant, where there are several.
        heads: of a ViT's attention, where something beside the file states it.

    Raises:
        ForeignError: they are of a network that is known and not ours.
        ValueError: there is no backbone among them, or several of equal right, its number of attention heads
            is ambiguous, or tensors are missing, unexpected or of another shape.
    """
    if isinstance(spec, CustomSpec):
        return _custom(found, spec)
    prefixes = _prefixes(found)
    prefix, notes = _choose(prefixes, prefix)
    inner, is_nested = _below(found, prefix, prefixes)
    layout = _layout(inner)
    other = describe_foreign(inner)
    if other is not None:
        raise ForeignError(*other)
    guessed = spec or _guess(inner, layout, heads)
    wanted = shapes(guessed, layout)
    extra = [name for name in inner if name not in wanted]
    ignored = [name for name in extra if _is_extra(name)]
    # a student's or an optimizer's tensors may stand beside the teacher's in a training file
    unexpected = [name for name in extra if not _is_extra(name)]
    missing = [name for name in wanted if name not in inner and not _is_optional(name)]
    misshapen = [name for name in wanted if name in inner and inner[name] != wanted[name]]
    if missing or unexpected or misshapen:
        raise ValueError(
            _difference(guessed, layout, inner, wanted, missing, unexpected, misshapen)
        )
    has_heads = all(
        any(
            (f"{head}." in name and "prototypes" in name) or f"{head}.last_layer" in name
            for name in found
        )
        for head in ("dino_head", "ibot_head")
    )
    arch = catalogue_name(guessed)
    return Identity(
        layout, guessed, arch, prefix, tuple(ignored), has_heads, is_nested=is_nested, notes=notes
    )


def _custom(found: Shapes, spec: CustomSpec) -> Identity:
    """Tensors of a network from outside: they fit its code, or not; under our names, or those of the factory's network."""
    wanted = shapes(spec, "hf")
    inner = {name.removeprefix(OUTER): shape for name, shape in wanted.items()}
    left_out = OUTER if inner.keys() == found.keys() else ""
    wanted = inner if left_out else wanted
    wrong = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
    if wrong:
        raise ValueError(f"{len(wrong)} tensors do not fit {spec.factory}, first {wrong[0]}")
    return Identity("hf", spec, None, "", (), has_heads=False, left_out=left_out)


def _is_extra(name: str) -> bool:
    return name.endswith(".bias_mask") or name.startswith((*EXTRA_PREFIXES, *HEAD_PREFIXES))


def _is_optional(name: str) -> bool:
    """Computed, or held twice: a file may leave it out."""
    return name == "rope_embed.periods" or name.endswith(".bias_mask") or name.startswith("norms.")


def periods_name(found: Shapes, identity: Identity) -> str | None:
    """The tensor of RoPE periods in the file, or of their reciprocals; None where it has none."""
    names_in_file = map(identity.stored_name, PERIODS)
    return next((name for name in names_in_file if name in found), None)


def _prefixes(found: Shapes) -> list[str]:
    """What stands before the keys of each backbone, in the order of the file.

    Raises:
        ForeignError: there is none, but a network that is known.
        ValueError: there is none.
    """
    stems = dict.fromkeys(
        name.removesuffix(anchor).removesuffix("embeddings.")
        for name in found
        for anchor in ANCHORS
        if name.endswith(anchor) and name.removesuffix(anchor)[-1:] in ("", ".", "/")
    )
    prefixes = [
        outer
        if (outer := stem.removesuffix(NESTED)) != stem
        and f"{outer}layer_norm.weight" in found
        and f"{stem}layer_norm.weight" not in found
        else stem
        for stem in stems
    ]
    of_weights = [prefix for prefix in prefixes if not words_of(prefix) & NO_WEIGHTS]
    if prefixes:
        return of_weights or [each for each in prefixes if "student" in words_of(each)] or prefixes
    other = describe_foreign(found)
    if other is not None:
        raise ForeignError(*other)
    raise ValueError("no backbone in it: neither a class token nor the blocks of a ConvNeXt")


def words_of(prefix: str) -> set[str]:
    """The words in what stands before a name in a file."""
    return set(re.split(r"[._/]", prefix))


def _choose(prefixes: list[str], wanted: str | None) -> tuple[str, tuple[str, ...]]:
    """The prefix of the backbone to take, and what to report of the choice.

    Raises:
        ValueError: none is the teacher's or an average's alone, or the one that is wanted is not there.
    """
    shown = " and ".join(repr(prefix) for prefix in prefixes)
    if wanted is not None:
        for prefix in prefixes:
            if prefix.rstrip("./") == wanted.rstrip("./"):
                return prefix, ()
        raise ValueError(f"no backbone under {wanted!r}; it has {shown}")
    first = [prefix for prefix in prefixes if words_of(prefix) & FIRST]
    if len(prefixes) == 1:
        return prefixes[0], ()
    if len(first) != 1:
        raise ForeignError(
            f"holds {len(prefixes)} backbones, under {shown}",
            "Choose one: `distill weights convert FILE FOLDER --to hf --prefix PREFIX`, and give FOLDER.",
        )
    return first[0], (
        f"holds backbones under {shown}: {first[0]!r} is taken (teacher or EMA first)",
    )


def _below(
    found: Shapes, prefix: str, prefixes: list[str]
) -> tuple[dict[str, tuple[int, ...]], bool]:
    """Tensors of one backbone by their names without the prefix, and whether its blocks are nested; others' backbones left out."""
    others = tuple(each for each in prefixes if each != prefix and each.startswith(prefix))
    inner = {
        name[len(prefix) :]: shape
        for name, shape in found.items()
        if name.startswith(prefix) and not (others and name.startswith(others))
    }
    nested = tuple(f"{NESTED}{part}" for part in ("layer.", "stages."))
    if not any(name.startswith(nested) for name in inner):
        return inner, False
    return {
        name.removeprefix(NESTED) if name.startswith(nested) else name: shape
        for name, shape in inner.items()
    }, True


def _layout(inner: Shapes) -> Layout:
    if "embeddings.cls_token" in inner or "stages.0.layers.0.gamma" in inner:
        return "hf"
    if "reg_token" in inner or "stages.0.blocks.0.gamma" in inner:
        return "timm"
    return "meta"


def _guess(inner: Shapes, layout: Layout, heads: int | None) -> BackboneSpec:
    """The shape that the tensors have, read from a few of them.

    Raises:
        ValueError: one that is needed is missing, or sizes are absurd.
    """
    if any(max(shape, default=1) > LARGEST_SIDE for shape in inner.values()):
        raise ValueError(f"a tensor with a side above {LARGEST_SIDE}: this is not a backbone")
    try:
        return (
            _guess_vit(inner, layout, heads)
            if any(name.endswith("cls_token") for name in inner)
            else _guess_convnext(inner, layout)
        )
    except (KeyError, IndexError) as error:
        raise ValueError(f"incomplete: {error} is not in it") from error


def _guess_vit(inner: Shapes, layout: Layout, heads: int | None) -> ViTSpec:
    block = "layer." if layout == "hf" else "blocks."
    depth = 1 + max((int(n.split(".")[1]) for n in inner if n.startswith(block)), default=-1)
    if depth < 1:
        raise ValueError("a class token but no transformer blocks")
    gates = {"hf": "layer.0.mlp.gate_proj", "meta": "blocks.0.mlp.w1", "timm": "blocks.0.mlp.fc1_g"}
    is_gated = f"{gates[layout]}.weight" in inner
    ffn: Literal["mlp", "swiglu"] = "swiglu" if is_gated else "mlp"
    renamed = {} if layout == "hf" else dict(renamed_vit(ViTSpec(64, 1, 1, 64, ffn=ffn), layout))

    def key(name: str) -> str:
        return name if layout == "hf" else renamed[name]

    width, channels, patch = inner[key("embeddings.patch_embeddings.weight")][:3]
    ffn_width = inner[key("layer.0.mlp.up_proj.weight")][0]
    bias = {"hf": "layer.0.attention.q_proj.bias", "meta": "blocks.0.attn.qkv.bias"}
    has_bias = bias.get(layout, "blocks.0.attn.q_bias") in inner
    has_key_bias = "layer.0.attention.k_proj.bias" in inner or "blocks.0.attn.k_bias" in inner
    spec = ViTSpec(
        width=width,
        depth=depth,
        heads=1 if width % 4 == 0 else width,
        ffn_width=ffn_width,
        patch=patch,
        ffn=ffn,
        qv_bias=has_bias,
        registers=inner[key("embeddings.register_tokens")][1],
        in_channels=channels,
        key_bias=has_key_bias,
    )
    return replace(spec, heads=heads or _num_heads(spec, inner))


def _num_heads(spec: ViTSpec, inner: Shapes) -> int:
    """Attention heads: no weight's shape shows them; Meta's RoPE periods and the catalogue do."""
    for name in PERIODS:
        if name in inner:
            return spec.width // (4 * inner[name][0])
    for known in CATALOG.values():
        if isinstance(known, ViTSpec) and known.width == spec.width:
            return known.heads
    raise ValueError(
        f"a ViT of width {spec.width}: the number of attention heads cannot be read from its tensors; "
        "put the config.json of its Hugging Face folder beside the file"
    )


def _guess_convnext(inner: Shapes, layout: Layout) -> ConvNeXtSpec:
    infix = {"hf": "layers.", "meta": "", "timm": "blocks."}[layout]
    depths: list[int] = []
    widths: list[int] = []
    while f"stages.{len(depths)}.{infix}0.gamma" in inner:
        stage, depth = len(depths), 0
        while f"stages.{stage}.{infix}{depth}.gamma" in inner:
            depth += 1
        depths.append(depth)
        widths.append(inner[f"stages.{stage}.{infix}0.gamma"][0])
    stem = {
        "hf": "stages.0.downsample_layers.0.weight",
        "meta": "downsample_layers.0.0.weight",
        "timm": "stem.0.weight",
    }[layout]
    return ConvNeXtSpec(tuple(depths), tuple(widths), in_channels=inner[stem][1])


def catalogue_name(spec: BackboneSpec) -> str | None:
    """The name of a published shape; LayerScale's start does not count."""
    for name, known in CATALOG.items():
        if type(known) is type(spec) and _sizes(known) == _sizes(spec):
            return name
    return None


def _sizes(spec: BackboneSpec) -> dict[str, Any]:
    return {key: value for key, value in vars(spec).items() if key != "layerscale_init"}


def _difference(
    spec: BackboneSpec,
    layout: Layout,
    inner: Shapes,
    wanted: Shapes,
    missing: list[str],
    unexpected: list[str],
    misshapen: list[str],
) -> str:
    """One line: how many tensors do not fit, the first of each kind, and what the network looks like."""
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({missing[0]})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({unexpected[0]})")
    if misshapen:
        first = misshapen[0]
        shape, needed = list(inner[first]), list(wanted[first])
        parts.append(f"{len(misshapen)} of another shape ({first}: {shape}, expected {needed})")
    arch = catalogue_name(spec)
    close = [
        name
        for name, known in CATALOG.items()
        if type(known) is type(spec) and _last(known) == _last(spec)
    ]
    like = arch or (f"like {' or '.join(close)}" if close else "of no catalogue size")
    return f"looks like a {layout} file of a network {like}, but tensors do not fit: {', '.join(parts)}"


def _last(spec: BackboneSpec) -> int:
    return spec.width
