from typing import Any

import torch

from distill.evaluate.conclusion import Voted, conclude_by_closeness, conclude_by_labels

LABELS = torch.arange(400) % 8


def voted(fraction: float, seed: int = 0) -> Voted:
    right = torch.rand(400, generator=torch.Generator().manual_seed(seed)) < fraction
    return Voted(float(right.double().mean()), right)


def test_conclude__no_better_than_colours_has_its_reason_and_a_next_move() -> None:
    """The run that ended without a word: teacher 0.254, colours 0.299, raw pixels 0.233."""
    floors = {"pixels": voted(0.23, 1), "colour": voted(0.30, 2)}
    networks = {"teacher": voted(0.25, 3), "small": voted(0.28, 4)}
    untrained = {"teacher": voted(0.2, 5), "small": voted(0.2, 6)}
    found = conclude_by_labels(networks, untrained, floors, LABELS)
    assert found.text == (
        "No network is better than the best of colours, raw pixels and an untrained copy."
    )
    teacher = found.networks["teacher"]
    assert teacher["floor"] == "colour" and not teacher["is_better"]
    assert teacher["difference"] == networks["teacher"].value - floors["colour"].value
    assert "k-NN on 400 held-out images: teacher 0." in found.reason and "of colour" in found.reason
    assert found.next.startswith("Students cannot learn more than the teacher knows")
    assert "400 images give wide intervals" in found.next


def test_conclude__a_difference_within_the_interval_is_none() -> None:
    floors = {"pixels": voted(0.1, 1), "colour": voted(0.30, 2)}
    networks = {"teacher": voted(0.8, 3), "good": voted(0.8, 4), "poor": voted(0.33, 5)}
    untrained = dict.fromkeys(networks, voted(0.1, 6))
    found = conclude_by_labels(networks, untrained, floors, LABELS)
    assert found.text.startswith("teacher, good are better than the best of colours")
    assert "; poor is not." in found.text
    assert found.text.endswith("poor below teacher; good level with teacher.")
    assert found.next.startswith("Train longer (schedule.steps)")


def test_conclude__all_better() -> None:
    floors = {"pixels": voted(0.1, 1), "colour": voted(0.2, 2)}
    networks = {"teacher": voted(0.8, 3)}
    found = conclude_by_labels(networks, {"teacher": voted(0.5, 4)}, floors, LABELS)
    assert found.text.startswith("Every network is better")
    assert found.networks["teacher"]["floor"] == "its untrained copy"
    assert found.next.startswith("Nothing to do")


def near(value: float) -> dict[str, Any]:
    return {"class": {"mutual_knn": value}}


def test_conclude__without_labels_by_neighbours() -> None:
    agreement = {
        "reference": "teacher",
        "images": 900,
        "floors": {"pixels": near(0.2), "colour": near(0.3)},
        "networks": {
            "teacher": {"untrained": near(0.3)},
            "near": {**near(0.6), "untrained": near(0.1)},
            "far": {**near(0.2), "untrained": near(0.1)},
        },
    }
    found = conclude_by_closeness(agreement)
    assert found is not None
    assert found.text.startswith("near is nearer to teacher than") and "far is not" in found.text
    assert "far shares 20% of nearest neighbours with teacher, colour 30%" in found.reason
    assert found.next.startswith("Train longer")
    del agreement["networks"]["near"], agreement["networks"]["far"]  # type: ignore[attr-defined]
    assert conclude_by_closeness(agreement) is None
