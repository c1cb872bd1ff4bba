"""The tasks that want class labels: name, what is printed, and what computes them. A task is added by one entry here.

Each is a function of a ``Sample`` alone, so that the features of a network are computed once for all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill.errors import RecipeError
from distill.protocols.dense_tasks import DENSE
from distill.protocols.few_shot import score_few_shot
from distill.protocols.knn_protocols import score_knn
from distill.protocols.linear import score_linear
from distill.protocols.logistic import score_logistic
from distill.protocols.retrieval import score_retrieval
from distill.protocols.score import Run

AGREEMENT = "agreement"  # wants no labels: distill.protocols.closeness
COST = "cost"  # wants none either: distill.evaluate.cost


@dataclass(frozen=True)
class Task:
    """``is_quick``: seconds at most, so that the untrained copies are scored too."""

    words: str
    run: Run
    is_quick: bool = True


TASKS: Mapping[str, Task] = {
    "knn": Task("k-NN", score_knn),
    "logistic": Task("logistic regression", score_logistic),
    "fewshot": Task("few-shot k-NN", score_few_shot),
    "linear": Task("linear probe", score_linear, is_quick=False),
    "retrieval": Task("retrieval", score_retrieval),
}
NAMES = (AGREEMENT, COST, *TASKS, *DENSE)
USUAL = (AGREEMENT, "knn")


def chosen_tasks(names: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """The tasks that are known, each once and in the order of the table, and a line for every name that is not.

    Raises:
        RecipeError: none is known.
    """
    unknown = [name for name in dict.fromkeys(names) if name not in NAMES]
    lines = [f"--tasks {name}: not known, there are {', '.join(NAMES)}" for name in unknown]
    known = tuple(name for name in NAMES if name in names)
    if not known:
        raise RecipeError("; ".join(lines) or "--tasks: names none", fix="Name one of them.")
    return known, lines
