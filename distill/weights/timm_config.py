"""What timm's ``config.json`` holds of a network beyond the tensors beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from teacher.shapes import ROPE_BASE

# arguments that change nothing about the features of a loaded network
_HARMLESS = frozenset(
    {
        "drop_path_rate",
        "drop_rate",
        "dynamic_img_size",
        "global_pool",
        "img_size",
        "in_chans",
        "num_classes",
    }
)


@dataclass(frozen=True)
class TimmArgs:
    """Arguments that a ViT is built with; ``heads`` is None where the name of the network stands for it."""

    heads: int | None = None
    rope_base: float = ROPE_BASE


def read_timm_args(config: Mapping[str, Any]) -> TimmArgs:
    """The arguments in a config of timm.

    Raises:
        ValueError: one asks for something these networks do not do.
    """
    args = config.get("model_args") or {}
    if not isinstance(args, dict):
        raise ValueError(f"model_args of {config['architecture']} are no object")
    unknown = args.keys() - _HARMLESS - {"num_heads", "rope_temperature"}
    if unknown:
        key = min(unknown)
        raise ValueError(f"model_args.{key} = {args[key]!r}: not known to these networks")
    heads, base = args.get("num_heads"), args.get("rope_temperature", ROPE_BASE)
    if not isinstance(heads, int | None) or not isinstance(base, int | float) or base < 1:
        raise ValueError(f"model_args: num_heads = {heads!r}, rope_temperature = {base!r}")
    return TimmArgs(heads, float(base))
