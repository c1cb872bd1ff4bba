"""Rules about the tree itself."""

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.covered_by import COVERED_BY

ROOT = Path(__file__).parent.parent
# Top to bottom: a package imports only from packages below it.
ORDER = (
    "distill.__main__",
    "distill.cli",
    "distill.launch",
    "distill.bench",
    "distill.curation",
    "distill.report",
    "distill.evaluate",
    "distill.job",
    "distill.protocols",
    "distill.screen",
    "distill.export",
    "distill.train",
    "distill.plan",
    "distill.engine",
    "distill.weights",
    "distill.recipe",
    "distill.data",
    "distill.listing",
    "distill.runfolder",
    "students",
    "teacher",
    "distill.errors",
)
MOST_FLOORS = 10
MOST_ROOMS = 20  # packages of the product: those of distill/, teacher/ and students/
MOST_LINES_OF_A_PACKAGE = 3000
MOST_LINES_OF_A_MODULE = 400
MOST_LINES_OF_A_FUNCTION = 60
MOST_PARAMETERS = 7  # beside self; a command has one for each of its options, a kernel of Triton for each pointer and size
FLAT = {"__init__.py", "__main__.py", "errors.py"}  # all that lies in distill/ itself
# Files that set an attribute of another object, and whose it is
SETS_FROM_OUTSIDE = {
    "distill/bench/compiled_work.py": "a part of a network that is counted, and inductor's last step",
    "distill/cli/bench.py": "a table of rich",
    "distill/data/pack.py": "an entry of tarfile",
    "distill/engine/compiled.py": "the forward function of a block, and limits of torch's compiler",
    "distill/engine/deepspeed_private.py": "DeepSpeed",
    "distill/engine/added_up.py": "DeepSpeed",
    "distill/engine/engine.py": "DeepSpeed and torch's fused optimizer",
    "distill/launch/k8s.py": "options of ruamel's writer",
    "distill/screen/panel.py": "a table of rich",
    "distill/screen/tables.py": "tables of rich",
    "distill/engine/device.py": "switches of torch",
    "distill/train/faults.py": "a plain record of the same module",
    "distill/export/onnx.py": "a graph of onnx",
    "distill/export/graphs.py": "options of onnxruntime",
    "teacher/chunks.py": "the context of an autograd function",
    "teacher/kernels.py": "the context of an autograd function",
    "teacher/losses.py": "the context of an autograd function",
}
# Writes without the one writer of distill/runfolder/files.py: files that write so, and why they may
WRITES_PLAINLY = {
    "distill/launch/node_watch.py": "into the memory of a node",
    "distill/evaluate/dense_self_test.py": "into a temporary folder that nobody else reads",
    "distill/engine/local_ranks.py": "into a temporary folder that nobody else reads yet",
    "distill/bench/loader.py": "images of a temporary folder",
    "distill/data/index.py": "inside a folder that gets its name when it is synced",
    "distill/data/photographs.py": "inside a folder that gets its name when it is synced",
    "distill/export/convert.py": "inside a folder that gets its name when it is synced",
    "distill/export/export.py": "inside a folder that gets its name when it is synced",
}
FILES = [
    path
    for package in ("teacher", "students", "distill")
    for path in sorted((ROOT / package).rglob("*.py"))
]


# Outside distill/engine: files that name DeepSpeed without importing it, and why
NAMES_DEEPSPEED = {
    "distill/job/agreement.py": "compares its version, by its metadata",
    "distill/launch/doctor.py": "tries the import in a process of its own, and prints the version",
    "distill/runfolder/heartbeat.py": "tells frames of a collective by their folder",
}


def package_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "distill" else parts[0]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def arrows() -> dict[str, set[str]]:
    """Which packages each package imports from."""
    found: dict[str, set[str]] = {name: set() for name in ORDER}
    for path in FILES:
        own = package_of(module_of(path))
        if own == "distill.__init__":
            continue
        ours = {
            package_of(name)
            for name in imported(path)
            if name.split(".")[0] in {"distill", "students", "teacher"}
        }
        found[own] |= ours - {own}
    return found


def is_folder(name: str) -> bool:
    return (ROOT / name.replace(".", "/")).is_dir()


def floors(below: dict[str, set[str]]) -> dict[str, int]:
    """The length of the longest chain of imports under each package."""
    height: dict[str, int] = {}
    for name in reversed(ORDER):
        height[name] = 1 + max((height[other] for other in below[name]), default=0)
    return height


def test_packages__import_only_what_lies_below() -> None:
    below = arrows()
    for index, name in enumerate(ORDER):
        assert below[name] <= set(ORDER[index + 1 :]), f"{name} imports upward"
    rooms = {name: floor for name, floor in floors(below).items() if is_folder(name)}
    assert max(rooms.values()) <= MOST_FLOORS
    assert len(rooms) <= MOST_ROOMS


def test_packages__are_of_a_size_to_read_and_say_what_they_are_for() -> None:
    for name in ORDER:
        folder = ROOT / name.replace(".", "/")
        if not folder.is_dir():
            continue
        modules = [path for path in folder.rglob("*.py") if path.name != "__init__.py"]
        assert len(modules) > 1, f"{name} has one module only"
        lines = {path.name: len(path.read_text().splitlines()) for path in modules}
        assert sum(lines.values()) <= MOST_LINES_OF_A_PACKAGE, f"{name}: {sum(lines.values())}"
        longest = max(lines, key=lines.__getitem__)
        assert lines[longest] <= MOST_LINES_OF_A_MODULE, f"{name}/{longest}: {lines[longest]}"
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), name


def test_distill__has_no_logic_outside_its_packages() -> None:
    assert {path.name for path in (ROOT / "distill").glob("*.py")} == FLAT


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports__are_those_a_package_may_have(path: Path) -> None:
    names = {name.split(".")[0] for name in imported(path)}
    assert not names & {"torchvision", "timm", "transformers", "pickle", "yaml"}
    if path.relative_to(ROOT).parts[0] != "distill":
        assert not names & {"pathlib", "logging", "rich", "os"}, (
            "teacher and students touch no files and print nothing"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_annotations__are_not_postponed(path: Path) -> None:
    assert "from __future__ import annotations" not in path.read_text(), (
        "it disables the run-time shape checks"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions__are_short_and_take_little(path: Path) -> None:
    is_command = path.is_relative_to(ROOT / "distill" / "cli")
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        num_lines = (node.end_lineno or 0) - node.lineno + 1
        assert num_lines <= MOST_LINES_OF_A_FUNCTION, f"{node.name} has {num_lines} lines"
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
        is_free = is_command or any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
        assert is_free or len(names) <= MOST_PARAMETERS, f"{node.name} takes {len(names)}"


def test_groups__are_made_in_one_file() -> None:
    makers = {path.name for path in FILES if "new_group(" in path.read_text()}
    assert makers == {"groups.py", "nodes.py"}  # those of a job, and that of the doctor


def test_deepspeed__is_imported_behind_one_door() -> None:
    outside = [path for path in FILES if "distill/engine/" not in str(path)]
    for path in outside:
        assert not any(name.split(".")[0] == "deepspeed" for name in imported(path)), path
    naming = {str(path.relative_to(ROOT)) for path in outside if names_deepspeed(path)}
    assert naming == NAMES_DEEPSPEED.keys()


def test_attributes__are_set_by_their_own_class() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign)
        for each in (node.targets if isinstance(node, ast.Assign) else [node.target])
        for target in (each.elts if isinstance(each, ast.Tuple) else [each])
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) != "self"
    }
    assert found == SETS_FROM_OUTSIDE.keys()


def test_files__get_their_names_in_one_module() -> None:
    found = {str(path.relative_to(ROOT)): methods_called(path) for path in FILES}
    renaming = {path for path, calls in found.items() if calls & {"rename()", "replace()"}}
    assert renaming == {"distill/runfolder/files.py"}
    writing = {path for path, calls in found.items() if calls & {"write_text()", "write_bytes()"}}
    assert writing == WRITES_PLAINLY.keys()
    copying = {path for path, calls in found.items() if calls & {"copyfile()", "move()"}}
    assert copying == {"distill/export/convert.py"}


def methods_called(path: Path) -> set[str]:
    """Methods that a file calls; ``replace()`` stands for those of a path and of ``os``, not for a text's."""
    calls = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        is_of_text = node.func.attr == "replace" and len(node.args) >= 2
        if not is_of_text or ast.unparse(node.func.value) == "os":
            calls.add(f"{node.func.attr}()")
    return calls


def names_deepspeed(path: Path) -> bool:
    """Whether a text of the program, docstrings apart, names a module or folder of DeepSpeed."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return any(
        isinstance(node, ast.Constant) and "deepspeed" in str(node.value)
        for node in ast.walk(tree)
        if id(node) not in prose
    )


def modules() -> dict[str, Path]:
    """The modules of the product by name."""
    return {module_of(path): path for path in FILES if not path.name.startswith("__")}


def mirror_of(path: Path) -> Path:
    own = path.relative_to(ROOT)
    return ROOT / "tests" / own.parent / f"test_{own.name}"


def reached_by(test: Path) -> set[str]:
    """What a test imports: itself, through what tests share, and three modules of the product further: the command line, a verb, what it calls."""
    names, todo = set[str](), [test]
    while todo:
        for name in imported_names(todo.pop()) - names:
            names.add(name)
            file = ROOT / f"{name.replace('.', '/')}.py"
            if name.startswith("tests.") and file.is_file():
                todo.append(file)
    known = modules()
    for _ in range(3):
        names = names.union(*(imported_names(known[name]) for name in names & known.keys()))
    return names


@cache
def imported_names(path: Path) -> set[str]:
    """As ``imported``, and each name that is taken from a module: it may be a module."""
    taken = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return imported(path) | taken


def test_modules__are_found_from_their_test() -> None:
    without = {name for name, path in modules().items() if not mirror_of(path).is_file()}
    assert COVERED_BY.keys() == without, "tests/covered_by.py: one line for each of these modules"
    reached = {test: reached_by(ROOT / test) for test in set(COVERED_BY.values())}
    missed = {name: test for name, test in COVERED_BY.items() if name not in reached[test]}
    assert not missed, "these tests do not import the module"
