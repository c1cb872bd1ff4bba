"""Keys of the weights that a network starts from, and what they must be to the keys around them."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import BeforeValidator

from distill.listing.document import Loc, Problem
from distill.recipe.types import Section, machine, science

INIT = "init"  # of `gram.teacher`: the weights that pretraining starts from


class LicenceSpec(Section):
    """What the user knows of a network's licence; it goes with everything that is made from the network."""

    name: str | None = machine(None, since=2, description="Its name: `apache-2.0`. Null: none.")
    file: str | None = machine(
        None, since=2, description="File of its text, copied beside every student. Null: none."
    )
    link: str | None = machine(None, since=2, description="Web address of its text. Null: none.")


def _named(key: str) -> BeforeValidator:
    """A bare text stands for a section with this key."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


Licence = Annotated[LicenceSpec, _named("name")]


class InitSpec(Section):
    """Weights that a network starts from in place of fresh ones; a resume ignores them."""

    from_: str = machine(
        alias="from",
        description="Folder or file of weights, in any layout of a teacher, or `RUN:NAME`: of a run.",
    )
    heads: str | None = machine(
        None,
        since=2,
        description="`none` for fresh heads, `beside` where they must lie beside the weights, or a file, which must fit. Null takes those that are there and fit.",
    )
    adapt: bool = science(
        False,
        since=2,
        description="Whether the patch embedding is resampled to another patch size (bicubic) and averaged to other input channels. The default refuses both.",
    )
    freeze_backbone: int = science(
        0,
        since=2,
        ge=0,
        description="Steps at the start that train only heads or projectors. The default 0 trains all.",
    )
    licence: Licence | None = machine(
        None,
        since=2,
        description="Licence of weights whose folder states none; a bare text is its name. Null means: as stated.",
    )
    fingerprint: str | None = science(
        None,
        since=2,
        description="Checksum of the files, noted by a start; one that is given must be theirs. Null means any.",
    )


Init = Annotated[InitSpec, _named("from")]


def gram_rules(
    key_path: Loc, reference: str, before: Mapping[str, int | None], *, has_init: bool
) -> Iterator[Problem]:
    """The anchor is an average of an earlier stage (``before``: steps of each), or what pretraining starts from."""
    if reference == INIT:
        if not has_init:
            yield key_path, "'init': the model starts from no weights; write model.init"
        return
    match = re.fullmatch(r"([^@]+)@([0-9]+)", reference)
    if match is None:
        yield (
            key_path,
            f"{reference!r}: write an earlier stage and a step of it, such as 'base@200', or 'init'",
        )
        return
    name, step = match[1], int(match[2])
    if name not in before:
        earlier = ", ".join(before) or "none"
        yield key_path, f"{reference!r}: {name!r} is not an earlier stage (earlier: {earlier})"
        return
    num_steps = before[name]
    if num_steps is not None and not 1 <= step <= num_steps:
        yield key_path, f"{reference!r}: stage {name!r} has steps 1 to {num_steps}"
