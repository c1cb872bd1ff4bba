"""What a simulation assumes, from the texts in which people write it: ``2%``, ``7.9h/1024``, ``restart=60``."""

import re
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from distill.errors import RecipeError

if TYPE_CHECKING:
    from distill.bench.simulate import Assumptions, Chances

SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)"
MOST_JITTER, MOST_DAYS = 1.0, 3650.0


def chances_of(
    jitter: str | None, mtbf: str | None, days: float | None, seed: int | None
) -> "Chances":
    """What is simulated, from the texts of the options.

    Raises:
        RecipeError: a text that cannot be read, or a number out of bounds.
    """
    from distill.bench.simulate import Chances

    text = "30" if days is None else f"{days:g}"
    if not 0.0 < float(text) <= MOST_DAYS:
        raise RecipeError(
            f"--days {text}: not above 0 and at most {MOST_DAYS:.0f}", fix="Write --days 30."
        )
    return Chances(
        read_jitter(jitter or "2%"), _mtbf_s(mtbf or "7.9h/1024"), float(text), seed or 0
    )


def read_jitter(text: str) -> float:
    """The part that ``2%`` is.

    Raises:
        RecipeError: it is no percentage from 0 to 100.
    """
    match = re.fullmatch(NUMBER + r"\s*%", text)
    if match is None or float(match[1]) > 100 * MOST_JITTER:
        fix = "Write --jitter 2%."
        raise RecipeError(f"--jitter {text}: not a percentage from 0% to 100%", fix=fix)
    return float(match[1]) / 100.0


def _mtbf_s(text: str) -> float:
    """Mean seconds between failures of one GPU, from ``7.9h/1024``."""
    match = re.fullmatch(NUMBER + r"\s*(s|min|h|d)\s*/\s*(\d{1,9})", text)
    if match is None or not float(match[1]) or not int(match[3]):
        raise RecipeError(
            f"--mtbf {text}: not TIME/GPUS, a time above 0 in s, min, h or d for so many GPUs",
            fix="Write --mtbf 7.9h/1024.",
        )
    return float(match[1]) * SECONDS[match[2]] * int(match[3])


def assumptions_of(texts: list[str]) -> "Assumptions":
    """The assumptions, with those of the texts in their place.

    Raises:
        RecipeError: a name that is not known, or no number above 0 (a time may be 0).
    """
    from distill.bench.simulate import Assumptions

    known = [field.name for field in fields(Assumptions)]
    assumed = Assumptions()
    for text in texts:
        name, _, number = text.partition("=")
        may_be_zero = name in ("detect", "restart", "requeue")
        is_number = re.fullmatch(NUMBER, number) is not None
        if name not in known or not is_number or not (float(number) or may_be_zero):
            raise RecipeError(
                f"--assume {text}: not NAME=NUMBER with one of {', '.join(known)}",
                fix="Write --assume restart=60 (seconds) or --assume copy=6.8 (GB/s).",
            )
        assumed = replace(assumed, **{name: float(number)})
    return assumed
