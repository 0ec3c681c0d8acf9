from vit_jax.report import artefacts
from vit_jax.report.page import Page


def heat(cells, classes, predicted=None):
    """The confusion matrix of a page."""
    page = Page("run", "x", "")
    found = {"class_names": classes, "cells": cells} | (
        {"predicted_names": predicted} if predicted else {}
    )
    artefacts.classification(page, {"confusion": found}, name="x", run=0)
    return next(iter(page._figures.values()))["data"][0] if page._figures else None


def test_of_a_thousand_classes_the_most_confused_are_shown():
    classes = [f"class {n}" for n in range(1000)]
    cells = [[n, n, 50] for n in range(1000)] + [[n, n + 1, 1] for n in range(0, 900, 2)]
    cells += [[700, 3, 9], [3, 700, 4]]
    drawn = heat(cells, classes)
    assert len(drawn["z"]) == len(drawn["z"][0]) == artefacts.MOST_CONFUSED
    shown = {row[0][0]: row for row in drawn["customdata"]}
    assert {"class 3", "class 700"} <= set(shown)
    counts = {taken: count for _, taken, count in shown["class 700"]}
    assert (counts["class 700"], counts["class 3"]) == (50, 9)
    place = [taken for _, taken, _ in shown["class 700"]].index("class 3")
    row = list(shown).index("class 700")
    assert drawn["z"][row][place] == 0.15  # 9 of 60: one more went to a class that is not shown


def test_a_thousand_classes_without_a_mistake_need_no_matrix():
    assert heat([[n, n, 5] for n in range(1000)], [str(n) for n in range(1000)]) is None


def test_a_few_classes_of_a_large_head():
    head = [str(n) for n in range(1000)]
    drawn = heat([[0, 7, 3], [0, 500, 2], [1, 9, 4]], ["7", "9"], head)
    assert [[is_, taken, count] for is_, taken, count in drawn["customdata"][0] if count] == [
        ["7", "7", 3],
        ["7", "500", 2],
    ]
