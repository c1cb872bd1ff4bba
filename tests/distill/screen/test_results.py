import io
from typing import Any

from rich.console import Console

from distill.screen.results import (
    agreement_lines,
    agreement_table,
    conclusion_lines,
    print_results,
    tasks_table,
)

NEAR = {"mutual_knn": 0.5, "cka": 0.75, "cosine": 0.25, "effective_rank": 12.3}
BOTH = {"class": NEAR, "patch": NEAR}
SUMMARY: dict[str, Any] = {
    "teacher": {"knn": 0.8},
    "students": {"small": {"knn": 0.7, "loss": 2.0}},
    "agreement": {
        "reference": "teacher",
        "images": 764,
        "part": "held_out",
        "k": 10,
        "chance": 0.0131,
        "networks": {
            "teacher": {"class": {"effective_rank": 9.0}, "untrained": BOTH},
            "small": {**BOTH, "untrained": BOTH},
        },
        "floors": {"pixels": {"class": NEAR}},
    },
    "scores": {
        "small": {
            "knn": {
                "protocol": "dinov3",
                "value": 0.7,
                "interval": [0.65, 0.75],
                "untrained": 0.4,
                "settings": {"k": 20, "temperature": 0.07, "by_k": {"10": 0.6}},
            },
            "linear": {"reason": "too few"},
        },
        "large": {
            "knn": {
                "protocol": "dinov3",
                "value": 0.8,
                "interval": None,
                "settings": {"k": 10, "temperature": 0.07},
            },
        },
    },
    "conclusion": {"text": "Every network is better.", "reason": "figures", "next": "Nothing."},
}


def shown(value: object, width: int = 160) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(value)
    return file.getvalue().splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("│")[1:-1]]


def test_agreement_table__has_every_figure_beside_its_floors() -> None:
    lines = shown(agreement_table(SUMMARY["agreement"]), 80)  # as wide as a terminal
    rows = {cells(line)[0]: cells(line)[1:] for line in lines if "│" in line}
    assert rows["small"] == ["0.500", "0.750", "0.250", "12.3"] * 2
    assert rows["teacher"] == ["-", "-", "-", "9.0"] + ["-"] * 4
    assert rows["raw pixels"] == ["0.500", "0.750", "0.250", "12.3"] + ["-"] * 4
    assert "764 held-out images, no labels" in lines[0]
    unlabelled = agreement_table({**SUMMARY["agreement"], "part": "images"})
    assert "on 764 images, no labels" in shown(unlabelled, 80)[0]


def test_agreement_lines__one_for_each_student() -> None:
    assert agreement_lines(SUMMARY) == [
        "agreement of small with teacher: 0.500 of nearest neighbours (untrained 0.500, raw pixels 0.500)"
    ]
    assert agreement_lines({}) == [] == agreement_lines({"agreement": {"reason": "few"}})


def test_tasks_table__names_the_protocol_beside_each_figure() -> None:
    table = tasks_table(SUMMARY)
    assert table is not None
    rows = [cells(line) for line in shown(table) if "│" in line]
    assert rows == [
        ["k-NN", "dinov3", "small", "0.700", "0.650 to 0.750", "0.400", "k 20"],
        ["k-NN", "dinov3", "large", "0.800", "-", "-", "k 10"],
        ["linear probe", "-", "small", "-", "-", "-", "too few"],
    ]
    assert shown(table)[-1].strip() == "k-NN: temperature 0.07"
    assert tasks_table({"scores": {"small": {}}}) is None


def test_print_results__agreement_comes_first_and_the_conclusion_last() -> None:
    file = io.StringIO()
    print_results(Console(file=file, width=160), SUMMARY)
    text = file.getvalue()
    parts = [
        "agreement with teacher",
        "k-NN on held-out",
        "95% intervals",
        "Every network",
        "next:",
    ]
    assert sorted(text.index(part) for part in parts) == [text.index(part) for part in parts]
    assert conclusion_lines({}) == [] == conclusion_lines({"conclusion": None})
    file = io.StringIO()
    print_results(Console(file=file, width=160), {"agreement": {"reason": "12 images are too few"}})
    assert "no agreement: 12 images are too few" in file.getvalue()
