import pytest

from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.types import Section, machine
from distill.screen.keys import declaring
from distill.screen.usage import _sections_below, find_reads, reads_of_distill


class Inner(Section):
    read: int = machine(1, description="read")
    unread: int = machine(1, description="not read")


class Toy(Section):
    inner: Inner = machine(Inner(), description="a section")
    many: tuple[Inner, ...] = machine((), description="sections")
    name: str = machine("", description="a common name")


READS = """
class Holder:
    toy: Toy
    def total(self, other):
        return self.toy.inner.read + other.unread + other.name
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (READS, {"inner", "read"}),
        ("def f(x: Toy): return x.name", {"name"}),
        ("def f(x: 'Toy | None'): return x.name", {"name"}),
        ("def f(x): return x.name", set()),
        ("def f(path): return path.name", set()),
        ("def f(x: Toy): x.name = 1", set()),
        ("def f(x: Toy):\n    part = x.inner\n    return part.unread", {"inner", "unread"}),
        ("def f(x: Toy): return [i.read for i in x.many if i.unread]", {"many", "read", "unread"}),
        ("def f(x: Toy):\n    for n, i in enumerate(x.many): g(i.read)", {"many", "read"}),
        ("def f(x: Toy): return lambda: x.inner", {"inner"}),
        ("def g() -> Toy: ...\ndef f(): return g().name", {"name"}),
        ("class A:\n    def __init__(self, x: Toy): self.held = x\n"
         "    def f(self): return self.held.name", {"name"}),
    ],
)  # fmt: skip
def test_find_reads__of_names_whose_section_is_known(text: str, found: set[str]) -> None:
    assert {name for _, name in find_reads({"a.py": text}, Toy)} == found


KEYS = sorted(
    {
        (declaring(kind, name), name)
        for kind in _sections_below([FamilyRecipe, TeacherRecipe])
        for name in kind.model_fields
    },
    key=lambda key: (key[0].__name__, key[1]),
)


def test_keys__every_one_is_read_by_something() -> None:
    reads = reads_of_distill()
    assert len(KEYS) > 100
    assert [f"{kind.__name__}.{name}" for kind, name in KEYS if not reads.get((kind, name))] == []
