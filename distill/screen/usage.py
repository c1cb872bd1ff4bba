"""Where the code reads a key, found in the source: attribute reads on names whose section is known.

A name's section comes from its annotation, from an attribute of another known name, or from a loop over
one. Only what is found this way counts, so a key with a common name is not taken for read by chance.
"""

import ast
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path

from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.types import Section, section_in
from distill.screen.keys import Reads, declaring

Kinds = frozenset[type[Section]]
Named = Mapping[str, Kinds]
NONE: Kinds = frozenset()
LOOPS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)
PASSES_ON = {"enumerate", "zip", "sorted", "reversed", "list", "tuple", "next", "iter", "replace"}


def find_reads(texts: Mapping[str, str], *recipes: type[Section]) -> Reads:
    """Finds the modules that read each field, by the section that declares the field.

    Args:
        texts: source by path.
        recipes: the outermost sections.
    """
    trees = {path: ast.parse(text) for path, text in texts.items()}
    names = {kind.__name__: frozenset({kind}) for kind in _sections_below(recipes)}
    names["Recipe"] = frozenset(recipes)
    results = _annotated(trees.values(), names)
    reads: Reads = {}
    for _ in range(2):  # the second time with the attributes that were set in other modules
        for path, tree in trees.items():
            _Reader(names, results, path, reads).visit(tree)
    return reads


def reads_of_distill() -> Reads:
    """Finds the modules of the package ``distill`` that read each key of both recipes."""
    root = Path(str(files("distill")))
    texts = {
        f"distill/{path.relative_to(root).as_posix()}": path.read_text(encoding="utf-8")
        for path in sorted(root.rglob("*.py"))
    }
    texts = {path: text for path, text in texts.items() if "distill.recipe" in text}
    return find_reads(texts, FamilyRecipe, TeacherRecipe)


def _sections_below(kinds: Iterable[type[Section]]) -> set[type[Section]]:
    found: set[type[Section]] = set()
    for kind in kinds:
        bases = {base for base in kind.__mro__ if issubclass(base, Section)}
        inner = [section_in(field.annotation) for field in kind.model_fields.values()]
        found |= bases | _sections_below(section for section in inner if section is not None)
    return found - {Section}


def _annotated(trees: Iterable[ast.Module], names: Named) -> dict[str, Kinds]:
    """What functions return and attributes hold, by their name, as far as annotations say."""
    found: dict[str, Kinds] = {}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = found.get(node.name, NONE) | _of_annotation(node.returns, names)
        elif isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    name, kinds = item.target.id, _of_annotation(item.annotation, names)
                    found[name] = found.get(name, NONE) | kinds
    return found


def _of_annotation(annotation: ast.expr | None, names: Named) -> Kinds:
    kinds = NONE
    for node in ast.walk(annotation) if annotation is not None else ():
        if isinstance(node, ast.Name):
            kinds |= names.get(node.id, NONE)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = node.value.replace("|", " ").split()
            kinds |= NONE.union(*(names.get(word, NONE) for word in words))
    return kinds


class _Reader(ast.NodeVisitor):
    """Notes every read of a field in one module; ``_scope`` holds what each name is at this point."""

    def __init__(self, names: Named, results: dict[str, Kinds], path: str, reads: Reads) -> None:
        self._names, self._results, self._path, self._reads = names, results, path, reads
        self._fields = {
            field for kinds in names.values() for kind in kinds for field in kind.model_fields
        }
        self._scope: dict[str, Kinds] = {}
        self._class: Kinds = NONE

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self._class = self._class, self._names.get(node.name, NONE)
        self.generic_visit(node)
        self._class = before

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._bind(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if isinstance(node.target, ast.Name):
            self._scope[node.target.id] = _of_annotation(node.annotation, self._names)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self._bind(node.target, node.value)

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, node.iter)
        self.generic_visit(node)

    def visit(self, node: ast.AST) -> None:
        """Functions and comprehensions have names of theirs, which end with them."""
        before, self._scope = self._scope, dict(self._scope)
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                kinds = _of_annotation(argument.annotation, self._names)
                self._scope[argument.arg] = self._class if argument.arg == "self" else kinds
        elif isinstance(node, LOOPS):
            for loop in node.generators:
                self._bind(loop.target, loop.iter)
        else:
            self._scope = before
        super().visit(node)
        self._scope = before

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load) and node.attr in self._fields:
            for kind in self._kinds(node.value):
                if node.attr in kind.model_fields:
                    key = (declaring(kind, node.attr), node.attr)
                    self._reads.setdefault(key, set()).add(self._path)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple):
            values = [value] * len(target.elts)
            if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
                values = value.elts
            for each, part in zip(target.elts, values, strict=True):
                self._bind(each, part)
        elif isinstance(target, ast.Name):
            self._scope[target.id] = self._kinds(value)
        elif isinstance(target, ast.Attribute):
            held = self._results.get(target.attr, NONE)
            self._results[target.attr] = held | self._kinds(value)

    def _kinds(self, node: ast.expr) -> Kinds:
        """The sections that an expression may be, or may hold."""
        match node:
            case ast.Name(id=name):
                return self._scope.get(name, NONE)
            case ast.Attribute(value=value, attr=name):
                return self._kinds_of_attribute(self._kinds(value), name)
            case ast.Call(func=ast.Name(id=name), args=arguments):
                passed = NONE.union(*map(self._kinds, arguments)) if name in PASSES_ON else NONE
                return passed | self._names.get(name, NONE) | self._results.get(name, NONE)
            case ast.Call(func=ast.Attribute(value=value, attr="model_copy")):
                return self._kinds(value)
            case ast.Call(func=ast.Attribute(attr=name)):
                return self._results.get(name, NONE)
            case ast.IfExp(body=first, orelse=second):
                return self._kinds(first) | self._kinds(second)
            case ast.BoolOp(values=values) | ast.Tuple(elts=values) | ast.List(elts=values):
                return NONE.union(*map(self._kinds, values))
            case ast.Subscript(value=value) | ast.Starred(value=value) | ast.NamedExpr(value=value):
                return self._kinds(value)
            case ast.ListComp(elt=element) | ast.GeneratorExp(elt=element):
                return self._kinds_of_loop(node, element)
        return NONE

    def _kinds_of_attribute(self, holders: Kinds, name: str) -> Kinds:
        fields = [kind.model_fields[name] for kind in holders if name in kind.model_fields]
        if not fields:
            return self._results.get(name, NONE)
        inner = (section_in(field.annotation) for field in fields)
        return frozenset(section for section in inner if section is not None)

    def _kinds_of_loop(self, node: ast.ListComp | ast.GeneratorExp, element: ast.expr) -> Kinds:
        before, self._scope = self._scope, dict(self._scope)
        for loop in node.generators:
            self._bind(loop.target, loop.iter)
        kinds = self._kinds(element)
        self._scope = before
        return kinds
