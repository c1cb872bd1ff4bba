"""Keys of installed packages in a recipe: ``extensions: {NAME: {...}}``, each a section of that package.

A package declares its keys as distill does, with ``science`` and ``machine``, and names the section by an
entry point of the group ``distill.keys``. A recipe that names it is read into a model that has the section
as a part, so mistakes are reported at their line, and science keys are in the recipe's hash.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ConfigDict, create_model

from distill.errors import RecipeError
from distill.listing.extensions import ExtensionKind, find, require
from distill.recipe.types import Section, science, section_in

Of = TypeVar("Of", bound=Section)


class Extensions(Section):
    """The sections that a recipe names."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})


def extensions_key() -> Any:
    """Declares the key ``extensions``."""
    return science(
        None,
        since=2,
        description="Keys of installed packages, a section for each name. Null means none.",
    )


class Unread(Section):
    """The section of a package that was not imported: any key."""

    model_config = ConfigDict(extra="allow")


def unread_section(name: str) -> type[Section]:
    """Returns a section that takes any key, for the name of an installed package; imports nothing.

    Raises:
        RecipeError: the name is not known.
    """
    require(ExtensionKind.KEYS, name, "extensions")
    return Unread


def find_section(name: str) -> type[Section]:
    """Imports and returns the section of an installed package.

    Raises:
        RecipeError: it is not known, cannot be imported, or is no section of declared keys.
    """
    found = find(ExtensionKind.KEYS, name, "extensions")
    is_section = isinstance(found, type) and issubclass(found, Section)
    if not is_section or not name.isidentifier() or not _are_declared(found):
        raise RecipeError(
            f"extensions = {name}: not a Section whose every key is declared with science() or machine()",
            fix="See docs/extending.md for what its package has to define.",
        )
    return found


def _are_declared(section: type[Section]) -> bool:
    for field in section.model_fields.values():
        inner, extra = section_in(field.annotation), field.json_schema_extra
        if not isinstance(extra, dict) or "role" not in extra or not field.description:
            return False
        if inner is not None and not _are_declared(inner):
            return False
    return True


def with_sections(kind: type[Of], sections: Mapping[str, type[Section]]) -> type[Of]:
    """Returns a kind of recipe that has sections of installed packages under ``extensions``."""
    fields: dict[str, Any] = {
        name: (section, science(description="Keys of an installed package."))
        for name, section in sections.items()
    }
    inside: Any = create_model("Extensions", __base__=Extensions, **fields)
    return create_model(kind.__name__, __base__=kind, extensions=(inside | None, extensions_key()))
