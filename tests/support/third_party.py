"""THIRD_PARTY.md from the metadata of the installed packages: ``python -m tests.support.third_party``.

A row for every direct dependency of pyproject.toml. The version is the one of constraints.txt; the
licence is copied from the package's own metadata, as it is written there, and of an extra that is not
installed it stays as the page has it.
"""

import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
PROJECT = "distill-family"
HEAD = """\
# Third-party software

`python -m tests.support.third_party` writes this page; a test compares it with pyproject.toml and with the installed packages.

The wheel holds no code, weights or images of others.
These packages are installed beside it; each licence is written as the package's own metadata states it.
Packages that these need in turn have licences of their own; `pip show PACKAGE` prints them.

"""
TAIL = """
## Not a package

| what | where it comes from | terms |
| --- | --- | --- |
| photographs of the quickstart, and the pictures in `docs/` made from them | the data folder of scikit-image, listed in `distill/data/photographs.py` | stated for each file in the documentation of `skimage.data` ([licences](docs/licences.md#photographs)) |
| weights of released teachers | files that you bring; none is shipped or downloaded | the licence beside the file; it goes with every student and export ([licences](docs/licences.md)) |
| the method | DINOv3, [arXiv 2508.10104](https://arxiv.org/abs/2508.10104) | a publication; all code here is written anew |
"""


def direct_dependencies() -> dict[str, str]:
    """Name to extra of every direct dependency; those that are always installed have the extra ``""``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    names: dict[str, str] = {}
    for extra, lines in groups.items():
        for name in (Requirement(line).name for line in lines):
            if name != PROJECT:
                names.setdefault(name, extra)
    return names


def licence_of(name: str) -> str:
    """The licence that the installed package states: expression, else classifier, else one line of text."""
    try:
        fields = metadata(name)
    except PackageNotFoundError:  # an extra that this environment lacks: as it stands on the page
        return written_licences()[name]
    if fields.get("License-Expression"):
        return str(fields["License-Expression"])
    kinds = [
        line.rpartition(" :: ")[2]
        for line in fields.get_all("Classifier") or ()
        if line.startswith("License :: ")
    ]
    return " AND ".join(kinds) or str(fields.get("License") or "none stated").splitlines()[0]


def written_licences() -> dict[str, str]:
    """Package to licence as THIRD_PARTY.md has them."""
    lines = (ROOT / "THIRD_PARTY.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| ")]
    return {row[1]: row[4] for row in rows if len(row) == 6}


def pinned_versions() -> dict[str, str]:
    """Package to version as in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().split()
    return dict(line.split("==") for line in lines)


def table() -> dict[str, str]:
    """Package to its row of the page."""
    versions = pinned_versions()
    return {
        name: f"| {name} | {f'extra `{extra}`' if extra else 'always'} | {versions[name]} | {licence_of(name)} |"
        for name, extra in direct_dependencies().items()
    }


def page() -> str:
    """The whole text of THIRD_PARTY.md."""
    head = "| package | installed | version | licence |\n| --- | --- | --- | --- |\n"
    return HEAD + head + "\n".join(table().values()) + "\n" + TAIL


if __name__ == "__main__":
    (ROOT / "THIRD_PARTY.md").write_text(page())
