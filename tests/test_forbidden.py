"""Forms that run code from a file, or that could: none is in the three packages."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    path
    for package in ("teacher", "students", "distill")
    for path in sorted((ROOT / package).rglob("*.py"))
]
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile"}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name or attribute; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else f".{node.attr}"
    return ""


def forbidden(source: str) -> list[str]:
    return [
        f"line {node.lineno}: {reason}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Attribute | ast.Name | ast.Call)
        for reason in reasons(node)
    ]


def reasons(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (f"import {a.name}" for a in node.names if a.name.split(".")[0] in PICKLES)
    elif isinstance(node, ast.ImportFrom):
        names = {(node.module or "").split(".")[0], *(alias.name for alias in node.names)}
        yield from (f"import {name}" for name in sorted(names & PICKLES))
        hidden = {alias.name for alias in node.names if alias.name.endswith("_object_list")}
        yield from (f"import {name}" for name in sorted(hidden))
        if node.module == "torch" and any(alias.name == "load" for alias in node.names):
            yield "torch.load under another name"
    elif isinstance(node, ast.Attribute | ast.Name):
        name = node.attr if isinstance(node, ast.Attribute) else node.id
        if name.endswith("_object_list") or name in ("all_gather_object", "gather_object"):
            yield f"{name} pickles"
    elif isinstance(node, ast.Call):
        yield from call_reasons(node)


def call_reasons(node: ast.Call) -> Iterator[str]:
    name = dotted(node.func)
    last = name.rpartition(".")[2]
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in CALLS or (name.startswith("builtins.") and last in CALLS):
        yield f"{name}()"
    if name == "torch.load" and not is_true(given.get("weights_only")):
        yield "torch.load without weights_only=True"
    if last in ("load", "load_all") and name.split(".")[0] in ("yaml", "pyyaml"):
        yield f"{name}()"
    if last == "YAML" and is_unsafe(given.get("typ"), node.args):
        yield "a YAML reader that builds objects"
    is_method = isinstance(node.func, ast.Attribute)
    if is_method and last in ("extract", "extractall") and not is_safe_filter(given.get("filter")):
        yield f"{last}() without filter='data'"
    if name in ("numpy.load", "np.load") and not is_false(given.get("allow_pickle")):
        yield "numpy.load without allow_pickle=False"


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def is_false(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def is_safe_filter(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value == "data"


def is_unsafe(keyword: ast.expr | None, positional: list[ast.expr]) -> bool:
    """The safe readers are the default, which builds no objects, and ``safe``."""
    value = keyword or (positional[0] if positional else None)
    return value is not None and not (
        isinstance(value, ast.Constant) and value.value in ("rt", "safe")
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages__hold_nothing_that_runs_what_it_reads(path: Path) -> None:
    assert forbidden(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import dill",
        "from six.moves import cPickle",
        "def f():\n    import marshal",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "torch.load(path, **options)",
        "from torch import load",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.load_all(text)",
        "YAML(typ='unsafe')",
        "ruamel.yaml.YAML('full')",
        "eval(text)",
        "exec(text)",
        "builtins.eval(text)",
        "compile(text, '', 'exec')",
        "tarfile.open(path).extractall(folder)",
        "archive.extractall(folder)",
        "archive.extract(member, filter='fully_trusted')",
        "archive.extractall(folder, filter=chosen)",
        "dist.broadcast_object_list(items)",
        "dist.scatter_object_list(a, b)",
        "torch.distributed.all_gather_object(a, b)",
        "from torch.distributed import broadcast_object_list",
        "send = dist.send_object_list",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_forbidden__finds_each_form(source: str) -> None:
    assert len(forbidden(source)) >= 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, map_location='cpu', weights_only=True, mmap=True)",
        "YAML().load(text)",
        "YAML(typ='safe').load(text)",
        "archive.extractall(folder, filter='data')",
        "np.load(path, mmap_mode='r', allow_pickle=False)",
        "backbone.eval()",
        "re.compile(pattern)",
        "dist.broadcast(tensor, src=0)",
        "frozen = backbone.requires_grad_(False).eval()",
    ],
)
def test_forbidden__passes_what_is_safe(source: str) -> None:
    assert forbidden(source) == []
